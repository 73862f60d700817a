"""Streamed statistics: what a tensor looks like over all batches, in memory that their number does not grow.

Every class has `update(tensor)` for one more batch, `merge(other)` for the same statistic of other batches,
and results as properties or methods. Merging two streams gives what one pass over both would have given.
Ranges and histograms leave NaN and infinite values out and count them in `dropped`: a pass can decline there.

    ranges        MinMax (per tensor or per slice of an axis), MovingAverage
    distribution  Histogram; percentile, least-squares and entropy ranges are read from it
    second order  Gram (X'X, X'Y), Covariance (mean and centred scatter)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 22  # elements of one float64 temporary: 32 MB
_RUN = 16  # values that are sampled together: a line of a processor's cache
_FINEST = 100  # bins are never narrower than 2**-100, so that 2**100 * x stays finite in float32
_PRECISION = 30  # nor narrower than 2**-30 of the largest value: bin indices stay small integers
_FACTORS = [float(2.0 ** (-i / 12)) for i in range(97)]  # shares of a range that clipping searches try


class MinMax:
    """Running minimum and maximum of all values, or of each slice along `axis`.

    low, high: float64 scalars (axis None) or vectors. Exact: equal to one pass over everything.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.dropped = 0
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def update(self, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return
        low, high, dropped = _extremes(tensor, self.axis)
        self.dropped += dropped
        self._widen(low, high)

    def merge(self, other: MinMax) -> None:
        self.dropped += other.dropped
        if other._low is not None and other._high is not None:
            self._widen(other._low, other._high)

    @property
    def empty(self) -> bool:
        """No finite value was seen (in any slice)."""
        return self._low is None or self._high is None or bool((self._low > self._high).all())

    @property
    def low(self) -> Tensor:
        return _seen(self._low)

    @property
    def high(self) -> Tensor:
        return _seen(self._high)

    @property
    def absolute(self) -> Tensor:
        """The larger of |low| and |high|."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def _widen(self, low: Tensor, high: Tensor) -> None:
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)


class MovingAverage:
    """Average of each batch's minimum and maximum, later batches weighing more.

    v = sum_i (1-m)^(n-i) m x_i / (1 - (1-m)^n), momentum m: the bias-corrected exponential average, so that
    the first batch counts no more than its share. `merge(other)` reads as: `other` came after this one.
    """

    def __init__(self, momentum: float = 0.1) -> None:
        self.momentum = momentum
        self.dropped = 0
        self._count = 0
        self._sum = torch.zeros(2, dtype=torch.float64)

    def update(self, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return
        low, high, dropped = _extremes(tensor, None)
        self.dropped += dropped
        if low <= high:  # else the batch holds no finite value
            self._sum = self._sum * (1 - self.momentum) + self.momentum * torch.stack([low, high])
            self._count += 1

    def merge(self, other: MovingAverage) -> None:
        if other.momentum != self.momentum:
            raise ValueError(f"averages of momentum {self.momentum} and {other.momentum} do not merge")
        self._sum = self._sum * (1 - self.momentum) ** other._count + other._sum
        self._count += other._count
        self.dropped += other.dropped

    @property
    def low(self) -> Tensor:
        return self._result[0]

    @property
    def high(self) -> Tensor:
        return self._result[1]

    @property
    def _result(self) -> Tensor:
        return _seen(self._sum if self._count else None) / (1 - (1 - self.momentum) ** self._count)


class Histogram:
    """Counts in at most `bins` equal bins whose width is a power of two and whose edges are multiples of it.

    When a value falls outside, neighbouring bins are added up in pairs until everything fits. Bins nest
    exactly (floor(floor(x/w)/2) = floor(x/2w)), and the final width depends on the extremes alone, so any
    order of batches, and any merge, gives the same counts. Between bins/2 and bins of them span the data,
    unless all values lie within 2**-30 of their magnitude.
    stride: count every stride-th run of 16 values only, over the stream laid end to end (low and high still see all).
    Choose a prime, or an axis of the tensor is sampled at the same places each time.
    """

    def __init__(self, bins: int = 4096, stride: int = 1) -> None:
        if bins < 2 or stride < 1:
            raise ValueError("a histogram needs at least 2 bins and a stride of at least 1")
        self.bins = bins
        self.stride = stride
        self.dropped = 0
        self._range = MinMax()
        self._seen = 0  # values that went by, counted or not
        self._exponent = -_FINEST - _PRECISION  # width = 2**exponent
        self._start = 0  # index of the first bin: its lower edge is start * width
        self._counts = np.zeros(0, dtype=np.int64)

    def update(self, tensor: Tensor) -> None:
        flat = tensor.detach().reshape(-1)
        sample = _floating(_every(flat, self._seen, self.stride))
        self._seen += flat.numel()
        before = self._range.dropped
        self._range.update(flat)
        self.dropped += self._range.dropped - before
        if self._range.dropped > before:
            sample = sample[torch.isfinite(sample)]
        self._coarsen()
        for part in sample.split(_BLOCK):
            if part.numel():
                index = torch.floor(part * 2.0**-self._exponent).to(torch.int64)
                first = int(index.min())
                self._add(first, torch.bincount(index - first).numpy())

    def merge(self, other: Histogram) -> None:
        if other.bins != self.bins:
            raise ValueError(f"histograms of {self.bins} and {other.bins} bins do not merge")
        self._range.merge(other._range)
        self._seen += other._seen
        self.dropped += other.dropped
        self._coarsen()
        if other._counts.size:
            self._add(*_halved(other._start, other._counts, self._exponent - other._exponent))

    @property
    def low(self) -> float:
        """Smallest value seen (exact)."""
        return float(self._range.low)

    @property
    def high(self) -> float:
        """Largest value seen (exact)."""
        return float(self._range.high)

    @property
    def width(self) -> float:
        """Width of a bin: the resolution of every result."""
        return 2.0**self._exponent

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    @property
    def counts(self) -> np.ndarray:
        """[n] int64, n <= bins."""
        return self._counts

    @property
    def edges(self) -> np.ndarray:
        """[n + 1] float64: bin i holds edges[i] <= x < edges[i + 1]."""
        return (self._start + np.arange(self._counts.size + 1)) * self.width

    def quantile(self, q: float) -> float:
        """Value below which a share `q` (0..1) of the counted values lies, to within one bin."""
        if not self.count:
            raise ValueError("no finite value was seen")
        below = np.concatenate([[0], np.cumsum(self._counts)])
        value = float(np.interp(q * below[-1], below, self.edges))
        return min(max(value, self.low), self.high)

    def percentile(self, percent: float) -> tuple[float, float]:
        """(low, high) with `percent` of the values on its side of each: 99.9 cuts 0.1 % off either tail."""
        if not 50 < percent <= 100:
            raise ValueError(f"a percentile lies above 50 and at most at 100, got {percent}")
        if percent == 100:
            return self.low, self.high
        return self.quantile(1 - percent / 100), self.quantile(percent / 100)

    def _coarsen(self) -> None:
        """Doubles the width until every bin between the extremes fits."""
        if self._range.empty:
            return
        low, high = self.low, self.high
        needed = max(self._exponent, math.frexp(max(abs(low), abs(high)))[1] - _PRECISION, -_FINEST)
        while math.floor(high * 2.0**-needed) - math.floor(low * 2.0**-needed) >= self.bins:
            needed += 1
        self._start, self._counts = _halved(self._start, self._counts, needed - self._exponent)
        self._exponent = needed

    def _add(self, first: int, counts: np.ndarray) -> None:
        if not self._counts.size:
            self._start, self._counts = first, np.zeros(0, dtype=np.int64)
        start = min(first, self._start)
        stop = max(first + counts.size, self._start + self._counts.size)
        total = np.zeros(stop - start, dtype=np.int64)
        total[self._start - start :][: self._counts.size] += self._counts
        total[first - start :][: counts.size] += counts
        self._start, self._counts = start, total


def _every(flat: Tensor, seen: int, stride: int) -> Tensor:
    """Every stride-th run of a stream of which `seen` values went by; single ones, far apart, would be slow to read."""
    if stride == 1:
        return flat
    step, begun = _RUN * stride, seen % (_RUN * stride)
    first = (step - begun) % step
    parts = [flat[: _RUN - begun]] if 0 < begun < _RUN else []
    whole = flat[first:].unfold(0, _RUN, step) if len(flat) - first >= _RUN else flat.new_empty(0, _RUN)
    last = first + len(whole) * step
    return torch.cat([*parts, whole.reshape(-1), flat[last : last + _RUN]])


def mse_range(histogram: Histogram, levels: int = 256, symmetric: bool = False) -> tuple[float, float]:
    """(low, high) whose rounding to `levels` integer levels changes the values least, in squared error.

    The range holds 0, and 0 is a level. Rounding and clipping are carried out on the bin centres, for every
    pair of ends on a coarse grid (factors of sqrt 2, down to 1/256), then for each end in turn near the best.
    symmetric: low = -high, levels - 1 of them used (-127..127).
    """
    centres = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)

    def best(candidates: Iterable[tuple[float, float]]) -> tuple[float, float]:
        known = sorted({(a, b) for a, b in candidates if low <= a <= 0 <= b <= high})
        errors = [_rounding_error(centres, histogram.counts, a, b, levels, symmetric) for a, b in known]
        return known[int(np.argmin(errors))]

    coarse, near = _FACTORS[::6], [1 + i / 64 for i in range(-16, 17)]
    if symmetric:
        found = best((low * f, high * f) for f in coarse)
        return best((found[0] * f, found[1] * f) for f in near)
    found = best((low * f, high * g) for f in coarse for g in coarse)
    for _ in range(2):
        found = best((found[0], found[1] * f) for f in near)
        found = best((found[0] * f, found[1]) for f in near)
    return found


def entropy_range(histogram: Histogram, levels: int = 256) -> tuple[float, float]:
    """(low, high), both ends scaled alike, whose distribution over `levels` is nearest in KL divergence.

    P is the histogram inside the range, with what lies outside put into its outermost bins; Q is the inside
    alone, averaged over each level's occupied bins. The bin of 0 counts in neither: 0 is always exact.
    Source: Migacz 2017, 8-bit inference with TensorRT (GTC), slides on calibration.
    """
    edges, counts = histogram.edges, histogram.counts.astype(np.float64)
    counts[(edges[:-1] <= 0) & (edges[1:] > 0)] = 0
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    found, least = (low, high), math.inf
    for factor in _FACTORS:
        inside = np.flatnonzero((edges[1:] > low * factor) & (edges[:-1] < high * factor))
        if inside.size <= levels or not counts[inside].any():
            continue
        first, last = inside[0], inside[-1]
        kept = counts[first : last + 1]
        divergence = _divergence(kept, counts[:first].sum(), counts[last + 1 :].sum(), levels)
        if divergence < least:
            found, least = (low * factor, high * factor), divergence
    return found


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a'b in float64; multiplied in its own type unless that overflows."""
    made = (a.T @ b).double()
    return made if bool(made.isfinite().all()) else a.double().T @ b.double()


class Gram:
    """Running X'X [features, features], X'Y [features, targets] and the sum of X over all rows.

    update(x, y): x [..., features], y [..., targets] or None. Each block of rows is multiplied in x's own
    float type (at least float32) and added up in float64. A bias's column of ones is `total` and `count`.
    """

    def __init__(self, features: int, targets: int = 0) -> None:
        self.count = 0
        self.xx = torch.zeros(features, features, dtype=torch.float64)
        self.xy = torch.zeros(features, targets, dtype=torch.float64)
        self.total = torch.zeros(features, dtype=torch.float64)
        self.target_total = torch.zeros(targets, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        rows = _floating(x.detach()).reshape(-1, self.xx.shape[0])
        aims = rows[:, :0] if y is None else _floating(y.detach()).reshape(-1, self.xy.shape[1])
        if (y is None and self.xy.shape[1]) or len(aims) != len(rows):
            raise ValueError(f"{len(rows)} rows of inputs need as many of targets [{self.xy.shape[1]}]")
        size = max(256, _BLOCK // max(rows.shape[1], 1))
        for a, b in zip(rows.split(size), aims.split(size), strict=True):
            self.xx += _products(a, a)
            self.xy += _products(a, b)
            self.total += a.sum(0, dtype=torch.float64)
            self.target_total += b.sum(0, dtype=torch.float64)
        self.count += len(rows)

    def merge(self, other: Gram) -> None:
        self.count += other.count
        self.xx += other.xx
        self.xy += other.xy
        self.total += other.total
        self.target_total += other.target_total


class Covariance:
    """Running mean [features] and centred scatter sum (x - mean)(x - mean)' of rows [..., features].

    Blocks are centred on their own mean before they are multiplied, and joined by
    S = S1 + S2 + d d' n1 n2 / (n1 + n2), d = mean2 - mean1, so that a large mean costs no digits.
    Source: Chan, Golub, LeVeque 1983 (The American Statistician 37), pairwise update.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64)
        self.scatter = torch.zeros(features, features, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        rows = _floating(x.detach()).reshape(-1, self.mean.shape[0])
        for block in rows.split(max(256, _BLOCK // max(rows.shape[1], 1))):
            if len(block):
                mean = block.mean(0, dtype=torch.float64)
                centred = (block.double() - mean).to(block.dtype)
                self._join(len(block), mean, (centred.T @ centred).double())

    def merge(self, other: Covariance) -> None:
        self._join(other.count, other.mean, other.scatter)

    @property
    def covariance(self) -> Tensor:
        """[features, features], divided by the number of rows (not one less)."""
        return self.scatter / max(self.count, 1)

    @property
    def variance(self) -> Tensor:
        return self.covariance.diagonal()

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if not count:
            return
        apart = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total


def _floating(tensor: Tensor) -> Tensor:
    """float32 or float64 on the CPU; integers become float64, which holds all below 2**53."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor.cpu()
    return tensor.cpu().to(torch.float32 if tensor.is_floating_point() else torch.float64)


def _extremes(tensor: Tensor, axis: int | None) -> tuple[Tensor, Tensor, int]:
    """Least and greatest finite value (of each slice along axis) in float64, and how many were not finite."""
    values = _floating(tensor.detach())
    rows = values.reshape(1, -1) if axis is None else values.movedim(axis, 0).reshape(values.shape[axis], -1)
    low, high, dropped = rows.amin(1), rows.amax(1), 0
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        finite = torch.isfinite(rows)
        dropped = int((~finite).sum())
        low = rows.masked_fill(~finite, torch.inf).amin(1)
        high = rows.masked_fill(~finite, -torch.inf).amax(1)
    low, high = low.double(), high.double()
    return (low[0], high[0], dropped) if axis is None else (low, high, dropped)


def _seen(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("no value was seen")
    return value


def _halved(start: int, counts: np.ndarray, times: int) -> tuple[int, np.ndarray]:
    """Neighbouring bins added up in pairs, `times` times over."""
    if not counts.size or not times:
        return start, counts
    shift = min(times, 62)
    index = (start + np.arange(counts.size)) >> shift
    total = np.zeros(index[-1] - index[0] + 1, dtype=np.int64)
    np.add.at(total, index - index[0], counts)
    return int(index[0]), total


def _rounding_error(
    values: np.ndarray, counts: np.ndarray, low: float, high: float, levels: int, symmetric: bool
) -> float:
    """Sum of squared errors of rounding `values` (each `counts` times) to the levels between low and high."""
    steps = levels - 2 if symmetric else levels - 1
    scale = (high - low) / steps
    if scale <= 0:
        return float(counts @ values**2)
    zero = round(-low / scale)
    error = (np.clip(np.rint(values / scale), -zero, steps - zero)) * scale - values
    return float(counts @ error**2)


def _divergence(kept: np.ndarray, below: float, above: float, levels: int) -> float:
    """KL(P || Q) in nats: P the bins in a range with the counts outside it, Q their average per level."""
    p = kept.copy()
    p[0] += below
    p[-1] += above
    level = np.arange(kept.size) * levels // kept.size
    occupied = p > 0
    mass = np.bincount(level, kept, levels)
    share = np.maximum(np.bincount(level, occupied, levels), 1)
    q = np.where(occupied, (mass / share)[level], 0.0)
    p, q = p / p.sum(), q / q.sum()
    tiny = 1e-9  # a level that only clipped values reach: finite, but dear
    return float(np.sum(p[occupied] * np.log(p[occupied] / np.maximum(q[occupied], tiny))))
