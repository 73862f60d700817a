"""Normalisations whose statistics are taken over some of the channels: the reference for channels removed under them.

With m = 1 for a channel that stays and 0 for one that goes, k = sum(m) over everything that is normalised together:

    mean = sum(m x) / k,  var = sum(m (x - mean)^2) / k,  y = (x - mean) / sqrt(var + eps) * weight + bias

RMS norm has no mean; group norm takes both per group; a mean, variance or Euclidean norm that stands by itself is
the same sum. Channels that go keep some value here, which no reader sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .atoms import Array
from .ir import Graph
from .names import operator_name
from .ops import arguments, is_tensor, kind
from .ties import correction

Removed = Mapping[str, Mapping[int, Array]]  # node -> axis -> indices that go
aten = torch.ops.aten


def mask_norms(graph: Graph, removed: Removed) -> None:
    """Rewrites every normalisation that loses channels, in place; the node that holds its result keeps its name."""
    for node in graph.nodes:
        rewrite = REWRITES.get(kind(node))
        if rewrite is not None and node.all_input_nodes:
            gone = removed.get(node.all_input_nodes[0].name, {})
            if gone:
                rewrite(graph, node, gone)


class _Line:
    """Writes operators one behind the other in front of a node, and the last of them over it."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node

    def __call__(self, target: Any, *args: Any) -> Node:
        return self.graph.insert(target, args, before=self.node)

    def constant(self, value: Tensor) -> Node:
        return self.graph.add_tensor(f"mask_{self.node.name}", value)

    def end(self, target: Any, *args: Any) -> None:
        self.graph.set_args(self.node, args, {}, target=target)


def _mask(x: Tensor, dims: list[int], gone: Mapping[int, Array]) -> Tensor:
    """1 and 0 along those axes of x, among `dims`, that lose slices; all other axes of size 1."""
    lost = set(dims) & set(gone)
    mask = torch.ones([x.shape[i] if i in lost else 1 for i in range(x.dim())], dtype=x.dtype)
    for axis in lost:
        mask.index_fill_(axis, torch.from_numpy(gone[axis]), 0)
    return mask


def _mean(line: _Line, x: Node, mask: Node, share: Any, dims: list[int], keep: bool = True) -> Node:
    """Mean over what stays: over everything, masked, divided by the share that stays."""
    return line(aten.div.Tensor, line(aten.mean.dim, line(aten.mul.Tensor, x, mask), dims, keep), share)


def _normalise(graph: Graph, node: Node, gone: Mapping[int, Array]) -> None:
    """Layer and RMS norm."""
    a, line = arguments(node), _Line(graph, node)
    source: Node = a["input"]
    x: Tensor = source.meta["val"]
    dims = list(range(x.dim() - len(a["normalized_shape"]), x.dim()))
    if not set(dims) & set(gone):
        return
    mask = _mask(x, dims, gone)
    share, m, centred = float(mask.mean()), line.constant(mask), source
    if kind(node) == "layer_norm":
        centred = line(aten.sub.Tensor, source, _mean(line, source, m, share, dims))
    eps = torch.finfo(x.dtype).eps if a["eps"] is None else a["eps"]
    parameters: list[Node] = [n for n in (a["weight"], a.get("bias")) if n is not None]
    _scaled(line, centred, _inverse_deviation(line, centred, m, share, dims, eps), parameters)


def _inverse_deviation(
    line: _Line, centred: Node, mask: Node, share: Any, dims: list[int], eps: float
) -> Node:
    variance = _mean(line, line(aten.mul.Tensor, centred, centred), mask, share, dims)
    return line(aten.rsqrt.default, line(aten.add.Scalar, variance, eps))


def _scaled(line: _Line, value: Node, factor: Node, parameters: list[Node]) -> None:
    """value * factor * weight + bias; the last operator takes the node's place."""
    steps = [(aten.mul.Tensor, factor), *zip((aten.mul.Tensor, aten.add.Tensor), parameters, strict=False)]
    for target, operand in steps[:-1]:
        value = line(target, value, operand)
    line.end(steps[-1][0], value, steps[-1][1])


def _group_norm(graph: Graph, node: Node, gone: Mapping[int, Array]) -> None:
    """[n, c, ...] as [n, groups, c / groups, ...], and back."""
    a, line = arguments(node), _Line(graph, node)
    source: Node = a["input"]
    x: Tensor = source.meta["val"]
    if 1 not in gone:
        return
    groups, channels = a["num_groups"], x.shape[1]
    keep = torch.ones(channels, dtype=x.dtype)
    keep[torch.from_numpy(gone[1])] = 0
    shares = keep.reshape(groups, -1).mean(1)
    if set(shares.tolist()) <= {0.0, 1.0}:
        return  # whole groups: the statistics of the others are their own
    space = [1] * (x.dim() - 2)
    m = line.constant(keep.reshape(1, groups, -1, *space))
    share = line.constant(shares.clamp(min=1 / channels).reshape(1, groups, 1, *space))
    dims = list(range(2, x.dim() + 1))
    apart = line(aten.unflatten.int, source, 1, [groups, channels // groups])
    centred = line(aten.sub.Tensor, apart, _mean(line, apart, m, share, dims))
    scale = _inverse_deviation(line, centred, m, share, dims, a["eps"])
    joined = line(aten.flatten.using_ints, line(aten.mul.Tensor, centred, scale), 1, 2)
    parameters = [n for n in (a["weight"], a["bias"]) if is_tensor(n)]
    if not parameters:
        line.end(aten.alias.default, joined)
        return
    weight, *bias = (line(aten.reshape.default, n, [channels, *space]) for n in parameters)
    if bias:
        line.end(aten.add.Tensor, line(aten.mul.Tensor, joined, weight), bias[0])
    else:
        line.end(aten.mul.Tensor, joined, weight)


def _statistic(graph: Graph, node: Node, gone: Mapping[int, Array]) -> None:
    """A mean, variance, deviation or Euclidean norm along some axes."""
    a, line = arguments(node), _Line(graph, node)
    source: Node = node.all_input_nodes[0]
    x: Tensor = source.meta["val"]
    given = a.get("dim")
    dims = [d % x.dim() for d in ([given] if isinstance(given, int) else given or range(x.dim()))]
    if not set(dims) & set(gone):
        return
    mask, keep = _mask(x, dims, gone), bool(a.get("keepdim", False))
    share, m, name = float(mask.mean()), line.constant(mask), operator_name(node).split(".")[1]
    if name == "mean":
        line.end(aten.div.Tensor, line(aten.mean.dim, line(aten.mul.Tensor, source, m), dims, keep), share)
    elif name == "linalg_vector_norm":
        masked = line(aten.mul.Tensor, source, m)
        line.end(
            aten.sqrt.default, line(aten.sum.dim_IntList, line(aten.mul.Tensor, masked, masked), dims, keep)
        )
    else:
        centred = line(aten.sub.Tensor, source, _mean(line, source, m, share, dims))
        variance = _mean(line, line(aten.mul.Tensor, centred, centred), m, share, dims, keep)
        fewer = correction(node)
        count = math.prod(x.shape[i] for i in dims) * share if fewer else 1.0
        unbiased = line(aten.mul.Tensor, variance, count / (count - fewer))
        line.end(aten.sqrt.default if name == "std" else aten.alias.default, unbiased)


REWRITES: dict[str, Callable[[Graph, Node, Mapping[int, Array]], None]] = {
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalise),
    "group_norm": _group_norm,
    "reduce": _statistic,
}
