"""Which operators stay float so that a model keeps to a budget of noise: the loudest for what they cost.

What rounding an operator's weight, and the values that it reads and gives, adds to the noise of the outputs is known to
first order from one pass over some samples (`noise.py`). Operators leave the integers in the order of noise per
multiply-accumulate; how many of them must, is measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from .noise import Slopes
from .ops import node_macs
from .place import Placement, Range, operands
from .quantize import tensor_params, weight_scales

KEPT = "left float for the budget"


def loudest(plan: Placement, ranges: Mapping[Node, Range], slopes: Slopes) -> list[Node]:
    """The weighted operators of a placement, those first that add the most noise for their work."""
    weighted = [node for node in plan.operators if operands(node) is not None]
    share = sum(map(node_macs, weighted)) / max(len(weighted), 1)  # what reading and writing costs, roughly
    noise = {node: _noise(plan, node, ranges, slopes) / (node_macs(node) + share) for node in weighted}
    return sorted(weighted, key=lambda node: -noise[node])


def _noise(plan: Placement, node: Node, ranges: Mapping[Node, Range], slopes: Slopes) -> float:
    bound = operands(node)
    assert bound is not None
    total, end = 0.0, plan.operators[node]
    for value in (bound.input, end):
        owner = plan.owner.get(value)
        if owner in slopes.values and owner in ranges:
            power = float(slopes.values[owner].power.sum())
            total += tensor_params(*ranges[owner], plan.spec).scale ** 2 / 12 * power
    if bound.weight in slopes.weights:
        weight, square = plan.graph.tensor(bound.weight), slopes.weights[bound.weight]
        rows = square.double().movedim(bound.axis, 0).flatten(1).sum(1)
        total += float((weight_scales(weight, bound.axis, plan.spec).double().square() / 12 * rows).sum())
    return total
