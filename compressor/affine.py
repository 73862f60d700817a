"""Affine regions: which operators lie between x and y when y is affine in x, and what one operator would cost.

Three forms: *features* (one linear, token by token), *kernels* (one convolution) and *tables* (one embedding, whose
entry is the index). `features.py` and `kernels.py` decide which operators belong to a region, `probe.py` reads its one
operator off; nothing here knows an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from . import features, kernels, layout
from .constants import DataFree
from .ops import arguments, is_constant, is_tensor, kind, node_macs, shape, sizes
from .steps import Foreign, NotAffine


@dataclass(frozen=True)
class Form:
    """How a region may be affine: its rules, and the operator that takes its place.

    start(entry) is the state of the entry, None where no region starts; follow(node, known, free) the state of what
    an operator computes; is_exit(state, entry, node) says whether one operator could compute that value.
    axis: where the features, or the channels, lie. core: the kinds of operator that make a region worth a look.
    """

    name: str
    axis: int
    start: Callable[[Node], Any]
    follow: Callable[[Node, Mapping[Node, Any], DataFree], Any]
    is_exit: Callable[[Any, Node, Node], bool]
    core: frozenset[str] = frozenset(
        {"conv", "conv_transpose", "linear", "matmul", "addmm", "einsum", "attention"}
    )


FEATURES = Form("linear", -1, layout.start, features.follow, layout.is_exit)
KERNELS = Form("convolution", 1, kernels.start, kernels.follow, kernels.is_exit)
TABLE = Form(
    "embedding", -1, layout.start_index, features.look_up, layout.is_exit, frozenset({"embedding", "index"})
)


@dataclass(frozen=True)
class Reach:
    """Everything that is affine in one entry, with its layout or window, and what stops it, with the reason."""

    form: Form
    entry: Node
    known: Mapping[Node, Any]
    blocked: Mapping[Node, str]

    def exits(self) -> Iterator[Node]:
        """The values that one operator could compute from the entry, in order."""
        return (node for node in self.known if self.is_exit(node))

    def is_exit(self, node: Node) -> bool:
        state = self.known[node]
        if node is self.entry or isinstance(state, list) or not is_tensor(node):
            return False
        same = self.form is TABLE or node.meta["val"].dtype == self.entry.meta["val"].dtype
        empty = any(isinstance(size, int) and size == 0 for size in node.meta["val"].shape)
        return same and not empty and self.form.is_exit(state, self.entry, node)


@dataclass(frozen=True)
class Region:
    """All operators between an entry and its exits. `dead` are those that only these exits need.

    Several exits are the pieces of one operator's output, side by side along the form's axis.
    """

    form: Form
    entry: Node
    exits: tuple[Node, ...]
    state: Any
    nodes: tuple[Node, ...]
    dead: frozenset[Node]

    @property
    def exit(self) -> Node:
        """The only exit, or the last one."""
        return self.exits[-1]

    @property
    def width(self) -> int:
        """Features, or channels, of all exits together."""
        return sum(int(shape(n)[self.form.axis]) for n in self.exits)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one operator in its place, for one sample."""
        if self.form is TABLE:
            return 0
        outs = sizes(self.exit)
        work = math.prod(outs) // outs[self.form.axis] * self.width
        work *= int(shape(self.entry)[self.form.axis])
        return work if self.form is FEATURES else work // self.state.blocks * math.prod(self.state.size)

    @property
    def dead_macs(self) -> int:
        return sum(node_macs(n) for n in self.dead)

    @property
    def looks_up(self) -> bool:
        """False where tables are read by indexing alone, which counts negative indices from the end."""
        return any(kind(n) == "embedding" for n in self.nodes)

    @property
    def tables(self) -> list[tuple[int, int]]:
        """(rows, features) of every table that is looked up in it."""
        bound = [(kind(n), arguments(n)) for n in self.nodes]
        found = [a["weight"] for k, a in bound if k == "embedding"]
        found += [a["self"] for k, a in bound if k == "index" and self.entry in a["indices"]]
        return [(shape(table)[0], math.prod(shape(table)[1:])) for table in found]


def reach(form: Form, entry: Node, free: DataFree, order: Mapping[Node, int]) -> Reach | None:
    """Follows everything that is affine in `entry` alone; None where no region can start.

    order: position of every node of the graph.
    """
    first = form.start(entry) if is_tensor(entry) else None
    if first is None:
        return None
    known: dict[Node, Any] = {entry: first}
    blocked: dict[Node, str] = {}
    waiting = {u for u in entry.users if u.op == "call_function"}
    while waiting:
        node = min(waiting, key=order.__getitem__)
        waiting.remove(node)
        if node in free:
            continue
        try:
            known[node] = form.follow(node, known, free)
        except Foreign:
            if (
                kind(node) == "mul"
            ):  # a gate: the one way of reading another activation that looks like an adapter
                blocked[node] = str(NotAffine(node, "multiplies two activations"))
            continue
        except NotAffine as stop:
            blocked[node] = str(stop)
            continue
        if free_unbacked_symbols(node.meta["val"]):
            del known[node]
            blocked[node] = str(NotAffine(node, "has a size that depends on data"))
            continue
        waiting |= {u for u in node.users if u.op == "call_function"}
    return Reach(form, entry, known, blocked)


def region(found: Reach, exits: Sequence[Node], free: DataFree, order: Mapping[Node, int]) -> Region:
    """The region of `found` that ends at `exits`: values of the entry, and the constants made on the way."""
    inside: set[Node] = set()
    stack = list(exits)
    while stack:
        node = stack.pop()
        if node is found.entry or node in inside or node.op != "call_function" or kind(node) == "size":
            continue
        inside.add(node)
        stack.extend(
            n for n in node.all_input_nodes if n in free or (n in found.known and node in found.known)
        )
    nodes = tuple(sorted(inside, key=order.__getitem__))
    dead = set(exits)
    for node in reversed(nodes):
        if node.users and all(user in dead for user in node.users):
            dead.add(node)
    ends = tuple(sorted(exits, key=order.__getitem__))
    return Region(found.form, found.entry, ends, found.known[ends[-1]], nodes, frozenset(dead))


def forks(found: Reach) -> Iterator[tuple[Node, ...]]:
    """Sets of exits that pieces of one contraction's output lead to, as of a fused qkv whose q and v are adapted.

    For every contraction with a constant: the nearest exits behind which nothing else of the region joins.
    """
    for core in found.known:
        if kind(core) in found.form.core and any(is_constant(n) for n in core.all_input_nodes):
            exits = _frontier(core, found)
            states = [found.known[node] for node in exits]
            if len(exits) > 1 and (found.form is FEATURES or all(state == states[0] for state in states)):
                yield exits


def _frontier(core: Node, found: Reach) -> tuple[Node, ...]:
    after: dict[Node, None] = {core: None}
    for node in found.known:  # in topological order
        if not after.keys().isdisjoint(node.all_input_nodes):
            after[node] = None
    joins = {
        node for node in after if any(n in found.known and n not in after for n in node.all_input_nodes)
    } - {core}
    before_join: set[Node] = set()
    for node in reversed(after):
        if any(user in joins or user in before_join for user in node.users):
            before_join.add(node)
    exits: dict[Node, None] = {}
    stack = [core]
    while stack:
        node = stack.pop()
        if node not in before_join and found.is_exit(node):
            exits[node] = None
        else:
            stack.extend(user for user in node.users if user in after)
    return tuple(exits)


def operator_of(where: Region) -> tuple[Any, list[Any]]:
    """The ATen operator of a region's form, and the arguments that follow entry, weight and bias."""
    aten = torch.ops.aten
    if where.form is FEATURES:
        return aten.linear.default, []
    if where.form is TABLE:
        return aten.embedding.default if where.looks_up else aten.index.Tensor, []
    window, dims = where.state, where.entry.meta["val"].dim()
    return _CONVOLUTIONS[dims], [*map(list, (window.stride, window.padding, window.dilation)), window.blocks]


_CONVOLUTIONS = {
    3: torch.ops.aten.conv1d.default,
    4: torch.ops.aten.conv2d.default,
    5: torch.ops.aten.conv3d.default,
}
