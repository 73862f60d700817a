"""A captured graph against the model itself: on the example, and at other sizes of its dynamic axes.

The exporter takes one size from 2 on for all sizes, and a branch on a size for the side that the example takes. A model
that squeezes, or asks whether there is one sample, or computes a size in floats, is another one then, and nothing but
running it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Node

from .edges import beyond, length, longest, possible, resized
from .errors import UnsupportedError
from .ir import Graph, batch_axis, terms
from .names import operator_name, site
from .ops import arguments, kind


def prove(graph: Graph, expected: Sequence[Tensor]) -> None:
    """The graph gives what the model gives on the example, bit by bit or nearly; operators were only renamed."""
    if differs := _difference(graph, _outputs(graph, graph.example), expected):
        raise UnsupportedError(
            f"capture changed the {differs}: the model is not deterministic, or counts its calls?"
        )


def answer(model: nn.Module, called: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that a model returns for (args, kwargs) with these tensors, which stay as they are, for their own."""
    feed = iter(inputs)
    args, kwargs = pytree.tree_map(
        lambda leaf: next(feed).clone() if isinstance(leaf, Tensor) else leaf, called
    )
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]


def not_dynamic(graph: Graph, run: Callable[[Sequence[Tensor]], list[Tensor]]) -> tuple[str, str] | None:
    """A dynamic axis at one of whose sizes the model, which `run` runs, is not the graph, and why; None if none is.

    An output of the same numbers that lacks the axis counts as the same, and gets a notice.
    """
    if found := _held_as_number(graph):
        return found
    batch = batch_axis(graph.inputs)
    for name in dict.fromkeys(label for spec in graph.inputs for label in spec.shape):
        if not isinstance(name, str) or len(terms(name)) > 1:
            continue
        ran = 0
        for size, once in _tried(graph, name, name == batch):
            if once and ran:
                continue
            sample = resized(graph, graph.example, name, size)
            try:
                expected = run(sample)
            except Exception:  # whatever the user's code raises
                if name == batch and size == 1:
                    return name, "the model does not take one sample"
                continue
            ran += size != 1
            try:
                made = _outputs(graph, sample)
            except (RuntimeError, ValueError, IndexError, TypeError):
                return name, f"at {size} the model does something else, which no longer fits together"
            if differs := _difference(graph, made, expected, shapes=False):
                return name, f"at {size} the model does something else, which changes the {differs}"
            if any(ours.shape != theirs.shape for ours, theirs in zip(made, expected, strict=True)):
                graph.notices.append(
                    f"where {name} is {size} the model drops that axis of its output; the file keeps it"
                )
    return None


def _held_as_number(graph: Graph) -> tuple[str, str] | None:
    """A dynamic axis that decides what a file holds as a number: a convolution of as many groups as samples."""
    labels = graph.axis_names()
    for node in graph.nodes:
        groups = arguments(node)["groups"] if kind(node) in ("conv", "conv_transpose") else 1
        if isinstance(groups, Node):
            symbols = map(str, groups.meta["val"].node.expr.free_symbols)
            if known := sorted(labels[symbol] for symbol in symbols if symbol in labels):
                return known[0], f"groups of {operator_name(node)} at {site(node)} follow from it"
    return None


def _tried(graph: Graph, name: str, batch: bool) -> Iterator[tuple[int, bool]]:
    """Sizes of an axis beside that of the example: the least, its neighbour, far more, and where a branch was taken.

    A size that the model computes in floats (`int(0.6 * n)`) is a number of the example in the graph, and may agree
    with its neighbour. With True: for models that took none of the others but 1, which may want even sizes.
    """
    have = length(graph, name)
    outside = [size for size in beyond(graph, name) if size <= longest(graph, name)] if have else []
    often = [1, have + 1] if batch else [1, have - 1, 2 * have + 1]
    inside = [(size, False) for size in often] + [(size, True) for size in (have // 2, 2 * have)]
    yield from ((size, last) for size, last in inside if 0 < size != have and possible(graph, name, size))
    yield from ((size, False) for size in outside)


def _outputs(graph: Graph, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """In half precision by PyTorch's own kernels: those of `Graph.execute` round less, which deep networks amplify."""
    half = any(t.dtype == torch.float16 for t in graph.tensors.values())
    with torch.no_grad():
        made: Sequence[Tensor] = graph.module(*inputs) if half else graph.run(*inputs)
    return made


def _difference(
    graph: Graph, made: Sequence[Tensor], expected: Sequence[Tensor], *, shapes: bool = True
) -> str:
    """What of which output is not as expected, in words. shapes: whether axes of size 1 count."""
    if len(made) != len(expected):
        return "number of outputs"
    for name, ours, theirs in zip(graph.outputs, made, expected, strict=True):
        alike = ours.shape == theirs.shape or (not shapes and ours.squeeze().shape == theirs.squeeze().shape)
        if not alike or ours.dtype != theirs.dtype:
            return f"shape of output {name}"
        eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
        atol = max(1e-5, 2 * eps) * _scale(theirs)  # a half-precision product may differ in its last bit
        pair = ours.reshape(theirs.shape).double(), theirs.double()
        if not torch.allclose(*pair, rtol=1e-4, atol=atol, equal_nan=True):
            return f"numbers of output {name}"
    return ""


def _scale(tensor: Tensor) -> float:
    return max(1.0, float(tensor.detach().double().abs().max())) if tensor.numel() else 1.0
