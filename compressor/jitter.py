"""How far the outputs of an integer graph move when nothing changes but the last bits of floats.

A number between two integers falls to either side by its last bit, and every runtime has its own. A step more or less
then moves what the next operators round, and deep networks grow that until two correct runtimes differ by as much as
quantisation itself costs. Nobody can hold a file to less than the graph holds itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ir import Graph
from .ops import kind
from .verify import Comparison, Observer

LAST_BITS = 1e-6  # relative: some units in the last place of float32
MARGIN_DB = 6.0  # twice the difference


def levels(graph: Graph, samples: Iterable[Sequence[Tensor]]) -> dict[tuple[str, str], float]:
    """Output and slice -> least SQNR in dB of a runtime that rounds correctly, each in its way."""
    observer = Observer(graph)
    count = len(graph.outputs)
    twins = [jittered(graph, sign * LAST_BITS) for sign in (1, -1)]
    compared = [Comparison(observer.names[:count], observer.regions[:count]) for _ in twins]
    for inputs in samples:
        reference = observer.run(inputs)[:count]
        for twin, comparison in zip(twins, compared, strict=True):
            comparison.update(reference, twin.run(*inputs))
    found: dict[tuple[str, str], float] = {}
    for check in (check for comparison in compared for check in comparison.checks()):
        where = (check.output, check.slice)
        found[where] = min(found.get(where, check.sqnr_db), check.sqnr_db)
    return {where: level - MARGIN_DB for where, level in found.items()}


def jittered(graph: Graph, step: float) -> Graph:
    """A copy in which whatever becomes integer is larger by `step` of itself. For running only.

    In half precision, whose last bits are larger, by one unit in the last place.
    """
    twin = graph.copy()
    for node in list(twin.nodes):
        if kind(node) in ("quantize", "integer_matmul"):
            value: Any = node.args[0]
            least = torch.finfo(value.meta["val"].dtype).eps
            factor = 1 + math.copysign(max(abs(step), least), step)
            node.update_arg(0, twin.insert(torch.ops.aten.mul.Tensor, (value, factor), before=node))
    return twin
