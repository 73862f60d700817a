"""Functions at arguments where their textbook form has lost every digit: the file against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Applied
from torch import Tensor, nn

from compressor import runtime
from compressor.capture import capture
from compressor.emit import emit
from compressor.errors import UnsupportedError

EDGES = [-200.0, -20.0, -0.999, -0.5, -1.496e-5, -5e-9, 0.0, 1e-9, 5.07e-6, 0.3, 1.0, 20.0, 80.0]
FUNCTIONS: dict[str, Any] = {
    "log_sigmoid": F.logsigmoid,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "logaddexp": lambda x: torch.logaddexp(x, x.flip(1)),
    "logaddexp2": lambda x: torch.logaddexp2(x, 2 * x),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 1),
    "logcumsumexp from the right": lambda x: torch.logcumsumexp(x.flip(1), -1),
}


def emitted(function: Any, x: Tensor, path: Path) -> np.ndarray:
    file = emit(capture(Applied(function), (x,)), path / "model.onnx").path
    return runtime.run(runtime.session(file, threads=1), [x.numpy()])[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_edges_keep_their_digits(name, tmp_path):
    x = torch.tensor([EDGES, EDGES[::-1]])
    expected = FUNCTIONS[name](x).numpy()
    np.testing.assert_allclose(emitted(FUNCTIONS[name], x, tmp_path), expected, rtol=1e-6, atol=3e-9)


def test_infinities_are_added(tmp_path):
    x = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf, torch.inf]] * 2)
    y = torch.tensor([0.0, -torch.inf, 2.0, -torch.inf, torch.inf])
    expected = torch.logaddexp(x, y).numpy()
    np.testing.assert_allclose(emitted(lambda x: torch.logaddexp(x, y), x, tmp_path), expected, rtol=1e-6)


@pytest.mark.parametrize("function", [torch.logcumsumexp, torch.cumprod])
def test_what_runs_along_a_dynamic_axis_is_refused(function, tmp_path):
    with pytest.raises(UnsupportedError, match=function.__name__):
        emitted(lambda x: function(x, 0), torch.randn(4, 3), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.bool])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}])
@pytest.mark.parametrize("axis", [1, -1])
def test_products_run_along_an_axis(dtype, options, axis, tmp_path):
    x = torch.randint(-3, 4, (2, 5, 6)).to(dtype)
    found = emitted(lambda x: torch.cumprod(x, axis, **options), x, tmp_path)
    expected = torch.cumprod(x, axis, **options).numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_a_single_number_is_its_own_product(tmp_path):
    x = torch.randn(3, 4)
    found = emitted(lambda x: x + x.sum().cumprod(0), x, tmp_path)
    np.testing.assert_allclose(found, (x + x.sum()).numpy(), rtol=1e-5, atol=1e-6)


NUMBERS = [-1e4, -88.8, -3.5, -0.7, -1e-8, -0.0, 0.0, 1e-8, 0.7, 3.5, 88.8, 1e4, torch.inf, -torch.inf]
EXTREMES = [*NUMBERS, torch.nan, 1e38, -1e-38, 3e-30]


@pytest.mark.parametrize("name", ["copysign", "hypot", "fmax", "fmin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_c_says_of_two_numbers(name, dtype, tmp_path):
    """Squares that are out of range, zeros with a sign, numbers beside none."""
    numbers = torch.tensor(EXTREMES, dtype=dtype)
    a, b = torch.meshgrid(numbers, numbers, indexing="ij")
    function = getattr(torch, name)
    expected, found = (
        function(a, b).numpy(),
        emitted(lambda x: function(x[0], x[1]), torch.stack([a, b]), tmp_path),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if name == "copysign":  # what is no number has no sign
        np.testing.assert_array_equal(
            np.signbit(found) & (found == found), np.signbit(expected) & (found == found)
        )


@pytest.mark.parametrize("name", ["copysign", "fmax", "fmin"])
def test_what_c_says_of_whole_numbers(name, tmp_path):
    x, function = torch.tensor([[-3, -3, 0, 5], [2, -7, -1, 5]]), getattr(torch, name)
    found = emitted(lambda x: function(x[0], x[1]), x, tmp_path)
    expected = function(x[0], x[1]).numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


DIVISIONS: dict[str, Any] = {
    "remainder": lambda a, b: a % b,
    "remainder of a number": lambda a, b: 3.5 % b,
    "remainder by a number": lambda a, b: a % -0.7,
    "floor": lambda a, b: a // b,
    "floor by a number": lambda a, b: torch.div(a, 0.7, rounding_mode="floor"),
    "trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in DIVISIONS), ("remainder", torch.float64), ("floor", torch.float64),
     ("remainder", torch.float16), ("remainder by a number", torch.float16)],
)  # fmt: skip
def test_quotients_and_remainders_are_exact(name, dtype, tmp_path):
    """Where a quotient is a whole number but for its last bit, floor(x / y) is another one."""
    numbers = torch.tensor(NUMBERS, dtype=dtype)
    a, b = (part.reshape(2, -1) for part in torch.cartesian_prod(numbers, numbers).T)
    expected = DIVISIONS[name](a, b).numpy()
    graph = capture(Applied(DIVISIONS[name]), (a, b))
    file = emit(graph, tmp_path / "model.onnx").path
    np.testing.assert_array_equal(
        runtime.run(runtime.session(file, threads=1), [a.numpy(), b.numpy()])[0], expected
    )


@pytest.mark.parametrize("mode", ["floor", "trunc"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integers_are_divided_as_integers(mode, dtype, tmp_path):
    large = 2**53 + 1 if dtype is torch.int64 else 2**30 + 1  # no float32 holds it
    a = torch.tensor([[large, -large, 7, -7, 6, -6, 0]], dtype=dtype).repeat(2, 1)
    b = torch.tensor([[3, 3, 2, 2, -3, -3, 5]], dtype=dtype).repeat(2, 1)
    graph = capture(Applied(lambda a, b: torch.div(a, b, rounding_mode=mode)), (a, b))
    file = emit(graph, tmp_path / "model.onnx").path
    found = runtime.run(runtime.session(file, threads=1), [a.numpy(), b.numpy()])[0]
    np.testing.assert_array_equal(found, torch.div(a, b, rounding_mode=mode).numpy())
    mixed = emit(
        capture(Applied(lambda a, b: a // 2.5 + a % 2.5), (a % 100, b)), tmp_path / "mixed.onnx"
    ).path
    found = runtime.run(runtime.session(mixed, threads=1), [(a % 100).numpy(), b.numpy()])[0]
    np.testing.assert_allclose(found, ((a % 100) // 2.5 + (a % 100) % 2.5).numpy())


def test_angles_in_all_quadrants_and_between(tmp_path):
    ends = torch.tensor([-2.0, -0.0, 0.0, 1e-8, 3.0, torch.inf])
    y, x = (part.reshape(2, -1) for part in torch.cartesian_prod(ends, ends[:-1]).T)
    file = emit(capture(Applied(torch.atan2), (y, x)), tmp_path / "model.onnx").path
    found = runtime.run(runtime.session(file, threads=1), [y.numpy(), x.numpy()])[0]
    expected = torch.atan2(y, x).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


PROJECTED = nn.LSTM(3, 4, proj_size=2)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (torch.special.log_ndtr, "-inf"),
        (lambda x: x.scatter_reduce(1, torch.zeros(2, 3, dtype=torch.int64), x, "mean"), "averages"),
        (lambda x: PROJECTED(x)[0], "proj_size"),
        (lambda x: x.to_sparse(), "sparse"),
    ],
)
def test_what_the_translator_gets_wrong_is_refused(function, words, tmp_path):
    with pytest.raises(UnsupportedError, match=words):
        emitted(function, torch.randn(2, 3), tmp_path)
