"""Layers as least squares, what a removal costs, and weights that make up for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from nets import Net, conv, noise
from torch import Tensor, nn
from torch.nn import functional as F

from compressor import data
from compressor.capture import capture
from compressor.channels import analyse
from compressor.elimination import Problem, eliminate, ridged
from compressor.errors import ContractError, UsageError
from compressor.ir import Graph
from compressor.ops import contractions, kind
from compressor.pipeline import Context, Pipeline
from compressor.readers import anchor, layer_of
from compressor.rebuild import rebuild, restate_norms
from compressor.survey import Moments, Readers, Sampler, reading_of, survey
from passes.prune import Prune
from targets.cpu import CPU


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream(graph: Graph, samples: Tensor) -> data.Data:
    return data.open_data([(samples,)], graph.inputs)


def context(graph: Graph, samples: Tensor, **fields: object) -> Context:
    return Context(CPU, stream(graph, samples[:8]), stream(graph, samples), **fields)  # type: ignore[arg-type]


# -------------------------------------------------------------------- layers as matrices

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 2), bias=False), (2, 4, 7, 9)),
    "same": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2), (2, 4, 7, 9)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 7, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    "transposed, groups": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, groups=2, dilation=2), (2, 4, 5)),
    "linear": (lambda: nn.Linear(4, 6), (2, 5, 4)),
    "matmul": (lambda: Net(lambda m, x: x @ m.weight, weight=drawn(4, 6)), (2, 5, 4)),
    "addmm": (lambda: Net(lambda m, x: torch.addmm(m.bias, x, m.weight), weight=drawn(4, 6), bias=drawn(6)), (5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_its_rows_times_its_matrix(name: str) -> None:
    model, shape = LAYERS[name]
    torch.manual_seed(0)
    x = drawn(*shape)
    graph = capture(model(), x)
    node = next(contractions(graph))
    layer = layer_of(node)
    assert layer is not None
    expected = graph.run(x)[0]
    moments = Sampler(graph, len(x), 0)
    moments.begin(0, data.Batch((x,)))
    rows, flat = moments.rows(layer, x, expected)
    matrix = layer.matrix(graph.tensor(layer.weight))
    seen = torch.einsum("rgf,gof->rgo", rows, matrix).flatten(1)
    seen = seen if layer.bias is None else seen + graph.tensor(layer.bias)
    torch.testing.assert_close(seen, flat, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen, flat.roll(1, 0), atol=1e-2), "another place would have shown"
    torch.testing.assert_close(layer.folded(matrix), graph.tensor(layer.weight))


def test_a_computed_weight_is_no_layer() -> None:
    graph = capture(Net(lambda m, x: F.linear(x, m.weight * x.mean()), weight=drawn(6, 4)), drawn(2, 4))
    assert layer_of(next(contractions(graph))) is None


def test_rows_are_the_same_few_places_of_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.survey.LEAST_ROWS", 10)
    monkeypatch.setattr("compressor.survey.ROWS", 1)
    x = drawn(2, 4, 9, 9)
    graph = capture(nn.Conv2d(4, 6, 3, bias=False), x)
    layer = layer_of(next(contractions(graph)))
    assert layer is not None
    sampler = Sampler(graph, 4, 0)
    sampler.begin(0, data.Batch((x,)))
    rows, flat = sampler.rows(layer, x, graph.run(x)[0])
    assert len(rows) == 18, "half of 36, as half of the samples are here"
    torch.testing.assert_close(rows[:, 0] @ layer.matrix(graph.tensor(layer.weight))[0].T, flat)


# -------------------------------------------------------------------- anchors


def _residual(m: nn.Module, x: Tensor) -> Tensor:
    return F.relu(x + m.norm(m.conv(x)))


def _convnext(m: nn.Module, x: Tensor) -> Tensor:
    return x + (m.linear(x.permute(0, 2, 3, 1)) * m.scale).permute(0, 3, 1, 2)


def test_an_error_is_followed_to_the_sum_and_back() -> None:
    for model, name in (
        (Net(_residual, conv=conv(4, 4), norm=nn.BatchNorm2d(4)), "add"),
        (Net(_convnext, linear=nn.Linear(4, 4), scale=drawn(4)), "add"),
    ):
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        x = drawn(2, 4, 5, 5)
        graph = capture(model.eval(), x)
        layer = layer_of(next(contractions(graph)))
        assert layer is not None
        place = anchor(graph, layer)
        assert kind(place.node) == name
        values = {node: value for node, value in graph.values(x)}
        error = drawn(*values[layer.node].shape, seed=1)
        environment = dict(values)
        environment[layer.node] = values[layer.node] + error
        for step in place.steps:
            environment[step] = graph.execute(step, environment)
        moved = environment[place.node] - values[place.node]
        torch.testing.assert_close(place.pull(moved), error, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(moved, error if moved.shape == error.shape else moved * 0, atol=1e-2)


def test_an_anchor_ends_where_errors_mix() -> None:
    def second_reader(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv(x)
        return (x + y).relu() + y

    def itself(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv(x)
        return y + torch.sigmoid(y)

    for function in (second_reader, itself, lambda m, x: F.relu(m.conv(x)), lambda m, x: m.conv(x) * x):
        graph = capture(Net(function, conv=conv(4, 4)), drawn(2, 4, 5, 5))
        layer = layer_of(next(contractions(graph)))
        assert layer is not None and anchor(graph, layer).node is layer.node


# -------------------------------------------------------------------- elimination


def _loss(gram: Tensor, matrix: Tensor, weight: Tensor, gone: list[int]) -> float:
    """What is lost without these columns, the others solved anew: by the normal equations."""
    left = [i for i in range(len(gram)) if i not in gone]
    solved = torch.zeros_like(matrix)
    solved[:, left] = torch.linalg.solve(gram[left][:, left], gram[left] @ matrix.T).T
    delta = matrix - solved
    return float(((delta @ gram) * delta).sum(1) @ weight)


def test_costs_are_the_best_least_squares_loss() -> None:
    x, matrix, weight = drawn(200, 12).double(), drawn(5, 12, seed=1).double(), torch.rand(5).double()
    x[:, 2:4] = x[:, 4:6] + 0.05 * x[:, :2]  # of these one pair can go at little cost
    gram = x.T @ x / 200
    blocks = [torch.tensor([2 * i, 2 * i + 1]) for i in range(6)]
    found = eliminate([Problem(gram, matrix, weight, blocks)], 6)
    drawn_gram = ridged(gram)
    for count in range(6):
        gone = [int(c) for k in found.order[:count] for c in blocks[k]]
        assert found.costs[count] == pytest.approx(
            _loss(drawn_gram, matrix, weight, gone), rel=1e-6, abs=1e-9
        )
    first = min(range(6), key=lambda k: _loss(drawn_gram, matrix, weight, blocks[k].tolist()))
    assert found.order[0] == first
    plain = eliminate([Problem(gram, matrix, weight, blocks, repair=False)], 6)
    assert plain.costs[1] > 2 * found.costs[1], "without repair it costs more"


def test_readers_of_one_family_decide_together() -> None:
    problems = []
    for seed in (1, 2):
        x = drawn(100, 6, seed=seed).double() * torch.tensor([1, 1, 1, 0.1, 1, 1.0]) ** seed
        matrix = drawn(4, 6, seed=seed + 5).double()
        problems.append(
            Problem(x.T @ x / 100, matrix, torch.ones(4).double(), [torch.tensor([i]) for i in range(6)])
        )
    single = [eliminate([p], 6) for p in problems]
    both = eliminate(problems, 6)
    assert both.order[0] == 3
    order = list(itertools.pairwise(both.costs))
    assert all(a <= b for a, b in order)
    gone = both.order[:3]
    expected = sum(_loss(ridged(p.gram), p.matrix, p.weight, gone) for p in problems)
    assert both.costs[3] == pytest.approx(expected, rel=1e-6)
    assert both.costs[3] >= single[0].costs[3] + single[1].costs[3] - 1e-12


def test_many_at_once_cost_what_they_cost_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.elimination.ROUNDS", 5)
    x, matrix = drawn(300, 16).double(), drawn(3, 16, seed=2).double()
    gram, weight = x.T @ x / 300, torch.ones(3).double()
    blocks = [torch.tensor([i]) for i in range(16)]
    found = eliminate([Problem(gram, matrix, weight, blocks)], 16, stop=8)
    assert len(found.order) == 8
    assert found.costs[8] == pytest.approx(_loss(ridged(gram), matrix, weight, found.order), rel=1e-6)


# -------------------------------------------------------------------- the pass


class Redundant(nn.Module):
    """A block whose 8 inner channels are mixtures of 4: half of them can go for nothing, if the rest makes up."""

    def __init__(self, last: nn.Module, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = first or conv(3, 8), last
        with torch.no_grad():
            mix = torch.cat(
                [torch.eye(4), drawn(4, 4).abs()]
            )  # relu of a multiple is the multiple of the relu
            mix[4:] *= torch.eye(4)
            self.first.weight.copy_(torch.einsum("ab,bixy->aixy", mix, self.first.weight[:4]))
            self.first.bias.copy_(mix @ self.first.bias[:4])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


REDUNDANT: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: Redundant(conv(8, 5)),
    "strided": lambda: Redundant(nn.Conv2d(8, 5, 3, stride=2)),
    "transposed": lambda: Redundant(nn.ConvTranspose2d(8, 5, 3, stride=2)),
    "linear": lambda: Redundant(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))),
    "flattened": lambda: Redundant(nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 5))),
}


@pytest.mark.parametrize("name", REDUNDANT)
def test_what_others_can_make_up_for_goes_for_nothing(name: str) -> None:
    torch.manual_seed(1)
    model, x = REDUNDANT[name]().eval(), drawn(64, 3, 8, 8)
    graph = capture(model, x[:2])
    expected = graph.run(x)[0]
    options = {"params": 0.55, "align": 1, "minimum": 1}
    for repair, low, high in ((True, 45.0, 200.0), (False, -50.0, 20.0)):
        pruned = graph.copy()
        rows = Pipeline([Prune(repair=repair, **options)], {}).run(pruned, context(graph, x))
        assert rows[-1].facts["criterion"] == "reconstruct"
        assert low < noise(expected, pruned.run(x)[0]) < high
    assert sorted(r.what for r in rows[-1].rewrites) == ["8 -> 4 channels"]


def test_two_readers_are_solved_together() -> None:
    torch.manual_seed(0)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(m.block.first(x))
        return torch.cat([m.a(y), m.b(y)], 1)

    model = Net(forward, block=Redundant(nn.Identity()), a=conv(8, 3), b=conv(8, 2, 1)).eval()
    x = drawn(64, 3, 8, 8)
    graph = capture(model, x[:2])
    expected = graph.run(x)[0]
    row = Pipeline([Prune(macs=0.55, align=1, minimum=1)], {}).run(graph, context(graph, x))[-1]
    assert noise(expected, graph.run(x)[0]) > 45
    assert row.facts["repaired"] == 2


def test_later_layers_heal_what_earlier_ones_broke() -> None:
    torch.manual_seed(0)
    blocks = [Net(_block, a=conv(8, 16), b=conv(16, 8)) for _ in range(3)]
    model = nn.Sequential(conv(3, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    x = drawn(96, 3, 8, 8)
    graph = capture(model, x[:2])
    heard = {}
    for repair in (False, True):
        pruned = graph.copy()
        row = Pipeline([Prune(macs=0.6, align=1, repair=repair)], {}).run(pruned, context(graph, x))[-1]
        heard[repair] = row.total_db
    assert heard[True] > heard[False] + 6


def _block(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.b(F.relu(m.a(x)))


def _prenorm(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.b(F.gelu(m.a(m.norm(x))))


def test_a_stream_under_norms_is_repaired_as_it_will_be_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    blocks = [
        Net(_prenorm, norm=nn.LayerNorm(16), a=nn.Linear(16, 32), b=nn.Linear(32, 16)) for _ in range(2)
    ]
    model = nn.Sequential(nn.Linear(6, 16), *blocks, nn.LayerNorm(16), nn.Linear(16, 5)).eval()
    x = drawn(256, 4, 6)
    graph = capture(model, x[:2])
    prune = Prune(macs=0.6, align=1, norms=True, ignore=("*.a",))
    heard = {}
    for masks in (True, False):
        pruned = graph.copy()
        if not masks:
            monkeypatch.setattr("compressor.rebuild.mask_norms", lambda twin, removed: None)
        row = Pipeline([prune], {}).run(pruned, context(graph, x))[-1]
        assert any("0 and" in r.site for r in row.rewrites if "channels" in r.what)
        heard[masks] = row.total_db
    assert heard[True] > heard[False] + 1


def test_without_data_reconstruct_says_what_it_needs() -> None:
    graph = capture(Redundant(conv(8, 5)).eval(), drawn(2, 3, 8, 8))
    ctx = Context(CPU, stream(graph, drawn(8, 3, 8, 8)))
    with pytest.raises(UsageError, match=r"criterion=reconstruct.*--calib"):
        Pipeline([Prune(criterion="reconstruct")], {}).run(graph, ctx)


def test_other_criteria_choose_and_are_repaired() -> None:
    torch.manual_seed(1)
    model, x = Redundant(conv(8, 5)).eval(), drawn(64, 3, 8, 8)
    graph = capture(model, x[:2])
    heard = {}
    for repair in (False, True):
        pruned = graph.copy()
        prune = Prune(params=0.55, criterion="l2", align=1, minimum=1, repair=repair)
        heard[repair] = Pipeline([prune], {}).run(pruned, context(graph, x))[-1].total_db
    assert heard[True] > heard[False] + 3


def test_the_same_run_twice_gives_the_same_weights() -> None:
    torch.manual_seed(1)
    x = drawn(64, 3, 8, 8)
    graph = capture(Redundant(conv(8, 5)).eval(), x[:2])
    prints = set()
    for _ in range(2):
        pruned = graph.copy()
        Pipeline([Prune(macs=0.6, align=1)], {}).run(pruned, context(graph, x))
        prints.add(pruned.fingerprint())
    assert len(prints) == 1


def test_a_shared_weight_is_judged_and_not_solved() -> None:
    torch.manual_seed(0)
    x = drawn(64, 3, 8, 8)
    model = Net(
        lambda m, x: m.c(F.relu(m.a(x))) + m.c(F.relu(m.b(x))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 4)
    )
    graph = capture(model.eval(), x[:2])
    row = Pipeline([Prune(macs=0.7, align=1)], {}).run(graph, context(graph, x))[-1]
    assert row.facts["pruned"] > 0 and "repaired" not in row.facts


def test_a_layer_too_wide_for_one_matrix_is_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x = drawn(64, 3, 8, 8)
    graph = capture(Redundant(conv(8, 5)).eval(), x[:2])
    monkeypatch.setattr("compressor.survey.MEMORY", 8 * 72 * 72 // 2)
    reading = reading_of(graph, list(contractions(graph))[1])
    assert reading is not None and reading.parts == 2 and reading.columns == 36
    weight = graph.tensor(reading.layer.weight)
    torch.testing.assert_close(reading.weight(reading.matrices(weight)).float(), weight)
    row = Pipeline([Prune(params=0.75, align=1, minimum=1)], {}).run(graph, context(graph, x))[-1]
    assert row.facts["repaired"] >= 1
    assert any("2 parts" in decline.reason for decline in row.declines)


def test_an_answer_that_makes_it_worse_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x = drawn(64, 3, 8, 8)
    graph = capture(Redundant(conv(8, 5)).eval(), x[:2])
    solved = Moments.block
    monkeypatch.setattr(Moments, "block", lambda self, i: (solved(self, i)[0], 20 + solved(self, i)[1]))
    with pytest.raises(ContractError, match=r"pass prune \(repair\).*under the floor"):
        Pipeline([Prune(params=0.55, align=1, minimum=1)], {}).run(graph, context(graph, x))


# -------------------------------------------------------------------- batch norms


def test_norms_take_the_statistics_of_what_they_see_and_compute_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2)).eval()
    x = drawn(64, 3, 8, 8) * 3 + 1
    graph = capture(model, x[:2])
    before = graph.run(x)[0]
    assert restate_norms(graph, stream(graph, x)) == 1
    torch.testing.assert_close(graph.run(x)[0], before, rtol=1e-4, atol=1e-4)
    seen = next(value for node, value in graph.values(x) if kind(node) == "conv")
    norm = next(node for node in graph.nodes if kind(node) == "batch_norm")
    mean, variance = (graph.tensor(norm.args[i]) for i in (3, 4))
    torch.testing.assert_close(mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance, seen.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mean, torch.zeros(6), atol=1e-2)


# -------------------------------------------------------------------- survey


def test_a_family_is_surveyed_by_all_its_readers() -> None:
    torch.manual_seed(0)
    x = drawn(32, 3, 8, 8)
    graph = capture(Net(_block, a=conv(3, 8), b=conv(8, 3)).eval(), x[:2])
    algebra = analyse(graph)
    readers = Readers(graph, algebra)
    assert [[r.layer.node.name for r in some] for some in readers.of.values()] == [["conv2d_1"]]
    found = survey(graph, algebra, stream(graph, x), context(graph, x))
    (elimination,) = found.values()
    assert sorted(elimination.order) == list(range(8))
    assert 0 < elimination.costs[1] < elimination.costs[8]
    family = algebra.families[next(iter(found))]
    gone = [family[k] for k in elimination.order[:3]]
    built = rebuild(graph, algebra, [gone], False, stream(graph, x), context(graph, x))
    weight = built.tensors["b.weight"]
    dead = sorted(int(s.indices[0]) for g in gone for s in g.slices if s.tensor == "b_weight" and s.axis == 1)
    assert (weight[:, dead] == 0).all() and (weight != 0).sum() == weight.numel() * 5 // 8
