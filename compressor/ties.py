"""Which slices of which tensors live and die together: one rule a kind of operator.

Every axis of every tensor is an `Axis`: an integer array that holds the atom of each slice, or a sentence that says
why none of its slices can go. A rule reads the axes of its operands, ties atoms that its operator makes inseparable,
freezes those that it cannot do without, and answers the axes of its result. What it must guarantee:

    a kept slice of the result depends on kept slices of the operands alone, except through a contraction, where
    a removed slice adds nothing.

So a softmax, a mean or a layer norm over an axis freezes it, and whatever has no rule freezes all that it touches.
Where a reshape makes several axes of one, one of them carries the atoms and the slices along the others are tied
into it: `carrier` says which is tried first, the last (`head_dim`) or the one before it (`head`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from .factors import common_factors
from .ir import Graph, operator_name, site
from .ops import arguments, is_static, is_tensor, kind, shape

Array = NDArray[np.int64]
Axis = Array | str
Carrier = Literal["head", "head_dim"]

ONE = "it has one slice only"
DYNAMIC = "its size is dynamic"


@dataclass(frozen=True)
class Choice:
    """Where one axis became several: which of them carries the atoms, and which could instead."""

    key: tuple[str, int]
    atoms: Array
    alternatives: int


class Ties:
    """State of one analysis: the axes of every value so far, and everything that the rules said about atoms.

    given_up: how many carriers of a reshape, (node, axis), an earlier round found frozen.
    """

    def __init__(self, graph: Graph, carrier: Carrier, given_up: Mapping[tuple[str, int], int]) -> None:
        self.carrier, self.given_up = carrier, given_up
        self.axes: dict[Node, list[Axis]] = {}
        self.parts: dict[Node, list[list[Axis]]] = {}
        self.count = 0
        self.left: list[Array] = []
        self.right: list[Array] = []
        self.frozen: list[tuple[Array, str]] = []
        self.choices: list[Choice] = []
        names = dict(zip(graph.placeholders, (spec.name for spec in graph.inputs), strict=True))
        for node in graph.nodes:
            if node.op == "placeholder":
                self.axes[node] = [f"it is an axis of input {names[node]}"] * len(shape(node))
            elif node.op == "output":
                for name, result in zip(graph.outputs, graph.results, strict=True):
                    self.freeze(self.axes.get(result, ()), f"it reaches output {name}")
            else:
                self._visit(node)

    def _visit(self, node: Node) -> None:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            rule = RULES.get(kind(node), opaque)
            self.axes[node] = [self._fit(a, s) for a, s in zip(rule(self, node), value.shape, strict=True)]
        elif isinstance(value, (tuple, list)):
            several = PARTS.get(kind(node))
            one = RULES.get(kind(node), opaque)
            self.parts[node] = several(self, node) if several else [one(self, node)] * len(value)
        elif kind(node) != "size" or operator_name(node) == "aten.sym_numel.default":
            opaque(self, node)

    def _fit(self, axis: Axis, size: Any) -> Axis:
        if isinstance(axis, str):
            return axis
        if not is_static(size):
            return self.freeze([axis], DYNAMIC)
        return axis if size > 1 else self.freeze([axis], ONE)

    # ---------------------------------------------------------------- what rules say

    def fresh(self, size: Any) -> Axis:
        """New atoms for an axis that starts here."""
        if not is_static(size):
            return DYNAMIC
        if size <= 1:
            return ONE
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def freeze(self, axes: Iterable[Axis], reason: str) -> str:
        """No slice of these axes can go; the reason that is given first is the one that a user reads."""
        self.frozen += [(axis, reason) for axis in axes if not isinstance(axis, str)]
        return reason

    def tie(self, first: Axis, second: Axis) -> Axis:
        """Slice i of both lives and dies as one."""
        if isinstance(first, str):
            self.freeze([second], first)
            return first
        if isinstance(second, str):
            self.freeze([first], second)
            return second
        if len(first) != len(second):
            return self.freeze([first, second], f"{len(first)} slices meet {len(second)}")
        if first is not second:
            self.left.append(first)
            self.right.append(second)
        return first

    def fold(self, axis: Axis, groups: int) -> Axis:
        """Ties position j of every group of an axis; the positions of the first group stand for all."""
        if isinstance(axis, str):
            return axis
        return self._rows(axis.reshape(groups, -1).T)

    def _rows(self, rows: Array) -> Array:
        """Ties all entries of each row; the first entries."""
        head = np.ascontiguousarray(rows[:, 0])
        self.tie(np.repeat(head, rows.shape[1]), np.ascontiguousarray(rows).reshape(-1))
        return head

    def broadcast(self, node: Node, operands: Sequence[Node]) -> list[Axis]:
        """Axes of a result that is computed position by position; operands of size 1 are repeated."""
        result: list[Axis] = []
        for back in range(len(shape(node)), 0, -1):
            wide = [self.axes[n][-back] for n in operands if len(shape(n)) >= back and not _is_one(shape(n)[-back])]
            result.append(functools.reduce(self.tie, wide) if wide else ONE)
        return result

    # ---------------------------------------------------------------- reshapes

    def regroup(self, node: Node, source: Node) -> list[Axis]:
        """Axes of a value with the same elements in the same order as `source`, in another shape."""
        axes, before, after = self.axes[source], shape(source), shape(node)
        plan = common_factors(before, after)
        if plan is None:
            reason = self.freeze(axes, why(node, "the shapes have no common factors"))
            return [reason] * len(after)
        fits = [False] * len(plan.extents)
        for size, factors in zip(after, plan.result, strict=True):
            for factor in factors:
                fits[factor] = is_static(size)
        pieces: list[Axis] = [ONE] * len(plan.extents)
        for position, (axis, factors) in enumerate(zip(axes, plan.source, strict=True)):
            extents = [plan.extents[f] for f in factors]
            shares = self._split(node, position, axis, extents, [fits[f] for f in factors])
            for factor, share in zip(factors, shares, strict=True):
                pieces[factor] = share
        return [
            self._merge(node, [pieces[f] for f in factors], [plan.extents[f] for f in factors])
            for factors in plan.result
        ]

    def _split(self, node: Node, position: int, axis: Axis, extents: list[Any], fits: list[bool]) -> list[Axis]:
        """One axis as several: the carrier gets the atoms, slices along the others are tied into it."""
        if len(extents) == 1 or isinstance(axis, str):
            return [axis] * len(extents)
        cube = axis.reshape(extents)
        able = [i for i, fit in enumerate(fits) if fit]
        if not able:
            return [self.freeze([axis], why(node, DYNAMIC))] * len(extents)
        rows = {i: np.moveaxis(cube, i, 0).reshape(extents[i], -1) for i in able}
        carrier = next((i for i in able if (rows[i] == rows[i][:, :1]).all()), None)
        if carrier is None:
            order = self._preferred(able)
            key = (node.name, position)
            carrier = order[min(self.given_up.get(key, 0), len(order) - 1)]
            self.choices.append(Choice(key, rows[carrier][:, 0], len(order)))
        shares: list[Axis] = [why(node, "its slices go with those of another axis")] * len(extents)
        shares[carrier] = self._rows(rows[carrier])
        return shares

    def _merge(self, node: Node, pieces: list[Axis], extents: list[Any]) -> Axis:
        """Several axes as one: each slice takes the atom of the one axis that has any."""
        if len(pieces) <= 1:
            return pieces[0] if pieces else ONE
        live = [i for i, piece in enumerate(pieces) if not isinstance(piece, str)]
        if not all(is_static(e) for e in extents):
            return self.freeze(pieces, why(node, "it is merged with an axis of dynamic size"))
        if not live:
            return pieces[0]
        carrier = self._preferred(live)[0]
        self.freeze([pieces[i] for i in live if i != carrier], why(node, "it is merged with another prunable axis"))
        frame = [extents[i] if i == carrier else 1 for i in range(len(extents))]
        return np.broadcast_to(np.reshape(pieces[carrier], frame), extents).reshape(-1)

    def _preferred(self, able: list[int]) -> list[int]:
        """Last first, or the one before it first."""
        order = able[::-1]
        return order if self.carrier == "head_dim" else order[1:] + order[:1]


def why(node: Node, text: str) -> str:
    return f"{text} ({_operator(node)} at {site(node)})"


def _operator(node: Node) -> str:
    name = operator_name(node)
    return name.split(".")[1] if name.startswith("aten.") else name


def _is_one(size: Any) -> bool:
    return is_static(size) and size == 1


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def _rank(node: Node) -> int:
    return len(shape(node))


# -------------------------------------------------------------------- rules: contractions

Rule = Callable[[Ties, Node], list[Axis]]


def opaque(t: Ties, node: Node) -> list[Axis]:
    """Nothing is known: everything that it touches stays as it is."""
    reason = why(node, "no rule for this operator")
    for source in node.all_input_nodes:
        t.freeze(t.axes.get(source, ()), reason)
        for part in t.parts.get(source, ()):
            t.freeze(part, reason)
    value = node.meta["val"]
    return [reason] * (value.dim() if isinstance(value, Tensor) else 0)


def _conv(t: Ties, node: Node) -> list[Axis]:
    a = arguments(node)
    x, w, groups = t.axes[a["input"]], t.axes[a["weight"]], a["groups"]
    if len(x) != len(w):
        return opaque(t, node)
    space = t.freeze([*x[2:], *w[2:]], why(node, "it is a spatial axis"))
    channels = shape(a["input"])[1]
    if groups == 1:
        t.tie(x[1], w[1])
    elif groups == channels:  # depthwise: all results of a channel go with it
        t.tie(x[1], w[0] if isinstance(w[0], str) else t._rows(w[0].reshape(groups, -1)))
    else:
        t.tie(t.fold(x[1], groups), w[1])
        t.fold(w[0], groups)
    _bias(t, a, w[0])
    return [x[0], w[0], *[space] * (len(x) - 2)]


def _conv_transpose(t: Ties, node: Node) -> list[Axis]:
    a = arguments(node)
    x, w, groups = t.axes[a["input"]], t.axes[a["weight"]], a["groups"]
    if len(x) != len(w):
        return opaque(t, node)
    space = t.freeze([*x[2:], *w[2:]], why(node, "it is a spatial axis"))
    t.tie(x[1], w[0])
    out = w[1]
    if groups > 1 and groups == shape(a["input"])[1]:
        t.freeze([w[1]], why(node, "it is the multiplier of a depthwise convolution"))
        out = x[1] if isinstance(x[1], str) else np.repeat(x[1], shape(a["weight"])[1])
    elif groups > 1:
        t.fold(x[1], groups)
        out = w[1] if isinstance(w[1], str) else np.tile(w[1], groups)
    _bias(t, a, out)
    return [x[0], out, *[space] * (len(x) - 2)]


def _linear(t: Ties, node: Node) -> list[Axis]:
    a = arguments(node)
    x, w = t.axes[a["input"]], t.axes[a["weight"]]
    if len(w) != 2:
        return opaque(t, node)
    t.tie(x[-1], w[1])
    _bias(t, a, w[0])
    return [*x[:-1], w[0]]


def _bias(t: Ties, bound: dict[str, Any], out: Axis) -> None:
    if is_tensor(bound.get("bias")):
        t.tie(out, t.axes[bound["bias"]][0])


def _matmul(t: Ties, node: Node, first: int = 0) -> list[Axis]:
    """Also the product inside addmm, whose factors are arguments 1 and 2."""
    a, b = node.args[first], node.args[first + 1]
    x, y = t.axes[a], t.axes[b]  # type: ignore[index]
    if len(x) < 2 or len(y) < 2:
        return opaque(t, node)
    t.tie(x[-1], y[-2])
    lead = [
        functools.reduce(t.tie, wide) if wide else ONE
        for back in range(max(len(x), len(y)), 2, -1)
        for wide in [[t.axes[n][-back] for n in (a, b) if _rank(n) >= back and not _is_one(shape(n)[-back])]]  # type: ignore[index, arg-type]
    ]
    return [*lead, x[-2], y[-1]]


def _addmm(t: Ties, node: Node) -> list[Axis]:
    added: Node = node.args[0]  # type: ignore[assignment]
    result = _matmul(t, node, 1)
    for back in range(1, _rank(added) + 1):
        if not _is_one(shape(added)[-back]):
            t.tie(result[-back], t.axes[added][-back])
    return result


def _einsum(t: Ties, node: Node) -> list[Axis]:
    labels = einsum_labels(node)
    if labels is None:
        return opaque(t, node)
    known: dict[str, Axis] = {}
    for names, operand in zip(labels[:-1], node.args[1], strict=True):  # type: ignore[arg-type]
        for name, axis in zip(names, t.axes[operand], strict=True):
            known[name] = t.tie(known[name], axis) if name in known else axis
    return [known[name] for name in labels[-1]]


def einsum_labels(node: Node) -> list[str] | None:
    """Labels of every operand and, last, of the result; None for forms that are not followed (`...`, diagonals, sums
    of one operand)."""
    text = str(node.args[0]).replace(" ", "")
    if "->" not in text or "." in text or len(node.args[1]) != 2:  # type: ignore[arg-type]
        return None
    terms = [*text.split("->")[0].split(","), text.split("->")[1]]
    lone = set(terms[0]) ^ set(terms[1])
    if any(len(set(term)) != len(term) for term in terms) or not lone <= set(terms[2]):
        return None
    return terms


def _attention(t: Ties, node: Node) -> list[Axis]:
    a = arguments(node)
    q, k, v = (t.axes[a[name]] for name in ("query", "key", "value"))
    t.tie(q[-1], k[-1])
    t.freeze([k[-2], v[-2]], why(node, "softmax runs over it"))
    if a["is_causal"]:
        t.freeze([q[-2]], why(node, "its order matters"))
    lead: list[Axis] = []
    for back in range(len(q), 2, -1):
        heads = t.tie(k[-back], v[-back])
        repeats = shape(a["query"])[-back]
        per = shape(a["key"])[-back]
        if a["enable_gqa"] and back == 3 and is_static(repeats) and repeats != per and not isinstance(heads, str):
            heads = np.repeat(heads, repeats // per)
        lead.append(t.tie(q[-back], heads))
    if is_tensor(a["attn_mask"]):
        mask = a["attn_mask"]
        t.freeze(t.axes[mask][-1:], why(node, "softmax runs over it"))
        for axis, other, size in zip(t.axes[mask][-2::-1], [q[-2], *lead[::-1]], shape(mask)[-2::-1], strict=False):
            if not _is_one(size):
                t.tie(other, axis)
    return [*lead, q[-2], v[-1]]


# -------------------------------------------------------------------- rules: norms, pointwise, reductions


def _pointwise(t: Ties, node: Node) -> list[Axis]:
    return t.broadcast(node, _tensors(node))


def _first(t: Ties, node: Node) -> list[Axis]:
    return list(t.axes[node.args[0]])  # type: ignore[index]


def _channel_parameters(t: Ties, node: Node) -> list[Axis]:
    """Batch norm and prelu: parameters along axis 1, every channel by itself."""
    x = _first(t, node)
    if kind(node) == "batch_norm" and arguments(node)["training"]:
        t.freeze(x[2:], why(node, "statistics are taken over it"))
    for parameter in _tensors(node)[1:]:
        if not _is_one(shape(parameter)[0]):
            x[1] = t.tie(x[1], t.axes[parameter][0])
    return x


def _instance_norm(t: Ties, node: Node) -> list[Axis]:
    t.freeze(_first(t, node)[2:], why(node, "statistics are taken over it"))
    return _channel_parameters(t, node)


def _layer_norm(t: Ties, node: Node) -> list[Axis]:
    """Removing a channel would change the mean and variance of the others."""
    x = _first(t, node)
    over = len(arguments(node)["normalized_shape"])
    reason = why(node, "statistics are taken over it")
    t.freeze(x[-over:], reason)
    for parameter in _tensors(node)[1:]:
        t.freeze(t.axes[parameter], reason)
    return [*x[:-over], *[reason] * over]


def _group_norm(t: Ties, node: Node) -> list[Axis]:
    x = _first(t, node)
    reason = why(node, "statistics are taken over it")
    t.freeze(x[1:], reason)
    for parameter in _tensors(node)[1:]:
        t.freeze(t.axes[parameter], reason)
    return [x[0], *[reason] * (len(x) - 1)]


def _along(t: Ties, node: Node) -> list[Axis]:
    """Softmax, sort, cumulative sums, rolls: the axes that they run along stay whole."""
    a, x = arguments(node), _first(t, node)
    dims = a.get("dim", a.get("dims", -1))
    for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
        x[dim] = t.freeze([x[dim]], why(node, "the operator runs along it")) if len(x) else ONE
    return x


def _reduce(t: Ties, node: Node) -> list[Axis]:
    a, x = arguments(node), _first(t, node)
    given = a.get("dim")
    dims = range(len(x)) if given is None or given == [] else given if isinstance(given, (list, tuple)) else [given]
    gone = {d % len(x) for d in dims} if x else set()
    t.freeze([x[d] for d in gone], why(node, "it is reduced"))
    if a.get("keepdim"):
        return [ONE if i in gone else axis for i, axis in enumerate(x)]
    return [axis for i, axis in enumerate(x) if i not in gone]


def _spatial(t: Ties, node: Node) -> list[Axis]:
    """Pooling and resizing: the last one, two or three axes, as the operator's name says."""
    x, name = _first(t, node), operator_name(node)
    count = next(int(d) for d in "123" if f"{d}d" in name)
    return [*x[:-count], *[t.freeze(x[-count:], why(node, "it is a spatial axis"))] * count]


def _embedding(t: Ties, node: Node) -> list[Axis]:
    a = arguments(node)
    w = t.axes[a["weight"]]
    t.freeze([w[0]], why(node, "it is indexed"))
    return [*t.axes[a["indices"]], w[1]]


def _create(t: Ties, node: Node) -> list[Axis]:
    """Zeros and ones shrink with their size; what counts or stands on a diagonal stays."""
    name = operator_name(node)
    axes = [t.fresh(s) for s in shape(node)]
    if not any(word in name for word in ("zeros", "ones", "full", "empty")):
        t.freeze(axes, why(node, "its values depend on their position"))
    return axes


def _create_like(t: Ties, node: Node) -> list[Axis]:
    if ".new_" in operator_name(node):
        return _create(t, node)
    return _first(t, node) if "like" in operator_name(node) else opaque(t, node)


# -------------------------------------------------------------------- rules: moving slices


def _regroup(t: Ties, node: Node) -> list[Axis]:
    result = t.regroup(node, node.args[0])  # type: ignore[arg-type]
    if len(_tensors(node)) == 2 and is_tensor(node.args[1]):  # view_as
        return [t.tie(a, b) for a, b in zip(result, t.axes[node.args[1]], strict=True)]  # type: ignore[index]
    return result


def _permute(t: Ties, node: Node) -> list[Axis]:
    x = _first(t, node)
    return [x[i] for i in order(node)]


def order(node: Node) -> list[int]:
    """Which axis of its operand each axis of a permute or transpose is."""
    a, rank = arguments(node), _rank(node)
    if "dims" in a:
        return [d % rank for d in a["dims"]]
    found = list(range(rank))
    if operator_name(node) in ("aten.t.default", "aten.numpy_T.default"):
        return found[::-1]
    i, j = a.get("dim0", a.get("axis0", -2)) % rank, a.get("dim1", a.get("axis1", -1)) % rank
    found[i], found[j] = found[j], found[i]
    return found


def _expand(t: Ties, node: Node) -> list[Axis]:
    """A repeated axis has atoms of its own: all its slices are the same, so any may go."""
    source: Node = node.args[0]  # type: ignore[assignment]
    x, before, after = t.axes[source], shape(source), shape(node)
    other = t.axes[node.args[1]] if is_tensor(node.args[1]) else None  # type: ignore[index]
    result: list[Axis] = []
    for back in range(len(after), 0, -1):
        repeated = back > len(before) or (_is_one(before[-back]) and not _is_one(after[-back]))
        axis = t.fresh(after[-back]) if repeated else x[-back]
        result.append(t.tie(axis, other[-back]) if other is not None else axis)
    return result


def _repeat(t: Ties, node: Node) -> list[Axis]:
    x = _first(t, node)
    times = list(next(v for k, v in arguments(node).items() if k in ("repeats", "dims")))
    times = [1] * (len(x) - len(times)) + times
    x = [why(node, "it is repeated")] * (len(times) - len(x)) + x
    return [
        axis if _is_one(n) else t.freeze([axis], why(node, DYNAMIC)) if not is_static(n) or isinstance(axis, str)
        else np.tile(axis, n)
        for axis, n in zip(x, times, strict=True)
    ]  # fmt: skip


def _repeat_interleave(t: Ties, node: Node) -> list[Axis]:
    a, x = arguments(node), _first(t, node)
    dim, times = a.get("dim"), a["repeats"]
    if dim is None or not is_static(times):
        return opaque(t, node)
    axis = x[dim]
    x[dim] = axis if isinstance(axis, str) else np.repeat(axis, times)
    return x


def _cat(t: Ties, node: Node) -> list[Axis]:
    a = arguments(node)
    operands: list[Node] = list(a["tensors"])
    rank = _rank(node)
    if any(_rank(n) != rank for n in operands):
        return opaque(t, node)
    dim = a.get("dim", 0) % rank
    result = [functools.reduce(t.tie, [t.axes[n][i] for n in operands]) for i in range(rank)] if rank else []
    result[dim] = _joined(t, node, [(t.axes[n][dim], shape(n)[dim]) for n in operands])
    return result


def _joined(t: Ties, node: Node, pieces: list[tuple[Axis, Any]]) -> Axis:
    """Pieces one after the other; one that cannot change gets frozen atoms, so that its neighbours still can."""
    if all(isinstance(axis, str) for axis, _ in pieces):
        return pieces[0][0]
    if not all(is_static(size) for _, size in pieces):
        return t.freeze([axis for axis, _ in pieces], why(node, DYNAMIC))
    arrays = []
    for axis, size in pieces:
        if isinstance(axis, str):
            t.count += size
            stand_in = np.arange(t.count - size, t.count, dtype=np.int64)
            t.freeze([stand_in], axis)
            axis = stand_in
        arrays.append(axis)
    return np.concatenate(arrays)
