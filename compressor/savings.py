"""Which affine regions to replace: what each saves, and the cut of a chain into regions that saves most.

A region pays where the operators that fall away cost more multiply-accumulates than the one that stands in for them,
or as many and there are more of them. So a low-rank pair standing alone stays a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce

from torch.fx import Node

from .affine import FEATURES, KERNELS, TABLE, Form, Reach, Region, forks, reach, region
from .constants import DataFree
from .ir import Graph
from .ops import NORMS, arguments, is_tensor, kind, shape

# Multiply-accumulates and operators that go, norms that stay, operators that cost nothing and go; compared in order.
Saving = tuple[int, Fraction, int, int]

_NOTHING: Saving = (0, Fraction(0), 0, 0)
_SHARE = Fraction(1, 100)  # of an operator: what absorbing a norm's gain is worth while others still read it
_NORM_CHAIN = frozenset({"activation", "add", "cast", "identity", "expand", "unsqueeze", "binary"})
_MAYBE_IDLE = frozenset({"identity", "cast", "view", "flatten", "slice", "expand", "squeeze", "unsqueeze"})


class Plan:
    """All regions of a graph as it stands, and which of them to replace.

    The values that everything to y goes through form a chain x, c1, c2 ... y. `_best` finds the cut of that chain into
    regions and untouched operators that saves most.
    """

    def __init__(self, graph: Graph, absorb_norms: bool, refused: frozenset[str]) -> None:
        self.graph, self.absorb_norms, self.refused = graph, absorb_norms, refused
        self.free = DataFree(graph)
        self.order = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.entries: dict[tuple[Form, Node], list[Reach]] = {}
        self.reaches: list[Reach] = []
        self.chosen: list[Region] = []
        self._best_of: dict[tuple[Form, Node], _Best] = {}
        kinds = {kind(n) for n in graph.nodes}
        for form in [form for form in (FEATURES, KERNELS, TABLE) if form is FEATURES or kinds & form.core]:
            for node in graph.nodes:
                found = reach(form, node, self.free, self.order)
                if found is not None:
                    self.reaches.append(found)
                    for end in found.exits():
                        self.entries.setdefault((form, end), []).append(found)

    def choose(self) -> list[Region]:
        """Regions worth replacing, in the graph's order; none holds an operator of another."""
        for form, end in sorted(self.entries, key=lambda key: self.order[key[1]], reverse=True):
            for one in self._best(form, end).regions():
                if not self._rivals(one):
                    self.chosen.append(one)
        for found in self.reaches:
            for exits in forks(found):
                one = self.region(found, exits)
                rivals = self._rivals(one)
                lost = _sum(self.saving(rival) for rival in rivals)
                if one.exit.name not in self.refused and one.dead_macs > one.macs and self.saving(one) > lost:
                    self.chosen = [*(c for c in self.chosen if c not in rivals), one]
        self.chosen.sort(key=lambda one: self.order[one.exit])
        return self.chosen

    def region(self, found: Reach, exits: Sequence[Node]) -> Region:
        return region(found, exits, self.free, self.order)

    def _rivals(self, one: Region) -> list[Region]:
        """The chosen regions that share an operator with this one."""
        return [other for other in self.chosen if not set(other.nodes).isdisjoint(one.nodes)]

    def _best(self, form: Form, end: Node) -> _Best:
        key = (form, end)
        if key not in self._best_of:
            found = self.entries.get(key, [])
            best = self._best(form, found[-1].entry) if found else _Best()
            candidates = [] if end.name in self.refused else reversed(found)  # of equal savings the nearest
            for one in candidates:
                where = self.region(one, [end])
                if not self._pays(where):
                    continue
                before = self._best(form, one.entry)
                saving = _plus(before.saving, self.saving(where))
                if saving > best.saving:
                    best = _Best(saving, where, before)
            self._best_of[key] = best
        return self._best_of[key]

    def _pays(self, where: Region) -> bool:
        macs, operators, *_ = self.saving(where)
        if not any(kind(n) in where.form.core for n in where.dead) or outgrows(where):
            return False
        alone = not _branches(where) and sum(kind(n) in where.form.core for n in where.dead) == 1
        if alone and tied(where):
            return False
        if alone and any(kind(n) == "batch_norm" for n in where.dead):  # which fold takes, after pruning
            return macs > 0
        return macs > 0 or (macs == 0 and operators > 0 and not tied(where))

    def saving(self, where: Region) -> Saving:
        standing = [n for n in where.dead if is_operator(n)]
        norms = [n for n in where.nodes if self._is_gain(n)]
        gone = [n for n in norms if n in where.dead]
        idle = [n for n in standing if is_idle(n)]
        made = 1 + len(where.exits) * (len(where.exits) > 1)
        operators = Fraction(len(standing) - len(idle) - len(gone) - made)
        if self.absorb_norms:
            operators += len(gone) + _SHARE * (len(norms) - len(gone))
        return where.dead_macs - where.macs, operators, -len(gone), len(idle)

    def _is_gain(self, node: Node) -> bool:
        """True for batch norm, and for the gain or bias written out behind a normalisation without its own."""
        if kind(node) == "batch_norm":
            return True
        if kind(node) not in ("mul", "add"):
            return False
        values = [n for n in node.all_input_nodes if n not in self.free]
        if len(values) != 1 or len(node.all_input_nodes) != 2:
            return False
        source = _through_casts(values[0])
        return self._is_gain(source) if kind(node) == "add" else _is_normalised(source)


@dataclass(frozen=True)
class _Best:
    """The best way to compute a value: what is saved on the way to it, and the last region of that way."""

    saving: Saving = _NOTHING
    last: Region | None = None
    before: _Best | None = None

    def regions(self) -> Iterator[Region]:
        if self.last is not None:
            yield self.last
        if self.before is not None:
            yield from self.before.regions()


def _branches(where: Region) -> bool:
    """True where an operator joins two values of the region."""
    inside = {where.entry, *where.nodes}
    return any(sum(n in inside for n in node.all_input_nodes) > 1 for node in where.nodes)


def outgrows(where: Region) -> bool:
    """True where one table would be larger than every table it is made of, or they differ in length."""
    if where.form is not TABLE:
        return False
    rows, widths = zip(*where.tables, strict=True)
    return len(set(rows)) > 1 or where.width > max(widths)


def _plus(a: Saving, b: Saving) -> Saving:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


def _sum(savings: Iterable[Saving]) -> Saving:
    return reduce(_plus, savings, _NOTHING)


def is_operator(node: Node) -> bool:
    return node.op == "call_function" and kind(node) not in ("size", "getitem")


def is_idle(node: Node) -> bool:
    """True for an operator that hands its first operand through: an identity, a cast or a reshape to the same."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None or not is_tensor(source) or not is_tensor(node):
        return False
    same = source.meta["val"].dtype == node.meta["val"].dtype and str(shape(source)) == str(shape(node))
    return same and kind(node) in _MAYBE_IDLE


def tied(where: Region) -> list[Node]:
    """Weights of the region's contractions, or its tables, that something outside also reads."""
    weights = (
        n
        for c in where.nodes
        if c in where.dead and kind(c) in where.form.core
        for n in c.all_input_nodes
        if n.op == "get_attr" and n.meta["val"].dim() > 1
    )
    return [w for w in dict.fromkeys(weights) if any(u not in where.dead for u in w.users)]


def _through_casts(node: Node) -> Node:
    while kind(node) in ("cast", "identity"):
        node = node.all_input_nodes[0]
    return node


def _is_normalised(node: Node) -> bool:
    """True for x * rsqrt(mean(x^2) + eps) however it is written, and for a norm without gain."""
    if kind(node) in NORMS:
        return arguments(node).get("weight") is None
    if kind(node) not in ("mul", "div"):
        return False
    return any(_leads_to_reduction(n) for n in node.all_input_nodes)


def _leads_to_reduction(node: Node) -> bool:
    for _ in range(8):
        if kind(node) == "reduce":
            return True
        if kind(node) not in _NORM_CHAIN or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False
