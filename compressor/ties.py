"""What each operator does to channels: one rule a kind, in one table.

A rule reads the axes of its operands, ties atoms that its operator makes inseparable, freezes those that it cannot do
without, and answers the axes of its result. What it must guarantee:

    a kept slice of the result depends on kept slices of the operands alone, except through a contraction, where a
    removed slice adds nothing.

So a softmax, a mean or a layer norm over an axis freezes it, and an operator without a rule freezes all that it
touches. `surgery.py` has one rewrite a kind for the literals that mention sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor
from torch.fx import Node

from . import moves
from .atoms import DYNAMIC, NORMS, ONE, Atoms, Axis, Reason, is_one, why
from .ir import Graph
from .moves import first_axes, opaque, opaque_parts, rank_of, tensors
from .names import operator_name
from .ops import arguments, einsum_terms, is_static, is_tensor, kind, shape

Rule = Callable[[Atoms, Node], list[Axis]]


def read(graph: Graph, atoms: Atoms) -> None:
    """Applies the rule of every node, in order; axes of the graph's inputs and outputs are frozen."""
    names = dict(zip(graph.placeholders, (spec.name for spec in graph.inputs), strict=True))
    for node in graph.nodes:
        if node.op == "placeholder":
            atoms.axes[node] = [Reason(f"it is an axis of input {names[node]}")] * rank_of(node)
        elif node.op == "get_attr":
            atoms.axes[node] = [atoms.fresh(size) for size in shape(node)]
            atoms.settled.add(node)
        elif node.op == "call_function":
            _visit(atoms, node)
    for name, result in zip(graph.outputs, graph.results, strict=True):
        atoms.freeze(atoms.axes.get(result, ()), Reason(f"it reaches output {name}"))


def _visit(t: Atoms, node: Node) -> None:
    value, which = node.meta["val"], kind(node)
    if node.all_input_nodes and all(source in t.settled for source in node.all_input_nodes):
        t.settled.add(node)
    if isinstance(value, Tensor):
        t.axes[node] = _fit(t, RULES.get(which, opaque)(t, node), value)
    elif isinstance(value, (tuple, list)):
        if which in PARTS:
            parts = PARTS[which](t, node)
        elif which in RULES:
            parts = [RULES[which](t, node)] * len(value)
        else:
            parts = opaque_parts(t, node)
        t.parts[node] = [
            _fit(t, axes, v) if isinstance(v, Tensor) else [] for axes, v in zip(parts, value, strict=True)
        ]
    elif operator_name(node) == "aten.sym_size.int":
        t.freeze([t.axes[node.args[0]][node.args[1]]], why(node, "its size is read"))  # type: ignore[index]
    elif which != "size" or operator_name(node) == "aten.sym_numel.default":
        opaque(t, node)


def _fit(t: Atoms, axes: list[Axis], value: Tensor) -> list[Axis]:
    """Axes of dynamic size and of size 1 have no atoms, whatever a rule made of them."""
    fitted = []
    for axis, size in zip(axes, value.shape, strict=True):
        if not isinstance(axis, str) and not is_static(size):
            axis = t.freeze([axis], DYNAMIC)
        elif not isinstance(axis, str) and size <= 1:
            axis = t.freeze([axis], ONE)
        fitted.append(axis)
    return fitted


# -------------------------------------------------------------------- contractions


def _conv(t: Atoms, node: Node) -> list[Axis]:
    a = arguments(node)
    x, w, groups = t.axes[a["input"]], t.axes[a["weight"]], a["groups"]
    if len(x) != len(w):
        return opaque(t, node)
    if groups == 1:
        t.tie(x[1], w[1])
    elif groups == shape(a["input"])[1]:  # depthwise: all results of a channel go with it
        t.tie(x[1], w[0] if isinstance(w[0], str) else t.rows(w[0].reshape(groups, -1)))
    else:
        t.tie(t.fold(x[1], groups), w[1])
        t.fold(w[0], groups)
    return _convolved(t, node, w[0])


def _conv_transpose(t: Atoms, node: Node) -> list[Axis]:
    a = arguments(node)
    x, w, groups = t.axes[a["input"]], t.axes[a["weight"]], a["groups"]
    if len(x) != len(w):
        return opaque(t, node)
    t.tie(x[1], w[0])
    if groups == 1:
        return _convolved(t, node, w[1])
    if groups == shape(a["input"])[1]:
        t.freeze([w[1]], why(node, "it is the multiplier of a depthwise convolution"))
        return _convolved(t, node, x[1] if isinstance(x[1], str) else np.repeat(x[1], shape(a["weight"])[1]))
    t.fold(x[1], groups)
    return _convolved(t, node, w[1] if isinstance(w[1], str) else np.tile(w[1], groups))


def _convolved(t: Atoms, node: Node, channels: Axis) -> list[Axis]:
    a = arguments(node)
    x, w = t.axes[a["input"]], t.axes[a["weight"]]
    space = t.freeze([*x[2:], *w[2:]], why(node, "it is a spatial axis"))
    if is_tensor(a["bias"]):
        t.tie(channels, t.axes[a["bias"]][0])
    return [x[0], channels, *[space] * (len(x) - 2)]


def _linear(t: Atoms, node: Node) -> list[Axis]:
    a = arguments(node)
    x, w = t.axes[a["input"]], t.axes[a["weight"]]
    if len(w) != 2:
        return opaque(t, node)
    t.tie(x[-1], w[1])
    if is_tensor(a["bias"]):
        t.tie(w[0], t.axes[a["bias"]][0])
    return [*x[:-1], w[0]]


def _matmul(t: Atoms, node: Node, first: int = 0) -> list[Axis]:
    """Also the product inside addmm, whose factors are arguments 1 and 2."""
    a: Node = node.args[first]  # type: ignore[assignment]
    b: Node = node.args[first + 1]  # type: ignore[assignment]
    x, y = t.axes[a], t.axes[b]
    if len(x) < 2 or len(y) < 2:
        return opaque(t, node)
    t.tie(x[-1], y[-2])
    return [*t.broadcast([a, b], max(len(x), len(y)), skip=2), x[-2], y[-1]]


def _addmm(t: Atoms, node: Node) -> list[Axis]:
    added: Node = node.args[0]  # type: ignore[assignment]
    result = _matmul(t, node, 1)
    for back in range(1, rank_of(added) + 1):
        if not is_one(shape(added)[-back]):
            t.tie(result[-back], t.axes[added][-back])
    return result


def einsum_labels(node: Node) -> list[str] | None:
    """Labels of both operands and of the result; None where they are not two, for diagonals and for lone sums."""
    terms = einsum_terms(node)
    if len(terms) != 3:
        return None
    lone = set(terms[0]) ^ set(terms[1])
    plain = all(len(set(term)) == len(term) for term in terms) and lone <= set(terms[2])
    return terms if plain else None


def _einsum(t: Atoms, node: Node) -> list[Axis]:
    labels = einsum_labels(node)
    if labels is None:
        return opaque(t, node)
    known: dict[str, Axis] = {}
    for names, operand in zip(labels, node.args[1], strict=False):  # type: ignore[arg-type]
        for name, axis in zip(names, t.axes[operand], strict=True):
            known[name] = t.tie(known[name], axis) if name in known else axis
    return [known[name] for name in labels[-1]]


def _attention(t: Atoms, node: Node) -> list[Axis]:
    a = arguments(node)
    q, k, v = (list(t.axes[a[name]]) for name in ("query", "key", "value"))
    if not len(q) == len(k) == len(v):
        return opaque(t, node)
    t.tie(q[-1], k[-1])
    t.freeze([k[-2], v[-2]], why(node, "softmax runs over it"))
    if a["is_causal"]:
        t.freeze([q[-2]], why(node, "its order matters"))
    lead = [t.tie(x, y) for x, y in zip(k[:-2], v[:-2], strict=True)]
    queries, keys = shape(a["query"]), shape(a["key"])
    if a.get("enable_gqa") and is_static(queries[-3]) and not isinstance(lead[-1], str):
        lead[-1] = np.repeat(lead[-1], queries[-3] // keys[-3])
    lead = [t.tie(x, y) for x, y in zip(q[:-2], lead, strict=True)]
    if is_tensor(a["attn_mask"]):
        mask = a["attn_mask"]
        t.freeze(t.axes[mask][-1:], why(node, "softmax runs over it"))
        for axis, other, size in zip(
            t.axes[mask][-2::-1], [q[-2], *lead[::-1]], shape(mask)[-2::-1], strict=False
        ):
            if not is_one(size):
                t.tie(other, axis)
    return [*lead, q[-2], v[-1]]


# -------------------------------------------------------------------- values, norms, reductions


def _pointwise(t: Atoms, node: Node) -> list[Axis]:
    return t.broadcast(tensors(node), rank_of(node))


def _copy(t: Atoms, node: Node) -> list[Axis]:
    """The second operand's values in the first one's shape."""
    return t.broadcast(tensors(node)[:2], rank_of(node))


def _by_channel(t: Atoms, node: Node) -> list[Axis]:
    """Batch and instance norm, prelu: parameters along axis 1, every channel by itself."""
    x = first_axes(t, node)
    if kind(node) == "instance_norm" or arguments(node).get("training"):
        t.freeze(x[2:], why(node, "statistics are taken over it", t.remedy(node, "")))
    for parameter in tensors(node)[1:]:
        if not is_one(shape(parameter)[0]):
            x[1] = t.tie(x[1], t.axes[parameter][0])
    return x


def _over_channels(t: Atoms, node: Node) -> list[Axis]:
    """Layer and RMS norm: removing a channel changes the statistics of the others, so it stays but by `norms`."""
    x = first_axes(t, node)
    over = len(arguments(node)["normalized_shape"])
    if t.norms:
        for parameter in tensors(node)[1:]:
            x[-over:] = [t.tie(a, b) for a, b in zip(x[-over:], t.axes[parameter], strict=True)]
        return x
    reason = t.freeze(x[-over:], why(node, "statistics are taken over it", t.remedy(node, NORMS)))
    for parameter in tensors(node)[1:]:
        t.freeze(t.axes[parameter], reason)
    return [*x[:-over], *[reason] * over]


def _group_norm(t: Atoms, node: Node) -> list[Axis]:
    """Whole groups may go: the statistics of the others are their own. By `norms` as many channels of each."""
    x, groups = first_axes(t, node), arguments(node)["num_groups"]
    space = t.freeze(x[2:], why(node, "statistics are taken over it"))
    if not isinstance(axis := x[1], str):
        if t.norms and groups < len(axis):
            t.fold(axis, groups)
        elif groups > 1:
            t.rows(axis.reshape(groups, -1))
        else:
            x[1] = t.freeze([axis], why(node, "statistics are taken over it", NORMS))
    for parameter in tensors(node)[1:]:
        x[1] = t.tie(x[1], t.axes[parameter][0])
    return [*x[:2], *[space] * (len(x) - 2)]


def _along(t: Atoms, node: Node) -> list[Axis]:
    """Softmax, sorts, cumulative sums, rolls: the axes that they run along stay whole."""
    a, x = arguments(node), first_axes(t, node)
    given = a.get("dim", a.get("dims", -1))
    dims = list(given) if isinstance(given, (list, tuple)) else [given]
    for dim in (dims or range(len(x))) if x else ():
        x[dim] = t.freeze([x[dim]], why(node, "the operator runs along it"))
    return x


def correction(node: Node) -> float:
    """By how much fewer values than there are a variance divides; 1 as a rule."""
    a = arguments(node)
    given = a.get("correction", a.get("unbiased", True))
    return 1 if given is None else float(given)


def is_statistic(node: Node) -> bool:
    """A mean, a variance or a Euclidean norm along some axes: what normalisations that are spelled out consist of."""
    a, name = arguments(node), operator_name(node).split(".")[1]
    if name == "linalg_vector_norm":
        return bool(a["ord"] == 2)
    if name in ("var", "std") and correction(node) != 0:  # it divides by how many there are, less so many
        return all(map(is_static, shape(node.args[0])))  # type: ignore[arg-type]
    return name in ("mean", "var", "std")


def _reduce(t: Atoms, node: Node) -> list[Axis]:
    a, x = arguments(node), first_axes(t, node)
    given = a.get("dim")
    dims = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    gone = {d % len(x) for d in (dims or range(len(x)))} if x else set()
    able = is_statistic(node)
    if not (able and t.norms):
        t.freeze([x[d] for d in gone], why(node, "it is reduced", t.remedy(node, NORMS if able else "")))
    if a.get("keepdim"):
        return [ONE if i in gone else axis for i, axis in enumerate(x)]
    return [axis for i, axis in enumerate(x) if i not in gone]


def _spatial(t: Atoms, node: Node) -> list[Axis]:
    """Pooling and resizing: the last one, two or three axes, as the operator's name says."""
    x, name = first_axes(t, node), operator_name(node)
    count = next(int(digit) for digit in "123" if f"{digit}d" in name)
    return [*x[:-count], *[t.freeze(x[-count:], why(node, "it is a spatial axis"))] * count]


def _glu(t: Atoms, node: Node) -> list[Axis]:
    """The first half times the sigmoid of the second."""
    x, dim = first_axes(t, node), arguments(node)["dim"]
    if not isinstance(axis := x[dim], str):
        x[dim] = t.tie(*np.split(axis, 2))
    return x


def _grid_sample(t: Atoms, node: Node) -> list[Axis]:
    """[n, c, ...] read at the places [n, ..., 2 or 3]."""
    a = arguments(node)
    x, grid = t.axes[a["input"]], t.axes[a["grid"]]
    t.freeze([*x[2:], grid[-1]], why(node, "it is a spatial axis"))
    return [t.tie(x[0], grid[0]), x[1], *grid[1:-1]]


def _embedding(t: Atoms, node: Node) -> list[Axis]:
    a = arguments(node)
    rows, columns = t.axes[a["weight"]]
    t.freeze([rows], why(node, "it is indexed"))
    return [*t.axes[a["indices"]], columns]


def _create(t: Atoms, node: Node) -> list[Axis]:
    """Zeros and ones shrink with their size; what counts, or stands on a diagonal, stays."""
    axes = [t.fresh(size) for size in shape(node)]
    if not any(word in operator_name(node) for word in ("zeros", "ones", "full", "empty")):
        t.freeze(axes, why(node, "its values depend on their position"))
    return axes


def _create_like(t: Atoms, node: Node) -> list[Axis]:
    if ".new_" in operator_name(node):
        return _create(t, node)
    same = "_like" in operator_name(node) or operator_name(node) == "aten.zero.default"
    return first_axes(t, node) if same else opaque(t, node)


RULES: dict[str, Rule] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "matmul": _matmul,
    "addmm": _addmm,
    "einsum": _einsum,
    "attention": _attention,
    **dict.fromkeys(("activation", "add", "sub", "mul", "div", "neg", "binary"), _pointwise),
    **dict.fromkeys(("cast", "identity"), first_axes),
    **dict.fromkeys(("batch_norm", "instance_norm", "prelu"), _by_channel),
    **dict.fromkeys(("layer_norm", "rms_norm"), _over_channels),
    "group_norm": _group_norm,
    **dict.fromkeys(("softmax", "scan", "roll"), _along),
    "reduce": _reduce,
    **dict.fromkeys(("max_pool", "avg_pool", "adaptive_pool", "upsample"), _spatial),
    "glu": _glu,
    "grid_sample": _grid_sample,
    "embedding": _embedding,
    "create": _create,
    "create_like": _create_like,
    **dict.fromkeys(("view", "flatten", "unflatten", "squeeze", "unsqueeze"), moves.regroup),
    **dict.fromkeys(("permute", "transpose"), moves.permute),
    "expand": moves.expand,
    "repeat": moves.repeat,
    "repeat_interleave": moves.repeat_interleave,
    "cat": moves.cat,
    "stack": moves.stack,
    "slice": moves.slice_,
    "narrow": moves.narrow,
    "select": moves.select,
    "index_select": moves.index_select,
    "index": moves.look_up,
    "gather": moves.gather,
    "copy": _copy,
    "slice_scatter": moves.slice_scatter,
    "select_scatter": moves.select_scatter,
    "im2col": moves.im2col,
    "col2im": moves.col2im,
    "unfold": moves.unfold,
    "flip": moves.flip,
    "pad": moves.pad,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), moves.pixel_shuffle),
    "channel_shuffle": moves.channel_shuffle,
    "getitem": moves.getitem,
}
PARTS: dict[str, Callable[[Atoms, Node], list[list[Axis]]]] = {
    "split": moves.pieces,
    "chunk": moves.pieces,
    "unbind": moves.unbind,
}
