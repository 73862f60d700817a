"""Which channels of a graph must be scaled alike, so that scaling them changes no output.

A channel may be scaled by any s > 0 where a layer (or a norm, or a product with constants) writes it, everything up to
its readers is homogeneous (ReLU, pools, sums with channels scaled alike), and the readers divide by s. Every channel of
every value has a *label*; labels that an operator makes inseparable are tied. Through whatever only moves values labels
are sent by those very operators, so that heads, shuffles and concats need no rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .atoms import components
from .ir import Graph
from .names import operator_name
from .ops import NORMS, arguments, is_constant, is_tensor, kind, shape, sizes
from .place import selected
from .readers import Layer, layer_of
from .scales import MOVES

aten = torch.ops.aten

FIXED, ZERO = 0, -1  # labels: of channels that keep their scale, and of zeros, which have none
_LARGEST = 1 << 26  # elements of a value whose labels are sent through an operator
_POOLS = frozenset({"max_pool", "avg_pool", "adaptive_pool", "upsample", "identity", "neg", "prelu"})
_HOMOGENEOUS = ("aten.relu.default", "aten.leaky_relu.default")
_LINEAR_REDUCTIONS = ("aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default")


@dataclass(frozen=True)
class Written:
    """What makes channels: their labels `outs` are its own. ins: labels that it reads, [outs or 1, ins] of a layer.

    layer: None for a norm or a product with constants, whose `constants` are scaled along with the channels.
    """

    node: Node
    outs: Tensor
    ins: Tensor
    layer: Layer | None = None
    constants: tuple[Node, ...] = ()


@dataclass
class Labels:
    """Which channels must be scaled alike.

    of: value -> its labels, of its rank and 1 wide along the axes that they do not vary on. written: what makes
    channels with labels of its own. count: of labels.
    """

    graph: Graph
    of: dict[Node, Any] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    count: int = 1

    def new(self, width: int) -> Tensor:
        self.count += width
        return torch.arange(self.count - width, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        a, b = (t.reshape(-1) for t in torch.broadcast_tensors(a, b))
        both = (a != ZERO) & (b != ZERO)
        self.ties.append((a[both], b[both]))

    def fix(self, nodes: Iterable[Any]) -> None:
        for node in nodes:
            found = self.of.get(node)
            for one in found if isinstance(found, list) else [found]:
                if one is not None:
                    self.tie(one, torch.tensor(FIXED))

    def axis(self, node: Node) -> int | None:
        """The only axis along which a value's labels vary."""
        wide = [i for i, size in enumerate(self.of[node].shape) if size > 1]
        return wide[0] if len(wide) == 1 else None

    def classes(self) -> Tensor:
        """The class of every label [count], 0 of those that keep their scale."""
        ties = [(a.numpy(), b.numpy()) for a, b in self.ties]
        return torch.from_numpy(components(self.count, ties))


def labels_of(graph: Graph) -> Labels:
    labels = Labels(graph)
    for node in graph.nodes:
        if node.op == "output":
            labels.fix(node.all_input_nodes)
        elif node.op != "get_attr" and isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            labels.of[node] = _follow(labels, node)
    return labels


def _follow(labels: Labels, node: Node) -> Any:
    """Labels of a node's value; what cannot be scaled is fixed on the way."""
    which, a = kind(node), arguments(node) if node.op == "call_function" else {}
    layer = layer_of(node) if node.op == "call_function" else None
    first: Any = node.args[0] if node.args else None
    found: Any = None
    if layer is not None and layer.source in labels.of:
        found = _layer(labels, layer)
    elif node.op != "call_function":
        pass
    elif which in NORMS:
        found = _norm(labels, node, a)
    elif which in MOVES | {"cat", "stack", "pad"}:
        found = _moved(labels, node, a)
    elif which in _POOLS or operator_name(node) in _HOMOGENEOUS:
        one = labels.of.get(first)
        found = one if is_tensor(node) and isinstance(one, Tensor) and _fits(one, node) else None
        others = node.all_input_nodes[1:]
        labels.fix(others)
    elif operator_name(node) in _LINEAR_REDUCTIONS:
        found = _reduced(labels.of.get(first), node, a)
    elif which in ("add", "sub", "mul", "div"):
        found = _sum(labels, node) if which in ("add", "sub") else _product(labels, node, which)
    elif which == "attention":
        found = labels.of.get(a["value"])
        found = found if _fits(found, node) and found.shape[-2] == 1 else None
        labels.fix([a["query"], a["key"], a["attn_mask"]] + ([] if found is not None else [a["value"]]))
    elif which == "matmul" and not any(is_constant(n) for n in node.all_input_nodes):
        right: Any = node.args[1]
        found = labels.of.get(right)
        found = found if _fits(found, node) and found.shape[-2] == 1 else None
        labels.fix([first] + ([] if found is not None else [right]))
    if found is None:
        if layer is None or layer.source not in labels.of:
            labels.fix(node.all_input_nodes)
        value = node.meta["val"]
        found = (
            torch.full((1,) * value.dim(), FIXED)
            if isinstance(value, torch.Tensor)
            else [torch.full((1,) * v.dim(), FIXED) if isinstance(v, torch.Tensor) else None for v in value]
        )
    return found


def _fits(one: Any, node: Node) -> bool:
    """Whether labels, as they are, may stand for a value."""
    if not isinstance(one, Tensor) or not is_tensor(node) or one.dim() != node.meta["val"].dim():
        return False
    return all(size in (1, wide) for size, wide in zip(one.shape, shape(node), strict=True) if size != 1)


def _alone(*constants: Node | None) -> bool:
    return all(c is None or (is_constant(c) and len(c.users) == 1) for c in constants)


def spread(outs: Tensor, axis: int, rank: int) -> Tensor:
    """Numbers of channels as a tensor of this rank, 1 wide along all other axes."""
    return outs.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def _layer(labels: Labels, layer: Layer) -> Tensor | None:
    one, axis, rank = labels.of[layer.source], layer.axis, len(shape(layer.node))
    flat = one.numel() == one.shape[axis]
    if flat and (sources := selected(labels.graph, layer.node)) is not None:
        wide = one.expand([layer.ins if i == axis else 1 for i in range(one.dim())]).reshape(-1)
        outs = torch.where(sources >= 0, wide[sources.clamp(min=0)], ZERO)
        return spread(outs, axis, rank)
    whole = _alone(layer.weight, layer.bias) and labels.graph.tensor(layer.weight).is_floating_point()
    if not flat or not whole:
        labels.fix([layer.source])
    if not whole:
        return None
    ins = one.reshape(-1).expand(layer.ins) if flat else torch.zeros(layer.ins, dtype=torch.int64)
    by_row = ins.reshape(layer.groups, -1).repeat_interleave(layer.outs // layer.groups, 0)
    outs = labels.new(layer.outs)
    labels.written.append(Written(layer.node, outs, by_row[:1] if layer.groups == 1 else by_row, layer))
    return spread(outs, axis, rank)


def _norm(labels: Labels, node: Node, a: Mapping[str, Any]) -> Tensor | None:
    weight, bias = a.get("weight"), a.get("bias")
    if weight is None or not _alone(weight, bias) or len(shape(weight)) != 1:
        return None
    labels.fix(node.all_input_nodes)
    outs = labels.new(shape(weight)[0])
    labels.written.append(
        Written(node, outs, torch.zeros_like(outs), None, tuple(n for n in (weight, bias) if n is not None))
    )
    axis = -1 if kind(node) in ("layer_norm", "rms_norm") else 1
    return spread(outs, axis, len(shape(node)))


def _moved(labels: Labels, node: Node, a: Mapping[str, Any]) -> Any:
    """Labels sent through the operator itself."""
    which, first = kind(node), node.args[0]
    if which == "pad":
        return _padded(labels.of.get(first), a)  # type: ignore[arg-type]
    if which == "getitem" and isinstance(found := labels.of.get(first), list):  # type: ignore[arg-type]
        return found[node.args[1]]  # type: ignore[index]
    env: dict[Node, Any] = {}
    for n in node.all_input_nodes:
        one, value = labels.of.get(n), n.meta.get("val")
        if isinstance(one, Tensor):
            wide = [_hint(s) for s in value.shape]
            if math.prod(wide) > _LARGEST:
                return None
            env[n] = one.expand(wide)
        elif isinstance(value, torch.Tensor) or value is None:
            return None
        else:
            env[n] = _hint(value)
    args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
    target: Any = aten.reshape.default if which == "view" else node.target
    made = target(*args, **kwargs)
    return [_narrow(one) for one in made] if isinstance(made, (list, tuple)) else _narrow(made)


def _padded(one: Any, a: Mapping[str, Any]) -> Tensor | None:
    """Zeros beside labels; along the axes on which these do not vary, zeros have any scale."""
    if not isinstance(one, Tensor) or a.get("mode", "constant") != "constant" or a.get("value"):
        return None
    pads = list(a["pad"])
    for i in range(len(pads)):
        pads[i] = pads[i] if one.shape[-1 - i // 2] > 1 else 0
    return aten.constant_pad_nd.default(one, pads, ZERO)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _narrow(one: Tensor) -> Tensor:
    """The same labels, 1 wide along the axes on which they do not vary."""
    for axis, size in enumerate(one.shape):
        if size > 1 and bool((one == one.narrow(axis, 0, 1)).all()):
            one = one.narrow(axis, 0, 1)
    return one.clone()


def _reduced(one: Any, node: Node, a: Mapping[str, Any]) -> Tensor | None:
    if not isinstance(one, Tensor) or not a.get("dim"):
        return None
    over = sorted({d % one.dim() for d in ([a["dim"]] if isinstance(a["dim"], int) else a["dim"])})
    if any(one.shape[d] > 1 for d in over):
        return None
    return one if a.get("keepdim") else one.reshape([s for d, s in enumerate(one.shape) if d not in over])


def _sum(labels: Labels, node: Node) -> Tensor | None:
    parts: list[Any] = [labels.of.get(n) for n in node.all_input_nodes]
    if len(parts) != 2 or not all(isinstance(p, Tensor) for p in parts) or node.kwargs:
        return None
    first, second = torch.broadcast_tensors(*(p[(None,) * (len(shape(node)) - p.dim())] for p in parts))
    labels.tie(first, second)
    return torch.where(first == ZERO, second, first)


def _product(labels: Labels, node: Node, which: str) -> Tensor | None:
    """A product with a number, with constants for each channel, or of a value with a smaller one: a gate."""
    a: Any
    b: Any
    a, b = list(node.args)[:2]
    if which == "mul" and not isinstance(labels.of.get(a), Tensor):
        a, b = b, a
    one = labels.of.get(a) if isinstance(a, Node) else None
    if not isinstance(one, Tensor) or not _fits(one, node):
        return None
    if not isinstance(b, Node):
        return one
    if not is_constant(b):
        smaller = isinstance(labels.of.get(b), Tensor) and math.prod(sizes(b)) < math.prod(sizes(a))
        if not smaller or which != "mul":
            return None
        labels.fix([b])
        return one
    constant = labels.graph.tensor(b)
    if constant.numel() == 1:
        return one
    wide = [i - constant.dim() for i, size in enumerate(constant.shape) if size > 1]
    axis = wide[0] % one.dim()
    if which != "mul" or len(wide) != 1 or not _alone(b) or one.numel() not in (1, one.shape[axis]):
        return None
    outs = labels.new(constant.numel())
    labels.written.append(Written(node, outs, one.reshape(-1).expand(len(outs)), None, (b,)))
    return spread(outs, axis, one.dim())
