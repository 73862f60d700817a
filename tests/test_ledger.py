"""One row for all channels that stand on the same axes: what it costs, what became of it, and why."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from nets import Net
from torch import nn
from torch.nn import functional as F

from compressor.budgets import costs_of
from compressor.capture import capture
from compressor.channels import Algebra, analyse
from compressor.ir import Graph, Journal
from compressor.ledger import Entry, Ledger
from compressor.surgery import remove
from compressor.widths import families


def net() -> Graph:
    """x [6] -> 16 -> relu -> 12 -> softmax -> 5; only the 16 can go."""
    made = Net(
        lambda net, x: net.out(net.middle(F.relu(net.up(x))).softmax(1)),
        up=nn.Linear(6, 16), middle=nn.Linear(16, 12), out=nn.Linear(12, 5),
    )  # fmt: skip
    return capture(made.eval(), torch.randn(2, 6))


def ledger(graph: Graph, algebra: Algebra, why: dict[int, str] | None = None, multiple: int = 4) -> Ledger:
    costs = costs_of(graph, algebra)
    found = families(algebra, costs, np.zeros(10**4), multiple, 4)
    return Ledger(graph, algebra, costs, found, why)


def test_rows_by_hand():
    graph = net()
    algebra = analyse(graph)
    up, *frozen = ledger(graph, algebra).entries()
    assert up == Entry(
        sites=("up",), groups=16, width=16, left=16, least=4, tensors=("up.weight", "up.bias", "middle.weight"),
        params=16 * 6 + 16 + 12 * 16, macs=16 * 6 + 16 * 12, state="kept", why="",
    )  # fmt: skip
    assert [(e.sites, e.groups, e.params, e.macs, e.state) for e in frozen] == [
        (("middle",), 12, 16 * 12 + 12, 16 * 12, "frozen"),
        (("up",), 6, 6 * 16, 6 * 16, "frozen"),
        (("out",), 5, 12 * 5 + 5, 12 * 5, "frozen"),
        (("out",), 12, 12 * 5, 12 * 5, "frozen"),
    ]
    assert all(e.least == e.left == e.width for e in frozen)
    assert "softmax" in frozen[0].why and "softmax" in frozen[3].why, "before it and behind it"
    assert frozen[1].why.startswith("it is an axis of input")
    assert frozen[2].why.startswith("it reaches output")
    assert sum(e.groups for e in [up, *frozen]) == len(algebra.groups)


def test_what_would_free_a_row_is_said():
    made = Net(
        lambda net, x: net.out(net.norm(net.up(x))),
        up=nn.Linear(6, 16),
        norm=nn.LayerNorm(16),
        out=nn.Linear(16, 3),
    )
    graph = capture(made.eval(), torch.randn(2, 6))
    row = next(e for e in ledger(graph, analyse(graph)).entries() if e.sites == ("up",) and e.width == 16)
    assert (row.state, row.remedy) == ("frozen", "prune(norms=true) includes it")
    assert "layer_norm at norm" in row.why and row.to_dict()["remedy"] == row.remedy
    (row, *_) = ledger(graph, analyse(graph, norms=True)).entries()
    assert (row.state, row.why, row.remedy) == ("kept", "", "")


def test_what_keeps_a_family_is_said():
    graph = net()
    algebra = analyse(graph)
    (first, *_) = algebra.families
    row = ledger(graph, algebra, {first[3].index: "ignored by 'up'"}).entries()[0]
    assert (row.state, row.why) == ("kept", "ignored by 'up'")


def test_what_went_in_several_steps_adds_up():
    """Of 16 channels four go, then two of those that were left: the rows are those of the first graph."""
    graph = net()
    algebra = analyse(graph)
    book = ledger(graph, algebra, multiple=1)
    for picked in (slice(0, 8, 2), slice(3, 5)):
        now = analyse(graph)
        (family,) = now.families
        book.lose(now, family[picked])
        remove(graph, family[picked])
        graph.journal = Journal()
    row, *others = book.entries()
    assert (row.state, row.width, row.left) == ("pruned", 16, 10) and graph.tensors["up.weight"].shape[
        0
    ] == 10
    assert {e.state for e in others} == {"frozen"}


def test_groups_of_several_slices_count_their_width():
    """A head of a shuffle: pairs of channels live and die as one."""
    made = Net(
        lambda net, x: net.out(F.relu(net.up(x)).reshape(-1, 2, 8).sum(1)),
        up=nn.Linear(6, 16),
        out=nn.Linear(8, 3),
    )
    graph = capture(made.eval(), torch.randn(2, 6))
    algebra = analyse(graph)
    (row,) = [e for e in ledger(graph, algebra, multiple=1).entries() if e.state == "kept"]
    assert (row.groups, row.width) == (8, 8), "the narrowest axis is the reader's"
    book = ledger(graph, algebra, multiple=1)
    book.lose(algebra, algebra.families[0][:3])
    assert book.entries()[0].left == 5


def test_the_same_axes_are_one_row_and_others_are_not():
    """Two branches of one width that are concatenated are two rows; a residual stream is one."""
    made = Net(
        lambda net, x: net.out(torch.cat((F.relu(net.a(x)), F.relu(net.b(x))), 1)),
        a=nn.Linear(6, 8), b=nn.Linear(6, 8), out=nn.Linear(16, 3),
    )  # fmt: skip
    graph = capture(made.eval(), torch.randn(2, 6))
    rows = [e for e in ledger(graph, analyse(graph)).entries() if e.state == "kept"]
    assert [(e.sites, e.width) for e in rows] == [(("a",), 8), (("b",), 8)]


def test_plain_data_has_the_names_or_their_number():
    entry = Entry(("a", "b", "c"), 8, 16, 8, 8, ("a.weight", "b.weight"), 10, 20, "pruned", "")
    assert entry.to_dict() == {
        **{"where": "a and 2 more", "groups": 8, "width": 16, "left": 8, "least": 8, "tensors": 2},
        **{"params": 10, "macs": 20, "state": "pruned", "why": "", "remedy": ""},
    }
    assert entry.to_dict(names=True)["tensors"] == ["a.weight", "b.weight"]
    assert replace(entry, sites=()).to_dict()["where"] == ""


def test_forty_thousand_channels_take_a_moment():
    width, layers = 2000, 20
    made = nn.Sequential(nn.Linear(4, width), *(Wide(width) for _ in range(layers)), nn.Linear(width, 4))
    graph = capture(made.eval(), torch.randn(2, 4))
    algebra = analyse(graph)
    assert len(algebra.groups) > 40_000
    costs = costs_of(graph, algebra)
    found = families(algebra, costs, np.zeros(10**5), 8, 4)
    start = time.process_time()
    rows = Ledger(graph, algebra, costs, found).entries()
    assert time.process_time() - start < 2
    assert len([e for e in rows if e.state == "kept"]) == 2 * layers + 1


class Wide(nn.Module):
    """A layer whose weight costs no memory to speak of: a column times a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.down, self.up = (
            nn.Parameter(torch.ones(width)),
            nn.Linear(width, 4),
            nn.Linear(4, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.up(self.down(x * self.scale)))
