"""What each operator costs on one sample: multiplications, and the bytes that it reads and writes.

An operator of many FLOPs a byte is bound by arithmetic, one of few by memory. Figures are those of the graph as it is:
what `fold` or the runtime fuses later no longer moves, and no processor cache is reckoned with.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from .ir import Graph
from .names import operator_name, site
from .ops import arguments, is_constant, is_tensor, kind, node_macs, sizes

# Another shape for the same memory.
_STILL = frozenset({"view", "flatten", "unflatten", "unsqueeze", "squeeze", "as_complex", "as_real"})
_NO_LAYERS = frozenset({"size", "assertion", "getitem"})
_FREE = _STILL | _NO_LAYERS | {"identity"}
_IDLE = frozenset({"slice", "narrow", "expand", "cast", "repeat"})  # free where they change nothing
_PICKING = frozenset({"embedding", "index_select", "index", "gather", "slice", "narrow", "select"})
# Arguments of which shape or type matter, not the values.
_FORM_ONLY = {"create_like": "self", "copy": "self", "expand": "other", "cast": "other"}
_VALUES_TOO = frozenset({"aten.tril.default", "aten.triu.default"})


@dataclass(frozen=True)
class Cost:
    """One operator on one sample. macs: multiply-accumulates. read, written: bytes."""

    macs: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        """Bytes moved: read and written."""
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """FLOPs (two a MAC) per byte moved; 0 for an operator that multiplies nothing."""
        return 2 * self.macs / self.bytes if self.bytes else 0.0


def cost_of(node: Node) -> Cost:
    """Cost of one operator for one sample (sizes as in `ops.sizes`).

    Every tensor that it reads counts whole and once, activations and weights in their own dtype, and so does what it
    writes; a weight that several operators read counts at each. Different are, by kind:

    - 0 bytes: view, flatten, unflatten, squeeze, unsqueeze, complex as real and back, what inference leaves out
      (dropout, clone, contiguous), and slice, expand, repeat and cast that change nothing. Permute, transpose, any
      other slice, split and expand copy in ONNX Runtime, and count.
    - embedding, index, gather, slice and select read what they pick, at most the whole, and their indices.
    - an operand that only gives its shape or type (`zeros_like(x)`) is not read.
    - attention counts its operands and its result, as one fused operator: no scores.
    """
    which = kind(node)
    if node.op != "call_function" or which in _FREE or (which in _IDLE and _changes_nothing(node)):
        return Cost(0, 0, 0)
    written = _bytes(node)
    form = None if operator_name(node) in _VALUES_TOO else arguments(node).get(_FORM_ONLY.get(which, ""))
    operands = {n: _bytes(n) for n in node.all_input_nodes if n is not form}
    if which in _PICKING:
        source = next(iter(arguments(node).values()))
        operands[source] = min(operands[source], written)
    return Cost(node_macs(node), sum(operands.values()), written)


def layers(graph: Graph) -> list[dict[str, Any]]:
    """One row an operator, as plain data: most MACs first, then most bytes.

    site: module path. node: its name in the graph. operator: its ATen name. shape: of the result, for one sample (of
    the first one where there are several). weight: shape of its weight, or None. params: numbers in the tensors that
    it reads, so that a shared one counts at each reader. macs, read, written, bytes, intensity: as in `Cost`. share: of
    all MACs, from 0 to 1. Sizes and assertions are left out.
    """
    nodes = [n for n in graph.nodes if n.op == "call_function" and kind(n) not in _NO_LAYERS]
    costs = {node: cost_of(node) for node in nodes}
    total = sum(cost.macs for cost in costs.values())
    rows = [
        {
            "site": site(node),
            "node": node.name,
            "operator": operator_name(node),
            "shape": list(next((sizes(node, tensor) for tensor in _tensors(node)), ())),
            "weight": _weight(node),
            "params": sum(graph.tensor(n).numel() for n in node.all_input_nodes if is_constant(n)),
            "macs": cost.macs,
            "share": cost.macs / total if total else 0.0,
            "read": cost.read,
            "written": cost.written,
            "bytes": cost.bytes,
            "intensity": cost.intensity,
        }
        for node, cost in costs.items()
    ]
    return sorted(rows, key=lambda row: (-row["macs"], -row["bytes"]))


def _changes_nothing(node: Node) -> bool:
    source = next(iter(node.all_input_nodes), None)
    if source is None or not (is_tensor(source) and is_tensor(node)):
        return False
    return sizes(source) == sizes(node) and source.meta["val"].dtype == node.meta["val"].dtype


def _tensors(node: Node) -> list[Tensor]:
    """Recorded values of what a node makes: one tensor, several, or none where it is a size."""
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Tensor)]


def _bytes(node: Node) -> int:
    return sum(math.prod(sizes(node, t)) * t.element_size() for t in _tensors(node))


def _weight(node: Node) -> list[int] | None:
    """Sizes of the argument of that name, else of the largest parameter or constant that a node reads."""
    named = arguments(node).get("weight")
    if isinstance(named, Node):
        return list(sizes(named))
    constants = [sizes(n) for n in node.all_input_nodes if is_constant(n)]
    return list(max(constants, key=math.prod)) if constants else None


def weights_share(graph: Graph, kinds: Collection[str]) -> float:
    """Which share of all numbers that a graph reads are weights of operators of these kinds; shared ones count once."""
    read = {str(n.target): graph.tensor(n).numel() for n in graph.nodes if n.op == "get_attr" and n.users}
    theirs = {
        str(source.target)
        for node in graph.nodes
        if kind(node) in kinds
        for source in node.all_input_nodes
        if source.op == "get_attr" and graph.tensor(source).dim() > 1
    }
    return sum(read[name] for name in theirs) / max(sum(read.values()), 1)
