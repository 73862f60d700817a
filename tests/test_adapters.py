"""Adapters of linears and embeddings disappear, in whichever words a model says them; near misses stay and say why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import adapters
import pytest
import structured_adapters
import torch
from adapters import RANK, LoRA, Method
from merging import (
    HEADS,
    LENGTH,
    WIDTH,
    FeedForward,
    Merged,
    broken,
    captured,
    declined,
    excess,
    merge,
    operators,
    reasons,
)
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import with_power

from compressor import delivery
from compressor.capture import capture
from compressor.data import Batch
from compressor.errors import ContractError
from compressor.target import Target

Body = Callable[[Any, Tensor], Any]


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@functools.cache
def base_operators() -> dict[str, int]:
    """Operators of the block that nobody has adapted."""
    return dict(operators(captured(FeedForward(), example(2, LENGTH, WIDTH))))


# ------------------------------------------------------------------------- methods of the literature


@pytest.mark.parametrize("method", adapters.METHODS + structured_adapters.METHODS)
def test_a_method_disappears(method: type[Method]) -> None:
    """One linear widens, one narrows; what is left is the base model."""
    model = with_power(FeedForward(method), example(2, LENGTH, WIDTH))
    after, outcome = merge(capture(model, (example(2, LENGTH, WIDTH),)))
    assert operators(after) == base_operators()
    assert reasons(outcome) == []
    x = torch.randn(3, LENGTH, WIDTH)  # another batch than the example's
    assert max(excess(model, after, x)) <= 1 < 100 < max(excess(model, broken(after), x))


def test_tuned_norms_stay_norms() -> None:
    """LN-tuning changes gains and biases alone. Zhao et al. 2023 (arXiv:2312.11420)."""
    assert declined(captured(FeedForward(), example(2, LENGTH, WIDTH))) == []


# ------------------------------------------------------------------------- a fused qkv, of which q and v are adapted


class Fused(Method):
    """Attention over one linear for q, k and v; `spelling` adds the updates of q and v to its output."""

    shapes: ClassVar = {"a": "2ri", "b": "2ir", "magnitude": "i"}

    def __init__(self, spelling: Body) -> None:
        super().__init__(WIDTH, 3 * WIDTH)
        self.spelling = spelling

    def update(self, x: Tensor, index: int) -> Tensor:
        return F.linear(F.linear(x, self.a[index]), self.b[index])

    def forward(self, x: Tensor) -> Tensor:
        y = self.spelling(self, x)
        q, k, v = y.chunk(3, dim=-1) if isinstance(y, Tensor) else y
        return F.scaled_dot_product_attention(q, k, v, scale=0.1)  # larger logits magnify rounding


def _written(m: Fused, x: Tensor) -> Tensor:
    y = m.base(x)
    y[..., :WIDTH] += m.update(x, 0)
    y[..., -WIDTH:] += m.update(x, 1)
    return y


def _indexed(m: Fused, x: Tensor) -> Tensor:
    y, columns = torch.zeros_like(m.base(x)), torch.arange(WIDTH)
    y[..., columns] = m.update(x, 0)
    y[..., columns + 2 * WIDTH] = m.update(x, 1)
    return m.base(x) + y


def _masked(m: Fused, x: Tensor) -> Tensor:
    """As loralib's MergedLinear: a grouped convolution over the tokens, scattered into zeros by a mask."""
    down = F.linear(x, m.a.flatten(0, 1))
    delta = F.conv1d(down.mT, m.b.flatten(0, 1).unsqueeze(-1), groups=2).mT
    chosen = torch.tensor([True, False, True]).repeat_interleave(WIDTH)
    result = delta.new_zeros(*delta.shape[:-1], 3 * WIDTH).view(-1, 3 * WIDTH)
    result[:, chosen] = delta.reshape(-1, 2 * WIDTH)
    return m.base(x) + result.view(*x.shape[:-1], -1)


def _apart(m: Fused, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = m.base(x).chunk(3, dim=-1)
    return q + m.update(x, 0), k, v + m.update(x, 1)


def _unbound(m: Fused, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = m.base(x).view(*x.shape[:-1], 3, WIDTH).unbind(-2)
    return q + m.update(x, 0), k, v + m.update(x, 1)


def _interleaved(m: Fused, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of one head lie side by side."""
    q, k, v = m.base(x).unflatten(-1, (HEADS, 3, -1)).unbind(-2)
    q, v = (part + m.update(x, i).view_as(part) for i, part in enumerate((q, v)))
    return q.flatten(-2), k.flatten(-2), v.flatten(-2)


def _dora(m: Fused, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = m.base(x).tensor_split(3, dim=-1)
    weight = m.base.weight[:WIDTH]
    gain = m.magnitude / (weight + m.b[0] @ m.a[0]).norm(dim=1)
    return q + (gain - 1) * F.linear(x, weight) + gain * m.update(x, 0), k, v


def _turned(m: Fused, x: Tensor) -> tuple[Tensor, ...]:
    """Rotary positions behind the adapters."""
    q, k, v = m.base(x).chunk(3, dim=-1)
    angles = torch.arange(LENGTH)[:, None] / torch.arange(1, WIDTH // 2 + 1).repeat(2)
    half = WIDTH // 2
    turned = [
        part * angles.cos() + torch.cat([-part[..., half:], part[..., :half]], dim=-1) * angles.sin()
        for part in (q + m.update(x, 0), k + m.update(x, 1))
    ]
    return (*turned, v)


def _rejoined(m: Fused, x: Tensor) -> Tensor:
    q, k, v = m.base(x).split(WIDTH, -1)
    return torch.cat((q + m.update(x, 0), k, m.update(x, 1) + v), dim=-1)


def _stacked(m: Fused, x: Tensor) -> Tensor:
    q, v = m.update(x, 0), m.update(x, 1)
    return m.base(x) + torch.stack([q, torch.zeros_like(q), v], dim=-2).flatten(-2)


FUSED: dict[str, Body] = {
    "nobody": lambda m, x: m.base(x),
    "cat with zeros": lambda m, x: (
        m.base(x) + torch.cat([m.update(x, 0), x.new_zeros(*x.shape[:-1], WIDTH), m.update(x, 1)], -1)
    ),
    "padded with zeros": lambda m, x: (
        m.base(x) + F.pad(m.update(x, 0), (0, 2 * WIDTH)) + F.pad(m.update(x, 1), (2 * WIDTH, 0))
    ),
    "written into slices": _written,
    "assigned by index": _indexed,
    "added by index": lambda m, x: m.base(x).index_add(-1, torch.arange(WIDTH), m.update(x, 0)),
    "scattered by a mask": _masked,
    "split and cat": _rejoined,
    "stacked with zeros": _stacked,
    "chunks": _apart,
    "unbind": _unbound,
    "head by head": _interleaved,
    "DoRA on q": _dora,
    "turned behind": _turned,
}


@pytest.fixture(scope="module")
def fused() -> Merged:
    table = {name: Fused(spelling) for name, spelling in FUSED.items()}
    return Merged(table, *((example(batch, LENGTH, WIDTH),) for batch in (2, 3)))


@pytest.mark.parametrize("name", FUSED)
def test_adapters_on_parts_of_a_fused_linear(name: str, fused: Merged) -> None:
    behind = {"chunk", "split", "unbind", "getitem", "slice", "view", "unflatten", "flatten"}
    behind |= {"mul", "add", "neg", "cat"} if name == "turned behind" else set()
    rest = {kind: n for kind, n in fused.operators(name).items() if kind not in behind}
    assert rest == fused.contractions("nobody", fused.after) == {"linear": 1, "attention": 1}
    assert fused.reasons(name) == []
    assert fused.excess[name] <= 1 < 100 < fused.broken[name]


# ------------------------------------------------------------------------- embeddings and tied heads


class Lookup(nn.Module):
    """An embedding with an adapter, in one of several spellings, and something after it that is not affine."""

    def __init__(self, spelling: Body) -> None:
        super().__init__()
        self.base, self.spelling = nn.Embedding(20, WIDTH), spelling
        self.a, self.b = nn.Parameter(torch.ones(20, RANK)), nn.Parameter(torch.ones(RANK, WIDTH))
        self.gain, self.per_token = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(20))

    def norm(self, dim: int) -> Tensor:
        return torch.linalg.norm(self.base.weight + self.a @ self.b, dim=dim)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.spelling(self, ids))


def _embedded_dora(m: Lookup, ids: Tensor) -> Tensor:
    gain = m.gain / m.norm(0)
    return m.base(ids) + (gain - 1) * m.base(ids) + gain * (F.embedding(ids, m.a) @ m.b)


EMBEDDINGS: dict[str, Body] = {
    "LoRA": lambda m, ids: m.base(ids) + 2 * (F.embedding(ids, m.a) @ m.b),
    "LoRA, linear": lambda m, ids: m.base(ids) + F.linear(m.a[ids], m.b.T) * 0.5,
    "DoRA": _embedded_dora,
    "DoRA, a norm a token": lambda m, ids: (
        (m.per_token / m.norm(1))[ids].unsqueeze(-1) * (m.base(ids) + F.embedding(ids, m.a) @ m.b)
    ),
    "IA3": lambda m, ids: m.base(ids) * m.gain,
    "LoRA by indexing": lambda m, ids: m.base.weight[ids] + 2 * (m.a[ids] @ m.b),
    "several": lambda m, ids: m.base(ids) + 0.5 * (m.a[ids] @ m.b) + F.embedding(ids, m.a * 2) @ m.b,
}


@pytest.mark.parametrize("spelling", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_adapters_on_embeddings(spelling: Body) -> None:
    ids = torch.arange(10).view(2, 5)
    model = with_power(Lookup(spelling), ids)
    before = capture(model, (ids,))
    after, outcome = merge(before)
    assert operators(after) in ({"embedding": 1, "activation": 1}, {"index": 1, "activation": 1})
    assert reasons(outcome) == []
    ids = torch.tensor([[19, 3, 3, 8, 1], [0, 7, 12, 7, 6], [11, 2, 1, 13, 19]])
    assert max(excess(model, after, ids)) <= 1 < 100 < max(excess(model, broken(after), ids))


def test_an_embedding_by_other_ids_is_no_adapter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.types = nn.Embedding(20, WIDTH), nn.Embedding(20, RANK)
            self.up = nn.Linear(RANK, WIDTH, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.tanh(self.words(ids) + self.up(self.types(ids % 2)))

    ids = torch.arange(10).view(2, 5)
    model = with_power(Net(), ids)
    after, _ = merge(capture(model, (ids,)))
    assert operators(after)["embedding"] == 2
    ids = torch.tensor([[19, 18, 3, 8, 1]])
    assert max(excess(model, after, ids)) <= 1 < 100 < max(excess(model, broken(after), ids))


class Tied(nn.Module):
    """A head that shares the embedding's table; one of them, or both, adapted."""

    def __init__(self, head: bool, table: bool) -> None:
        super().__init__()
        self.embed, self.head, self.table = nn.Embedding(20, WIDTH), head, table
        self.a, self.b = nn.Parameter(torch.ones(RANK, WIDTH)), nn.Parameter(torch.ones(20, RANK))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) + F.embedding(ids, self.b) @ self.a if self.table else self.embed(ids)
        h = torch.tanh(h)
        y = F.linear(h, self.embed.weight)
        return y + F.linear(F.linear(h, self.a), self.b) if self.head else y


@pytest.mark.parametrize("head, table, kept", [(True, False, 2), (False, True, 2), (True, True, 1)])
def test_a_tied_head_is_untied_only_where_the_adapter_makes_it_differ(
    head: bool, table: bool, kept: int
) -> None:
    ids = torch.arange(10).view(2, 5)
    model = with_power(Tied(head, table), ids)
    before = capture(model, (ids,))
    after, outcome = merge(before)
    assert operators(after) == {"embedding": 1, "activation": 1, "linear": 1}
    assert len({t.data_ptr() for t in after.tensors.values() if t.shape == (20, WIDTH)}) == kept
    assert any("is shared with" in r.what for r in outcome.rewrites) == (kept == 2)
    assert max(excess(model, after, ids + 10)) <= 1 < 100 < max(excess(model, broken(after), ids + 10))


# ------------------------------------------------------------------------- what is not affine, and compiles as it is


class Bottleneck(LoRA):
    """An activation between the thin linears, beside the base. He et al. 2021 (arXiv:2110.04366)."""

    def change(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.a)), self.b)


class Houlsby(Method):
    """The same behind the base. Houlsby et al. 2019 (arXiv:1902.00751)."""

    shapes: ClassVar = {"a": "ro", "b": "or"}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + F.linear(F.gelu(F.linear(y, self.a)), self.b)


class KAN(Method):
    """Every weight a function of its input, here a sum of sines. Liu et al. 2024 (arXiv:2404.19756)."""

    shapes: ClassVar = {"frequencies": "r", "b": "oir", "a": "ri", "c": "or"}

    def change(self, x: Tensor) -> Tensor:
        waves = torch.sin(x.unsqueeze(-1) * self.frequencies)
        return torch.einsum("...ir,oir->...o", waves, self.b) + F.linear(F.linear(x, self.a).sin(), self.c)


class Routed(Method):
    """Experts of low rank, weighed by a router that reads the activation. Dou et al. 2023 (arXiv:2312.09979)."""

    shapes: ClassVar = {"router": "ki", "a": "kri", "b": "kor"}

    def change(self, x: Tensor) -> Tensor:
        weights = F.softmax(F.linear(x, self.router), dim=-1)
        inner = torch.einsum("...i,kri->...kr", x, self.a) * weights.unsqueeze(-1)
        return torch.einsum("...kr,kor->...o", inner, self.b)


class Prompted(nn.Module):
    """Virtual tokens before the input, as they are or through an MLP, and learned keys and values in the attention.

    Lester et al. 2021 (arXiv:2104.08691), Liu et al. 2021 (P-tuning, arXiv:2103.10385), Li and Liang 2021 (prefix,
    arXiv:2101.00190).
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.seed = nn.Parameter(torch.ones(3, WIDTH)), nn.Parameter(torch.ones(2, WIDTH))
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.q, self.k, self.v = (Method(WIDTH, WIDTH).base for _ in range(3))
        self.prefix = nn.Parameter(torch.ones(2, 4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        virtual = torch.cat([self.prompt, self.encoder(self.seed)]).expand(batch, -1, -1)
        x = torch.cat([virtual, x], dim=1)
        k, v = (
            torch.cat([past.expand(batch, -1, -1), new], dim=1)
            for past, new in zip(self.prefix, (self.k(x), self.v(x)), strict=True)
        )
        return F.scaled_dot_product_attention(self.q(x)[:, None], k[:, None], v[:, None])[:, 0]


@pytest.mark.parametrize(
    "method, operator",
    [(Bottleneck, "aten.relu"), (Houlsby, "aten.gelu"), (KAN, "aten.sin"), (Routed, "aten.softmax.int")],
)
def test_what_is_not_affine_stays_and_is_named(method: type[Method], operator: str) -> None:
    before = captured(FeedForward(method), example(2, LENGTH, WIDTH))
    after, outcome = merge(before)
    assert operators(after) == operators(before)
    assert any(f"{operator} at" in text for text in reasons(outcome)), reasons(outcome)
    assert {d.site.split(" ")[0] for d in outcome.declines} == {"up", "down"}


def test_what_stays_compiles(tmp_path: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompted = Prompted()
            self.layers = nn.Sequential(*(m(WIDTH, WIDTH) for m in (Bottleneck, Houlsby, KAN, Routed, LoRA)))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(self.prompted(x))

    x = example(2, LENGTH, WIDTH)
    after, outcome = merge(captured(Net(), x))
    named = " ".join(reasons(outcome))
    assert all(f"aten.{name} at layers" in named for name in ("relu", "gelu", "sin", "softmax.int"))
    assert named.count("4 learned positions") == 2 and "5 learned positions" in named  # prefixes and prompts
    assert sum("into one linear" in r.what for r in outcome.rewrites) == 1  # the LoRA
    target = Target("cpu", "", ("CPUExecutionProvider",))
    emitted = delivery.deliver(after, target, tmp_path, {}, {})
    batch = Batch((torch.randn(3, LENGTH, WIDTH),))
    assert max(c.error for c in delivery.check_emitted(after, emitted, [batch])) < 1e-4
    with pytest.raises(ContractError, match="is not the graph's"):
        delivery.check_emitted(broken(after), emitted, [batch])
