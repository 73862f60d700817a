"""Exact rewrites that let operators compute in integers: pools, copies of channels, gates, pixels.

Each finds its places and gives a `Match`, whose `build` writes what computes the same, or a `Decline` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from .data import Data
from .ir import Graph
from .names import operator_name, short_name
from .ops import arguments, is_static, is_tensor, kind, shape
from .pipeline import Decline
from .place import listed
from .target import QuantSpec

aten = torch.ops.aten
_END = 2**31  # an end beyond this slices to the end of the axis
_GATES = {"aten.silu.default": aten.sigmoid.default, "aten.hardswish.default": aten.hardsigmoid.default}


@dataclass(frozen=True)
class Match:
    """One place for an exact rewrite: `build` inserts what `node` is equal to and returns its last value."""

    node: Node
    what: str
    build: Callable[[], Node]


def pools(graph: Graph, spec: QuantSpec, data: Data | None = None) -> Iterator[Match | Decline]:
    """Means over space, and adaptive pools, as average pools: integer kernels exist for those.

    Only where the spatial sizes are known, and a multiple of the output's.
    """
    for node in graph.nodes:
        source, sizes = _pooled(node)
        if source is None:
            continue
        inner = shape(source)[2:]
        if not all(is_static(s) for s in inner):
            yield Decline.at(node, "its spatial size is dynamic: an average pool needs to know it")
        elif any(s % o for s, o in zip(inner, sizes, strict=True)):
            yield Decline.at(node, f"{list(inner)} does not divide into {list(sizes)} equal windows")
        else:
            window = [s // o for s, o in zip(inner, sizes, strict=True)]
            yield Match(
                node, f"{short_name(node)} as an average pool", partial(_pool, graph, node, source, window)
            )


def _pooled(node: Node) -> tuple[Node | None, tuple[int, int]]:
    """The 4-D value in single precision that a node averages over space, and the size that is left of its two axes."""
    bound = arguments(node) if node.op == "call_function" else {}
    source: Any = node.args[0] if node.args else None
    if not is_tensor(source) or len(shape(source)) != 4 or not is_tensor(node):
        return None, (1, 1)
    if source.meta["val"].dtype != torch.float32:  # ONNX Runtime pools nothing wider
        return None, (1, 1)
    if operator_name(node) == "aten.mean.dim":
        over = sorted(d % 4 for d in bound["dim"] or ())
        return (source if over == [2, 3] and bound.get("dtype") is None else None), (1, 1)
    if operator_name(node) == "aten.adaptive_avg_pool2d.default":
        return source, tuple(shape(node)[2:])  # type: ignore[return-value]
    return None, (1, 1)


def _pool(graph: Graph, node: Node, source: Node, window: list[int]) -> Node:
    pooled = source
    if window != [1, 1]:
        pooled = graph.insert(aten.avg_pool2d.default, (source, window), before=node)
    if len(shape(node)) == 4:
        return pooled
    return graph.insert(aten.flatten.using_ints, (pooled, 1), before=node)


def selections(graph: Graph, spec: QuantSpec, data: Data | None = None) -> Iterator[Match | Decline]:
    """Every second pixel, with channels of zeros put round the others, as a 1x1 convolution that copies channels.

    The shortcut of CIFAR ResNets (He et al. 2016, section 4.2, option A).
    """
    for node in graph.nodes:
        pads = _channel_pads(node)
        if pads is None:
            continue
        source, strides = _strided(node.args[0])  # type: ignore[arg-type]
        build = partial(_select, graph, node, source, pads, strides)
        yield Match(node, "strided slice and padded channels as a 1x1 convolution", build)


def _select(graph: Graph, node: Node, source: Node, pads: tuple[int, int], strides: list[int]) -> Node:
    channels = shape(source)[1]
    weight = torch.zeros(channels + sum(pads), channels, 1, 1)
    weight[range(pads[0], pads[0] + channels), range(channels)] = 1
    stored = graph.add_tensor(f"{node.name}_selection", weight)
    return graph.insert(aten.conv2d.default, (source, stored, None, strides), before=node)


def _channel_pads(node: Node) -> tuple[int, int] | None:
    """Zeros before and after the channels of a 4-D float32 value, for a pad that adds nothing else."""
    if kind(node) != "pad" or not is_tensor(node) or len(shape(node)) != 4:
        return None
    bound = arguments(node)
    pads = [*bound["pad"], *([0] * 8)][:8]
    constant = bound.get("mode", "constant") == "constant" and not bound.get("value")
    whole = all(isinstance(p, int) and p >= 0 for p in pads) and not any(pads[:4] + pads[6:])
    if not constant or not whole or node.meta["val"].dtype != torch.float32 or not is_static(shape(node)[1]):
        return None
    return pads[4], pads[5]


def _strided(value: Node) -> tuple[Node, list[int]]:
    """The value behind slices that take every n-th row and column from the first on, and both n."""
    strides = [1, 1]
    while kind(value) == "slice":
        bound = arguments(value)
        dim, end = bound["dim"] % 4, bound["end"]
        source = value.args[0]
        to_end = end is None or (isinstance(end, int) and (end >= _END or end == shape(source)[dim]))  # type: ignore[arg-type]
        if bound["start"] not in (None, 0) or not to_end or (dim < 2 and bound["step"] != 1):
            break
        if dim >= 2:
            strides[dim - 2] *= bound["step"]
        value = source  # type: ignore[assignment]
    return value, strides


def gates(graph: Graph, spec: QuantSpec, data: Data | None = None) -> Iterator[Match | Decline]:
    """SiLU and hard swish behind a convolution as x times its gate: integer kernels exist for these two.

    Behind anything where integers go on to the end.
    """
    for node in graph.nodes:
        gate = _GATES.get(operator_name(node))
        if gate is not None and (spec.to_the_end or listed(node.args[0], spec.closed)):  # type: ignore[arg-type]
            what = f"{short_name(node)} as x * {gate._schema.name.removeprefix('aten::')}(x)"
            yield Match(node, what, partial(_gate, graph, node, gate))


def _gate(graph: Graph, node: Node, gate: Callable[..., Any]) -> Node:
    factor = graph.insert(gate, (node.args[0],), before=node)
    return graph.insert(aten.mul.Tensor, (node.args[0], factor), before=node)
