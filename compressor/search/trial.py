"""One trial: a spec compiled and judged, as a function of plain data that any worker anywhere can call."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__, data, delivery, measure, metrics, page, publishing, registry, report, sessions
from ..emit import Emitted, feeds
from ..errors import CompressorError, DataError, FunctionError, OutputError
from ..ir import Graph
from ..load import Loaded
from ..opening import Options, capture_model, load_model, streams
from ..pipeline import Memory, Pass, Row
from ..run import Run
from ..stopwatch import Stopwatch
from . import timing
from .objectives import Constraint, hopeless
from .store import Store, key_of

SECONDS = 2.0  # of timing a model and the original in turns
DONE, REFUSED, HOPELESS, FAILED = "done", "refused", "hopeless", "failed"


@dataclass(frozen=True)
class Task:
    """What all trials of a study share, as plain data. Files are named by paths that every worker can read.

    digest: of model, data and options. constraints: those that a trial is given up by, early. measure: whether passes
    decide by the stopwatch, though other trials run beside it.
    """

    model: str
    target: str
    calibration: Any
    options: Mapping[str, Any]
    folder: str
    store: str
    digest: str
    constraints: tuple[Constraint, ...] = ()
    measure: bool = False

    @property
    def original(self) -> Path:
        """The model as it came, as ONNX."""
        return Path(self.folder) / "original"

    def trial(self, number: int) -> Path:
        return Path(self.folder) / "trials" / f"{number:04d}"


@dataclass(frozen=True)
class Outcome:
    """What became of one trial. why: in words, where it is not DONE. values: see `objectives`. reused: passes that
    another trial had made. doomed: passes after which no trial keeps to the constraints.
    """

    number: int
    spec: str
    state: str
    why: str = ""
    values: dict[str, float] = field(default_factory=dict)
    sha256: str = ""
    reused: int = 0
    seconds: float = 0.0
    doomed: str = ""


class _Hopeless(Exception):
    """A constraint is missed by more than the passes to come can mend. doomed: the passes so far, as a spec. values:
    what is known of it.
    """

    def __init__(self, why: str, doomed: str, values: dict[str, float]) -> None:
        super().__init__(why)
        self.doomed, self.values = doomed, values


_OPEN: dict[str, tuple[Loaded, Graph]] = {}


def _opened(task: Task) -> tuple[Loaded, Graph]:
    """The model of a study, read and captured once by each worker."""
    if task.digest not in _OPEN:
        _OPEN.clear()
        _OPEN[task.digest] = opened(task)
    return _OPEN[task.digest]


def opened(task: Task) -> tuple[Loaded, Graph]:
    """The model as it came, and its graph."""
    opt = Options.of({**task.options, "measure": False})
    loaded = load_model(task.model, opt)
    return loaded, capture_model(loaded, None, opt)


class Trial(Run):
    """A run that begins behind passes which another one has made, and gives up early."""

    def __init__(self, task: Task, number: int, spec: str) -> None:
        target = registry.target(task.target)
        opt = Options.of({**task.options, "measure": task.measure})
        super().__init__(opt, target.speaking(opt.opset, opt.min_ort), spec)
        self.task, self.number = task, number
        self.kept = _Kept(self)
        self.reused = 0

    def capture(self, loaded: Loaded, example: Any) -> Graph:
        return _opened(self.task)[1].copy()

    def baseline(self, graph: Graph) -> Emitted | None:
        made = self.task.original / "model.onnx"
        if self.task.measure:
            return super().baseline(graph)
        if not made.exists():
            return None
        return Emitted(made, (), (), _bytes(made))

    def after_pass(self, row: Row, graph: Graph) -> None:
        super().after_pass(row, graph)
        if not row.config:
            self.first = row
            return
        done = [one.name for one in self.pipeline.passes].index(row.name) + 1
        made, left = self.pipeline.passes[:done], self.pipeline.passes[done:]
        if left and not any(one.learns for one in left):
            values = _quality(row, self.first) | _work(row, self.first)
            why = hopeless(self.task.constraints, values)
            if why:
                raise _Hopeless(f"after {row.config}: {why}", ",".join(map(str, made)), values)


class _Kept(Memory):
    def __init__(self, trial: Trial) -> None:
        self.trial, self.store = trial, Store(Path(trial.task.store))
        self.base: Graph | None = None

    def recall(self, passes: Sequence[Pass], graph: Graph) -> tuple[Graph, list[Row]] | None:
        self.base = graph.copy()
        counts = range(len(passes) - 1, 0, -1)
        found = self.store.recall([self._key(passes[:n]) for n in counts], self.base)
        if found is None:
            return None
        rows = [Row.of(row) for row in found[1]]
        self.trial.reused, self.trial.metric = len(rows) - 1, rows[-1].metric
        return found[0], rows

    def keep(self, passes: Sequence[Pass], rows: Sequence[Row], graph: Graph) -> None:
        assert self.base is not None
        self.store.keep(self._key(passes), graph, self.base, [row.to_dict() for row in rows])

    def _key(self, passes: Sequence[Pass]) -> str:
        task = self.trial.task
        versions = measure.versions()
        return key_of(__version__, versions, task.digest, task.target, task.options, [str(p) for p in passes])


def run(task: Task, number: int, spec: str) -> Outcome:
    """Compiles a spec into the folder of its trial; whatever happens, there is an outcome. OutputError is raised."""
    start = time.perf_counter()
    folder = task.trial(number)
    shutil.rmtree(folder, ignore_errors=True)
    trial: Trial | None = None

    def outcome(state: str, why: str = "", **facts: Any) -> Outcome:
        return Outcome(
            number, spec, state, why, reused=trial.reused if trial is not None else 0,
            seconds=time.perf_counter() - start, **facts,
        )  # fmt: skip

    try:
        trial = Trial(task, number, spec)
        with trial.memory, publishing.staging(folder) as stage:
            result = trial.compile(_opened(task)[0], None, task.calibration, stage)
            written = report.write_report(stage / "report.json", result.report)
            page.write(stage / page.NAME, report.read_report(written))
        made = result.report["emitted"]
        last = Row.of(result.report["rows"][-1])
        values = _quality(last, trial.first, made.get("metric")) | _work(last, trial.first)
        values["size_mb"] = made["bytes"] / 1e6
        return outcome(DONE, values=values, sha256=made["sha256"])
    except _Hopeless as error:
        return outcome(HOPELESS, str(error), doomed=error.doomed, values=error.values)
    except OutputError:
        raise
    except FunctionError as error:  # a metric of the user's
        return outcome(FAILED, _line(error))
    except CompressorError as error:
        return outcome(REFUSED, _line(error))
    except (Exception, SystemExit) as error:
        return outcome(FAILED, f"{type(error).__name__}: {_line(error)}")


def original(task: Task) -> dict[str, float]:
    """Writes the model as it came, as ONNX, and answers its values, by the user's metric, too.

    CompressorError where data or metric do not work even on it.
    """
    loaded, graph = _opened(task)
    run, graph = _as_shipped(task, loaded, graph)
    task.original.mkdir(parents=True, exist_ok=True)
    plain = dataclasses.replace(run.target, formats=("onnx",))
    whole = run.shipped(graph)
    emitted = delivery.deliver(whole.copy(), plain, task.original, {}, run.fixed(graph))
    values = {"size_mb": emitted.bytes / 1e6, "macs": 1.0, "params": 1.0}
    held_out = streams(graph, task.calibration, run.opt, loaded, None, run.fixed(graph)).held_out
    evaluator, _ = metrics.of_rows(graph, loaded, held_out, run.plan, run.opt, run.fixed(graph))
    if evaluator is not None:
        try:
            found = evaluator.of_graph(whole)
        except CompressorError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"--eval, on the model as it came: {type(error).__name__}: {_line(error)}"
            ) from error
        metric = next(iter(found.values()), math.nan)
        if found and not math.isfinite(metric):
            raise DataError(
                f"--eval, on the model as it came, gives {metric}, which is no number to compare with"
            )
        if not found and any(one.name in ("drop", "metric") for one in task.constraints):
            raise DataError("--eval, on the model as it came, gives no metric")
        if found:
            values |= {"metric": metric, "drop": 0.0}
    return values


def samples_of(task: Task, loaded: Loaded, graph: Graph) -> int:
    """How many samples of the calibration data a pass may learn from; 0 without data."""
    run, graph = _as_shipped(task, loaded, graph)
    seen = streams(graph, task.calibration, run.opt, loaded, None, run.fixed(graph)).rest
    return seen.samples if seen is not None else 0


def _as_shipped(task: Task, loaded: Loaded, graph: Graph) -> tuple[Run, Graph]:
    """A run that never runs, and a copy of the graph with what images come in as in front."""
    opt, target = Options.of({**task.options, "measure": False}), registry.target(task.target)
    run = Run(opt, target.speaking(opt.opset, opt.min_ort), target.recipe)
    graph = graph.copy()
    run.prepare(graph, loaded)
    return run, graph


def timed(task: Task, number: int) -> dict[str, float]:
    """`latency_ms` of a trial's file, and its `speedup` over the original, timed in turns with it."""
    run, graph = _as_shipped(task, *_opened(task))
    stopwatch = Stopwatch(registry.target(task.target), run.opt.latency_cmd, {})
    files = {
        "model": _emitted(task.trial(number) / "model.onnx", graph),
        "float": _emitted(task.original / "model.onnx", graph),
    }
    found = stopwatch.latencies(files, graph, seconds=SECONDS)
    return {"latency_ms": found["model"]["median_ms"], "speedup": found["ratio"]}


def costs(task: Task, number: int) -> dict[str, float]:
    """What a trial's file costs to run, see `timing.costs`, and its `speedup` over the original."""
    _, graph = _as_shipped(task, *_opened(task))
    files = [_emitted(one / "model.onnx", graph) for one in (task.trial(number), task.original)]
    one = sessions.single(files[0].inputs, graph.example)
    many = None
    if graph.inputs[0].shape and graph.inputs[0].shape[0] == files[0].inputs[0].shape[0] == "batch":
        samples = data.synthetic(
            graph.inputs, graph.example, samples=timing.BATCH, table_sizes=data.table_sizes(graph)
        )
        many = list(feeds(files[0].inputs, next(iter(samples)).inputs).values())
    mine, theirs = timing.costs([file.path for file in files], one, many, SECONDS)
    return mine | {"speedup": theirs["p50_ms"] / mine["p50_ms"]}


def _emitted(path: Path, graph: Graph) -> Emitted:
    """A file as `emit` describes it; integer: for its own sake, so that a large one is loaded as it ships."""
    with sessions.opened(path) as session:
        inputs = sessions.inputs_of(session, graph.inputs)
        outputs = tuple(one.name for one in session.get_outputs())
    return Emitted(path, inputs, outputs, _bytes(path), integer=True)


def _work(last: Row, first: Row) -> dict[str, float]:
    return {
        "macs": last.macs / max(first.macs, 1),
        "params": last.params / max(first.params, 1),
        "macs_count": float(last.macs),
        "flops": 2.0 * last.macs,
        "params_count": float(last.params),
    }


def _quality(row: Row, first: Row, metric: Mapping[str, float] | None = None) -> dict[str, float]:
    """How good the outputs are; `metric` and its `drop` in points are the first that the user's evaluation gave."""
    found = {"sqnr": row.total_db, "cosine": row.total_cosine, "agreement": row.total_agreement}
    metric = metric or row.metric
    for name, value in metric.items():
        before = first.metric.get(name, math.nan)
        return {**found, "metric": value, "drop": 100 * (before - value)}
    return found


def _bytes(path: Path) -> int:
    return sum(one.stat().st_size for one in path.parent.iterdir() if one.name.startswith(path.name))


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
