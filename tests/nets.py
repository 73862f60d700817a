"""Small networks written as one function, the noise of what came out of them, and the files of a folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn


class Net(nn.Module):
    """Layers and buffers by name, and a function of the network and its inputs."""

    def __init__(self, forward: Callable, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor, mask: Tensor | None = None):
        return self.function(self, x) if mask is None else self.function(self, x, mask)


class Applied(nn.Module):
    """A function of its inputs, and nothing else."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor):
        return self.function(*x)


def conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    """A convolution that keeps the size of its input."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def noise(expected: Tensor, seen: Tensor) -> float:
    """Signal over noise in dB; -inf for NaN and infinities."""
    expected, seen = expected.detach().double(), seen.detach().double()
    share = float((expected - seen).square().sum() / expected.square().sum())
    return -10 * math.log10(share or 1e-30) if math.isfinite(share) else -math.inf


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
