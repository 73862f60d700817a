"""Channel algebra: every rule by a small model that is pruned, held against the mask oracle, and broken on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pruning import (
    TOLERANCE,
    Net,
    assert_predicted,
    graph_of,
    line,
    prune,
    shift_a_reader,
    some_of_each,
    worst,
)
from torch import Tensor, nn
from torch.nn import functional as F

from compressor import surgery
from compressor.atoms import common_factors
from compressor.capture import capture
from compressor.channels import analyse
from compressor.errors import ContractError
from compressor.ir import Graph
from compressor.oracle import masked, power
from compressor.surgery import remove
from compressor.verify import look_inside
from compressor.widths import Costs, families, shrink_globally

# -------------------------------------------------------------------- rules, one model each


@dataclass(frozen=True)
class Case:
    """families: how many groups each family of removable groups has. lines: node -> (before, after)."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    families: tuple[int, ...]
    lines: tuple[tuple[str, str, str], ...] = ()


def _block(a: int, b: int, kernel: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, padding=kernel // 2, **options)


def _option_a(m: nn.Module, x: Tensor) -> Tensor:
    """ResNet-20's shortcut from 4 to 8 channels: every second pixel, zero channels on both sides."""
    x = F.relu(m.stem(x))
    y = m.b(F.relu(m.a(x)))
    return m.head(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3)))


def _c2f(m: nn.Module, x: Tensor) -> Tensor:
    """YOLOv8's block: one half goes through a bottleneck with a shortcut, all parts are joined."""
    parts = list(m.a(x).chunk(2, 1))
    parts.append(parts[-1] + m.c(F.silu(m.b(parts[-1]))))
    return m.d(torch.cat(parts, 1))


def _shuffle(m: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = (x := m.a(x)).shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    left, right = x.chunk(2, 1)
    return m.c(torch.cat((left, F.relu(m.b(right))), 1))


def _attention(m: nn.Module, x: Tensor) -> Tensor:
    """Fused qkv, 3 x 2 heads of width 8."""
    n, s, e = x.shape
    q, k, v = m.qkv(x).reshape(n, s, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, e))


def _grouped_query(m: nn.Module, x: Tensor) -> Tensor:
    """4 query heads share 2 key-value heads of width 4."""
    n, s, _ = x.shape
    q, k, v = (p(x).view(n, s, h, 4).transpose(1, 2) for p, h in ((m.q, 4), (m.k, 2), (m.v, 2)))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return m.out(y.transpose(1, 2).reshape(n, s, 16))


def _einsum_attention(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    weights = (torch.einsum("b i d, b j d -> b i j", q, k) * 0.35).softmax(-1)
    return m.out(weights @ v)


def _einsum_heads(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("nse,ehd->nshd", x, w) for w in (m.q, m.k, m.v))
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) * 0.35
    return torch.einsum("nshd,hde->nse", torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v), m.o)


CASES: dict[str, Case] = {
    "convolution": Case(
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=_block(3, 8, 3), b=_block(8, 4, 3)), (3, 6, 6), (8,)
    ),
    "batch norm, conv1d": Case(
        lambda: Net(lambda m, x: m.b(m.n(m.a(x))), a=nn.Conv1d(3, 8, 3), n=nn.BatchNorm1d(8), b=nn.Conv1d(8, 2, 1)),
        (3, 9),
        (8,),
    ),
    "grouped convolution": Case(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x))), a=_block(3, 12), b=_block(12, 8, 3, groups=4), c=_block(8, 2)),
        (3, 6, 6),
        (3, 2),
        (("conv2d_1", "[1, 1], [1, 1], 4)", "[1, 1], [1, 1], 4)"),),
    ),
    "depthwise convolution": Case(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x))), a=_block(3, 8), b=_block(8, 8, 3, groups=8), c=_block(8, 2)),
        (3, 6, 6),
        (8,),
        (("conv2d_1", "[1, 1], [1, 1], 8)", "[1, 1], [1, 1], 4)"),),
    ),
    "depthwise with multiplier": Case(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x))), a=_block(3, 6), b=_block(6, 18, 3, groups=6), c=_block(18, 2)),
        (3, 6, 6),
        (6,),
    ),
    "transposed convolution": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x))), a=_block(3, 8), b=nn.ConvTranspose2d(8, 6, 2, 2), c=_block(6, 2)
        ),
        (3, 5, 5),
        (8, 6),
    ),
    "grouped transposed convolution": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x))), a=_block(3, 8), b=nn.ConvTranspose2d(8, 6, 2, groups=2), c=_block(6, 2)
        ),
        (3, 5, 5),
        (4, 3),
    ),
    "depthwise transposed convolution": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x))), a=_block(3, 8), b=nn.ConvTranspose2d(8, 16, 2, groups=8), c=_block(16, 2)
        ),
        (3, 5, 5),
        (8,),
    ),
    "linear": Case(
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(5, 8), b=nn.Linear(8, 3, bias=False)), (5,), (8,)
    ),
    "addmm": Case(
        lambda: Net(
            lambda m, x: m.b(torch.addmm(m.bias, x, m.w)), w=torch.ones(5, 8), bias=torch.ones(8), b=nn.Linear(8, 3)
        ),
        (5,),
        (8,),
    ),
    "low rank": Case(
        lambda: Net(lambda m, x: m.c(x) + m.b(m.a(x)), a=nn.Linear(9, 4), b=nn.Linear(4, 6), c=nn.Linear(9, 6)),
        (9,),
        (4,),
    ),
    "prelu and instance norm": Case(
        lambda: Net(
            lambda m, x: m.b(m.p(m.n(m.a(x)))),
            a=_block(3, 8, 3), n=nn.InstanceNorm2d(8, affine=True), p=nn.PReLU(8), b=_block(8, 2),
        ),
        (3, 6, 6),
        (8,),
    ),
    "group norm": Case(
        lambda: Net(
            lambda m, x: m.b(m.n(m.a(x))), a=_block(3, 12, 3), n=nn.GroupNorm(6, 12), b=_block(12, 2)
        ),
        (3, 6, 6),
        (6,),
        (("group_norm", "%conv2d, 6,", "%conv2d, 3,"),),
    ),
    "skip connection": Case(
        lambda: Net(
            lambda m, x: m.d((y := m.a(x)) + m.c(F.relu(m.b(y)))),
            a=_block(3, 8), b=_block(8, 6, 3), c=_block(6, 8, 3), d=_block(8, 2),
        ),
        (3, 6, 6),
        (8, 6),
    ),
    "shortcut with channel padding": Case(
        lambda: Net(
            _option_a, stem=_block(3, 4, 3), a=_block(4, 6, 3), b=_block(6, 8, 3, stride=2), head=nn.Linear(8, 3)
        ),
        (3, 8, 8),
        (4, 6, 4),
        (("pad", "[0, 0, 0, 0, 2, 2])", "[0, 0, 0, 0, 1, 1])"),),
    ),
    "concatenation": Case(
        lambda: Net(
            lambda m, x: m.c(torch.cat([x, y := m.a(x), m.b(y)], 1)), a=_block(3, 6), b=_block(6, 4), c=_block(13, 2)
        ),
        (3, 6, 6),
        (6, 4),
    ),
    "stack": Case(
        lambda: Net(
            lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], 1).sum(1)), a=_block(3, 6), b=_block(3, 6), c=_block(6, 2)
        ),
        (3, 6, 6),
        (6,),
    ),
    "chunk, bottleneck and concat (C2f)": Case(
        lambda: Net(_c2f, a=_block(3, 14), b=_block(7, 5, 3), c=_block(5, 7, 3), d=_block(21, 2)),
        (3, 6, 6),
        (7, 7, 5),
        (("chunk", "chunk.default(%conv2d, 2, 1)", "chunk.default(%conv2d, 2, 1)"),),
    ),
    "uneven split": Case(
        lambda: Net(
            lambda m, x: m.b((p := m.a(x).split(5, 1))[0] * p[1]) + m.c(p[2]),
            a=_block(3, 12), b=_block(5, 2), c=_block(2, 2),
        ),
        (3, 6, 6),
        (5, 2),
        (("split", "split.Tensor(%conv2d, 5, 1)", "split_with_sizes.default(%conv2d, [3, 3, 1], 1)"),),
    ),
    "chunk that becomes uneven": Case(
        lambda: Net(
            lambda m, x: m.b((p := m.a(x).chunk(2, 1))[0]) + m.c(p[1] + m.d(x).repeat(1, 2, 1, 1)),
            a=_block(3, 8), b=_block(4, 2), c=_block(4, 2), d=_block(3, 2),
        ),
        (3, 6, 6),
        (4, 2),
        (("chunk", "chunk.default(%conv2d, 2, 1)", "chunk.default(%conv2d, 2, 1)"),),
    ),
    "slices": Case(
        lambda: Net(
            lambda m, x: m.b((y := m.a(x))[:, :5]) + m.c(y[:, 3:]), a=_block(3, 8), b=_block(5, 2), c=_block(5, 2)
        ),
        (3, 6, 6),
        (3, 2, 3),
        (("slice_2", "1, 0, 5)", "1, 0, 3)"), ("slice_4", "1, 3, 92", "1, 2, 5)")),
    ),
    "narrow and select": Case(
        lambda: Net(
            lambda m, x: m.b((y := m.a(x)).narrow(1, 2, 4)) * y.select(1, 7).unsqueeze(1) + m.c(y),
            a=_block(3, 8), b=_block(4, 2), c=_block(8, 2),
        ),
        (3, 6, 6),
        (3, 4),
        (("narrow", "%conv2d, 1, 2, 4)", "%conv2d, 1, 1, 2)"), ("select", "%conv2d, 1, 7)", "%conv2d, 1, 4)")),
    ),
    "gate (SE)": Case(
        lambda: Net(
            lambda m, x: m.d((y := m.a(x)) * m.c(F.relu(m.b(y.mean((2, 3), keepdim=True)))).sigmoid()),
            a=_block(3, 8), b=_block(8, 4), c=_block(4, 8), d=_block(8, 2),
        ),
        (3, 6, 6),
        (8, 4),
    ),
    "flatten (NCHW)": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).flatten(1)), a=_block(3, 8), b=nn.Linear(8 * 12, 3)), (3, 3, 4), (8,)
    ),
    "flatten (NHWC)": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).reshape(x.shape[0], 96)), a=_block(3, 8), b=nn.Linear(96, 3)
        ),
        (3, 3, 4),
        (8,),
        (("reshape", "[%sym_size_int_1, 96])", "[%sym_size_int_1, 48])"),),
    ),
    "flatten and back": Case(
        lambda: Net(
            lambda m, x: m.b(F.relu(m.a(x).flatten(2)).unflatten(2, (3, 4)).flatten(1).unflatten(1, (8, 3, 4))),
            a=_block(3, 8), b=_block(8, 2),
        ),
        (3, 3, 4),
        (8,),
        (("unflatten_1", "1, [8, 3, 4])", "1, [4, 3, 4])"),),
    ),
    "channel shuffle by reshape": Case(
        lambda: Net(_shuffle, a=_block(3, 12), b=_block(6, 6, 3), c=_block(12, 2)),
        (3, 4, 4),
        (3, 3, 6),
        (("view", "2, 6, 4, 4])", "2, 4, 4, 4])"),),
    ),
    "channel shuffle, pixel shuffle and back": Case(
        lambda: Net(
            lambda m, x: m.b(F.pixel_unshuffle(F.pixel_shuffle(m.s(m.a(x)), 2), 2)),
            a=_block(3, 16), s=nn.ChannelShuffle(4), b=_block(16, 2),
        ),
        (3, 4, 4),
        (4,),
    ),
    "flip and repeat": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).flip(1).repeat(1, 2, 1, 1).repeat_interleave(2, 1)), a=_block(3, 6), b=_block(24, 2)
        ),
        (3, 4, 4),
        (6,),
    ),
    "expand": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x) + m.c(x).expand(-1, 8, -1, -1)), a=_block(3, 8), b=_block(8, 2), c=_block(3, 1)
        ),
        (3, 4, 4),
        (8,),
        (("expand", "[-1, 8, -1, -1])", "[-1, 4, -1, -1])"),),
    ),
    "expand_as, view_as": Case(
        lambda: Net(
            lambda m, x: m.b((y := m.a(x)) * m.g.expand_as(y) + y.flatten(2).view_as(y)),
            a=_block(3, 8), b=_block(8, 2), g=torch.ones(8, 1, 1),
        ),
        (3, 4, 4),
        (8,),
    ),
    "zeros in a concatenation": Case(
        lambda: Net(
            lambda m, x: m.b(torch.cat([m.a(x), x.new_zeros(x.shape[0], 4, 4, 4)], 1) + m.c(x)),
            a=_block(3, 4), b=_block(8, 2), c=_block(3, 8),
        ),
        (3, 4, 4),
        (4, 4),
        (("new_zeros", "4, 4, 4]", "2, 4, 4]"),),
    ),
    "windows as columns and back": Case(
        lambda: Net(
            lambda m, x: m.c(F.fold(m.s * F.unfold(m.a(x), 3, padding=1), (4, 4), 3, padding=1))
            + m.d(F.unfold(m.b(x), 2, stride=2).view(-1, 6, 16)),
            a=_block(3, 8), b=_block(3, 6), s=torch.ones(72, 1), c=_block(8, 6),
            d=nn.Sequential(nn.Linear(16, 1), nn.Unflatten(1, (6, 1))),
        ),
        (3, 4, 4),
        (8,),
    ),
    "overlapping windows, sampling": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).unfold(2, 2, 1).sum(-1))
            + m.c(F.grid_sample(m.a(x), x[:, 0, :3, :, None].expand(-1, -1, -1, 2), align_corners=True)),
            a=_block(3, 8), b=_block(8, 2), c=_block(8, 2),
        ),
        (3, 4, 4),
        (8,),
    ),
    "gated halves (GLU)": Case(
        lambda: Net(lambda m, x: m.b(F.glu(m.a(x), 1)), a=_block(3, 12), b=_block(6, 2)), (3, 4, 4), (6,)
    ),
    "positions picked": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).gather(1, x[:, :3, :1].long().clamp(0, 4).expand(-1, -1, 8)))
            + m.c(m.d(x)[:, torch.tensor([[0, 2], [1, 3]]), torch.tensor([0, 1])].flatten(2)).sum(1, keepdim=True),
            a=nn.Linear(4, 8), b=nn.Linear(8, 2), d=nn.Sequential(nn.Linear(4, 12), nn.Unflatten(2, (2, 6))),
            c=nn.Linear(12, 2),
        ),
        (5, 4),
        (8, 6),
    ),
    "written slices": Case(
        lambda: Net(
            lambda m, x: m.d(torch.slice_scatter(m.a(x), m.b(x), 1, 2, 6))
            + m.d(torch.select_scatter(m.a(x), m.c(x)[:, 0], 1, 7)),
            a=_block(3, 8), b=_block(3, 4), c=_block(3, 1), d=_block(8, 2),
        ),
        (3, 4, 4),
        (3, 4),
        (("slice_scatter", "1, 2, 6)", "1, 1, 3)"),),
    ),
    "bias with a part set to zero": Case(
        lambda: Net(
            lambda m, x: m.b(F.linear(x, m.w, torch.slice_scatter(m.v, torch.ops.aten.zero(m.v[2:5]), 0, 2, 5))),
            w=torch.ones(8, 4), v=torch.ones(8), b=nn.Linear(8, 2),
        ),
        (4,),
        (5, 3),
    ),
    "einsum over trailing axes": Case(
        lambda: Net(
            lambda m, x: m.b(torch.einsum("...c,dc->...d", m.a(x), m.w)), a=nn.Linear(4, 8), w=torch.ones(6, 8),
            b=nn.Linear(6, 2),
        ),
        (5, 4),
        (6, 8),
    ),
    "pools, resizing and space padding": Case(
        lambda: Net(
            lambda m, x: m.b(F.interpolate(F.pad(F.avg_pool2d(m.a(x), 2), (1,) * 4, mode="reflect"), scale_factor=2.0)),
            a=_block(3, 8), b=_block(8, 2),
        ),
        (3, 8, 8),
        (8,),
    ),
    "embedding": Case(
        lambda: Net(
            lambda m, x: m.b(m.e((x > 0).long()).squeeze(1).unsqueeze(1)), e=nn.Embedding(2, 8), b=nn.Linear(8, 2)
        ),
        (4,),
        (8,),
    ),
    "shared weight": Case(
        lambda: Net(lambda m, x: m.c(m.b(F.relu(m.b(m.a(x))))), a=_block(3, 8), b=_block(8, 8, 3), c=_block(8, 2)),
        (3, 6, 6),
        (8,),
    ),
    "weight read as both factors": Case(
        lambda: Net(lambda m, x: (x @ m.w.t()).tanh() @ m.w, w=torch.ones(8, 5)), (5,), (8,)
    ),
    "computed weights": Case(
        lambda: Net(
            lambda m, x: F.linear(F.linear(x, m.v * m.g).tanh(), m.p @ m.q),
            v=torch.ones(8, 5), g=torch.ones(8, 1), p=torch.ones(3, 4), q=torch.ones(4, 8),
        ),
        (5,),
        (8, 4),
    ),
    "MLP behind a layer norm": Case(
        lambda: Net(
            lambda m, x: x + m.b(F.gelu(m.a(m.n(x)))) * m.scale,
            n=nn.LayerNorm(6), a=nn.Linear(6, 12), b=nn.Linear(12, 6), scale=torch.ones(6),
        ),
        (4, 6),
        (12,),
    ),
    "fused attention": Case(
        lambda: Net(_attention, qkv=nn.Linear(16, 48), out=nn.Linear(16, 16)),
        (5, 16),
        (8,),
        (
            ("reshape", "5, 3, 2, 8])", "5, 3, 2, 4])"),
            ("scaled_dot_product_attention", "%getitem_2)", "%getitem_2, scale=0.3535533905932738)"),
        ),
    ),
    "multi-head attention": Case(
        lambda: Net(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(16, 2, batch_first=True)),
        (5, 16),
        (8,),
        (("unflatten", "[3, 16])", "[3, 8])"),),
    ),
    "grouped-query attention": Case(
        lambda: Net(_grouped_query, q=nn.Linear(16, 16), k=nn.Linear(16, 8), v=nn.Linear(16, 8), out=nn.Linear(16, 16)),
        (5, 16),
        (4, 4),
    ),
    "attention by einsum and matmul": Case(
        lambda: Net(_einsum_attention, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 6), out=nn.Linear(6, 6)),
        (5, 6),
        (8, 6),
    ),
    "einsum over heads and their width": Case(
        lambda: Net(_einsum_heads, o=torch.ones(4, 8, 6), **{name: torch.ones(6, 4, 8) for name in "qkv"}),
        (5, 6),
        (4, 8, 8),
    ),
    "outer product": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).relu()) * torch.einsum("nc,d->ncd", x, m.w).sin().mean(2),
            a=nn.Linear(6, 8), b=nn.Linear(8, 6), w=torch.ones(3),
        ),
        (6,),
        (8,),
    ),
    "channels repeated": Case(
        lambda: Net(
            lambda m, x: m.b(torch.repeat_interleave(m.a(x).relu(), 2, dim=1, output_size=16)),
            a=_block(3, 8), b=_block(16, 3),
        ),
        (3, 4, 4),
        (8,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_pruned_equals_masked_and_a_wrong_slice_does_not(name):
    case = CASES[name]
    graph, x = graph_of(case.model(), *case.shape)
    algebra = analyse(graph)
    assert tuple(len(family) for family in algebra.families) == case.families
    groups = some_of_each(algebra)
    reference, pruned = prune(graph, groups)
    for node, before, after in case.lines:
        assert before in line(graph, node)
        assert after in line(pruned, node)
    assert_predicted(graph, pruned, groups, algebra)
    assert worst(reference, pruned, x) < TOLERANCE
    if groups:
        assert min(power(graph, groups, [x])) > 100 * TOLERANCE
        shift_a_reader(graph, pruned)
        assert worst(reference, pruned, x) > 100 * TOLERANCE


# -------------------------------------------------------------------- what stays, and why


def _between(body: Callable[[Tensor], Tensor], after: int = 8, **parts: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Net(lambda m, x: m.b(body(m.a(x))), a=nn.Linear(5, 8), b=nn.Linear(after, 3), **parts)


FROZEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "softmax": (_between(lambda y: y.softmax(-1)), (5,), "the operator runs along it (softmax.int"),
    "cumulative sum": (_between(lambda y: y.cumsum(1)), (5,), "the operator runs along it (cumsum"),
    "sort": (_between(lambda y: y.sort(-1).values), (5,), "the operator runs along it (sort"),
    "roll": (_between(lambda y: y.roll(1, 1)), (5,), "the operator runs along it (roll"),
    "mean": (_between(lambda y: y - y.mean(-1, keepdim=True)), (5,), "it is reduced (mean.dim"),
    "maximum": (_between(lambda y: y - y.amax(-1, keepdim=True)), (5,), "it is reduced (amax"),
    "layer norm": (
        _between(lambda y: F.layer_norm(y, (8,))),
        (5,),
        "statistics are taken over it (layer_norm",
    ),
    "rms norm": (_between(lambda y: F.rms_norm(y, (8,))), (5,), "statistics are taken over it (rms_norm"),
    "group norm": (_between(lambda y: F.group_norm(y, 1)), (5,), "statistics are taken over it (group_norm"),
    "index": (_between(lambda y: y[:, torch.tensor([3, 1])], 2), (5,), "it is indexed"),
    "every second": (_between(lambda y: y[:, ::2], 4), (5,), "it is sliced in steps (slice.Tensor"),
    "reflection": (
        _between(lambda y: F.pad(y[:, None], (1, 1), mode="reflect")[:, 0], 10),
        (5,),
        "it is padded by other than constants (pad",
    ),
    "another cut": (
        _between(lambda y: y.reshape(-1, 4, 6).transpose(1, 2).reshape(-1, 24), 24),
        (3, 5),
        "the two shapes cut it differently",
    ),
    "a dynamic axis": (
        _between(lambda y: y.t().reshape(-1, 1).repeat(1, 8)),
        (5,),
        "it is merged with an axis of dynamic size",
    ),
    "no rule": (_between(lambda y: torch.cdist(y, y + 1) @ y), (5,), "no rule for this operator (cdist"),
    "output": (lambda: nn.Linear(5, 8), (5,), "it reaches output output"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_an_operator_needs_whole_stays_and_says_why(name):
    model, shape, reason = FROZEN[name]
    graph, _ = graph_of(model(), *shape)
    algebra = analyse(graph)
    assert algebra.families == ()
    produced = [
        g for g in algebra.groups if any(s.tensor in ("a_weight", "weight") and s.axis == 0 for s in g.slices)
    ]
    assert produced and all(reason in g.reason for g in produced)
    with pytest.raises(ContractError, match="cannot be removed"):
        remove(graph.copy(), produced[:1])


def test_an_unknown_operator_stops_only_what_it_touches():
    graph, x = graph_of(
        Net(
            lambda m, x: m.d(torch.cdist(y := m.b(F.relu(m.a(x))), y + 1).sum() + m.c(x)),
            a=nn.Linear(5, 8), b=nn.Linear(8, 4), c=nn.Linear(5, 6), d=nn.Linear(6, 2),
        ),
        5,
    )  # fmt: skip
    algebra = analyse(graph)
    assert [len(f) for f in algebra.families] == [8, 6]
    assert worst(*prune(graph, some_of_each(algebra)), x) < TOLERANCE


def test_inputs_and_every_output_are_frozen():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x):
            hidden = self.b(self.a(x).relu())
            return {"hidden": hidden, "logits": self.c(hidden.relu())}

    graph, _ = graph_of(Two(), 5)
    algebra = analyse(graph)
    assert [len(f) for f in algebra.families] == [8]
    assert {(where, reason) for where, reason, _ in algebra.frozen()} == {
        ("a", "it is an axis of input x"),
        ("b", "it reaches output hidden"),
        ("c", "it reaches output logits"),
    }


def test_what_is_frozen_stands_where_it_is_computed_first():
    graph, _ = graph_of(Net(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(5, 8), b=nn.Linear(5, 8)), 5)
    sites = [group.sites for group in analyse(graph).groups if group.reason.startswith("it reaches")]
    assert set(sites) == {("a", "b")}
    assert [where for where, reason, _ in analyse(graph).frozen() if "output" in reason] == ["a"]


def test_a_single_number_costs_no_channel_anything():
    def body(m, x):
        return m.b(F.relu(m.a(x * m.scale)))

    parts = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3)}
    graph, _ = graph_of(Net(body, scale=torch.tensor(2.0), **parts), 5)
    assert next(iter(graph.tensors.values())).dim() == 0
    assert {(group.parameters, group.macs) for group in analyse(graph).families[0]} == {(5 + 1 + 3, 5 + 3)}


def test_attention_costs_queries_their_scores_and_values_their_sums():
    def body(m, x):
        return m.out(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)))

    parts = {"q": nn.Linear(5, 8), "k": nn.Linear(5, 8), "v": nn.Linear(5, 6), "out": nn.Linear(6, 3)}
    graph, _ = graph_of(Net(body, **parts), 4, 5)
    found = {family[0].sites: {group.macs for group in family} for family in analyse(graph).families}
    assert found == {
        ("q", "k"): {4 * (5 + 5) + 4 * 4},
        ("v", "scaled_dot_product_attention"): {4 * (5 + 3) + 4 * 4},
    }


def test_a_class_is_the_same_whichever_way_it_is_reached():
    """The residual stream of two blocks is one family: four convolutions write it, four read it."""

    def body(m, x):
        y = m.stem(x)
        y = y + m.b(F.relu(m.a(y)))
        return m.head((y + m.d(F.relu(m.c(y)))).mean((2, 3)))

    parts = {"stem": (3, 8), "a": (8, 6), "b": (6, 8), "c": (8, 4), "d": (4, 8)}
    graph, _ = graph_of(Net(body, **{k: _block(*v) for k, v in parts.items()}, head=nn.Linear(8, 3)), 3, 4, 4)
    stream, *inner = analyse(graph).families
    assert stream[0].sites == ("stem", "b", "d") and [len(f) for f in inner] == [6, 4]
    slices = {(s.tensor, s.axis): s.indices.tolist() for s in stream[3].slices}
    places = [("stem", 0), ("a", 1), ("b", 0), ("c", 1), ("d", 0), ("head", 1)]
    weights = {k: v for k, v in slices.items() if k[0].endswith("weight")}
    assert weights == {(f"{name}_weight", axis): [3] for name, axis in places}
    assert ("add_1", 1) in slices and ("mean", 1) in slices
    # stem 3+1, b 6+1, d 4+1, a 6, c 4, head 3; over 16 positions but for the head
    assert stream[3].parameters == 29 and stream[3].macs == 16 * (3 + 6 + 4 + 6 + 4) + 3


# -------------------------------------------------------------------- reshapes


@pytest.mark.parametrize(
    ("carrier", "families"), [("head_dim", (8,)), ("head", (2,))], ids=["narrower heads", "fewer heads"]
)
@pytest.mark.parametrize("model", ["fused attention", "attention with positions"])
def test_the_carrier_says_whether_heads_or_their_width_can_go(model, carrier, families):
    def with_positions(m: nn.Module, x: Tensor) -> Tensor:
        n, s, e = x.shape
        q, k, v = m.qkv(x).reshape(n, s, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        table = m.table[m.index.view(-1)].view(5, 5, 2).permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) * 0.35 + table).softmax(-1)
        return m.out((weights @ v).transpose(1, 2).reshape(n, s, e))

    parts: dict[str, object] = {"qkv": nn.Linear(16, 48), "out": nn.Linear(16, 16)}
    if model == "attention with positions":
        net = Net(with_positions, **parts, table=torch.ones(9, 2))
        net.register_buffer("index", torch.arange(25).reshape(5, 5) % 9)
    else:
        net = Net(_attention, **parts)
    graph, x = graph_of(net, 5, 16)
    algebra = analyse(graph, carrier)
    assert tuple(len(f) for f in algebra.families) == families
    # of 5 tokens: rows of qkv, products of queries and of values in 2 heads, columns of out
    saved = {
        "head_dim": 5 * (16 * 6 + 5 * 2 + 5 * 2 + 16 * 2),
        "head": 5 * (16 * 24 + 5 * 8 + 5 * 8 + 16 * 8),
    }
    assert algebra.families[0][0].macs == saved[carrier]
    groups = some_of_each(algebra)
    reference, pruned = prune(graph, groups)
    assert worst(reference, pruned, x) < TOLERANCE
    shift_a_reader(graph, pruned)
    assert worst(reference, pruned, x) > 100 * TOLERANCE


def test_a_carrier_that_cannot_go_is_given_up_for_the_next():
    """The last axis is normalised, so the one before it carries."""
    graph, x = graph_of(
        Net(
            lambda m, x: m.b(F.layer_norm(m.a(x).unflatten(1, (6, 4)), (4,)).flatten(1)),
            a=nn.Linear(5, 24), b=nn.Linear(24, 3),
        ),
        5,
    )  # fmt: skip
    algebra = analyse(graph, "head_dim")
    assert [len(f) for f in algebra.families] == [6]
    reference, pruned = prune(graph, some_of_each(algebra))
    assert line(pruned, "unflatten").endswith("[3, 4])")
    assert worst(reference, pruned, x) < TOLERANCE


def test_common_factors_of_shapes():
    s = graph_of(nn.Linear(4, 2), 4)[0].placeholders[0].meta["val"].shape[0]

    def cut(source, result):
        found = common_factors(source, result)
        return found and (found.extents, found.source, found.result)

    assert cut([6, 4], [3, 8]) == ([4, 2, 3], [[2, 1], [0]], [[2], [1, 0]])
    assert cut([5, 1, 6], [5, 6, 1]) == ([6, 5], [[1], [], [0]], [[1], [0], []])
    extents, source, result = cut([s, 12, 8], [s * 3, 4 * 8])
    assert extents[:3] == [8, 4, 3] and source == [[3], [2, 1], [0]] and result == [[3, 2], [1, 0]]
    assert cut([4, 6], [3, 8]) is None
    assert cut([s, 4], [4]) is None and cut([s, 3], [s * 2, 3]) is None


# -------------------------------------------------------------------- surgery


def test_text_before_and_after():
    graph, _ = graph_of(
        Net(lambda m, x: m.b(F.relu(m.a(x)).flatten(1)), a=_block(3, 4, 3), b=nn.Linear(16, 2)), 3, 2, 2
    )
    (family,) = analyse(graph).families
    _, pruned = prune(graph, [family[0], family[2]])
    changed = [
        (before.split(" = ")[0], after.split(" = ")[0])
        for before, after in zip(graph.text().splitlines(), pruned.text().splitlines(), strict=True)
        if before != after
    ]
    assert changed == [
        ("%a_weight: f32[4, 3, 3, 3]", "%a_weight: f32[2, 3, 3, 3]"),
        ("%a_bias: f32[4]", "%a_bias: f32[2]"),
        ("%b_weight: f32[2, 16]", "%b_weight: f32[2, 8]"),
        ("%conv2d: f32[batch, 4, 2, 2]", "%conv2d: f32[batch, 2, 2, 2]"),
        ("%relu: f32[batch, 4, 2, 2]", "%relu: f32[batch, 2, 2, 2]"),
        ("%flatten: f32[batch, 16]", "%flatten: f32[batch, 8]"),
    ]
    kept = pruned.journal.kept
    assert kept["conv2d"][1].tolist() == [1, 3] and kept["b_weight"][1].tolist() == [
        4,
        5,
        6,
        7,
        12,
        13,
        14,
        15,
    ]
    assert torch.equal(pruned.tensor(pruned.node("a_bias")), graph.tensor(graph.node("a_bias"))[[1, 3]])
    assert graph.tensor(graph.node("a_bias")).shape == (4,)  # the caller's tensors are untouched


def test_halves_of_a_chunk_may_become_unequal():
    case = CASES["chunk, bottleneck and concat (C2f)"]
    graph, x = graph_of(case.model(), *case.shape)
    first, second, inner = analyse(graph).families
    reference, pruned = prune(graph, [*first[:3], second[1], *inner[2:4]])
    assert line(pruned, "chunk") == "split_with_sizes.default(%conv2d, [4, 6], 1)"
    assert worst(reference, pruned, x) < TOLERANCE


def test_pruning_twice_keeps_indices_of_the_first_graph():
    graph, x = graph_of(Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 3)), 5)
    once = graph.copy()
    groups = list(analyse(once).families[0])
    remove(once, [groups[0], groups[5]])
    remove(once, list(analyse(once).families[0][1:3]))  # of 1 2 3 4 6 7: 2 and 3
    assert once.journal.kept["linear"][1].tolist() == [1, 4, 6, 7]
    reference = masked(graph, [groups[i] for i in (0, 2, 3, 5)])
    assert worst(reference, once, x) < TOLERANCE
    assert worst(masked(graph, groups[:4]), once, x) > 100 * TOLERANCE


def test_an_axis_is_never_emptied():
    graph, _ = graph_of(Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 3)), 5)
    with pytest.raises(ContractError, match=r"nothing would be left of axis 0 of a_weight"):
        remove(graph, list(analyse(graph).families[0]))


def test_groups_belong_to_one_analysis_of_the_graph_as_it_is():
    graph, _ = graph_of(Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 3)), 5)
    first, again = analyse(graph).families[0], analyse(graph).families[0]
    with pytest.raises(ContractError, match="groups of several analyses"):
        remove(graph, [first[0], again[1]])
    remove(graph, [first[0]])
    with pytest.raises(ContractError, match="a_weight has changed since the graph was analysed"):
        remove(graph, [first[1]])


def test_the_batch_stays_dynamic():
    """A padding of other channels than before made C++ shape inference fix the batch to the example's."""
    graph, _ = graph_of(CASES["shortcut with channel padding"].model(), 3, 8, 8)
    _, pruned = prune(graph, some_of_each(analyse(graph)))
    assert all(": f32[batch, " in line for line in pruned.text().splitlines() if " = aten." in line)


@pytest.mark.parametrize(
    ("kind", "case", "message"),
    [
        ("unflatten", "flatten and back", r"aten.unflatten.int at .*: its operands no longer fit"),
        ("slice", "slices", r"aten\.\S+ at .*(its operands no longer fit|expected)"),
        ("pad", "shortcut with channel padding", r"aten\.\S+ at .*(its operands no longer fit|expected)"),
        ("conv", "depthwise convolution", r"aten.conv2d.\w+ at b .*: its operands no longer fit"),
        ("create_like", "zeros in a concatenation", r"aten\.\S+ at .*(its operands no longer fit|expected)"),
    ],
)
def test_a_forgotten_literal_is_loud(monkeypatch, kind, case, message):
    graph, _ = graph_of(CASES[case].model(), *CASES[case].shape)
    groups = some_of_each(analyse(graph))
    monkeypatch.delitem(surgery.REWRITES, kind)
    with pytest.raises(ContractError, match=message):
        remove(graph, groups)


# -------------------------------------------------------------------- broken surgery, seen by the oracle


def _broken(case: str) -> tuple[Graph, Graph, Graph, Tensor]:
    graph, x = graph_of(CASES[case].model(), *CASES[case].shape)
    reference, pruned = prune(graph, some_of_each(analyse(graph)))
    assert look_inside(reference, pruned, [x], TOLERANCE).wrong is None
    return graph, reference, pruned, x


def test_a_wrong_slice_in_a_reader_is_named():
    graph, reference, pruned, x = _broken("skip connection")
    shift_a_reader(graph, pruned)
    found = look_inside(reference, pruned, [x], TOLERANCE).wrong
    assert found and (found.site, found.operator) == ("d", "aten.conv2d.default") and found.error > 0.1


def test_a_wrong_slice_behind_a_layer_scale_is_named():
    """The outputs differ by less than the tolerance; the value in front of the layer scale gives it away."""
    graph, x = graph_of(CASES["MLP behind a layer norm"].model(), 4, 6)
    scale = graph.node("scale")
    graph.set_tensor(scale, graph.tensor(scale) * 1e-6)
    reference, pruned = prune(graph, some_of_each(analyse(graph)))
    shift_a_reader(graph, pruned)
    assert float((reference.run(x)[0] - pruned.run(x)[0]).abs().max() / x.abs().max()) < TOLERANCE
    found = look_inside(reference, pruned, [x], TOLERANCE).wrong
    assert found and (found.site, found.operator) == ("b", "aten.linear.default") and found.error > 0.1


def test_a_reader_behind_a_shuffle_that_forgets_the_shuffle_is_named():
    graph, x = graph_of(
        Net(
            lambda m, x: m.b(m.a(x).view(-1, 2, 6, 4, 4).transpose(1, 2).reshape(-1, 12, 4, 4)),
            a=_block(3, 12), b=_block(12, 2),
        ),
        3, 4, 4,
    )  # fmt: skip
    (family,) = analyse(graph).families
    reference, pruned = prune(graph, [family[1], family[2]])
    kept = pruned.journal.kept
    before, after = kept["a_weight"][0], kept["b_weight"][1]
    assert before.tolist() == [0, 3, 4, 5, 6, 9, 10, 11] and after.tolist() == [0, 1, 6, 7, 8, 9, 10, 11]
    pruned.set_tensor(pruned.node("b_weight"), graph.tensor(graph.node("b_weight"))[:, before])
    found = look_inside(reference, pruned, [x], TOLERANCE).wrong
    assert found and found.site == "b" and found.error > 0.1


def test_a_shifted_split_is_named():
    _, reference, pruned, x = _broken("slices")
    node = pruned.node("slice_4")
    source, axis, start, stop = node.args[:4]
    pruned.set_args(node, (source, axis, start - 1, stop - 1))
    found = look_inside(reference, pruned, [x], TOLERANCE).wrong
    assert found and found.node == "slice_4" and found.error > 0.1


def test_a_wrong_order_of_flattening_is_named():
    """What other pruners get wrong on NHWC: columns as if channels came first."""
    graph, reference, pruned, x = _broken("flatten (NHWC)")
    columns = torch.arange(96).reshape(8, 12)[pruned.journal.kept["conv2d"][1]].reshape(-1)
    pruned.set_tensor(pruned.node("b_weight"), graph.tensor(graph.node("b_weight"))[:, columns])
    found = look_inside(reference, pruned, [x], TOLERANCE).wrong
    assert found and found.site == "b" and found.error > 0.1


# -------------------------------------------------------------------- power, size


def test_power_is_what_a_mask_moves():
    graph, x = graph_of(Net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(5, 8), b=nn.Linear(8, 3)), 5)
    groups = list(analyse(graph).families[0])
    weight = graph.node("b_weight")
    changed = graph.tensor(weight).clone()
    changed[:, 2] *= 1e-5
    changed[:, 6] = 0
    graph.set_tensor(weight, changed)
    scale = graph.run(x)[0].abs().max()
    moved = [float((graph.run(x)[0] - masked(graph, [g]).run(x)[0]).abs().max() / scale) for g in groups]
    assert power(graph, groups, [x]) == pytest.approx(moved, rel=1e-4, abs=1e-6)
    assert [p >= 1e-3 for p in power(graph, groups, [x])] == [i not in (2, 6) for i in range(8)]


def test_masked_keeps_shapes_and_the_original():
    graph, x = graph_of(CASES["gate (SE)"].model(), 3, 6, 6)
    before, text = graph.run(x)[0], graph.text()
    twin = masked(graph, some_of_each(analyse(graph)))
    assert graph.text() == text and torch.equal(graph.run(x)[0], before)
    assert twin.run(x)[0].shape == before.shape and not torch.allclose(twin.run(x)[0], before)
    untouched = masked(graph, [])
    assert torch.equal(untouched.run(x)[0], before)


@pytest.mark.slow
def test_three_thousand_nodes_take_seconds():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 40, 3)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(40, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 40, 1))
                for _ in range(250)
            )

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return x.mean((1, 2, 3))

    graph = capture(Deep(), torch.randn(2, 3, 4, 4))
    assert len(graph.nodes) >= 3000
    start = time.process_time()
    algebra = analyse(graph)
    assert time.process_time() - start < 5
    assert sum(len(a) for a in algebra.axes.values()) >= 40_000
    assert [len(f) for f in algebra.families] == [32] * 250
    start = time.process_time()
    costs = Costs(algebra, {"macs": algebra.macs_terms, "params": algebra.parameter_terms})
    found = families(algebra, costs, np.ones(1 + max(g.index for g in algebra.groups)), multiple=8, minimum=4)
    shrink_globally(found, costs, {"macs": 0.6})
    assert time.process_time() - start < 5 and costs.share("macs") <= 0.6 + 1e-9


def test_the_work_grows_with_the_graph_and_no_faster():
    """Twice the blocks, hence twice the nodes, atoms and classes: no loop visits every class once a node."""

    def graph(blocks: int) -> Graph:
        def body(m, x):
            x = m.stem(x)
            for i in range(blocks):
                x = x + getattr(m, f"d{i}")(F.relu(getattr(m, f"u{i}")(x)))
            return x.mean((1, 2, 3))

        layers = {f"u{i}": _block(8, 600) for i in range(blocks)} | {
            f"d{i}": _block(600, 8) for i in range(blocks)
        }
        return capture(Net(body, stem=_block(3, 8), **layers), torch.randn(2, 3, 2, 2))

    def seconds(one: Graph) -> float:
        start = time.process_time()
        algebra = analyse(one)
        costs = Costs(algebra, {"macs": algebra.macs_terms, "params": algebra.parameter_terms})
        families(algebra, costs, np.ones(1 + max(g.index for g in algebra.groups)), multiple=8, minimum=4)
        return time.process_time() - start

    small, large = graph(6), graph(24)
    once, four = (min(seconds(one) for _ in range(3)) for one in (small, large))
    assert four < 9 * once
