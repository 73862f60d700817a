"""Models too large to be copied: weights in a file of their own, written piece by piece and run apart from torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import compressor
from compressor import apart, delivery, measure, runtime
from compressor.capture import capture
from compressor.data import Batch
from compressor.emit import emit
from compressor.errors import ContractError, TargetError
from compressor.ir import Input
from compressor.spill import LEAST_BYTES, spilling
from compressor.target import Target

TARGET = Target("cpu", "", ("CPUExecutionProvider",))


class Adapted(nn.Module):
    """A linear and a low-rank pair beside it: one linear."""

    def __init__(self, width: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


class Tied(nn.Module):
    """Words in, a score for each word out, with one table for both."""

    def __init__(self, words: int = 600, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.body = Adapted(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.table(ids)).relu())


IDS = torch.arange(10).reshape(2, 5)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as large, every tensor as worth a file."""
    monkeypatch.setattr("compressor.emit.EXTERNAL_DATA_BYTES", 1000)
    monkeypatch.setattr("compressor.spill.LEAST_BYTES", 1000)


# ------------------------------------------------------------------------- the file


def test_weights_lie_once_and_on_pages_in_a_file_of_their_own(large, tmp_path):
    emitted = emit(capture(Tied(), (IDS,)), tmp_path / "model.onnx")
    proto = onnx.load(emitted.path, load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.external_data
    }
    assert {place["location"] for place in places.values()} == {"model.onnx.data"}
    assert all(int(place["offset"]) % 4096 == 0 for place in places.values())
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    assert shapes["table.weight"] == (600, 32) and (32, 600) not in shapes.values(), "the tied head is no copy"
    assert shapes["body.base.weight"] == (32, 32), "named after its module, transposed as MatMul reads it"
    data = (tmp_path / "model.onnx.data").read_bytes()
    stored = np.frombuffer(data, np.float32, 32 * 32, int(places["body.base.weight"]["offset"]))
    model = Tied()
    torch.manual_seed(0)
    model = Tied()
    stored_again = model.body.base.weight.detach().numpy()
    assert stored.reshape(32, 32).T.shape == stored_again.shape
    assert emitted.bytes == len(data) + emitted.path.stat().st_size
