"""What operators that only move slices do to channels: rules of `ties.py` for reshapes, cuts, joins and paddings."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from .atoms import DYNAMIC, ONE, Atoms, Axis, is_one, why
from .names import operator_name
from .ops import arguments, extents, is_static, is_tensor, kind, shape

RULE = "a rule for this operator (CONTRIBUTING.md, Add an operator)"


def opaque(t: Atoms, node: Node) -> list[Axis]:
    """Nothing is known: everything that it touches stays as it is."""
    return opaque_parts(t, node)[0]


def opaque_parts(t: Atoms, node: Node) -> list[list[Axis]]:
    """The same for an operator with several results: the axes of each."""
    reason = why(node, "no rule for this operator", t.remedy(node, RULE))
    for source in node.all_input_nodes:
        for axes in [t.axes.get(source, []), *t.parts.get(source, [])]:
            t.freeze(axes, reason)
    value = node.meta["val"]
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return [[reason] * (part.dim() if isinstance(part, Tensor) else 0) for part in parts]


def tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def rank_of(node: Node) -> int:
    return len(shape(node))


def first_axes(t: Atoms, node: Node) -> list[Axis]:
    """Axes of the first operand, as a new list: also the rule of operators that change nothing but values."""
    return list(t.axes[node.args[0]])  # type: ignore[index]


def regroup(t: Atoms, node: Node) -> list[Axis]:
    result = t.regroup(node, node.args[0])  # type: ignore[arg-type]
    if len(node.args) > 1 and is_tensor(node.args[1]):  # view_as
        return [t.tie(a, b) for a, b in zip(result, t.axes[node.args[1]], strict=True)]  # type: ignore[index]
    return result


def permute(t: Atoms, node: Node) -> list[Axis]:
    """Axes in another order; `t`, `mT` and their like have no arguments."""
    a, x = arguments(node), first_axes(t, node)
    if "dims" in a:
        return [x[d] for d in a["dims"]]
    if operator_name(node) == "aten.numpy_T.default":
        return x[::-1]
    if len(x) > 1:
        i, j = a.get("dim0", a.get("axis0", -2)), a.get("dim1", a.get("axis1", -1))
        x[i], x[j] = x[j], x[i]
    return x


def expand(t: Atoms, node: Node) -> list[Axis]:
    """A repeated axis has atoms of its own: all its slices are the same, so any of them may go."""
    source: Node = node.args[0]  # type: ignore[assignment]
    x, before, after = t.axes[source], shape(source), shape(node)
    result: list[Axis] = []
    for back in range(len(after), 0, -1):
        repeated = back > len(before) or (is_one(before[-back]) and not is_one(after[-back]))
        result.append(t.fresh(after[-back]) if repeated else x[-back])
    if is_tensor(node.args[1]):  # expand_as
        return [t.tie(a, b) for a, b in zip(result, t.axes[node.args[1]], strict=True)]  # type: ignore[index]
    return result


def repeat(t: Atoms, node: Node) -> list[Axis]:
    x = first_axes(t, node)
    times: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    times = [1] * (len(x) - len(times)) + times
    new: list[Axis] = [why(node, "it is repeated")] * (len(times) - len(x))
    return [copies(t, node, axis, n) for axis, n in zip([*new, *x], times, strict=True)]


def copies(t: Atoms, node: Node, axis: Axis, times: Any) -> Axis:
    if isinstance(axis, str) or is_one(times):
        return axis
    return np.tile(axis, times) if is_static(times) else t.freeze([axis], why(node, DYNAMIC))


def repeat_interleave(t: Atoms, node: Node) -> list[Axis]:
    a, x = arguments(node), first_axes(t, node)
    dim, times = a["dim"], a["repeats"]
    if dim is None or not is_static(times):
        return opaque(t, node)
    x[dim] = axis if isinstance(axis := x[dim], str) else np.repeat(axis, times)
    return x


def cat(t: Atoms, node: Node) -> list[Axis]:
    a, rank = arguments(node), rank_of(node)
    operands: list[Node] = list(a["tensors"])
    if any(rank_of(n) != rank for n in operands):
        return opaque(t, node)
    dim = a.get("dim", 0) % rank
    result = [
        functools.reduce(t.tie, [t.axes[n][i] for n in operands]) if i != dim else ONE for i in range(rank)
    ]
    result[dim] = t.join([(t.axes[n][dim], shape(n)[dim]) for n in operands])
    return result


def stack(t: Atoms, node: Node) -> list[Axis]:
    operands: list[Node] = list(node.args[0])  # type: ignore[arg-type]
    result = [functools.reduce(t.tie, axes) for axes in zip(*(t.axes[n] for n in operands), strict=True)]
    result.insert(arguments(node)["dim"] % rank_of(node), why(node, "its slices are whole tensors"))
    return result


def slice_(t: Atoms, node: Node) -> list[Axis]:
    a, x = arguments(node), first_axes(t, node)
    dim, step = a["dim"], a["step"]
    start, stop = a["start"], a["end"]
    if not isinstance(axis := x[dim], str):
        if step == 1 and all(bound is None or is_static(bound) for bound in (start, stop)):
            x[dim] = axis[start:stop]
        elif shape(node.args[0])[dim] != shape(node)[dim]:  # type: ignore[arg-type]
            x[dim] = t.freeze([axis], why(node, "it is sliced in steps"))
    return x


def narrow(t: Atoms, node: Node) -> list[Axis]:
    a, x = arguments(node), first_axes(t, node)
    if not isinstance(axis := x[a["dim"]], str):
        bounds = (a["start"], a["length"])
        whole = all(is_static(bound) for bound in bounds)
        first = a["start"] % len(axis) if whole else 0
        x[a["dim"]] = axis[first : first + a["length"]] if whole else t.freeze([axis], why(node, DYNAMIC))
    return x


def select(t: Atoms, node: Node) -> list[Axis]:
    a, x = arguments(node), first_axes(t, node)
    axis = x.pop(a["dim"])
    if not isinstance(axis, str):
        chosen = axis[[a["index"]]] if is_static(a["index"]) else axis
        t.freeze([chosen], why(node, "it is selected by its position"))
    return x


def index_select(t: Atoms, node: Node) -> list[Axis]:
    a, x = arguments(node), first_axes(t, node)
    x[a["dim"]] = t.freeze([x[a["dim"]]], why(node, "it is indexed"))
    return x


def look_up(t: Atoms, node: Node) -> list[Axis]:
    """A table looked up along some axes, as attention biases are: those are replaced by the axes of the indices."""
    x = first_axes(t, node)
    indices: list[Node | None] = list(node.args[1])  # type: ignore[arg-type]
    used = [i for i, index in enumerate(indices) if index is not None]
    found: list[Node] = [index for index in indices if index is not None]
    if not all(is_tensor(n) and n.meta["val"].dtype in (torch.int64, torch.int32) for n in found):
        return opaque(t, node)
    reason = t.freeze([x[i] for i in used], why(node, "it is indexed"))
    for index in found:
        t.freeze(t.axes[index], reason)
    rest = [axis for i, axis in enumerate(x) if i not in used]
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0  # apart, their axes come first
    return [*rest[:first], *[reason] * max(map(rank_of, found)), *rest[first:]]


def gather(t: Atoms, node: Node) -> list[Axis]:
    """Entries picked along one axis: along the others, the indices say nothing but how many."""
    a, x = arguments(node), first_axes(t, node)
    index = t.axes[a["index"]]
    dim = a["dim"] % max(1, len(x))
    sizes = zip(extents(a["self"].meta["val"]), extents(a["index"].meta["val"]), strict=True)
    if any(m != n for i, (m, n) in enumerate(sizes) if i != dim):
        return opaque(t, node)
    t.freeze([x[dim]], why(node, "it is indexed"))
    return [axis if i == dim else t.tie(x[i], axis) for i, axis in enumerate(index)]


def slice_scatter(t: Atoms, node: Node) -> list[Axis]:
    """A part of an axis, written over: the part and what is written there live and die together."""
    a, x = arguments(node), first_axes(t, node)
    written, dim = t.axes[a["src"]], a["dim"] % len(x)
    result = [axis if i == dim else t.tie(axis, written[i]) for i, axis in enumerate(x)]
    if isinstance(axis := x[dim], str) or isinstance(written[dim], str):
        result[dim] = t.tie(axis, written[dim])
    elif a["step"] == 1 and all(bound is None or is_static(bound) for bound in (a["start"], a["end"])):
        t.tie(axis[a["start"] : a["end"]], written[dim])
    else:
        result[dim] = t.freeze([axis, written[dim]], why(node, "it is written in steps"))
    return result


def select_scatter(t: Atoms, node: Node) -> list[Axis]:
    a, x = arguments(node), first_axes(t, node)
    dim, written = a["dim"] % len(x), iter(t.axes[a["src"]])
    if not isinstance(axis := x[dim], str):
        chosen = axis[[a["index"]]] if is_static(a["index"]) else axis
        t.freeze([chosen], why(node, "it is selected by its position"))
    return [axis if i == dim else t.tie(axis, next(written)) for i, axis in enumerate(x)]


def im2col(t: Atoms, node: Node) -> list[Axis]:
    """[..., c, h, w] -> [..., c * kh * kw, positions]"""
    a, x = arguments(node), first_axes(t, node)
    space = t.freeze(x[-2:], why(node, "it is a spatial axis"))
    return [*x[:-3], copies_of_each(x[-3], math.prod(a["kernel_size"])), space]


def col2im(t: Atoms, node: Node) -> list[Axis]:
    """[..., c * kh * kw, positions] -> [..., c, h, w]"""
    a, x = arguments(node), first_axes(t, node)
    space = t.freeze(x[-1:], why(node, "it is a spatial axis"))
    channels = (
        axis if isinstance(axis := x[-2], str) else t.rows(axis.reshape(-1, math.prod(a["kernel_size"])))
    )
    return [*x[:-2], channels, space, space]


def unfold(t: Atoms, node: Node) -> list[Axis]:
    """Overlapping windows along one axis; what is in a window becomes the last axis."""
    a, x = arguments(node), first_axes(t, node)
    dim = a["dimension"] % len(x)
    x[dim] = t.freeze([x[dim]], why(node, "it is cut into windows"))
    return [*x, x[dim]]


def copies_of_each(axis: Axis, times: int) -> Axis:
    return axis if isinstance(axis, str) else np.repeat(axis, times)


def flip(t: Atoms, node: Node) -> list[Axis]:
    x = first_axes(t, node)
    for dim in arguments(node)["dims"]:
        x[dim] = axis if isinstance(axis := x[dim], str) else axis[::-1]
    return x


def pad(t: Atoms, node: Node) -> list[Axis]:
    """Constant padding adds slices that may go again; a crop or a reflection keeps the axis as it is."""
    a, x = arguments(node), first_axes(t, node)
    constant = a.get("mode", "constant") == "constant"
    for back in range(1, len(a["pad"]) // 2 + 1):
        low, high = a["pad"][2 * back - 2], a["pad"][2 * back - 1]
        if (low == 0 and high == 0) or isinstance(axis := x[-back], str):
            continue
        if not (constant and is_static(low) and is_static(high) and low >= 0 and high >= 0):
            x[-back] = t.freeze([axis], why(node, "it is padded by other than constants"))
            continue
        x[-back] = np.concatenate([t.new(low), axis, t.new(high)])
    return x


def pixel_shuffle(t: Atoms, node: Node) -> list[Axis]:
    a, x = arguments(node), first_axes(t, node)
    square = (a["upscale_factor"] if kind(node) == "pixel_shuffle" else a["downscale_factor"]) ** 2
    space = t.freeze(x[-2:], why(node, "it is a spatial axis"))
    if not isinstance(axis := x[-3], str):
        x[-3] = t.rows(axis.reshape(-1, square)) if kind(node) == "pixel_shuffle" else np.repeat(axis, square)
    return [*x[:-2], space, space]


def channel_shuffle(t: Atoms, node: Node) -> list[Axis]:
    x, groups = first_axes(t, node), arguments(node)["groups"]
    x[1] = axis if isinstance(axis := t.fold(x[1], groups), str) else np.repeat(axis, groups)
    return x


def pieces(t: Atoms, node: Node) -> list[list[Axis]]:
    """Split and chunk: consecutive runs of slices."""
    x, dim = first_axes(t, node), arguments(node)["dim"]
    parts, start = [], 0
    for value in node.meta["val"]:
        axes, size = list(x), value.shape[dim]
        if not isinstance(axis := x[dim], str):
            axes[dim] = axis[start : start + size]
        parts.append(axes)
        start += size
    return parts


def unbind(t: Atoms, node: Node) -> list[list[Axis]]:
    x = first_axes(t, node)
    t.freeze([x.pop(arguments(node)["dim"])], why(node, "its slices are whole tensors"))
    return [list(x) for _ in node.meta["val"]]


def getitem(t: Atoms, node: Node) -> list[Axis]:
    return list(t.parts[node.args[0]][node.args[1]])  # type: ignore[index]
