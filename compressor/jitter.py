"""How far the outputs of a graph move when nothing changes but last bits: nobody can hold a copy of it to less.

Deep networks amplify. A weight that is rounded once more, as everything that is folded must be, moves the outputs of
some by more than a tolerance; and a number between two integers falls to either side by its last bit, which every
runtime has for itself, until two correct runtimes differ by as much as quantisation itself costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .edges import few
from .ir import Graph
from .ops import is_constant, kind
from .verify import Check, Comparison, Observer, widened

FEW = 16  # samples that levels are measured on: they are means, and each costs three runs of the graph
LAST_BITS = 1e-6  # relative: some units in the last place of float32
MARGIN_DB = 6.0  # twice the difference
ONCE = 2.0  # times `errors`: for weights that were rounded once, as those of `errors` are
EVERYWHERE = 8.0  # for two runtimes, each of which rounds at every operator as well
_DISCRETE = ("quantize", "integer_matmul")
Where = tuple[str, str]  # an output, and a slice of it


def errors(graph: Graph, samples: Iterable[Sequence[Tensor]]) -> dict[Where, float]:
    """Error of outputs, computed in float64, where every weight is off by up to half a unit in float32's last place."""
    base = widened(graph, torch.float64)
    checks = _compared(base, [_rounded(base)], samples)
    return {where: max(check.error for check in found) for where, found in checks.items()}


def allowed(checks: Sequence[Check], errors: Mapping[Where, float], times: float) -> list[Check]:
    """Checks whose tolerance is what `errors` leaves of it."""
    return [
        replace(c, tolerance=max(c.tolerance, times * errors.get((c.output, c.slice), 0.0))) for c in checks
    ]


def levels(graph: Graph, samples: Iterable[Sequence[Tensor]]) -> dict[Where, float]:
    """Least SQNR in dB of a runtime that computes a graph correctly, and rounds in its own way.

    Integers are held to what last bits make of them; half precision to what all its rounding makes of the graph, since
    every operator rounds.
    """
    base, twins = graph, [jittered(graph, sign * LAST_BITS) for sign in (1, -1)]
    if not any(kind(node) in _DISCRETE for node in graph.nodes):
        base, twins = widened(graph, torch.float32), [graph]
    checks = _compared(base, twins, few(graph, samples, FEW))
    return {where: min(check.sqnr_db for check in found) - MARGIN_DB for where, found in checks.items()}


def jittered(graph: Graph, step: float) -> Graph:
    """A copy in which whatever becomes integer is larger by `step` of itself. For running only.

    In half precision, whose last bits are larger, by one unit in the last place.
    """
    twin = graph.copy()
    for node in list(twin.nodes):
        if kind(node) in _DISCRETE:
            value: Any = node.args[0]
            least = torch.finfo(value.meta["val"].dtype).eps
            factor = 1 + math.copysign(max(abs(step), least), step)
            node.update_arg(0, twin.insert(torch.ops.aten.mul.Tensor, (value, factor), before=node))
    return twin


def _rounded(graph: Graph) -> Graph:
    twin = graph.copy()
    draw = torch.Generator().manual_seed(0)
    for node in twin.nodes:
        if is_constant(node) and node.meta["val"].is_floating_point():
            tensor = twin.tensor(node).double()
            off = torch.rand(tensor.shape, generator=draw, dtype=torch.float64) * 2 - 1
            twin.set_tensor(node, tensor.addcmul(tensor, off, value=torch.finfo(torch.float32).eps / 2))
    return twin


def _compared(
    graph: Graph, twins: Sequence[Graph], samples: Iterable[Sequence[Tensor]]
) -> dict[Where, list[Check]]:
    """Checks of every twin against the graph."""
    observer = Observer(graph)
    count = len(graph.outputs)
    compared = [Comparison(observer.names[:count], observer.regions[:count]) for _ in twins]
    for inputs in samples:
        reference = observer.run(inputs)[:count]
        for twin, comparison in zip(twins, compared, strict=True):
            comparison.update(reference, twin.run(*inputs))
    found: dict[Where, list[Check]] = {}
    for check in (check for comparison in compared for check in comparison.checks()):
        found.setdefault((check.output, check.slice), []).append(check)
    return found
