"""Merge: adapters written with plain modules come back to the base model's operators, near misses stay and say why."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import with_power

from compressor.capture import capture
from compressor.data import open_data
from compressor.ir import Graph, Input
from compressor.ops import kind
from compressor.pipeline import Context, Outcome
from compressor.target import Target
from compressor.verify import compare_values
from passes.merge import Merge

TOLERANCE = 1e-5  # of the output's largest value, as the exact contract has it
WIDTH, HEADS, LENGTH = 16, 2, 5


def context(graph: Graph, limit: int | None = None) -> Context:
    held_out = open_data([graph.example], graph.inputs)
    return Context(Target("cpu", "", ("CPUExecutionProvider",)), held_out, limit=limit)


def merge(graph: Graph, limit: int | None = None, **options: Any) -> tuple[Graph, Outcome]:
    """A merged copy, checked: invariants, every value that it claims to have kept, and a second run that is idle."""
    after = graph.copy()
    outcome = Merge(**options).run(after, context(after, limit))
    after.check()
    assert max((c.error for c in compare_values(graph, after, graph.example)), default=0) < TOLERANCE
    if limit is None:
        again, text = after.copy(), after.text()
        assert Merge(**options).run(again, context(again)).rewrites == []
        assert again.text() == text
    return after, outcome


def operators(graph: Graph) -> Counter[str]:
    return Counter(kind(n) for n in graph.nodes if n.op == "call_function")


def error(before: Graph, after: Graph, *inputs: Tensor) -> float:
    """Largest difference over all outputs, each relative to its largest value."""
    pairs = zip(before.run(*inputs), after.run(*inputs), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def reasons(outcome: Outcome) -> list[str]:
    return [d.reason for d in outcome.declines]


# ------------------------------------------------------------------------- a transformer, and adapters for it


class Block(nn.Module):
    """A pre-norm transformer block; `linear` makes its linears, `fused` gives it one for q, k and v."""

    def __init__(self, linear: Any = nn.Linear, fused: Any = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        if fused is None:
            self.q, self.k, self.v = (linear(WIDTH, WIDTH) for _ in range(3))
        self.qkv = fused(WIDTH, 3 * WIDTH) if fused is not None else None
        self.out, self.up, self.down = (
            linear(WIDTH, WIDTH),
            linear(WIDTH, 4 * WIDTH),
            linear(4 * WIDTH, WIDTH),
        )
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        parts = (self.q(h), self.k(h), self.v(h)) if self.qkv is None else self.qkv(h).chunk(3, -1)
        q, k, v = (p.view(*p.shape[:-1], HEADS, -1).transpose(1, 2) for p in parts)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(h)
        return x + self.down(self.act(self.up(self.norm2(x))))


class Adapted(nn.Module):
    """A linear with an adapter beside it."""

    rank = 4

    def __init__(self, ins: int, outs: int, bias: bool = False) -> None:
        super().__init__()
        self.base, self.drop = nn.Linear(ins, outs), nn.Dropout(0.1)
        self.down, self.up = nn.Linear(ins, self.rank, bias=bias), nn.Linear(self.rank, outs, bias=bias)


class LoRA(Adapted):
    scale = 8 / 4

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.drop(x))) * self.scale


class RsLoRA(LoRA):
    scale = 8 / 4**0.5


class BiasedLoRA(LoRA):
    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs, bias=True)


class DoRA(LoRA):
    """Weight decomposed into magnitude and direction; the direction's norm is computed from parameters."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs)
        self.magnitude = nn.Parameter(torch.ones(outs))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.scale * self.up.weight @ self.down.weight
        gain = (self.magnitude / torch.linalg.norm(weight, dim=1)).view(1, -1)
        delta = (gain - 1) * F.linear(x, self.base.weight) + gain * self.scale * self.up(
            self.down(self.drop(x))
        )
        return self.base(x) + delta


class IA3(nn.Module):
    """A vector on the outputs, or on the inputs where the layer narrows (the feed-forward layer)."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.base, self.before = nn.Linear(ins, outs), ins > outs
        self.vector = nn.Parameter(torch.ones(ins if self.before else outs))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x * self.vector) if self.before else self.base(x) * self.vector


class Several(nn.Module):
    """Three LoRA adapters at once, with weights."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.base = nn.Linear(ins, outs)
        self.downs = nn.ModuleList(nn.Linear(ins, r, bias=False) for r in (2, 3, 4))
        self.ups = nn.ModuleList(nn.Linear(r, outs, bias=False) for r in (2, 3, 4))
        self.weights = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.downs, self.ups, self.weights, strict=True)
        return self.base(x) + sum(weight * up(down(x)) for down, up, weight in parts)


class LoHa(nn.Module):
    """The update is an elementwise product of two low-rank products, all of it parameters."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.base = nn.Linear(ins, outs)
        self.a, self.b = (nn.Parameter(torch.ones(outs, 2)) for _ in range(2))
        self.c, self.d = (nn.Parameter(torch.ones(2, ins)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(x, (self.a @ self.c) * (self.b @ self.d))


class OFT(nn.Module):
    """A block-diagonal rotation of the inputs, the Cayley map of parameters."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.base = nn.Linear(ins, outs)
        self.skew = nn.Parameter(torch.ones(ins // 4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        skew, eye = self.skew - self.skew.transpose(1, 2), torch.eye(4)
        rotation = torch.linalg.solve(eye + skew, eye - skew)
        blocks = torch.einsum("...rk,rkc->...rc", x.view(*x.shape[:-1], -1, 4), rotation)
        return self.base(blocks.reshape(x.shape))


class SlicedLoRA(nn.Module):
    """A fused qkv whose q and v carry an adapter, put together again by cat."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.base, self.width = nn.Linear(ins, outs), outs // 3
        self.downs = nn.ModuleList(nn.Linear(ins, 2, bias=False) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(2, outs // 3, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, v = (up(down(x)) for down, up in zip(self.downs, self.ups, strict=True))
        return self.base(x) + torch.cat([q, x.new_zeros(*x.shape[:-1], self.width), v], -1)


class WritingLoRA(SlicedLoRA):
    """The same, written into slices of the fused output."""

    def forward(self, x: Tensor) -> Tensor:
        q, v = (up(down(x)) for down, up in zip(self.downs, self.ups, strict=True))
        y = self.base(x)
        y[..., : self.width] += q
        y[..., -self.width :] += v
        return y


class Bottleneck(Adapted):
    """Not affine: an activation between the two thin linears."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.act(self.down(x)))


def transformer(*args: Any, blocks: int = 1, **kwargs: Any) -> Graph:
    example = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    model = with_power(nn.Sequential(*(Block(*args, **kwargs) for _ in range(blocks))), example)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up.weight" in name or "ups." in name:
                parameter *= 0.3  # of the size of the base: softmax over larger logits magnifies rounding
    return capture(model, (example,))


# ------------------------------------------------------------------------- what merges


@pytest.mark.parametrize("adapter", [LoRA, RsLoRA, BiasedLoRA, DoRA, IA3, Several, LoHa, OFT])
def test_an_adapted_transformer_is_the_base_again(adapter: type[nn.Module]) -> None:
    base, before = transformer(), transformer(adapter)
    after, outcome = merge(before)
    assert operators(after) == operators(base)
    assert sum(operators(before).values()) > sum(operators(after).values())
    assert reasons(outcome) == []
    assert sum("into one linear" in r.what for r in outcome.rewrites) == 6
    for batch in (2, 3):  # dynamic: another batch than the example's
        x = torch.randn(batch, LENGTH, WIDTH)
        assert error(before, after, x) < TOLERANCE
        assert error(before, without_merged_bit(after), x) > 100 * TOLERANCE


def without_merged_bit(graph: Graph) -> Graph:
    """The wrong answer: one merged weight has lost its last row."""
    wrong = graph.copy()
    node = next(n for n in wrong.nodes if str(n.target).startswith("0.down") and n.meta["val"].dim() == 2)
    weight = wrong.tensor(node).clone()
    weight[-1] = 0
    wrong.set_tensor(node, weight)
    return wrong


@pytest.mark.parametrize("adapter", [SlicedLoRA, WritingLoRA])
def test_adapters_on_slices_of_a_fused_qkv(adapter: type[nn.Module]) -> None:
    base, before = transformer(fused=nn.Linear), transformer(fused=adapter)
    after, outcome = merge(before)
    assert operators(after)["linear"] == operators(base)["linear"] == 4
    assert not operators(after).keys() & {"cat", "create_like", "slice_scatter", "copy"}
    assert reasons(outcome) == []
    assert error(before, after, *before.example) < TOLERANCE
    assert error(before, transformer(fused=nn.Linear), *before.example) > 100 * TOLERANCE


def test_graph_before_and_after() -> None:
    example = torch.randn(2, 3, 4)
    before = capture(with_power(LoRA(4, 6), example), (example,))
    after, outcome = merge(before)
    assert before.text().splitlines()[4:] == [
        "%x: f32[batch, 3, 4] = input",
        "%linear: f32[batch, 3, 6] = aten.linear.default(%x, %base_weight, %base_bias)",
        "%dropout: f32[batch, 3, 4] = aten.dropout.default(%x, 0.1, False)",
        "%linear_1: f32[batch, 3, 4] = aten.linear.default(%dropout, %down_weight)",
        "%linear_2: f32[batch, 3, 6] = aten.linear.default(%linear_1, %up_weight)",
        "%mul: f32[batch, 3, 6] = aten.mul.Tensor(%linear_2, 2.0)",
        "%add: f32[batch, 3, 6] = aten.add.Tensor(%linear, %mul)",
        "return %add",
    ]
    assert after.text().splitlines() == [
        "%add_weight: f32[6, 4] = add.weight",
        "%base_bias: f32[6] = base.bias",
        "%x: f32[batch, 3, 4] = input",
        "%linear_default: f32[batch, 3, 6] = aten.linear.default(%x, %add_weight, %base_bias)",
        "return %linear_default",
    ]
    assert [(r.site, r.what) for r in outcome.rewrites] == [
        ("add", "add, dropout, 3 linear, mul into one linear 6x4")
    ]
    weights = {name: before.tensors[name].double() for name in before.tensors}
    expected = weights["base.weight"] + 2 * weights["up.weight"] @ weights["down.weight"]
    assert torch.equal(after.tensors["add.weight"], expected.float())
    assert "add.weight" in after.parameters


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_other_dtypes_are_probed_in_float64(dtype: torch.dtype, tolerance: float) -> None:
    example = torch.randn(2, 3, 16)
    before = capture(with_power(LoRA(16, 16), example).to(dtype), (example.to(dtype),))
    after, _ = merge_only(before)
    assert [n.meta["val"].dtype for n in after.results] == [dtype]
    assert error(before, after, *before.example) < tolerance
    weights = {name: before.tensors[name].double() for name in before.tensors}
    exact = weights["base.weight"] + 2 * weights["up.weight"] @ weights["down.weight"]
    torch.testing.assert_close(after.tensors["add.weight"], exact.to(dtype), rtol=1e-13, atol=0)


def merge_only(before: Graph) -> tuple[Graph, Outcome]:
    after = before.copy()
    return after, Merge().run(after, context(after))


def test_both_axes_dynamic() -> None:
    model = with_power(nn.Sequential(OFT(WIDTH, 8), nn.Tanh(), LoRA(8, 8)), torch.randn(2, LENGTH, WIDTH))
    spec = Input("input", torch.float32, ("batch", "sequence", WIDTH))
    before = capture(model, (torch.randn(2, LENGTH, WIDTH),), inputs=(spec,))
    after, _ = merge(before)
    assert operators(after) == {"linear": 2, "activation": 1}
    x = torch.randn(3, 11, WIDTH)
    assert error(before, after, x) < TOLERANCE


def test_addmm_between_reshapes_is_a_linear() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, 4), self.weight).view(*x.shape[:-1], 6)

    example = torch.randn(2, 3, 4)
    before = capture(with_power(Conv1D(), example), (example,))
    after, _ = merge(before)
    assert operators(after) == {"linear": 1}
    merged = next(t for t in after.tensors.values() if t.dim() == 2)
    assert merged.data_ptr() == before.tensors["weight"].data_ptr()  # turned, not copied


def test_limit_applies_the_first_rewrites_only() -> None:
    before = transformer(LoRA)
    _, full = merge(before)
    after, first = merge(before, limit=2)
    assert first.rewrites == full.rewrites[:2]
    assert [r.site for r in first.rewrites] == ["0.q", "0.k"]
    assert operators(after)["linear"] == 6 + 2 * 4
    assert merge(before, limit=0)[0].text() == before.text()


def test_two_runs_give_the_same_bytes() -> None:
    before = transformer(DoRA)
    assert merge(before)[0].fingerprint() == merge(before)[0].fingerprint()
    assert merge(before)[0].fingerprint() != before.fingerprint()


def test_the_users_weights_are_not_written_into() -> None:
    example = torch.randn(2, 3, 4)
    model = with_power(LoRA(4, 6), example)
    saved = {name: t.clone() for name, t in model.state_dict().items()}
    merge(capture(model, (example,)))
    assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())


# ------------------------------------------------------------------------- what stays, and why


def captured(model: nn.Module, *example: Tensor, **options: Any) -> Graph:
    return capture(with_power(model, *example), example, **options)


def declined(graph: Graph, **options: Any) -> list[str]:
    """Reasons of a merge that must change nothing."""
    text = graph.text()
    after, outcome = merge(graph, **options)
    assert after.text() == text, outcome.rewrites
    return reasons(outcome)


def test_a_nonlinear_adapter_stays_and_its_operator_is_named() -> None:
    before = transformer(Bottleneck)
    found = declined(before)
    assert len(found) == 6
    assert "aten.gelu at 0.q.act is not affine" in found
    _, outcome = merge(before)
    assert outcome.declines[0].site == "0.q (aten.add.Tensor)"


def test_a_plain_transformer_is_left_alone_in_silence() -> None:
    assert declined(transformer()) == []


def test_low_rank_pair_alone_stays_a_pair() -> None:
    pair = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16))
    (reason,) = declined(captured(pair, torch.randn(2, 16)))
    assert (
        reason.startswith("one linear would cost 256 multiply-accumulates") and "these 2 cost 128" in reason
    )
    wide = nn.Sequential(nn.Linear(16, 9, bias=False), nn.Linear(9, 16))
    after, _ = merge(captured(wide, torch.randn(2, 16)))
    assert operators(after) == {"linear": 1}  # 9 (16 + 16) > 16 x 16


def test_a_low_rank_base_with_an_adapter_stays_low_rank() -> None:
    """The cheapest cut of a chain is taken, not the longest region."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = LoRA(32, 6), LoRA(6, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    after, _ = merge(captured(Net(), torch.randn(2, 32)))
    shapes = sorted(tuple(t.shape) for t in after.tensors.values() if t.dim() == 2)
    assert shapes == [(6, 32), (32, 6)]


class Leaky(LoRA):
    """The base's own output is read a second time."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        base = self.base(x)
        return (base + self.up(self.down(x))) * torch.sigmoid(base)


class Returning(LoRA):
    """The base's own output is an output of the model."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        base = self.base(x)
        return base + self.up(self.down(x)), base


@pytest.mark.parametrize("model, reader", [(Leaky, "sigmoid"), (Returning, "the output")])
def test_a_value_inside_that_is_read_outside(model: type[LoRA], reader: str) -> None:
    (reason,) = declined(captured(model(16, 16), torch.randn(2, 16)))
    assert (
        reason
        == f"aten.linear at base inside it is also read by {reader}, so that merging would save nothing"
    )


def test_a_value_read_outside_is_computed_when_merging_pays_without_it() -> None:
    class Net(LoRA):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            down = self.down(x)
            return self.base(x) + self.up(down), down

    before = captured(Net(16, 16), torch.randn(2, 16))
    after, _ = merge(before)
    assert operators(after) == {"linear": 2}
    assert error(before, after, torch.randn(5, 16)) < TOLERANCE


def test_tied_weights_are_untied_only_where_the_adapter_makes_them_differ() -> None:
    class Tied(nn.Module):
        def __init__(self, scale: bool) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 20, bias=False)
            self.scale = scale

        def forward(self, ids: Tensor) -> Tensor:
            h = torch.tanh(self.norm(self.embed(ids)))
            if self.scale:
                return F.linear(h * 8**-0.5, self.embed.weight)
            return F.linear(h, self.embed.weight) + self.up(self.down(h))

    ids = torch.arange(6).view(2, 3)
    before = captured(Tied(scale=False), ids)
    after, outcome = merge(before)
    assert operators(after)["linear"] == 1
    assert outcome.rewrites[0].what.endswith("embed.weight is shared with embed, this site now has its own")
    assert torch.equal(after.tensors["embed.weight"], before.tensors["embed.weight"])
    (reason,) = declined(captured(Tied(scale=True), ids))
    assert (
        reason == "merging would untie embed.weight, which is read elsewhere, and save no multiply-accumulate"
    )


def test_layers_that_share_everything_go_on_sharing() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = LoRA(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    after, outcome = merge(captured(Shared(), torch.randn(2, 8)))
    assert len(outcome.rewrites) == 2
    assert len(after.tensors) == 2  # one weight, one bias


class Mixer(nn.Module):
    """A linear pair along the tokens, not the features."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.tokens = nn.Linear(8, 8), nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.tokens @ self.base(x)


class Positions(LoRA):
    """A constant that differs from token to token between the operators."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs)
        self.table = nn.Parameter(torch.ones(3, self.rank))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.base(x) + self.up(self.down(x) + self.table)


class Gated(LoRA):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.base(x) + self.up(self.down(x) * self.down(x))


class Sized(LoRA):
    """Scaled by a size that is dynamic."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.base(x) + self.up(self.down(x) * (1 / x.shape[0]))


@pytest.mark.parametrize(
    "model, reason",
    [
        (Positions, "aten.add.Tensor at add brings in a constant that differs from position to position"),
        (Gated, "aten.mul.Tensor at mul multiplies two activations"),
        (Sized, "aten.mul.Tensor at mul computes with a dynamic size"),
    ],
)
def test_near_misses_name_the_operator(model: type[LoRA], reason: str) -> None:
    assert reason in declined(captured(model(8, 8), torch.randn(2, 3, 8)))


def test_active_dropout_is_random() -> None:
    before = captured(LoRA(16, 16), torch.randn(2, 3, 16))
    dropout = next(n for n in before.nodes if n.target is torch.ops.aten.dropout.default)
    before.set_args(dropout, (*dropout.args[:2], True))
    after = before.copy()
    outcome = Merge().run(after, context(after))
    assert operators(after)["linear"] == 3
    assert "aten.dropout at drop is random" in reasons(outcome)


def test_operators_along_the_tokens_stay() -> None:
    assert declined(captured(Mixer(), torch.randn(2, 3, 8))) == []


def test_norm_gains_stay_unless_asked_for() -> None:
    class Rms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.q, self.k = nn.Parameter(torch.ones(8)), nn.Linear(8, 8), LoRA(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain
            return torch.tanh(self.q(x)) * self.k(x)

    before = captured(Rms(), torch.randn(2, 3, 8))
    kept, _ = merge(before)
    absorbed, _ = merge(before, absorb_norms=True)
    assert operators(kept) - operators(absorbed) == {"mul": 1}
    assert any(torch.equal(t, before.tensors["q.weight"]) for t in kept.tensors.values())
    assert not any(torch.equal(t, before.tensors["q.weight"]) for t in absorbed.tensors.values())
    assert error(before, absorbed, torch.randn(4, 3, 8)) < TOLERANCE


def test_constants_that_would_blow_up_are_left() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(64, 1)), nn.Parameter(torch.ones(1, 64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x) * (self.a * self.b)

    before = captured(Table(), torch.randn(2, 64, 64))
    assert merge(before)[0].tensors.keys() == {"mul"}
    (reason,) = declined(before, max_bytes=1000)
    assert reason == "as a constant it would add 15,872 bytes, more than max_bytes=1,000"


def test_weights_that_are_not_finite_are_declined() -> None:
    model = LoRA(16, 16)
    model.base.weight.data[0, 0] = float("nan")
    before = capture(model.eval(), (torch.randn(2, 16),))
    after = before.copy()
    outcome = Merge().run(after, context(after))
    assert after.tensors["base.weight"] is before.tensors["base.weight"]
    assert any("differs from the operators" in reason for reason in reasons(outcome))


# ------------------------------------------------------------------------- convolutions


class ConvLoRA(nn.Module):
    def __init__(self, kernel: int = 3, **geometry: Any) -> None:
        super().__init__()
        groups = geometry.get("groups", 1)
        self.base = nn.Conv2d(8, 12, kernel, **geometry)
        self.down = nn.Conv2d(8, 4, kernel, bias=False, **geometry)
        self.up = nn.Conv2d(4, 12, 1, bias=False, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.base(x) + self.up(self.down(x)) * 0.5)


class RepVGG(nn.Module):
    """3x3, 1x1 and identity, each with its batch norm."""

    def __init__(self, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.dense = nn.Conv2d(8, 8, 3, stride, 1, groups=groups, bias=False)
        self.point = nn.Conv2d(8, 8, 1, stride, groups=groups, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3 if stride == 1 else 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.dense(x)) + self.norms[1](self.point(x))
        return torch.relu(y + self.norms[2](x) if len(self.norms) == 3 else y)


class Asymmetric(nn.Module):
    """3x3 + 1x3 + 3x1."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(8, 6, 3, padding=1)
        self.row, self.column = (
            nn.Conv2d(8, 6, (1, 3), padding=(0, 1)),
            nn.Conv2d(8, 6, (3, 1), padding=(1, 0)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.row(x) + self.column(x)


@pytest.mark.parametrize(
    "model",
    [
        ConvLoRA(padding=1),
        ConvLoRA(stride=2, padding=1),
        ConvLoRA(kernel=5, padding=4, dilation=2, groups=4),
        ConvLoRA(kernel=1),
        ConvLoRA(padding="same"),
        RepVGG(),
        RepVGG(groups=8),
        RepVGG(groups=2, stride=2),
        Asymmetric(),
    ],
)
@pytest.mark.parametrize("size", [10, 11])
def test_parallel_convolutions_are_one(model: nn.Module, size: int) -> None:
    before = captured(model, torch.randn(2, 8, size, size))
    after, outcome = merge(before)
    assert operators(after)["conv"] == 1 and operators(after).keys() <= {"conv", "activation"}
    assert reasons(outcome) == []
    x = torch.randn(3, 8, size, size)
    assert error(before, after, x) < TOLERANCE
    wrong = after.copy()
    node = next(n for n in wrong.nodes if n.op == "get_attr" and n.meta["val"].dim() == 4)
    wrong.set_tensor(
        node,
        wrong.tensor(node).flip(-1, -2)
        if model is not None and node.meta["val"].shape[-1] > 1
        else 0 * wrong.tensor(node),
    )
    assert error(before, wrong, x) > 100 * TOLERANCE


def test_convolution_and_batch_norm_alone_are_left_for_fold() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    assert declined(captured(model, torch.randn(2, 4, 8, 8))) == []


def test_batch_norm_behind_an_adapted_convolution_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 2, 3), nn.Conv2d(2, 8, 1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.base(x) + self.up(self.down(x)))

    after, _ = merge(captured(Net(), torch.randn(2, 4, 8, 8)))
    assert operators(after) == {"conv": 1, "batch_norm": 1}


def test_padding_what_has_a_bias_is_not_one_convolution() -> None:
    class Net(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.base = nn.Conv2d(8, 8, 3, padding=1)
            self.down, self.up = nn.Conv2d(8, 4, 1, bias=bias), nn.Conv2d(4, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    (reason,) = declined(captured(Net(bias=True), torch.randn(2, 8, 6, 6)))
    assert reason.startswith("aten.conv2d at up pads with zeros what already has a bias")
    before = captured(Net(bias=False), torch.randn(2, 8, 6, 6))
    after, _ = merge(before)
    assert operators(after) == {"conv": 1}
    assert error(before, after, torch.randn(3, 8, 6, 6)) < TOLERANCE


# ------------------------------------------------------------------------- adapters from the library


def peft_model(method: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    base = transformers.LlamaForCausalLM(config).eval()
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    made = {
        "base": None,
        "LoRA": lambda: peft.LoraConfig(r=4, **targets),
        "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **targets),
        "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **targets),
        "OFT": lambda: peft.OFTConfig(oft_block_size=8, **targets),
        "VeRA": lambda: peft.VeraConfig(r=4, **targets),
        "LoHa": lambda: peft.LoHaConfig(r=4, **targets),
        "LoKr": lambda: peft.LoKrConfig(r=4, **targets),
    }[method]
    return base if made is None else peft.get_peft_model(base, made()).eval()


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@functools.cache
def library_base() -> Graph:
    return merge(capture(Logits(peft_model("base")), (torch.arange(10).view(2, 5),)))[0]


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3", "OFT", "VeRA", "LoHa", "LoKr"])
def test_library_adapters_merge(method: str) -> None:
    ids = torch.arange(10).view(2, 5)
    model = Logits(peft_model(method))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = capture(model, (ids,))
    after, outcome = merge(before)
    base = library_base()
    assert reasons(outcome) == []
    assert operators(after)["linear"] == operators(base)["linear"]
    assert operators(after)["mul"] == operators(base)["mul"]
    assert sum(operators(after).values()) <= sum(operators(base).values())
    assert error(before, after, ids) < TOLERANCE
    assert error(before, base, ids) > 100 * TOLERANCE
