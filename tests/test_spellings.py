"""One affine map in many words: odd but legal spellings become one linear, near misses stay and say why.

All rows of a table are modules of one network, on one input, each with an output of its own: captured and merged once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from adapters import RANK, LoRA
from merging import WIDTH, Merged, broken, excess, merge, merge_only, operators
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import with_power

from compressor.capture import capture
from compressor.ir import Input

Body = Callable[[Any, Tensor], Tensor]
LENGTH = WIDTH  # as many tokens as features, so that no size tells one from the other


class Beside(LoRA):
    """A LoRA and some parameters more, run by a function of the module and its input."""

    shapes: ClassVar = LoRA.shapes | {"v": "o", "w": "oi"}

    def __init__(self, body: Body) -> None:
        super().__init__(WIDTH, WIDTH)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)

    def down(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a)

    def up(self, x: Tensor) -> Tensor:
        return F.linear(x, self.b)

    def lora(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def rows(table: Mapping[str, Body], *batches: int, **options: Any) -> Merged:
    """A table of bodies, merged on the first batch and compared on all of them."""
    inputs = [(torch.randn(batch, LENGTH, WIDTH),) for batch in batches]
    return Merged({name: Beside(body) for name, body in table.items()}, *inputs, **options)


def assigned(y: Tensor, where: Any, value: Tensor) -> Tensor:
    y[where] = value
    return y


SPELLINGS: dict[str, Body] = {
    "einsum of three": lambda m, x: m.base(x) + torch.einsum("...i,ri,or->...o", x, m.a, m.b),
    "einsum by numbers": lambda m, x: m.base(x) + torch.einsum(x, [0, 1, 2], m.w, [3, 2], [0, 1, 3]),
    "einsum without an arrow": lambda m, x: m.base(x) + torch.einsum("btd,dz", x, m.w),
    "einsum that transposes": lambda m, x: m.base(x) + torch.einsum("btd,od->bot", x, m.w).mT,
    "tensordot": lambda m, x: m.base(x) + torch.tensordot(x, m.w, 1),
    "inner": lambda m, x: m.base(x) + torch.inner(x, m.w),
    "baddbmm": lambda m, x: torch.baddbmm(m.base(x), x, m.w.expand(x.shape[0], -1, -1), alpha=0.5, beta=2),
    "addmm with alpha": lambda m, x: torch.addmm(
        m.base(x).view(-1, WIDTH), x.reshape(-1, WIDTH), m.w, alpha=0.3, beta=1.5
    ).view_as(x),
    "add with alpha": lambda m, x: torch.add(m.base(x), m.lora(x), alpha=2),
    "rsub with alpha": lambda m, x: torch.rsub(m.base(x), m.lora(x), alpha=2),
    "lerp": lambda m, x: torch.lerp(m.base(x), m.lora(x), 0.3),
    "addcmul": lambda m, x: torch.addcmul(m.base(x), m.lora(x), m.v, value=0.5),
    "rank one": lambda m, x: m.base(x) + (x @ m.a[0]).unsqueeze(-1) * m.v,
    "a product summed": lambda m, x: m.base(x) + (x.unsqueeze(-2) * m.w).sum(dim=(-1,)),
    "stack and mean": lambda m, x: torch.stack([m.base(x), m.lora(x)], dim=-1).mean(-1),
    "ranks side by side": lambda m, x: (
        m.base(x) + torch.cat([m.down(x), m.down(x * m.v)], -1) @ torch.cat([m.b, m.b * 2], dim=1).mT
    ),
    "tokens first": lambda m, x: F.linear(x.movedim(1, 0), m.w).movedim(0, 1) + m.base(x),
    "tensor_split": lambda m, x: m.base(x) + torch.cat(m.lora(x).tensor_split(3, dim=-1)[::-1], -1),
    "ranks masked": lambda m, x: m.base(x) + m.up(m.down(x).masked_fill(m.a[:, 0] > 0, 0.0)),
    "outputs chosen": lambda m, x: torch.where(m.v > 1, m.base(x), m.lora(x)),
    "written in place": lambda m, x: m.base(x).mul_(m.v).add_(m.lora(x)),
    "a slice written": lambda m, x: assigned(m.base(x), (..., slice(2, 2 + RANK)), m.down(x)),
    "a column written": lambda m, x: assigned(m.base(x), (..., 3), (x * m.v).sum(-1)),
    "scatter_add": lambda m, x: m.base(x).scatter_add(
        -1, torch.tensor([0, 3, 5, 3]).expand(x.shape[0], LENGTH, RANK), m.down(x)
    ),
    "index_copy": lambda m, x: m.base(x).index_copy(-1, torch.tensor([9, 3, 5, 7]), m.down(x)),
    "a complex rotation": lambda m, x: (
        m.base(x)
        + torch.view_as_real(
            torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(m.v[:8], m.v[8:])
        ).flatten(-2)
    ),
    "computed in double": lambda m, x: m.base(x) + m.up(m.down(x).double().mul(3).to(x.dtype)),
    "reshaped and back": lambda m, x: m.base(x) + m.lora(x.reshape(-1)[None].view(x.shape)),
    "the size of a fixed axis": lambda m, x: m.base(x) + m.lora(x) / x.shape[-1],
    "one constant for every token": lambda m, x: (m.base(x) + m.lora(x)) * m.v.expand(LENGTH, WIDTH),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_one_linear(name: str, spellings: Merged) -> None:
    assert spellings.operators(name) == {"linear": 1} and spellings.reasons(name) == []
    assert spellings.excess[name] <= 1 < 100 < spellings.broken[name]


@pytest.fixture(scope="module")
def spellings() -> Merged:
    return rows(SPELLINGS, 2, 3)


# ------------------------------------------------------------------------- near misses


def _twice(m: Beside, x: Tensor) -> Tensor:
    base = m.base(x)
    return (base + m.lora(x)) * torch.sigmoid(base)


NEAR: dict[str, tuple[Body, str]] = {
    "an activation between": (lambda m, x: m.base(x) + m.up(F.silu(m.down(x))), "aten.silu"),
    "almost the identity": (lambda m, x: m.base(x) + m.up(F.leaky_relu(m.down(x), 0.99)), "aten.leaky_relu"),
    "a clamp": (lambda m, x: m.base(x) + m.up(m.down(x).clamp(-1, 1)), "aten.clamp"),
    "rounding": (lambda m, x: m.base(x) + m.up((8 * m.down(x)).round() / 8), "aten.round"),
    "a gate": (lambda m, x: m.base(x) + torch.sigmoid(x @ m.v).unsqueeze(-1) * m.lora(x), "aten.sigmoid"),
    "a mask of the data": (
        lambda m, x: m.base(x) + m.up(m.down(x) * (x.sum(-1, keepdim=True) > 0)), "aten.gt.Scalar",
    ),
    "a choice by the data": (lambda m, x: m.base(x) + torch.where(x > 0, m.lora(x), 0.0), "aten.gt.Scalar"),
    "a norm between": (lambda m, x: m.base(x) + m.up(F.layer_norm(m.down(x), (RANK,))), "aten.layer_norm"),
    "squared": (lambda m, x: m.base(x) + m.up(m.down(x) * m.down(x)), "multiplies two activations"),
    "a dynamic size": (lambda m, x: m.base(x) + m.up(m.down(x) / x.shape[0]), "computes with a dynamic size"),
    "a second reader": (_twice, "is also read by"),
    "tokens mixed with features": (lambda m, x: m.base(x) + m.lora(x.mT.reshape(x.shape)), "more than the features"),
    "tokens for features": (lambda m, x: m.base(x) + m.lora(x.mT), ""),
    "a permutation of both": (
        lambda m, x: m.base(x) + m.lora(x.view(-1, WIDTH, 4, 4).permute(0, 2, 3, 1).reshape(x.shape)), "",
    ),
    "a matrix along the tokens": (lambda m, x: m.base(x) + m.w @ m.lora(x), ""),
    "einsum along the tokens": (lambda m, x: m.base(x) + torch.einsum("bij,ki->bkj", x, m.w), ""),
    "a table of positions": (lambda m, x: m.base(x) + m.up(m.down(x) * m.w[:, :RANK]), "position to position"),
    "the mean of all tokens": (lambda m, x: m.base(x) + m.lora(x.mean(1, keepdim=True)), "aten.mean.dim"),
    "the token before": (lambda m, x: m.base(x) + m.lora(F.pad(x, (0, 0, 1, -1))), "aten.pad"),
    "tokens rolled": (lambda m, x: m.base(x) + m.lora(x.roll(1, -2)), "aten.roll"),
    "the first sample": (lambda m, x: m.base(x) + m.lora(x[:1]), "aten.slice"),
    "the batch turned": (lambda m, x: m.base(x) + m.lora(x.flip(0)), "aten.flip"),
}  # fmt: skip


@pytest.fixture(scope="module")
def near_misses() -> Merged:
    return rows({name: body for name, (body, _) in NEAR.items()}, 2, 3)


@pytest.mark.parametrize("name, reason", [(name, reason) for name, (_, reason) in NEAR.items()])
def test_a_near_miss_stays(name: str, reason: str, near_misses: Merged) -> None:
    assert near_misses.contractions(name, near_misses.before) == near_misses.contractions(
        name, near_misses.after
    )
    assert not reason or any(reason in text for text in near_misses.reasons(name)), near_misses.reasons(name)
    assert near_misses.excess[name] <= 1 < 100 < near_misses.broken[name]


def test_a_dropout_left_in_training_mode_stays() -> None:
    x = torch.randn(2, LENGTH, WIDTH)
    before = capture(with_power(Beside(lambda m, x: m.base(x) + m.up(m.drop(m.down(x)))), x), (x,))
    (dropout,) = (n for n in before.nodes if n.target is torch.ops.aten.dropout.default)
    assert operators(merge(before)[0]) == {"linear": 1}  # switched off
    before.set_args(dropout, (*dropout.args[:2], True))
    after, outcome = merge_only(before)
    assert operators(after) == operators(before)
    assert [d.reason for d in outcome.declines] == ["aten.dropout at drop is random"]


# ------------------------------------------------------------------------- dynamic sizes


SIZES: dict[str, Body] = {
    "a factor": lambda m, x: m.base(x) + m.lora(x) * x.shape[0],
    "counted": lambda m, x: m.base(x) + m.lora(x) * torch.ones(x.shape[0]).sum(),
    "counted by a product": lambda m, x: m.base(x) + m.lora(x) * (torch.ones(x.shape[0]) @ torch.ones(x.shape[0])),
    "counted by a running sum": lambda m, x: m.base(x) + m.lora(x) * torch.ones(x.shape[0]).cumsum(0)[-1:],
    "counted by positions": lambda m, x: m.base(x) + m.lora(x) * torch.arange(x.shape[0])[-1:],
    "a norm": lambda m, x: m.base(x) + m.lora(x) * torch.ones(x.shape[0]).norm(),
    "a softmax": lambda m, x: m.base(x) + m.lora(x) * torch.zeros(1, x.shape[0]).softmax(-1)[:, :1],
    "zeros like it": lambda m, x: m.base(x) + m.lora(x) * (torch.zeros_like(x) + 1).sum(),
    "a vector repeated": lambda m, x: m.base(x) + m.lora(x) * m.v.repeat(x.shape[0], 1).sum(0),
    "padded ones": lambda m, x: m.base(x) + m.lora(x) * (1 + F.pad(torch.ones(x.shape[0]), (0, 3))[3:4]),
    "features rolled": lambda m, x: m.base(x) + m.up(m.down(x).roll(x.shape[0], -1)),
    "features narrowed": lambda m, x: m.base(x) + m.down(x).narrow(-1, x.shape[0] - 2, 1),
    "a feature selected": lambda m, x: m.base(x) + m.down(x).select(-1, x.shape[0] - 2).unsqueeze(-1),
    "features repeated": lambda m, x: m.base(x) + m.down(x)[..., :1].repeat(1, 1, x.shape[0]).sum(-1, keepdim=True),
    "alpha": lambda m, x: torch.addmm(
        m.base(x).view(-1, WIDTH), x.view(-1, WIDTH), m.w, alpha=x.shape[0]
    ).view(x.shape),
}  # fmt: skip


@pytest.fixture(scope="module")
def fixed_sizes() -> Merged:
    return rows(SIZES, 2, dynamic=False)


@pytest.fixture(scope="module")
def sizes() -> Merged:
    return rows(SIZES, 2, 3, 5)


@pytest.mark.parametrize("name", SIZES)
def test_a_dynamic_size_is_not_baked_in(name: str, fixed_sizes: Merged, sizes: Merged) -> None:
    """More tokens than features: probing has room for the whole identity without another batch."""
    assert fixed_sizes.operators(name) == {"linear": 1}  # what would be wrong for another batch
    assert sizes.operators(name) != {"linear": 1}
    assert sizes.excess[name] <= 1 < 100 < sizes.broken[name]


def test_two_dynamic_axes_keep_tokens_apart() -> None:
    x = torch.randn(2, 3, WIDTH)
    model = with_power(Beside(lambda m, x: m.base(x) + m.lora(x) + m.lora(x).mean(1, True)), x)
    after, _ = merge(capture(model, (x,), inputs=(Input("x", torch.float32, ("batch", "sequence", WIDTH)),)))
    assert operators(after)["linear"] >= 2 and operators(after)["reduce"] == 1
    x = torch.randn(4, 7, WIDTH)
    assert max(excess(model, after, x)) <= 1 < 100 < max(excess(model, broken(after), x))


# ------------------------------------------------------------------------- ranks, dtypes, shared layers


@pytest.mark.parametrize("shape", [(3, WIDTH), (2, 1, WIDTH), (2, 3, 4, WIDTH), (2, 1, 2, 3, WIDTH)])
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    model = with_power(Beside(lambda m, x: m.base(x) + m.lora(x)), torch.randn(shape))
    after, _ = merge(capture(model, (torch.randn(shape),)))
    assert operators(after) == {"linear": 1}
    x = torch.randn(5, *shape[1:])
    assert max(excess(model, after, x)) <= 1 < 100 < max(excess(model, broken(after), x))


@pytest.mark.parametrize("dtype, allowed", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_adapters_merge_better_than_they_ran(dtype: torch.dtype, allowed: float) -> None:
    """Computed in float64, rounded once: no further from float64 than the model itself, give or take one rounding."""
    x = torch.randn(2, LENGTH, WIDTH).to(dtype)
    model = with_power(Beside(lambda m, x: m.base(x) + m.lora(x)), x.float()).to(dtype)
    before = capture(model, (x,))
    after, _ = merge_only(before)
    assert operators(after) == {"linear": 1}
    assert {t.dtype for t in after.tensors.values()} == {dtype}
    (exact,) = capture(model.double(), (x.double(),)).run(x.double())
    far = lambda graph: float((graph.run(x)[0] - exact).abs().max() / exact.abs().max())  # noqa: E731
    assert far(after) <= max(allowed, far(before)) < 0.1 < far(broken(after))


def test_layers_that_share_an_adapter() -> None:
    """As VeRA shares its frozen factors between all layers: every site gets a weight of its own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.a, self.b = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x) + self.b(self.a(x)))
            return self.second(x) + self.b(self.a(x))

    model = with_power(Net(), torch.randn(2, WIDTH))
    after, outcome = merge(capture(model, (torch.randn(2, WIDTH),)))
    assert operators(after) == {"linear": 2, "activation": 1} and outcome.declines == []
    x = torch.randn(5, WIDTH)
    assert max(excess(model, after, x)) <= 1 < 100 < max(excess(model, broken(after), x))
