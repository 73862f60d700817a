"""Depth pruning: which branches can go, which go first, and that what is left is the model with them times zero."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from nets import Net, conv, noise
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor import data
from compressor.branches import branches, bypass, imitate, masked
from compressor.capture import capture
from compressor.ir import Graph
from compressor.ops import macs
from compressor.pipeline import Context, Pipeline, parse
from compressor.registry import passes
from targets.cpu import CPU

LOUD = (1.0, 0.02, 0.5, 0.1)  # how much each block adds: the second matters least, then the fourth


class Block(nn.Module):
    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self.conv1, self.conv2, self.gain = conv(width, width), conv(width, width), gain

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.gain * self.conv2(torch.relu(self.conv1(x))))


class Residual(nn.Module):
    """A stem, four blocks on one stream, a head. zero: blocks that add nothing, as the reference has it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = conv(3, width)
        self.blocks = nn.ModuleList(Block(width, gain) for gain in LOUD)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor, zero: tuple[int, ...] = ()) -> Tensor:
        x = torch.relu(self.stem(x))
        for i, block in enumerate(self.blocks):
            x = torch.relu(x) if i in zero else block(x)
        return self.head(x.mean((2, 3)))


X = torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(1))
FRESH = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(2))


def captured(model: nn.Module, *inputs: Tensor) -> Graph:
    return capture(model.eval(), tuple(x[:4] for x in inputs))


def run(graph: Graph, spec: str, *inputs: Tensor, **known: Any) -> list[Any]:
    """Rows of a run; three samples in four calibrate, the others are held out."""
    cut = len(inputs[0]) * 3 // 4
    seen = data.open_data([tuple(x[:cut] for x in inputs)], graph.inputs)
    kept = data.open_data([tuple(x[cut:] for x in inputs)], graph.inputs)
    return Pipeline(parse(spec, passes()), passes()).run(graph, Context(CPU, kept, seen, **known))


def gone(row: Any) -> list[str]:
    return [one["site"] for one in row.facts["branches"]]


# ---------------------------------------------------------------- which


def test_blocks_are_branches_and_what_feeds_them_is_none() -> None:
    graph = captured(Residual(), X)
    found = list(branches(graph))
    assert [one.site for one in found] == [f"blocks.{i}" for i in range(4)]
    assert found[0].sites == ("blocks.0.conv1", "blocks.0.conv2")
    assert all(one.macs == 2 * 8 * 8 * 9 * 100 for one in found)


def _shortcut(net: Net, x: Tensor) -> Tensor:
    return torch.relu(net.body(x) + net.shortcut(x))


def _attention(net: Net, x: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    y = net.norm(x)
    x = x + net.out(F.scaled_dot_product_attention(net.q(y), net.k(y), net.v(y)))
    return x + net.down(F.gelu(net.up(x)))


def _twice(net: Net, x: Tensor) -> Tensor:
    y = net.body(x)
    return torch.cat([x + y, y], 1)  # the branch is read beside the sum


def _scaled(net: Net, x: Tensor) -> Tensor:
    return torch.add(net.body(x), x, alpha=2)


def _positions(net: Net, x: Tensor) -> Tensor:
    return net.body(x) + net.table


def _doubled(net: Net, x: Tensor) -> Tensor:
    y = net.body(x)
    return y + y


def _returned(net: Net, x: Tensor) -> Tensor:
    return x + net.body(x)  # an output would be an input


def _lone(net: Net, x: Tensor) -> Tensor:
    return torch.relu(x.mean(1, keepdim=True) + net.body(x))  # one is not as large as the sum


@pytest.mark.parametrize(
    ("forward", "parts", "sites"),
    [
        (_shortcut, {"body": conv(3, 3), "shortcut": conv(3, 3, 1)}, ["body", "shortcut"]),
        (
            _attention,
            {name: nn.Linear(3, 3) for name in ("q", "k", "v", "out", "up", "down")} | {"norm": nn.LayerNorm(3)},
            ["out", "down"],
        ),
        (_twice, {"body": conv(3, 3)}, []),
        (_scaled, {"body": conv(3, 3)}, []),
        (_positions, {"body": conv(3, 3), "table": torch.randn(1, 3, 10, 10)}, []),
        (_doubled, {"body": conv(3, 3)}, []),
        (_returned, {"body": conv(3, 3)}, []),
        (_lone, {"body": conv(3, 3)}, []),
    ],
)  # fmt: skip
def test_what_can_go(forward: Any, parts: dict[str, Any], sites: list[str]) -> None:
    found = list(branches(captured(Net(forward, **parts), X)))
    assert [one.sites[-1] for one in found] == sites


# ---------------------------------------------------------------- the cut


def test_what_is_left_is_the_model_without_its_least_branches() -> None:
    model = Residual().eval()
    graph = captured(model, X)
    (_, row) = run(graph, "shorten(macs=0.6,repair=false)", X)
    assert gone(row) == ["blocks.1", "blocks.3"] and row.contract == "masked" and row.status == "proved"
    torch.testing.assert_close(graph.run(FRESH)[0], model(FRESH, zero=(1, 3)), rtol=1e-5, atol=1e-6)
    assert float((model(FRESH) - model(FRESH, zero=(1, 3))).detach().abs().max()) > 1e-3
    assert row.facts["macs"] == macs(graph) / macs(captured(model, X)) <= 0.6
    assert {(d.site, d.reason) for d in row.declines} == {
        (f"blocks.{i}", "the budget is met at less loss elsewhere") for i in (0, 2)
    }


def test_the_layers_behind_make_up_for_it() -> None:
    model = Residual().eval()
    plain, mended = captured(model, X), captured(model, X)
    run(plain, "shorten(macs=0.6,repair=false)", X)
    (_, row) = run(mended, "shorten(macs=0.6)", X)
    assert row.contract == "masked, bounded" and row.facts["repaired"] > 1
    assert noise(model(FRESH), mended.run(FRESH)[0]) > noise(model(FRESH), plain.run(FRESH)[0]) + 3


def test_either_side_of_a_sum_can_be_zero_and_nothing_else_reads_it() -> None:
    graph = captured(Net(_shortcut, body=conv(3, 3), shortcut=conv(3, 3, 1)), X)
    for branch in branches(graph):
        copy = graph.copy()
        bypass(copy, branch)
        copy.check()
        assert torch.equal(copy.run(X[:5])[0], masked(graph, [branch]).run(X[:5])[0])
        assert not list(branches(copy))


def test_a_stream_that_lies_otherwise_in_memory() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        y = y + net.body(y.contiguous())
        return net.head(y.contiguous().view(y.shape[0], -1))

    net = Net(forward, body=nn.Linear(6, 6), head=nn.Linear(24, 2)).eval()
    x = torch.randn(16, 6, 4)
    graph = captured(net, x)
    run(graph, "shorten(macs=0.5,reach=best,repair=false),fold", x)
    assert not any("body" in name for name in graph.tensors)
    torch.testing.assert_close(graph.run(x)[0], net.head(x.transpose(1, 2).reshape(16, -1)))


def test_relus_that_meet_are_one() -> None:
    graph = captured(Residual(), X)
    run(graph, "shorten(macs=0.01,reach=best,repair=false),fold", X)
    assert sum("relu" in str(node.target) for node in graph.nodes) == 1


# ---------------------------------------------------------------- what can be made up for


def _mixed(net: Net, x: Tensor) -> Tensor:
    return torch.relu(x + net.body(x))


def _straight(net: Net, x: Tensor) -> Tensor:
    return 2 * (x + net.body(x))


def _turned(net: Net, x: Tensor) -> Tensor:
    """Channels last within the branch, as ConvNeXt has them."""
    return torch.relu(x + net.scale * net.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def _tokens(net: Net, x: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    return torch.relu(x + net.body(x))


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        (_mixed, {"body": conv(3, 3, 1)}),
        (_mixed, {"body": nn.Sequential(conv(3, 3, 1), nn.BatchNorm2d(3), conv(3, 3, 1))}),
        (_turned, {"body": nn.Linear(3, 3), "scale": torch.full((3, 1, 1), 0.5)}),
        (_tokens, {"body": nn.Linear(3, 3)}),
    ],
)
def test_an_affine_branch_is_imitated_whatever_its_axis(forward: Any, parts: dict[str, Any]) -> None:
    graph = captured(Net(forward, **parts), X)
    (branch,) = branches(graph)
    twin, cut = graph.copy(), graph.copy()
    imitate(twin, branch, data.open_data([(X,)], graph.inputs))
    bypass(cut, branch)
    twin.check()
    (expected,) = graph.run(FRESH)
    assert noise(expected, twin.run(FRESH)[0]) > 60 > 30 > noise(expected, cut.run(FRESH)[0])


def test_few_rows_tell_of_means_alone() -> None:
    torch.manual_seed(0)
    graph = captured(Net(_straight, body=nn.Linear(32, 32)), torch.randn(20, 32))
    (branch,) = branches(graph)
    for rows, decibels in ((20, (0, 20)), (2000, (60, math.inf))):
        twin, x = graph.copy(), torch.randn(rows, 32)
        imitate(twin, branch, data.open_data([(x,)], graph.inputs))
        fresh = torch.randn(500, 32)
        assert decibels[0] < noise(graph.run(fresh)[0], twin.run(fresh)[0]) < decibels[1]
        missed = graph.run(x)[0] - twin.run(x)[0]
        assert float(missed.mean(0).abs().max()) < 1e-4


def test_padding_tells_nothing() -> None:
    def forward(net: Net, x: Tensor, attention_mask: Tensor) -> Tensor:
        y = torch.relu(x + net.body(x))
        return (y * attention_mask[..., None]).sum(1)

    torch.manual_seed(0)
    x, mask = torch.randn(64, 6, 4), torch.ones(64, 6, dtype=torch.int64)
    mask[:, 3:] = 0
    net = Net(forward, body=nn.Sequential(nn.Linear(4, 4), nn.Tanh())).eval()
    graph = capture(net, (x[:4], mask[:4]))
    (branch,) = branches(graph)
    loud = torch.where(mask[..., None] == 1, x, 100 * x)
    first, second = graph.copy(), graph.copy()
    imitate(first, branch, data.open_data([(x, mask)], graph.inputs))
    imitate(second, branch, data.open_data([(loud, mask)], graph.inputs))
    torch.testing.assert_close(first.run(x, mask)[0], second.run(x, mask)[0])


def test_a_branch_without_axes_goes_all_the_same() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return torch.relu(net.stem(x).sum() + net.body(x).sum())

    graph = captured(Net(forward, stem=conv(3, 3), body=conv(3, 3)), X[:4])
    branch = next(iter(branches(graph)))
    twin, cut = graph.copy(), graph.copy()
    imitate(twin, branch, data.open_data([(X[:4],)], graph.inputs))
    bypass(cut, branch)
    assert torch.equal(twin.run(X[:4])[0], cut.run(X[:4])[0])


def test_what_can_be_made_up_for_goes_first() -> None:
    """A loud branch that is affine, and a quiet one that is not: which of them goes is decided by who is to mend it."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        y = y + net.affine(y)
        y = y + 0.3 * torch.relu(net.bent(y))
        return net.head(torch.relu(net.last(y))).mean((2, 3))

    torch.manual_seed(0)
    parts = {name: conv(8, 8, 1) for name in ("affine", "bent", "last", "head")}
    net = Net(forward, stem=conv(3, 8), **parts)
    for spec, first in (("shorten(macs=0.9)", "affine"), ("shorten(macs=0.9,repair=false)", "bent")):
        (_, row) = run(captured(net, X), spec, X)
        assert gone(row) == [first]


# ---------------------------------------------------------------- budgets


def test_out_of_reach_says_what_can_be_had() -> None:
    with pytest.raises(
        compressor.UsageError, match=r"shorten\(macs=0.01\): out of reach, 0.0\d+ is the least"
    ):
        run(captured(Residual(), X), "shorten(macs=0.01)", X)
    graph = captured(Residual(), X)
    (_, row) = run(graph, "shorten(macs=0.01,reach=best,repair=false)", X)
    assert len(gone(row)) == 4 and any("out of reach" in d.reason for d in row.declines)


def test_a_budget_of_decibels() -> None:
    loud, quiet = captured(Residual(), X), captured(Residual(), X)
    (_, many) = run(loud, "shorten(sqnr=10)", X)
    (_, few) = run(quiet, "shorten(sqnr=40)", X)
    assert len(gone(many)) > len(gone(few)) and many.facts["sqnr"]["held_out_db"] >= 10
    assert noise(Residual().eval()(FRESH), quiet.run(FRESH)[0]) > 34


def test_a_budget_of_a_metric() -> None:
    model = Residual().eval()
    graph = captured(model, X)

    def agreement(one: Graph) -> float:
        return -float((one.run(FRESH)[0] - model(FRESH)).detach().abs().mean())

    allowed = -agreement(_without(graph, 1)) * 1.01
    (_, row) = run(graph, f"shorten(max_drop={allowed:.8f},repair=false)", X, evaluate=agreement)
    assert gone(row) == ["blocks.1"]


def _without(graph: Graph, number: int) -> Graph:
    copy = graph.copy()
    bypass(copy, list(branches(copy))[number])
    return copy


def test_a_branch_round_all_of_it_is_no_way_to_save_a_tenth() -> None:
    """Super-resolution: what the body adds to its input is little, and nearly all of the work."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        for block in net.body:
            y = y + block(y)
        return torch.relu(x + 0.01 * net.tail(y))

    torch.manual_seed(0)
    net = Net(forward, stem=conv(3, 8), body=nn.ModuleList(conv(8, 8) for _ in range(8)), tail=conv(8, 3))
    graph = captured(net, X)
    (_, row) = run(graph, "shorten(macs=0.9,repair=false)", X)
    assert len(gone(row)) == 1 and 0.8 < row.facts["macs"] <= 0.9


def test_two_budgets_are_met_together() -> None:
    """Narrow blocks at a large size have the work, wide ones at a small size the weights."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        for block in net.early:
            y = y + 0.3 * block(torch.relu(y))
        y = net.down(y)
        for block in net.late:
            y = y + block(torch.relu(y))
        return net.head(y.mean((2, 3)))

    torch.manual_seed(0)
    parts = {
        "early": nn.ModuleList(conv(4, 4) for _ in range(6)),
        "late": nn.ModuleList(conv(24, 24) for _ in range(6)),
    }
    net = Net(forward, stem=conv(3, 4), down=nn.Conv2d(4, 24, 10, 10), head=nn.Linear(24, 5), **parts)
    shares = {}
    for budget in ("macs=0.6", "params=0.6", "macs=0.6,params=0.6"):
        (_, row) = run(captured(net, X), f"shorten({budget},repair=false)", X)
        shares[budget] = row.facts["macs"], row.facts["params"], len(gone(row))
    assert shares["macs=0.6"][1] > 0.6 and shares["params=0.6"][0] > 0.6
    both = shares["macs=0.6,params=0.6"]
    assert both[0] <= 0.6 and both[1] <= 0.6 and both[2] <= shares["macs=0.6"][2] + shares["params=0.6"][2]


def test_shared_weights_go_with_their_last_call() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        for _ in range(3):
            y = y + net.body(torch.relu(y))
        return net.head(y).mean((2, 3))

    torch.manual_seed(0)
    graph = captured(Net(forward, stem=conv(3, 8), body=conv(8, 8), head=conv(8, 2)), X)
    (_, row) = run(graph, "shorten(params=0.5)", X)
    assert gone(row) == ["body"] * 3 and row.facts["params"] <= 0.5


def test_what_is_ignored_stays() -> None:
    graph = captured(Residual(), X)
    (_, row) = run(graph, "shorten(macs=0.8,ignore=blocks.1,repair=false)", X)
    assert gone(row) == ["blocks.3"]
    assert ("blocks.1", "ignored by 'blocks.1'") in {(d.site, d.reason) for d in row.declines}


def test_it_judges_on_data() -> None:
    graph = captured(Residual(), X)
    held_out = data.open_data([(X,)], graph.inputs)
    with pytest.raises(compressor.UsageError, match="pass --calib"):
        Pipeline(parse("shorten", passes()), passes()).run(graph, Context(CPU, held_out))


def test_a_model_without_branches_stays_as_it_is() -> None:
    graph = captured(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)), X)
    (_, row) = run(graph, "shorten", X)
    assert row.status == "unchanged" and not row.rewrites


# ---------------------------------------------------------------- the whole line


class Encoder(nn.Module):
    """Post-norm layers with attention, as BERT has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.table(ids)).mean(1))


def test_a_transformer_to_onnx(tmp_path: Any) -> None:
    model = Encoder().eval()
    ids = torch.randint(0, 50, (64, 9), generator=torch.Generator().manual_seed(0))
    lengths = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=2, max=64)},)
    program = torch.export.export(model, (ids[:4],), dynamic_shapes=lengths)
    made = compressor.compress(
        program, passes="shorten(macs=0.7),fold", calibration=[(ids,)], output=tmp_path / "out", measure=False
    )
    row = next(row for row in made.report["rows"] if row["pass"] == "shorten")
    assert row["status"] != "unchanged" and row["facts"]["macs"] <= 0.7
    session = onnxruntime.InferenceSession(str(made.onnx))
    for x in (ids[:1, :5], ids[:7]):
        (seen,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(seen, made.graph.run(x)[0].numpy(), rtol=1e-4, atol=1e-5)
    assert math.isfinite(noise(model(ids), made.graph.run(ids)[0]))
