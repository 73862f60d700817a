"""Channels under normalisations, by option: statistics are taken over those that are left, and that is proved."""

from __future__ import annotations

import pytest
import torch
from pruning import TOLERANCE, Net, graph_of, line, prune, shift_a_reader, some_of_each, worst
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.channels import Algebra, analyse
from compressor.errors import ContractError
from compressor.ir import Graph
from compressor.masked_norms import REWRITES
from compressor.surgery import remove


class RMSNorm(nn.Module):
    """As transformers spells it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _vit(m: nn.Module, x: Tensor) -> Tensor:
    """A patch embedding, a pre-norm attention block and its MLP, a norm and a head."""
    y = m.patch(x).flatten(2).transpose(1, 2) + m.positions
    z = m.n1(y)
    q, k, v = (p(z).unflatten(-1, (2, 8)).transpose(1, 2) for p in (m.q, m.k, m.v))
    y = y + m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    y = y + m.down(F.gelu(m.up(m.n2(y))))
    return m.head(m.n3(y)[:, 0])


def _llama(m: nn.Module, x: Tensor) -> Tensor:
    y = m.embed(x)
    y = y + m.out(torch.cumsum(m.v(m.n1(y)), 1))
    z = m.n2(y)
    return m.head(m.n3(y + m.down(F.silu(m.gate(z)) * m.up(z))))


def _convnext(m: nn.Module, x: Tensor) -> Tensor:
    y = m.stem(x)
    z = m.n1(m.dw(y).permute(0, 2, 3, 1))
    y = y + (m.scale * m.down(F.gelu(m.up(z)))).permute(0, 3, 1, 2)
    return m.head(m.n2(y.mean((2, 3))))


def _unet(m: nn.Module, x: Tensor) -> Tensor:
    """A residual block of a diffusion network: group norm, SiLU, convolution, twice; then down, up and a skip."""
    y = m.stem(x)
    z = m.c1(F.silu(m.n1(y)))
    y = y + m.c2(F.silu(m.n2(z)))
    z = F.interpolate(m.low(y[:, :, ::2, ::2]), scale_factor=2.0)
    return m.head(torch.cat((F.silu(m.n3(y)), z), 1))


def _grn(m: nn.Module, x: Tensor) -> Tensor:
    """ConvNeXt V2's global response normalisation: a norm over space, divided by its mean over channels."""
    y = F.gelu(m.a(x))
    norm = torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True)
    return m.b(y + m.w * (y * (norm / (norm.mean(1, keepdim=True) + 1e-6))))


def _standardised(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return m.c(F.normalize(m.b(y), dim=-1)) + m.d(y)


def _by_hand(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b((y - y.mean(1, True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt())


def _blocks(**widths: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*pair) for name, pair in widths.items()}


NETS = {
    # name: (model, input, families without norms, families with them)
    "vit": (
        lambda: Net(
            _vit, patch=nn.Conv2d(3, 16, 4, 4), positions=torch.ones(1, 4, 16),
            **{f"n{i}": nn.LayerNorm(16) for i in (1, 2, 3)}, **{n: nn.Linear(16, 16) for n in ("q", "k", "v", "out")},
            **_blocks(up=(16, 24), down=(24, 16), head=(16, 3)),
        ),
        (3, 8, 8), (8, 8, 24), (16, 8, 8, 24),
    ),
    "llama": (
        lambda: Net(
            lambda m, x: _llama(m, (x > 0).long()), embed=nn.Embedding(2, 16),
            **{f"n{i}": RMSNorm(16) for i in (1, 2, 3)},
            **_blocks(v=(16, 12), out=(12, 16), gate=(16, 24), up=(16, 24), down=(24, 16), head=(16, 3)),
        ),
        (6,), (12, 24), (16, 12, 24),
    ),
    "convnext": (
        lambda: Net(
            _convnext, stem=nn.Conv2d(3, 16, 2, 2), dw=nn.Conv2d(16, 16, 3, padding=1, groups=16),
            n1=nn.LayerNorm(16), n2=nn.LayerNorm(16), scale=torch.ones(16),
            **_blocks(up=(16, 24), down=(24, 16), head=(16, 3)),
        ),
        (3, 8, 8), (24,), (16, 24),
    ),
    "unet": (
        lambda: Net(
            _unet, stem=nn.Conv2d(3, 16, 3, padding=1), c1=nn.Conv2d(16, 24, 3, padding=1),
            c2=nn.Conv2d(24, 16, 3, padding=1), low=nn.Conv2d(16, 8, 3, padding=1), head=nn.Conv2d(24, 3, 1),
            n1=nn.GroupNorm(4, 16), n2=nn.GroupNorm(4, 24), n3=nn.GroupNorm(2, 16),
        ),
        (3, 8, 8), (2, 4, 8), (4, 6, 8),
    ),
    "group norm over everything": (
        lambda: Net(
            lambda m, x: m.b(m.n(m.a(x))),
            a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1), n=nn.GroupNorm(1, 8, affine=False),
        ),
        (3, 4, 4), (), (8,),
    ),
    "rms norm": (
        lambda: Net(lambda m, x: m.b(m.n(m.a(x))), n=nn.RMSNorm(8), **_blocks(a=(5, 8), b=(8, 3))),
        (5,), (), (8,),
    ),
    "layer norm over channels and space": (
        lambda: Net(
            lambda m, x: m.b(m.n(m.a(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1), n=nn.LayerNorm((8, 4, 4))
        ),
        (3, 4, 4), (), (8,),
    ),
    "response normalisation": (
        lambda: Net(_grn, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1), w=torch.ones(1, 8, 1, 1)),
        (3, 4, 4), (), (8,),
    ),
    "mean, variance and Euclidean norm": (
        lambda: Net(_standardised, **_blocks(a=(5, 8), b=(8, 6), c=(6, 3), d=(8, 3))),
        (5,), (), (8, 6),
    ),
    "layer norm over channels by hand": (
        lambda: Net(_by_hand, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)),
        (3, 4, 4), (), (8,),
    ),
}  # fmt: skip


def _families(algebra: Algebra) -> tuple[int, ...]:
    return tuple(len(family) for family in algebra.families)


@pytest.mark.parametrize("name", NETS)
def test_norms_over_what_is_left_are_proved(name, monkeypatch):
    model, shape, without, families = NETS[name]
    graph, x = graph_of(model(), *shape)
    assert _families(analyse(graph)) == without
    algebra = analyse(graph, norms=True)
    assert _families(algebra) == families
    groups = some_of_each(algebra)
    reference, pruned = prune(graph, groups)
    assert worst(reference, pruned, x) < TOLERANCE
    for kind in list(REWRITES):  # masks at the readers alone are another promise
        monkeypatch.delitem(REWRITES, kind)
    assert worst(prune(graph, groups)[0], pruned, x) > 100 * TOLERANCE
    shift_a_reader(graph, pruned)
    assert worst(reference, pruned, x) > 100 * TOLERANCE


def test_a_norm_over_the_wrong_channels_is_caught():
    graph, x = _net("convnext")
    algebra = analyse(graph, norms=True)
    reference, pruned = prune(graph, some_of_each(algebra))
    weight = pruned.node("n1_weight")
    kept = pruned.journal.kept["n1_weight"][0]
    pruned.set_tensor(weight, graph.tensor(graph.node("n1_weight"))[(kept + 1) % 16])
    assert worst(reference, pruned, x) > 100 * TOLERANCE


def test_sizes_of_norms_follow():
    graph, _ = _net("unet")
    first, inner, _ = analyse(graph, norms=True).families
    _, pruned = prune(graph, [first[0], *inner[:4]])
    assert "4, %n1_weight" in line(pruned, "group_norm") and pruned.node("n2_weight").meta["val"].shape == (
        8,
    )
    graph, _ = _net("vit")
    _, pruned = prune(graph, some_of_each(analyse(graph, norms=True)))
    assert "[8], %n1_weight" in line(pruned, "layer_norm")


def test_whole_groups_need_no_option_and_parts_of_groups_are_refused():
    graph, _ = _net("unet")
    stream, inner, _ = analyse(graph).families
    _, pruned = prune(graph, [*inner[:2]])
    assert ", 2, %n2_weight" in line(pruned, "group_norm_1") and ", 4, %n1_weight" in line(
        pruned, "group_norm"
    )
    by_position = analyse(graph, norms=True).families[1]
    broken = graph.copy()
    node = broken.node("group_norm_1")
    broken.set_args(node, (node.args[0], 3, *node.args[2:]))
    with pytest.raises(
        ContractError, match="the groups of aten.group_norm.default at n2 would be of several sizes"
    ):
        remove(broken, [by_position[0]])
    assert len(stream) == 2  # n3 has two groups of eight: n1's four go in pairs


def test_a_frozen_group_says_what_would_free_it():
    graph, _ = _net("vit")
    reasons = {(g.reason, g.remedy) for g in analyse(graph).groups if g.reason}
    assert ("statistics are taken over it (layer_norm at n1)", "prune(norms=true) includes it") in reasons
    assert ("it reaches output output", "") in reasons
    graph, _ = _net("response normalisation")
    frozen = [g for g in analyse(graph).groups if "mean" in g.reason]
    assert frozen and {g.remedy for g in frozen} == {"prune(norms=true) includes it"}


def _net(name: str) -> tuple[Graph, Tensor]:
    model, shape, *_ = NETS[name]
    return graph_of(model(), *shape)
