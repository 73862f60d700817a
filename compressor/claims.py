"""What a report says of its files, checked again: held, not held, or not to be checked here and why.

Of the files alone: hashes, sizes, opset, operators, accelerators. With the model: its hash and costs, what the file
loses against it on the samples that the run held out, the float file's size, and how many times faster the file is,
timed in turns. With data: metrics. What a number may differ by is stated with it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
from torch import Tensor

from . import delivery, handover, heads, measure, metrics, runtime, sessions, verify
from .data import Data
from .edges import varied
from .emit import Emitted, companion_of, since_of
from .errors import CompressorError, UsageError
from .ir import Graph
from .load import Loaded, load
from .opening import Options, capture_model, load_model, streams, take_pixels
from .ops import macs
from .run import BENCH_SECONDS, Run
from .target import RELEASES, Target, release
from .verify import Check

HELD, NOT_HELD, UNKNOWN = "held", "not held", "not checkable here"
DECIBELS = 1.0  # by which the loss against the model may differ: integers round otherwise on other processors
ROUNDING_DB = 80.0  # above it, nothing but rounding differs
METRIC = 0.005  # by which a metric may differ
SMALLER = 0.02  # by which the float file's size may: its exporter may be another version
SLOWER = 0.25  # share of the claimed ratio that may be missing


@dataclass(frozen=True)
class Claim:
    """what: in words. claimed, found: numbers or words, None where there is nothing to say. why: with the state."""

    what: str
    claimed: Any
    found: Any = None
    state: str = HELD
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _same(what: str, claimed: Any, found: Any) -> Claim:
    return Claim(what, claimed, found, HELD if claimed == found else NOT_HELD)


def _unknown(what: str, claimed: Any, why: str) -> Claim:
    return Claim(what, claimed, None, UNKNOWN, why)


def recheck(
    report: Mapping[str, Any],
    home: Path,
    path: Path,
    model: Any,
    opt: Options,
    target: Target,
    calibration: Any = None,
    *,
    named: bool = True,
) -> Iterator[Claim]:
    """Every claim of a report, one after the other.

    home: the folder of the report, in which its other files lie. path: the ONNX file. model: None where only the
    files are there. opt: how the model and data are opened, as in the run. calibration: the data of the run, if it
    had any. named: whether the user named the model; one that only the report names may need more options to be
    opened.
    """
    yield from _of_files(report, path, home)
    if model is None:
        where = report["model"].get("path")
        yield _unknown(
            "everything about the model", where, "the model is not here; name it before the ONNX file"
        )
        return
    try:
        again = _Again(report, path, model, opt, target)
    except CompressorError as error:
        if named:
            raise
        yield _unknown("everything about the model", str(model), f"name it, with its options: {error}")
        return
    yield from again.claims(calibration)


def _of_files(report: Mapping[str, Any], path: Path, home: Path) -> Iterator[Claim]:
    emitted = report["emitted"]
    own = {emitted["file"]: path, companion_of(Path(emitted["file"])).name: companion_of(path)}
    for name, size in emitted.get("files", {}).items():
        beside = own.get(name) or _beside(home, name)
        yield _same(f"size of {name}", size, beside.stat().st_size if beside.is_file() else "missing")
    for name, claimed in _hashes(emitted).items():
        beside = own.get(name) or _beside(home, name)
        yield _same(f"sha256 of {name}", claimed, delivery.sha256(beside) if beside.is_file() else "missing")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's and onnx's own
        first = str(error).strip().split("\n")[0]
        yield Claim("the file is ONNX", True, False, NOT_HELD, first)
        return
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    yield _same("opset", emitted["opset"], opset)
    yield _same("IR version", emitted["ir_version"], model.ir_version)
    newest = max(RELEASES, key=release)
    known = opset <= RELEASES[newest][0] and model.ir_version <= RELEASES[newest][1]
    speaks = Target("any", "", (sessions.CPU,), opset=opset, ir_version=model.ir_version)
    oldest = speaks.oldest(since_of(onnx_ir.from_proto(model))) if known else "none that is known"
    yield _same("oldest ONNX Runtime", emitted["oldest_runtime"], oldest)
    said = {entry.key: entry.value for entry in model.metadata_props}
    for key, claimed in (("spec", report["spec"]), ("target", report["target"]["name"])):
        yield _same(f"{key}, as the file says", claimed, said.get(key, "missing"))
    yield from _by_runtime(report, path)


def _hashes(emitted: Mapping[str, Any]) -> dict[str, str]:
    """Of the files beside a report by name; older reports have those of models alone."""
    name, program = emitted["file"], emitted.get("program") or {}
    models = {name: emitted["sha256"], companion_of(Path(name)).name: emitted.get("data_sha256")}
    models |= {program["file"]: program["sha256"]} if program else {}
    return {n: claimed for n, claimed in (emitted.get("hashes", {}) | models).items() if claimed is not None}


def _beside(home: Path, name: str) -> Path:
    """A file that a report names, beside it. UsageError for one that would lie elsewhere."""
    inner = name.removeprefix(f"{handover.SAMPLE}/")
    if Path(inner).name != inner:
        raise UsageError(f"a damaged report: it names the file {name!r}, and files lie beside it")
    return home / name


def _by_runtime(report: Mapping[str, Any], path: Path) -> Iterator[Claim]:
    """What ONNX Runtime makes of the file, which another release or processor may not repeat."""
    emitted = report["emitted"]
    other = _elsewhere(report)
    counted: list[tuple[str, Any, Callable[[], Any]]] = []
    if not sessions.is_large(path):
        counted.append(
            ("operators that ran", emitted["operators"], lambda: dict(runtime.optimized_operators(path)))
        )
    partitions = emitted.get("partitions") or []
    if partitions:
        names = ",".join(one["provider"] for one in partitions)
        counted.append(("partitions", partitions, lambda: delivery.on_accelerators(path, names)))
    for what, claimed, count in counted:
        try:
            found = count()
        except CompressorError as error:
            yield Claim(what, claimed, None, NOT_HELD, str(error))
            continue
        if found != claimed and other:
            yield _unknown(what, claimed, other)
        else:
            yield _same(what, claimed, found)


def _elsewhere(report: Mapping[str, Any]) -> str:
    """Why numbers of the runtime may be others here; empty where they may not."""
    then = report["versions"].get("onnxruntime")
    now = metadata.version("onnxruntime")
    if then != now:
        return f"the run had ONNX Runtime {then}, this is {now}"
    before, here = report["machine"], measure.machine()
    if (before.get("cpu"), before.get("isa")) != (here["cpu"], here["isa"]):
        return (
            f"the run was on {before.get('cpu')} ({before.get('isa')}), this is {here['cpu']} ({here['isa']})"
        )
    return ""


# -------------------------------------------------------------------- with the model


class _Again:
    """The run of a report as far as it can be had again: the model, its graph, and the samples that were held out."""

    def __init__(
        self, report: Mapping[str, Any], path: Path, model: Any, opt: Options, target: Target
    ) -> None:
        self.report, self.path, self.emitted = report, path, report["emitted"]
        self.loaded: Loaded = load_model(model, opt)
        graph = capture_model(self.loaded, None, opt)
        hashed = report["model"].get("hashed")
        self.fingerprint = graph.fingerprint() if hashed == "graph" else self.loaded.sha256
        self.opt = take_pixels(graph, opt)
        self.graph = graph
        self.run = Run(replace(self.opt, print_after=(), stop_after=None), target, report["spec"])
        self.run.plan = heads.asked(graph, opt.postprocess, self.loaded.model)

    def claims(self, calibration: Any) -> Iterator[Claim]:
        yield _same("sha256 of the model", self.report["model"].get("sha256"), self.fingerprint)
        first = self.report["rows"][0]
        costs = {
            "params": measure.parameters(self.graph),
            "macs": macs(self.graph),
            "bytes": measure.bytes_of(self.graph),
        }
        for name, found in costs.items():
            yield _same(f"{name} of the model", first[name], found)
        fixed = self.run.fixed(self.graph)
        had = self.report["data"]["calibration"]
        held_out: Data | None = None
        if had and calibration is None:
            why = f"it had {had['description']}; give these data with --data"
            yield _unknown("loss against the model, dB", self.report["rows"][-1]["total_db"], why)
        else:
            held_out = streams(self.graph, calibration, self.opt, self.loaded, None, fixed).held_out
            yield from self._loss(held_out)
            yield from self._simulation(held_out)
        yield from self._metrics(held_out, fixed)
        yield from self._times()

    def _loss(self, held_out: Data) -> Iterator[Claim]:
        claimed = float(self.report["rows"][-1]["total_db"])
        told = self.report["data"]["held_out"]
        claimed_data, found_data = told.get("sha256", told["description"]), held_out.description
        if "sha256" in told:  # older reports have words alone, and a path in them
            found_data = held_out.digest()
        if claimed_data != found_data:
            yield Claim("held-out samples", claimed_data, found_data, NOT_HELD, "these are other data")
            return
        if self.run.plan is not None:
            yield _unknown(
                "loss against the model, dB", claimed, "what suppression keeps has no signal over noise"
            )
            return
        batches = [batch.inputs for batch in held_out]
        checks = self._compared(self.graph, batches)
        for one in (one for one in checks if one.discrete):
            what = f"share of {one.output}{one.slice} that is not the model's"
            most = f"at most {verify.ROUNDED_FLIPS * one.tolerance:.0%}"
            yield Claim(what, None, one.error, HELD if one.flips_within(True) else NOT_HELD, most)
        levels = [one.sqnr_db if one.finite else float("-inf") for one in checks if not one.discrete]
        if not levels:
            yield _unknown("loss against the model, dB", claimed, "the model returns no floats")
            return
        found, least = min(levels), min(claimed, ROUNDING_DB) - DECIBELS
        state = HELD if found >= least else NOT_HELD
        yield Claim("loss against the model, dB", claimed, found, state, f"at least {least:.1f} dB")
        others = list(varied(self.graph, held_out))[len(batches) :]
        if not others:
            return
        seen = min(
            c.sqnr_db if c.finite else -math.inf for c in self._compared(self.graph, others) if not c.discrete
        )
        least = min(least, verify.WARN_DB)
        state = HELD if seen >= least else NOT_HELD
        yield Claim("loss where axes have other sizes, dB", None, seen, state, f"at least {least:.1f} dB")

    def _simulation(self, held_out: Data) -> Iterator[Claim]:
        """The file against the graph that the passes left, which a model.pt2 beside it holds."""
        claimed = _worst(self.emitted["checks"])
        program = self.emitted.get("program")
        what = "error against the compiled graph"
        if not program or not (self.path.parent / program["file"]).is_file():
            yield _unknown(what, claimed, "only a run has that graph; --emit pt2 keeps it")
            return
        try:
            beside = load(self.path.parent / program["file"])
            graph = capture_model(beside, None, Options())
            checks = self._compared(graph, varied(graph, held_out))
            delivery.judge_emitted(graph, checks, {})
        except CompressorError as error:
            yield Claim(what, claimed, None, NOT_HELD, str(error))
            return
        yield Claim(what, claimed, _worst([one.to_dict() for one in checks]), HELD, "judged as in the run")

    def _compared(self, graph: Graph, samples: Iterable[Sequence[Tensor]]) -> list[Check]:
        with sessions.opened(self.path, self.provider) as session:
            inputs = sessions.inputs_of(session, graph.inputs)
            compared = sessions.compare(graph, session, inputs, samples)
            return compared.checks(verify.EMITTED)

    @property
    def provider(self) -> str:
        return delivery.usable_provider(self.run.target)

    def _metrics(self, held_out: Data | None, fixed: Mapping[str, int]) -> Iterator[Claim]:
        claimed = self.emitted.get("metric") or {}
        if not claimed:
            return
        if self.opt.evaluate is None and (held_out is None or self.run.plan is None):
            for name, value in claimed.items():
                yield _unknown(f"metric {name}", value, "give the data, or the function, with --eval")
            return
        data = (
            held_out
            if held_out is not None
            else streams(self.graph, None, self.opt, self.loaded, None, fixed).held_out
        )
        evaluator, _ = metrics.of_rows(self.graph, self.loaded, data, self.run.plan, self.opt, fixed)
        assert evaluator is not None
        with sessions.opened(self.path, self.provider) as session:
            inputs = sessions.inputs_of(session, self.graph.inputs)
            now = evaluator.of(lambda *x: sessions.run(session, inputs, x))
        before = evaluator.of_graph(self.run.shipped(self.graph))
        original = self.report["rows"][0].get("metric") or {}
        pairs = [(f"metric {name}", value, now.get(name)) for name, value in claimed.items()]
        pairs += [
            (f"metric {name} of the model", value, before.get(name)) for name, value in original.items()
        ]
        for what, value, found in pairs:
            was = float(value)  # a report says `nan` in words
            near = found is not None and (
                found == was
                or (math.isnan(found) and math.isnan(was))
                or abs(found - was) <= METRIC * max(1.0, abs(was))
            )
            yield Claim(what, value, found, HELD if near else NOT_HELD, f"within {METRIC}")

    def _times(self) -> Iterator[Claim]:
        """The float file, made anew: its size, and how many times faster the compressed one is."""
        claimed, size = (self.emitted.get("latency") or {}).get("ratio"), self.emitted.get("float_bytes")
        if size is None:
            return
        with tempfile.TemporaryDirectory(prefix="compressor-") as scratch:
            self.run.scratch = self.run.stopwatch.folder = Path(scratch)
            plain = self.run.baseline(self.run.shipped(self.graph))
            if plain is None:
                yield _unknown("size of the float file", size, self.run.notices[-1])
                return
            near = abs(plain.bytes - size) <= SMALLER * size
            yield Claim(
                "size of the float file",
                size,
                plain.bytes,
                HELD if near else NOT_HELD,
                f"within {SMALLER:.0%}",
            )
            if claimed is None:
                return
            what = "times faster than the float file"
            why = _elsewhere(self.report) or (
                "it was timed elsewhere" if self.run.stopwatch.elsewhere else ""
            )
            if why or not self.opt.measure:
                yield _unknown(what, claimed, why or "--no-measure")
                return
            least = claimed * (1 - SLOWER)
            for seconds in (
                BENCH_SECONDS,
                3 * BENCH_SECONDS,
            ):  # a busy machine gets a second chance, and a longer one
                found = self._ratio(plain, seconds)
                if found >= least:
                    break
            state = HELD if found >= least else NOT_HELD
            yield Claim(what, claimed, found, state, f"at least {least:.2f}, timed in turns")

    def _ratio(self, plain: Emitted, seconds: float) -> float:
        own = Emitted(self.path, plain.inputs, plain.outputs, self.path.stat().st_size)
        files = {"model": own, "float": plain}
        return float(self.run.stopwatch.latencies(files, self.graph, seconds=seconds)["ratio"])


def _worst(checks: list[dict[str, Any]]) -> Any:
    return max((float(one["error"]) for one in checks), default=None)
