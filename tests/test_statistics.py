"""Streamed statistics against numpy on the whole data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from compressor.statistics import (
    Covariance,
    Gram,
    Histogram,
    MinMax,
    MovingAverage,
    entropy_range,
    mse_range,
)


def batches(count: int = 5, shape: tuple[int, ...] = (4, 6, 8), seed: int = 0) -> list[torch.Tensor]:
    """Batches whose scale grows, so that order matters to whatever is careless about it."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 3.0**i + i for i in range(count)]


def whole(parts: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(parts).double().numpy()


def filled(parts, **options) -> Histogram:
    histogram = Histogram(**options)
    for part in parts:
        histogram.update(part)
    return histogram


# ---------------------------------------------------------------- ranges


def test_min_max_of_everything_and_of_each_channel():
    parts = batches()
    every, channel = MinMax(), MinMax(axis=1)
    for part in parts:
        every.update(part)
        channel.update(part)
    data = whole(parts)
    assert float(every.low) == data.min() and float(every.high) == data.max()
    np.testing.assert_array_equal(channel.low, data.min((0, 2)))
    np.testing.assert_array_equal(channel.high, data.max((0, 2)))
    np.testing.assert_array_equal(channel.absolute, np.abs(data).max((0, 2)))
    assert not np.array_equal(channel.high, data.max((0, 1))[:6])  # the wrong axis would be seen


@pytest.mark.parametrize("make", [MinMax, lambda: MinMax(axis=1), lambda: MovingAverage(0.2), Histogram])
def test_merging_two_ranges_is_one_pass(make):
    parts = batches()
    once, left, right = make(), make(), make()
    for i, part in enumerate(parts):
        once.update(part)
        (left if i < 2 else right).update(part)
    left.merge(right)
    np.testing.assert_allclose(left.low, once.low, rtol=1e-14)
    np.testing.assert_allclose(left.high, once.high, rtol=1e-14)
    alone = make()
    alone.update(parts[0])
    assert not np.allclose(alone.low, once.low)


def test_moving_average_is_the_corrected_exponential_average():
    parts, momentum = batches(), 0.3
    average = MovingAverage(momentum)
    for part in parts:
        average.update(part)
    weights = momentum * (1 - momentum) ** np.arange(len(parts))[::-1]
    expected = np.average([float(p.max()) for p in parts], weights=weights)
    np.testing.assert_allclose(float(average.high), expected, rtol=1e-12)
    assert abs(np.mean([float(p.max()) for p in parts]) - expected) > 0.05 * expected
    one = MovingAverage(momentum)
    one.update(parts[0])
    assert float(one.low) == pytest.approx(float(parts[0].min()))  # no pull towards zero


def test_values_that_are_not_finite_are_left_out_and_counted():
    tensor = torch.tensor([1.0, -2.0, float("nan"), float("inf"), 3.0])
    for statistic in (MinMax(), Histogram()):
        statistic.update(tensor)
        assert (float(statistic.low), float(statistic.high), statistic.dropped) == (-2.0, 3.0, 2)
    masked = Histogram()
    masked.update(torch.full((4,), float("-inf")))
    masked.update(tensor)
    assert (masked.low, masked.high, masked.dropped, masked.count) == (-2.0, 3.0, 6, 3)


def test_nothing_seen_is_an_error():
    for result in (lambda: MinMax().low, lambda: MovingAverage().high, lambda: Histogram().quantile(0.5)):
        with pytest.raises(ValueError, match="seen"):
            result()


# ---------------------------------------------------------------- histogram


def test_histogram_is_the_same_in_any_order_and_equals_numpy():
    parts = batches(4)
    first = filled(parts, bins=128)
    for order in itertools.permutations(parts):
        other = filled(order, bins=128)
        assert other.width == first.width
        np.testing.assert_array_equal(other.counts, first.counts)
        np.testing.assert_array_equal(other.edges, first.edges)
    data = whole(parts)
    assert 64 <= first.counts.size <= 128 and first.count == data.size
    expected, _ = np.histogram(data, bins=np.append(first.edges[:-1], np.inf))
    np.testing.assert_array_equal(first.counts, expected)
    moved, _ = np.histogram(data, bins=np.append(first.edges[:-1] + first.width, np.inf))
    assert not np.array_equal(first.counts, moved)


def test_merged_histograms_equal_one_pass_bin_for_bin():
    parts = batches()
    left, right = filled(parts[:1], bins=256), filled(parts[1:], bins=256)
    left.merge(right)
    once = filled(parts, bins=256)
    np.testing.assert_array_equal(left.counts, once.counts)
    np.testing.assert_array_equal(left.edges, once.edges)
    with pytest.raises(ValueError, match="do not merge"):
        left.merge(Histogram(bins=128))


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-30, 3e38, 1e-44])
def test_histogram_of_one_value(value):
    histogram = filled([torch.full((10,), value), torch.full((3,), value)])
    assert histogram.count == 13 and histogram.low == histogram.high == float(torch.tensor(value))
    assert histogram.quantile(0.5) == histogram.low


def test_histogram_after_zeros_still_resolves_what_follows():
    part = torch.rand(10_000, generator=torch.Generator().manual_seed(1))
    late = filled([torch.zeros(10), part, torch.zeros(10)])
    np.testing.assert_array_equal(late.counts, filled([part, torch.zeros(20)]).counts)


def test_memory_does_not_grow_with_the_range():
    histogram = filled([torch.randn(100) * 10.0**i for i in range(-20, 20)], bins=512)
    assert histogram.counts.size <= 512 and histogram.count == 4000


def test_stride_samples_the_stream_however_it_is_cut():
    data = torch.randn(10_007, generator=torch.Generator().manual_seed(2))
    whole_stream = filled([data], stride=17)
    cut = filled(data.split(123), stride=17)
    for size in (1, 16, 1000, 9_999):
        np.testing.assert_array_equal(whole_stream.counts, filled(data.split(size), stride=17).counts)
    sampled = data[torch.arange(len(data)) // 16 % 17 == 0]
    expected, _ = np.histogram(sampled.double().numpy(), np.append(cut.edges[:-1], np.inf))
    np.testing.assert_array_equal(cut.counts, expected)
    assert (cut.low, cut.high) == (float(data.min()), float(data.max()))
    assert not np.array_equal(cut.counts, filled([data[1:]], stride=17).counts)


def test_quantiles_and_percentiles_lie_within_a_bin_of_numpy():
    parts = batches()
    histogram, data = filled(parts), whole(parts)
    for q in (0.001, 0.01, 0.25, 0.5, 0.9, 0.999):
        at = data.size * q  # the data are sparse in the tails: any value between two neighbours is right
        near = np.sort(data.ravel())[max(int(at) - 1, 0) : int(at) + 2]
        assert near[0] - histogram.width <= histogram.quantile(q) <= near[-1] + histogram.width
    assert histogram.percentile(100) == (data.min(), data.max())
    low, high = histogram.percentile(99)
    assert low == histogram.quantile(0.01) or low == pytest.approx(histogram.quantile(0.01))
    assert high < data.max()
    with pytest.raises(ValueError, match="percentile"):
        histogram.percentile(0.999)


# ---------------------------------------------------------------- clipping


def rounded(data: np.ndarray, low: float, high: float, levels: int = 256) -> float:
    """Mean squared error of asymmetric rounding, written out."""
    scale = (high - low) / (levels - 1)
    zero = np.round(-low / scale)
    q = np.clip(np.round(data / scale) + zero, 0, levels - 1)
    return float(np.mean(((q - zero) * scale - data) ** 2))


@pytest.mark.parametrize("levels", [16, 256])
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier", "negative"])
def test_mse_range_is_as_good_as_trying_every_range_on_the_data(kind, levels):
    data = np.random.default_rng(3).standard_normal(20_000).astype(np.float32)
    if kind == "relu":
        data = np.maximum(data, 0)
    elif kind == "negative":
        data = -np.abs(data)
    elif kind == "outlier":
        data[:3] = 60.0
    low, high = mse_range(filled([torch.from_numpy(data)]), levels)
    least, most = min(data.min(), 0.0), max(data.max(), 0.0)
    grid = np.linspace(0.02, 1, 50)
    best = min(rounded(data, least * a, most * b, levels) for a in grid for b in grid if least * a < most * b)
    assert least <= low <= 0 <= high <= most
    assert rounded(data, low, high, levels) <= best * 1.02
    if levels == 16 and kind != "negative":
        assert rounded(data, least, most, levels) > best * 1.2  # min-max would not pass


def test_mse_range_symmetric_clips_both_sides_alike():
    data = torch.randn(20_000, generator=torch.Generator().manual_seed(4))
    low, high = mse_range(filled([data]), 16, symmetric=True)
    assert low == -high and 2.0 < high < 3.2  # 2.6-3 sigma is the optimum at 4 bits
    assert float(data.abs().max()) > 3.5


def test_entropy_range_matches_the_formula_and_cuts_a_lone_tail():
    data = torch.randn(50_000, generator=torch.Generator().manual_seed(5)).abs()
    data[0] = 40.0
    histogram = filled([data], bins=2048)
    low, high = entropy_range(histogram, levels=128)
    assert low == 0 and 3.0 < high < 10.0

    def divergence(end: float) -> float:
        inside = int(np.sum(histogram.edges[:-1] < end))
        counts = histogram.counts.astype(float)
        counts[0] = 0
        p, q = counts[:inside].copy(), np.zeros(inside)
        p[-1] += counts[inside:].sum()
        for level in range(128):
            bins = [i for i in range(inside) if i * 128 // inside == level]
            full = [i for i in bins if p[i] > 0]
            for i in full:
                q[i] = counts[bins].sum() / len(full)
        p, q = p / p.sum(), q / q.sum()
        return sum(a * np.log(a / max(b, 1e-9)) for a, b in zip(p, q, strict=True) if a > 0)

    chosen = divergence(high)
    assert chosen <= min(divergence(high * f) for f in (0.5, 0.7, 1.5, 2.0))
    assert divergence(40.0) > 2 * chosen  # the min-max range would not pass


def test_entropy_range_of_an_even_spread_is_the_whole_of_it():
    low, high = entropy_range(filled([torch.linspace(-1, 1, 100_000)]), levels=256)
    assert low < -0.9 and high > 0.9


# ---------------------------------------------------------------- second order


def test_gram_is_numpy_s_product():
    generator = torch.Generator().manual_seed(6)
    pairs = [torch.randn(4, 50, 10, generator=generator).split([7, 3], -1) for _ in range(3)]
    once, left, right = Gram(7, 3), Gram(7, 3), Gram(7, 3)
    for i, (x, y) in enumerate(pairs):
        once.update(x, y)
        (left if i else right).update(x, y)
    left.merge(right)
    x = np.concatenate([p[0].reshape(-1, 7).double().numpy() for p in pairs])
    y = np.concatenate([p[1].reshape(-1, 3).double().numpy() for p in pairs])
    for gram in (once, left):
        np.testing.assert_allclose(gram.xx, x.T @ x, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(gram.xy, x.T @ y, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(gram.total, x.sum(0), rtol=1e-10)
        np.testing.assert_allclose(gram.target_total, y.sum(0), rtol=1e-10)
        assert gram.count == 600
    assert not np.allclose(right.xx, x.T @ x, rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match="targets"):
        once.update(pairs[0][0])
    with pytest.raises(ValueError, match="rows"):
        once.update(pairs[0][0], pairs[0][1][:2])


def test_gram_adds_up_in_float64():
    gram = Gram(1)
    gram.update(torch.full((1, 1), 5000.0))
    for _ in range(50):
        gram.update(torch.full((1, 1), 0.5))
    assert float(gram.xx) == 25e6 + 50 * 0.25
    assert float(torch.tensor(25e6, dtype=torch.float32) + 0.25) == 25e6  # float32 would have lost each


def test_covariance_keeps_its_digits_far_from_zero_and_merges():
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(5, 5, generator=generator)
    parts = [torch.randn(300, 5, generator=generator) @ mixing + 1000 + i for i in range(4)]
    once, left, right = Covariance(5), Covariance(5), Covariance(5)
    for i, part in enumerate(parts):
        once.update(part)
        (left if i < 1 else right).update(part)
    left.merge(right)
    data = whole(parts)
    for result in (once, left):
        np.testing.assert_allclose(result.mean, data.mean(0), rtol=1e-12)
        np.testing.assert_allclose(result.covariance, np.cov(data.T, bias=True), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(result.variance, data.var(0), rtol=1e-4)
    naive = torch.cat(parts).float()
    naive = (naive.T @ naive / len(naive) - torch.outer(naive.mean(0), naive.mean(0))).numpy()
    assert not np.allclose(naive, np.cov(data.T, bias=True), rtol=1e-2, atol=1e-2)


def test_half_and_integer_tensors_are_taken():
    for tensor in (torch.tensor([1.5, -2.0]).half(), torch.tensor([1, -2]).to(torch.int64)):
        ranges, histogram = MinMax(), Histogram()
        ranges.update(tensor)
        histogram.update(tensor)
        assert float(ranges.low) == histogram.low == -2.0
