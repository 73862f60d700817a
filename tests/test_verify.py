"""Contracts: what must pass passes, what must fail fails, and a check without power says so."""

import math

import pytest
import torch
from torch import nn

from compressor.capture import capture
from compressor.data import Batch
from compressor.errors import ContractError
from compressor.verify import (
    BOUNDED,
    EXACT,
    Comparison,
    Observer,
    compare,
    judge,
    look_inside,
    observe,
    regions,
)

aten = torch.ops.aten


def checks_of(reference, seen, boxes=()):
    comparison = Comparison(["out"], [list(boxes)])
    comparison.update((reference,), (seen,))
    return comparison.checks()


def test_error_is_relative_to_the_largest_reference():
    a = torch.tensor([[100.0, 1.0], [50.0, 2.0]])
    (check,) = checks_of(a, a + torch.tensor([[0.01, 0.0], [0.0, 0.0]]))
    assert check.error == pytest.approx(1e-4, rel=1e-3)
    with pytest.raises(ContractError, match="differs by 1.00e-04"):
        judge(EXACT, [check], "pass x")


def test_equal_outputs_prove_and_constant_outputs_do_not():
    a = torch.randn(4, 3)
    assert judge(EXACT, checks_of(a, a), "pass x") == "proved"
    flat = torch.ones(4, 3)
    assert judge(EXACT, checks_of(flat, flat), "pass x") == "not proved"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_on_one_side_fails(value):
    a = torch.randn(4, 3)
    b = a.clone()
    b[0, 0] = value
    with pytest.raises(ContractError, match="NaN or inf"):
        judge(EXACT, checks_of(a, b), "pass x")
    assert judge(EXACT, checks_of(b, b), "pass x") == "proved"


def test_a_dead_slice_fails_although_the_whole_tensor_looks_well():
    """4 boxes in pixels beside 80 scores under one scale: 54 dB, and no object is detected."""
    torch.manual_seed(0)
    boxes, scores = torch.rand(2, 4, 100) * 640, torch.rand(2, 80, 100)
    step = 640 / 255
    reference = torch.cat([boxes, scores], 1)
    quantised = (reference / step).round() * step
    slices = [{1: (0, 4)}, {1: (4, 84)}]
    whole = checks_of(reference, quantised)
    assert whole[0].sqnr_db > 40 and whole[0].cosine > 0.9999
    assert judge(BOUNDED, whole, "pass int8") == "proved"
    with pytest.raises(ContractError, match=r"\[:, 4:84\] is at"):
        judge(BOUNDED, checks_of(reference, quantised, slices), "pass int8")


def test_bounded_warns_between_the_floor_and_twenty_decibels():
    a = torch.randn(100, 10)
    noisy = a + 0.2 * torch.randn(100, 10)
    assert judge(BOUNDED, checks_of(a, noisy), "pass x") == "warned"
    with pytest.raises(ContractError, match="under the floor"):
        judge(BOUNDED, checks_of(a, torch.randn(100, 10)), "pass x")


class Head(nn.Module):
    def forward(self, x):
        boxes, scores = x[:, :4] * 600, x[:, 4:].sigmoid()
        return torch.cat([boxes, scores], 1).permute(0, 2, 1), x.argmax(1)


def test_slices_follow_a_concat_through_permutes():
    graph = capture(Head(), (torch.randn(2, 9, 5),))
    assert regions(graph.results[0]) == [{2: (0, 4)}, {2: (4, 9)}]


def test_integer_outputs_are_judged_on_the_floats_that_feed_them():
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(x).argmax(-1)

    graph = capture(Classes(), (torch.randn(2, 6),))
    observer = Observer(graph)
    assert observer.names == ["output", "output (from head)"]


def damaged(graph):
    twin = graph.copy()
    bias = next(n for n in twin.nodes if n.target == "1.bias")
    twin.set_tensor(bias, twin.tensor(bias) + 1e-3)
    return twin


def test_look_inside_names_the_operator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = capture(model, (torch.randn(2, 6),))
    x = torch.randn(4, 6)
    assert look_inside(graph, graph.copy(), (x,), 1e-9).wrong is None
    found = look_inside(graph, damaged(graph), (x,), 1e-5).wrong
    assert found is not None
    assert (found.site, found.operator) == ("1", "aten.linear.default")
    assert found.error > 1e-4


def test_compare_over_batches_sees_the_worst():
    graph = capture(nn.Linear(6, 3), (torch.randn(2, 6),))
    batches = [Batch((torch.randn(4, 6),)) for _ in range(3)]
    reference = observe(graph, batches)
    seen = [tuple(t.clone() for t in batch) for batch in reference]
    seen[2][0][1, 1] += 1.0
    assert compare(graph, reference, reference)[0].error == 0
    assert compare(graph, reference, seen)[0].error > 0.1
    wrong_shape = [(b[0][:, :2],) for b in reference]
    with pytest.raises(ContractError, match="shape"):
        compare(graph, reference, wrong_shape)
