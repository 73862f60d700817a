"""Low-rank rewrites: the numbers they keep, the ranks they choose, and the layers they leave alone."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compressor.splits
from compressor.capture import capture
from compressor.data import Data, open_data
from compressor.errors import ContractError, UsageError
from compressor.ir import Graph
from compressor.ops import macs
from compressor.pipeline import Context, Outcome, Pipeline, parse
from compressor.reconstruct import LowRank, Moments, allocate, low_rank, numerical_rank
from compressor.statistics import Covariance
from compressor.target import Target
from passes.squeeze import Squeeze


def context(
    graph: Graph, calibration: Sequence[Tensor] | None = None, multiple: int = 1, **options
) -> Context:
    target = Target("test", "", ("CPUExecutionProvider",), channel_multiple=multiple)
    held_out = data([graph.example[0]], graph)
    return Context(target, held_out, None if calibration is None else data(calibration, graph), **options)


def data(batches: Sequence[Tensor], graph: Graph) -> Data:
    return open_data([(batch,) for batch in batches], graph.inputs)


def squeezed(graph: Graph, config: Squeeze, ctx: Context) -> tuple[Graph, Outcome]:
    after = graph.copy()
    outcome = config.run(after, ctx)
    after.check()
    return after, outcome


def error(expected: Tensor, seen: Tensor) -> float:
    """Relative to the scale of what was expected."""
    return float((expected - seen).abs().max() / expected.abs().max())


def noise(expected: Tensor, seen: Tensor) -> float:
    """Share of the signal's energy."""
    return float((expected - seen).square().sum() / expected.square().sum())


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def of_rank(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (normal(rows, rank, seed=1).double() @ normal(rank, columns, seed=2).double() / rank).to(dtype)


def set_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.weight.data = weight.reshape(layer.weight.shape).contiguous()
    return layer.eval()


def reasons(outcome: Outcome) -> str:
    return "; ".join(f"{d.site}: {d.reason}" for d in outcome.declines)


# ---------------------------------------------------------------- the numbers


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def test_a_linear_of_low_rank_becomes_two_without_loss():
    graph = capture(One(set_weight(nn.Linear(32, 24), of_rank(24, 32, 4))), normal(2, 5, 32))
    assert graph.text() == (
        "%layer_weight: f32[24, 32] = layer.weight\n"
        "%layer_bias: f32[24] = layer.bias\n"
        "%x: f32[batch, 5, 32] = input\n"
        "%linear: f32[batch, 5, 24] = aten.linear.default(%x, %layer_weight, %layer_bias)\n"
        "%relu: f32[batch, 5, 24] = aten.relu.default(%linear)\n"
        "return %relu"
    )
    after, outcome = squeezed(graph, Squeeze(energy=1.0), context(graph))
    assert after.text() == (
        "%layer_expand_weight: f32[24, 4] = layer.expand.weight\n"
        "%layer_squeeze_weight: f32[4, 32] = layer.squeeze.weight\n"
        "%layer_bias: f32[24] = layer.bias\n"
        "%x: f32[batch, 5, 32] = input\n"
        "%linear_default: f32[batch, 5, 4] = aten.linear.default(%x, %layer_squeeze_weight, None)\n"
        "%linear_default_1: f32[batch, 5, 24] = "
        "aten.linear.default(%linear_default, %layer_expand_weight, %layer_bias)\n"
        "%relu: f32[batch, 5, 24] = aten.relu.default(%linear_default_1)\n"
        "return %relu"
    )
    x = normal(7, 5, 32, seed=3)
    expected = graph.run(x)[0]
    assert error(expected, after.run(x)[0]) < 1e-5
    assert [str(r.what) for r in outcome.rewrites] == ["linear 32 to 24: to 4, to 24"]
    assert outcome.facts["layers"] == [
        {
            "site": "layer",
            "form": "outputs",
            "rank": 4,
            "full": 24,
            "energy": 1.0,
            "error": 0.0,
            "macs": 0.2917,
        }
    ]
    for name in ("layer_squeeze_weight", "layer_expand_weight"):
        wrong = after.copy()
        factor = wrong.node(name)
        wrong.set_tensor(factor, wrong.tensor(factor).roll(1, 0))
        assert error(expected, wrong.run(x)[0]) > 1e-2


CONVOLUTIONS = [
    (nn.Conv2d(16, 24, 3, padding=1, stride=2), (16, 9, 11)),
    (nn.Conv2d(24, 16, (3, 5), padding="same", dilation=2, bias=False), (24, 9, 11)),
    (nn.Conv2d(24, 16, 3, padding=1, padding_mode="circular"), (24, 9, 11)),
    (nn.Conv2d(24, 32, 1, stride=2, padding=1), (24, 9, 11)),
    (nn.Conv1d(16, 24, 5, padding=2, dilation=2), (16, 17)),
    (nn.Conv3d(16, 24, 3, padding=(0, 1, 1)), (16, 5, 6, 7)),
]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("form", ["outputs", "inputs"])
@pytest.mark.parametrize("layer, size", CONVOLUTIONS, ids=lambda v: str(v)[:24])
def test_convolutions_of_low_rank_become_two_without_loss(layer, size, form, calibrated):
    outs, ins, *kernel = layer.weight.shape
    area = layer.weight[0, 0].numel()
    if form == "inputs":
        taps = of_rank(outs * area, ins, 3).reshape(outs, *kernel, ins)
        set_weight(layer, taps.movedim(-1, 1))
    else:
        set_weight(layer, of_rank(outs, ins * area, 3))
    graph = capture(layer, normal(2, *size))
    ctx = context(graph, [normal(8, *size, seed=4)] if calibrated else None, multiple=4)
    after, outcome = squeezed(graph, Squeeze(), ctx)
    [facts] = outcome.facts["layers"]
    assert facts["rank"] == 3 and facts["form"] == (form if area > 1 else "outputs")
    x = normal(3, *size, seed=5)
    assert error(graph.run(x)[0], after.run(x)[0]) < 1e-5
    assert error(graph.run(x)[0], after.run(x.flip(1))[0]) > 1e-2
    assert macs(after) == round(outcome.facts["macs"] * macs(graph), -1) or outcome.facts["macs"] < 0.9


@pytest.mark.parametrize(
    "ins, outs, stride, form", [(32, 24, 1, "inputs"), (16, 32, 1, "outputs"), (32, 24, 2, "outputs")]
)
def test_of_two_splits_that_lose_the_same_the_cheaper_is_taken(ins, outs, stride, form):
    core = torch.einsum(
        "or,rshw,si->oihw", normal(outs, 4), normal(4, 4, 3, 3, seed=1), normal(4, ins, seed=2)
    )
    graph = capture(set_weight(nn.Conv2d(ins, outs, 3, stride, 1), core), normal(2, ins, 8, 8))
    after, outcome = squeezed(graph, Squeeze(), context(graph))
    assert [(f["form"], f["rank"]) for f in outcome.facts["layers"]] == [(form, 4)]
    read, write = 64, (8 // stride) ** 2
    costs = {"inputs": 4 * (ins * read + outs * 9 * write), "outputs": 4 * (ins * 9 + outs) * write}
    assert macs(after) == costs[form] == min(costs.values())


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
def test_other_float_types_keep_their_type(dtype, tolerance):
    layer = set_weight(nn.Linear(64, 48, dtype=dtype), of_rank(48, 64, 4, dtype))
    graph = capture(layer, normal(4, 64).to(dtype))
    after, outcome = squeezed(graph, Squeeze(energy=1.0), context(graph, [normal(64, 64).to(dtype)]))
    assert [f["rank"] for f in outcome.facts["layers"]] == [4]
    assert {t.dtype for t in after.tensors.values()} == {dtype}
    x = normal(9, 64, seed=3).to(dtype)
    expected = graph.run(x)[0].double()
    assert error(expected, after.run(x)[0].double()) < tolerance < error(expected, after.run(-x)[0].double())


def test_weights_are_borrowed_and_results_repeat():
    model = One(set_weight(nn.Linear(32, 24), of_rank(24, 32, 4)))
    graph = capture(model, normal(2, 32))
    kept, before = model.layer.weight.clone(), graph.fingerprint()
    once, _ = squeezed(graph, Squeeze(energy=0.9), context(graph, [normal(64, 32)]))
    again, _ = squeezed(graph, Squeeze(energy=0.9), context(graph, [normal(64, 32)]))
    assert once.fingerprint() == again.fingerprint() != before
    assert graph.fingerprint() == before and torch.equal(model.layer.weight, kept)
    assert {"layer.squeeze.weight", "layer.expand.weight"} <= once.parameters


# ---------------------------------------------------------------- data


def correlated(features: int, seed: int = 7) -> Tensor:
    """A square root of a covariance whose axes are not the weights' and whose spread falls by 1.3 a step."""
    axes, _ = torch.linalg.qr(normal(features, features, seed=seed))
    return axes * 1.3 ** -torch.arange(features)


@pytest.mark.parametrize("ins, outs", [(32, 48), (48, 32)])
def test_data_chooses_better_directions_of_a_linear(ins, outs):
    root = correlated(ins)
    x = normal(512, ins, seed=1) @ root.T + 3
    graph = capture(nn.Linear(ins, outs).eval(), x[:2])
    fresh = normal(512, ins, seed=2) @ root.T + 3
    expected = graph.run(fresh)[0]
    centred = expected - expected.mean(0)
    losses = []
    for calibration in (None, x.split(64)):
        after, outcome = squeezed(graph, Squeeze(macs=0.5), context(graph, calibration))
        assert outcome.facts["macs"] <= 0.5 and outcome.facts["weighted"] == (calibration is not None)
        losses.append(float((after.run(fresh)[0] - expected).square().sum() / centred.square().sum()))
    plain, weighted = losses
    assert weighted < 0.02 < 10 * weighted < plain
    [facts] = outcome.facts["layers"]
    assert 0.3 * facts["error"] ** 2 < weighted < 3 * facts["error"] ** 2  # the report says what is lost


@pytest.mark.parametrize("ins, outs, kernel", [(32, 16, 3), (16, 32, 3), (32, 32, 1)])
def test_data_chooses_better_directions_of_a_convolution(ins, outs, kernel):
    root = correlated(ins)

    def images(count: int, seed: int) -> Tensor:
        return (normal(count, 8, 8, ins, seed=seed) @ root.T).movedim(-1, 1) + 1

    graph = capture(nn.Conv2d(ins, outs, kernel, padding=kernel // 2).eval(), images(2, 1))
    fresh = images(16, 2)
    expected = graph.run(fresh)[0]
    losses = []
    for calibration in (None, [images(16, 3), images(16, 4)]):
        after, outcome = squeezed(graph, Squeeze(macs=0.5), context(graph, calibration))
        assert len(outcome.rewrites) == 1
        losses.append(noise(expected, after.run(fresh)[0]))
    plain, weighted = losses
    assert 2 * weighted < plain


def test_the_mean_that_a_split_cuts_off_goes_to_the_bias():
    x = normal(256, 24) + 10 * normal(24, seed=5)
    graph = capture(nn.Linear(24, 24, bias=False).eval(), x[:2])
    after, _ = squeezed(graph, Squeeze(macs=0.5), context(graph, [x]))
    expected, seen = graph.run(x)[0].mean(0), after.run(x)[0].mean(0)
    assert error(expected, seen) < 1e-5
    bias = after.node("expand_bias")
    after.set_tensor(bias, torch.zeros(24))
    assert error(expected, after.run(x)[0].mean(0)) > 1e-2


def test_a_batch_norm_says_which_outputs_matter():
    conv, norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    norm.weight.data = torch.where(torch.arange(16) < 6, 1.0, 0.0)
    norm.running_var.fill_(0.3)
    graph = capture(nn.Sequential(conv, norm).eval(), normal(2, 16, 6, 6))
    x = normal(32, 16, 6, 6, seed=1)
    after, outcome = squeezed(graph, Squeeze(energy=0.999), context(graph, [x]))
    assert [(f["form"], f["rank"]) for f in outcome.facts["layers"]] == [("outputs", 6)]
    assert noise(graph.run(x)[0], after.run(x)[0]) < 1e-3
    norm.weight.data = torch.ones(16)  # all matter: nothing is cheap any more
    graph = capture(nn.Sequential(conv, norm).eval(), normal(2, 16, 6, 6))
    assert not squeezed(graph, Squeeze(energy=0.999), context(graph, [x]))[1].rewrites


def test_few_rows_do_not_pass_for_all_that_can_come():
    graph = capture(nn.Linear(64, 64).eval(), normal(2, 64))
    few, fresh = normal(4, 64, seed=1), normal(256, 64, seed=2)
    _, outcome = squeezed(graph, Squeeze(energy=0.99), context(graph, [few]))
    assert not outcome.rewrites  # the four rows alone span four directions, and rank 4 would keep all of them
    after, _ = squeezed(graph, Squeeze(macs=0.8), context(graph, [few]))
    plain, _ = squeezed(graph, Squeeze(macs=0.8), context(graph))
    expected = graph.run(fresh)[0]
    assert noise(expected, after.run(fresh)[0]) < 1.5 * noise(expected, plain.run(fresh)[0])


def test_more_passes_over_the_data_give_the_same(monkeypatch):
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 16)).eval()
    graph = capture(model, normal(2, 24))
    ctx = context(graph, [normal(64, 24), normal(64, 24, seed=1)])
    once, _ = squeezed(graph, Squeeze(macs=0.6), ctx)
    monkeypatch.setattr(compressor.splits, "STATISTICS", 1)
    twice, outcome = squeezed(graph, Squeeze(macs=0.6), ctx)
    assert once.fingerprint() == twice.fingerprint() and outcome.rewrites


# ---------------------------------------------------------------- budgets


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.deep = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.wide = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.deep(self.stem(x).relu())).relu()
        return self.head(self.wide(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Graph:
    torch.manual_seed(0)
    return capture(Net().eval(), normal(2, 3, 16, 16))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    "budget", [{"macs": 0.8}, {"macs": 0.5}, {"params": 0.6}, {"macs": 0.7, "params": 0.4}]
)
def test_a_budget_is_reached_and_not_by_far(net, budget, calibrated):
    ctx = context(net, [normal(16, 3, 16, 16, seed=1)] if calibrated else None)
    after, outcome = squeezed(net, Squeeze(**budget), ctx)
    facts = outcome.facts
    assert facts["budget"] == "reached" and all(facts[name] <= share for name, share in budget.items())
    assert min(share - facts[name] for name, share in budget.items()) < 0.02
    assert facts["macs"] == pytest.approx(macs(after) / macs(net), abs=1e-4)
    assert 0 < noise(net.run(*net.example)[0], after.run(*net.example)[0]) < 0.5


def test_ranks_are_multiples_of_the_target_s(net):
    _, outcome = squeezed(net, Squeeze(macs=0.6), context(net, multiple=8))
    ranks = [f["rank"] for f in outcome.facts["layers"]]
    assert ranks and all(rank % 8 == 0 for rank in ranks)


def test_a_budget_out_of_reach_is_an_error_or_the_best_there_is(net):
    with pytest.raises(UsageError, match=r"squeeze\(macs=0.01\): out of reach, 0\.\d+ is the least"):
        Squeeze(macs=0.01).run(net.copy(), context(net, multiple=8))
    _, outcome = squeezed(net, Squeeze(macs=0.01, reach="best"), context(net, multiple=8))
    assert (
        outcome.facts["budget"].startswith("not reached: 0.") and "asked for 0.01" in outcome.facts["budget"]
    )
    assert outcome.facts["macs"] > 0.01


def test_energy_bounds_what_a_budget_may_take(net):
    _, outcome = squeezed(net, Squeeze(macs=0.05, energy=0.6, reach="best"), context(net))
    assert outcome.rewrites and all(f["energy"] >= 0.6 for f in outcome.facts["layers"])
    _, freely = squeezed(net, Squeeze(macs=0.05, reach="best"), context(net))
    assert any(f["energy"] < 0.6 for f in freely.facts["layers"])


def test_noise_is_a_budget(net):
    ctx = context(net, [normal(16, 3, 16, 16, seed=1)])
    after, outcome = squeezed(net, Squeeze(sqnr=20), ctx)
    (x,) = net.example  # held out; what is calibrated on would be too kind
    heard = -10 * math.log10(noise(net.run(x)[0], after.run(x)[0]))
    assert 20 <= heard < 30 and outcome.facts["macs"] < 1
    assert outcome.facts["sqnr"]["held_out_db"] == pytest.approx(heard, abs=1)


@pytest.mark.parametrize("config", ["energy=0", "energy=1.5", "macs=0", "macs=1.5", "macs=-0.5", "params=2"])
def test_impossible_budgets_are_refused(config):
    with pytest.raises(UsageError, match=r"squeeze\(" + config.split("=")[0]):
        parse(f"squeeze({config})", {"squeeze": Squeeze})
    assert parse("squeeze(energy=1,macs=0.5)", {"squeeze": Squeeze}) == [Squeeze(energy=1.0, macs=0.5)]


def test_allocation_is_the_best_there_is():
    generator = torch.Generator().manual_seed(3)
    exact = uneven = 0
    for need in (0.2, 0.35, 0.5, 0.65, 0.8):
        shelves = []
        for _ in range(4):
            saved = torch.rand(4, generator=generator).sort().values / 4
            loss = (torch.rand(4, generator=generator) * saved).cumsum(0)
            shelves.append([((float(s),), float(v)) for s, v in zip(saved, loss, strict=True)])
        chosen = allocate(shelves, [need])

        def total(choice, shelves=shelves):
            points = [shelf[k] for shelf, k in zip(shelves, choice, strict=True) if k is not None]
            return sum(s[0] for s, _ in points), sum(v for _, v in points)

        choices = [c for c in itertools.product((None, 0, 1, 2, 3), repeat=4) if total(c)[0] >= need]
        if not choices:
            assert chosen == [3] * 4  # everything, when even that is too little
            continue
        best = min(total(c)[1] for c in choices)
        assert total(chosen)[0] >= need and best <= total(chosen)[1] <= 1.3 * best
        exact += total(chosen)[1] == pytest.approx(best)
        uneven += max(total(c)[1] for c in choices) > 1.3 * best
    assert exact >= 2 and uneven >= 3  # a poor choice would have been seen


def test_allocation_takes_what_costs_nothing():
    free = [((0.1,), 0.0), ((0.2,), 0.0), ((0.3,), 0.5)]
    assert allocate([free, [((0.5,), 0.1)]], [0.1]) == [1, None]
    assert allocate([free, [((0.5,), 0.1)]], [0.6]) == [1, 0]
    assert allocate([free, [((0.5,), 0.1)]], [0.8]) == [2, 0]
    assert allocate([], [0.5]) == []


MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"


@pytest.mark.shared
@pytest.mark.skipif(not MODELS.is_dir(), reason="the trained models are not beside the checkout")
def test_a_trained_network_keeps_its_accuracy_with_data_and_not_without(monkeypatch):
    monkeypatch.syspath_prepend(str(MODELS))
    cifar = pytest.importorskip("cifar_resnet")
    monkeypatch.delitem(sys.modules, "cifar_resnet")
    model, images, labels = cifar.load("resnet20")
    graph = capture(model, images[:2])

    def top1(graph: Graph) -> float:
        return 100 * float((graph.run(images)[0].argmax(1) == labels).float().mean())

    plain, _ = squeezed(graph, Squeeze(macs=0.65), context(graph, multiple=4))
    weighted, outcome = squeezed(
        graph, Squeeze(macs=0.65), context(graph, cifar.calibration(256)[0].split(64), multiple=4)
    )
    assert outcome.facts["macs"] <= 0.65
    assert top1(weighted) >= top1(graph) - 1 > top1(plain) + 5


# ---------------------------------------------------------------- near misses


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(of_rank(32, 32, 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.weight).relu(), self.weight)


class Returned(Shared):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return nn.functional.linear(x, self.weight), self.weight


class Computed(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * x.mean())


class First(nn.Module):
    """A layer of the first sample alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[0])


NEAR_MISSES = [
    (Shared(), (32,), "its weight is shared by 2 readers"),
    (Returned(), (32,), "its weight is shared by 2 readers"),
    (Computed(), (32,), "its weight or bias is computed while the model runs"),
    (set_weight(nn.Conv2d(32, 32, 3, groups=2), of_rank(32, 144, 2)), (32, 8, 8), "of 2 groups is not split"),
    (set_weight(nn.Conv2d(32, 32, 3, groups=32), of_rank(32, 9, 2)), (32, 8, 8), "of 32 groups is not split"),
    (set_weight(nn.ConvTranspose2d(32, 32, 3), of_rank(32, 288, 2)), (32, 8, 8), "transposed convolutions"),
    (First(nn.Conv1d(32, 32, 3)), (32, 8), "what it reads has no batch axis"),
    (nn.Linear(32, 32), (32,), "keeping 0.99 of the energy takes rank"),
    (
        set_weight(nn.Linear(32, 8), of_rank(8, 32, 7)),
        (32,),
        "takes rank 6 of 8, which costs 0.94 of its MACs",
    ),
    (set_weight(nn.Linear(32, 32), torch.zeros(32, 32)), (32,), "its weight is zero, or not finite"),
    (
        set_weight(nn.Linear(32, 32), torch.full((32, 32), torch.nan)),
        (32,),
        "its weight is zero, or not finite",
    ),
]


@pytest.mark.parametrize("model, size, reason", NEAR_MISSES, ids=[m[2] for m in NEAR_MISSES])
def test_what_is_left_alone_and_why(model, size, reason):
    example = normal(2, *size)
    if "finite" in reason:  # capturing proves the numbers, which NaN weights have not
        graph = capture(nn.Linear(32, 32).eval(), example)
        graph.set_tensor(graph.node("weight"), model.weight)
    else:
        graph = capture(model.eval(), example)
    before = graph.fingerprint()
    outcome = Squeeze().run(graph, context(graph))
    assert not outcome.rewrites and graph.fingerprint() == before
    assert reason in reasons(outcome)


def test_values_that_overflow_in_the_data_decline():
    model = nn.Sequential(nn.Linear(32, 32), set_weight(nn.Linear(32, 24), of_rank(24, 32, 4))).eval()
    graph = capture(model, normal(2, 32))
    weight = graph.node("_0_weight")
    graph.set_tensor(weight, graph.tensor(weight) * 1e38)
    _, outcome = squeezed(graph, Squeeze(), context(graph, [normal(64, 32) * 100]))
    assert not outcome.rewrites and reasons(outcome).count("values here that are not finite") == 2
    graph.set_tensor(weight, graph.tensor(weight) * 1e-38)
    assert squeezed(graph, Squeeze(), context(graph, [normal(64, 32)]))[1].rewrites


# ---------------------------------------------------------------- limits and the stopwatch


def test_limit_applies_the_first_rewrites_only(net):
    _, every = squeezed(net, Squeeze(macs=0.5), context(net))
    for limit in range(len(every.rewrites) + 1):
        _, outcome = squeezed(net, Squeeze(macs=0.5), context(net, limit=limit))
        assert outcome.rewrites == every.rewrites[:limit]
    assert len(every.rewrites) > 1


def operators(graph: Graph) -> int:
    return sum(n.op == "call_function" for n in graph.nodes)


def test_the_stopwatch_has_the_last_word(net):
    before = net.fingerprint()
    slow = context(net, measure=lambda *graphs: [float(operators(g)) for g in graphs])
    after, outcome = squeezed(net, Squeeze(macs=0.5), slow)
    assert not outcome.rewrites and after.fingerprint() == before
    assert all(pair["parts_ms"] > pair["whole_ms"] for pair in outcome.facts["timed"])
    assert "runs it no faster in parts" in reasons(outcome) and "not reached" in outcome.facts["budget"]

    fast = context(net, measure=lambda *graphs: [float(macs(g)) for g in graphs])
    _, every = squeezed(net, Squeeze(macs=0.5), context(net))
    assert squeezed(net, Squeeze(macs=0.5), fast)[1].rewrites == every.rewrites
    assert squeezed(net, Squeeze(macs=0.5, measure=False), slow)[1].rewrites == every.rewrites


def test_what_is_slow_alone_is_not_taken_and_others_make_up_for_it(net):
    def measure(*graphs: Graph) -> list[float]:
        strided = any(2 in n.args[3] for n in graphs[0].nodes if len(n.args) > 3 and n.op == "call_function")
        alone = operators(graphs[0]) == 1
        return [float(operators(g)) if strided and alone else float(macs(g)) for g in graphs]

    _, every = squeezed(net, Squeeze(macs=0.5), context(net))
    _, outcome = squeezed(net, Squeeze(macs=0.5), context(net, measure=measure))
    assert {"deep", "wide"} <= {r.site for r in every.rewrites}
    assert "deep" not in {r.site for r in outcome.rewrites} and outcome.facts["macs"] <= 0.5
    assert "deep (aten.conv2d.default): the target runs it no faster in parts" in reasons(outcome)


def test_half_of_a_plan_is_kept_where_that_is_faster(net):
    _, every = squeezed(net, Squeeze(macs=0.5), context(net))
    size = operators(net)

    def measure(*graphs: Graph) -> list[float]:
        if operators(graphs[0]) == 1:
            return [float(macs(g)) for g in graphs]
        return [1.0 if operators(g) == size + 1 else float(operators(g)) for g in graphs]

    _, outcome = squeezed(net, Squeeze(macs=0.5), context(net, measure=measure))
    assert len(outcome.rewrites) == 1 < len(every.rewrites)
    greatest = min(every.facts["layers"], key=lambda f: f["macs"])
    assert outcome.facts["layers"] == [greatest] and outcome.facts["ms"]["after"] == 1.0


def test_progress_counts_layers_and_samples(net):
    seen: dict[str, list[int | None]] = {}

    class Bar:
        def __init__(self, title: str, total: int | None) -> None:
            self.counts = seen.setdefault(title, [total, 0])

        def __enter__(self):
            return self.add

        def __exit__(self, *_):
            return None

        def add(self, n: int) -> None:
            self.counts[1] += n

    squeezed(net, Squeeze(), context(net, [normal(5, 3, 16, 16)], progress=Bar))
    assert seen == {"squeeze: reading calibration data": [5, 5], "squeeze: factorising": [4, 4]}


def test_three_parts_where_both_sides_are_narrow():
    inner = normal(3, 4, 3, 3, seed=7)
    weight = torch.einsum("oa,abhw,bi->oihw", normal(32, 3, seed=8), inner, normal(4, 32, seed=9))
    graph = capture(
        One(set_weight(nn.Conv2d(32, 32, 3, padding=1, stride=2), weight)).eval(), normal(2, 32, 9, 9)
    )
    x = normal(32, 32, 9, 9, seed=3)
    after, outcome = squeezed(graph, Squeeze(macs=0.07), context(graph, [x]))
    (found,) = outcome.facts["layers"]
    assert found["form"] == "tucker" and found["rank"] == [4, 3]
    assert [r.what for r in outcome.rewrites] == ["conv2d 32 to 32: 1x1 to 4, 3x3 to 3, 1x1 to 32"]
    y = normal(4, 32, 9, 9, seed=4)
    assert error(graph.run(y)[0], after.run(y)[0]) < 1e-3


def test_weights_are_solved_anew_for_what_the_squeezed_model_gives(net):
    x = normal(64, 3, 16, 16, seed=1)
    fresh = normal(64, 3, 16, 16, seed=2)
    losses = []
    for repair in (False, True):
        after, outcome = squeezed(net, Squeeze(macs=0.5, repair=repair), context(net, [x]))
        losses.append(noise(net.run(fresh)[0], after.run(fresh)[0]))
        assert bool(outcome.facts["repaired"]) == repair
    assert losses[1] < 0.8 * losses[0]


def test_a_wrong_factor_fails_the_contract():
    class Broken(Squeeze):
        def run(self, graph, ctx):
            outcome = super().run(graph, ctx)
            factor = graph.node("squeeze_weight")
            graph.set_tensor(factor, graph.tensor(factor).roll(1, 0))
            return outcome

    graph = capture(set_weight(nn.Linear(32, 24), of_rank(24, 32, 4)), normal(16, 32))
    ctx = context(graph, [normal(64, 32, seed=1)])
    row = Pipeline([Squeeze()], {"squeeze": Squeeze}).run(graph.copy(), ctx)[-1]
    assert row.status == "proved" and row.rewrites
    with pytest.raises(ContractError, match="squeeze"):
        Pipeline([Broken()], {"squeeze": Broken}).run(graph.copy(), ctx)


# ---------------------------------------------------------------- the factorisation


def seen_by(x: Tensor, outputs: bool = False) -> Moments:
    statistic = Covariance(x.shape[1])
    statistic.update(x)
    return Moments(statistic.mean, statistic.covariance, statistic.count, outputs)


def test_low_rank_is_the_optimum_for_the_data():
    weight, x = normal(12, 20).double(), (normal(4000, 20, seed=1) @ correlated(20).T).double()
    scale = torch.rand(12, generator=torch.Generator().manual_seed(2)).double() + 0.1
    outputs = (x - x.mean(0)) @ (weight * scale[:, None]).T
    _, singular, _ = torch.linalg.svd(outputs, full_matrices=False)
    for moments in (seen_by(x), seen_by(x @ weight.T, outputs=True)):
        found = low_rank(weight, moments, scale)
        for rank in (1, 4, 11):
            left, right = found.factors(weight, rank)
            lost = (outputs - (x - x.mean(0)) @ (left @ right * scale[:, None]).T).square().sum()
            assert lost == pytest.approx(float(singular[rank:].square().sum()), rel=2e-2)  # Eckart and Young
            assert lost / outputs.square().sum() == pytest.approx(found.error(rank), rel=0.1, abs=1e-3)
            left[:, 0] = 0
            assert (outputs - (x - x.mean(0)) @ (left @ right * scale[:, None]).T).square().sum() > 1.1 * lost


def test_low_rank_without_data_is_the_svd_with_signs():
    weight = normal(12, 20)
    left, right = low_rank(weight).factors(weight, 5)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(left @ right, u[:, :5] * s[:5] @ v[:5])
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all()) and low_rank(weight).shift(5) is None
    negated = LowRank(-low_rank(weight).left, s.square(), torch.ones(12))
    assert not torch.allclose(negated.factors(weight, 5)[0], left)


def test_numerical_rank_forgives_rounding_only():
    for dtype, nudge in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-2)):
        weight = of_rank(40, 60, 6, torch.float64)
        assert numerical_rank(weight.to(dtype)) == 6
        nudged = weight + nudge * weight.norm() * torch.outer(normal(40), normal(60)).double() / 2400**0.5
        assert numerical_rank(nudged.to(dtype)) == 7
    assert numerical_rank(torch.zeros(4, 4)) == 0
