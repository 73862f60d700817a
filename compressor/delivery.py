"""From a compiled graph to a verified file: emit, load, run, compare, time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from . import apart, jitter, measure, partitions, runtime, verify
from .accelerators import named
from .data import Batch
from .edges import varied
from .emit import Emitted, companion_of, emit, feeds, is_integer
from .errors import ContractError, DataError, TargetError, UsageError
from .ir import Graph, Input
from .names import DTYPE_NAMES
from .publishing import REQUIRED
from .target import Target
from .verify import Check, Comparison, Observer, Outputs

CPU = "CPUExecutionProvider"
LARGEST = 3  # tensors that a message names
ORT_SUFFIX = ".ort"
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
    emitted = emit(graph, path, **options)
    require_kernels(graph, emitted, target)
    try:
        _load(path)
    except TargetError:
        emitted = emit(graph, path, **options, optimize=False)
        try:
            _load(path)
        except TargetError as error:
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
    ort_file = emitted.path.with_suffix(ORT_SUFFIX)
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
    tensors = ", ".join(f"{tensor} ({size / 1e6:.2f} MB)" for tensor, size in heaviest)
    advice = f"add {', '.join(unused)}" if unused else "give its passes tighter budgets"
    raise UsageError(
        f"{name} has {largest / 1e6:.2f} MB, and --max-mb {most:g} was asked for: {advice}; its largest tensors are "
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


def is_large(path: Path) -> bool:
    """True for a model whose weights have a file of their own: ONNX Runtime then runs apart from torch."""
    return companion_of(path).exists()


@contextmanager
def opened(path: Path, provider: str = CPU, *, exact: bool = True) -> Iterator[Any]:
    """A session to compare numbers with. A large model is mapped and not copied, in a process of its own.

    exact: computes what the file says; otherwise as an application does that sets no option, see `saturated`.
    """
    if not is_large(path):
        yield runtime.session(path, providers=[provider], exact=exact)
        return
    with apart.Session(path, providers=[provider], exact=exact, weights="mapped") as session:
        yield session


def _load(path: Path) -> None:
    with opened(path):
        pass


def _on(path: Path, function: Callable[..., Any], *args: Any) -> Any:
    """The answer of a function that loads this model, apart where the model is large."""
    return apart.call(function, *args) if is_large(path) else function(*args)


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
    if not is_large(emitted.path):
        return runtime.optimized_operators(emitted.path)
    one = single(emitted.inputs, example)
    return dict(apart.call(runtime.operators_that_ran, emitted.path, one))


def metadata(path: Path) -> dict[str, str]:
    """What a file says about itself."""
    return dict(_on(path, runtime.facts, path)["metadata"])


def usable_provider(target: Target) -> str:
    """The first of a target's providers that is installed and starts, or the CPU's."""
    installed = runtime.providers()
    return next((p for p in target.providers if p in installed and runtime.starts(p)), CPU)


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
    provider: str = CPU,
    tolerance: float | None = None,
    seen: Sequence[Outputs] = (),
) -> list[Check]:
    """Outputs of the file against those of the graph, on every batch and on other sizes of every dynamic axis.

    seen: what the graph makes of the batches, as `verify.observe` says it, where that is known.

    Float models within 1e-4 (half precision: 30 dB), integer models at 30 dB; where the last bits of the graph itself
    leave less, at that (`jitter`). ContractError beyond.
    """
    ort_file = emitted.path.with_suffix(ORT_SUFFIX)
    if ort_file.exists():  # held to the same; what is said is of the other
        _checked(graph, ort_file, emitted.inputs, batches[:1], CPU, tolerance)
    return _checked(graph, emitted.path, emitted.inputs, batches, provider, tolerance, seen)


def _checked(
    graph: Graph,
    path: Path,
    inputs: Sequence[Input],
    batches: Sequence[Batch],
    provider: str,
    tolerance: float | None,
    seen: Sequence[Outputs] = (),
) -> list[Check]:
    with opened(path, provider) as session:
        comparison = compare_session(graph, session, inputs, varied(graph, batches), seen)
    return judged(graph, comparison, varied(graph, batches), tolerance)


def saturated(
    path: Path,
    provider: str,
    specs: Sequence[Input],
    inputs: Sequence[Input],
    samples: Iterable[Sequence[Tensor]],
) -> float:
    """SQNR in dB of a session without options, whose 8-bit sums may saturate on this machine; inf where none does.

    samples: tensors of `specs`, of which the file fixes some axes in `inputs`.
    """
    if provider != CPU or not measure.saturation() or not _multiplies_bytes(path):
        return math.inf
    with opened(path) as exact, opened(path, exact=False) as plain:
        names = [one.name for one in exact.get_outputs()]
        comparison = Comparison(names, [()] * len(names))
        for whole in samples:
            for part in pieces(specs, inputs, whole):
                named = feeds(inputs, part)
                comparison.update(*(to_tensors(runtime.run(one, named)) for one in (exact, plain)))
    return min((check.sqnr_db for check in comparison.checks()), default=math.inf)


def _multiplies_bytes(path: Path) -> bool:
    if path.suffix == ORT_SUFFIX:  # nothing but ONNX Runtime reads it
        return True
    weights = onnx.load(path, load_external_data=False).graph.initializer
    return any(tensor.data_type == onnx.TensorProto.INT8 for tensor in weights)


def judged(
    graph: Graph, comparison: Comparison, samples: Iterable[Sequence[Tensor]], tolerance: float | None = None
) -> list[Check]:
    """The checks of `check_emitted`, or its ContractError; samples: those that were compared."""
    checks = comparison.checks(tolerance or verify.EMITTED)
    levels: Mapping[tuple[str, str], float] = {}
    if _rounds(graph):
        if any(c.sqnr_db < verify.SIMULATION_DB for c in checks):
            levels = jitter.levels(graph, samples)
    elif tolerance is None and verify.is_single(graph) and any(c.error > c.tolerance for c in checks):
        checks = jitter.allowed(checks, jitter.errors(graph, samples), jitter.EVERYWHERE)
    judge_emitted(graph, checks, levels)
    return checks


def compare_session(
    graph: Graph,
    session: Any,
    inputs: Sequence[Input],
    samples: Iterable[Sequence[Tensor]],
    seen: Sequence[Outputs] = (),
) -> Comparison:
    """Outputs of a session with these inputs against those of the graph, both fed in pieces that fit the session.

    seen: what the graph makes of the first samples, where that is known.
    Only whole pieces are compared with each other: an output may well mix the samples of a batch, or have none.
    """
    observer = Observer(graph)
    count = len(graph.outputs)
    names = [o.name for o in session.get_outputs()]
    if sorted(names) != sorted(graph.outputs):
        raise TargetError(
            f"the ONNX model returns {', '.join(names)}; the model returns {', '.join(graph.outputs)}"
        )
    comparison = Comparison(observer.names[:count], observer.regions[:count], observer.flips)
    compared = False
    for i, whole in enumerate(samples):
        for part in pieces(graph.inputs, inputs, whole):
            try:
                made = dict(zip(names, to_tensors(runtime.run(session, feeds(inputs, part))), strict=True))
            except TargetError as error:
                sizes = ", ".join(
                    f"{spec.name} of {list(t.shape)}" for spec, t in zip(inputs, part, strict=True)
                )
                raise TargetError(f"with {sizes}: {error}") from error
            known = i < len(seen) and all(p.shape == w.shape for p, w in zip(part, whole, strict=True))
            reference = (seen[i] if known else observer.run(part))[:count]
            comparison.update(reference, alike(graph.outputs, [made[n] for n in graph.outputs], reference))
            compared = True
    if not compared:
        shown = ", ".join(map(str, inputs))
        raise DataError(f"no sample is large enough for the emitted model, which takes {shown}")
    return comparison


def alike(names: Sequence[str], made: Sequence[Tensor], reference: Sequence[Tensor]) -> Outputs:
    """Outputs in the dtypes of the reference; TargetError where they differ in more than the width of a float."""
    for name, one, other in zip(names, made, reference, strict=True):
        if one.dtype != other.dtype and not (one.is_floating_point() and other.is_floating_point()):
            said, wanted = (DTYPE_NAMES.get(t.dtype, str(t.dtype)) for t in (one, other))
            raise TargetError(f"the ONNX model returns {name} as {said}; the model returns it as {wanted}")
    return tuple(one.to(other.dtype) for one, other in zip(made, reference, strict=True))


def pieces(
    specs: Sequence[Input], inputs: Sequence[Input], tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of dynamic `specs` cut to what `inputs` fix; nothing where they are smaller than that.

    A leading axis is cut into as many pieces as there are, any other to its beginning.
    """
    fixed: dict[str, int] = {}
    have: dict[str, int] = {}
    leading: set[str] = set()
    for spec, one, tensor in zip(specs, inputs, tensors, strict=True):
        for axis, (name, size) in enumerate(zip(spec.shape, one.shape, strict=True)):
            if isinstance(name, str) and isinstance(size, int):
                fixed[name], have[name] = size, tensor.shape[axis]
                leading |= {name} if axis == 0 else set()
    counts = {name: have[name] // size for name, size in fixed.items()}
    if not all(counts.values()):
        return
    for i in range(min((counts[name] for name in leading), default=1)):
        starts = {name: i * size if name in leading else 0 for name, size in fixed.items()}
        yield tuple(_window(tensor, spec, fixed, starts) for spec, tensor in zip(specs, tensors, strict=True))


def _window(tensor: Tensor, spec: Input, sizes: Mapping[str, int], starts: Mapping[str, int]) -> Tensor:
    for axis, name in enumerate(spec.shape):
        if isinstance(name, str) and name in sizes:
            tensor = tensor.narrow(axis, starts[name], sizes[name])
    return tensor


def sample(
    graph: Graph, emitted: Emitted, batches: Sequence[Batch]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs by name, one sample of each, and what the emitted model makes of them."""
    whole = next(part for batch in batches for part in pieces(graph.inputs, emitted.inputs, batch.inputs))
    with opened(emitted.path) as session:
        for part in (_first(emitted.inputs, whole), whole):
            inputs = feeds(emitted.inputs, part)
            try:
                return inputs, dict(zip(emitted.outputs, runtime.run(session, inputs), strict=True))
            except TargetError:  # a model may want more than one sample
                continue
    raise TargetError(f"{emitted.path.name} does not run on a sample that it was verified with")


def judge_emitted(graph: Graph, checks: Sequence[Check], levels: Mapping[tuple[str, str], float]) -> None:
    """ContractError where the file's numbers are not the graph's. levels: see `jitter.levels`."""
    rounded = _rounds(graph)
    for check in checks:
        level = levels.get((check.output, check.slice), math.inf)
        least = max(verify.FAIL_DB, min(verify.SIMULATION_DB, level))
        if check.discrete:
            good = check.flips_within(rounded)
        else:
            good = check.sqnr_db >= least if rounded else check.error <= check.tolerance
        if not check.finite or not good:
            wanted = f"at least {least:.1f} dB" if rounded else f"at most {check.tolerance:.0e}"
            raise ContractError(
                f"the emitted model's output {check.output}{check.slice} is not the graph's: error {check.error:.1e}, "
                f"{check.sqnr_db:.1f} dB; {wanted} is allowed"
            )


def _rounds(graph: Graph) -> bool:
    """True where another runtime rounds in another way than the graph, by more than the last bits of a float32."""
    return is_integer(graph) or any(t.dtype in verify.HALF for t in graph.tensors.values())


def session_inputs(session: Any, specs: Sequence[Input]) -> tuple[Input, ...]:
    """The session's inputs in the order of `specs`; TargetError where the names differ."""
    taken = {i.name: i for i in session.get_inputs()}
    if set(taken) != {spec.name for spec in specs}:
        raise TargetError(
            f"the ONNX model takes {', '.join(taken)}; the model takes {', '.join(s.name for s in specs)}"
        )
    for spec in specs:
        if len(taken[spec.name].shape) != len(spec.shape):
            shown = f"{spec.name} as {taken[spec.name].shape}"
            raise TargetError(f"the ONNX model takes {shown}; the model takes {spec}")
        if taken[spec.name].type == "tensor(uint8)" and spec.dtype.is_floating_point:
            raise TargetError(
                f"the ONNX model takes {spec.name} as uint8; the model takes {spec}: pass the --image-input and "
                "--preprocess that it was compiled with"
            )
    halves = {"tensor(float16)": torch.float16}
    return tuple(
        Input(s.name, halves.get(taken[s.name].type, s.dtype), tuple(taken[s.name].shape)) for s in specs
    )


def run_emitted(session: Any, inputs: Sequence[Input], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of a session; a fixed batch is fed piece by piece."""
    fixed = inputs[0].shape[0] if inputs[0].shape else None
    size = tensors[0].shape[0] if tensors[0].dim() else 1
    if not isinstance(fixed, int) or size == fixed:
        return to_tensors(runtime.run(session, feeds(inputs, tensors)))
    pieces = []
    for start in range(0, size - fixed + 1, fixed):
        part = [
            t[start : start + fixed] if s.shape and s.shape[0] == fixed and t.shape[0] == size else t
            for s, t in zip(inputs, tensors, strict=True)
        ]
        pieces.append(to_tensors(runtime.run(session, feeds(inputs, part))))
    # an output of one number has no axis to join along
    return tuple(torch.cat([p if p.dim() else p[None] for p in parts]) for parts in zip(*pieces, strict=True))


def to_tensors(arrays: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
    return tuple(
        # not np.ascontiguousarray, which gives a scalar an axis
        torch.from_numpy(np.require(a, requirements="C")) if a.dtype.kind in "fiub" else _bfloat16(a)
        for a in arrays
    )


def _bfloat16(array: np.ndarray) -> Tensor:
    return (
        torch.from_numpy(array.view(np.uint16).astype(np.int32))
        .to(torch.int32)
        .to(torch.uint16)
        .view(torch.bfloat16)
    )


def latencies(
    files: Mapping[str, Emitted],
    example: Sequence[Tensor],
    *,
    provider: str = CPU,
    threads: int = 1,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Medians by name ({"model", "float"}), and how many times faster the first is than the second.

    They are taken in turns; large models one at a time, and the `note` says so. What a float model's head is tied to
    is not copied for it; an integer model is loaded as it ships.
    """
    arrays = single(next(iter(files.values())).inputs, example)
    paths = [e.path for e in files.values()]
    options: dict[str, Any] = {
        "feeds": arrays,
        "threads": threads,
        "seconds": seconds,
        "providers": [provider] * len(paths),
    }
    if alone := any(map(is_large, paths)):
        weights = ["folded" if e.integer else "packed" for e in files.values()]
        found = measure.bench_alone(paths, **options, weights=weights)
    else:
        found = measure.bench(paths, **options)
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


def single(inputs: Sequence[Input], example: Sequence[Tensor]) -> list[np.ndarray]:
    """The first sample of the example, in order of the inputs."""
    return list(feeds(inputs, _first(inputs, example)).values())


def _first(inputs: Sequence[Input], example: Sequence[Tensor]) -> list[Tensor]:
    return [
        t[:1] if t.dim() and s.shape and s.shape[0] in ("batch", 1) else t
        for s, t in zip(inputs, example, strict=True)
    ]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
