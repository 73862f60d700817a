"""Merge: adapters written with plain modules come back to the base model's operators, near misses stay and say why."""

from __future__ import annotations

import functools

import pytest
import torch
from adapters import DoRA
from merging import (
    LENGTH,
    TOLERANCE,
    WIDTH,
    captured,
    context,
    declined,
    error,
    merge,
    merge_only,
    operators,
    reasons,
    transformer,
)
from structured_adapters import OFT
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import with_power

from compressor.capture import capture
from compressor.ir import Graph, Input
from passes.merge import Merge


class LoRA(nn.Module):
    """A linear with a thin pair of linears beside it."""

    rank, scale = 4, 8 / 4

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.base, self.drop = nn.Linear(ins, outs), nn.Dropout(0.1)
        self.down, self.up = nn.Linear(ins, self.rank, bias=False), nn.Linear(self.rank, outs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.drop(x))) * self.scale


class Bottleneck(LoRA):
    """Not affine: an activation between the two thin linears."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.act(self.down(x)))


# ------------------------------------------------------------------------- what merges


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


def test_tables_read_by_indexing_go_on_counting_negative_numbers_from_the_end() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.down = nn.Parameter(torch.randn(9, 8)), nn.Parameter(torch.randn(9, 2))
            self.up = nn.Linear(2, 8, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table[ids] + self.up(self.down[ids])

    graph = captured(Indexed(), torch.randint(0, 9, (2, LENGTH)))
    after, outcome = merge(graph)
    assert len(outcome.rewrites) == 1 and operators(after) == {"index": 1}
    assert error(graph, after, torch.tensor([[-1, -9, 3], [0, -2, 8]])) < TOLERANCE


def test_limit_applies_the_first_rewrites_only() -> None:
    before = transformer(LoRA)
    _, full = merge(before)
    after, first = merge(before, limit=2)
    assert first.rewrites == full.rewrites[:2]
    assert [r.site for r in first.rewrites] == ["0.q", "0.k"]
    assert operators(after)["linear"] == 6 + 2 * 4
    assert merge(before, limit=0)[0].text() == before.text()


class Unlimited(nn.Module):
    """A prompt encoder over a dynamic batch and two equal paddings: what merge does besides replacing regions."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.up = nn.Parameter(torch.ones(2, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        prompt = torch.relu(self.up(self.prompt.expand(x.shape[0], -1, -1)))
        padded = F.pad(x, (1, 1), mode="reflect")
        return torch.cat(
            [prompt, torch.tanh(padded)[..., 1:-1] * F.pad(x, (1, 1), mode="reflect")[..., 1:-1]], 1
        )


def test_limit_holds_for_every_kind_of_rewrite() -> None:
    before = captured(Unlimited(), torch.randn(2, LENGTH, WIDTH))
    _, full = merge_only(before)
    assert len(full.rewrites) == 2
    for limit in (0, 1):
        after, outcome = merge_only(before, limit=limit)
        assert outcome.rewrites == full.rewrites[:limit]
        assert (after.text() == before.text()) == (limit == 0)


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
