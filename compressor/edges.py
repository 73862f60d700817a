"""Samples at the edges: the sizes that a model's dynamic axes may have, beyond those of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import sympy
from torch import Tensor

from .batches import Batch
from .ir import Graph, Input, terms


def varied(graph: Graph, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, ...]]:
    """The batches, and the first one with every dynamic axis cut to 1 and to one less.

    Where an axis has no size in them (a cache that is still empty), also the example.
    """
    first: tuple[Tensor, ...] = ()
    for batch in batches:
        first = first or batch.inputs
        yield batch.inputs
    have = _sizes(graph, first)
    for name in sorted(have):
        for size in {1, have[name] - 1}:
            if 0 < size < have[name] and len(terms(name)) == 1 and possible(graph, name, size):
                yield cut(graph, first, name, size)
    if 0 in have.values():
        yield graph.example


def few(graph: Graph, samples: Iterable[Sequence[Tensor]], count: int) -> Iterator[tuple[Tensor, ...]]:
    """About the first `count` of the samples; whole batches where the model does not take smaller ones."""
    name = next((spec.shape[0] for spec in graph.inputs if spec.shape), None)
    for inputs in samples:
        if count <= 0:
            return
        size = _sizes(graph, inputs).get(str(name), 1)
        if count < size and len(terms(str(name))) == 1 and possible(graph, str(name), count):
            inputs = cut(graph, inputs, str(name), count)
        yield tuple(inputs)
        count -= size


def possible(graph: Graph, name: str, size: int) -> bool:
    """False where the model was exported for other sizes of this axis: multiples, or a range that it is not in."""
    for spec, node in zip(graph.inputs, graph.placeholders, strict=True):
        for label, extent in zip(spec.shape, node.meta["val"].shape, strict=True):
            if label != name or isinstance(extent, int):
                continue
            expr = extent.node.expr
            bounds = extent.node.shape_env.bound_sympy(expr)
            low = (
                1 if bounds.lower == 2 else bounds.lower
            )  # every exported axis starts at 2; 1 works nearly always
            if not low <= size <= bounds.upper:
                return False
            if not expr.is_symbol and not any(r.is_integer for r in sympy.solve(expr - size)):
                return False
    return True


def _sizes(graph: Graph, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Of the dynamic axes, by name."""
    return {
        name: size
        for tensor, spec in zip(inputs, graph.inputs, strict=True)
        for name, size in zip(spec.shape, tensor.shape, strict=True)
        if isinstance(name, str)
    }


def cut(graph: Graph, inputs: Sequence[Tensor], name: str, size: int) -> tuple[Tensor, ...]:
    """The beginning of every axis called `name`, and of those that follow from it."""
    have = _sizes(graph, inputs)
    sizes = have | {name: size}
    sizes |= {one: sum(sizes[t] for t in terms(one)) for one in have if len(terms(one)) > 1}
    return tuple(_shortened(t, spec, sizes) for t, spec in zip(inputs, graph.inputs, strict=True))


def _shortened(tensor: Tensor, spec: Input, sizes: Mapping[str, int]) -> Tensor:
    for axis, label in enumerate(spec.shape):
        if isinstance(label, str):
            tensor = tensor.narrow(axis, 0, min(sizes[label], tensor.shape[axis]))
    return tensor.contiguous()
