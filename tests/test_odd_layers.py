"""Layers that are empty, or give one vector: passes that read data leave them alone, or do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compressor


class Odd(nn.Module):
    """Beside an ordinary branch: a layer of no width, and one that reads the largest of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)
        self.none, self.back = nn.Linear(8, 0), nn.Linear(0, 4)
        self.context, self.bias = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        context = self.bias(self.context(x.amax(0)).relu())
        return self.down(self.up(x).relu()) + self.back(self.none(x)) + context


@pytest.mark.parametrize("spec", ["prune(macs=0.8,reach=best,align=1)", "squeeze(energy=0.9,measure=false)"])
@pytest.mark.parametrize("data", [True, False])
def test_they_are_no_obstacle(spec: str, data: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 8) for _ in range(4)] if data else None
    made = compressor.compress(
        Odd().eval(), torch.randn(8, 8), passes=spec, calibration=batches, output=tmp_path / "out",
        dynamic=False, measure=False,
    )  # fmt: skip
    row = next(row for row in made.report["rows"] if row["pass"] == spec.partition("(")[0])
    assert row["status"] in ("proved", "warned", "unchanged")
    assert made.graph.tensors["none.weight"].shape == (0, 8)
