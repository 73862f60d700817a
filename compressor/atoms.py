"""Atoms: the smallest things that pruning can remove, and what is known about them while a graph is read.

Every axis of every tensor is an `Axis`: an integer array that holds the atom of each slice, or a sentence that says
why none of its slices can go. Atoms that an operator makes inseparable are *tied*, those that must stay are *frozen*.
Where a reshape makes several axes of one, one of them carries the atoms and the slices along the others are tied
into it: `carrier` says which is tried first, the last (`head_dim`) or the one before it (`head`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

import numpy as np
import sympy
import torch
from numpy.typing import NDArray
from torch.fx import Node

from .names import operator_name, site
from .ops import is_static, shape

Array = NDArray[np.int64]
Axis = Union[Array, str]  # noqa: UP007  an alias is evaluated, and Python 3.10 cannot write it with a bar
Carrier = Literal["head", "head_dim"]


class Reason(str):
    """Why slices stay: a sentence with the operator and module that need them; `remedy` says what would free them."""

    remedy: str

    def __new__(cls, text: str, remedy: str = "") -> Reason:
        reason = super().__new__(cls, text)
        reason.remedy = remedy
        return reason


ONE = Reason("it has one slice only")
DYNAMIC = Reason("its size is dynamic", "a fixed size: --input NAME:DTYPE[SIZES]")
NORMS = "prune(norms=true) includes it"
MERGE = "merge before prune makes one weight of what computes it"


@dataclass(frozen=True)
class Choice:
    """Where one axis became several: the atoms of the one that carries, and how many could have carried."""

    key: tuple[str, int]
    atoms: Array
    candidates: int


class Atoms:
    """Everything that the rules have said so far.

    axes: of every tensor. parts: of every value that is a list of tensors. given_up[(node, axis)]: how many carriers
    of that reshape turned out to be frozen in an earlier reading. norms: channels may go from under a normalisation,
    which then takes its statistics over those that are left.
    """

    def __init__(
        self,
        carrier: Carrier = "head_dim",
        given_up: Mapping[tuple[str, int], int] | None = None,
        norms: bool = False,
    ) -> None:
        self.carrier, self.given_up, self.norms = carrier, dict(given_up or {}), norms
        self.axes: dict[Node, list[Axis]] = {}
        self.parts: dict[Node, list[list[Axis]]] = {}
        self.count = 0
        self.ties: list[tuple[Array, Array]] = []
        self.frozen: list[tuple[Array, str]] = []
        self.settled: set[Node] = (
            set()
        )  # values that no input reaches: weights, and what is computed from them alone
        self.choices: list[Choice] = []

    # ---------------------------------------------------------------- what rules say

    def fresh(self, size: Any) -> Axis:
        """New atoms for an axis that starts here."""
        if not is_static(size):
            return DYNAMIC
        return self.new(size) if size > 1 else ONE

    def new(self, size: int) -> Array:
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def freeze(self, axes: Iterable[Axis], reason: str) -> str:
        """No slice of these axes can go; of several reasons the one that came first is shown."""
        self.frozen += [(axis, reason) for axis in axes if not isinstance(axis, str)]
        return reason

    def tie(self, first: Axis, second: Axis) -> Axis:
        """Slice i of both lives and dies as one."""
        if isinstance(first, str):
            self.freeze([second], first)
            return first
        if isinstance(second, str):
            return self.freeze([first], second)
        if len(first) != len(second):
            return self.freeze([first, second], f"{len(first)} slices meet {len(second)}")
        if first is not second:
            self.ties.append((first, second))
        return first

    def rows(self, table: Array) -> Array:
        """Ties all entries of each row of a table; its first column."""
        head = np.ascontiguousarray(table[:, 0])
        self.tie(np.repeat(head, table.shape[1]), np.ascontiguousarray(table).reshape(-1))
        return head

    def fold(self, axis: Axis, groups: int) -> Axis:
        """Ties position j of every group of an axis; the positions of the first group stand for all."""
        return axis if isinstance(axis, str) else self.rows(axis.reshape(groups, -1).T)

    def broadcast(self, operands: Sequence[Node], rank: int, skip: int = 0) -> list[Axis]:
        """Axes of a result that is computed position by position, but for its last `skip` axes.

        Operands are aligned at their last axes; one of size 1 is repeated and says nothing.
        """
        result: list[Axis] = []
        for back in range(rank, skip, -1):
            wide = [
                self.axes[n][-back] for n in operands if len(shape(n)) >= back and not is_one(shape(n)[-back])
            ]
            result.append(functools.reduce(self.tie, wide) if wide else ONE)
        return result

    def join(self, pieces: Sequence[tuple[Axis, Any]]) -> Axis:
        """Pieces (axis, size) end to end; one that cannot change gets frozen atoms, so its neighbours still can."""
        if all(isinstance(axis, str) for axis, _ in pieces):
            return pieces[0][0]
        if not all(is_static(size) for _, size in pieces):
            return self.freeze([axis for axis, _ in pieces], DYNAMIC)
        arrays: list[Array] = []
        for axis, size in pieces:
            array = self.new(size) if isinstance(axis, str) else axis
            if isinstance(axis, str):
                self.freeze([array], axis)
            arrays.append(array)
        return np.concatenate(arrays)

    def remedy(self, node: Node, otherwise: str) -> str:
        """What frees channels that an operator needs whole: a weight that is computed from weights can be folded."""
        return MERGE if node in self.settled else otherwise

    # ---------------------------------------------------------------- reshapes

    def regroup(self, node: Node, source: Node) -> list[Axis]:
        """Axes of a value with the same elements in the same order as `source`, in another shape."""
        axes, after = self.axes[source], shape(node)
        plan = common_factors(shape(source), after)
        if plan is None:
            return [self.freeze(axes, why(node, "the two shapes cut it differently"))] * len(after)
        static = {
            f: is_static(size) for size, factors in zip(after, plan.result, strict=True) for f in factors
        }
        pieces: list[Axis] = [ONE] * len(plan.extents)
        for position, (axis, factors) in enumerate(zip(axes, plan.source, strict=True)):
            able = [i for i, f in enumerate(factors) if static[f]]
            shares = self._split((node, position), axis, [plan.extents[f] for f in factors], able)
            for factor, share in zip(factors, shares, strict=True):
                pieces[factor] = share
        return [
            self._merge(node, [pieces[f] for f in factors], [plan.extents[f] for f in factors])
            for factors in plan.result
        ]

    def _split(self, place: tuple[Node, int], axis: Axis, extents: list[Any], able: list[int]) -> list[Axis]:
        """One axis as several: the carrier, one of `able`, gets the atoms; slices along the others are tied into it."""
        if len(extents) == 1 or isinstance(axis, str):
            return [axis] * len(extents)
        node, position = place
        if not able:
            return [self.freeze([axis], why(node, DYNAMIC))] * len(extents)
        cube = axis.reshape(extents)
        tables = {i: np.moveaxis(cube, i, 0).reshape(extents[i], -1) for i in able}
        # A carrier whose slices are already whole undoes an earlier merge.
        carrier = next((i for i in able if (tables[i] == tables[i][:, :1]).all()), None)
        if carrier is None:
            candidates = self._preferred(able)
            key = (node.name, position)
            carrier = candidates[min(self.given_up.get(key, 0), len(candidates) - 1)]
            self.choices.append(Choice(key, tables[carrier][:, 0], len(candidates)))
        shares: list[Axis] = [why(node, "its slices go with those of another axis")] * len(extents)
        shares[carrier] = self.rows(tables[carrier])
        return shares

    def _merge(self, node: Node, pieces: list[Axis], extents: list[Any]) -> Axis:
        """Several axes as one: each slice takes the atom of the one axis that has any."""
        if len(pieces) <= 1:
            return pieces[0] if pieces else ONE
        if not all(is_static(e) for e in extents):
            return self.freeze(pieces, why(node, "it is merged with an axis of dynamic size"))
        live = [i for i, piece in enumerate(pieces) if not isinstance(piece, str)]
        if not live:
            return pieces[0]
        carrier = self._preferred(live)[0]
        self.freeze(
            [pieces[i] for i in live if i != carrier], why(node, "it is merged with another prunable axis")
        )
        frame = [extents[i] if i == carrier else 1 for i in range(len(extents))]
        return np.broadcast_to(np.reshape(pieces[carrier], frame), extents).reshape(-1)

    def _preferred(self, able: list[int]) -> list[int]:
        """Last first, or the one before it first."""
        order = able[::-1]
        return order if self.carrier == "head_dim" else order[1:] + order[:1]


def components(count: int, ties: Sequence[tuple[Array, Array]]) -> Array:
    """The smallest of `count` atoms that each is tied to: union-find on whole arrays, hooking and pointer jumping."""
    labels = np.arange(count, dtype=np.int64)
    if not ties:
        return labels
    left, right = (np.concatenate(side) for side in zip(*ties, strict=True))
    while True:
        a, b = labels[left], labels[right]
        open_ = a != b
        if not open_.any():
            return labels
        left, right, a, b = left[open_], right[open_], a[open_], b[open_]
        np.minimum.at(labels, np.maximum(a, b), np.minimum(a, b))
        while (labels != labels[labels]).any():
            labels = labels[labels]


def why(node: Node, text: str, remedy: str = "") -> Reason:
    """`it is reduced (mean.dim at head.pool)`"""
    name = operator_name(node).removeprefix("aten.").removesuffix(".default")
    return Reason(f"{text} ({name} at {site(node)})", remedy or getattr(text, "remedy", ""))


def is_one(size: Any) -> bool:
    return is_static(size) and size == 1


# -------------------------------------------------------------------- factors of shapes


@dataclass(frozen=True)
class Factors:
    """The finest common cut of two shapes with equal products: its sizes, and which of them each axis consists of."""

    extents: list[Any]
    source: list[list[int]]
    result: list[list[int]]


def common_factors(source: Sequence[Any], result: Sequence[Any]) -> Factors | None:
    """[6, 4] -> [3, 8] has the factors 3, 2, 4; [s, 4, 6] -> [4*s, 6] has s, 4, 6. None where there is no common cut.

    Sizes are ints or SymInts; axes of size 1 consist of no factor.
    """
    left, right = [_expression(s) for s in source], [_expression(s) for s in result]
    extents: list[Any] = []
    cuts: tuple[list[list[int]], list[list[int]]] = ([[] for _ in left], [[] for _ in right])
    i, j = len(left) - 1, len(right) - 1
    while i >= 0 or j >= 0:
        if i >= 0 and left[i] == 1:
            i -= 1
        elif j >= 0 and right[j] == 1:
            j -= 1
        elif i < 0 or j < 0:
            return None
        else:
            factor = _smaller(left[i], right[j])
            if factor is None:
                return None
            cuts[0][i].insert(0, len(extents))
            cuts[1][j].insert(0, len(extents))
            extents.append(factor)
            left[i], right[j] = _quotient(left[i], factor), _quotient(right[j], factor)
    return Factors(extents, *cuts)


def _smaller(a: Any, b: Any) -> Any:
    """The one of two sizes that divides the other, None if neither does."""
    if _quotient(a, b) is not None:
        return b
    return a if _quotient(b, a) is not None else None


def _quotient(a: Any, b: Any) -> Any:
    """a / b if that is a whole number for every value of the symbols, None otherwise."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return _symbolic_quotient(a, b)


@functools.lru_cache(maxsize=1 << 14)  # a graph asks for the same few over and over
def _symbolic_quotient(a: Any, b: Any) -> Any:
    ratio = sympy.cancel(sympy.sympify(a) / b)
    if ratio.is_Integer:
        return int(ratio)
    polynomial = bool(ratio.free_symbols) and ratio.is_polynomial()
    whole = polynomial and all(c.is_Integer for c in sympy.Poly(ratio, *ratio.free_symbols).coeffs())
    return ratio if whole else None


def _expression(size: Any) -> Any:
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_Integer else expression
    return size
