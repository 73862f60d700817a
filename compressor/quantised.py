"""Models that come quantised: Q/DQ pairs (PT2E's `convert_pt2e`) and fake quantisers, taken apart.

What is left is a model of floats, and the integers that its values and weights were given by training or by somebody
else's calibration. The int8 pass then places pairs of its own, where the target fuses them, with those scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .ir import Graph
from .names import operator_name, site
from .ops import is_constant, kind, shape
from .pipeline import Outcome, Rewrite
from .place import Range, operands
from .quantize import LEVELS, Params, redirect
from .target import QuantSpec

_DECOMPOSED = "quantized_decomposed"
_QUANTISE = f"{_DECOMPOSED}.quantize_per_tensor.default"
_DEQUANTISE = f"{_DECOMPOSED}.dequantize_per_tensor.default"
_BY_CHANNEL = f"{_DECOMPOSED}.dequantize_per_channel.default"


@dataclass
class Given:
    """params: value -> its integers. scales: weight -> float32 scales of its symmetric integers, by output channel."""

    params: dict[Node, Params] = field(default_factory=dict)
    scales: dict[Node, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.params or self.scales)

    def ranges(self) -> dict[Node, Range]:
        return {
            node: ((p.low - p.zero_point) * p.scale, (p.high - p.zero_point) * p.scale)
            for node, p in self.params.items()
        }

    def fitting(self, spec: QuantSpec) -> tuple[dict[Node, Tensor], dict[Node, Params]]:
        """Scales and params that this target's integers can have: all levels, a zero point that may be shifted."""
        fitting = {node: _as(p, spec) for node, p in self.params.items()}
        scales = {} if spec.reduce_range else self.scales
        return scales, {node: p for node, p in fitting.items() if p is not None}

    def spread(self, owner: Mapping[Node, Node]) -> list[Node]:
        """What is known of a value that hands on another's integers is known of that one.

        Answers the values that lose their own scale: those that one source hands on have the widest of all.
        """
        widest: dict[Node, Params] = {}
        for node, source in owner.items():
            for known in (self.params.get(source), self.params.get(node)):
                if known is not None:
                    widest[source] = _union(widest.get(source, known), known)
        lost = [
            n for n, source in owner.items() if self.params.get(n, widest.get(source)) != widest.get(source)
        ]
        for node in lost:
            del self.params[node]
        self.params |= widest
        return lost

    def outcome(self) -> Outcome:
        """The step that took the model apart: until pairs are placed again, nothing is rounded."""
        known = [*self.params, *self.scales]
        return Outcome(
            [Rewrite(site(node), "its scale is noted") for node in known], step="taking integers apart"
        )

    def of(self, twins: Mapping[str, Node]) -> Given:
        """The same of a copy of the graph, by the names of its nodes."""
        params = {twins[node.name]: p for node, p in self.params.items() if node.name in twins}
        return Given(params, {twins[node.name]: s for node, s in self.scales.items() if node.name in twins})

    def move(self, old: Node, new: Node) -> None:
        """`new` carries the value of `old`."""
        if old in self.params:
            self.params[new] = self.params.pop(old)


def _union(a: Params, b: Params) -> Params:
    """The same levels over both ranges."""
    if a == b:
        return a
    low = min((p.low - p.zero_point) * p.scale for p in (a, b))
    high = max((p.high - p.zero_point) * p.scale for p in (a, b))
    scale = (high - low) / (a.high - a.low)
    return Params(scale, round(a.low - low / scale), a.low, a.high, a.dtype)


def _as(p: Params, spec: QuantSpec) -> Params | None:
    low, high, dtype = LEVELS[spec.activation]
    if p.high - p.low != high - low:
        return None
    zero = p.zero_point + low - p.low
    return None if spec.activation == "s8" and zero != 0 else Params(p.scale, zero, low, high, dtype)


def take_apart(graph: Graph) -> Given:
    """Removes pairs and fake quantisers, and puts floats in the place of integer constants; what they said."""
    given = Given()
    for node in graph.nodes:
        name = operator_name(node)
        if name == _QUANTISE and not is_constant(node.args[0]):
            _open_pair(graph, node, given)
        elif name in (_DEQUANTISE, _BY_CHANNEL) and is_constant(node.args[0]):
            _widen(graph, node, given)
        elif kind(node) == "fake_quantize" and all(map(is_constant, node.all_input_nodes[1:])):
            _open_fake(graph, node, given)
    graph.clean()
    return given


def _open_pair(graph: Graph, node: Node, given: Given) -> None:
    source, scale, zero, low, high, dtype = node.args
    same = [
        user for user in node.users if operator_name(user) == _DEQUANTISE and user.args[1:] == node.args[1:]
    ]
    if len(same) == len(node.users):
        for user in same:
            _close(graph, user, Params(scale, zero, low, high, dtype), given, source)  # type: ignore[arg-type]


def _open_fake(graph: Graph, node: Node, given: Given) -> None:
    source, scale, zero, *axis, low, high = node.args
    if is_constant(source):  # its rounding and clipping stay: of these int8 knows the scale alone
        made = _executed(graph, node, f"{source.target}_rounded")  # type: ignore[union-attr]
        _name_weight(graph, node, made, scale, zero, axis, given)
    elif not axis:
        low, high = int(low), int(high)  # type: ignore[arg-type]
        dtype = torch.int8 if low < 0 else torch.uint8
        known = Params(float(_tensor(graph, scale)), int(_tensor(graph, zero)), low, high, dtype)
        _close(graph, node, known, given, source)


def _close(graph: Graph, node: Node, params: Params, given: Given, source: Any) -> None:
    """Who reads a rounded value reads what was rounded; one that was rounded in two ways stays."""
    if given.params.setdefault(source, params) == params:
        for user in list(node.users):
            redirect(graph, user, node, source)


def _widen(graph: Graph, node: Node, given: Given) -> None:
    """A constant in floats in the place of its integers."""
    stored, scale, zero, *rest = node.args
    made = _executed(graph, node, f"{stored.target}_float")  # type: ignore[union-attr]
    _name_weight(
        graph, node, made, scale, zero, rest[:1] if operator_name(node) == _BY_CHANNEL else [], given
    )


def _executed(graph: Graph, node: Node, name: str) -> Node:
    """A constant that holds what an operator makes of constants."""
    with torch.no_grad():
        value = graph.execute(node, {n: graph.tensor(n) for n in node.all_input_nodes})
    return graph.add_tensor(name, value.float())


def _name_weight(
    graph: Graph, node: Node, weight: Any, scale: Any, zero: Any, axis: Sequence[Any], given: Given
) -> None:
    """Notes the scales of a weight where they are those of symmetric integers; who read `node` reads the weight."""
    scales, zeros = _tensor(graph, scale).detach().float().reshape(-1), _tensor(graph, zero or 0)
    bounds = [operands(user) for user in node.users]
    if not bool(zeros.any()) and all(b is not None and b.weight is node for b in bounds):
        axes = {b.axis for b in bounds if b is not None}
        if len(axes) == 1 and set(axis) <= axes:
            given.scales[weight] = scales.expand(shape(weight)[axes.pop()]).contiguous()
    for user in list(node.users):
        redirect(graph, user, node, weight)


def _tensor(graph: Graph, value: Any) -> Tensor:
    return graph.tensor(value) if isinstance(value, Node) else torch.tensor(value, dtype=torch.float64)
