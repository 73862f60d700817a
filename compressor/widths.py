"""How wide every family of channels should be under a budget: what each removal costs, what it saves, what it may be.

Groups that stand on the same axes form a family, which loses its least important groups first. What removing them
saves depends on what the layers around have kept: a convolution costs outputs times inputs. So costs are products of
kept widths, evaluated anew for every candidate.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .channels import Algebra, Group, Key, Term
from .elimination import Elimination

MINIMUM = 4  # channels that a layer keeps where the user does not say
ROUNDING = 1e-9  # of a share, after thousands of subtractions
Step = tuple["Family", int, dict[Key, int]]  # whose, how many groups were left before it, slices that it took


@dataclass
class Family:
    """Groups that stand on the same axes, least important first, and how many of them are left.

    importance: of each group; their sum is what the whole family weighs against others. slices: how many slices of
    each axis a group has. multiple: widths that are allowed; minimum: the smallest, in slices of the narrowest axis.
    full: how many groups the family had before anything was pruned, where that was more than now. curve: what the
    model loses with the first k of them [n + 1], where that is known. stays: why
    none of them should go; empty where they may.
    """

    groups: list[Group]
    importance: NDArray[np.float64]
    slices: dict[Key, NDArray[np.int64]]
    multiple: int = 1
    minimum: int = 1
    full: int = 0
    curve: NDArray[np.float64] | None = None
    stays: str = ""
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.groups)
        self.full = max(self.full, self.left)
        self.unit = min((int(counts.min()) for counts in self.slices.values()), default=1)
        self._sums = np.concatenate([[0.0], np.cumsum(self.importance)])

    @property
    def removed(self) -> list[Group]:
        return self.groups[: len(self.groups) - self.left]

    @property
    def axes(self) -> tuple[Key, ...]:
        """Where it stands, which no removal of channels changes."""
        return tuple(sorted(self.slices))

    @property
    def step(self) -> int:
        """How many groups go at once: a family of two multiples or more keeps a multiple of slices."""
        aligned = self.width(self.full) >= 2 * self.multiple
        return self.multiple // math.gcd(self.unit, self.multiple) if aligned else 1

    @property
    def least(self) -> int:
        """The smallest allowed number of groups; all of them where none can go."""
        enough = max(1, -(-self.minimum // self.unit))
        return min(-(-enough // self.step) * self.step, len(self.groups))

    def width(self, left: int) -> int:
        return left * self.unit

    def narrower(self, below: int) -> int | None:
        """The largest allowed number of groups under `below`; None when the minimum is reached."""
        left = (below - 1) // self.step * self.step
        return left if left >= self.least else None

    def cost(self, left: int) -> float:
        """Importance lost on the way from what is left now to `left`.

        That is the difference on the curve. Without one, with R the importance that remains of S, S log(R now / R
        then): the first groups cost their own importance, and a family that is nearly gone is never the cheapest.
        """
        if self.curve is not None:
            return float(self.curve[len(self.groups) - left] - self.curve[len(self.groups) - self.left])
        total = float(self._sums[-1])
        now, then = (total - float(self._sums[len(self.groups) - n]) for n in (self.left, left))
        if total <= 0:
            return 0.0
        floor = 1e-12 * total
        return total * math.log(max(now, floor) / max(then, floor))

    def gone(self, left: int) -> dict[Key, int]:
        """Slices of every axis that go on the way to `left`."""
        span = slice(len(self.groups) - self.left, len(self.groups) - left)
        return {key: int(counts[span].sum()) for key, counts in self.slices.items()}


class Costs:
    """Totals of named cost terms, as widths shrink."""

    def __init__(self, algebra: Algebra, terms: Mapping[str, Sequence[Term]]) -> None:
        self._terms = [(name, term) for name, some in terms.items() for term in some]
        self._of: dict[Key, list[int]] = {}
        for i, (_, term) in enumerate(self._terms):
            for key in set(term.axes):
                self._of.setdefault(key, []).append(i)
        self._size = {key: len(algebra.axes[key]) for key in self._of}
        self._left = dict(self._size)
        self.before = {name: sum(term.base for term in some) for name, some in terms.items()}
        self.now: dict[str, float] = dict(self.before)

    def fresh(self) -> Costs:
        """The same costs with nothing removed."""
        twin = copy.copy(self)
        twin._left, twin.now = dict(self._size), dict(self.before)
        return twin

    @property
    def keys(self) -> set[Key]:
        return set(self._of)

    def terms(self, name: str) -> list[Term]:
        return [term for kind, term in self._terms if kind == name]

    def share(self, name: str) -> float:
        return self.now[name] / self.before[name] if self.before[name] else 1.0

    def saved(self, gone: Mapping[Key, int]) -> dict[str, float]:
        """What would be saved if so many more slices of these axes went."""
        saved = dict.fromkeys(self.before, 0.0)
        for i in {i for key in gone for i in self._of.get(key, ())}:
            name, term = self._terms[i]
            saved[name] += self._value(term, {}) - self._value(term, gone)
        return saved

    def apply(self, gone: Mapping[Key, int]) -> None:
        for name, saved in self.saved(gone).items():
            self.now[name] -= saved
        for key, count in gone.items():
            self._left[key] -= count

    def _value(self, term: Term, gone: Mapping[Key, int]) -> float:
        value = float(term.base)
        for key in term.axes:
            value *= (self._left[key] - gone.get(key, 0)) / self._size[key]
        return value


def families(
    algebra: Algebra,
    costs: Costs,
    importance: NDArray[np.float64],
    multiple: int,
    minimum: int,
    full: Mapping[tuple[Key, ...], int] = MappingProxyType({}),
    eliminations: Mapping[int, Elimination] = MappingProxyType({}),
) -> list[Family]:
    """The families of an algebra, with their groups in order of importance (by class), or as they were eliminated.

    full: by `Family.axes`, how many groups each had in the model as it came, where part of them has gone since.
    eliminations: by position in `algebra.families`.
    """
    owner, place = np.full(len(importance), -1), np.zeros(len(importance), dtype=np.int64)
    ordered = [
        [groups[k] for k in eliminations[i].order]
        if i in eliminations
        else sorted(groups, key=lambda g: (importance[g.index], g.index))
        for i, groups in enumerate(algebra.families)
    ]
    for i, groups in enumerate(ordered):
        indices = [g.index for g in groups]
        owner[indices], place[indices] = i, np.arange(len(indices))
    slices: list[dict[Key, NDArray[np.int64]]] = [{} for _ in ordered]
    for key in sorted(costs.keys):
        classes, counts = np.unique(algebra.axes[key], return_counts=True)
        able = owner[classes] >= 0
        classes, counts = classes[able], counts[able]
        for i in np.unique(owner[classes]).tolist():
            mine = owner[classes] == i
            found = slices[i][key] = np.zeros(len(ordered[i]), dtype=np.int64)
            found[place[classes[mine]]] = counts[mine]
    return [
        Family(
            groups, importance[[g.index for g in groups]], found, multiple, minimum,
            full.get(tuple(sorted(found)), 0), eliminations[i].costs if i in eliminations else None,
        )
        for i, (groups, found) in enumerate(zip(ordered, slices, strict=True))
    ]  # fmt: skip


def least_shares(found: Sequence[Family], costs: Costs) -> dict[str, float]:
    """What is left of every cost when each of these families, still whole, is as narrow as it may be."""
    gone: Counter[Key] = Counter()
    for family in found:
        gone.update(family.gone(family.least))
    saved = costs.saved(gone)
    return {
        name: (costs.now[name] - saved[name]) / before if before else 1.0
        for name, before in costs.before.items()
    }


def shrink_globally(found: Sequence[Family], costs: Costs, budget: Mapping[str, float]) -> None:
    """Narrows families, the cheapest importance per saving first, until every cost is within its share of before.

    Lazy greedy: a candidate only gets worse while others shrink, so the head of the heap is looked at again and
    taken if it still is the best. Stops where every family is at its minimum.
    """
    heap: list[tuple[float, int]] = [(0.0, i) for i in range(len(found))]
    steps: list[Step] = []
    while heap and not _within(costs, budget):
        _, i = heapq.heappop(heap)
        left = found[i].narrower(found[i].left)
        if left is None:
            continue
        saved = costs.saved(found[i].gone(left))
        useful = sum(saved[n] / costs.before[n] for n, share in budget.items() if costs.share(n) > share)
        if useful <= 0:
            continue
        price = found[i].cost(left) / useful
        if not heap or price <= heap[0][0]:
            steps.append(_step(found[i], left, costs))
        heapq.heappush(heap, (price, i))
    _give_back(steps, costs, budget)


def shrink_locally(found: Sequence[Family], costs: Costs, budget: Mapping[str, float]) -> None:
    """Narrows every family by the same share, percent by percent, until every cost is within its share of before."""
    steps: list[Step] = []
    for percent in range(1, 101):
        for family in found:
            target = len(family.groups) * (100 - percent) / 100
            left = family.narrower(family.left)
            while left is not None and left >= target and not _within(costs, budget):
                steps.append(_step(family, left, costs))
                left = family.narrower(left)
    _give_back(steps, costs, budget)


def _step(family: Family, left: int, costs: Costs) -> Step:
    before, gone = family.left, family.gone(left)
    costs.apply(gone)
    family.left = left
    return family, before, gone


def _give_back(steps: Sequence[Step], costs: Costs, budget: Mapping[str, float]) -> None:
    """Steps are as large as a multiple of channels: those that the budget has room for are undone, latest first."""
    final: set[int] = set()  # families with a later step that stands
    for family, before, gone in reversed(steps if _within(costs, budget) else ()):
        costs.apply({key: -count for key, count in gone.items()})
        if id(family) not in final and _within(costs, budget):
            family.left = before
        else:
            costs.apply(gone)
            final.add(id(family))


def _within(costs: Costs, budget: Mapping[str, float]) -> bool:
    return all(costs.share(name) <= share + ROUNDING for name, share in budget.items())
