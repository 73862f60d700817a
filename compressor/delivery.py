"""From a compiled graph to a verified file: emit, load, run, compare, time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from . import apart, jitter, measure, partitions, runtime, sessions, verify
from .accelerators import named
from .data import Batch
from .edges import few, varied
from .emit import Emitted, emit, feeds, is_integer
from .errors import ContractError, TargetError, UsageError
from .ir import Graph
from .names import DTYPE_NAMES
from .publishing import REQUIRED
from .target import Target
from .verify import Check, Comparison, Observer, Outputs

FEW = 16  # samples on which model.ort is compared with model.onnx
LARGEST = 3  # tensors that a message names
SURE = 0.01  # standard error of a ratio, relative, that is good enough: decisions leave 3 % (int8), reports two digits
Levels = Mapping[tuple[str, str], float]  # of outputs and their slices
ORT_BYTES = 2_000_000_000  # what a file in ONNX Runtime's own format can hold


def deliver(
    graph: Graph,
    target: Target,
    folder: Path,
    metadata: Mapping[str, str],
    fixed: Mapping[str, int],
    *,
    beside: bool = False,
) -> Emitted:
    """model.onnx in `folder`, loaded once by ONNX Runtime; where the target wants them, model.ort and what it requires.

    Where the exporter's optimiser produced a file that does not load, it is emitted again without it. beside: weights
    in a file of their own.
    """
    path = folder / "model.onnx"
    options: dict[str, Any] = {
        "opset": target.opset,
        "ir_version": target.ir_version,
        "fixed": fixed,
        "metadata": metadata,
        "dialect": target.dialect,
        "beside": beside,
    }
    for optimize in (True, False):
        try:
            emitted = emit(graph, path, **options, optimize=optimize)
        except TargetError:
            if optimize:
                continue
            raise
        require_kernels(graph, emitted, target)
        try:
            with sessions.opened(path):
                break
        except TargetError as error:
            if optimize:
                continue
            half = any(t.dtype == torch.bfloat16 for t in graph.tensors.values())
            hint = (
                "; it has few kernels for bfloat16: convert the model with .float() or .half()"
                if half
                else ""
            )
            raise TargetError(f"{str(error).replace(f'{path}: ', '')}{hint}") from error
    if "ort" in target.formats:
        _write_ort(emitted, folder / "model.ort")
    return emitted


def require_size(emitted: Emitted, most: float, unused: Sequence[str]) -> None:
    """UsageError where the model, in either of its formats, is larger than `most` MB; names its largest tensors.

    unused: passes that make it smaller and have not run.
    """
    ort_file = emitted.path.with_suffix(sessions.ORT_SUFFIX)
    sizes = {emitted.path.name: emitted.bytes}
    if ort_file.exists():
        sizes[ort_file.name] = ort_file.stat().st_size
    name, largest = max(sizes.items(), key=lambda entry: entry[1])
    if largest <= most * 1e6:
        return
    held = onnx.load(emitted.path, load_external_data=False).graph.initializer
    weighs = {
        t.name: math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in held
    }
    heaviest = sorted(weighs.items(), key=lambda entry: -entry[1])[:LARGEST]
    tensors = ", ".join(f"{tensor} ({size / 1e6:.4g} MB)" for tensor, size in heaviest)
    advice = f"add {', '.join(unused)}" if unused else "give its passes tighter budgets"
    raise UsageError(
        f"{name} has {largest / 1e6:.4g} MB, and --max-mb {most:g} was asked for: {advice}; its largest tensors are "
        f"{tensors}"
    )


def require_kernels(graph: Graph, emitted: Emitted, target: Target) -> None:
    """TargetError for an operator, or an end of the model, that the target's runtime lacks."""
    other = "or choose a target that has it (--target cpu)"
    for operator, name in emitted.nodes:
        if operator in target.lacks:
            where = name.rpartition("/")[0] or "the model itself"
            raise TargetError(
                f"{name}: the runtime of target {target.name} has no kernel for {operator}; replace it in {where}, "
                f"{other}"
            )
    made = [n.meta["val"].dtype for n in graph.results]
    ends = [*((i.name, i.dtype) for i in emitted.inputs), *zip(emitted.outputs, made, strict=True)]
    for name, dtype in ends:
        if (said := DTYPE_NAMES.get(dtype, "")) in target.lacks:
            raise TargetError(
                f"{name} is {said}, which the runtime of target {target.name} neither takes nor gives; convert the "
                f"model with .float() or .half(), {other}"
            )


def _on(path: Path, function: Callable[..., Any], *args: Any) -> Any:
    """The answer of a function that loads this model, apart where the model is large."""
    return apart.call(function, *args) if sessions.is_large(path) else function(*args)


def _write_ort(emitted: Emitted, path: Path) -> None:
    if emitted.bytes >= ORT_BYTES:
        raise TargetError(
            f"model.ort cannot hold {emitted.bytes:,} bytes, its format ends at {ORT_BYTES:,}: add a pass that makes "
            "the model smaller (int8), or choose a target that takes model.onnx alone (--target cpu)"
        )
    _on(emitted.path, runtime.to_ort_format, emitted.path, path)
    listed = apart.call(runtime.required_operators, path)
    path.with_name(REQUIRED).write_text(f"# of {path.name}, by compressor\n{listed}", encoding="utf-8")


def on_accelerators(path: Path, accelerators: str) -> list[dict[str, Any]]:
    """What phones' accelerators take of a model, one row each: see `partitions.partitioned`.

    accelerators: names between commas, `coreml` for both of its formats, or `all`; UsageError for an unknown one.
    """
    providers = named(accelerators)
    return partitions.judged(_on(path, runtime.offered, path), providers)


def operators(emitted: Emitted, example: Sequence[Tensor]) -> dict[str, int]:
    """Operator -> how often it stands in ONNX Runtime's own optimised graph."""
    if not sessions.is_large(emitted.path):
        return runtime.optimized_operators(emitted.path)
    one = sessions.single(emitted.inputs, example)
    return dict(apart.call(runtime.operators_that_ran, emitted.path, one))


def metadata(path: Path) -> dict[str, str]:
    """What a file says about itself."""
    return dict(_on(path, runtime.facts, path)["metadata"])


def usable_provider(target: Target) -> str:
    """The first of a target's providers that is installed and starts, or the CPU's."""
    installed = runtime.providers()
    return next((p for p in target.providers if p in installed and runtime.starts(p)), sessions.CPU)


def provider_of(target: Target) -> tuple[str, str]:
    """The provider that verification runs on, and the words for the report."""
    wanted, usable = target.providers[0], usable_provider(target)
    if usable == wanted:
        return usable, f"on {usable}"
    lacks = "does not start" if wanted in runtime.providers() else "is not installed"
    return usable, f"on {usable}: {wanted} {lacks} here, so only the structure was checked for it"


def check_emitted(
    graph: Graph,
    emitted: Emitted,
    batches: Sequence[Batch],
    *,
    provider: str = sessions.CPU,
    tolerance: float | None = None,
    seen: Sequence[Outputs] = (),
) -> list[Check]:
    """Outputs of the file against those of the graph, on every batch and on other sizes of every dynamic axis.

    seen: what the graph makes of the batches, as `verify.observe` says it, where that is known.

    Float models within 1e-4 (half precision: 30 dB), integer models at 30 dB; where the last bits of the graph itself
    leave less, at that (`jitter`). ContractError beyond.
    """
    samples = list(varied(graph, batches))
    with sessions.opened(emitted.path, provider) as session:
        comparison = sessions.compare(graph, session, emitted.inputs, samples, seen)
    checks = judged(graph, comparison, samples, tolerance)
    ort_file = emitted.path.with_suffix(sessions.ORT_SUFFIX)
    if ort_file.exists():
        # as applications open both: what saturates here does so in both
        with (
            sessions.opened(emitted.path, exact=False) as one,
            sessions.opened(ort_file, exact=False) as other,
        ):
            heard, flips = list(few(graph, samples, FEW)), Observer(graph).flips
            same = sessions.between(one, other, graph.inputs, emitted.inputs, heard, flips)
        judged(graph, same, heard, tolerance)
    return checks


def judged(
    graph: Graph, comparison: Comparison, samples: Iterable[Sequence[Tensor]], tolerance: float | None = None
) -> list[Check]:
    """The checks of `check_emitted`, or its ContractError; samples: those that were compared."""
    checks, levels = standards(graph, comparison, samples, tolerance)
    judge_emitted(graph, checks, levels)
    return checks


def standards(
    graph: Graph, comparison: Comparison, samples: Iterable[Sequence[Tensor]], tolerance: float | None = None
) -> tuple[list[Check], Levels]:
    """What the outputs of a file that computes what the graph does are held to: checks, and dB where it rounds."""
    checks = comparison.checks(tolerance or verify.EMITTED)
    levels: Levels = {}
    if rounds(graph):
        if any(c.sqnr_db < verify.SIMULATION_DB for c in checks):
            levels = jitter.levels(graph, samples)
    elif tolerance is None and verify.is_single(graph) and any(c.error > c.tolerance for c in checks):
        checks = jitter.allowed(checks, jitter.errors(graph, samples), jitter.EVERYWHERE)
    return checks, levels


def sample(
    graph: Graph, emitted: Emitted, batches: Sequence[Batch]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs by name, one sample of each, and what the emitted model makes of them."""
    whole = next(
        part for batch in batches for part in sessions.pieces(graph.inputs, emitted.inputs, batch.inputs)
    )
    with sessions.opened(emitted.path) as session:
        for part in (sessions.first(emitted.inputs, whole), whole):
            inputs = feeds(emitted.inputs, part)
            try:
                return inputs, dict(zip(emitted.outputs, runtime.run(session, inputs), strict=True))
            except TargetError:  # a model may want more than one sample
                continue
    raise TargetError(f"{emitted.path.name} does not run on a sample that it was verified with")


def misses(graph: Graph, checks: Sequence[Check], levels: Levels) -> Iterator[tuple[Check, str]]:
    """Checks that do not keep to their `standards`, and what is allowed, in words."""
    rounded = rounds(graph)
    for check in checks:
        level = levels.get((check.output, check.slice), math.inf)
        least = max(verify.FAIL_DB, min(verify.SIMULATION_DB, level))
        if check.discrete:
            good = check.flips_within(rounded)
        else:
            good = check.sqnr_db >= least if rounded else check.error <= check.tolerance
        if not check.finite or not good:
            yield check, f"at least {least:.1f} dB" if rounded else f"at most {check.tolerance:.0e}"


def judge_emitted(graph: Graph, checks: Sequence[Check], levels: Levels) -> None:
    """ContractError where the file's numbers are not the graph's. levels: see `jitter.levels`."""
    for check, wanted in misses(graph, checks, levels):
        raise ContractError(
            f"the emitted model's output {check.output}{check.slice} is not the graph's: error {check.error:.1e}, "
            f"{check.sqnr_db:.1f} dB; {wanted} is allowed"
        )


def rounds(graph: Graph) -> bool:
    """True where another runtime rounds in another way than the graph, by more than the last bits of a float32."""
    return is_integer(graph) or any(t.dtype in verify.HALF for t in graph.tensors.values())


def latencies(
    files: Mapping[str, Emitted],
    example: Sequence[Tensor],
    *,
    provider: str = sessions.CPU,
    threads: int = 1,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Medians by name ({"model", "float"}), and how many times faster the first is than the second.

    They are taken in turns until the ratio is known to 1 %, `seconds` long at most; large models one at a time, and
    the `note` says so. What a float model's head is tied to is not copied for it; an integer model is loaded as it
    ships.
    """
    arrays = sessions.single(next(iter(files.values())).inputs, example)
    paths = [e.path for e in files.values()]
    options: dict[str, Any] = {
        "feeds": arrays,
        "threads": threads,
        "seconds": seconds,
        "providers": [provider] * len(paths),
    }
    if alone := any(map(sessions.is_large, paths)):
        weights = ["folded" if e.integer else "packed" for e in files.values()]
        found = measure.bench_alone(paths, **options, weights=weights)
    else:
        found = measure.bench(paths, **options, within=SURE)
    report: dict[str, Any] = {name: asdict(latency) for name, latency in zip(files, found, strict=True)}
    for entry in report.values():
        entry.pop("rounds")
    if len(found) == 2:
        ratio = measure.ratio(found[1], found[0])
        report |= {"ratio": ratio.median, "spread": [ratio.low, ratio.high], "threads": threads, "batch": 1}
    if alone:
        visits = f"each visited {measure.ALONE_VISITS} times in turns, no constant of a float model folded"
        report["note"] = f"one model in memory at a time, {visits}"
    return report


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
