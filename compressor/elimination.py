"""Structured optimal brain surgeon: which channels a layer misses least, once the others have made up for them.

With G = U'U + ridge over the rows U that a layer reads, H = inv(G) and its matrix W, removing the columns q and
solving for the rest again costs, in the mean of |D (y - y')|^2,

    cost(q) = tr(D W_q inv(H_qq) W_q' D)         W <- W - W_q inv(H_qq) H_q:       H <- H - H_:q inv(H_qq) H_q:

so that one inverse serves a whole elimination. Where several layers read a channel, the costs add up.
Sources: Hassibi, Stork 1993 (NIPS 5); in blocks: Kurtic et al. 2022 (arXiv:2203.07259).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
RIDGE = 1e-4  # of the mean diagonal
ROUNDS = 128  # an elimination takes about so many at most
TRUSTED = 8  # rows a column


@dataclass
class Problem:
    """One reader of a family. gram [F, F] and matrix [O, F] in float64; weight [O]: what an error of each output costs.

    blocks[g]: the columns that go with candidate g, int64, empty where it has none here. gram holds means over rows.
    repair: whether the columns that stay may change, to make up for those that go.
    """

    gram: Tensor
    matrix: Tensor
    weight: Tensor
    blocks: list[Tensor]
    repair: bool = True


@dataclass(frozen=True)
class Elimination:
    """order [n]: candidates, the first to go first. costs [n + 1]: what removing the first k of them costs."""

    order: list[int]
    costs: Floats


def ridged(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """A Gram matrix with `ridge` of its mean diagonal added; features that are always 0 stay solvable."""
    drawn = gram.clone()
    drawn.diagonal().add_(ridge * max(float(gram.diagonal().mean()), 1e-30))
    return drawn


def trust(rows: int, columns: int) -> float:
    """How much of a fit to errors to believe: all of it from `TRUSTED` rows a column on, nothing below one.

    What other layers got wrong is no function of what this one reads: too few rows let it learn them by heart.
    """
    return min(1.0, max(0.0, (rows / columns - 1) / (TRUSTED - 1)))


def eliminate(problems: Sequence[Problem], count: int, stop: int | None = None) -> Elimination:
    """Removes candidates 0..count-1, always those that cost all readers least together.

    One by one, but of more than `ROUNDS` several at once. stop: how many to remove, all of them if None.
    """
    chunk = 1 + count // ROUNDS
    solvers = [_Solver(p) for p in problems]
    alive = np.ones(count, dtype=bool)
    order: list[int] = []
    total, costs = 0.0, [0.0]
    stop = count if stop is None else stop
    while len(order) < stop:
        price = np.full(count, np.inf)
        left = np.flatnonzero(alive)
        price[left] = sum((s.prices(left) for s in solvers), np.zeros(len(left)))
        gone = np.argsort(price, kind="stable")[: min(chunk, stop - len(order))].tolist()
        before = total
        total += sum(s.remove(gone) for s in solvers)
        total = max(total, before)
        costs += np.linspace(before, total, len(gone) + 1)[1:].tolist()
        order += gone
        alive[gone] = False
    return Elimination(order, np.array(costs))


class _Solver:
    def __init__(self, problem: Problem) -> None:
        gram = ridged(problem.gram)
        self.inverse = torch.linalg.inv(gram if problem.repair else torch.diag(gram.diagonal()))
        self.matrix = problem.matrix.clone()
        self.root = problem.weight.clamp(min=0).sqrt()[:, None]
        self.blocks = problem.blocks
        self.sizes = np.array([len(block) for block in problem.blocks])
        sizes = set(self.sizes.tolist()) - {0}
        self.table: Tensor | None = None  # [candidates, columns of each] where all have as many
        if len(sizes) == 1:
            self.table = torch.zeros(len(self.blocks), sizes.pop(), dtype=torch.int64)
            self.table[torch.from_numpy(self.sizes > 0)] = torch.stack([b for b in self.blocks if len(b)])

    def prices(self, candidates: NDArray[np.int64]) -> Floats:
        """What each candidate costs by itself."""
        found = np.zeros(len(candidates))
        here = np.flatnonzero(self.sizes[candidates])
        if not len(here):
            return found
        if self.table is None:
            found[here] = [self._price(self.blocks[g]) for g in candidates[here].tolist()]
            return found
        columns = self.table[torch.from_numpy(candidates[here])]  # [n, b]
        corner = self.inverse[columns[:, :, None], columns[:, None, :]]
        weights = (self.matrix * self.root)[:, columns].permute(1, 2, 0)  # [n, b, O]
        if columns.shape[1] == 1:
            cost = weights[:, 0].square().sum(1) / corner[:, 0, 0]
        else:
            cost = (weights * torch.linalg.solve(corner, weights)).sum((1, 2))
        found[here] = cost.clamp(min=0).numpy()
        return found

    def _price(self, columns: Tensor) -> float:
        weights = (self.matrix * self.root)[:, columns].T
        corner = self.inverse[columns[:, None], columns[None, :]]
        return max(0.0, float((weights * torch.linalg.solve(corner, weights)).sum()))

    def remove(self, candidates: Sequence[int]) -> float:
        """Takes columns out and repairs the rest; what that cost."""
        columns = torch.cat([self.blocks[g] for g in candidates])
        if not len(columns):
            return 0.0
        cost = self._price(columns)
        side = self.inverse[:, columns]
        solved = torch.linalg.solve(side[columns], side.T)  # [b, F]
        self.matrix -= self.matrix[:, columns] @ solved
        self.inverse -= side @ solved
        self.matrix[:, columns] = 0
        self.inverse[:, columns] = 0
        self.inverse[columns, :] = 0
        self.inverse[columns, columns] = 1  # so that corners of removed candidates stay solvable
        return cost
