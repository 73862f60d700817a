"""Layers as matrices: what a convolution or linear with a constant weight reads, and where its error counts.

    output rows [R, O] = input rows [R, F] @ matrix [O, F]' + bias        per group of a grouped convolution

`rows` unfolds an input, so that every kind of layer becomes this one least-squares problem. `anchor` follows a
layer's output through whatever is invertible and acts channel by channel (batch norm, layer scale, permutations) up to
the sum that it joins: a residual stream is where the error of a block is felt, and where others can undo it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .ir import Graph
from .ops import arguments, extents, is_constant, is_tensor, kind, shape


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution (transposed too), linear or product with a constant weight.

    taps: positions of the kernel, 1 for a linear. turned: the weight is stored [in, out]. outs, ins: of all groups.
    """

    node: Node
    source: Node
    weight: Node
    bias: Node | None
    groups: int
    outs: int
    ins: int
    kernel: tuple[int, ...]

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def features(self) -> int:
        """Columns of the matrix of one group."""
        return self.ins // self.groups * self.taps

    @property
    def is_tied(self) -> bool:
        """Whether something else reads its weight, too."""
        return len(self.weight.users) > 1

    @property
    def axis(self) -> int:
        """Where the channels are, in its input and in its output."""
        return 1 if self.kernel else len(shape(self.source)) - 1

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.ins > 1

    def matrix(self, weight: Tensor) -> Tensor:
        """[groups, outs / groups, features], columns in the order channel, tap."""
        if kind(self.node) == "conv_transpose":
            turned = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flip(*range(3, weight.dim() + 1))
            return turned.flatten(2)
        if not self.kernel:
            return (weight if kind(self.node) == "linear" else weight.T)[None]
        return weight.flatten(1).unflatten(0, (self.groups, -1))

    def folded(self, matrix: Tensor) -> Tensor:
        """The weight of a matrix [groups, outs / groups, features]."""
        if kind(self.node) == "conv_transpose":
            taps = matrix.unflatten(2, (-1, *self.kernel))
            return taps.flip(*range(3, taps.dim())).transpose(1, 2).flatten(0, 1)
        if not self.kernel:
            return matrix[0] if kind(self.node) == "linear" else matrix[0].T
        return matrix.flatten(0, 1).unflatten(1, (-1, *self.kernel))

    def windows(self, value: Tensor) -> Tensor:
        """What the layer reads for each of its outputs: a view [positions..., channels, kernel...]."""
        if not self.kernel:
            return value.movedim(self.axis, -1)
        a, rank = arguments(self.node), len(self.kernel)
        stride, dilation = each(a["stride"], rank), each(a["dilation"], rank)
        reach = [d * (k - 1) for d, k in zip(dilation, self.kernel, strict=True)]
        if kind(self.node) == "conv_transpose":
            value, stride = _spread(value, stride), [1] * rank
            before = [r - p for r, p in zip(reach, each(a["padding"], rank), strict=True)]
            after = [b + p for b, p in zip(before, each(a["output_padding"], rank), strict=True)]
        elif isinstance(a["padding"], str):
            before = [r // 2 if a["padding"] == "same" else 0 for r in reach]
            after = [r - b if a["padding"] == "same" else 0 for r, b in zip(reach, before, strict=True)]
        else:
            before = after = each(a["padding"], rank)
        value = F.pad(value, [p for pair in zip(before[::-1], after[::-1], strict=True) for p in pair])
        room = [(s - r - 1) // t + 1 for s, r, t in zip(value.shape[2:], reach, stride, strict=True)]
        batch, channel, *space = value.stride()
        return value.as_strided(
            (value.shape[0], *room, value.shape[1], *self.kernel),
            (batch, *(s * t for s, t in zip(space, stride, strict=True)), channel,
             *(s * d for s, d in zip(space, dilation, strict=True))),
        )  # fmt: skip


def layer_of(node: Node) -> Layer | None:
    """The layer that an operator is; None where its weight is empty, or it or its bias computed, or read otherwise."""
    a, which = arguments(node), kind(node)
    source: Any = a.get("input")
    weight: Any = a.get("weight")
    bias: Any = a.get("bias")
    if which in ("matmul", "addmm"):
        if which == "addmm" and (a["beta"] != 1 or a["alpha"] != 1):
            return None
        operands: list[Any] = list(node.args)
        bias, source, weight = operands if which == "addmm" else (None, *operands)
    elif which not in ("conv", "conv_transpose", "linear"):
        return None
    if not (is_constant(weight) and is_tensor(source) and (bias is None or is_constant(bias))):
        return None
    wide = shape(weight)
    if 0 in wide:
        return None
    if which in ("linear", "matmul", "addmm"):
        outs, ins = wide if which == "linear" else wide[::-1] if len(wide) == 2 else (0, 0)
        plain = len(wide) == 2 and (bias is None or len(shape(bias)) == 1)
        return Layer(node, source, weight, bias, 1, outs, ins, ()) if plain else None
    if len(shape(source)) != len(wide):
        return None
    outs, ins = (
        (wide[1] * a["groups"], wide[0]) if which == "conv_transpose" else (wide[0], wide[1] * a["groups"])
    )
    return Layer(node, source, weight, bias, a["groups"], outs, ins, wide[2:])


def each(given: Any, rank: int) -> list[int]:
    """A size for each axis, where one may stand for all."""
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    return values * rank if len(values) == 1 else values


def _spread(value: Tensor, stride: Sequence[int]) -> Tensor:
    """Zeros between the positions: a transposed convolution is a plain one over this."""
    sizes = [(s - 1) * t + 1 for s, t in zip(value.shape[2:], stride, strict=True)]
    wide = value.new_zeros(*value.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, t) for t in stride))
    wide[places] = value
    return wide


# -------------------------------------------------------------------- where errors count


@dataclass(frozen=True)
class Anchor:
    """The value in which a layer's error is felt. scale [outs]: its change per change of the layer's output.

    steps: what lies between the layer and the anchor, in order. axis: of the channels in the anchor.
    """

    node: Node
    axis: int
    scale: Tensor
    steps: tuple[Node, ...]

    def pull(self, error: Tensor) -> Tensor:
        """The change of the layer's output that makes this change of the anchor; 0 where its scale is 0."""
        for step in reversed(self.steps):
            if kind(step) in ("permute", "transpose"):
                order = _order(step)
                error = error.permute([order.index(i) for i in range(len(order))])
        inverse = torch.where(self.scale.abs() > 1e-12, 1 / self.scale, 0.0).to(error.dtype)
        axis = self.axis_at_layer
        return error * inverse.reshape([-1 if i == axis else 1 for i in range(error.dim())])

    @property
    def axis_at_layer(self) -> int:
        axis = self.axis
        for step in reversed(self.steps):
            if kind(step) in ("permute", "transpose"):
                axis = _order(step)[axis]
        return axis


def anchor(graph: Graph, layer: Layer) -> Anchor:
    """The furthest value to which a layer's error travels channel by channel: the sum that it joins, or itself."""
    node, axis = layer.node, 1 if layer.kernel else len(shape(layer.node)) - 1
    scale = torch.ones(layer.outs, dtype=torch.float64)
    steps: list[Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        gain = _gain(graph, user, node, axis)
        if gain is None:
            break
        scale = scale * gain
        axis = _order(user).index(axis) if kind(user) in ("permute", "transpose") else axis
        steps.append(user)
        node = user
    return Anchor(node, axis, scale, tuple(steps))


def channel_axis(value: Node) -> int:
    """Where the channels of a value are, as the layer has them that it came from."""
    moves, node = list[Node](), value
    while (layer := layer_of(node)) is None:
        inputs = [n for n in node.all_input_nodes if not is_constant(n)]
        if not inputs:
            break
        if kind(node) in ("permute", "transpose"):
            moves.append(node)
        node = inputs[0]
    axis = 1 if layer is not None and layer.kernel else -1
    for move in reversed(moves):
        order = _order(move)
        axis = order.index(axis % len(order))
    return axis % len(shape(value))


def _gain(graph: Graph, user: Node, node: Node, axis: int) -> Tensor | None:
    """What an operator multiplies every channel of `node` by; None where it does anything else to its error."""
    which, one = kind(user), torch.ones((), dtype=torch.float64)
    if which == "batch_norm":
        return norm_gain(graph, user) if axis == 1 and user.args[0] is node else None
    if which in ("identity", "permute", "transpose"):
        return one
    if which not in ("add", "mul") or len(user.args) < 2:
        return None
    other: Any = user.args[1] if user.args[0] is node else user.args[0]
    if other is node or extents(user.meta["val"]) != extents(node.meta["val"]):
        return None
    if which == "add":
        return one if is_tensor(other) and not user.kwargs and not _reaches(node, other) else None
    if not is_constant(other):
        return None
    factor = graph.tensor(other).double()
    aligned = factor.reshape([1] * (len(shape(node)) - factor.dim()) + list(factor.shape))
    wide = [i for i, size in enumerate(aligned.shape) if size > 1]
    return aligned.reshape(-1) if wide in ([], [axis]) else None


def norm_gain(graph: Graph, norm: Node) -> Tensor | None:
    """gain / deviation of an inactive batch norm [channels]; None where its statistics are not constants."""
    a = arguments(norm)
    parts = [a["weight"], a["bias"], a["running_mean"], a["running_var"]]
    if a["training"] or not all(p is None or is_constant(p) for p in parts) or a["running_var"] is None:
        return None
    gain = (graph.tensor(a["running_var"]).double() + a["eps"]).rsqrt()
    return gain if a["weight"] is None else gain * graph.tensor(a["weight"]).double()


def _order(step: Node) -> list[int]:
    """Which axis of its operand each axis of a permutation's result is."""
    a, rank = arguments(step), len(shape(step))
    if "dims" in a:
        return [d % rank for d in a["dims"]]
    order = list(range(rank))
    if rank > 1:
        i, j = a.get("dim0", a.get("axis0", -2)), a.get("dim1", a.get("axis1", -1))
        order[i], order[j] = order[j], order[i]
    return order


def _reaches(start: Node, end: Node) -> bool:
    """Whether `end` depends on `start`."""
    seen, todo = set(), [start]
    while todo:
        node = todo.pop()
        if node is end:
            return True
        if node not in seen:
            seen.add(node)
            todo += node.users
    return False
