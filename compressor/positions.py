"""Where some axes of the inputs, batch and sequence of a text say, lie in every value of a graph: one rule a kind.

Layouts (layout.py) follow them exactly, dynamic or not: transposed, joined to [batch * sequence, features], split off
again, in either order. Behind an operator without a rule, or where a rule fails, a dynamic axis is known by its size,
and a static one is not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .ir import Graph
from .layout import Atom, Axis, Layout, Size, reshaped, run, tokens
from .names import operator_name
from .ops import arguments, extents, is_tensor, kind

Found = Layout | list[Layout] | None  # of one tensor, of several, or "by size"


class Walk:
    """The layouts found so far, and the tokens of dynamic sizes."""

    def __init__(self, dynamic: Mapping[Size, int]) -> None:
        self.at: dict[Node, Any] = {}
        self._dynamic = dynamic

    def of(self, node: Any) -> Layout:
        return self.at[node]

    def first(self, node: Node) -> Layout:
        """The layout of the first operand."""
        return self.at[next(iter(arguments(node).values()))]

    def axis(self, size: Size) -> Axis:
        """An axis of which nothing else is known."""
        return (Atom(size, self._dynamic[size]),) if size in self._dynamic else run(size)

    def broadcast(self, operands: Iterable[Layout], sizes: Sequence[Size]) -> Layout:
        """Aligned at the last axis. Positions win over features: those are constants of that size."""
        layouts, result = list(operands), []
        for back in range(len(sizes), 0, -1):
            axes = [layout[-back] for layout in layouts if len(layout) >= back and layout[-back]]
            known = next((axis for axis in axes if tokens(axis)), axes[0] if axes else None)
            result.append(known if known is not None else self.axis(sizes[-back]))
        return tuple(result)

    def by_size(self, node: Node, value: Tensor) -> Layout:
        """Dynamic axes are those of the same size in what is read."""
        read = {
            size: axis
            for source in node.all_input_nodes
            if is_tensor(source)
            for size, axis in zip(_sizes(source), self.at[source], strict=True)
            if tokens(axis) and not isinstance(size, int)
        }
        return tuple(read.get(size) or self.axis(size) for size in extents(value))


def follow(
    graph: Graph, marks: Mapping[Node, Mapping[int, int]], dynamic: Mapping[Size, int]
) -> dict[Node, Any]:
    """The layout of every tensor, a list of them for a node with several results.

    marks: input -> {axis: token}. dynamic: symbolic size -> the token of every axis that has it.
    """
    walk = Walk(dynamic)
    for node in graph.nodes:
        value: Any = node.meta.get("val")
        parts = value if isinstance(value, (tuple, list)) else [value]
        if node.op == "output" or not all(isinstance(part, Tensor) for part in parts):
            continue
        found: Found = None
        if node.op == "placeholder":
            sizes, given = extents(value), marks.get(node, {})
            found = tuple((Atom(s, given[i]),) if i in given else walk.axis(s) for i, s in enumerate(sizes))
        elif kind(node) in RULES:
            found = RULES[kind(node)](walk, node)
        layouts = found if isinstance(found, list) else [found] * len(parts)
        made = [
            layout if layout is not None and len(layout) == part.dim() else walk.by_size(node, part)
            for layout, part in zip(layouts, parts, strict=True)
        ]
        walk.at[node] = made if isinstance(value, (tuple, list)) else made[0]
    return walk.at


# -------------------------------------------------------------------- values and sizes


def _sizes(node: Node) -> list[Size]:
    return extents(node.meta["val"])


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def _pointwise(w: Walk, node: Node) -> Found:
    return w.broadcast(map(w.of, _tensors(node)), _sizes(node)) if is_tensor(node) else None


def _same(w: Walk, node: Node) -> Found:
    return w.first(node)


def _resized(w: Walk, node: Node) -> Layout | list[Layout]:
    """Axes that keep their size keep what they hold: pools, slices, parts, repetitions."""
    source, value = next(iter(arguments(node).values())), node.meta["val"]
    known = list(zip(_sizes(source), w.of(source), strict=True))[::-1]

    def fitted(part: Tensor) -> Layout:
        sizes = extents(part)[::-1]
        axes = [
            known[i][1] if i < len(known) and known[i][0] == size else run(size)
            for i, size in enumerate(sizes)
        ]
        return tuple(axes[::-1])

    return fitted(value) if isinstance(value, Tensor) else [fitted(part) for part in value]


def _reordered(w: Walk, node: Node) -> Found:
    """Sorts, flips and rolls: along their axes nothing is where it was."""
    found = _resized(w, node)
    rank = len(w.first(node))
    gone = _dims(node, rank, default=-1)

    def without(layout: Layout, sizes: Sequence[Size]) -> Layout:
        return tuple(
            run(s) if i in gone else axis for i, (axis, s) in enumerate(zip(layout, sizes, strict=True))
        )

    if isinstance(found, list):
        return [without(x, extents(v)) for x, v in zip(found, node.meta["val"], strict=True)]
    return without(found, _sizes(node))


def _scan(w: Walk, node: Node) -> Found:
    return w.first(node) if ".cum" in operator_name(node) else _reordered(w, node)


def _pad(w: Walk, node: Node) -> Found:
    pads = arguments(node)["pad"]
    moved = {back // 2 + 1 for back, pad in enumerate(pads) if pad != 0}
    sizes = _sizes(node)
    return tuple(
        run(size) if len(sizes) - i in moved else axis
        for i, (axis, size) in enumerate(zip(w.first(node), sizes, strict=True))
    )


def _dims(node: Node, rank: int, default: int | None) -> set[int]:
    """The axes that an operator works along, not negative; all where it names none."""
    bound = arguments(node)
    given = bound.get("dim", bound.get("dims", default))
    dims = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    return {d % rank for d in dims} or set(range(rank)) if rank else set()


def _reduce(w: Walk, node: Node) -> Found:
    x = w.first(node)
    gone = _dims(node, len(x), default=None)
    if arguments(node).get("keepdim"):
        left = tuple(() if i in gone else axis for i, axis in enumerate(x))
    else:
        left = tuple(axis for i, axis in enumerate(x) if i not in gone)
    return left if is_tensor(node) else [left] * len(node.meta["val"])


# -------------------------------------------------------------------- moves


def _reshape(w: Walk, node: Node) -> Found:
    return reshaped(w.first(node), _sizes(node))


def _permute(w: Walk, node: Node) -> Found:
    bound, x = arguments(node), list(w.first(node))
    if "dims" in bound:
        return tuple(x[d] for d in bound["dims"])
    if operator_name(node) == "aten.numpy_T.default":
        return tuple(x[::-1])
    if len(x) > 1:
        i, j = bound.get("dim0", bound.get("axis0", -2)), bound.get("dim1", bound.get("axis1", -1))
        x[i], x[j] = x[j], x[i]
    return tuple(x)


def _expand(w: Walk, node: Node) -> Found:
    return w.broadcast([w.first(node)], _sizes(node))


def _interleave(w: Walk, node: Node) -> Found:
    bound, x = arguments(node), list(w.first(node))
    if not isinstance(bound["dim"], int) or not isinstance(bound["repeats"], int):
        return None
    x[bound["dim"]] += run(bound["repeats"])
    return tuple(x)


def _cat(w: Walk, node: Node) -> Found:
    sizes = _sizes(node)
    made = list(w.broadcast(map(w.of, _tensors(node)), sizes))
    dim = arguments(node).get("dim", 0) % len(sizes)
    made[dim] = run(sizes[dim])
    return tuple(made)


def _stack(w: Walk, node: Node) -> Found:
    sizes = _sizes(node)
    dim = arguments(node)["dim"] % len(sizes)
    made = list(w.broadcast(map(w.of, _tensors(node)), sizes[:dim] + sizes[dim + 1 :]))
    made.insert(dim, run(sizes[dim]))
    return tuple(made)


def _select(w: Walk, node: Node) -> Found:
    x = list(w.first(node))
    del x[arguments(node)["dim"]]
    return tuple(x) if is_tensor(node) else [tuple(x)] * len(node.meta["val"])


def _getitem(w: Walk, node: Node) -> Found:
    found = w.first(node)
    return found[node.args[1]] if isinstance(found, list) else None  # type: ignore[index]


def _index(w: Walk, node: Node) -> Found:
    """`x[:, i, j]`: what is indexed lies as the indices do, the other axes stay; by size for masks and for gaps."""
    indices: list[Any] = list(arguments(node)["indices"])
    used = [i for i, index in enumerate(indices) if index is not None]
    given = [indices[i] for i in used]
    if used != list(range(used[0], used[-1] + 1)) or any(i.meta["val"].dtype == torch.bool for i in given):
        return None
    x, rank = w.first(node), max(i.meta["val"].dim() for i in given)
    sizes = _sizes(node)[used[0] : used[0] + rank]
    return (*x[: used[0]], *w.broadcast(map(w.of, given), sizes), *x[used[-1] + 1 :])


def _gather(w: Walk, node: Node) -> Found:
    return w.of(arguments(node)["index"])


def _embedding(w: Walk, node: Node) -> Found:
    return (*w.of(arguments(node)["indices"]), run(_sizes(node)[-1]))


# -------------------------------------------------------------------- contractions


def _linear(w: Walk, node: Node) -> Found:
    return (*w.first(node)[:-1], run(_sizes(node)[-1]))


def _conv(w: Walk, node: Node) -> Found:
    """Positions stay where stride and padding keep their number; the channels are new."""
    made: list[Any] = list(_resized(w, node))
    channel = 1 - len(_sizes(arguments(node)["weight"]))
    made[channel] = run(_sizes(node)[channel])
    return tuple(made)


def _matmul(w: Walk, node: Node, first: int = 0) -> Found:
    """Also the product inside addmm, whose factors are arguments 1 and 2."""
    x, y = w.of(node.args[first]), w.of(node.args[first + 1])
    if len(x) < 2 or len(y) < 2:
        return None
    return (*w.broadcast([x[:-2], y[:-2]], _sizes(node)[:-2]), x[-2], y[-1])


def _addmm(w: Walk, node: Node) -> Found:
    return _matmul(w, node, 1)


def _einsum(w: Walk, node: Node) -> Found:
    names, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    if not arrow or "." in names:
        return None
    known: dict[str, Axis] = {}
    for labels, operand in zip(names.split(","), node.args[1], strict=True):  # type: ignore[arg-type]
        for label, axis in zip(labels, w.of(operand), strict=True):
            known[label] = axis if tokens(axis) else known.get(label, axis)
    return tuple(known[label] for label in result)


def _attention(w: Walk, node: Node) -> Found:
    bound = arguments(node)
    return (*w.of(bound["query"])[:-1], w.of(bound["value"])[-1])


RULES: dict[str, Callable[[Walk, Node], Found]] = {
    **dict.fromkeys(
        ("activation", "add", "sub", "mul", "div", "neg", "binary", "cast", "identity"), _pointwise
    ),
    **dict.fromkeys(("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "prelu"), _same),
    **dict.fromkeys(("softmax", "quantize", "dequantize", "slice_scatter"), _same),
    "scan": _scan,
    **dict.fromkeys(("flip", "roll"), _reordered),
    **dict.fromkeys(("max_pool", "avg_pool", "adaptive_pool", "upsample", "repeat"), _resized),
    **dict.fromkeys(("slice", "narrow", "split", "chunk", "create_like"), _resized),
    "pad": _pad,
    "reduce": _reduce,
    **dict.fromkeys(("view", "flatten", "unflatten", "unsqueeze", "squeeze"), _reshape),
    **dict.fromkeys(("permute", "transpose"), _permute),
    "expand": _expand,
    "repeat_interleave": _interleave,
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(("select", "unbind"), _select),
    "getitem": _getitem,
    "index": _index,
    "gather": _gather,
    "embedding": _embedding,
    "linear": _linear,
    **dict.fromkeys(("conv", "conv_transpose"), _conv),
    "matmul": _matmul,
    "addmm": _addmm,
    "einsum": _einsum,
    "attention": _attention,
}
