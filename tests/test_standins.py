"""Layers that do not export but are affine: found, probed as they run, captured as one linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import with_power

from compressor.capture import capture
from compressor.errors import UnsupportedError
from compressor.ops import kind
from compressor.standins import as_linear

WIDTH = 6


class Sparse(nn.Linear):
    """A linear plus a sparse matrix that its forward builds anew; the exporter cannot hold sparse tensors."""

    def __init__(self, ins: int = WIDTH, outs: int = 8) -> None:
        super().__init__(ins, outs)
        self.values = nn.Parameter(torch.ones(4))
        self.register_buffer("places", torch.tensor([[0, 1, 5, 7], [2, 0, 3, 5]]))

    def change(self) -> Tensor:
        count = int(self.values.ne(0).sum().item())  # a number asked of a tensor: no exporter can answer
        return torch.sparse_coo_tensor(
            self.places[:, :count], self.values[:count], self.weight.shape
        ).to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.change())


class Kinked(Sparse):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(max=50.0))


class Averaging(Sparse):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-2, keepdim=True))


class Counting(Sparse):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.shape[0]


class Squaring(Sparse):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-6 * F.linear(x * x, self.weight)


class Picky(Sparse):
    """Fails, and not by an error of torch's, on any but one sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * {1: 1.0}[len(x)]


class Blocks(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = layer(WIDTH, 8), layer(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) * self.second(x)


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 4, WIDTH), (3, WIDTH)])
def test_a_layer_that_does_not_export_is_one_linear(shape: tuple[int, ...]) -> None:
    model = with_power(Blocks(Sparse), example(*shape))
    graph = capture(model, (example(*shape),))
    assert [kind(n) for n in graph.nodes if n.op == "call_function"] == [
        "linear",
        "activation",
        "linear",
        "mul",
    ]
    assert "first (Sparse) and 1 more like it do not export but are affine" in graph.notices[0]
    assert isinstance(model.first, Sparse), "the user's model is as it was"
    x = example(5, *shape[1:])
    expected = model(x)
    assert torch.allclose(graph.run(x)[0], expected, atol=1e-6 * float(expected.abs().max()))
    plain = F.linear(x, model.second.weight, model.second.bias)
    assert not torch.allclose(graph.run(x)[0], torch.tanh(model.first(x)) * plain, atol=1e-3)


def test_a_model_that_does_not_run_is_the_error_of_the_exporter() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(5, 2))
    with pytest.raises(UnsupportedError, match="does not export"):
        capture(model, (example(2, WIDTH),))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(example(2, WIDTH))


@pytest.mark.parametrize("layer", [Kinked, Averaging, Counting, Squaring, Picky])
def test_a_layer_that_is_not_affine_is_refused(layer: type[nn.Module]) -> None:
    model = with_power(
        Blocks(layer), example(1, 1, WIDTH)
    )  # one token: neither its mean nor its count shows there
    with pytest.raises(UnsupportedError, match="does not export"):
        capture(model, (example(1, 1, WIDTH),))
    assert as_linear(model.first, example(1, 1, WIDTH)) is None


def test_weight_and_bias_are_read_off() -> None:
    layer = with_power(Sparse(), example(2, WIDTH))
    linear = as_linear(layer, example(2, 3, WIDTH))
    assert linear is not None
    assert torch.allclose(linear.weight, layer.weight + layer.change(), atol=1e-6)
    assert torch.allclose(linear.bias, layer.bias, atol=1e-6)
    assert not torch.allclose(linear.weight, layer.weight, atol=1e-2)


def test_a_layer_that_takes_more_than_one_tensor_is_refused() -> None:
    class Two(Sparse):
        def forward(self, x: Tensor, other: Any = None) -> Tensor:
            return super().forward(x) + other

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Two()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x.sum())

    with pytest.raises(UnsupportedError, match="does not export"):
        capture(Model().eval(), (example(2, WIDTH),))
