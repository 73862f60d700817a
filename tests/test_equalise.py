"""Labels, slopes, scales that rounding likes, weights rounded for what layers give, and pictures read as bytes."""

from __future__ import annotations

import math

import pytest
import torch
from nets import Net, conv, noise
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.capture import capture
from compressor.data import Data, open_data
from compressor.equalise import Problem, equalise, release
from compressor.ir import Graph
from compressor.labels import FIXED, labels_of
from compressor.noise import SAMPLES, slopes
from compressor.ops import kind
from compressor.pipeline import Context, Pipeline, parse
from compressor.pixels import lattice
from compressor.place import operands, place
from compressor.quantize import WHOLE, mse
from compressor.registry import passes
from compressor.rounding import rounded
from compressor.target import QLINEAR, QuantSpec
from passes.int8 import Int8
from targets.cpu import CPU


def graph_of(model: nn.Module, *shape: int) -> Graph:
    torch.manual_seed(0)
    return capture(model.eval(), torch.randn(shape or (8, 3, 16, 16)))


def data_of(graph: Graph, inputs: Tensor | None = None) -> Data:
    shape = (128, *graph.example[0].shape[1:])
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return open_data([(drawn if inputs is None else inputs,)], graph.inputs)


def context(graph: Graph, inputs: Tensor | None = None) -> Context:
    found = data_of(graph, inputs)
    return Context(CPU, found, found)


def quantised(graph: Graph, config: Int8, inputs: Tensor | None = None) -> Graph:
    copy = graph.copy()
    list(config.run(copy, context(graph, inputs)))
    copy.check()
    return copy


def classes_at(graph: Graph, name: str) -> list[int]:
    """Classes of the channels of the first value of this kind."""
    labels = labels_of(graph)
    node = next(n for n in graph.nodes if kind(n) == name or n.name == name)
    return labels.classes()[labels.of[node].reshape(-1)].tolist()


# ---------------------------------------------------------------- labels


def test_a_residual_stream_has_one_scale_a_channel():
    def forward(net, x):
        x = F.relu(net.a(x))
        return net.c(F.relu(x + net.b(x)))

    graph = graph_of(Net(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 2)))
    labels, (a, b, c) = labels_of(graph), [n for n in graph.nodes if kind(n) == "conv"]
    classes = labels.classes()
    assert torch.equal(classes[labels.of[a].reshape(-1)], classes[labels.of[b].reshape(-1)])
    assert len(set(classes[labels.of[a].reshape(-1)].tolist())) == 4
    assert set(classes[labels.of[c].reshape(-1)].tolist()) == {FIXED}  # an output of the graph


@pytest.mark.parametrize(
    ("between", "scalable"),
    [
        (F.relu, True),
        (F.leaky_relu, True),
        (lambda x: F.max_pool2d(x, 2), True),
        (lambda x: x.mean((2, 3), keepdim=True), True),
        (lambda x: F.pad(x, (1, 1, 1, 1)), True),
        (lambda x: x * 0.5, True),
        (lambda x: torch.cat([x, x.flip(1)], 1)[:, 2:6], True),
        (F.relu6, False),
        (F.silu, False),
        (F.gelu, False),
        (lambda x: x + 1.0, False),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), False),
        (lambda x: x.softmax(1), False),
        (lambda x: x * x, False),
    ],
)  # fmt: skip
def test_only_what_is_homogeneous_lets_a_scale_through(between, scalable):
    graph = graph_of(Net(lambda net, x: net.b(between(net.a(x))), a=conv(3, 4), b=conv(4, 2)))
    assert (FIXED not in classes_at(graph, "conv")) == scalable


def test_values_of_an_attention_are_scaled_by_head_and_channel():
    def forward(net, x):
        q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    graph = graph_of(Net(forward, **{name: nn.Linear(8, 8) for name in "qkvo"}), 2, 5, 8)
    labels, linears = labels_of(graph), [n for n in graph.nodes if kind(n) == "linear"]
    classes = labels.classes()
    found = [classes[labels.of[n].reshape(-1)] for n in linears]
    assert [bool((c != FIXED).all()) for c in found] == [False, False, True, False]
    assert len(found[2].unique()) == 8
    read = next(made for made in labels.written if made.node is linears[3])
    assert torch.equal(classes[read.ins.reshape(-1)], found[2])


# ---------------------------------------------------------------- slopes and scales


def test_slopes_are_those_of_the_outputs():
    """Of y = W x, the squared slopes by x are the column norms of W, over the energy of y."""
    graph = graph_of(Net(lambda net, x: net.a(x), a=nn.Linear(6, 64, bias=False)), 8, 6)
    (x,), (a,) = graph.placeholders, [n for n in graph.nodes if kind(n) == "linear"]
    weight = operands(a).weight
    some = data_of(graph).limited(SAMPLES)
    found = slopes(graph, {x: 1}, [weight], some.rebatched(32))
    inputs = next(iter(some.rebatched(32))).inputs[0]
    matrix, energy = graph.tensor(weight).double(), graph.run(inputs[:8])[0].double().square().sum() / 8
    expected = float(matrix.square().sum() / energy)
    assert float(found.values[x].power.sum()) == pytest.approx(expected, rel=0.3)
    assert torch.equal(found.values[x].high.float(), next(iter(some.rebatched(SAMPLES))).inputs[0].amax(0))
    expected = float(64 * inputs.double().square().mean(0).sum() / energy)
    assert float(found.weights[weight].sum()) == pytest.approx(expected, rel=0.3)


def test_the_least_noise_is_found():
    """Two channels of one value, one ten times as wide: without weights, both should fill the range."""
    problem = Problem(QLINEAR, 3)
    low, high, power = torch.zeros(2), torch.tensor([1.0, 10.0]), torch.ones(2)
    problem.spans.append((torch.tensor([1, 2]), low.double(), high.double(), power.double()))
    logs = problem.solve()
    assert float(logs[0]) == 0 and float(logs[1] - logs[2]) == pytest.approx(math.log(10), abs=0.1)
    before = float(problem.noise(torch.zeros(3, dtype=torch.float64)))
    assert float(problem.noise(logs)) / before == pytest.approx(101 / 200, rel=0.01)


def uneven(graph: Graph) -> Graph:
    """The same function with channels of very different widths."""
    first, second = [n for n in graph.nodes if kind(n) == "conv"][:2]
    spread = torch.logspace(-1.5, 1.5, graph.tensor(operands(first).weight).shape[0]).reshape(-1, 1, 1, 1)
    graph.set_tensor(operands(first).weight, graph.tensor(operands(first).weight) * spread)
    graph.set_tensor(operands(first).bias, graph.tensor(operands(first).bias) * spread.flatten())
    reading = graph.tensor(operands(second).weight) / spread.reshape(1, -1, 1, 1)
    graph.set_tensor(operands(second).weight, reading)
    return graph


def test_equalisation_changes_no_output_and_saves_bits():
    net = Net(lambda net, x: net.b(F.relu(net.a(x))).mean((2, 3)), a=conv(3, 16), b=conv(16, 8))
    graph = uneven(graph_of(net))
    scaled, (inputs,) = graph.copy(), next(iter(data_of(graph))).inputs
    outcome = equalise(scaled, QLINEAR, (), data_of(graph), context(graph))
    assert noise(graph.run(inputs)[0], scaled.run(inputs)[0]) > 110
    assert outcome.facts["equalised_db"] > outcome.facts["noise_db"] + 6
    assert {"conv2d", "relu"} <= scaled.journal.born
    plain, better = (
        noise(graph.run(inputs)[0], quantised(graph, Int8(equalise=on, rounding="nearest")).run(inputs)[0])
        for on in (False, True)
    )
    assert better > plain + 6


def with_an_outlier() -> Graph:
    def forward(net, x):
        x = net.norm(x * net.wide)
        return x + net.b(F.gelu(net.a(x)))  # the norm's output is read by a sum, too

    torch.manual_seed(0)
    net = Net(forward, norm=nn.LayerNorm(32), a=nn.Linear(32, 64), b=nn.Linear(64, 32))
    net.wide = nn.Buffer(torch.where(torch.arange(32) == 3, 40.0, 1.0))
    return graph_of(net, 8, 12, 32)


def test_a_budget_that_leaves_all_float_says_that_products_go():
    graph, (inputs,) = with_an_outlier(), next(iter(data_of(with_an_outlier()))).inputs
    before = graph.copy()
    (row,) = Pipeline(parse("int8(sqnr=200)", passes()), passes()).run(graph, context(graph))[-1:]
    assert any("products go" in rewrite.what for rewrite in row.rewrites)
    assert not any(kind(node) == "quantize" for node in graph.nodes)
    assert noise(before.run(inputs)[0], graph.run(inputs)[0]) > 110


def test_a_product_smooths_what_nothing_else_can():
    graph = with_an_outlier()
    scaled, (inputs,) = graph.copy(), next(iter(data_of(graph))).inputs
    outcome = equalise(scaled, QLINEAR, (), data_of(graph), context(graph))
    assert outcome.facts["products"] >= 1
    assert noise(graph.run(inputs)[0], scaled.run(inputs)[0]) > 110
    plan = place(scaled, QLINEAR)
    products = [value for value in plan.owner if kind(value) == "mul" and value.name.startswith("mul")]
    assert len(products) == outcome.facts["products"]
    expected = scaled.run(inputs)[0]
    release(scaled, [node for node in scaled.nodes if node not in products[0].users])
    assert products[0] in scaled.nodes  # which an integer layer still reads
    release(scaled, scaled.nodes)
    assert not set(products) & set(scaled.nodes)
    assert noise(expected, scaled.run(inputs)[0]) > 110


@pytest.mark.parametrize("through", ["flip", "select"])
def test_products_whose_readers_let_no_scale_through_go(through):
    """A layer that is called twice, and one that reads a part: a product in front of them has ones, or is kept."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head, self.classes = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.norm(x)
            return self.head(y), self.head(y.flip(1) if through == "flip" else y * 2), self.classes(y[:, -1])

    graph = graph_of(Twice(), 8, 5, 32)
    scaled, (inputs,) = graph.copy(), next(iter(data_of(graph))).inputs
    equalise(scaled, QLINEAR, (), data_of(graph), context(graph))
    for before, after in zip(graph.run(inputs), scaled.run(inputs), strict=True):
        assert noise(before, after) > 110


def test_a_model_that_no_output_depends_on_smoothly_is_left_as_it_is():
    graph = graph_of(Net(lambda net, x: net.b(F.relu(net.a(x))).argmax(1), a=conv(3, 4), b=conv(4, 4)))
    before = graph.fingerprint()
    outcome = equalise(graph, QLINEAR, (), data_of(graph), context(graph))
    assert graph.fingerprint() == before and not outcome.rewrites


def test_slopes_are_no_guide_where_noise_is_loud(monkeypatch):
    graph = graph_of(Net(lambda net, x: net.b(F.relu(net.a(x))), a=conv(3, 4), b=conv(4, 4)))
    assert equalise(graph.copy(), QLINEAR, (), data_of(graph), context(graph)).rewrites
    monkeypatch.setattr("compressor.equalise.LOUD", 0.0)
    before = graph.fingerprint()
    outcome = equalise(graph, QLINEAR, (), data_of(graph), context(graph))
    assert graph.fingerprint() == before and not outcome.rewrites
    assert "no longer as the slopes foresee" in outcome.declines[0].reason


def test_an_operator_without_a_derivative_is_named():
    def forward(net, x):
        return net.b(torch.ops.compressor.dynamic_quantise(F.relu(net.a(x))))

    graph = graph_of(Net(forward, a=conv(3, 4), b=conv(4, 4)))
    before = graph.fingerprint()
    outcome = equalise(graph, QLINEAR, (), data_of(graph), context(graph))
    assert graph.fingerprint() == before
    assert outcome.declines[0].reason.startswith("an operator has no derivative")
    quantised(graph, Int8(sqnr=20.0))  # a budget is kept all the same


# ---------------------------------------------------------------- rounding


def test_rounding_by_the_gram_matrix_keeps_what_is_read():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    rows = torch.randn(4096, 24, generator=generator, dtype=torch.float64) @ mix
    matrix = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    steps = matrix.abs().amax(1, keepdim=True) / 7
    made = rounded(matrix, rows.T @ rows / len(rows), steps, 7)
    nearest = (matrix / steps).round().clamp(-7, 7) * steps
    assert torch.allclose((made / steps).round(), made / steps) and float((made / steps).abs().max()) <= 7
    lost = [float((rows @ (matrix - w).T).square().sum()) for w in (made, nearest)]
    assert lost[0] < 0.6 * lost[1]


def test_a_gram_matrix_with_less_digits_than_its_ridge_is_rounded_all_the_same():
    """One direction holds nearly everything: products of float32 leave the matrix indefinite."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    powers = torch.full((64,), 5e-6, dtype=torch.float64)
    powers[:2] = torch.tensor([10.0, -2e-6])
    gram = basis @ powers.diag() @ basis.T
    assert torch.linalg.cholesky_ex(gram.flip(0, 1))[1] > 0
    matrix = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    steps = matrix.abs().amax(1, keepdim=True) / 127
    made = rounded(matrix, gram, steps, 127)
    assert torch.allclose((made / steps).round(), made / steps) and float((made - matrix).abs().max()) < 0.1


def test_adaptive_rounding_makes_up_for_biases():
    net = Net(lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x))))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))
    graph = graph_of(net)
    (inputs,) = next(iter(data_of(graph))).inputs
    expected = graph.run(inputs)[0]
    found = {r: quantised(graph, Int8(rounding=r)) for r in ("nearest", "adaptive")}
    errors = {r: (g.run(inputs)[0] - expected).mean((0, 2, 3)).abs().mean() for r, g in found.items()}
    levels = {r: noise(expected, g.run(inputs)[0]) for r, g in found.items()}
    assert errors["adaptive"] < 0.7 * errors["nearest"] and levels["adaptive"] > levels["nearest"]


def test_the_same_twice_gives_the_same():
    graph = graph_of(Net(lambda net, x: net.b(F.relu(net.a(x))), a=conv(3, 8), b=conv(8, 4)))
    assert quantised(graph, Int8()).fingerprint() == quantised(graph, Int8()).fingerprint()


# ---------------------------------------------------------------- pictures


def pictures(count: int = 32, size: int = 16) -> Tensor:
    drawn = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(3))
    mean, deviation = (
        torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (drawn / 255 - mean) / deviation


def test_a_lattice_is_found_and_nothing_else():
    points = [channel.unique().double() for channel in pictures().movedim(1, 0)]
    found = lattice(points)
    assert found is not None
    assert torch.allclose(found.step, 1 / 255 / torch.tensor([0.229, 0.224, 0.225]).double(), rtol=1e-5)
    assert torch.allclose(found.offset, 255 * torch.tensor([0.485, 0.456, 0.406]).double(), atol=1e-2)
    generator = torch.Generator().manual_seed(0)
    assert lattice([torch.randn(200, generator=generator).double().sort().values]) is None
    assert lattice([torch.arange(300).double()]) is None and lattice([torch.arange(10).double()]) is None


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_picture_is_read_without_loss(padding):
    net = Net(lambda net, x: net.a(x), a=nn.Conv2d(3, 8, 3, padding=padding, stride=2))
    graph, inputs = graph_of(net), pictures()
    copy = graph.copy()
    steps = list(Int8(rounding="nearest").run(copy, context(graph, inputs)))
    assert [r.what for r in steps[0].rewrites] == ["a normalised picture as its bytes"]
    (scale, zero) = next(n.args[1:3] for n in copy.nodes if kind(n) == "quantize")
    assert (scale, zero) == (1.0, 0)
    values = {n.name: v for n, v in copy.values(inputs) if isinstance(v, Tensor)}
    first = next(n for n in copy.nodes if kind(n) == "quantize")
    lost = values[next(iter(first.users)).name] - values[first.args[0].name]
    inside = lost[:, :, padding : padding + 16, padding : padding + 16]
    assert float(inside.abs().max()) < 1e-2 and float(lost.abs().max()) <= 0.51


def test_pictures_that_others_read_too_stay_floats():
    net = Net(lambda net, x: net.a(x) + net.b(x), a=conv(3, 3), b=conv(3, 3))
    graph = graph_of(net)
    steps = list(Int8(rounding="nearest").run(graph.copy(), context(graph, pictures())))
    assert not steps[0].rewrites


def test_what_is_added_to_scores_is_not_scaled():
    def pairs(net, x, edges):
        query, key, value = net.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        made = F.scaled_dot_product_attention(query, key, value, attn_mask=net.edge(edges))
        return net.out(made.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = Net(pairs, qkv=nn.Linear(32, 96), edge=nn.Conv2d(4, 4, 1), out=nn.Linear(32, 32))
    x, edges = (
        torch.randn(160, 6, 32),
        torch.randn(160, 4, 6, 6) * torch.tensor([1, 5, 0.1, 3])[:, None, None],
    )
    with torch.no_grad():
        net.edge.weight[0] *= 20
        net.edge.weight[1] *= 0.05
    graph = capture(net.eval(), (x[:2], edges[:2]))
    samples = open_data([(x, edges)], graph.inputs)
    copy = graph.copy()
    list(Int8(rounding="nearest", measure=False).run(copy, Context(CPU, samples, samples)))
    assert noise(graph.run(x, edges)[0], copy.run(x, edges)[0]) > 18


def test_steps_are_those_of_the_target():
    """16 bits of activations are worth less noise than 8 of weights: nothing is moved onto the weights."""
    torch.manual_seed(0)
    spans = [(torch.arange(1, 9), -torch.rand(8), torch.linspace(0.1, 9, 8), torch.ones(8))]
    rows = [(torch.arange(1, 9)[None], torch.rand(4, 8).double() + 0.5, torch.ones(4, 8).double())]
    wide, narrow = (
        Problem(QuantSpec(activation=a), 9, spans, rows).noise(torch.zeros(9, dtype=torch.float64))
        for a in ("u16", "u8")
    )
    assert wide < narrow
    assert (
        Problem(QuantSpec(activation="u16"), 9, spans, []).noise(torch.zeros(9, dtype=torch.float64))
        < narrow / 1e3
    )


def test_the_best_range_of_sixteen_bits_is_all_of_it():
    assert mse(QuantSpec(activation="u16")) is WHOLE
