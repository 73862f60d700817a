"""Values that depend on no input: which they are, along which axes they vary, and folding them into one tensor.

A value that depends on parameters alone (a DoRA norm, an OFT rotation, a causal mask) is computed once, here, in the
dtype and by the operators of the model itself, so folding changes no bit of it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .ir import Graph, draws
from .names import operator_name, site
from .ops import arguments, extents, is_tensor, kind

_UNINITIALISED = frozenset({"aten.empty.memory_format", "aten.empty_like.default"})
_UNIFORM = ("zeros", "ones", "full", "scalar_tensor", "new_zeros", "new_ones", "new_full")
_LIKE_OTHER = frozenset(
    f"aten.{n}"
    for n in ("type_as.default", "to.other", "expand_as.default", "view_as.default", "reshape_as.default")
)
_POINTWISE = frozenset({"activation", "add", "sub", "mul", "div", "neg", "binary", "cast", "identity"})
_REARRANGING = frozenset(
    {"view", "flatten", "unflatten", "permute", "transpose", "unsqueeze", "squeeze", "expand", "repeat", "cat",
     "stack", "getitem", "create_like"}
)  # fmt: skip
_MOVING = frozenset(
    {"view", "flatten", "unflatten", "permute", "transpose", "repeat", "slice", "narrow"}
)  # values of one operand, elsewhere
_INDEXING = frozenset({"reduce", "slice", "narrow", "select", "split", "chunk", "unbind", "flip"})


@dataclass
class Folding:
    """What folding did: (site, what) of each new constant, and (node, reason) of each that was left."""

    made: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[Node, str]] = field(default_factory=list)


def fold_constants(graph: Graph, max_bytes: int, limit: int | None = None) -> Folding:
    """Replaces every largest subgraph that depends on tensors of the graph alone by one tensor.

    max_bytes: how much larger than the tensors it is made from a constant may be; a bigger one is left, with its
    reason. limit: at most so many. Random operators, dequantisers, fake quantisers, uninitialised memory and whatever
    is not an ATen operator are never folded, nor is a value that the graph returns.
    """
    folding = Folding()
    constant = _foldable(graph, max_bytes, folding)
    results = set(graph.results)
    unknown = False  # whether a size that was symbolic is now a number
    for node in graph.nodes:
        if limit is not None and len(folding.made) >= limit:
            break
        if node.op != "call_function" or node not in constant or node in results or not is_tensor(node):
            continue
        if all(user in constant and user not in results for user in node.users):
            continue
        under = ancestors(node)
        source = _unchanged(node)
        if source is None:
            name = node.name if site(node) == node.name else f"{site(node)}.{node.name}"
            value = _compute(graph, under)
            growth = _tensor_bytes(value) - sum(_bytes(n) for n in under if n.op == "get_attr")
            if growth > max_bytes:  # its size was not known before
                folding.left.append((node, _too_big(growth, max_bytes)))
                continue
            source = graph.add_tensor(name, value)
        graph.replace_uses(node, source)
        count = sum(1 for n in under if n.op == "call_function")
        folding.made.append((site(node), f"{count} operator{'s' * (count > 1)} on constants into one tensor"))
        unknown |= extents(node.meta["val"]) != list(source.meta["val"].shape)
    if unknown:
        graph.reinfer()
    if folding.made:
        graph.clean()
    return folding


def constant_value(graph: Graph, node: Node) -> Tensor | None:
    """What a node computes from tensors of the graph alone; None where something else has a part in it."""
    under = ancestors(node)
    if not all(n.op == "get_attr" or (n.op == "call_function" and is_pure(n)) for n in under):
        return None
    return _compute(graph, under)


def is_random(node: Node) -> bool:
    """True for an operator that draws numbers; dropout and attention only where their dropout is active."""
    if not draws(node):
        return False
    bound = arguments(node)
    if kind(node) == "identity" and "train" in bound:
        return bool(bound["train"]) and bound["p"] != 0
    if kind(node) == "attention":
        return bound["dropout_p"] != 0
    return bool(bound.get("training", True))


def is_uninitialised(node: Node) -> bool:
    """True for memory that nothing has been written into: its values mean nothing."""
    return operator_name(node) in _UNINITIALISED or operator_name(node).startswith("aten.new_empty")


def shape_only(node: Node, operand: Node) -> bool:
    """True when an operator looks at the shape, dtype or device of an operand, never at its data."""
    if not is_tensor(operand):
        return not isinstance(operand.meta["val"], (list, tuple))
    name = operator_name(node)
    if kind(node) == "create_like":
        return not name.startswith(("aten.tril.", "aten.triu."))
    if kind(node) == "copy":
        return operand is not node.args[1]
    return name in _LIKE_OTHER and operand is not node.args[0]


class DataFree:
    """The values that neither an input's data nor its size reaches: sizes may shape them, never fill them.

    `zeros([batch, 5, 3])` is data-free but has no fixed shape, so it cannot be folded; `arange(batch)` is not, and
    neither is `ones(batch).sum()`, which counts.
    Size nodes themselves count as data-free, so that operators may mention them.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes: set[Node] = set()
        self._equal: dict[tuple[Node, int], bool] = {}
        for node in graph.graph.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and self._follows(node)):
                self._nodes.add(node)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def varies(self, node: Node, axis: int) -> bool:
        """False where the value is known to be the same all along an axis (of the node's own shape)."""
        if node.meta["val"].shape[axis] == 1:
            return False
        if node.op == "get_attr":
            return self._tensor_varies(node, axis)
        which, name = kind(node), operator_name(node).removeprefix("aten.").split(".")[0]
        if which in ("create", "create_like"):
            return not (name.endswith("_like") or name in _UNIFORM)
        from_end = axis - node.meta["val"].dim()
        if which == "expand":
            return self._operand_varies(node.all_input_nodes[0], from_end)
        if which in _POINTWISE:
            return any(self._operand_varies(n, from_end) for n in node.all_input_nodes if is_tensor(n))
        if which in ("linear", "embedding"):
            source = arguments(node)["input" if which == "linear" else "indices"]
            last = axis == node.meta["val"].dim() - 1
            return last or self.varies(source, axis)
        if which in _MOVING:
            source = node.all_input_nodes[0]
            whence = _axis_of_source(node, source, axis)
            axes = range(source.meta["val"].dim()) if whence is None else [whence]
            return any(self.varies(source, i) for i in axes)
        return True

    def _follows(self, node: Node) -> bool:
        which = kind(node)
        if which == "size":
            return True
        if not is_pure(node):
            return False
        data = [n for n in node.all_input_nodes if not shape_only(node, n)]
        if not all(n in self._nodes for n in data):
            return False
        if which not in _POINTWISE | _REARRANGING and not (
            _works_along_fixed_axes(node, data) or self._takes_one_of_equals(node)
        ):
            return False
        if len(data) == len(node.all_input_nodes):
            return True
        name = operator_name(node).removeprefix("aten.").split(".")[0]
        shaped = name in _UNIFORM or which in ("create_like", "expand", "view", "unflatten", "repeat")
        return shaped and not _fills_with_size(node)

    def _takes_one_of_equals(self, node: Node) -> bool:
        """True for the first entry along an axis whose entries are all equal."""
        bound = arguments(node)
        if kind(node) != "slice" or (bound["start"] or 0, bound["end"], bound["step"]) != (0, 1, 1):
            return False
        source: Node = bound["self"]
        return not self.varies(source, bound["dim"] % source.meta["val"].dim())

    def _operand_varies(self, operand: Node, from_end: int) -> bool:
        dims = operand.meta["val"].dim()
        return -from_end <= dims and self.varies(operand, dims + from_end)

    def _tensor_varies(self, node: Node, axis: int) -> bool:
        if (node, axis) not in self._equal:
            tensor = self._graph.tensor(node)
            if not tensor.numel():
                return False
            self._equal[node, axis] = bool((tensor == tensor.narrow(axis, 0, 1)).all())
        return not self._equal[node, axis]


def _axis_of_source(node: Node, source: Node, axis: int) -> int | None:
    """The axis of its operand that an axis of a rearranged value is; None where that may be several."""
    which = kind(node)
    before, after = extents(source.meta["val"]), extents(node.meta["val"])
    if which in ("slice", "narrow") or (which == "repeat" and len(before) == len(after)):
        return axis
    if which == "permute":
        dims: list[int] = arguments(node)["dims"]
        return dims[axis]
    return axis if which == "view" and before[: axis + 1] == after[: axis + 1] else None


def _works_along_fixed_axes(node: Node, data: list[Node]) -> bool:
    """True where every operand has a fixed size, or the operator looks only along axes that have one."""
    tensors = [n for n in data if is_tensor(n)]
    if all(isinstance(size, int) for n in tensors for size in extents(n.meta["val"])):
        return True
    if kind(node) in ("linear", "embedding"):
        bound = arguments(node)
        whole = [n for n in (bound["weight"], bound.get("bias")) if n is not None]
        return all(isinstance(size, int) for n in whole for size in extents(n.meta["val"]))
    dims = arguments(node).get("dim", arguments(node).get("dims", 0))
    if kind(node) not in _INDEXING or len(tensors) != 1 or dims is None or dims == []:
        return False
    sizes = extents(tensors[0].meta["val"])
    if kind(node) == "slice" and extents(node.meta["val"]) == sizes:  # all of it
        return True
    return all(isinstance(sizes[d], int) for d in ([dims] if isinstance(dims, int) else dims))


def _fills_with_size(node: Node) -> bool:
    """True when a number in the value is a dynamic size: `full([3], batch)`."""
    bound = arguments(node)
    return any(
        isinstance(bound.get(name), Node) and not is_tensor(bound[name]) for name in ("fill_value", "s")
    )


def is_pure(node: Node) -> bool:
    """True for an ATen operator whose value its operands alone decide."""
    if node.target is operator.getitem:
        return True
    if not operator_name(node).startswith("aten.") or is_uninitialised(node):
        return False
    return kind(node) not in ("dequantize", "fake_quantize", "assertion") and not is_random(node)


def _foldable(graph: Graph, max_bytes: int, folding: Folding) -> set[Node]:
    """Tensors, and operators that read nothing else and whose value is not much bigger than what it is made of."""
    constant: dict[Node, frozenset[Node]] = {}  # with the tensors that it is made of
    for node in graph.nodes:
        if node.op == "get_attr":
            constant[node] = frozenset([node])
            continue
        if node.op != "call_function" or not all(n in constant for n in node.all_input_nodes):
            continue
        if not is_pure(node) and kind(node) != "size":
            continue
        sources = frozenset().union(*(constant[n] for n in node.all_input_nodes))
        growth = _bytes(node) - sum(map(_bytes, sources))
        if growth > max_bytes:
            folding.left.append((node, _too_big(growth, max_bytes)))
            continue
        constant[node] = sources
    return set(constant)


def _too_big(growth: int, max_bytes: int) -> str:
    return f"as a constant it would add {growth:,} bytes, more than max_bytes={max_bytes:,}"


def _bytes(node: Node) -> int:
    """Bytes of a value; a size that depends on data (`nonzero`) counts 1 until it is known."""
    value = node.meta["val"]
    values = value if isinstance(value, (list, tuple)) else (value,)
    return sum(_tensor_bytes(v) for v in values if isinstance(v, Tensor))


def _tensor_bytes(value: Tensor) -> int:
    return math.prod(s for s in value.shape if isinstance(s, int)) * value.dtype.itemsize


def ancestors(node: Node, stop: Callable[[Node], bool] = lambda node: False) -> list[Node]:
    """The node and everything below it, in an order that can be computed; without what `stop` is true of."""
    seen: dict[Node, None] = {}
    stack = [(node, False)]
    while stack:
        current, ready = stack.pop()
        if ready:
            seen[current] = None
        elif current not in seen:
            stack.append((current, True))
            stack.extend((n, False) for n in current.all_input_nodes if n not in seen and not stop(n))
    return list(seen)


def _unchanged(node: Node) -> Node | None:
    """The tensor that a chain of identities on a tensor hands through, so that it keeps its name."""
    while node.op == "call_function":
        source = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
        if source is None or not is_tensor(source) or kind(node) not in ("identity", "cast"):
            return None
        if source.meta["val"].dtype != node.meta["val"].dtype:
            return None
        node = source
    return node


def _compute(graph: Graph, nodes: list[Node]) -> Tensor:
    env: dict[Node, Any] = {}
    with torch.no_grad():
        for node in nodes:
            env[node] = graph.execute(node, env)
    value: Tensor = env[nodes[-1]]
    return value.contiguous() if 0 in value.stride() else value
