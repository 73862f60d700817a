"""What pruners get silently wrong, one small network each: pruned it equals the masked original, and the mistake that
is made elsewhere is caught. `slip` says which slices of which tensor that mistake keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pruning import TOLERANCE, Net, graph_of, prune, some_of_each, worst
from torch import Tensor, nn
from torch.nn import functional as F
from yolo import C2f, Yolo
from zoo import with_power

from compressor.atoms import Carrier
from compressor.capture import capture
from compressor.channels import analyse
from compressor.ir import Graph
from compressor.verify import look_inside

Indices = NDArray[np.int64]
Kept = Callable[[str, int], Indices]


@dataclass(frozen=True)
class Killer:
    """families: how many groups each family has. slip: tensor, axis, and the slices that the mistake keeps there."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    families: tuple[int, ...]
    tensor: str
    axis: int
    slip: Callable[[Kept], Indices]
    carrier: Carrier = "head_dim"


def _conv(a: int, b: int, kernel: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, padding=kernel // 2, **options)


def _nhwc(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)).permute(0, 2, 3, 1).flatten(1))


def _shuffle(m: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = (y := m.a(x)).shape
    return m.b(y.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w))


def _fused(m: nn.Module, x: Tensor) -> Tensor:
    n, s, _ = x.shape
    q, k, v = m.qkv(x).reshape(n, s, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, 24))


def _grouped_query(m: nn.Module, x: Tensor) -> Tensor:
    """6 query heads, 3 key-value heads, repeated as transformers does it."""
    n, s, _ = x.shape
    q, k, v = (p(x).view(n, s, -1, 4).transpose(1, 2) for p in (m.q, m.k, m.v))
    k, v = (t[:, :, None].expand(n, 3, 2, s, 4).reshape(n, 6, s, 4) for t in (k, v))
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, 24))


def _windows(m: nn.Module, x: Tensor) -> Tensor:
    """Swin: a shift, windows of 2 x 2, heads with a table of relative positions, and everything back."""
    n, h, w, c = (x := m.stem(x).permute(0, 2, 3, 1)).shape
    y = torch.roll(x, (-1, -1), (1, 2)).view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
    q, k, v = m.qkv(y).reshape(-1, 4, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
    table = m.table[m.index.view(-1)].view(4, 4, 4).permute(2, 0, 1)
    y = ((q @ k.transpose(-2, -1) * 0.4 + table).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c)
    y = m.out(y).view(n, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(n, h, w, c)
    return m.head((x + torch.roll(y, (1, 1), (1, 2))).permute(0, 3, 1, 2))


def _swin() -> nn.Module:
    net = Net(
        _windows, stem=_conv(3, 16), qkv=nn.Linear(16, 48), out=nn.Linear(16, 16), head=_conv(16, 2),
        table=torch.ones(9, 4),
    )  # fmt: skip
    net.register_buffer("index", torch.arange(16).reshape(4, 4) % 9)
    return net


def _shufflenet() -> nn.Module:
    from torchvision.models.shufflenetv2 import InvertedResidual

    blocks = {name: InvertedResidual(12, 12, 1) for name in ("b", "c")}
    return Net(lambda m, x: m.d(m.c(m.b(m.a(x)))), a=_conv(3, 12), **blocks, d=_conv(12, 2))


KILLERS = {
    "flattened channels-last": Killer(
        lambda: Net(_nhwc, a=_conv(3, 8), b=nn.Linear(96, 3)),
        (3, 3, 4), (8,), "b_weight", 1,
        lambda kept: (kept("a_weight", 0)[:, None] * 12 + np.arange(12)).reshape(-1),  # as if channels came first
    ),
    "channel shuffle": Killer(
        lambda: Net(_shuffle, a=_conv(3, 12), b=_conv(12, 2)),
        (3, 4, 4), (4,), "b_weight", 1, lambda kept: kept("a_weight", 0),  # as if nothing had moved
    ),
    "chunk and concat (C2f)": Killer(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x))), a=_conv(3, 6), b=C2f(6, 16, 2, True), c=_conv(16, 2)),
        (3, 6, 6), (6, 8, 8, 8, 8, 16), "b_cv2_conv_weight", 1,
        lambda kept: (kept("b_cv2_conv_weight", 1) + 1) % 32,  # of the channel beside it
    ),
    "pixel shuffle": Killer(
        lambda: Net(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=_conv(3, 16), b=_conv(4, 2)),
        (3, 4, 4), (4,), "a_weight", 0,
        lambda kept: (kept("b_weight", 1) + 4 * np.arange(4)[:, None]).reshape(-1),  # as if strided by channel
    ),
    "grouped transposed convolution": Killer(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x))), a=_conv(3, 8), b=nn.ConvTranspose2d(8, 6, 2, 2, groups=2), c=_conv(6, 2)
        ),
        (3, 4, 4), (4, 3), "c_weight", 1,
        lambda kept: np.repeat(kept("b_weight", 1), 2) * 2 + [0, 1] * len(kept("b_weight", 1)),  # interleaved
    ),
    "fused qkv": Killer(
        lambda: Net(_fused, qkv=nn.Linear(24, 72), out=nn.Linear(24, 24)),
        (5, 24), (4,), "qkv_weight", 0,
        lambda kept: (np.arange(4)[None] * 18 + np.arange(18)[:, None]).T[[0, 2]].reshape(-1),  # heads first, not last
        "head",
    ),
    "grouped-query attention": Killer(
        lambda: Net(
            _grouped_query, q=nn.Linear(24, 24), k=nn.Linear(24, 12), v=nn.Linear(24, 12), out=nn.Linear(24, 24)
        ),
        (5, 24), (3,), "q_weight", 0,
        lambda kept: (np.array([0, 2, 3, 5])[:, None] * 4 + np.arange(4)).reshape(-1),  # heads in turns
        "head",
    ),
    "swin's windows": Killer(
        _swin, (3, 4, 4), (16, 4), "table", 1, lambda kept: (kept("table", 1) + 1) % 4, "head"
    ),
    "shufflenet_v2": Killer(
        _shufflenet, (3, 6, 6), (3, 3, 6, 6, 6), "d_weight", 1, lambda kept: np.arange(len(kept("d_weight", 1)))
    ),
    "depthwise behind a concat": Killer(
        lambda: Net(
            lambda m, x: m.d(m.c(torch.cat((m.a(x), m.b(x)), 1))),
            a=_conv(3, 4), b=_conv(3, 5), c=_conv(9, 9, 3, groups=9), d=_conv(9, 2),
        ),
        (3, 6, 6), (4, 5), "c_weight", 0,
        lambda kept: np.concatenate([kept("b_weight", 0), 5 + kept("a_weight", 0)]),  # the pieces in the other order
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KILLERS)
def test_pruned_equals_masked_and_the_usual_mistake_does_not(name):
    case = KILLERS[name]
    graph, x = graph_of(case.model(), *case.shape)
    algebra = analyse(graph, case.carrier)
    assert sorted(len(family) for family in algebra.families) == sorted(case.families)
    reference, pruned = prune(graph, some_of_each(algebra))
    assert worst(reference, pruned, x) < TOLERANCE
    _slip(graph, pruned, case)
    found = look_inside(reference, pruned, [x], TOLERANCE).wrong
    assert found and found.error > 100 * TOLERANCE


def _slip(graph: Graph, pruned: Graph, case: Killer) -> None:
    """The tensor of the mistake: other slices than the right ones, and as many."""
    kept = pruned.journal.kept
    wrong = case.slip(lambda tensor, axis: kept[tensor][axis].numpy())
    right = kept[case.tensor][case.axis].numpy()
    assert len(wrong) == len(right) and not np.array_equal(wrong, right)
    tensor = graph.tensor(graph.node(case.tensor))
    for axis, indices in {**kept[case.tensor], case.axis: torch.from_numpy(wrong)}.items():
        tensor = tensor.index_select(axis, indices)
    pruned.set_tensor(pruned.node(case.tensor), tensor)


def test_a_detector_keeps_its_raw_outputs():
    """Every convolution of a YOLO-shaped network but the last of each head loses channels."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 64, 64)
    graph = capture(with_power(Yolo(classes=3, width=8), x), x[:2])
    algebra = analyse(graph)
    reference, pruned = prune(graph, [g for f in algebra.families for g in f[1::2]])
    assert (
        float((reference.run(x)[0] - pruned.run(x)[0]).abs().max() / reference.run(x)[0].abs().max())
        < TOLERANCE
    )
    assert look_inside(reference, pruned, [x], 10 * TOLERANCE).wrong is None
    assert pruned.run(x)[0].shape == graph.run(x)[0].shape
    stays = {site for g in algebra.groups if g.reason and "input" not in g.reason for site in g.sites}
    assert stays and all(site.startswith("head.") for site in stays)
