"""One compilation, step by step: capture, run the passes, emit, verify, time, and describe it all in a report."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import (
    __version__,
    delivery,
    detections,
    emit,
    handover,
    heads,
    measure,
    metrics,
    notices,
    postprocess,
    program,
    receipt,
    registry,
    report,
    runtime,
    sessions,
)
from . import verify as contracts
from .data import Batch, Data
from .edges import few, varied
from .emit import Emitted, companion_of
from .errors import ContractError, DataError, TargetError, UnsupportedError, UsageError
from .evaluation import Evaluator
from .ir import Graph
from .layers import SAMPLES
from .layers import layers as layers_of
from .load import Loaded
from .opening import Options, Streams, capture_model, require_finite, streams, take_pixels
from .pipeline import Context, Memory, Pipeline, Row, parse
from .progress import Watch
from .spill import spilling, trim
from .stopwatch import Stopwatch
from .target import Target, release
from .trainable import Trainable, trainable

BENCH_SECONDS = 2.0
HEARD = 16  # samples on which a file's own sums are compared with exact ones
HASHED = {".onnx", ".data", ".pt2"}  # files whose hashes the report has in places of their own
# Passes that make files smaller, and those in whose place they stand.
SMALLER: dict[str, tuple[str, ...]] = {"int8": ("int4",), "prune": (), "squeeze": ()}


@dataclass(frozen=True)
class Result:
    """output: the folder; onnx: the model in it (None after `stop_after`); report: report.json; graph: the last IR."""

    output: Path | None
    onnx: Path | None
    report: dict[str, Any]
    graph: Graph

    def trainable(self) -> Trainable:
        """The compiled model as a PyTorch module to train in your own loop: see `compressor.trainable.trainable`.

        It holds copies of the weights, under the names of the original, and the receipt of this run: give it to
        `compress` again, trained, and the new report goes on from this one.
        """
        module = trainable(self.graph)
        issued = receipt.issue(self.report, self.graph, module.state_dict())
        module.receipt = receipt.read(report.dumps(issued).encode())
        return module


class Run:
    """One compilation, step by step; what the steps share."""

    def __init__(self, opt: Options, target: Target, spec: str) -> None:
        self.opt, self.target = opt, target
        for option, wanted in (("--emit", opt.emit), ("--max-mb", opt.max_mb)):
            if opt.stop_after is not None and wanted:
                raise UsageError(f"{option}: with --stop-after no model is written")
        table = registry.passes()
        self.start = time.perf_counter()
        self.memory = measure.MemoryWatch()
        self.steps: dict[str, dict[str, float | None]] = {}
        self.notices = list(notices.of_versions())
        self.scratch = Path()
        self.large = False
        self.evaluator: Evaluator | None = None
        self.plan: postprocess.Plan | None = None
        self.kept: Memory | None = None  # of passes that other runs have made
        self.stopwatch = Stopwatch(target, opt.latency_cmd, _latency_table(opt.latency_table))
        self.metric: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.progress = Watch(opt.console, opt.log)
        for name in opt.print_after:
            if name not in table:
                raise UsageError(f"--print-after {name}: no such pass; there are {', '.join(table)}")
        self.pipeline = Pipeline(
            parse(spec, table),
            table,
            tolerance=opt.tolerance,
            limits=opt.limit,
            stop_after=opt.stop_after,
            after=self.after_pass,
        )
        self.notices += [f"{name} was added: a later pass needs it" for name in self.pipeline.inserted]

    def after_pass(self, row: Row, graph: Graph) -> None:
        if self.evaluator is not None and row.status != "unchanged":
            self.metric = self.evaluator.of_graph(self.shipped(graph))
        row.metric = self.metric
        if row.config:
            self.done(row.config, row.seconds)
            numbers = {
                key: getattr(row, key)
                for key in ("params", "macs", "bytes", "total_db", "seconds", "peak_mb")
            }
            self.progress.say("pass", what=row.config, status=row.status, contract=row.contract, **numbers)
        if row.name in self.opt.print_after:
            print(graph.text(provenance=True))
        if self.opt.time and self.opt.console is not None and row.seconds:
            self.opt.console.print(f"{row.config:<24} {row.seconds:7.1f} s   peak {row.peak_mb:6.0f} MB")

    def compile(self, loaded: Loaded, example: Any, calibration: Any, stage: Path | None) -> Result:
        opt = self.opt
        with self.step("capturing"):
            graph = self.capture(loaded, example)
            self.large = measure.bytes_of(graph) >= emit.EXTERNAL_DATA_BYTES
            came = {
                "sha256": loaded.sha256 or graph.fingerprint(),
                "hashed": "file" if loaded.sha256 else "graph",
            }
        self.prepare(graph, loaded)
        opt = self.opt
        require_finite(graph)
        self.notices += [*loaded.notes, *graph.notices]
        if self.plan is not None:
            self.notices += self.plan.doubts(graph)
        given = streams(graph, calibration, opt, loaded, example, self.fixed(graph))
        held_out = given.held_out
        self.facts = given.source.facts if given.source is not None else {}
        said = ("renamed", "guessed", "unmasked", "segments")
        self.notices += [self.facts[key] for key in said if key in self.facts]
        self.evaluator, words = metrics.of_rows(graph, loaded, held_out, self.plan, opt, self.fixed(graph))
        self.notices += words
        # beside the output, where there is room for a model; the folder for temporary files may well be memory
        with tempfile.TemporaryDirectory(prefix="compressor-", dir=stage) as scratch:
            self.scratch = self.stopwatch.folder = Path(scratch)
            if self.large:
                graph.keep = spilling(self.scratch)
            baseline = self.baseline(self.shipped(graph)) if stage is not None else None
            ctx = Context(
                self.target,
                held_out,
                given.statistics,
                opt.seed,
                measure=self.measure if opt.measure and not self.stopwatch.elsewhere else None,
                latency=self.measure if opt.measure else None,
                timed_on=self.stopwatch.place,
                evaluate=self.evaluate if self.evaluator is not None else None,
                progress=self.progress,
                lessons=given.rest,
            )
            rows, layers = self.passed(graph, ctx)
            self.notices += notices.of_passes(rows)
            shipped = self.shipped(graph)
            made = self.describe(loaded, shipped, rows, given, stage is not None)
            made["model"] |= came
            made["layers"] = layers
            if loaded.continued is not None:
                made["continued_from"] = loaded.continued.facts()
                made["history"] = loaded.continued.runs
            if stage is not None:
                made["emitted"] = self.emit(shipped, stage, baseline, list(held_out), loaded)
                if "pt2" in opt.formats:
                    with self.step("writing model.pt2"):
                        made["emitted"]["program"] = program.deliver(graph, stage, made, list(held_out))
                files = [f for f in sorted(stage.iterdir()) if f.is_file()]
                made["emitted"]["files"] = {f.name: f.stat().st_size for f in files}
                others = [f for f in files if f.suffix not in HASHED]
                others += sorted((stage / handover.SAMPLE).iterdir())
                hashes = {f.relative_to(stage).as_posix(): delivery.sha256(f) for f in others}
                made["emitted"]["hashes"] = hashes
        made["notices"] = self.notices
        made["latency_table"] = self.stopwatch.table
        made["peak_mb"] = measure.peak_memory_mb()
        made["memory"] = self.memory.look().to_dict()
        made["steps"] = self.steps
        made["seconds"] = time.perf_counter() - self.start
        return Result(None, None, made, graph)

    def capture(self, loaded: Loaded, example: Any) -> Graph:
        return capture_model(loaded, example, self.opt)

    def prepare(self, graph: Graph, loaded: Loaded) -> None:
        """The ends that the user asked for: what images come in as is put in front, what follows outputs is planned."""
        self.opt = take_pixels(graph, self.opt)
        self.plan = heads.asked(graph, self.opt.postprocess, loaded.model)

    def passed(self, graph: Graph, ctx: Context) -> tuple[list[Row], list[dict[str, Any]]]:
        """Runs the passes over a graph; their rows, and what became of each layer."""
        original = graph.copy()
        rows = self.pipeline.run(graph, ctx, self.kept)
        with self.step("comparing layers"):
            return rows, layers_of(graph, original, rows, ctx.held_out.limited(SAMPLES))

    def shipped(self, graph: Graph) -> Graph:
        """What is emitted of a graph: with `--postprocess` it ends in detections, which no pass may see."""
        return graph if self.plan is None else self.plan.applied(graph)

    @property
    def ending(self) -> dict[str, str]:
        """What follows the model's own outputs in the file, in words, where anything does."""
        return {} if self.plan is None else {"postprocess": str(self.plan)}

    def check(
        self, graph: Graph, emitted: Emitted, batches: list[Batch], provider: str
    ) -> list[contracts.Check]:
        """The file's outputs against the graph's."""
        if self.plan is None:
            return delivery.check_emitted(graph, emitted, batches, provider=provider, seen=self.pipeline.seen)
        samples = varied(graph, batches)
        return detections.check(graph, emitted.path, emitted.inputs, samples, provider=provider)

    def baseline(self, graph: Graph) -> Emitted | None:
        """The model as it came, as float ONNX: what size and speed are compared with."""
        try:
            with self.step("emitting the original"):
                return self.stopwatch.emitted(graph, self.fixed(graph))
        except (UnsupportedError, TargetError) as error:
            self.notices.append(f"no comparison with the original as ONNX: {error}")
            return None

    def emit(
        self, graph: Graph, stage: Path, baseline: Emitted | None, batches: list[Batch], loaded: Loaded
    ) -> dict[str, Any]:
        spec = ",".join(map(str, self.pipeline.passes))
        metadata = {
            "compressor": __version__,
            "spec": spec,
            "model_sha256": loaded.sha256,
            "target": self.target.name,
        } | self.ending
        with self.step("emitting"):
            emitted = delivery.deliver(
                graph, self.target, stage, metadata, self.fixed(graph), beside=self.large
            )
        self.require_release(emitted)
        if self.opt.max_mb is not None:
            ran = {p.name for p in self.pipeline.passes}
            unused = [name for name, instead in SMALLER.items() if not ran & {name, *instead}]
            delivery.require_size(emitted, self.opt.max_mb, unused)
        provider, words = delivery.provider_of(self.target)
        with self.step("verifying"):
            checks = self.check(graph, emitted, batches, provider)
            saturated = sessions.saturated(
                emitted.path,
                provider,
                graph.inputs,
                emitted.inputs,
                few(graph, [batch.inputs for batch in batches], max([HEARD, *self.fixed(graph).values()])),
            )
        if self.target.quant.reduce_range and saturated < contracts.SIMULATION_DB:
            raise ContractError(
                f"weights of 7 bits were to keep 8-bit sums from saturating here, and do not: {saturated:.1f} dB"
            )
        self.notices += notices.of_file(graph, emitted, checks, self.target, saturated)
        with self.step("writing what an app needs"):
            self.hand_over(graph, stage, emitted, batches, loaded)
        samples = sum(batch.samples for batch in batches)
        made: dict[str, Any] = {
            "file": emitted.path.name,
            "bytes": emitted.bytes,
            "sha256": delivery.sha256(emitted.path),
            "opset": self.target.opset,
            "ir_version": self.target.ir_version,
            "oldest_runtime": self.target.oldest(emitted.since),
            "provider": provider,
            "verified": f"{words}, {samples} samples",
            "checks": [c.to_dict() for c in checks],
            "operators": delivery.operators(emitted, graph.example),
        } | self.ending
        if sessions.is_large(emitted.path):
            made["data_sha256"] = delivery.sha256(companion_of(emitted.path))
        if self.target.accelerators:
            with self.step("asking what accelerators take"):
                made["partitions"] = delivery.on_accelerators(
                    emitted.path, ",".join(self.target.accelerators)
                )
        if self.evaluator is not None:
            with sessions.opened(emitted.path, provider) as session:
                made["metric"] = self.evaluator.of(lambda *x: sessions.run(session, emitted.inputs, x))
        if baseline is not None:
            made["float_bytes"] = baseline.bytes
        if self.opt.measure:
            files = {"model": emitted} | ({"float": baseline} if baseline is not None else {})
            with self.step("timing"):
                made["latency"] = self.stopwatch.latencies(files, graph, seconds=BENCH_SECONDS)
            if self.stopwatch.elsewhere or self.stopwatch.command:
                notes = (f"timed on {self.stopwatch.place}", made["latency"].get("note"))
                made["latency"]["note"] = "; ".join(filter(None, notes))
            if not self.stopwatch.elsewhere:
                self.notices += notices.of_times(made["latency"])
        return made

    def require_release(self, emitted: Emitted) -> None:
        """TargetError where the release of --min-ort does not have the operators yet."""
        asked = self.opt.min_ort
        if asked is not None and emitted.since and release(asked) < release(emitted.since):
            raise TargetError(
                f"--min-ort {asked}: the weights of few bits in this model need ONNX Runtime {emitted.since}; leave "
                f"out the pass that makes them, or ask for --min-ort {emitted.since}"
            )

    def hand_over(
        self, graph: Graph, stage: Path, emitted: Emitted, batches: list[Batch], loaded: Loaded
    ) -> None:
        """Everything beside the model that an app needs: see `handover`."""
        signature = handover.signature(
            graph, emitted, loaded.labels, self.facts.get("preprocess"), self.opt.preprocess
        )
        signature |= self.ending
        signature["files"] = handover.copy_files(stage, _folders(loaded, self.opt.preprocess), loaded.labels)
        (stage / handover.SIGNATURE).write_text(json.dumps(signature, indent=1) + "\n")
        ort_file = "ort" in self.target.formats
        large = companion_of(emitted.path).name if sessions.is_large(emitted.path) else ""
        wide = emitted.integer and not self.target.quant.reduce_range
        if wide and not large and not runtime.takes_exact(emitted.path):
            wide = False
            self.notices.append(notices.SHARED)
        text = handover.usage(
            signature,
            integer=emitted.integer,
            exact=runtime.EXACT if wide else "",
            ort_file=ort_file,
            data_file=large,
        )
        (stage / handover.USAGE).write_text(text, encoding="utf-8")
        handover.write_sample(stage, *delivery.sample(graph, emitted, batches))

    def describe(
        self, loaded: Loaded, graph: Graph, rows: list[Row], given: Streams, written: bool
    ) -> dict[str, Any]:
        return {
            "schema": report.SCHEMA,
            "compressor": __version__,
            "versions": measure.versions(),
            "machine": measure.machine(),
            "command": self.opt.command or "compressor.compress(...)",
            "seed": self.opt.seed,
            "model": {
                "path": str(loaded.path),
                "stem": loaded.path.name.split(".")[0],
            },
            "target": {
                "name": self.target.name,
                "providers": list(self.target.providers),
                "opset": self.target.opset,
            },
            "spec": ",".join(map(str, self.pipeline.passes)),
            "inserted": self.pipeline.inserted,
            **handover.ends(graph, self.fixed(graph) if written else {}),
            "data": {
                "calibration": _stream(given.statistics),
                "held_out": {**(_stream(given.held_out) or {}), "sha256": given.held_out.digest()},
                "facts": given.source.facts if given.source is not None else {},
            },
            "rows": [row.to_dict() for row in rows],
        }

    def fixed(self, graph: Graph) -> dict[str, int]:
        """Sizes for dynamic axes that the target wants fixed, unless the user keeps them free."""
        keep = self.opt.dynamic
        size = self.target.fixed_batch if keep is None else (None if keep else self.target.fixed_batch or 1)
        if size is None:
            return {}
        found: dict[str, int] = {}
        for spec, tensor in zip(graph.inputs, graph.example, strict=True):
            for axis, name in enumerate(spec.shape):
                if isinstance(name, str):
                    found.setdefault(name, size if axis == 0 else tensor.shape[axis])
        return found

    def measure(self, *graphs: Graph) -> list[float]:
        """Median milliseconds of one run of each graph, timed in turns: batch 1, one thread."""
        return self.stopwatch.milliseconds(graphs, self.fixed(graphs[0]))

    def evaluate(self, graph: Graph) -> float:
        """The first of the user's metrics; higher is better."""
        metrics = self.evaluator.of_graph(graph) if self.evaluator is not None else {}
        if not metrics:
            raise DataError(
                "the metric says nothing on these data, so no pass can hold to it; see the notices"
            )
        return next(iter(metrics.values()))

    @contextmanager
    def step(self, words: str) -> Iterator[None]:
        start = time.perf_counter()
        with self.progress(words):
            yield
        self.done(words, time.perf_counter() - start)

    def done(self, words: str, seconds: float) -> None:
        """Notes what a step cost, and gives back what it freed."""
        self.steps[words] = {"seconds": seconds, "peak_anonymous_mb": self.memory.lap()}
        if self.large:
            trim()


# -------------------------------------------------------------------- helpers


def _folders(loaded: Loaded, how: Any) -> list[Path | None]:
    """Where the files of a tokenizer and a preprocessor may stand."""
    named = Path(how) if isinstance(how, (str, Path)) else None
    held = loaded.path if loaded.sha256 else None  # of a module in memory it is a name
    return [loaded.tokenizer, held, named.parent if named is not None and named.is_file() else named]


def _latency_table(path: str | Path | None) -> dict[str, list[float]]:
    """What an earlier run measured: the decisions made by it are made again."""
    table = report.read_report(path).get("latency_table") or {} if path is not None else {}
    rows = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(row, list) and all(isinstance(ms, (int, float)) for ms in row) for row in rows):
        raise UsageError(f"{path}: a damaged report: its latency_table is no table of milliseconds")
    return dict(table)


def _stream(stream: Data | None) -> dict[str, Any] | None:
    return None if stream is None else {"description": stream.description, "samples": stream.samples}
