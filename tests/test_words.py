"""Operators that torch.onnx has no words for: the file against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Applied
from torch import Tensor

from compressor import runtime
from compressor.capture import capture
from compressor.emit import emit
from compressor.errors import UnsupportedError
from compressor.ir import Input


def emitted(function: Any, inputs: tuple[Tensor, ...], path: Path, specs: Any = None) -> np.ndarray:
    graph = capture(Applied(function), inputs=specs) if specs else capture(Applied(function), inputs)
    file = emit(graph, path / "model.onnx").path
    return runtime.run(runtime.session(file, threads=1), [x.numpy() for x in inputs])[0]


@pytest.mark.parametrize("p", [1.0, 2.0, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances(p, dtype, tmp_path):
    a, b = torch.randn(2, 5, 7, dtype=dtype), torch.randn(2, 3, 7, dtype=dtype)
    expected = torch.cdist(a, b, p).numpy()
    np.testing.assert_allclose(
        emitted(lambda a, b: torch.cdist(a, b, p), (a, b), tmp_path), expected, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_of_many_points_are_as_exact_as_a_product(dtype, tmp_path):
    a, b = torch.randn(40, 64, dtype=dtype), torch.randn(50, 64, dtype=dtype)
    b[0] = a[0]
    expected = (a.double()[:, None] - b.double()).norm(dim=2).numpy()
    found = emitted(torch.cdist, (a, b), tmp_path)
    np.testing.assert_allclose(found**2, expected**2, rtol=1e-5, atol=1e-4)


def test_distances_of_any_number_of_points(tmp_path):
    specs = [Input("a", torch.float32, ("batch", "points", 6)), Input("b", torch.float32, ("batch", 4, 6))]
    a, b = torch.randn(3, 9, 6), torch.randn(3, 4, 6)
    found = emitted(torch.cdist, (a, b), tmp_path, specs)
    np.testing.assert_allclose(found, torch.cdist(a, b).numpy(), rtol=1e-5)


def test_other_distances_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="cdist"):
        emitted(lambda a, b: torch.cdist(a, b, 3.0), (torch.randn(5, 7), torch.randn(3, 7)), tmp_path)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_number_falls_among_others(right, dtype, tmp_path):
    line = torch.tensor([-2, 0, 0, 1, 5]).to(dtype)
    x = torch.tensor([[-3, -2, 0], [1, 4, 9]]).to(dtype)
    found = emitted(lambda x: torch.bucketize(x, line, right=right), (x,), tmp_path)
    np.testing.assert_array_equal(found, torch.bucketize(x, line, right=right).numpy())


def test_numbers_fall_among_others_row_by_row(tmp_path):
    lines = torch.randn(2, 6).sort().values
    x = torch.cat([torch.randn(2, 4), lines[:, :1], torch.full((2, 1), torch.nan)], 1)
    asked = {"side": "right", "out_int32": True}
    found = emitted(lambda lines, x: torch.searchsorted(lines, x, **asked), (lines, x), tmp_path)
    expected = torch.searchsorted(lines, x, **asked).numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_one_number_falls_among_others(tmp_path):
    line = torch.tensor([-2.0, 0.0, 1.0])
    found = emitted(lambda x: torch.bucketize(x.sum(), line), (torch.full((2, 2), 0.1),), tmp_path)
    assert found.shape == () and found == 2


def test_a_line_that_is_sorted_by_an_index_is_refused(tmp_path):
    line, order = torch.tensor([3.0, 1.0]), torch.tensor([1, 0])
    with pytest.raises(UnsupportedError, match="searchsorted"):
        emitted(lambda x: torch.searchsorted(line, x, sorter=order), (torch.randn(2, 3),), tmp_path)
