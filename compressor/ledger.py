"""Which channels stand where, what they cost, what became of them, and why the others must stay.

Groups that stand on the same axes are one row, however many there are. Everything is reckoned on whole arrays: forty
thousand channels take a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atoms import Array
from .channels import Algebra, Group, Key, Term
from .ir import Graph
from .widths import Costs, Family


@dataclass(frozen=True)
class Entry:
    """Groups on the same axes.

    sites: modules that compute them. groups, width, left: how many there were, how many slices of the narrowest axis
    that is, and how many of these are left; least: the smallest width that the pass may leave. tensors: parameters
    that they run through. params, macs: what goes when all of them go. state: `pruned`, `kept`, or `frozen`, which
    means that they cannot be removed; why: the reason of that, or of being kept; remedy: what would free them.
    """

    sites: tuple[str, ...]
    groups: int
    width: int
    left: int
    least: int
    tensors: tuple[str, ...]
    params: int
    macs: int
    state: str
    why: str
    remedy: str = ""

    def to_dict(self, *, names: bool = False) -> dict[str, Any]:
        """Plain data. names: the tensors' names, not their number alone."""
        first, *others = self.sites or ("",)
        return {
            "where": f"{first} and {len(others)} more" if others else first,
            "groups": self.groups,
            "width": self.width,
            "left": self.left,
            "least": self.least,
            "tensors": list(self.tensors) if names else len(self.tensors),
            "params": self.params,
            "macs": self.macs,
            "state": self.state,
            "why": self.why,
            "remedy": self.remedy,
        }


class Ledger:
    """The rows of one graph, as it was when it was analysed, and what passes took from them since.

    found: its families, with the widths that they may have. why: by family (its first group's class), what keeps it as
    it is although it could go.
    """

    def __init__(
        self,
        graph: Graph,
        algebra: Algebra,
        costs: Costs,
        found: Sequence[Family],
        why: Mapping[int, str] | None = None,
    ) -> None:
        self._axes = algebra.axes
        self._kept: dict[Key, Array] = {}
        rows = _rows(algebra)
        self._row = np.full(1 + max((int(c.max()) for c in algebra.axes.values()), default=-1), len(rows))
        for i, groups in enumerate(rows):
            self._row[[group.index for group in groups]] = i
        slices = {key: self._by_row(classes, len(rows)) for key, classes in algebra.axes.items()}
        width = _narrowest([slices[key] for key in costs.keys], len(rows))
        least = width.copy()
        for family in found:
            row = self._row[family.groups[0].index]
            width[row], least[row] = family.width(len(family.groups)), family.width(family.least)
        saved = {name: _alone(costs.terms(name), slices, algebra, len(rows)) for name in ("params", "macs")}
        tensors = _tensors(graph, slices, len(rows))
        reasons = {int(self._row[index]): reason for index, reason in (why or {}).items()}
        self._entries = [
            Entry(
                sites=groups[0].sites,
                groups=len(groups),
                width=int(width[i]),
                left=int(width[i]),
                least=int(least[i]),
                tensors=tuple(tensors[i]),
                params=int(saved["params"][i]),
                macs=int(saved["macs"][i]),
                state="frozen" if groups[0].reason else "kept",
                why=str(groups[0].reason) or reasons.get(i, ""),
                remedy=groups[0].remedy,
            )
            for i, groups in enumerate(rows)
        ]

    def lose(self, algebra: Algebra, groups: Iterable[Group]) -> None:
        """Notes groups that were removed; `algebra` is the analysis of the graph as it was just before."""
        for name, axes in algebra.removed(groups).items():
            for axis, gone in axes.items():
                if (name, axis) in self._axes:
                    now = self._kept.get((name, axis), np.arange(len(self._axes[name, axis])))
                    self._kept[name, axis] = np.delete(now, gone)

    def entries(self) -> list[Entry]:
        """Those that can go before those that cannot, each by the MACs that stand on them."""
        gone = np.zeros(len(self._row), dtype=bool)
        for key, kept in self._kept.items():
            gone[np.delete(self._axes[key], kept)] = True
        lost = self._by_row(np.flatnonzero(gone), len(self._entries))
        entries = [
            replace(e, left=e.width - e.width // e.groups * int(n), state="pruned") if n else e
            for e, n in zip(self._entries, lost, strict=True)
        ]
        return sorted(entries, key=lambda e: (e.state == "frozen", -e.macs, e.sites))

    def _by_row(self, classes: Array, rows: int) -> Array:
        """How many of these classes each row has."""
        return np.bincount(self._row[classes], minlength=rows + 1)[:rows]


def _rows(algebra: Algebra) -> list[list[Group]]:
    """Groups by the axes on which they stand and the reason that freezes them."""
    mark = np.zeros(1 + max((int(c.max()) for c in algebra.axes.values()), default=-1), dtype=np.uint64)
    random = np.random.default_rng(0)
    for classes in algebra.axes.values():
        mark[np.unique(classes)] += random.integers(1, 2**63, dtype=np.uint64)
    found: dict[tuple[int, str], list[Group]] = {}
    for group in algebra.groups:
        found.setdefault((int(mark[group.index]), group.reason), []).append(group)
    return list(found.values())


def _narrowest(slices: Sequence[Array], rows: int) -> Array:
    """How many slices each row has of the axis of which it has the fewest."""
    least = np.full(rows, np.iinfo(np.int64).max)
    for counts in slices:
        least = np.where(counts > 0, np.minimum(least, counts), least)
    return least


def _alone(
    terms: Sequence[Term], slices: Mapping[Key, Array], algebra: Algebra, rows: int
) -> NDArray[np.float64]:
    """What goes when all of one row goes and everything else stays."""
    saved = np.zeros(rows)
    for term in terms:
        kept = np.ones(rows)
        for key in term.axes:
            kept *= 1 - slices[key] / len(algebra.axes[key])
        saved += term.base * (1 - kept)
    return np.rint(saved)


def _tensors(graph: Graph, slices: Mapping[Key, Array], rows: int) -> list[list[str]]:
    """Names of the parameters and constants that each row runs through."""
    names = {node.name: str(node.target) for node in graph.nodes if node.op == "get_attr"}
    found: list[list[str]] = [[] for _ in range(rows)]
    for (node, _), counts in slices.items():
        if node in names:
            for row in np.flatnonzero(counts).tolist():
                if names[node] not in found[row]:
                    found[row].append(names[node])
    return found
