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
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import publishing, registry, toml
from ..delivery import sha256
from ..errors import CompressorError, UsageError, nearest
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
PATHS = ("path", "calib", "eval", "adapter", "preprocess")
SEARCH = ("objectives", "constraints", "trials", "timeout", "sampler")  # a budget: any of these


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
    defaults, models = text.get("defaults", {}), text.get("model", [])
    tables = isinstance(models, list) and all(isinstance(one, dict) for one in models)
    if not tables or not models or not isinstance(defaults, dict):
        raise UsageError(f"{listed}: name at least one model in a table [[model]]")
    home = output if output is not None else listed.parent
    entries = [_entry(listed, i, {**defaults, **one}, home) for i, one in enumerate(models, 1)]
    folders = [entry.output for entry in entries]
    for one in folders:
        if folders.count(one) > 1:
            raise UsageError(
                f"{listed}: two models would be written to {one}; give each an output of its own"
            )
    return entries


def _entry(listed: Path, number: int, values: Mapping[str, Any], home: Path) -> Entry:
    where = f"{listed}, model {number}"
    if "path" not in values:
        raise UsageError(f"{where}: it has no path")
    options: dict[str, Any] = {}
    for key, value in values.items():
        if key == "output":
            value = str(listed.parent / str(value))
        elif key in PATHS:
            value = (
                [_placed(listed, one) for one in value] if isinstance(value, list) else _placed(listed, value)
            )
        options[NAMES.get(key, key.replace("-", "_"))] = value
    path = Path(options.pop("path"))
    known = _known_options()
    for name in options:
        if name not in known:
            raise UsageError(f"{where}: unknown key '{name}'{nearest(name, known)}")
    for name in ("objectives", "constraints"):
        if isinstance(options.get(name), str):
            options[name] = [options[name]]
    folder = Path(options.pop("output", home / path.name.split(".")[0]))
    return Entry(path, folder, options)


def _placed(listed: Path, value: Any) -> str:
    """A path relative to the list, where there is something; words such as `module:function` as they are."""
    beside = listed.parent / str(value)
    return str(beside.resolve()) if beside.exists() else str(value)


def _known_options() -> set[str]:
    from ..opening import Options

    return {f.name for f in dataclasses.fields(Options)} | {
        "passes", "target", "calibration", "output", *SEARCH,
    }  # fmt: skip


def _prepared(entry: Entry) -> tuple[Task, str, str]:
    """Task and spec of a model, and the key of everything that decides its result."""
    options = {
        k: v for k, v in entry.options.items() if k not in ("passes", "target", "calibration", *SEARCH)
    }
    target = registry.target(entry.options.get("target"))
    task, _ = made_task(entry.path, entry.options.get("calibration"), target.name, _work(entry), options)
    spec = entry.options.get("passes") or target.recipe
    search = {name: entry.options.get(name) for name in SEARCH}
    return task, spec, key_of(task.digest, target.name, {k: str(v) for k, v in options.items()}, spec, search)


def _work(entry: Entry) -> Path:
    return entry.output.with_name(f".{entry.output.name}-work")


def _known(entry: Entry, key: str) -> Outcome | None:
    try:
        kept = json.loads((entry.output / RECEIPT).read_text())
        outcome = Outcome(**kept["outcome"])
        whole = sha256(entry.output / "model.onnx") == outcome.sha256
        return outcome if kept["key"] == key and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _searched(entry: Entry, number: int, task: Task, spec: str, key: str, runner: Engine) -> Outcome:
    """A search that goes on where an earlier one ended, unless it was for something else."""
    options = dict(entry.options)
    folder = entry.output.with_name(f"{entry.output.name}-search")
    wanted = {name: options.get(name) for name in ("objectives", "constraints", "sampler")}
    mine = key_of(task.digest, task.target, spec, wanted)
    if _text(folder / KEY) != mine:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
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
        (stage / RECEIPT).write_text(json.dumps({"key": key, "outcome": dataclasses.asdict(outcome)}))
