"""Which operators are affine in the feature axis, token by token: one rule a kind, a layout for every value.

A region starts at an entry x [tokens..., features]. Every value in it holds each token of x exactly once, and mixes
nothing but the features of one token; `layout.py` says where they lie. The rules decide structurally, and `probe.py`
proves the outcome with numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from .constants import DataFree, is_random, shape_only
from .layout import Layout, reshaped, run, tokens
from .names import operator_name
from .ops import arguments, extents, is_tensor, kind
from .steps import Foreign, Step, aligned, broadcast, operands

_SHAPED = frozenset(
    {"view", "flatten", "unflatten", "expand", "repeat", "slice"}
)  # may be told a dynamic size
_PER_POSITION = frozenset({"mul", "div"})


def follow(node: Node, known: Mapping[Node, Any], free: DataFree) -> Layout | list[Layout]:
    """The layout of what `node` computes (a list for several outputs). Raises NotAffine or Foreign."""
    step = _step(node, known, free)
    rule = RULES.get(kind(node))
    if rule is None:
        raise step.fail()
    if not _has_floats(node):
        raise step.fail("gives integers")
    return rule(step)


def _step(node: Node, known: Mapping[Node, Any], free: DataFree) -> Step:
    """A node whose operands are values of the region and constants, and which draws no numbers."""
    step = Step(node, known, free, arguments(node))
    for operand in node.all_input_nodes:
        if operand not in known and operand not in free and not shape_only(node, operand):
            raise Foreign
    if is_random(node):
        raise step.fail("is random")
    if kind(node) not in _SHAPED and any(not is_tensor(n) and n not in known for n in node.all_input_nodes):
        raise step.fail("computes with a dynamic size")
    return step


def _has_floats(node: Node) -> bool:
    value = node.meta["val"]
    return not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex


def look_up(node: Node, known: Mapping[Node, Any], free: DataFree) -> Layout | list[Layout]:
    """As `follow`, from an entry of indices: looking up a constant table makes features of them."""
    bound, which = arguments(node), kind(node)
    if which in _PER_POSITION and _has_floats(node):  # a table holds any function of its index
        step = _step(node, known, free)
        return aligned(step, *operands(step, bound.values()), step.sizes)
    if which not in ("embedding", "index"):
        return follow(node, known, free)
    table, index = (
        bound[name] for name in (("weight", "indices") if which == "embedding" else ("self", "indices"))
    )
    if which == "index":
        index = index[0] if len(index) == 1 else None
    if index not in known or table in known:
        return follow(node, known, free)
    if table not in free:
        raise Foreign
    return (*known[index], *map(run, extents(table.meta["val"])[1:]))


# -------------------------------------------------------------------- rules


def _sum(step: Step) -> Layout:
    return aligned(step, *operands(step, step.bound.values()), step.sizes)


def _product(step: Step) -> Layout:
    region, constants = operands(step, step.bound.values())
    if len(region) > 1:
        raise step.fail("multiplies two activations")
    return aligned(step, region, constants, step.sizes)


def _quotient(step: Step) -> Layout:
    if step.reads(step.bound["other"]):
        raise step.fail("divides by an activation")
    return _product(step)


def _same(step: Step) -> Layout:
    return step.layout(step.first)


def _linear(step: Step) -> Layout:
    layout = step.only("input", "weight", "bias")
    step.features(layout, -1)
    return (*layout[:-1], run(step.sizes[-1]))


def _matmul(step: Step, first: str = "", second: str = "") -> Layout:
    a, b = (step.bound[n] for n in (first, second)) if first else list(step.bound.values())[:2]
    if step.reads(a) and step.reads(b):
        raise step.fail("multiplies two activations")
    region, constant = (a, b) if step.reads(a) else (b, a)
    layout, dims = step.layout(region), constant.meta["val"].dim()
    if len(layout) < 2:
        raise step.fail("works along its only axis")
    step.features(layout, -1 if region is a else -2)
    if dims == 1:
        return layout[:-1] if region is a else (*layout[:-2], layout[-1])
    sizes = step.sizes
    lead = [
        broadcast(
            step,
            [layout[-back]] if len(layout) >= back else [],
            [(constant, dims - back)] if dims >= back else [],
            sizes[-back],
        )
        for back in range(len(sizes), 2, -1)
    ]
    tail = (layout[-2], run(sizes[-1])) if region is a else (run(sizes[-2]), layout[-1])
    return (*lead, *tail)


def _addmm(step: Step) -> Layout:
    names = ("mat1", "mat2") if "mat1" in step.bound else ("batch1", "batch2")
    if not any(step.reads(step.bound[n]) for n in names):
        raise step.fail()
    product = _matmul(step, *names)
    added = step.bound["self"]
    layouts = [product] + ([step.known[added]] if step.reads(added) else [])
    return aligned(step, layouts, [] if step.reads(added) else [added], step.sizes)


def _einsum(step: Step) -> Layout:
    equation, tensors = str(step.bound["equation"]).replace(" ", ""), list(step.bound["tensors"])
    region = [i for i, o in enumerate(tensors) if step.reads(o)]
    if len(region) != 1:
        raise step.fail("multiplies two activations")
    terms, arrow, output = equation.partition("->")
    if not arrow:
        raise step.fail("names no output axes")
    labels = [_spell(t, o.meta["val"].dim()) for t, o in zip(terms.split(","), tensors, strict=True)]
    output_labels = _spell(output, len(step.sizes))
    own = labels[region[0]]
    if len(set(own)) != len(own):
        raise step.fail("takes a diagonal")
    where = dict(zip(own, step.known[tensors[region[0]]], strict=True))
    for label, axis in where.items():
        if label not in output_labels and tokens(axis):
            raise step.fail("sums over positions")
    result = []
    for label, size in zip(output_labels, step.sizes, strict=True):
        tables = [
            (o, names.index(label))
            for o, names in zip(tensors, labels, strict=True)
            if not step.reads(o) and label in names
        ]
        result.append(broadcast(step, [where.get(label, ())], tables, size))
    return tuple(result)


def _spell(term: str, dims: int) -> list[str]:
    """Axis labels of one einsum term, an ellipsis written out from the right."""
    before, dots, after = term.partition("...")
    middle = dims - len(before) - len(after) if dots else 0
    return [*before, *(f"...{middle - i}" for i in range(middle)), *after]


def _reduce(step: Step) -> Layout:
    if operator_name(step.node) not in ("aten.sum.dim_IntList", "aten.mean.dim"):
        raise step.fail()
    layout = step.layout(step.first)
    dims = {step.features(layout, d) for d in step.bound["dim"] or range(len(layout))}
    kept = step.bound["keepdim"]
    return tuple(() if i in dims else axis for i, axis in enumerate(layout) if kept or i not in dims)


def _view(step: Step) -> Layout:
    layout = reshaped(step.layout(step.first), step.sizes)
    if layout is None:
        raise step.fail("reshapes positions and features into one another")
    return layout


def _permute(step: Step) -> Layout:
    layout = step.layout(step.first)
    return tuple(layout[d] for d in step.bound["dims"])


def _transpose(step: Step) -> Layout:
    axes = list(step.layout(step.first))
    name = operator_name(step.node).split(".")[1]
    if name == "numpy_T" or len(axes) < 2:
        return tuple(reversed(axes))
    a, b = list(step.bound.values())[1:3] if name in ("transpose", "swapaxes") else (-2, -1)
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _expand(step: Step) -> Layout:
    layout = step.layout(step.first)
    result = []
    for back in range(len(step.sizes), 0, -1):
        axis = layout[-back] if len(layout) >= back else ()
        if not axis and not isinstance(step.sizes[-back], int):
            raise step.fail("repeats features along a dynamic axis")
        result.append(axis or run(step.sizes[-back]))
    return tuple(result)


def _resized(step: Step, layout: Layout) -> Layout:
    """Operators that keep the number of axes: wherever a size changes, the axis must hold features alone."""
    sizes = extents(step.first.meta["val"])
    sizes = [1] * (len(step.sizes) - len(sizes)) + sizes
    layout = ((),) * (len(sizes) - len(layout)) + layout
    result = []
    for dim, (old, new) in enumerate(zip(sizes, step.sizes, strict=True)):
        if old != new:
            step.features(layout, dim)
            if not isinstance(new, int):
                raise step.fail("makes a dynamic number of features")
        result.append(layout[dim] if old == new else run(new))
    return tuple(result)


def _changed(step: Step) -> Layout:
    return _resized(step, step.layout(step.first))


def _pool(step: Step) -> Layout:
    """Averages over neighbouring features; the name of the operator says along how many axes."""
    layout = step.layout(step.first)
    axes = next(n for n in (1, 2, 3) if f"pool{n}d" in operator_name(step.node))
    for dim in range(-axes, 0):
        step.features(layout, dim)
    return _resized(step, layout)


def _slice(step: Step) -> Layout:
    layout = step.layout(step.first)
    dynamic = any(isinstance(step.bound.get(bound), Node) for bound in ("start", "end"))
    if dynamic and not tokens(layout[step.bound["dim"]]):
        raise step.fail("cuts features at a dynamic size")
    return _resized(step, layout)


def _along(step: Step) -> Layout:
    """Operators that move values along the axes they name, whether or not a size changes."""
    layout = step.only("self", "index")
    dims = step.bound.get("dims", step.bound.get("dim"))
    if operator_name(step.node) == "aten.real.default":
        return layout
    if dims is None or dims == []:
        raise step.fail("works on all axes at once")
    for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
        step.features(layout, dim)
    return _resized(step, layout)


def _pad(step: Step) -> Layout:
    layout = step.layout(step.first)
    for i, amount in enumerate(step.bound["pad"]):
        if amount != 0:
            step.features(layout, -1 - i // 2)
    return _resized(step, layout)


def _select(step: Step) -> Layout:
    layout = step.layout(step.first)
    dim = step.features(layout, step.bound["dim"])
    return (*layout[:dim], *layout[dim + 1 :])


def _index(step: Step) -> Layout:
    layout, indices = step.layout(step.first), list(step.bound["indices"])
    used = [i for i, index in enumerate(indices) if index is not None]
    if len(used) != 1 or step.reads(indices[used[0]]) or indices[used[0]].meta["val"].dim() != 1:
        raise step.fail("gathers along several axes")
    dim = step.features(layout, used[0])
    return (*layout[:dim], run(step.sizes[dim]), *layout[dim + 1 :])


def _unbind(step: Step) -> list[Layout]:
    layout = step.layout(step.first)
    dim = step.features(layout, step.bound.get("dim", 0))
    whole = step.node.meta["val"]
    if kind(step.node) == "unbind":
        return [(*layout[:dim], *layout[dim + 1 :])] * len(whole)
    return [(*layout[:dim], run(extents(part)[dim]), *layout[dim + 1 :]) for part in whole]


def _getitem(step: Step) -> Layout:
    source, index = step.bound.values()
    return step.known[source][index]


def _cat(step: Step) -> Layout:
    """Values side by side along one axis of features: cat, and slice_scatter (one overwrites a part of the other)."""
    values = step.first if kind(step.node) == "cat" else list(step.bound.values())[:2]
    if kind(step.node) == "slice_scatter" and extents(values[1].meta["val"]) == step.sizes:
        return _copy(step)
    return _side_by_side(step, values)


def _side_by_side(step: Step, values: Iterable[Any]) -> Layout:
    """Values that share every axis but `dim`, which holds features alone."""
    region, constants = operands(step, values)
    dim = step.bound["dim"] % len(step.sizes)
    for layout in region:
        step.features(layout, dim)
    result = []
    for i, size in enumerate(step.sizes):
        axes, tables = [layout[i] for layout in region], [(c, i) for c in constants]
        result.append(run(size) if i == dim else broadcast(step, axes, tables, size))
    return tuple(result)


def _scatter(step: Step) -> Layout:
    """Features written, or added, where a constant says that is the same for every position."""
    index, dim = step.bound["index"], step.bound["dim"] % len(step.sizes)
    if step.reads(index) or extents(index.meta["val"]) != extents(step.bound["src"].meta["val"]):
        raise step.fail("writes where an activation says")
    if any(step.free.varies(index, axis) for axis in range(len(step.sizes)) if axis != dim):
        raise step.fail("writes to other places from position to position")
    return _side_by_side(step, (step.bound["self"], step.bound["src"]))


def _as_complex(step: Step) -> Layout:
    layout = step.layout(step.first)
    step.features(layout, -1)
    return layout[:-1]


def _as_real(step: Step) -> Layout:
    return (*step.layout(step.first), run(2))


def _index_put(step: Step) -> Layout:
    """Features written, or added, at constant places along one axis of another value."""
    bound = dict(step.bound)
    if "indices" in bound:
        used = [i for i, index in enumerate(bound["indices"]) if index is not None]
        whole, part = bound["self"], bound["values"]
        if len(used) != 1 or whole.meta["val"].dim() != part.meta["val"].dim():
            raise step.fail("writes along several axes")
        bound |= {"dim": used[0], "index": bound["indices"][used[0]], "source": part}
    if step.reads(bound["index"]) or bound["index"].meta["val"].dim() != 1:
        raise step.fail("writes where an activation says")
    return _side_by_side(replace(step, bound=bound), (bound["self"], bound["source"]))


def _select_scatter(step: Step) -> Layout:
    """One value of an axis of features overwritten."""
    region, constants = operands(step, (step.bound["self"], step.bound["src"]))
    dim, rank = step.bound["dim"] % len(step.sizes), len(step.sizes)
    wide = [(*axes[:dim], (), *axes[dim:]) if len(axes) < rank else axes for axes in region]
    for axes in wide:
        step.features(axes, dim)
    result = []
    for i, size in enumerate(step.sizes):
        tables = [(c, i - (i > dim) * (c is step.bound["src"])) for c in constants]
        tables = [t for t in tables if i != dim]
        result.append(run(size) if i == dim else broadcast(step, [axes[i] for axes in wide], tables, size))
    return tuple(result)


def _pointwise(step: Step) -> Layout:
    """Sums and choices with constant weights, in one operator: where, masked_fill, lerp, addcmul, addcdiv."""
    name = operator_name(step.node).removeprefix("aten.").split(".")[0]
    fixed = {
        "where": ["condition"],
        "masked_fill": ["mask", "value"],
        "lerp": ["weight"],
        "addcdiv": ["tensor2"],
    }
    if name not in (*fixed, "addcmul"):
        raise step.fail()
    if any(step.reads(step.bound.get(one)) for one in fixed.get(name, ())):
        raise step.fail("decides by an activation" if name != "addcdiv" else "divides by an activation")
    if name in ("addcmul", "addcdiv") and all(step.reads(step.bound[n]) for n in ("tensor1", "tensor2")):
        raise step.fail("multiplies two activations")
    return _sum(step)


def _conv(step: Step) -> Layout:
    """A convolution with a kernel of one value mixes features alone, when axis 1 holds them."""
    layout = step.only("input", "weight", "bias")
    pointwise = all(k == 1 for k in step.bound["weight"].meta["val"].shape[2:])
    plain = all(_all(step.bound[name], value) for name, value in (("stride", 1), ("padding", 0)))
    if not pointwise or not plain or len(layout) != step.bound["weight"].meta["val"].dim():
        raise step.fail()
    step.features(layout, 1)
    return (layout[0], run(step.sizes[1]), *layout[2:])


def _all(value: Any, expected: int) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(v == expected or v == "valid" or (v == "same" and expected == 0) for v in values)


def _copy(step: Step) -> Layout:
    """The second operand, at the size of the first."""
    if not step.reads(step.bound["src"]):
        raise step.fail()
    return aligned(step, [step.known[step.bound["src"]]], [], step.sizes)


def _stack(step: Step) -> Layout:
    dim = step.bound["dim"] % len(step.sizes)
    body = aligned(step, *operands(step, step.first), step.sizes[:dim] + step.sizes[dim + 1 :])
    return (*body[:dim], run(step.sizes[dim]), *body[dim:])


def _batch_norm(step: Step) -> Layout:
    layout = step.only("input")
    if step.bound["training"] or step.bound["running_mean"] is None:
        raise step.fail("uses the statistics of its batch")
    if len(layout) != 2:
        raise step.fail("normalises axis 1, which is not the feature axis")
    step.features(layout, 1)
    return layout


RULES: dict[str, Callable[[Step], Layout | list[Layout]]] = {
    "add": _sum, "sub": _sum, "mul": _product, "div": _quotient, "neg": _same, "cast": _same, "identity": _same,
    "linear": _linear, "matmul": _matmul, "addmm": _addmm, "einsum": _einsum, "reduce": _reduce,
    "view": _view, "flatten": _view, "unflatten": _view, "squeeze": _view, "unsqueeze": _view,
    "permute": _permute, "transpose": _transpose, "expand": _expand, "repeat": _changed,
    "repeat_interleave": _along, "avg_pool": _pool, "slice": _slice, "narrow": _changed, "pad": _pad, "select": _select,
    "index_select": _along, "flip": _along, "roll": _along, "fft": _along, "index": _index,
    "split": _unbind, "chunk": _unbind, "unbind": _unbind, "getitem": _getitem, "cat": _cat, "stack": _stack,
    "slice_scatter": _cat, "index_put": _index_put,
    "select_scatter": _select_scatter, "copy": _copy, "binary": _pointwise, "conv": _conv,
    "scatter": _scatter, "as_complex": _as_complex, "as_real": _as_real, "batch_norm": _batch_norm,
}  # fmt: skip
