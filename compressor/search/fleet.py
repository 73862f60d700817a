"""batch(): many models, a recipe or a budget for each, one table; what was done is not done again.

    [defaults]                      # for every model that does not say otherwise; names are those of the flags
    target = "cpu"
    passes = "merge,fold,int8"

    [[model]]
    path = "resnet.pt2"
    calib = "images/"

    [[model]]
    path = "bert/"
    calib = "texts.txt"
    constraint = ["drop<=1.0"]      # a budget: searched, not compiled
    trials = 20

Paths are relative to the list. A model's folder is `output`, or its name below the output folder of the list.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import publishing, registry, toml
from ..delivery import sha256
from ..errors import CompressorError, OutputError, UsageError, nearest
from ..progress import Watch
from ..report import write_text
from . import trial as trials
from .engines import Asked, Engine
from .store import key_of
from .study import STATE
from .trial import DONE, FAILED, REFUSED, Outcome, Task
from .tune import alone, made_task, opened_engine, tune

RECEIPT, KEY = "batch.json", "batch.key"
# Keys of an entry -> options of compress and tune that are called otherwise there.
NAMES = {
    "calib": "calibration", "eval": "evaluate", "model": "model_spec", "input": "inputs", "objective": "objectives",
    "constraint": "constraints",
}  # fmt: skip
PATHS = ("calibration", "evaluate", "adapter", "preprocess", "model_spec")  # they name files, or may
SEARCH = ("objectives", "constraints", "trials", "timeout", "sampler")  # a budget: any of these
WORDS = (
    "path", "output", "passes", "target", "calibration", "evaluate", "postprocess", "preprocess", "image_input",
    "model_spec", "combine", "task", "text_field", "label_field", "min_ort", "latency_cmd", "sampler",
)  # fmt: skip
LISTS = ("adapter", "inputs", "allow_missing", "emit", "objectives", "constraints")  # of words, or one word
FLAGS = ("trust_pickle", "dynamic")
COUNTS = {"calib_limit": 1, "opset": 1, "seed": 0, "trials": 1}  # and the least
NUMBERS = ("tolerance", "max_mb", "timeout")


@dataclass(frozen=True)
class Entry:
    """One model of a list. options: of compress or tune, by the api's names."""

    path: Path
    output: Path
    options: Mapping[str, Any]

    @property
    def searched(self) -> bool:
        return any(name in self.options for name in SEARCH)


def batch(
    listed: str | Path,
    *,
    output: str | Path | None = None,
    engine: str = "local",
    workers: int | None = None,
    ray_address: str = "auto",
    trial_cpus: float = 1.0,
    watch: Watch | None = None,
) -> list[tuple[Entry, Outcome]]:
    """Compiles or searches every model of a TOML list (see above) into its folder; what becomes of each.

    A model whose folder was made from the same files and options is not made again. One that fails costs the others
    nothing. UsageError names what the list gets wrong, before anything runs.
    """
    entries = read(Path(listed), Path(output) if output is not None else None)
    watch = watch or Watch()
    found: dict[int, Outcome] = {}
    with (
        opened_engine(engine, workers, ray_address, trial_cpus) as runner,
        contextlib.ExitStack() as held,
    ):
        asked: list[Asked] = []
        tasks: dict[int, tuple[Entry, Task, str]] = {}
        for number, entry in enumerate(entries):
            try:
                held.enter_context(alone(_work(entry)))
                held.callback(shutil.rmtree, _work(entry), ignore_errors=True)
                task, spec, key = _prepared(entry)
                known = _known(entry, key)
                if known is not None:
                    found[number] = known
                elif entry.searched:
                    with watch(f"searching {entry.path.name}"):
                        found[number] = _searched(entry, number, task, spec, key, runner)
                else:
                    tasks[number] = entry, task, key
                    asked.append((task, number, spec))
            except CompressorError as error:
                found[number] = Outcome(number, "", REFUSED, str(error).splitlines()[0])
            except Exception as error:  # a file that we read wrongly, most likely: the others are made
                found[number] = Outcome(
                    number, "", FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
                )
            if number in found:
                _say(watch, entries[number], found[number])
        while asked:  # a few at a time: what was made is in its place, whatever becomes of the others
            some, asked = asked[: runner.workers], asked[runner.workers :]
            names = ", ".join(tasks[number][0].path.name for _, number, _ in some)
            with watch(f"compiling {names}", len(some)) as advance:
                made = {outcome.number: outcome for outcome in runner.run(some, lambda outcome: advance(1))}
            for number, outcome in made.items():
                with watch(f"timing {tasks[number][0].path.name}"):
                    found[number] = _published(runner, *tasks[number], outcome)
                _say(watch, entries[number], found[number])
    return [(entry, found[number]) for number, entry in enumerate(entries)]


def _say(watch: Watch, entry: Entry, outcome: Outcome) -> None:
    watch.say("trial", model=entry.path.name, **dataclasses.asdict(outcome))


def read(listed: Path, output: Path | None) -> list[Entry]:
    """The entries of a list. UsageError, FileError."""
    text = toml.read(listed)
    for name in text:
        if name not in ("defaults", "model"):
            raise UsageError(f"{listed}: unknown table '{name}'{nearest(name, ('defaults', 'model'))}")
    defaults, models = text.get("defaults", {}), text.get("model", [])
    tables = isinstance(models, list) and all(isinstance(one, dict) for one in models)
    if not tables or not models or not isinstance(defaults, dict):
        raise UsageError(f"{listed}: name at least one model in a table [[model]]")
    home = output if output is not None else listed.parent
    entries = [_entry(listed, i, {**defaults, **one}, home) for i, one in enumerate(models, 1)]
    folders = [entry.output for entry in entries] + [_search(entry) for entry in entries if entry.searched]
    for one in folders:
        if folders.count(one) > 1:
            raise UsageError(
                f"{listed}: two models would be written to {one}; give each an output of its own"
            )
        if one in Path(os.path.realpath(listed)).parents:
            raise UsageError(
                f"{listed}: a model would be written over {one}, where the list is; give it an output"
            )
    return entries


def _entry(listed: Path, number: int, values: Mapping[str, Any], home: Path) -> Entry:
    where, options = f"{listed}, model {number}", dict[str, Any]()
    for key, value in values.items():
        name = NAMES.get(key, key.replace("-", "_"))
        if name in options:
            raise UsageError(f"{where}: '{key}' is said twice")
        options[name] = _checked(where, key, name, value)
    if not options.get("path"):
        raise UsageError(f"{where}: it has no path")
    for name in PATHS:
        if name in options:
            value = options[name]
            options[name] = (
                [_placed(listed, one) for one in value] if isinstance(value, list) else _placed(listed, value)
            )
    path = listed.parent / options.pop("path")
    folder = options.pop("output", None)
    chosen = listed.parent / folder if folder is not None else home / path.name.split(".")[0]
    return Entry(path, Path(os.path.realpath(chosen)), options)


def _checked(where: str, key: str, name: str, value: Any) -> Any:
    """The value of a key, a word for several as a list. UsageError for an unknown key, and another kind of value."""
    single = not isinstance(value, (list, dict, bool))
    if name in WORDS:
        good, kind = isinstance(value, str), "a word"
    elif name in LISTS:
        value = [value] if isinstance(value, str) else value
        good, kind = (
            isinstance(value, list) and all(isinstance(one, str) for one in value),
            "a word, or a list of them",
        )
    elif name in FLAGS:
        good, kind = isinstance(value, bool), "true or false"
    elif name in COUNTS:
        least = COUNTS[name]
        good, kind = single and isinstance(value, int) and value >= least, f"a whole number, {least} or more"
    elif name in NUMBERS:
        good, kind = single and isinstance(value, (int, float)) and 0 < value < math.inf, "a number above 0"
    else:
        known = {*WORDS, *LISTS, *FLAGS, *COUNTS, *NUMBERS, *NAMES}
        raise UsageError(f"{where}: unknown key '{key}'{nearest(key, known)}")
    if not good:
        raise UsageError(f"{where}: '{key}' is {kind}, not {json.dumps(value, default=str)}")
    return value


def _placed(listed: Path, value: str) -> str:
    """What lies beside the list of `FILE`, `FOLDER:0.5` and `file.py:function`; other words as they are."""
    for name in (value, value.rpartition(":")[0]):
        beside = listed.parent / name
        if name and beside.exists():
            return f"{beside.resolve()}{value.removeprefix(name)}"
    return value


def _prepared(entry: Entry) -> tuple[Task, str, str]:
    """Task and spec of a model, and the key of everything that decides its result."""
    publishing.require_ours(entry.output)
    options = {
        k: v for k, v in entry.options.items() if k not in ("passes", "target", "calibration", *SEARCH)
    }
    target = registry.target(entry.options.get("target"))
    task, *_ = made_task(entry.path, entry.options.get("calibration"), target.name, _work(entry), options)
    task = dataclasses.replace(task, measure=True)  # as `compress` decides
    spec = entry.options.get("passes") or target.recipe
    search = {name: entry.options.get(name) for name in SEARCH}
    return task, spec, key_of(task.digest, target.name, {k: str(v) for k, v in options.items()}, spec, search)


def _work(entry: Entry) -> Path:
    return entry.output.with_name(f".{entry.output.name}-work")


def _search(entry: Entry) -> Path:
    """Where a model that has a budget is searched."""
    return entry.output.with_name(f"{entry.output.name}-search")


def _known(entry: Entry, key: str) -> Outcome | None:
    try:
        kept = json.loads((entry.output / RECEIPT).read_text())
        outcome = Outcome(**kept["outcome"])
        whole = all(sha256(entry.output / name) == digest for name, digest in kept["files"].items())
        return outcome if kept["key"] == key and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _searched(entry: Entry, number: int, task: Task, spec: str, key: str, runner: Engine) -> Outcome:
    """A search that goes on where an earlier one ended, unless it was for something else."""
    options = dict(entry.options)
    folder = _search(entry)
    wanted = {name: options.get(name) for name in ("objectives", "constraints", "sampler")}
    mine = key_of(task.digest, task.target, spec, wanted)
    with alone(folder):
        if (before := _text(folder / KEY)) != mine:
            if not before and any(folder.iterdir()):
                raise OutputError(
                    f"{folder} is not empty, and no batch has made it: give the model another output"
                )
            for one in folder.iterdir():
                shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()
            write_text(folder / KEY, mine)
    begun = (folder / STATE).exists()
    study = tune(entry.path, output=folder, resume=begun, running=runner, **options)
    best = study.best
    if best is None or not study.feasible:
        return Outcome(number, best.spec if best is not None else "", FAILED, study.failure())
    outcome = dataclasses.replace(best, number=number)
    _moved(study.folder / "best", entry, key, outcome)
    return outcome


def _published(engine: Engine, entry: Entry, task: Task, key: str, outcome: Outcome) -> Outcome:
    """Timed beside the original, and moved to where it belongs."""
    if outcome.state != DONE:
        return outcome
    try:
        engine.alone(trials.original, task)
        timed = engine.alone(trials.timed, task, outcome.number)
        outcome = dataclasses.replace(outcome, values=outcome.values | timed)
        _moved(task.trial(outcome.number), entry, key, outcome)
    except CompressorError as error:
        return dataclasses.replace(outcome, state=REFUSED, why=str(error).splitlines()[0])
    return outcome


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _moved(made: Path, entry: Entry, key: str, outcome: Outcome) -> None:
    with publishing.staging(entry.output) as stage:
        shutil.copytree(made, stage, dirs_exist_ok=True)
        files = {
            str(one.relative_to(stage)): sha256(one) for one in sorted(stage.rglob("*")) if one.is_file()
        }
        kept = {"key": key, "outcome": dataclasses.asdict(outcome), "files": files}
        (stage / RECEIPT).write_text(json.dumps(kept))
