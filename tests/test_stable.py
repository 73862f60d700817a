"""Functions at arguments where their textbook form has lost every digit: the file against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


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


def test_a_sum_along_a_dynamic_axis_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="logcumsumexp"):
        emitted(lambda x: torch.logcumsumexp(x, 0), torch.randn(4, 3), tmp_path)
