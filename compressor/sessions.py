"""Sessions of ONNX files beside the graphs that they were made from: what goes in, what comes out, what differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from . import apart, measure, runtime
from .emit import companion_of, feeds
from .errors import DataError, TargetError
from .ir import Graph, Input
from .names import DTYPE_NAMES
from .verify import Comparison, Observer, Outputs

CPU = "CPUExecutionProvider"
ORT_SUFFIX = ".ort"  # of ONNX Runtime's own format, which nothing else reads


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


def is_large(path: Path) -> bool:
    """True for a model whose weights have a file of their own: ONNX Runtime then runs apart from torch."""
    return companion_of(path).exists()


def inputs_of(session: Any, specs: Sequence[Input]) -> tuple[Input, ...]:
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


def run(session: Any, inputs: Sequence[Input], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
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


def compare(
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
    names = outputs_of(session, graph)
    comparison = observer.comparison(count)
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


def outputs_of(session: Any, graph: Graph) -> list[str]:
    """The graph's names of a session's outputs, in the session's order; TargetError where these are others.

    Other tools may have names of their own for all of them, which then come in order.
    """
    names = [output.name for output in session.get_outputs()]
    if renamed(names, graph.outputs):
        return list(graph.outputs)
    if sorted(names) != sorted(graph.outputs):
        raise TargetError(
            f"the ONNX model returns {', '.join(names)}; the model returns {', '.join(graph.outputs)}"
        )
    return names


def renamed(names: Sequence[str], outputs: Sequence[str]) -> bool:
    """Whether as many outputs have other names, every one of them."""
    return len(names) == len(outputs) and not set(names) & set(outputs)


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
        comparison = between(exact, plain, specs, inputs, samples)
    return min((check.sqnr_db for check in comparison.checks()), default=math.inf)


def between(
    one: Any,
    other: Any,
    specs: Sequence[Input],
    inputs: Sequence[Input],
    samples: Iterable[Sequence[Tensor]],
    flips: Sequence[float] = (),
) -> Comparison:
    """Outputs of two sessions of the same model. samples: as in `saturated`. flips: as `Observer` has them."""
    names = [output.name for output in one.get_outputs()]
    comparison = Comparison(names, [()] * len(names), flips)
    for whole in samples:
        for part in pieces(specs, inputs, whole):
            named = feeds(inputs, part)
            comparison.update(*(to_tensors(runtime.run(session, named)) for session in (one, other)))
    return comparison


def _multiplies_bytes(path: Path) -> bool:
    if path.suffix == ORT_SUFFIX:  # nothing but ONNX Runtime reads it
        return True
    weights = onnx.load(path, load_external_data=False).graph.initializer
    return any(tensor.data_type == onnx.TensorProto.INT8 for tensor in weights)


def single(inputs: Sequence[Input], example: Sequence[Tensor]) -> list[np.ndarray]:
    """The first sample of the example, in order of the inputs."""
    return list(feeds(inputs, first(inputs, example)).values())


def first(inputs: Sequence[Input], example: Sequence[Tensor]) -> list[Tensor]:
    """The first sample of inputs whose batch is free or 1; the others whole."""
    return [
        t[:1] if t.dim() and s.shape and s.shape[0] in ("batch", 1) else t
        for s, t in zip(inputs, example, strict=True)
    ]


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
