"""Least-squares approximations of a layer's weights, judged by what the layer computes on data.

`low_rank` finds, for every rank at once, two thin matrices whose product stands in for one; `allocate`
spreads a budget over many such choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

Point = tuple[tuple[float, ...], float]  # what a choice saves of every budget, and the loss that it costs


@dataclass(frozen=True)
class Moments:
    """Mean [d] and covariance [d, d] over `count` rows of what a matrix reads, or gives if `outputs`.

    The mean of the outputs is that of `matrix @ x` alone, without a bias.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    outputs: bool


@dataclass(frozen=True)
class LowRank:
    """The best approximation of a matrix W [m, n] at every rank r: W_r = inv(D) U_r U_r' D W.

    left: U [m, k], orthonormal columns, best first, signs fixed. energy [k]: what each column keeps of the
    mean of |D W x|^2. scale: the diagonal of D [m], how much an output's error weighs. mean: of D W x [m].
    """

    left: Tensor
    energy: Tensor
    scale: Tensor
    mean: Tensor | None = None

    def error(self, rank: int) -> float:
        """Share of the energy that rank r loses: the squared relative error of the outputs."""
        return float(self.energy[rank:].sum() / self.energy.sum())

    def lost(self, rank: int) -> float:
        """The energy itself that rank r loses."""
        return float(self.energy[rank:].sum())

    def factors(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """L [m, r] and R [r, n] in float64, with W_r = L R."""
        basis = self.left[:, :rank].double()
        return basis / self.scale[:, None], basis.T @ (matrix.double() * self.scale[:, None])

    def shift(self, rank: int) -> Tensor | None:
        """What the mean output [m] loses with W - W_r; added to the bias, it comes back."""
        if self.mean is None:
            return None
        basis = self.left[:, :rank].double()
        return (self.mean - basis @ (basis.T @ self.mean)) / self.scale

    def truncated(self, rank: int, dtype: torch.dtype) -> LowRank:
        """The same up to `rank` only, held in `dtype`."""
        return replace(self, left=self.left[:, :rank].to(dtype, copy=True))


def low_rank(matrix: Tensor, moments: Moments | None = None, scale: Tensor | None = None) -> LowRank:
    """Minimises the mean of |D (W - W_r) (x - mean x)|^2 over all W_r of rank r, for every r at once.

    W is projected on the leading left singular vectors of D W C^(1/2), C the covariance of x; without
    `moments` C is the identity. The eigenvectors of D cov(W x) D are the same vectors, so that the outputs'
    covariance serves as well. C is drawn towards a multiple of the identity by `shrinkage`.
    matrix [m, n], scale [m] > 0; computed in float64.
    Source: Zhang, Zou, He, Sun 2016 (arXiv:1505.06798), section 2: centred outputs, the mean in the bias.
    """
    weight = matrix.double()
    scale = torch.ones(len(weight), dtype=torch.float64) if scale is None else scale.double()
    scaled = weight * scale[:, None]
    if moments is None:
        left, singular, _ = torch.linalg.svd(scaled, full_matrices=False)
        return LowRank(_signed(left), singular.square(), scale)
    draw = shrinkage(moments.covariance, moments.count)
    if moments.outputs:
        seen = moments.covariance * torch.outer(scale, scale)
        white = scaled @ scaled.T
        drawn = seen * (1 - draw) + white * (draw * seen.trace() / white.trace())
        energy, left = torch.linalg.eigh(drawn)
        return LowRank(_signed(left.flip(1)), energy.flip(0).clamp(min=0), scale, moments.mean * scale)
    drawn = moments.covariance * (1 - draw)
    drawn.diagonal().add_(moments.covariance.diagonal().mean() * draw)
    spread, axes = torch.linalg.eigh(drawn)
    root = axes * spread.clamp(min=0).sqrt()
    left, singular, _ = torch.linalg.svd(scaled @ root, full_matrices=False)
    return LowRank(_signed(left), singular.square(), scale, scaled @ moments.mean)


def shrinkage(covariance: Tensor, count: int) -> float:
    """How far (0 to 1) a covariance [d, d] of `count` rows is best drawn towards a multiple of the identity.

    Few rows say little about d directions: those that they never show must not look free.
    Source: Chen, Wiesel, Eldar, Hero 2010 (arXiv:0907.4698), the oracle approximating estimator.
    """
    size, square = len(covariance), float(covariance.square().sum())
    whole = float(covariance.trace()) ** 2
    uneven = (count + 1 - 2 / size) * (square - whole / size)
    return min(1.0, ((1 - 2 / size) * square + whole) / uneven) if uneven > 0 else 1.0


def numerical_rank(matrix: Tensor) -> int:
    """The rank whose best approximation differs by rounding only: by 4 eps of the dtype in Frobenius norm."""
    weight = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    allowed = (4 * torch.finfo(matrix.dtype).eps) ** 2
    rough = torch.linalg.eigvalsh(weight @ weight.T)  # ten times faster, good down to 1e-14 or so of the sum
    if float(rough[0]) > max(allowed, 1e-10) * float(rough.sum()):
        return len(weight)
    energy = torch.linalg.svdvals(weight).square()
    tail = energy.flip(0).cumsum(0).flip(0)
    return int((tail > allowed * energy.sum()).sum())


def _signed(left: Tensor) -> Tensor:
    """Columns whose largest entry is positive: singular vectors are defined up to their sign."""
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    return left * torch.where(largest < 0, -1.0, 1.0)


def allocate(shelves: Sequence[Sequence[Point]], needs: Sequence[float]) -> list[int | None]:
    """One point of each shelf (None: nothing saved or lost) that save `needs` together, at the least loss.

    The steps along the convex hull of every shelf are taken by loss per saving, the cheapest first, until the
    needs are met: the optimum but for the last step. Then each choice goes back as far as the needs allow.
    Points without loss are taken in any case; when all steps do not save enough, all are taken.
    """
    hulls = [_hull(shelf) for shelf in shelves]
    steps = [(_slope(a, b), i, b[2]) for i, hull in enumerate(hulls) for a, b in pairwise(hull)]
    chosen = [hull[0][2] for hull in hulls]

    def met(choice: Sequence[int | None]) -> bool:
        taken = [shelf[k][0] for shelf, k in zip(shelves, choice, strict=True) if k is not None]
        return all(sum(saved[b] for saved in taken) >= need for b, need in enumerate(needs))

    moved: list[int] = []
    for _, i, k in sorted(steps, key=lambda step: step[:2]):
        if met(chosen):
            break
        chosen[i] = k
        moved.insert(0, i)
    for i in dict.fromkeys(moved):
        by_loss = sorted(range(len(shelves[i])), key=lambda k: shelves[i][k][1])
        back = (k for k in [hulls[i][0][2], *by_loss] if met([*chosen[:i], k, *chosen[i + 1 :]]))
        chosen[i] = next(back, chosen[i])
    return chosen


_Corner = tuple[float, float, "int | None"]  # saved of all budgets together, loss, index of the point


def _hull(shelf: Sequence[Point]) -> list[_Corner]:
    """The points that no mixture of two others beats, from the most that is saved without loss on."""
    hull: list[_Corner] = [(0.0, 0.0, None)]
    for saved, loss, k in sorted((sum(saved), loss, k) for k, (saved, loss) in enumerate(shelf)):
        if saved <= hull[-1][0]:
            continue
        corner: _Corner = (saved, loss, k)
        while hull and loss <= hull[-1][1]:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], corner):
            hull.pop()
        hull.append(corner)
    return hull


def _slope(a: _Corner, b: _Corner) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
