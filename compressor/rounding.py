"""Weights rounded so that what a layer computes changes least, not the weights themselves.

Column by column: each is rounded, and the columns that are still to come take over its error as well as the Gram
matrix G of what the layer reads allows. With H = inv(G) and U'U = H its upper Cholesky factor,

    q = round(w_j),  W_k <- W_k - (w_j - q) U_jk / U_jj   for k > j

Sources: Frantar, Alistarh 2022 (arXiv:2208.11580); Frantar et al. 2022 (arXiv:2210.17323).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from .data import Data
from .elimination import ridged
from .ops import sizes
from .pipeline import Context
from .place import Placement, Range, operands, selected
from .quantize import fake_quantise, levels, tapped, tensor_params, weight_scales
from .rebuild import Change, refit
from .survey import Reading, reading_of

HELD = 1 << 28  # numbers of one value over all samples that are read at most
FEWEST = 32  # samples that are read at least
RIDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0)  # on top of a ridged Gram matrix
BLOCK = 64  # columns whose errors are handed on together


def round_weights(
    plan: Placement, ranges: Mapping[Node, Range], data: Data, ctx: Context
) -> tuple[dict[Node, Tensor], list[str]]:
    """Puts weights that are multiples of their scales, and biases that make up for the means of what rounding does.

    Layer by layer, on values that are rounded already. The scales, by weight, and the sites of the layers.
    """
    graph, (copy, taps) = plan.graph, tapped(plan)
    twins, constants = (
        {n.name: n for n in copy.nodes},
        {str(n.target): n for n in graph.nodes if n.op == "get_attr"},
    )
    scales: dict[Node, Tensor] = {}
    grids: dict[Node, Grid] = {}
    for node in plan.operators:
        bound = operands(node)
        reading = (
            reading_of(copy, twins[node.name])
            if bound is not None and selected(graph, node) is None
            else None
        )
        if bound is None or reading is None or reading.layer.is_tied:
            continue
        scales[bound.weight] = weight_scales(graph.tensor(bound.weight), bound.axis, plan.spec)
        grids[reading.layer.node] = Grid(reading, scales[bound.weight], levels(plan.spec))
    changes: dict[Node, Change] = {
        tap: partial(fake_quantise, params=tensor_params(*ranges[value], plan.spec))
        for tap, value in taps.items()
    }
    largest = max((math.prod(sizes(tap)) for tap in taps), default=1)
    some = data.limited(max(FEWEST, HELD // largest))
    made = refit(copy, grids, some, ctx, changes, heal=False)
    for name, value in made.tensors.items():
        graph.set_tensor(constants[name], value)
    return scales, made.repaired


@dataclass(frozen=True)
class Grid:
    """The integers that a layer's weight may become: a Fit of `rebuild.refit`.

    scales [outs]: of each output channel. limit: of the integers' magnitude.
    """

    reading: Reading
    scales: Tensor
    limit: int
    whole: ClassVar[None] = None

    def matrix(self, gram: Tensor, wanted: Tensor, block: int) -> Tensor:
        steps = self.reading.by_block(self.scales.double())[block][:, None]
        return rounded(wanted, gram, steps, self.limit)


def _nearest(matrix: Tensor, steps: Tensor, limit: int) -> Tensor:
    return (matrix / steps).round().clamp(-limit, limit) * steps


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U with U'U = inverse of gram, which is not formed: it has digits left where that has none.

    Products of float32 can outweigh the ridge where one direction holds nearly everything: more is added then.
    """
    for ridge in RIDGES:
        lower, failed = torch.linalg.cholesky_ex(ridged(gram, ridge).flip(0, 1))
        if not failed:
            break
    return torch.linalg.solve_triangular(lower, torch.eye(len(gram), dtype=gram.dtype), upper=False).flip(
        0, 1
    )


def rounded(matrix: Tensor, gram: Tensor, steps: Tensor, limit: int) -> Tensor:
    """A matrix [O, F] on the multiples, up to `limit`, of steps [O, 1], near to `matrix` on rows of Gram matrix [F, F].

    float64. gram is a ridged one (`elimination.ridged`). The columns that the layer reads most of go first.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(gram[order][:, order])
    left, made = matrix[:, order].clone(), torch.zeros_like(matrix)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = torch.zeros(len(matrix), stop - start, dtype=matrix.dtype)
        for j in range(start, stop):
            column = left[:, j : j + 1]
            nearest = _nearest(column, steps, limit)
            errors[:, j - start : j - start + 1] = error = (column - nearest) / factor[j, j]
            left[:, j + 1 : stop] -= error @ factor[j : j + 1, j + 1 : stop]
            made[:, j : j + 1] = nearest
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return made[:, order.argsort()]
