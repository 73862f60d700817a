"""Layers take in scales and shifts: of their outputs, or of what they read.

behind:    W' = W * s[out],  b' = b * s + t
in front:  W' = W * s[in],   b' = b + sum over in and taps of W * t[in]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .ir import Graph
from .names import operator_name, short_name, site
from .ops import arguments, is_constant, is_tensor, kind
from .scales import MOVES, Flow, Map, Read, flow, map_of

_LAYERS = frozenset({"conv", "conv_transpose", "linear"})
_NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
_PRODUCTS = frozenset({"addmm", "matmul"})

# -------------------------------------------------------------------- into the layer above


def carrier_of(value: Node) -> Node | None:
    """The layer that a value comes from, with nothing between them that does more than move values."""
    while kind(value) in MOVES and value.all_input_nodes:
        value = value.all_input_nodes[0]
    if kind(value) not in _LAYERS | _NORMS | _PRODUCTS | {"embedding"} or not is_tensor(value):
        return None
    return None if operator_name(value).startswith("aten.baddbmm") else value


@dataclass(frozen=True, eq=False)
class Behind:
    """A map, the layer above it, and what each of that layer's channels is to be scaled by and shifted."""

    one: Map
    carrier: Node
    scale: Tensor
    shift: Tensor
    flow: Flow

    def apply(
        self, graph: Graph, weight: Node | None, bias: Node | None, finish: Callable[[Node], None]
    ) -> None:
        """Puts a layer with these tensors, and what moves its values, in the place of the old ones.

        finish: is handed what is now the map's value, and puts it to use.
        """
        new = _with_tensors(graph, self.carrier, weight, bias)
        twins = self.flow.rebuild(graph, self.carrier, new)
        for read in self.flow.reads:
            if read.value is not self.one.source:
                graph.replace_uses(read.value, twins[read.value])
        finish(twins[self.one.source])
        for node in (self.one.node, *reversed(self.flow.moved), self.carrier):
            if not node.users:
                graph.erase(node)


def behind(graph: Graph, one: Map) -> Behind | str:
    """How a map folds into the layer above it, or why not; an empty string where there is none."""
    carrier = carrier_of(one.source)
    if carrier is None:
        return ""
    reason = _why_not(graph, carrier, one)
    if reason:
        return reason
    axis, width = _features(carrier)
    rank = carrier.meta["val"].dim()
    index = torch.arange(width, dtype=torch.float32).view([-1 if i == axis else 1 for i in range(rank)])
    found = flow(graph, carrier, index)
    if found is None:
        return "its sizes are too large, or not known"
    mine = next((read for read in found.reads if (read.user, read.value) == (one.node, one.source)), None)
    if mine is None or any(isinstance(seen, list) for read in found.reads for seen in read.seen):
        return "what lies between them does more than move values"
    scale, shift = (_spread(v, mine.seen[0], width) for v in (one.scale, one.shift))
    if scale is None or shift is None:
        return f"it differs along more than the feature axis of the {short_name(carrier)}"
    scale, shift = scale.nan_to_num(nan=1.0), shift.nan_to_num(nan=0.0)
    changed = torch.nonzero((scale != 1) | (shift != 0)).flatten().float()
    for read in found.reads:
        if read is not mine and bool(torch.isin(_narrowed(read.seen[0], ()), changed).any()):
            if read.user.op == "output":
                return f"the output of {site(carrier)} is an output of the graph"
            return f"the output of {site(carrier)} is read twice"
    return Behind(one, carrier, scale, shift, found)


def _why_not(graph: Graph, carrier: Node, one: Map) -> str:
    bound, which = arguments(carrier), kind(carrier)
    if any(bound[n] is not None and not is_constant(bound[n]) for n in _tensor_names(carrier)):
        return f"the weight of {site(carrier)} is computed"
    if which == "batch_norm" and isinstance(map_of(graph, carrier), str):
        return "the batch norm above it is not one of fixed numbers"
    if which == "instance_norm" and not bound["use_input_stats"]:
        return "the norm above it keeps statistics"
    if which in ("layer_norm", "rms_norm") and len(bound["normalized_shape"]) != 1:
        return "the norm above it goes over several axes"
    if which in ("conv", "conv_transpose") and carrier.meta["val"].dim() != bound["weight"].meta["val"].dim():
        return f"{site(carrier)} has an unbatched input"
    if which == "matmul" and not is_constant(carrier.args[1]):
        return "two activations are multiplied above it"
    weight = tensors_of(carrier)[0]
    if which in _PRODUCTS | {"linear"} and weight is not None and weight.meta["val"].dim() < 2:
        return "a product with a vector has no feature axis"
    if which in ("rms_norm", "matmul", "embedding") and one.shifts and which != "embedding":
        return f"a {short_name(carrier)} has no bias to put its shift into"
    if which == "addmm" and (bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1):
        return "the addmm above it scales its operands"
    if not is_tensor(carrier) or carrier.meta["val"].dtype != one.node.meta["val"].dtype:
        return "it computes in another precision"
    return ""


def _tensor_names(carrier: Node) -> tuple[str, ...]:
    """Names of weight and bias among the arguments of a layer."""
    which = kind(carrier)
    if which == "addmm":
        return ("mat2", "self")
    if which == "matmul":
        return (list(arguments(carrier))[1],)
    return ("weight",) if which in ("embedding", "rms_norm") else ("weight", "bias")


def tensors_of(carrier: Node) -> tuple[Node | None, Node | None]:
    """The nodes of a layer's weight and bias."""
    bound = arguments(carrier)
    weight, bias = (*(bound[n] for n in _tensor_names(carrier)), None)[:2]
    return weight, bias


def _features(carrier: Node) -> tuple[int, int]:
    """The axis of a layer's channels in its output, and how many there are."""
    value = carrier.meta["val"]
    last = kind(carrier) in ("linear", "layer_norm", "rms_norm", "embedding", "addmm", "matmul")
    axis = value.dim() - 1 if last else 1
    return axis, int(value.shape[axis])


def _narrowed(numbers: Tensor, kept: tuple[int, ...]) -> Tensor:
    """The same numbers without the axes along which memory repeats, but for those in `kept`."""
    for axis, stride in enumerate(numbers.stride()):
        if stride == 0 and axis not in kept and numbers.shape[axis]:
            numbers = numbers.narrow(axis, 0, 1)
    return numbers


def _spread(value: Tensor, index: Tensor, width: int) -> Tensor | None:
    """What each channel meets of a broadcast value [width], NaN where none arrives; None where that is not one."""
    index = _narrowed(index, tuple(i for i, size in enumerate(value.shape) if size > 1))
    where, numbers = index.reshape(-1).long(), value.expand(index.shape).reshape(-1)
    bounds = []
    for end, reduce in ((math.inf, "amin"), (-math.inf, "amax")):
        bounds.append(
            torch.full((width,), end, dtype=torch.float64).scatter_reduce(0, where, numbers, reduce)
        )
    low, high = bounds
    if bool(((low != high) & low.isfinite()).any()):
        return None
    return torch.where(low.isfinite(), low, math.nan)


def folded(graph: Graph, found: Behind) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of the layer with the map in it, in float64; None where it has none."""
    carrier, scale, shift = found.carrier, found.scale, found.shift
    which, bound = kind(carrier), arguments(carrier)
    weight, bias = (None if n is None else graph.tensor(n).double() for n in tensors_of(carrier))
    if which in _LAYERS:
        assert weight is not None
        groups = bound["groups"] if which == "conv_transpose" else None
        made, new = fold_behind(weight, bias, scale, shift, groups)
        return made, new if bias is not None or bool(shift.any()) else None
    if which == "embedding":
        assert weight is not None
        return weight * scale + shift, None
    if which == "matmul":
        assert weight is not None
        return weight * scale, None
    new = (0 if bias is None else bias) * scale + shift
    made = scale if weight is None else weight * scale
    return made, None if which == "rms_norm" else new


def fold_behind(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, groups: int | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of one operator equal to this one followed by x * scale + shift.

    W' = W * s[out];  b' = b * s + t. Shapes: scale, shift and bias [out]; weight [out, ...], or [in, out / groups,
    ...] of a transposed convolution, whose `groups` is given (None for all others). Float64 in and out.
    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.2.
    """
    if groups is None:
        wide = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    else:
        ins = weight.shape[0] // groups
        per_row = scale.view(groups, 1, -1).expand(-1, ins, -1).reshape(weight.shape[:2])
        wide = weight * per_row.view(*weight.shape[:2], *[1] * (weight.dim() - 2))
    return wide, (bias * scale if bias is not None else 0) + shift


# -------------------------------------------------------------------- into the layers below


@dataclass(frozen=True, eq=False)
class Front:
    """A map, and the layers that read it, each with what its input channels are scaled by and shifted."""

    one: Map
    readers: list[tuple[Read, Tensor, Tensor]]
    flow: Flow

    def apply(self, graph: Graph, tensors: list[tuple[Node | None, Node | None]]) -> None:
        """Puts layers with these tensors in the place of the readers, over what the map read."""
        twins = self.flow.rebuild(graph, self.one.node, self.one.source)
        for (read, _, _), (weight, bias) in zip(self.readers, tensors, strict=True):
            new = _with_tensors(graph, read.user, weight, bias, twins[read.value])
            graph.replace_uses(read.user, new)
            graph.erase(read.user)
        for node in (*reversed(self.flow.moved), self.one.node):
            if not node.users:
                graph.erase(node)


def front(graph: Graph, one: Map) -> Front | str:
    """How a map folds into the layers that read it, or why not."""
    found = flow(graph, one.node, one.scale, one.shift)
    if found is None:
        return "its sizes are too large, or not known"
    readers = []
    for read in found.reads:
        reason = _why_not_read(graph, read)
        if reason:
            return reason
        axis = _inputs(read.user)
        inner = [_along(seen, axis) for seen in read.seen]
        if any(v is None for v in inner):
            return f"it differs along more than the channels that {site(read.user)} reads"
        scale, shift = inner
        assert scale is not None and shift is not None
        if bool(shift.any()) and (reason := _why_no_shift(read.user)):
            return reason
        readers.append((read, scale, shift))
    return Front(one, readers, found) if readers else "nothing reads it"


def _why_not_read(graph: Graph, read: Read) -> str:
    reader, which = read.user, kind(read.user)
    if which not in _LAYERS | _PRODUCTS or operator_name(reader).startswith("aten.baddbmm"):
        return "what reads it is not a convolution or linear"
    bound = arguments(reader)
    operand = bound["mat1"] if which == "addmm" and "mat1" in bound else next(iter(bound.values()))
    weight, bias = tensors_of(reader)
    if operand is not read.value or weight is read.value or bias is read.value:
        return f"{site(reader)} does not read it as its input"
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return f"the weight of {site(reader)} is computed"
    if which in ("conv", "conv_transpose") and operand.meta["val"].dim() != weight.meta["val"].dim():
        return f"{site(reader)} has an unbatched input"
    if which == "addmm" and (bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1):
        return f"{site(reader)} scales its operands"
    if which in _PRODUCTS | {"linear"} and weight.meta["val"].dim() != 2:
        return f"{site(reader)} does not multiply by one matrix"
    return ""


def _why_no_shift(reader: Node) -> str:
    """Why a reader cannot take a shift of what it reads."""
    which = kind(reader)
    if which == "matmul":
        return f"{site(reader)} has no bias to put its shift into"
    if which == "conv_transpose":
        return f"{site(reader)} reaches its border with fewer taps, so that a shift would not be the same everywhere"
    if which == "conv":
        padding = arguments(reader)["padding"]
        if padding == "same" or (padding != "valid" and any(padding)):
            return f"{site(reader)} pads what it reads with zeros, which nothing shifts"
    return ""


def _inputs(reader: Node) -> int:
    """The axis of the channels in what a layer reads."""
    value = arguments(reader)["mat1"] if kind(reader) == "addmm" else next(iter(arguments(reader).values()))
    return 1 if kind(reader) in ("conv", "conv_transpose") else value.meta["val"].dim() - 1


def _along(numbers: Tensor, axis: int) -> Tensor | None:
    """The numbers along one axis, where they are the same along every other."""
    numbers = _narrowed(numbers, (axis,)).movedim(axis, 0).flatten(1)
    return numbers[:, 0] if bool((numbers == numbers[:, :1]).all()) else None


def folded_in_front(graph: Graph, reader: Node, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer that reads x where it read x * scale + shift; float64."""
    which, (weight_node, bias_node) = kind(reader), tensors_of(reader)
    assert weight_node is not None
    weight = graph.tensor(weight_node).double()
    bias = None if bias_node is None else graph.tensor(bias_node).double()
    if which in ("addmm", "matmul"):
        added = shift @ weight
        return weight * scale[:, None], None if which == "matmul" else added + (0 if bias is None else bias)
    if which == "conv_transpose":
        return weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias
    made, new = fold_in_front(weight, bias, scale, shift, arguments(reader).get("groups", 1))
    return made, new if bias is not None or bool(shift.any()) else None


def fold_in_front(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Weight and bias of one operator equal to x * scale + shift followed by this one.

    W' = W * s[in];  b' = b + sum over in and taps of W * t[in]. Shapes: scale and shift [in], weight [out,
    in / groups, ...], bias [out]; no padding. Float64 in and out.
    """
    rows = weight.view(groups, -1, *weight.shape[1:])
    by_group = [v.view(groups, 1, -1, *[1] * (weight.dim() - 2)) for v in (scale, shift)]
    added = (rows * by_group[1]).flatten(2).sum(2).flatten()
    return (rows * by_group[0]).view_as(weight), added + (bias if bias is not None else 0)


def in_order(graph: Graph, value: Node, axis: int) -> Front | None:
    """The layers that read a value, where all of them read its channels in the order that they have there."""
    rank, width = value.meta["val"].dim(), value.meta["val"].shape[axis]
    if not isinstance(width, int):
        return None
    order = torch.arange(width, dtype=torch.float64)
    found = flow(graph, value, order.view([-1 if i == axis else 1 for i in range(rank)]))
    readers = []
    for read in found.reads if found is not None else ():
        if _why_not_read(graph, read) or arguments(read.user).get("groups", 1) != 1:
            return None
        seen = _along(read.seen[0], _inputs(read.user))
        if seen is None or not torch.equal(seen, order):
            return None
        readers.append((read, torch.ones_like(order), torch.zeros_like(order)))
    plain = Map(value, value, torch.ones((1,) * rank), torch.zeros((1,) * rank))
    return Front(plain, readers, found) if found is not None and readers else None


def reversed_inputs(graph: Graph, reader: Node) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer that reads its input channels in reverse."""
    weight, bias = tensors_of(reader)
    assert weight is not None
    axis = 0 if kind(reader) in _PRODUCTS | {"conv_transpose"} else 1
    return graph.tensor(weight).flip(axis), None if bias is None else graph.tensor(bias)


# -------------------------------------------------------------------- the rewrite


def _with_tensors(
    graph: Graph, layer: Node, weight: Node | None, bias: Node | None, source: Node | None = None
) -> Node:
    """A new operator like a layer, with other tensors and input, so that no name carries another value than it did."""
    bound = arguments(layer)
    names = _tensor_names(layer)
    new: dict[str, Any] = dict(zip(names, (weight, bias), strict=False))
    if source is not None:
        new["mat1" if kind(layer) == "addmm" else next(iter(bound))] = source
    args = [*layer.args]
    kwargs = dict(layer.kwargs)
    for position, name in enumerate(bound):
        if name not in new:
            continue
        if position < len(args):
            args[position] = new[name]
        elif name in kwargs or new[name] is not None:
            kwargs[name] = new[name]
    return graph.insert(layer.target, tuple(args), kwargs, before=layer)  # type: ignore[arg-type]
