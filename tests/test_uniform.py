"""Constants repeated along a dynamic axis are computed once; what looks at the axis is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.capture import capture
from compressor.constants import fold_constants
from compressor.ir import Graph
from compressor.ops import kind
from compressor.uniform import fold_uniform


class Prompts(nn.Module):
    """Learned positions in front of those of the input, out of an encoder of their own. Liu et al. 2021 (P-tuning)."""

    def __init__(self, body: Callable[[Prompts, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.table, self.down, self.up = nn.Embedding(3, 6), nn.Linear(6, 4), nn.Linear(4, 6)
        self.register_buffer("places", torch.arange(3))

    def encode(self, places: Tensor) -> Tensor:
        return self.up(F.relu(self.down(self.table(places))))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def graph_of(body: Callable[[Prompts, Tensor], Tensor]) -> tuple[Prompts, Graph]:
    torch.manual_seed(0)
    model = Prompts(body).eval()
    graph = capture(model, (torch.randn(2, 5, 6),))
    fold_constants(graph, 1 << 20)
    return model, graph


def everywhere(m: Prompts, x: Tensor) -> Tensor:
    return torch.cat([m.encode(m.places[None].expand(x.shape[0], -1)), x], 1)


def first_of_equals(m: Prompts, x: Tensor) -> Tensor:
    return torch.cat([m.encode(m.places[None].expand(x.shape[0], -1)[:1]).expand(x.shape[0], -1, -1), x], 1)


def rearranged(m: Prompts, x: Tensor) -> Tensor:
    prompts = m.encode(m.places[None].expand(x.shape[0], -1)).view(x.shape[0], 3, 2, 3).permute(0, 2, 1, 3)
    return torch.cat([prompts, x.view(x.shape[0], 5, 2, 3).permute(0, 2, 1, 3)], 2)


@pytest.mark.parametrize("body", [everywhere, first_of_equals, rearranged])
def test_a_prompt_encoder_is_one_tensor(body: Callable[[Prompts, Tensor], Tensor]) -> None:
    model, graph = graph_of(body)
    (made,) = fold_uniform(graph, 1 << 20)
    assert made[1].endswith("operators on a repeated constant into one tensor")
    assert not {"linear", "embedding", "activation"} & {kind(n) for n in graph.nodes}
    graph.check()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 5, 6)
        assert torch.allclose(graph.run(x)[0], model(x), atol=1e-6)
    assert not torch.allclose(graph.run(x)[0], body(model.apply(_turn), x), atol=1e-2)


def _turn(part: nn.Module) -> None:
    if isinstance(part, nn.Linear):
        nn.init.constant_(part.weight, 0.5)


def read_on_the_way(m: Prompts, x: Tensor) -> Tensor:
    prompts = m.encode(m.places[None].expand(x.shape[0], -1))
    return torch.cat([x[:, :3] * prompts, torch.tanh(prompts * 2) * x[:, :3]], 1)


def made_of_no_size(m: Prompts, x: Tensor) -> Tensor:
    mask = F.pad(x.new_ones([4, 5]), (1, 0, 1, 0))
    return x * mask + x * torch.cat([mask[:1], mask])[:-1]


@pytest.mark.parametrize(("body", "count"), [(read_on_the_way, 2), (made_of_no_size, 1)])
def test_what_is_made_of_a_folded_value_is_right(
    body: Callable[[Prompts, Tensor], Tensor], count: int
) -> None:
    model, graph = graph_of(body)
    assert len(fold_uniform(graph, 1 << 20)) == count  # the rest of the second reads tensors alone
    graph.check()
    x = torch.randn(4, 5, 6)
    assert torch.allclose(graph.run(x)[0], model(x), atol=1e-6)


def test_a_constant_that_would_be_too_large_stays() -> None:
    _, graph = graph_of(everywhere)
    assert fold_uniform(graph, 3 * 6 * 4 - 1) == []
    assert len(fold_uniform(graph, 3 * 6 * 4)) == 1


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x + m.down.weight[:, :1].sum() * torch.ones(x.shape[0], 1, 1).cumsum(0),
        lambda m, x: x + torch.relu(m.up(torch.arange(x.shape[0])[:, None].expand(-1, 4) * 1.0))[:, None],
        lambda m, x: x + torch.tanh(m.table.weight.sum().expand(x.shape[0])).sum(),
        lambda m, x: x + torch.tanh(m.places.expand(x.shape[0], -1) * 1.0).mean() / x.shape[0],
    ],
)
def test_what_knows_the_size_is_not_folded_away(body: Callable[[Prompts, Tensor], Tensor]) -> None:
    model, graph = graph_of(body)
    fold_uniform(graph, 1 << 20)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 5, 6)
        assert torch.allclose(graph.run(x)[0], model(x), atol=1e-5)
