"""Samples at the edges: the sizes that a model's dynamic axes may have, beyond those of the data."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import sympy
import torch
from torch import Tensor

from .batches import Batch
from .ir import Graph, Input, batch_axis, terms

LONGEST = 2048


def varied(graph: Graph, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, ...]]:
    """The batches, and the first one with every dynamic axis cut to 1 and to one less, or what the model takes instead.

    Where an axis has no size in them (a cache that is still empty), also the example.
    """
    first: tuple[Tensor, ...] = ()
    for batch in batches:
        first = first or batch.inputs
        yield batch.inputs
    have = _sizes(graph, first)
    rows = batch_axis(graph.inputs)
    for name in sorted(have):
        if len(terms(name)) > 1:
            continue
        less = (have[name] - 1, have[name] - 2, have[name] // 2, have[name] - 4)  # some take even sizes only
        for sizes in ((1,), less):
            fitting = (size for size in sizes if 0 < size < have[name] and possible(graph, name, size))
            samples = (resized(graph, first, name, size) for size in fitting)
            yield from islice((sample for sample in samples if name == rows or runs(graph, sample)), 1)
    if 0 in have.values():
        yield graph.example


def runs(graph: Graph, inputs: Sequence[Tensor]) -> bool:
    """Whether the model takes these sizes: a pool or an unpadded convolution needs more than its window."""
    try:
        graph.run(*inputs)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return True


def few(graph: Graph, samples: Iterable[Sequence[Tensor]], count: int) -> Iterator[tuple[Tensor, ...]]:
    """About the first `count` of the samples; whole batches where the model does not take smaller ones."""
    name = batch_axis(graph.inputs)
    for inputs in samples:
        if count <= 0:
            return
        size = _sizes(graph, inputs).get(str(name), 1)
        if count < size and len(terms(str(name))) == 1 and possible(graph, str(name), count):
            inputs = resized(graph, inputs, str(name), count)
        yield tuple(inputs)
        count -= size


def possible(graph: Graph, name: str, size: int) -> bool:
    """False where the model was exported for other sizes of this axis: multiples, or a range that it is not in."""
    for expr, low, high in _extents(graph, name):
        if not low <= size <= high:
            return False
        if not expr.is_symbol and not any(r.is_integer for r in sympy.solve(expr - size)):
            return False
    return True


def beyond(graph: Graph, name: str) -> list[int]:
    """The sizes just outside the range that an axis was exported for; none where it may have any."""
    found = []
    for _, low, high in _extents(graph, name):
        found += [int(low) - 1] if low > 1 else []
        found += [int(high) + 1] if high.is_Integer and high < sys.maxsize - 1 else []
    return list(dict.fromkeys(found))


def length(graph: Graph, name: str) -> int:
    """Of an axis in the example."""
    return _sizes(graph, graph.example)[name]


def longest(graph: Graph, name: str) -> int:
    """The largest size of an axis that a model is run with unasked: some operators take millions, and attention costs
    the square."""
    return max(LONGEST, 4 * length(graph, name))


def _extents(graph: Graph, name: str) -> Iterator[tuple[Any, Any, Any]]:
    """Every size of that name: its expression, and the least and the most that it was exported for."""
    for spec, node in zip(graph.inputs, graph.placeholders, strict=True):
        for label, extent in zip(spec.shape, node.meta["val"].shape, strict=True):
            if label == name and not isinstance(extent, int):
                expr = extent.node.expr
                bounds = extent.node.shape_env.bound_sympy(expr)
                # every exported axis starts at 2; 1 works nearly always
                yield expr, 1 if bounds.lower == 2 else bounds.lower, bounds.upper


def _sizes(graph: Graph, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Of the dynamic axes, by name."""
    return {
        name: size
        for tensor, spec in zip(inputs, graph.inputs, strict=True)
        for name, size in zip(spec.shape, tensor.shape, strict=True)
        if isinstance(name, str)
    }


def resized(graph: Graph, inputs: Sequence[Tensor], name: str, size: int) -> tuple[Tensor, ...]:
    """The beginning of every axis called `name`, and of those that follow from it, or more of the same."""
    have = _sizes(graph, inputs)
    sizes = have | {name: size}
    sizes |= {one: sum(sizes[t] for t in terms(one)) for one in have if len(terms(one)) > 1}
    return tuple(_resized(t, spec, sizes) for t, spec in zip(inputs, graph.inputs, strict=True))


def _resized(tensor: Tensor, spec: Input, sizes: Mapping[str, int]) -> Tensor:
    for axis, label in enumerate(spec.shape):
        have = tensor.shape[axis]
        if isinstance(label, str) and have:
            times = math.ceil(sizes[label] / have)
            tensor = torch.cat([tensor] * times, axis) if times > 1 else tensor
            tensor = tensor.narrow(axis, 0, min(sizes[label], tensor.shape[axis]))
    return tensor.contiguous()
