"""tune(): the best model under a budget, found by a search over specs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import registry
from ..branches import branches
from ..delivery import sha256
from ..errors import OutputError, UsageError
from ..images import search_here
from ..ir import Graph
from ..load import Loaded
from ..opening import Options
from ..ops import CONTRACTIONS, kind, macs, node_macs
from ..progress import Watch
from ..publishing import hold
from ..spec import split
from ..stopwatch import HERE, Stopwatch
from ..target import Target
from . import picture
from .engines import Engine, Local, Ray, file_of
from .objectives import QUALITIES, constraint, objective
from .space import Space
from .store import key_of
from .study import SAMPLERS, STATE, SUMMARY, Study
from .trial import Task, opened, samples_of

TRIALS = 40
MADE = ("best", "pareto", "trials", SUMMARY, picture.NAME)  # what a search replaces in its folder
LEAST_DB = 20.0  # of the outputs, where neither a metric nor a constraint was named
INT8 = (
    "int8(rounding={adaptive,nearest},equalise={true,false},calibration={auto,mse,minmax,percentile},"
    "sqnr={none,20,25,30})"
)
LESSON_SECONDS, LESSON_SHARE = 600.0, 0.6  # of one worker, and at most of all the time there is
LESSON_MACS = 19e9  # a second that one core learns with: ResNet-56 on AVX2
LESSON_COST = 2.5  # times the MACs of the model: the teacher, a student of half its size, and gradients
LEAST_LOOKED_AT = 2500  # samples, the same ones again counted; fewer teach little
MOST_EPOCHS = 60  # what `distill` does by itself
SHORTEN = "shorten?(macs=0.4..0.9,params=0.4..1,reach=best)"
PRUNE = "prune?(macs=0.4..0.95,criterion={auto,sensitivity,l2},reach=best)"
GUESSES: tuple[dict[str, str], ...] = (  # what may want a lesson comes first: lessons take long
    {
        "shorten": "with",
        "shorten.macs": "0.7",
        "shorten.params": "0.7",
        "prune": "with",
        "prune.macs": "0.65",
    },
    {
        "shorten": "with",
        "shorten.macs": "0.75",
        "shorten.params": "0.7",
        "prune": "with",
        "prune.macs": "0.7",
    },
    {"shorten": "with", "shorten.macs": "0.7", "shorten.params": "1"},
    {"shorten": "with", "shorten.macs": "0.6", "shorten.params": "0.55"},
    {"prune": "with", "prune.macs": "0.8"},
    {"prune": "with", "prune.macs": "0.6"},
    {"int8.rounding": "nearest", "int8.equalise": "false"},
)


def tune(
    model: str | Path,
    *,
    calibration: str | Path | None = None,
    target: str | None = None,
    objectives: Sequence[str] = ("latency",),
    constraints: Sequence[str] = (),
    trials: int = TRIALS,
    timeout: float | None = None,
    passes: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    sampler: str = "tpe",
    engine: str = "local",
    workers: int | None = None,
    ray_address: str = "auto",
    trial_cpus: float = 1.0,
    running: Engine | None = None,
    latency_table: str | Path | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> Study:
    """Searches specs for the least of the objectives that keeps to the constraints; everything lies in `output`.

    model, calibration: files, which workers read too. objectives: `latency`, `size`, `macs`, `params`; the first
    decides which model is the best. constraints: `drop<=1.0` and others, see `objectives`. passes: a space (see
    `space`); one that suits model and target if None. trials, timeout (seconds): whichever ends first. resume: goes on
    with the search in `output`. engine: `local` with so many `workers` (one for each core if None), or `ray`; running:
    one that is open. latency_table: of an earlier search's tune.json, instead of measuring. watch: is told
    of rounds, and of every trial as it ends.
    options: the fields of `Options`.

    `output`/best holds the best model, or the nearest to the constraints where none keeps to them; `output`/pareto
    those that no other beats. UsageError where a search is there already, or none is to resume.
    """
    opt = Options.of({**options, "measure": True})
    where = registry.target(target)
    wanted = [constraint(text) for text in constraints]
    if sampler not in SAMPLERS:
        raise UsageError(f"--sampler {sampler}: no such sampler; there are {', '.join(SAMPLERS)}")
    if not wanted or all(one.name not in QUALITIES for one in wanted):
        wanted.append(constraint("drop<=1.0" if opt.evaluate is not None else f"sqnr>={LEAST_DB:g}"))
    for one in wanted:
        if one.name in ("drop", "metric") and opt.evaluate is None:
            raise UsageError(
                f"--constraint '{one}' needs a metric: name one with --eval, or constrain sqnr, cosine or agreement"
            )
    folder = Path(output) if output is not None else Path(f"{Path(model).resolve().name.split('.')[0]}-tuned")
    values = tuple(dict.fromkeys(map(objective, objectives)))
    here = contextlib.nullcontext(running) if running is not None else None
    with (
        alone(folder, resume, MADE),
        here or opened_engine(engine, workers, ray_address, trial_cpus) as runner,
    ):
        task, loaded, graph = made_task(model, calibration, target, folder, options)
        samples = samples_of(task, loaded, graph) if passes is None else 0
        task = dataclasses.replace(task, constraints=tuple(wanted))
        space = Space(passes or default_space(graph, where, values, samples, timeout), registry.passes())
        known = space.decisions()
        study = Study(
            task=task,
            space=space,
            objectives=values,
            constraints=task.constraints,
            engine=runner,
            trials=trials,
            timeout=timeout,
            sampler=sampler,
            seed=opt.seed,
            guesses=[
                _recipe(space, where),
                *(g for g in GUESSES if all(word in known.get(name, ()) for name, word in g.items())),
            ],
            timed_on=elsewhere(where, opt.latency_cmd),
            table=_table(latency_table),
            watch=watch or Watch(),
        )
        study.run()
    return study


def default_space(
    graph: Graph, target: Target, objectives: Sequence[str], samples: int, timeout: float | None = None
) -> str:
    """What may pay for this model on this target: the recipe with integers first, then branches, channels, ranks,
    halves.

    samples: of the calibration data. timeout: seconds of the whole search.
    """
    work: dict[str, int] = {}
    for node in graph.nodes:
        if kind(node) in CONTRACTIONS:
            work[kind(node)] = work.get(kind(node), 0) + node_macs(node)
    convolves = work.get("conv", 0) + work.get("conv_transpose", 0) > sum(work.values()) / 2
    ends = []
    if samples:
        ends.append(INT8)
    elif not convolves:
        ends.append("int8(scheme=dynamic)")
    if not convolves and "size_mb" in objectives:
        ends.append("int4(block={32,64,128})")
    if "CPUExecutionProvider" not in target.providers[:1]:
        ends.append("fp16")
    ends.append("none")
    parts = ["merge"]
    if samples:
        parts += [SHORTEN] if any(branches(graph)) else []
        parts += [PRUNE, "squeeze?(macs=0.6..0.95,measure=false,reach=best)"]
        epochs = _epochs(graph, samples, timeout)
        parts += [f"distill?(epochs={epochs},minutes=none)"] if epochs else []
    else:
        parts.append("prune?(macs=0.7..0.95,reach=best)")
    return ",".join([*parts, "fold", f"{{{','.join(ends)}}}"])


def _epochs(graph: Graph, samples: int, timeout: float | None) -> int:
    """Of distillation that a trial has time for; 0 where it is too short to teach anything. Not by the clock, so that
    every machine teaches the same.
    """
    seconds = min(LESSON_SECONDS, LESSON_SHARE * timeout) if timeout is not None else LESSON_SECONDS
    looked_at = seconds * LESSON_MACS / (LESSON_COST * max(macs(graph), 1))
    return min(int(looked_at / samples), MOST_EPOCHS) if looked_at >= LEAST_LOOKED_AT else 0


def _recipe(space: Space, target: Target) -> dict[str, str]:
    """What makes the first guess the target's recipe, as far as the space can say it."""
    names = {part.partition("(")[0] for part in split(target.recipe)}
    turns = {name: words for name, words in space.decisions().items() if "|" in name}
    return {
        name: next((w for w in words if w in names), "none" if "none" in words else words[0])
        for name, words in turns.items()
    }


def elsewhere(target: Target, command: str | None = None) -> str:
    """Where times are taken, in words, if that is not simply this host."""
    place = Stopwatch(target, command, {}).place
    return "" if place == HERE else place


def _table(path: str | Path | None) -> dict[str, dict[str, float]]:
    if path is None:
        return {}
    try:
        return dict(json.loads(Path(path).read_text())["latency_table"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--latency-table {path}: not the tune.json of a search") from None


def made_task(
    model: str | Path,
    calibration: str | Path | None,
    target: str | None,
    folder: Path,
    options: Mapping[str, Any],
) -> tuple[Task, Loaded, Graph]:
    """What all trials share, its digest taken from weights, data and options; the model as it came, and its graph."""
    task = Task(
        model=str(Path(model).resolve()),
        target=registry.target(target).name,
        calibration=str(Path(calibration).resolve()) if calibration is not None else None,
        options=options,
        folder=str(folder.resolve()),
        store=str((folder / "store").resolve()),
        digest="",
    )
    loaded, graph = opened(task)
    return dataclasses.replace(task, digest=_digest(loaded, graph, task)), loaded, graph


@contextlib.contextmanager
def opened_engine(name: str, workers: int | None, address: str, cpus: float) -> Iterator[Engine]:
    """`local` or `ray`; UsageError for another name, and for a cluster that is not there."""
    engine = _engine(name, workers, address, cpus)
    try:
        yield engine
    finally:
        engine.close()


def _engine(name: str, workers: int | None, address: str, cpus: float) -> Engine:
    if name == "local":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, int(cpus))
        return Local(workers or max(1, cores // threads), threads)
    if name == "ray":
        return Ray(address, cpus)
    raise UsageError(f"--engine {name}: no such engine; there are local and ray")


def _digest(loaded: Loaded, graph: Graph, task: Task) -> str:
    """Of everything that decides the bytes of a trial beside its spec: the model's file, data, options."""
    named = {"calibration": task.calibration, **task.options}
    files = {
        key: _digest_of(path)
        for key, one in named.items()
        if isinstance(one, (str, Path)) and (path := _file_of(str(one))) is not None
    }
    plain = {key: str(value) for key, value in named.items() if key not in files}
    return key_of(loaded.sha256, graph.fingerprint(), files, plain)


def _file_of(named: str) -> Path | None:
    """A file or folder, or the file of `module:function`."""
    if (found := file_of(named)) is not None:
        return found
    head = named.rpartition(":")[0]
    search_here()
    try:
        spec = importlib.util.find_spec(head) if head else None
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


def _digest_of(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for one in sorted(path.rglob("*")):
        stat = one.stat()
        digest.update(f"{one.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def alone(folder: Path, resume: bool | None = None, made: Sequence[str] = ()) -> Iterator[None]:
    """The folder of a search, in which no other one runs. UsageError where it is not what `resume` says, if it does.

    made: names that a search which begins may not find there, as it would replace them.
    """
    folder = Path(os.path.realpath(folder))
    begun = (folder / STATE).exists()
    if begun and resume is False:
        raise UsageError(f"{folder} holds a search: go on with --resume, or name another --output")
    if resume and not begun:
        raise UsageError(f"{folder} holds no search to resume")
    if there := [name for name in made if not begun and (folder / name).exists()]:
        raise UsageError(
            f"{folder} holds {', '.join(there)}, which the search would replace: name another --output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror or error
        raise OutputError(f"cannot make the folder {folder}: {why}") from error
    try:
        handle = hold(folder, wait=False)
    except OSError:
        raise UsageError(f"another search runs in {folder}") from None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
