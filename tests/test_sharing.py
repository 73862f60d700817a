"""What is computed twice from the same operands is computed once, and nothing else is shared."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.capture import capture
from compressor.ops import kind
from compressor.sharing import share_equal


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one = F.pad(x, (1, 1), mode="reflect") + F.pad(x, (1, 1), mode="reflect")
        return one * F.pad(x, (1, 1), mode="circular") + F.pad(x, (1, 1)) + torch.tanh(one) - torch.tanh(one)


def test_equal_operators_are_one() -> None:
    x = torch.randn(2, 3, 5)
    graph = capture(Model(), (x,))
    expected = graph.run(x)[0]
    assert [kind(n) for n in share_equal(graph, lambda n: kind(n) == "pad")] == ["pad"]
    assert sum(kind(n) == "pad" for n in graph.nodes) == 3
    assert sum(kind(n) == "activation" for n in graph.nodes) == 2
    assert [kind(n) for n in share_equal(graph)] == ["activation"]
    graph.check()
    assert torch.equal(graph.run(x)[0], expected)


def test_numbers_of_other_types_and_random_operators_are_not_equal() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.to(torch.int64) * 1, x.to(torch.int64) * True
            return a + b + torch.bernoulli(torch.sigmoid(x)) - torch.bernoulli(torch.sigmoid(x))

    graph = capture(Other(), (torch.zeros(2, 3) - 50,))
    shared = {kind(n) for n in share_equal(graph)}
    assert shared == {"cast", "activation"}
