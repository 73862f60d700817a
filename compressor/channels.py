"""Channel algebra: which channels of a graph can be removed together, where they stand, and what they cost.

`analyse` gives every slice of every tensor axis an atom, lets `ties.py` tie and freeze them operator by operator, and
collects the classes of tied atoms. A `Group` is one class: the smallest thing that can be removed. Nothing here edits
a graph: `surgery.remove` does, and `oracle.masked` says what its result must compute.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from .atoms import Array, Atoms, Carrier, components
from .errors import ContractError
from .ir import Graph
from .names import site
from .ops import (
    CONTRACTIONS,
    arguments,
    contractions,
    einsum_steps,
    is_constant,
    kind,
    node_macs,
    shape,
    sizes,
)
from .ties import einsum_labels, read

ROUNDS = 3  # readings of a graph while carriers of reshapes are given up for the next
Key = tuple[str, int]  # (node, axis)


@dataclass(frozen=True)
class Slice:
    """Indices of one axis of one tensor: of a parameter (`get_attr` node) or of a value."""

    tensor: str
    axis: int
    indices: Array


@dataclass(frozen=True)
class Term:
    """A cost that is a product: `base` for the whole graph, in proportion to what is kept of every axis."""

    base: int
    axes: tuple[Key, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """One class of tied slices. It is removed whole or not at all.

    sites: module paths of the operators that compute it. parameters, macs: what removing it alone saves.
    reason: why it cannot be removed, with the operator and module that need it; empty for a group that can.
    remedy: what would free it, where something would.
    """

    index: int
    sites: tuple[str, ...]
    parameters: int
    macs: int
    reason: str
    algebra: Algebra = field(repr=False)

    @property
    def remedy(self) -> str:
        return getattr(self.reason, "remedy", "")

    @property
    def slices(self) -> list[Slice]:
        """Everything that goes when this group goes, in the order of the graph."""
        return self.algebra.slices([self])


class Algebra:
    """The classes of one graph, as it was when it was read.

    axes[(node, axis)]: the class of every slice; axes that cannot change are absent. groups: the classes that some
    convolution, linear or matrix product computes or reads. weights: names of the constants that these multiply by; of
    a head, which is one slice of a value, they have as many slices as it is wide. families: groups that can be removed,
    put together where they stand on the same axes, so that every width is a sum of whole families.
    """

    def __init__(
        self, graph: Graph, axes: dict[Key, Array], reasons: Callable[[int], str], count: int
    ) -> None:
        """reasons: why a class stays, by its number; count: how many classes there are."""
        self.axes = axes
        self.weights = {n.name for c in contractions(graph) for n, _ in contracted(c) if is_constant(n)}
        self.macs_terms = list(_macs_terms(graph, axes))
        self.parameter_terms = list(_parameter_terms(graph, axes))
        macs = _alone(self.macs_terms, axes, count)
        parameters = _alone(self.parameter_terms, axes, count)
        used = np.zeros(count, dtype=bool)
        for key in {key for term in self.macs_terms for key in term.axes}:
            used[axes[key]] = True
        sites = _sites(graph, axes)
        self.groups = tuple(
            Group(c, sites.get(c, ()), int(parameters[c]), int(macs[c]), reasons(c), self)
            for c in np.flatnonzero(used).tolist()
        )
        self._count = count

    def removed(self, groups: Iterable[Group]) -> dict[str, dict[int, Array]]:
        """node -> axis -> indices that go with these groups, which must be its own."""
        groups = list(groups)
        if any(group.algebra is not self for group in groups):
            raise ContractError("groups of several analyses cannot be removed together")
        gone = np.zeros(self._count, dtype=bool)
        gone[[g.index for g in groups]] = True
        found: dict[str, dict[int, Array]] = {}
        for (name, axis), classes in self.axes.items():
            indices = np.flatnonzero(gone[classes])
            if len(indices):
                found.setdefault(name, {})[axis] = indices
        return found

    def slices(self, groups: Iterable[Group]) -> list[Slice]:
        return [
            Slice(name, axis, indices)
            for name, axes in self.removed(groups).items()
            for axis, indices in axes.items()
        ]

    @cached_property
    def families(self) -> tuple[tuple[Group, ...], ...]:
        mark = np.zeros(self._count, dtype=np.uint64)
        random = np.random.default_rng(0)
        for classes in self.axes.values():
            mark[np.unique(classes)] += random.integers(1, 2**63, dtype=np.uint64)
        found: dict[int, list[Group]] = {}
        for group in self.groups:
            if not group.reason:
                found.setdefault(int(mark[group.index]), []).append(group)
        return tuple(tuple(groups) for groups in found.values())

    def frozen(self) -> list[tuple[str, str, int]]:
        """(site, reason, how many groups) of what cannot be removed, the most first."""
        counts = Counter((g.sites[0] if g.sites else "", g.reason) for g in self.groups if g.reason)
        return [(where, reason, number) for (where, reason), number in counts.most_common()]


def carrier_of(graph: Graph, *, heads: bool) -> Carrier:
    """Which axis carries where a reshape makes several of one: the heads of an attention, or the channels of each.

    heads: whether whole heads should go. Without attention a reshape is a channel shuffle, whose halves are no heads.
    """
    weights = [node for node in graph.nodes if kind(node) == "softmax"]
    found = any(kind(node) == "attention" for node in graph.nodes)
    while weights and not found:  # weights that a softmax made multiply values
        readers = [user for node in weights for user in node.users]
        found = any(kind(user) in CONTRACTIONS for user in readers)
        weights = [user for user in readers if kind(user) in ("identity", "cast")]
    return "head" if heads and found else "head_dim"


def analyse(graph: Graph, carrier: Carrier = "head_dim", norms: bool = False) -> Algebra:
    """The channel algebra of a graph.

    carrier: which axis carries the atoms where a reshape makes several of one (`atoms.py`). A carrier that cannot be
    removed is given up for the next, and the graph is read again. norms: whether channels may go from under a
    normalisation (layer, RMS and group norm, a mean or a norm over channels): its statistics are then taken over
    those that are left, which is another promise than that of a mask (`oracle.py`).
    """
    given_up: dict[Key, int] = {}
    for _ in range(ROUNDS):
        atoms = Atoms(carrier, given_up, norms)
        read(graph, atoms)
        labels = components(atoms.count, atoms.ties)
        first = _first_reason(labels, atoms.frozen)
        stuck = [
            choice.key
            for choice in atoms.choices
            if given_up.get(choice.key, 0) + 1 < choice.candidates
            and (first[labels[choice.atoms]] < len(atoms.frozen)).all()
        ]
        if not stuck:
            break
        given_up |= {key: given_up.get(key, 0) + 1 for key in stuck}
    axes = {
        (node.name, i): labels[axis]
        for node, found in atoms.axes.items()
        for i, axis in enumerate(found)
        if not isinstance(axis, str)
    }
    classes, inverse = np.unique(labels, return_inverse=True)
    stays = first[classes]

    def reason(c: int) -> str:
        return "" if stays[c] == len(atoms.frozen) else atoms.frozen[stays[c]][1]

    return Algebra(graph, {key: inverse[labels_of] for key, labels_of in axes.items()}, reason, len(classes))


def _first_reason(labels: Array, frozen: Sequence[tuple[Array, str]]) -> Array:
    """Index of the first freeze that hit each class, len(frozen) where none did; by label."""
    first = np.full(len(labels), len(frozen), dtype=np.int64)
    for i, (atoms, _) in reversed([*enumerate(frozen)]):
        first[labels[atoms]] = i
    return first


# -------------------------------------------------------------------- costs and places


def _macs_terms(graph: Graph, axes: Mapping[Key, Array]) -> Iterator[Term]:
    """Every contraction as a product over axes: all of the result's, and the one that is summed over."""
    for node in graph.nodes:
        total = node_macs(node)
        if not total:
            continue
        if kind(node) not in CONTRACTIONS:
            yield _term(axes, total, [])
            continue
        a, result = arguments(node), [(node.name, i) for i in range(len(shape(node)))]
        steps = list(einsum_steps(node)) if kind(node) == "einsum" else []
        if steps:
            for step in steps:
                size = math.prod(sizes(operand)[axis] for operand, axis in step.values())
                yield _term(axes, size, [(operand.name, axis) for operand, axis in step.values()])
        elif kind(node) == "attention":  # scores over the width of queries, then sums over that of values
            queries, values = (sizes(a[name])[-1] for name in ("query", "value"))
            scores = total * queries // (queries + values)
            yield _term(axes, scores, [*result[:-1], (a["query"].name, len(result) - 1)])
            yield _term(axes, total - scores, result)
        elif kind(node) == "conv_transpose":
            inputs = [(a["input"].name, i) for i in range(len(result))]
            yield _term(axes, total, [*inputs, (a["weight"].name, 1)])
        elif kind(node) in ("conv", "linear"):
            yield _term(axes, total, [*result, (a["weight"].name, 1)])
        else:
            summed = [(operand.name, axis) for (operand, axis), *_ in paired(node)]
            yield _term(axes, total, [*result, *summed])


def _parameter_terms(graph: Graph, axes: Mapping[Key, Array]) -> Iterator[Term]:
    for node in graph.nodes:
        if is_constant(node) and node.users:
            yield _term(axes, graph.tensor(node).numel(), [(node.name, i) for i in range(len(shape(node)))])


def _term(axes: Mapping[Key, Array], base: int, keys: Iterable[Key]) -> Term:
    return Term(base, tuple(key for key in keys if key in axes))


def contracted(node: Node) -> list[tuple[Node, int]]:
    """(operand, axis) of every axis that a contraction sums over."""
    return [one for pair in paired(node) for one in pair]


def paired(node: Node) -> list[list[tuple[Node, int]]]:
    """The same, those that are summed over together side by side. An einsum that `ties.py` does not follow has none."""
    a, which = arguments(node), kind(node)
    if which in ("conv", "conv_transpose", "linear"):
        x, w = a["input"], a["weight"]
        return [
            [(x, len(shape(x)) - 1 if which == "linear" else 1), (w, 0 if which == "conv_transpose" else 1)]
        ]
    if which == "attention":
        return [[(a[name], len(shape(a[name])) - 1) for name in ("query", "key")]]
    if which == "einsum":
        labels = einsum_labels(node) or []
        operands: list[Node] = list(node.args[1]) if labels else []  # type: ignore[arg-type]
        found: dict[str, list[tuple[Node, int]]] = {}
        for operand, names in zip(operands, labels, strict=False):
            for axis, name in enumerate(names):
                found.setdefault(name, []).append((operand, axis))
        return [pair for name, pair in found.items() if name not in labels[-1]]
    left, right = node.args[which == "addmm" :][:2]
    return [[(left, len(shape(left)) - 1), (right, len(shape(right)) - 2)]]  # type: ignore[arg-type, list-item]


def _alone(terms: Sequence[Term], axes: Mapping[Key, Array], count: int) -> NDArray[np.float64]:
    """What each class saves when it alone is removed."""
    saved = np.zeros(count)
    for term in terms:
        if not term.axes:
            continue
        there = [np.unique(axes[key], return_counts=True) for key in term.axes]
        classes = np.unique(np.concatenate([some for some, _ in there]))
        kept = np.ones(len(classes))
        for (some, slices), key in zip(there, term.axes, strict=True):
            kept[np.searchsorted(classes, some)] *= 1 - slices / len(axes[key])
        saved[classes] += term.base * (1 - kept)
    return np.rint(saved)


def _sites(graph: Graph, axes: Mapping[Key, Array]) -> dict[int, tuple[str, ...]]:
    """Module paths of the contractions that compute each class; of those that read it where none does."""
    made: dict[int, dict[str, None]] = {}
    read_by: dict[int, dict[str, None]] = {}
    for node in contractions(graph):
        operands = {(operand.name, axis) for operand, axis in contracted(node)}
        results = {(node.name, axis) for axis in range(len(shape(node)))}
        where = site(node)
        for keys, places in ((results, made), (operands, read_by)):
            for key in sorted(keys & axes.keys()):
                for c in np.unique(axes[key]).tolist():
                    places.setdefault(c, {})[where] = None
    return {c: tuple(places) for c, places in (read_by | made).items()}
