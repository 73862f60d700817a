"""Which values become integers: the placement of Q/DQ pairs that an execution provider turns into integer operators.

A target's `QuantSpec` lists what the provider fuses. Weighted operators are the anchors: their inputs are quantised,
and their outputs where the provider needs it. From there integers spread forward through operators that fuse and
operators that pass integers through. Every value has one quantiser, whoever reads it; a value that was only passed
through keeps the scale of its source, so that the provider sees one tensor of integers and not two. What no layer
reads in integers any more stays float: boxes, scores and logits are decoded there, and none shares another's scale.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from .errors import UsageError
from .ir import Graph
from .names import DTYPE_NAMES, operator_name, site
from .ops import arguments, is_constant, is_tensor, kind, shape
from .target import QuantSpec

Range = tuple[float, float]
CONCAT_RATIO = 8.0  # operands whose extents differ more keep scales of their own

# kind -> positions of input, weight and bias among the operator's arguments, and the weight's output channel axis
_OPERANDS = {"conv": (0, 1, 2, 0), "linear": (0, 1, 2, 0), "addmm": (1, 2, 0, 1), "matmul": (0, 1, None, 1)}


@dataclass(frozen=True)
class Operands:
    """Input, weight and bias of a weighted operator; `axis` of the weight counts its output channels."""

    input: Node
    weight: Node
    bias: Node | None
    axis: int


@dataclass
class Placement:
    """Which operators compute on integers, and which values are quantised.

    operators: integer operator -> the value that ends it (itself, or the activation that it absorbs).
    owner: quantised value -> the value whose scale it has, itself as a rule.
    floating: operators that take integers and give floats. declines: (operator, why it stays float).
    """

    graph: Graph
    spec: QuantSpec
    operators: dict[Node, Node] = field(default_factory=dict)
    owner: dict[Node, Node] = field(default_factory=dict)
    floating: set[Node] = field(default_factory=set)
    declines: list[tuple[Node, str]] = field(default_factory=list)

    def readers(self, value: Node) -> list[Node]:
        """Who reads a value's integers: everybody where there is nothing else, else those that compute on integers.

        Where integers are wanted everywhere, whoever computes at all.
        """
        if self.is_integer(value):
            return list(value.users)
        if self.spec.everywhere:
            return [user for user in value.users if user is not self.graph.output]
        return [user for user in value.users if self.takes(user)]

    def is_integer(self, value: Node) -> bool:
        """True where the runtime holds a quantised value as integers only: it has no float that others could read."""
        made = any(end is value for op, end in self.operators.items() if op not in self.floating)
        return made or self.owner[value] is not value

    def takes(self, node: Node) -> bool:
        """True for an operator that computes on integers or hands them on."""
        if node in self.operators:
            return True
        return listed(node, self.spec.transparent) and any(part in self.owner for part in _parts(node))


def listed(node: Node, names: Collection[str]) -> bool:
    """True where a table of kinds and ATen operators (`relu.default`) holds this one; constants have any name."""
    named = operator_name(node).removeprefix("aten.") in names if node.op == "call_function" else False
    return kind(node) in names or named


def operands(node: Node) -> Operands | None:
    """Operands of a convolution or matrix product, None where the operator has no such form."""
    where = _OPERANDS.get(kind(node))
    if where is None:
        return None
    values = list(arguments(node).values())
    bias = values[where[2]] if where[2] is not None else None
    return Operands(values[where[0]], values[where[1]], bias, where[3])


def place(
    graph: Graph,
    spec: QuantSpec,
    ranges: Mapping[Node, Range] | None = None,
    ignore: Collection[str] = (),
    limit: int | None = None,
    floats: Mapping[Node, str] = MappingProxyType({}),
) -> Placement:
    """Where Q/DQ pairs go. UsageError where an `ignore` pattern matches no operator that could become integer.

    ranges decide which concats share one scale; without them all do, and the values of that placement are those to
    calibrate. ignore: patterns of sites that stay float. limit: so many operators at most.
    floats: operators that stay float, and why.
    """
    plan = Placement(graph, spec)
    left = {**floats, **dict.fromkeys(_ignored(graph, spec, ignore), "left float as asked")}
    for node in graph.nodes:
        if not listed(node, spec.weighted):
            continue
        reason = left.get(node) or _refuse(node, spec)
        if reason:
            plan.declines.append((node, reason))
        elif limit is None or len(plan.operators) < limit:
            _take(plan, node)
    useful = _read_by_layers(plan)
    for node in graph.nodes:
        if _pass_on(plan, node) or node in left or not listed(node, spec.fuses):
            continue
        if limit is None or len(plan.operators) < limit:
            _fuse(plan, node, ranges, node in useful)
    _prune(plan)
    return plan


def _take(plan: Placement, node: Node) -> None:
    """A weighted operator becomes integer: its input is quantised, and its end where the provider needs that."""
    bound = operands(node)
    if bound is None:
        return
    end = node if selected(plan.graph, node) is not None else _end(node, plan.spec)
    plan.operators[node] = end
    plan.owner.setdefault(bound.input, bound.input)
    if listed(node, plan.spec.closed):
        plan.owner.setdefault(end, end)
    elif len(shape(bound.input)) >= plan.spec.float_bias_rank:
        plan.floating.add(node)


def _read_by_layers(plan: Placement) -> set[Node]:
    """Operators whose results come to a weighted one as integers, as far as kinds of operators tell."""
    spec, found = plan.spec, set[Node]()
    for node in reversed(plan.graph.nodes):
        for user in node.users:
            carries = any(listed(user, names) for names in (spec.fuses, spec.transparent, spec.absorbed))
            if user in plan.operators or ((carries or kind(user) == "getitem") and user in found):
                found.add(node)
    return found


def _pass_on(plan: Placement, node: Node) -> bool:
    """True where `node` holds the integers of another value unchanged; it then has that value's scale."""
    if node in plan.operators:
        source: Any = node.args[0] if selected(plan.graph, node) is not None else None
    else:
        carrier: Any = node.args[0] if kind(node) == "getitem" else node
        source = carrier.args[0] if listed(carrier, plan.spec.transparent) and is_tensor(node) else None
    if source not in plan.owner:
        return False
    plan.owner[node] = plan.owner[source]
    return True


def _fuse(plan: Placement, node: Node, ranges: Mapping[Node, Range] | None, useful: bool) -> None:
    """An operator becomes integer because all its operands are quantised."""
    if not any(s in plan.owner and plan.is_integer(s) for s in node.all_input_nodes):
        return
    if not useful and not plan.spec.to_the_end:
        plan.declines.append((node, "no layer reads its result in integers"))
        return
    arithmetic = kind(node) in ("add", "sub", "mul", "div")  # whose operands may be numbers
    reads: Iterable[Any] = [*arguments(node).values()][:2] if arithmetic else node.all_input_nodes
    float_operand = next((s for s in reads if s not in plan.owner), None)
    if float_operand is not None:
        computed = isinstance(float_operand, Node) and not is_constant(float_operand)
        what = f"{operator_name(float_operand)}, which is float" if computed else "a constant"
        plan.declines.append((node, f"it also reads {what}"))
    elif ranges is not None and kind(node) == "cat" and (reason := _uneven(plan, node, ranges)):
        plan.declines.append((node, reason))
    else:
        plan.operators[node] = end = _end(node, plan.spec)
        plan.owner.setdefault(end, end)


def _uneven(plan: Placement, node: Node, ranges: Mapping[Node, Range]) -> str:
    """Why the operands of a concat cannot share a scale; empty where they can. A constant 0 fits any scale."""
    found = [ranges[plan.owner[source]] for source in node.all_input_nodes]
    extents = [max(high, 0.0) - min(low, 0.0) for low, high in found]
    widest, narrowest = max(extents), min((e for e in extents if e > 0), default=0.0)
    if widest <= CONCAT_RATIO * narrowest or not widest:
        return ""
    return f"its operands span {widest:.3g} and {narrowest:.3g}: with one scale the narrower would keep few levels"


def _prune(plan: Placement) -> None:
    """Drops values that were passed on to nobody who computes on integers."""
    for node in reversed(plan.graph.nodes):
        if not listed(node, plan.spec.transparent):
            continue
        parts = _parts(node)
        if not any(plan.takes(user) for part in parts for user in part.users):
            for part in parts:
                plan.owner.pop(part, None)


def _parts(node: Node) -> list[Node]:
    """The tensors that a node stands for: itself, or what is taken out of the tuple that it gives."""
    return [node] if is_tensor(node) else list(node.users)


def selected(graph: Graph, node: Node) -> torch.Tensor | None:
    """Which input channel each output of a 1x1 convolution copies [outs], -1 for zeros; None where it computes more."""
    bound = operands(node)
    if kind(node) != "conv" or bound is None or bound.bias is not None or not is_constant(bound.weight):
        return None
    weight = graph.tensor(bound.weight)
    if any(size != 1 for size in weight.shape[2:]) or arguments(node)["groups"] != 1:
        return None
    rows = weight.reshape(weight.shape[0], -1)
    if not bool(((rows == 0) | (rows == 1)).all() and (rows.sum(1) <= 1).all()):
        return None
    return torch.where(rows.sum(1) == 1, rows.argmax(1), -1)


def _end(node: Node, spec: QuantSpec) -> Node:
    """The activation that vanishes into the quantiser behind `node`, or `node` itself."""
    if len(node.users) != 1:
        return node
    reader = next(iter(node.users))
    return reader if listed(reader, spec.absorbed) and _clips_at_zero(reader) else node


def _clips_at_zero(node: Node) -> bool:
    """True for max(x, 0), with or without an upper end: unsigned integers with zero point 0 do that by themselves.

    Any other lower end would have to be a whole number of steps below 0.
    """
    bound = arguments(node)
    plain = operator_name(node) in ("aten.relu.default", "aten.relu6.default")
    return plain or bound.get("min_val", bound.get("min")) == 0


def _refuse(node: Node, spec: QuantSpec) -> str:
    """Why a weighted operator stays float; empty where it need not."""
    bound = operands(node)
    if bound is None:
        return "no integer form of it is known"
    source = bound.input
    while listed(source, spec.transparent) and is_tensor(source):
        source = source.all_input_nodes[0]
    if kind(source) == "softmax":
        return "it averages over a distribution, whose small shares would be rounded to nothing"
    if kind(bound.weight) == "dequantize":
        return "its weight is quantised already"
    if not is_constant(bound.weight):
        return "both its operands change from sample to sample"
    dtype = bound.input.meta["val"].dtype
    if dtype != torch.float32:
        return f"it computes in {DTYPE_NAMES.get(dtype, dtype)}; integers are made from f32"
    if kind(node) != "conv" and len(shape(bound.weight)) != 2:
        return f"its weight has {len(shape(bound.weight))} axes, not 2"
    if kind(node) == "conv" and (width := _narrow(node, bound.weight, spec)):
        return f"its groups of {width} channels are slower in integers"
    if kind(node) == "conv" and (products := math.prod(shape(bound.weight)[1:])) < spec.products:
        return f"a sum of {products} products is slower in integers"
    if bound.bias is not None and not (is_constant(bound.bias) and len(shape(bound.bias)) == 1):
        return "its bias is no constant vector"
    if any(arguments(node).get(factor, 1) != 1 for factor in ("alpha", "beta")):
        return "it scales its operands by alpha or beta"
    return ""


def _narrow(node: Node, weight: Node, spec: QuantSpec) -> int:
    """Channels a group of a convolution that are too few for integers; 0 where they are not."""
    outs, width = shape(weight)[:2]
    groups = arguments(node)["groups"]
    return 0 if groups == 1 or (width == 1 and outs == groups) or width >= spec.group_width else width


def _ignored(graph: Graph, spec: QuantSpec, patterns: Collection[str]) -> set[Node]:
    kinds = {*spec.weighted, *spec.fuses, "embedding"}
    return ignored([n for n in graph.nodes if listed(n, kinds)], patterns)


def ignored(could: Collection[Node], patterns: Collection[str]) -> set[Node]:
    """Operators whose site matches a pattern (`layer1.*`) or lies under it; UsageError where one matches none."""
    found: set[Node] = set()
    for pattern in patterns:
        matches = {n for n in could if under(n, pattern)}
        if not matches:
            sites = ", ".join(sorted({site(n) for n in could})[:5])
            raise UsageError(
                f"ignore={pattern} matches no operator that could change; there are {sites}, ..."
            )
        found |= matches
    return found


def under(node: Node, pattern: str) -> bool:
    """Whether an operator's site matches a pattern, or lies under it."""
    return fnmatch(site(node), pattern) or fnmatch(site(node), f"{pattern}.*")
