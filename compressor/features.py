"""Which operators are affine in the feature axis, token by token: a layout for every value, one rule a kind.

A region starts at an entry x [tokens..., features]. Every value in it must hold each token of x exactly once, and mix
nothing but the features of one token. A *layout* says where they lie: an axis is a product of atoms, and an atom is
either one token axis of x or a run of features. `view(B, T, heads, d)` splits features, `view(B * T, d)` joins tokens,
`transpose` moves both; all are followed exactly, dynamic sizes included. The rules decide structurally; `affine.py`
proves the outcome with numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from .constants import DataFree, is_random
from .ir import operator_name, site
from .ops import arguments, is_tensor, kind

Size = Any  # an int, or the sympy expression of a dynamic size


@dataclass(frozen=True)
class Atom:
    """A factor of an axis: `token` is the axis of the entry that it runs along, None for features."""

    size: Size
    token: int | None = None


Axis = tuple[Atom, ...]  # the first atom is the slowest; an axis of size 1 has none
Layout = tuple[Axis, ...]


class NotAffine(Exception):
    """An operator on the way is not affine in the features of one token; the message names it."""

    def __init__(self, node: Node, why: str = "is not affine") -> None:
        name = operator_name(node).removesuffix(".default")
        super().__init__(f"{name} at {site(node)} {why}")


class Foreign(Exception):
    """An operator reads another activation, so that it is no function of the entry alone."""


@dataclass(frozen=True)
class Step:
    """One operator, seen from the entry: the layouts of what it reads, and what is known of the rest."""

    node: Node
    known: Mapping[Node, Any]
    free: DataFree
    bound: Mapping[str, Any]

    def fail(self, why: str = "is not affine") -> NotAffine:
        return NotAffine(self.node, why)

    def reads(self, value: Any) -> bool:
        """True for a value of the region."""
        return isinstance(value, Node) and value in self.known

    def layout(self, value: Any) -> Layout:
        if not self.reads(value):
            raise self.fail()
        return self.known[value]

    def only(self, name: str, *constants: str) -> Layout:
        """The layout of one operand, when the operands named `constants` are no values of the region."""
        if any(self.reads(self.bound.get(c)) for c in constants):
            raise self.fail("multiplies two activations" if self.reads(self.bound[name]) else "is not affine")
        return self.layout(self.bound[name])

    def features(self, layout: Layout, dim: int) -> int:
        """The axis `dim`, made positive, when it holds features alone."""
        dim %= max(1, len(layout))
        if any(a.token is not None for a in layout[dim]):
            raise self.fail(f"works along axis {dim}, which holds more than the features of one position")
        return dim

    @property
    def sizes(self) -> list[Size]:
        return sizes_of(self.node.meta["val"])


def start(entry: Node) -> Layout:
    """The layout of the entry itself: its last axis holds the features, the others are tokens."""
    *tokens, last = sizes_of(entry.meta["val"])
    axes = [() if s == 1 else (Atom(s, i),) for i, s in enumerate(tokens)]
    return (*axes, _run(last))


def is_exit(layout: Layout, entry: Layout) -> bool:
    """True when a value has the entry's token axes, in order, and then one axis of features."""
    if len(layout) != len(entry) or any(a.token is not None for a in layout[-1]):
        return False
    return all(_tokens(a) == _tokens(b) and a == b for a, b in zip(layout[:-1], entry[:-1], strict=True))


def follow(node: Node, known: Mapping[Node, Any], free: DataFree) -> Layout | list[Layout]:
    """The layout of what `node` computes (a list for several outputs). Raises NotAffine or Foreign."""
    for operand in node.all_input_nodes:
        if operand not in known and operand not in free and not _shape_only(node, operand):
            raise Foreign
    rule = RULES.get(kind(node))
    if rule is None or is_random(node):
        raise NotAffine(node, "is random" if is_random(node) else "is not affine")
    value = node.meta["val"]
    if isinstance(value, Tensor) and not (value.dtype.is_floating_point or value.dtype.is_complex):
        raise NotAffine(node, "gives integers")
    return rule(Step(node, known, free, arguments(node)))


def sizes_of(value: Tensor) -> list[Size]:
    """Sizes as ints and sympy expressions; comparing them adds no guard."""
    return [s if isinstance(s, int) else s.node.expr for s in value.shape]


# -------------------------------------------------------------------- layouts


def _run(size: Size) -> Axis:
    return () if size == 1 else (Atom(size),)


def _tokens(axis: Axis) -> list[int]:
    return [a.token for a in axis if a.token is not None]


def _divide(whole: Size, part: Size) -> Size | None:
    """whole / part when that is a whole number for every value of the dynamic sizes."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    quotient = sympy.cancel(sympy.sympify(whole) / sympy.sympify(part))
    if sympy.fraction(quotient)[1] != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient


def _reshaped(step: Step, layout: Layout) -> Layout:
    """The layout after a reshape to the node's own sizes: atoms are dealt out to the axes in order."""
    atoms = [a for axis in layout for a in axis]
    result = []
    for size in step.sizes:
        axis: list[Atom] = []
        while size != 1:
            head = atoms[0] if atoms else Atom(0)
            rest = _divide(size, head.size)
            if rest is not None:
                atoms.pop(0)
            else:
                left = _divide(head.size, size) if head.token is None else None
                if left is None:
                    raise step.fail("reshapes positions and features into one another")
                head, atoms[0], rest = Atom(size), Atom(left), 1
            axis.append(head)
            size = rest
        result.append(_joined(axis))
    return tuple(result)


def _joined(atoms: list[Atom]) -> Axis:
    """Neighbouring features are one run."""
    axis: list[Atom] = []
    for atom in atoms:
        if axis and axis[-1].token is None and atom.token is None:
            axis[-1] = Atom(axis[-1].size * atom.size)
        else:
            axis.append(atom)
    return tuple(axis)


def _broadcast(step: Step, axes: list[Axis], constants: list[tuple[Node, int]], size: Size) -> Axis:
    """One axis of a result: the same atoms in every operand of the region, and no constant that tells tokens apart."""
    present = {a for a in axes if a}
    if len(present) > 1:
        raise step.fail("combines different positions")
    axis = present.pop() if present else ()
    for node, dim in constants:
        if node.meta["val"].shape[dim] == 1:
            continue
        if not axis and not isinstance(size, int):
            raise step.fail("repeats features along a dynamic axis")
        if _tokens(axis) and step.free.varies(node, dim):
            raise step.fail("brings in a constant that differs from position to position")
    return axis or _run(size)


def _aligned(step: Step, layouts: list[Layout], constants: list[Node], sizes: list[Size]) -> Layout:
    """Broadcasting over trailing axes, all of them."""
    result = []
    for back in range(len(sizes), 0, -1):
        axes = [layout[-back] for layout in layouts if len(layout) >= back]
        consts = [(c, c.meta["val"].dim() - back) for c in constants if c.meta["val"].dim() >= back]
        result.append(_broadcast(step, axes, consts, sizes[-back]))
    return tuple(result)


def _operands(step: Step, values: Any) -> tuple[list[Layout], list[Node]]:
    region = [step.known[v] for v in values if step.reads(v)]
    return region, [v for v in values if is_tensor(v) and not step.reads(v)]


def _shape_only(node: Node, operand: Node) -> bool:
    """True when an operator looks at the shape or dtype of an operand, never at its data."""
    name = operator_name(node)
    if name in ("aten.type_as.default", "aten.to.other", "aten.expand_as.default", "aten.view_as.default"):
        return operand is not node.args[0]
    return not is_tensor(operand)


# -------------------------------------------------------------------- rules


def _sum(step: Step) -> Layout:
    return _aligned(step, *_operands(step, step.node.args), step.sizes)


def _product(step: Step) -> Layout:
    region, constants = _operands(step, step.node.args)
    if len(region) > 1:
        raise step.fail("multiplies two activations")
    return _aligned(step, region, constants, step.sizes)


def _quotient(step: Step) -> Layout:
    if step.reads(step.node.args[1]):
        raise step.fail("divides by an activation")
    return _product(step)


def _same(step: Step) -> Layout:
    return step.layout(step.node.args[0])


def _linear(step: Step) -> Layout:
    layout = step.only("input", "weight", "bias")
    step.features(layout, -1)
    return (*layout[:-1], _run(step.sizes[-1]))


def _matmul(step: Step, first: str = "", second: str = "") -> Layout:
    a, b = (step.bound[n] for n in (first, second)) if first else step.node.args[:2]
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
        _broadcast(
            step,
            [layout[-back]] if len(layout) >= back else [],
            [(constant, dims - back)] if dims >= back else [],
            sizes[-back],
        )
        for back in range(len(sizes), 2, -1)
    ]
    tail = (layout[-2], _run(sizes[-1])) if region is a else (_run(sizes[-2]), layout[-1])
    return (*lead, *tail)


def _addmm(step: Step) -> Layout:
    names = ("mat1", "mat2") if "mat1" in step.bound else ("batch1", "batch2")
    if not any(step.reads(step.bound[n]) for n in names):
        raise step.fail()
    product = _matmul(step, *names)
    added = step.bound["self"]
    layouts = [product] + ([step.known[added]] if step.reads(added) else [])
    return _aligned(step, layouts, [] if step.reads(added) else [added], step.sizes)


def _einsum(step: Step) -> Layout:
    equation, operands = str(step.node.args[0]).replace(" ", ""), list(step.node.args[1])
    region = [i for i, o in enumerate(operands) if step.reads(o)]
    if len(region) != 1:
        raise step.fail("multiplies two activations")
    terms, arrow, output = equation.partition("->")
    if not arrow:
        raise step.fail("names no output axes")
    labels = [_spell(t, o.meta["val"].dim()) for t, o in zip(terms.split(","), operands, strict=True)]
    output_labels = _spell(output, len(step.sizes))
    own = labels[region[0]]
    if len(set(own)) != len(own):
        raise step.fail("takes a diagonal")
    where = dict(zip(own, step.known[operands[region[0]]], strict=True))
    for label, axis in where.items():
        if label not in output_labels and _tokens(axis):
            raise step.fail("sums over positions")
    result = []
    for label, size in zip(output_labels, step.sizes, strict=True):
        constants = [(o, names.index(label)) for o, names in zip(operands, labels, strict=True) if o not in step.known and label in names]
        result.append(_broadcast(step, [where.get(label, ())], constants, size))
    return tuple(result)


def _spell(term: str, dims: int) -> list[str]:
    """Axis labels of one einsum term, an ellipsis written out from the right."""
    before, dots, after = term.partition("...")
    middle = dims - len(before) - len(after) if dots else 0
    return [*before, *(f"...{middle - i}" for i in range(middle)), *after]


def _reduce(step: Step) -> Layout:
    if operator_name(step.node) not in ("aten.sum.dim_IntList", "aten.mean.dim"):
        raise step.fail()
    layout = step.layout(step.node.args[0])
    dims = {step.features(layout, d) for d in step.bound["dim"] or range(len(layout))}
    kept = step.bound["keepdim"]
    return tuple(() if i in dims else axis for i, axis in enumerate(layout) if kept or i not in dims)


def _view(step: Step) -> Layout:
    return _reshaped(step, step.layout(step.node.args[0]))


def _permute(step: Step) -> Layout:
    layout = step.layout(step.node.args[0])
    return tuple(layout[d] for d in step.bound["dims"])


def _transpose(step: Step) -> Layout:
    axes = list(step.layout(step.node.args[0]))
    name = operator_name(step.node).split(".")[1]
    if name == "numpy_T" or len(axes) < 2:
        return tuple(reversed(axes))
    a, b = (step.node.args[1], step.node.args[2]) if name in ("transpose", "swapaxes") else (-2, -1)
    if name == "adjoint":
        raise step.fail()
    axes[a], axes[b] = axes[b], axes[a]  # type: ignore[index]
    return tuple(axes)


def _expand(step: Step) -> Layout:
    layout = step.layout(step.node.args[0])
    result = []
    for back in range(len(step.sizes), 0, -1):
        axis = layout[-back] if len(layout) >= back else ()
        if not axis and not isinstance(step.sizes[-back], int):
            raise step.fail("repeats features along a dynamic axis")
        result.append(axis or _run(step.sizes[-back]))
    return tuple(result)


def _resized(step: Step, layout: Layout) -> Layout:
    """Operators that keep the number of axes: wherever a size changes, the axis must hold features alone."""
    sizes = sizes_of(step.node.args[0].meta["val"])  # type: ignore[union-attr]
    sizes = [1] * (len(step.sizes) - len(sizes)) + sizes
    layout = ((),) * (len(sizes) - len(layout)) + layout
    result = []
    for dim, (old, new) in enumerate(zip(sizes, step.sizes, strict=True)):
        if old != new:
            step.features(layout, dim)
        result.append(layout[dim] if old == new else _run(new))
    return tuple(result)


def _changed(step: Step) -> Layout:
    return _resized(step, step.layout(step.node.args[0]))


def _along(step: Step) -> Layout:
    """Operators that move values along the axes they name, whether or not a size changes."""
    layout = step.only("self", "index")
    dims = step.bound.get("dims", step.bound.get("dim"))
    for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
        step.features(layout, dim)
    return _resized(step, layout)


def _select(step: Step) -> Layout:
    layout = step.layout(step.node.args[0])
    dim = step.features(layout, step.bound["dim"])
    return (*layout[:dim], *layout[dim + 1 :])


def _index(step: Step) -> Layout:
    layout, indices = step.layout(step.node.args[0]), list(step.node.args[1])
    used = [i for i, index in enumerate(indices) if index is not None]
    if len(used) != 1 or step.reads(indices[used[0]]) or indices[used[0]].meta["val"].dim() != 1:
        raise step.fail("gathers along several axes")
    dim = step.features(layout, used[0])
    return (*layout[:dim], _run(step.sizes[dim]), *layout[dim + 1 :])


def _unbind(step: Step) -> list[Layout]:
    layout = step.layout(step.node.args[0])
    dim = step.features(layout, step.bound.get("dim", 0))
    whole = step.node.meta["val"]
    if kind(step.node) == "unbind":
        return [(*layout[:dim], *layout[dim + 1 :])] * len(whole)
    return [(*layout[:dim], _run(sizes_of(part)[dim]), *layout[dim + 1 :]) for part in whole]


def _getitem(step: Step) -> Layout:
    return step.known[step.node.args[0]][step.node.args[1]]


def _cat(step: Step) -> Layout:
    values = list(step.node.args[0])
    region, constants = _operands(step, values)
    stacked = kind(step.node) == "stack"
    dim = step.bound["dim"] % len(step.sizes)
    if stacked:
        sizes = step.sizes[:dim] + step.sizes[dim + 1 :]
        body = _aligned(step, region, constants, sizes)
        return (*body[:dim], _run(len(values)), *body[dim:])
    for layout in region:
        step.features(layout, dim)
    blank = [(*layout[:dim], (), *layout[dim + 1 :]) for layout in region]
    sizes = [1 if i == dim else s for i, s in enumerate(step.sizes)]
    others = [_broadcast(step, [b[i] for b in blank], [(c, i) for c in constants], s) for i, s in enumerate(sizes) if i != dim]
    return (*others[:dim], _run(step.sizes[dim]), *others[dim:])


def _scatter(step: Step) -> Layout:
    """slice_scatter: a slice of one value is overwritten by another value, along features."""
    region, constants = _operands(step, step.node.args[:2])
    dim = step.bound["dim"] % len(step.sizes)
    for layout in region:
        step.features(layout, dim)
    blank = [(*layout[:dim], (), *layout[dim + 1 :]) for layout in region]
    others = [
        _broadcast(step, [b[i] for b in blank], [(c, i) for c in constants], s)
        for i, s in enumerate(step.sizes)
        if i != dim
    ]
    return (*others[:dim], _run(step.sizes[dim]), *others[dim:])


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
    "repeat_interleave": _along, "slice": _changed, "narrow": _changed, "pad": _changed, "select": _select,
    "index_select": _along, "flip": _along, "roll": _along, "fft": _along, "index": _index,
    "split": _unbind, "chunk": _unbind, "unbind": _unbind, "getitem": _getitem, "cat": _cat, "stack": _cat,
    "scatter": _scatter, "batch_norm": _batch_norm,
}  # fmt: skip
