"""Per-channel scales and shifts go into layers through whatever only moves values; what cannot take them stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fold import fold, operators
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import with_power

from compressor.capture import capture
from compressor.ir import Graph
from compressor.scales import Map, map_of


class Model(nn.Module):
    """Layers by name, and a forward over them and a vector `v` of one entry a channel."""

    def __init__(self, forward: Callable[..., Any], channels: int = 8, **layers: nn.Module) -> None:
        super().__init__()
        self.body, self.layers = forward, nn.ModuleDict(layers)
        self.v = nn.Parameter(0.5 + torch.rand(channels))

    def __getattr__(self, name: str) -> Any:
        layers = self.__dict__.get("_modules", {}).get("layers")
        return layers[name] if layers is not None and name in layers else super().__getattr__(name)

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)


def graph_of(model: nn.Module, *example: Tensor) -> Graph:
    return capture(with_power(model, *example), example)


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(8, 8, bias=bias)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


TOKENS, IMAGE = (2, 5, 8), (2, 8, 6, 6)

# name -> forward, layers, shape of the input, kinds of operators that must be left
ABOVE: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], tuple[int, ...], set[str]]] = {
    "a product behind a linear": (lambda m, x: m.a(x) * m.v, {"a": linear()}, TOKENS, {"linear"}),
    "a quotient": (lambda m, x: m.a(x) / m.v, {"a": linear()}, TOKENS, {"linear"}),
    "a sum, without a bias": (lambda m, x: m.a(x) + m.v, {"a": linear(False)}, TOKENS, {"linear"}),
    "a constant less it": (lambda m, x: m.v - m.a(x), {"a": linear()}, TOKENS, {"linear"}),
    "minus": (lambda m, x: -m.a(x), {"a": linear()}, TOKENS, {"linear"}),
    "a layer scale, channels first": (
        lambda m, x: m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * m.v[:, None, None],
        {"a": linear()}, IMAGE, {"linear", "permute"},
    ),
    "a convolution": (lambda m, x: m.a(x) * m.v.view(1, 8, 1, 1), {"a": nn.Conv2d(8, 8, 3)}, IMAGE, {"conv"}),
    "a grouped transposed one": (
        lambda m, x: m.a(x) * m.v.view(8, 1, 1) + 1, {"a": nn.ConvTranspose2d(8, 8, 3, groups=4)}, IMAGE,
        {"conv_transpose"},
    ),
    "behind a batch norm": (
        lambda m, x: m.a(torch.relu(x)) * m.v.view(8, 1, 1), {"a": nn.BatchNorm2d(8)}, IMAGE,
        {"batch_norm", "activation"},
    ),
    "behind a layer norm": (lambda m, x: m.a(x) * m.v + m.v, {"a": nn.LayerNorm(8)}, TOKENS, {"layer_norm"}),
    "behind a plain layer norm": (
        lambda m, x: m.a(x) * m.v, {"a": nn.LayerNorm(8, elementwise_affine=False)}, TOKENS, {"layer_norm"},
    ),
    "behind an RMS norm": (lambda m, x: m.a(x) * m.v, {"a": nn.RMSNorm(8)}, TOKENS, {"rms_norm"}),
    "behind a group norm": (
        lambda m, x: m.a(x) * m.v.view(8, 1, 1) - 3, {"a": nn.GroupNorm(2, 8)}, IMAGE, {"group_norm"},
    ),
    "queries in heads": (
        lambda m, x: heads(m.a(x)) * 0.5, {"a": linear()}, TOKENS, {"linear", "view", "unflatten", "transpose"},
    ),
    "one part of three": (
        lambda m, x: tuple(p * s for p, s in zip(m.a(x).chunk(3, -1), (0.25, 1.0, 2.0), strict=True)),
        {"a": nn.Linear(8, 24)}, TOKENS, {"linear", "chunk", "getitem", "slice"},
    ),
    "half of the channels": (
        lambda m, x: torch.cat([m.a(x)[:, :4] * m.v[:4, None, None], m.a(x)[:, 4:].relu()], 1),
        {"a": nn.Conv2d(8, 8, 1)}, IMAGE, {"conv", "slice", "cat", "activation"},
    ),
    "a matrix": (lambda m, x: (x @ m.a.weight) * m.v, {"a": linear()}, TOKENS, {"matmul"}),
    "GPT-2's layer": (
        lambda m, x: torch.addmm(m.a.bias, x.view(-1, 8), m.a.weight).view(x.shape) * m.v, {"a": linear()}, TOKENS,
        {"addmm", "view", "size"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("body, layers, size, left", ABOVE.values(), ids=ABOVE)
def test_into_the_layer_above(
    body: Callable[..., Any], layers: dict[str, nn.Module], size: tuple[int, ...], left: set[str]
) -> None:
    before = graph_of(Model(body, **copy.deepcopy(layers)), torch.randn(size))
    after, outcome = fold(before)
    assert operators(after).keys() <= left, operators(after)
    assert any("in front of it (" in r.what for r in outcome.rewrites)


def test_a_table_takes_its_scale_unless_it_is_tied() -> None:
    tokens = torch.randint(0, 9, (2, 5))
    table = {"a": nn.Embedding(9, 8)}
    after, _ = fold(capture(Model(lambda m, x: m.a(x) * math.sqrt(8), **table).eval(), (tokens,)))
    assert operators(after) == {"embedding": 1}
    tied = Model(lambda m, x: F.linear(torch.tanh(m.a(x) * math.sqrt(8)), m.a.weight), **table)
    after, _ = fold(capture(tied.eval(), (tokens,)))
    assert operators(after)["mul"] == 1 and len(after.tensors) == 1


# name -> forward, layers, shape of the input, kinds of operators that must be left
BELOW: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], tuple[int, ...], dict[str, int]]] = {
    "a normalised input": (
        lambda m, x: m.a((x - 0.4) / m.v.view(8, 1, 1)), {"a": nn.Conv2d(8, 4, 3)}, IMAGE, {"conv": 1},
    ),
    "padded, the shift stays": (
        lambda m, x: m.a((x - 0.4) / m.v.view(8, 1, 1)), {"a": nn.Conv2d(8, 4, 3, padding=1)}, IMAGE,
        {"sub": 1, "conv": 1},
    ),
    "from pixels, padded": (
        lambda m, x: m.a((x / 255 - m.v.view(8, 1, 1)) / m.v.view(8, 1, 1)),
        {"a": nn.Conv2d(8, 4, 3, padding=1)}, IMAGE, {"add": 1, "conv": 1},
    ),
    "a scale, padded": (
        lambda m, x: m.a(x * m.v.view(8, 1, 1)), {"a": nn.Conv2d(8, 4, 3, padding=1, groups=2)}, IMAGE, {"conv": 1},
    ),
    "a scale in front of a transposed one": (
        lambda m, x: m.a(x * m.v.view(8, 1, 1)), {"a": nn.ConvTranspose2d(8, 4, 3, groups=2)}, IMAGE,
        {"conv_transpose": 1},
    ),
    "a batch norm that two linears read": (
        lambda m, x: (m.b(m.a(torch.relu(x))), m.c(m.a(torch.relu(x)))),
        {"a": nn.BatchNorm1d(8), "b": linear(), "c": linear(False)}, (3, 8), {"linear": 2, "activation": 1},
    ),
    "through a permute": (
        lambda m, x: m.a((torch.relu(x) * m.v.view(8, 1, 1)).permute(0, 2, 3, 1)), {"a": linear()}, IMAGE,
        {"activation": 1, "permute": 1, "linear": 1},
    ),
    "through a flatten": (
        lambda m, x: m.a((torch.relu(x) * m.v.view(8, 1, 1)).flatten(1)), {"a": nn.Linear(288, 4)}, IMAGE,
        {"activation": 1, "flatten": 1, "linear": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("body, layers, size, left", BELOW.values(), ids=BELOW)
def test_into_the_layers_below(
    body: Callable[..., Any], layers: dict[str, nn.Module], size: tuple[int, ...], left: dict[str, int]
) -> None:
    after, _ = fold(graph_of(Model(body, **copy.deepcopy(layers)), torch.randn(size)))
    assert operators(after) == left


FLIPPED: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], dict[str, int]]] = {
    "straight": (lambda m, x: m.a(x.flip(1)), {"a": nn.Conv2d(8, 4, 3, padding=1)}, {"conv": 1}),
    "shifted": (
        lambda m, x: m.a(x.flip(1) - m.v.view(8, 1, 1)), {"a": nn.Conv2d(8, 4, 3, padding=1)}, {"add": 1, "conv": 1},
    ),
    "normalised": (
        lambda m, x: m.a((x.flip(1) - m.v.view(8, 1, 1)) / m.v.view(8, 1, 1)), {"a": nn.Conv2d(8, 4, 3)}, {"conv": 1},
    ),
    "to a linear": (
        lambda m, x: m.a(x.flip(1).permute(0, 2, 3, 1)), {"a": linear()}, {"permute": 1, "linear": 1},
    ),
    "to groups": (
        lambda m, x: m.a(x.flip(1)), {"a": nn.Conv2d(8, 4, 3, groups=2)}, {"flip": 1, "conv": 1},
    ),
    "along pixels": (lambda m, x: m.a(x.flip(2)), {"a": nn.Conv2d(8, 4, 3)}, {"flip": 1, "conv": 1}),
}  # fmt: skip


@pytest.mark.parametrize("body, layers, left", FLIPPED.values(), ids=FLIPPED)
def test_reversed_channels_go_into_weights(
    body: Callable[..., Any], layers: dict[str, nn.Module], left: dict[str, int]
) -> None:
    after, _ = fold(graph_of(Model(body, **copy.deepcopy(layers)), torch.randn(IMAGE)))
    assert operators(after) == left


# name -> forward, layers, shape of the input, the operator that must stay
STAYS: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], tuple[int, ...], str]] = {
    "a constant that tells positions apart": (
        lambda m, x: m.a(x) * m.v[:5, None], {"a": linear()}, TOKENS, "mul",
    ),
    "what something else reads": (
        lambda m, x: m.a(x) * 2 + m.a(x).tanh(), {"a": linear()}, TOKENS, "mul",
    ),
    "a part that overlaps with another": (
        lambda m, x: (m.a(x)[..., :5] * 2, m.a(x)[..., 4:].tanh()), {"a": linear()}, TOKENS, "mul",
    ),
    "behind an activation": (lambda m, x: m.a(x).relu() * m.v, {"a": linear()}, TOKENS, "mul"),
    "two parts that share channels": (
        lambda m, x: torch.stack([m.a(x)[..., :4] * 2, m.a(x)[..., 2:6]]), {"a": linear()}, TOKENS, "mul",
    ),
    "a shift of an RMS norm": (lambda m, x: m.a(x) + m.v, {"a": nn.RMSNorm(8)}, TOKENS, "add"),
    "behind a product with a vector": (lambda m, x: (m.a(x) @ m.v) * m.v[:5], {"a": linear()}, TOKENS, "mul"),
    "in front of a product with a vector": (lambda m, x: (x.relu() + m.v) @ m.v, {"a": linear()}, TOKENS, "add"),
    "as many positions as features": (
        lambda m, x: (m.a(x) @ m.v) * m.v, {"a": linear()}, (2, 8, 8), "mul",
    ),
    "a product of activations": (lambda m, x: m.a(x) * x, {"a": linear()}, TOKENS, "mul"),
    "a shift that padding meets": (
        lambda m, x: m.a(x.relu() + m.v.view(8, 1, 1)), {"a": nn.Conv2d(8, 4, 3, padding="same")}, IMAGE, "add",
    ),
    "a shift in front of a transposed one": (
        lambda m, x: m.a(x.relu() + 1), {"a": nn.ConvTranspose2d(8, 4, 3)}, IMAGE, "add",
    ),
}  # fmt: skip


@pytest.mark.parametrize("body, layers, size, operator", STAYS.values(), ids=STAYS)
def test_what_no_layer_can_take_stays(
    body: Callable[..., Any], layers: dict[str, nn.Module], size: tuple[int, ...], operator: str
) -> None:
    after, _ = fold(graph_of(Model(body, **copy.deepcopy(layers)), torch.randn(size)))
    assert operators(after)[operator] >= 1


def attention(m: Model, x: Tensor) -> Tensor:
    q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (m.q, m.k, m.w))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def by_hand(m: Model, x: Tensor) -> Tensor:
    q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (m.q, m.k, m.w))
    return ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v


def fused(m: Model, x: Tensor) -> Tensor:
    q, k, v = m.q(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, scale=0.3)


def fused_by_hand(m: Model, x: Tensor) -> Tensor:
    q, k, v = m.q(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


@pytest.mark.parametrize("body", [attention, by_hand, fused, fused_by_hand])
def test_the_scale_of_attention_goes_into_its_queries(body: Callable[..., Tensor]) -> None:
    layers = {"q": nn.Linear(8, 24 if body in (fused, fused_by_hand) else 8), "k": linear(), "w": linear()}
    before = graph_of(Model(body, **layers), torch.randn(2, 5, 8))
    after, outcome = fold(before)
    assert any(r.what.startswith("scale of ") for r in outcome.rewrites)
    assert operators(after)["div"] == 0 and not any("computed already" in r.what for r in outcome.rewrites)
    node = next((n for n in after.nodes if "scaled_dot" in str(n.target)), None)
    assert node is None or node.kwargs["scale"] == 1.0


@pytest.mark.parametrize("written_out", [False, True])
def test_where_queries_cannot_take_it_the_scale_goes_into_the_keys(written_out: bool) -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        k = m.k(x)
        if written_out:
            return ((x @ k.transpose(-1, -2)) / 2).softmax(-1) @ x
        return F.scaled_dot_product_attention(x, k, x)

    before = graph_of(Model(body, k=linear()), torch.randn(2, 5, 8))
    after, outcome = fold(before)
    assert next(r.what for r in outcome.rewrites if r.what.startswith("scale of ")).endswith("(layers.k)")
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(after.run(x)[0], before.run(x)[0])


def test_attention_to_itself_keeps_its_scale() -> None:
    model = Model(lambda m, x: F.scaled_dot_product_attention(m.q(x), m.q(x), x), q=linear())
    after, _ = fold(graph_of(model, torch.randn(2, 5, 8)))
    assert not any(n.kwargs.get("scale") for n in after.nodes)


@pytest.mark.parametrize(
    "body, scale, shift",
    [
        (lambda x, v: torch.rsub(x, v, alpha=3), -3.0, "v"),
        (lambda x, v: torch.add(x, v, alpha=2), 1.0, "2v"),
        (lambda x, v: torch.sub(v, x, alpha=2), -2.0, "v"),
    ],
)
def test_maps_are_read_off_operators(body: Callable[..., Tensor], scale: float, shift: str) -> None:
    graph = graph_of(Model(lambda m, x: body(torch.exp(x), m.v)), torch.randn(2, 8))
    one = map_of(graph, graph.results[0])
    assert isinstance(one, Map)
    v = graph.tensors["v"].double()
    assert torch.equal(one.scale.flatten(), torch.tensor([scale], dtype=torch.float64))
    assert torch.equal(one.shift.flatten(), 2 * v if shift == "2v" else v)


def test_parametrisations_become_plain_weights() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    dense = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.Flatten(), dense)
    after, _ = fold(graph_of(model, torch.randn(3, 4, 3, 3)))
    assert operators(after) == {"conv": 1, "flatten": 1, "linear": 1}


def test_a_slice_of_nothing_reads_nothing() -> None:
    """Rotary embeddings of models without prefix tokens cut off the first 0 of them."""

    def forward(m: Model, x: Tensor) -> Tensor:
        x = m.a(x)
        return torch.cat([x[:, :0], x * m.v], 1)

    fold(graph_of(Model(forward, a=linear()), torch.randn(TOKENS)))
