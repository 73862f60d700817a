"""Per-channel scales and shifts: what y = x * s + t is, and where values go that are only moved.

A batch norm in evaluation, a product with a constant, a sum with one: all are maps. What lies between a map and a layer
(reshapes, permutes, heads, the parts of a fused qkv) often only moves values. Where each channel went is found by
sending numbers through those very operators, so that no layout needs a rule of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .constants import is_random, shape_only
from .ir import Graph
from .names import operator_name
from .ops import arguments, extents, is_constant, is_tensor, kind

TINY = 1e-10  # var + eps below this scales a channel by more than 1e5: the folded weights would be noise
MOVES = frozenset(
    {"view", "flatten", "unflatten", "permute", "transpose", "unsqueeze", "squeeze", "expand", "repeat", "slice",
     "narrow", "select", "split", "chunk", "unbind", "getitem", "identity", "roll", "flip", "index_select",
     "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"}
)  # fmt: skip
_LARGEST = 1 << 26  # elements of a value that numbers are sent through: 256 MB


@dataclass(frozen=True, eq=False)
class Map:
    """node = source * scale + shift. scale, shift: float64, of the value's rank, 1 wide where they are constant."""

    node: Node
    source: Node
    scale: Tensor
    shift: Tensor

    @property
    def scales(self) -> bool:
        return bool((self.scale != 1).any())

    @property
    def shifts(self) -> bool:
        return bool((self.shift != 0).any())


def map_of(graph: Graph, node: Node) -> Map | str | None:
    """The map that a node is; None where it is none, and for a batch norm that cannot be one, why."""
    which = kind(node)
    if which == "batch_norm":
        return _batch_norm(graph, node)
    if which not in ("add", "sub", "mul", "div", "neg") or not is_tensor(node):
        return None
    bound = list(arguments(node).values())
    a: Any = bound[0]
    b: Any = -1 if which == "neg" else bound[1]
    alpha = float(arguments(node).get("alpha", 1))
    source, other = (a, b) if _is_number(b) or not _is_number(a) else (b, a)
    number = _number(graph, other)
    if number is None or not is_tensor(source) or is_constant(source) or not _same(source, node):
        return None
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    first = source is a
    if which in ("mul", "neg"):
        scale, shift = number, zero
    elif which == "div" and first:
        scale, shift = 1 / number, zero
    elif which == "add":
        scale, shift = (one, number * alpha) if first else (one * alpha, number)
    elif which == "sub" and operator_name(node).startswith("aten.rsub"):
        scale, shift = -one * alpha, number  # other - alpha * self
    elif which == "sub":
        scale, shift = (one, -number * alpha) if first else (-one * alpha, number)
    else:
        return None
    rank = node.meta["val"].dim()
    if max(scale.dim(), shift.dim()) > rank or not bool(scale.isfinite().all() and shift.isfinite().all()):
        return None
    return Map(node, source, _ranked(scale, rank), _ranked(shift, rank))


def _is_number(value: Any) -> bool:
    return is_constant(value) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _number(graph: Graph, value: Any) -> Tensor | None:
    if is_constant(value):
        found = graph.tensor(value)
        return found.double() if not found.is_complex() else None
    return torch.tensor(float(value), dtype=torch.float64) if _is_number(value) else None


def _same(a: Node, b: Node) -> bool:
    """Same float type and sizes: what neither promotion nor broadcasting has touched."""
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and x.dtype.is_floating_point and extents(x) == extents(y)


def _ranked(value: Tensor, rank: int) -> Tensor:
    return value.reshape((1,) * (rank - value.dim()) + tuple(value.shape))


def _batch_norm(graph: Graph, norm: Node) -> Map | str:
    bound = arguments(norm)
    if bound["training"]:
        return "it is in training mode: its statistics are those of the batch"
    if bound["running_mean"] is None or bound["running_var"] is None:
        return "it has no running statistics"
    names = ("weight", "bias", "running_mean", "running_var")
    if any(bound[n] is not None and not is_constant(bound[n]) for n in names):
        return "its parameters are computed"
    gamma, beta, mean, var = (None if bound[n] is None else graph.tensor(bound[n]).double() for n in names)
    assert mean is not None and var is not None
    bad = torch.nonzero(~(torch.isfinite(var) & (var >= 0) & (var + bound["eps"] >= TINY))).flatten()
    if len(bad):
        channel = int(bad[0])
        return f"the running variance of channel {channel} is {float(var[channel]):g} (eps {bound['eps']:g})"
    scale = torch.rsqrt(var + bound["eps"]) * (1 if gamma is None else gamma)
    shift = (0 if beta is None else beta) - mean * scale
    sizes = (1, -1, *[1] * (norm.meta["val"].dim() - 2))
    return Map(norm, bound["input"], scale.view(sizes), shift.view(sizes))


def standing_chains(graph: Graph) -> Iterator[list[Map]]:
    """Every longest run of two maps or more, each the only reader of the one before it."""
    results = set(graph.results)
    for node in graph.nodes:
        chain: list[Map] = []
        one = map_of(graph, node) if node.op == "call_function" and node.users else None
        user = next(iter(node.users), None)
        if isinstance(one, Map) and len(node.users) == 1 and node not in results and user is not None:
            below = map_of(graph, user)
            one = None if isinstance(below, Map) and below.source is node else one  # not the last of its run
        while isinstance(one, Map):
            chain.insert(0, one)
            source = one.source
            alone = len(source.users) == 1 and source not in results and source.op == "call_function"
            one = map_of(graph, source) if alone else None
        if len(chain) > 1:
            yield chain


def composed(chain: list[Map]) -> tuple[Tensor, Tensor]:
    """Scale and shift of a run of maps together."""
    scale, shift = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for one in chain:
        scale, shift = scale * one.scale, shift * one.scale + one.shift
    return scale, shift


# -------------------------------------------------------------------- where values go


@dataclass(frozen=True, eq=False)
class Read:
    """A reader of a value that was only moved: `user` reads `value`, where the numbers sent down arrived as `seen`."""

    user: Node
    value: Node
    seen: tuple[Tensor, ...]


@dataclass(frozen=True)
class Flow:
    """Everything that a value becomes by being moved alone.

    moved: the operators, in order. asks: who looks at the shape of such a value alone.
    """

    moved: list[Node]
    reads: list[Read]
    asks: list[Node]

    def rebuild(self, graph: Graph, old: Node, new: Node) -> dict[Node, Node]:
        """The same operators over `new`: values that were those of `old`, moved, have another meaning now."""
        twins = {old: new}
        for node in self.moved:
            args, kwargs = _mapped(node, lambda n: twins.get(n, n))
            twins[node] = graph.insert(_loose(node), args, kwargs, before=node)
        for user in self.asks:
            graph.set_args(user, *_mapped(user, lambda n: twins.get(n, n)))
        return twins


def flow(graph: Graph, start: Node, *numbers: Tensor) -> Flow | None:
    """Sends numbers, of the value's own rank, down from it; None where its sizes are too large or not known."""
    sizes = _sizes(start)
    if sizes is None or math.prod(sizes) > _LARGEST:
        return None
    seen: dict[Node, Any] = {start: tuple(n.expand(sizes) for n in numbers)}
    moved: list[Node] = []
    reads: list[Read] = []
    asks: list[Node] = []
    for node in _below(start):
        inside = [n for n in node.all_input_nodes if n in seen]
        if not inside:
            continue
        if kind(node) == "size" or all(shape_only(node, n) for n in inside):
            asks.append(node)
            continue
        found = _moved(graph, node, inside[0], seen) if len(inside) == 1 else None
        if found is None:
            reads += [Read(node, value, seen[value]) for value in inside]
        else:
            seen[node] = found
            moved.append(node)
    return Flow(moved, reads, asks)


def _below(start: Node) -> Iterator[Node]:
    """Users of a value and of what it is moved to, in the graph's order."""
    waiting, known = set(start.users), set()
    node = start.next
    while waiting:
        if node in waiting:
            waiting.discard(node)
            known.add(node)
            if kind(node) in MOVES:
                waiting |= node.users.keys() - known
            yield node
        node = node.next


def _moved(graph: Graph, node: Node, source: Node, seen: Mapping[Node, Any]) -> Any:
    """What an operator that only moves values makes of the numbers; None for every other."""
    if kind(node) not in MOVES or is_random(node) or node.all_input_nodes[0] is not source:
        return None
    env: dict[Node, Any] = {}
    for other in node.all_input_nodes[1:]:
        env[other] = graph.tensor(other) if is_constant(other) else _hint(other.meta["val"])
        if env[other] is None:
            return None
    made = []
    for one in seen[source]:
        env[source] = one
        args, kwargs = _mapped(node, env.__getitem__)
        made.append(_loose(node)(*args, **kwargs))
    return tuple(made)


def _mapped(node: Node, function: Callable[[Node], Any]) -> tuple[Any, Any]:
    """Arguments and keyword arguments of a node with something else for every node among them."""
    return torch.fx.node.map_arg(node.args, function), torch.fx.node.map_arg(node.kwargs, function)


def _loose(node: Node) -> Any:
    """What an operator calls; a view, which wants the strides that it had, as a reshape."""
    rigid = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    return torch.ops.aten.reshape.default if node.target in rigid else node.target


def _sizes(node: Node) -> list[int] | None:
    sizes = [_hint(s) for s in node.meta["val"].shape]
    return None if None in sizes else sizes  # type: ignore[return-value]


def _hint(size: Any) -> int | None:
    """A dynamic size as it was in the example."""
    if isinstance(size, int):
        return size
    hint = getattr(getattr(size, "node", None), "hint", None)
    return None if hint is None else int(hint)
