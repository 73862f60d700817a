"""The int8 pass: exact rewrites, what ONNX Runtime makes of the pairs, accuracy, and when it refuses."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nets import Net, conv, noise
from torch import Tensor, nn
from torch.nn import functional as F
from yolo import Yolo
from zoo import with_power

from compressor import registry, runtime
from compressor.capture import capture
from compressor.data import Data, open_data
from compressor.emit import emit
from compressor.errors import DataError, UsageError
from compressor.forms import Match
from compressor.ir import Graph
from compressor.names import operator_name, site
from compressor.ops import kind
from compressor.pipeline import BOUNDED, EXACT, Context, Decline, Outcome, Pipeline, parse
from compressor.place import place
from compressor.quantize import insert_pairs
from compressor.target import QLINEAR, Target
from passes.fold import Fold
from passes.int8 import REWRITES, Int8
from targets import TARGETS
from targets.cpu import CPU
from targets.gpu import GPU
from targets.web import WEB

SHARED = Path(__file__).resolve().parents[2] / "shared"


def graph_of(model: nn.Module, *shape: int, dynamic: bool = True) -> Graph:
    torch.manual_seed(0)
    return capture(model.eval(), torch.randn(shape or (8, 3, 16, 16)), dynamic=dynamic)


def data(graph: Graph, count: int = 128) -> Data:
    draw = torch.Generator().manual_seed(1)
    shape = (count, *graph.example[0].shape[1:])
    return open_data([(torch.randn(shape, generator=draw),)], graph.inputs)


def context(graph: Graph, target: Target = CPU, **options) -> Context:
    return Context(target, data(graph, 8), data(graph), **options)


def compiled(
    graph: Graph, config: Int8 | None = None, ctx: Context | None = None
) -> tuple[Graph, list[Outcome]]:
    copy = graph.copy()
    outcomes = list((config or Int8()).run(copy, ctx or context(graph)))
    copy.check()
    return copy, outcomes


def in_runtime(graph: Graph, path: Path, inputs: Tensor) -> tuple[Tensor, dict[str, int]]:
    """First output of the emitted graph, and the operators that ONNX Runtime's optimiser leaves."""
    file = emit(graph, path / "model.onnx").path
    (output, *_) = runtime.run(runtime.session(file, threads=1, exact=True), [inputs.numpy()])
    return torch.from_numpy(output), runtime.optimized_operators(file)


# ---------------------------------------------------------------- the whole line


def test_a_small_network_is_all_integer(tmp_path):
    def forward(net, x):
        x = F.max_pool2d(F.relu6(net.a(x)), 2)
        x = F.relu(net.b(x) + net.skip(x))
        x = torch.cat([F.relu(net.c(x)), net.d(x)], 1)
        return net.head(F.relu(net.hidden(x.mean((2, 3)))))

    layers = {"a": conv(3, 8), "b": conv(8, 8), "skip": conv(8, 8, 1), "c": conv(8, 8), "d": conv(8, 8)}
    graph = graph_of(Net(forward, **layers, hidden=nn.Linear(16, 16), head=nn.Linear(16, 5)))
    after, (prepared, *_, outcome) = compiled(graph)
    (inputs,) = next(iter(data(graph, 64))).inputs
    (expected,), (simulated,) = graph.run(inputs), after.run(inputs)
    seen, operators = in_runtime(after, tmp_path, inputs)
    assert not runtime.float_operators_inside(tmp_path / "model.onnx")
    assert (operators["QLinearConv"], operators["QLinearAdd"], operators["QLinearConcat"]) == (5, 1, 1)
    assert (operators["QLinearAveragePool"], operators["QGemm"]) == (1, 2)
    assert noise(expected, simulated) > 27 and noise(simulated, seen) > 35
    assert prepared.contract is EXACT and Int8.contract is BOUNDED
    assert outcome.facts["integer"]["conv2d"] == 5 and not outcome.facts["float"]
    assert len(outcome.rewrites) == 5 + 2 + 3


def test_a_transformer_block_multiplies_integers_and_adds_floats(tmp_path):
    def forward(net, x):
        query, key, value = (
            layer(x).unflatten(2, (2, 16)).transpose(1, 2) for layer in (net.q, net.k, net.v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = net.first(x + net.o(mixed))
        return net.second(x + net.down(F.gelu(net.up(x))))

    sizes = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32), "up": (32, 64), "down": (64, 32)}
    layers = {name: nn.Linear(*size) for name, size in sizes.items()}
    graph = graph_of(Net(forward, **layers, first=nn.LayerNorm(32), second=nn.LayerNorm(32)), 8, 12, 32)
    after, (*_, outcome) = compiled(graph)
    assert outcome.facts["integer"] == {"linear": 6}
    assert sum(kind(n) == "quantize" for n in after.nodes) == 4  # q, k and v read one
    (inputs,) = next(iter(data(graph, 4))).inputs
    seen, operators = in_runtime(after, tmp_path, inputs)
    assert operators["MatMulIntegerToFloat"] == 6
    assert noise(graph.run(inputs)[0], seen) > 30
    assert [d.reason for d in outcome.declines] == ["the target has no integer kernel for it"]  # attention


def test_boxes_and_scores_keep_their_own_scales(tmp_path):
    """One scale over both passes every check on the whole tensor, and finds nothing."""

    def forward(net, x):
        x = F.silu(net.stem(x))
        return torch.cat([net.boxes(x).flatten(2), net.scores(x).flatten(2)], 1)

    model = Net(forward, stem=conv(3, 16), boxes=conv(16, 4, 1), scores=conv(16, 80, 1))
    with torch.no_grad():
        model.boxes.weight *= 300
    graph = graph_of(model)
    after, (*_, outcome) = compiled(graph)
    (inputs,) = next(iter(data(graph, 8))).inputs
    (expected,), (simulated,) = graph.run(inputs), after.run(inputs)
    seen, operators = in_runtime(after, tmp_path, inputs)
    assert operators["Concat"] == 1 and "QLinearConcat" not in operators
    assert operators["QLinearConv"] == 3 and operators["QLinearMul"] == 1
    assert "no layer reads its result in integers" in [d.reason for d in outcome.declines]
    for part in (slice(0, 4), slice(4, 84)):
        assert noise(expected[:, part], seen[:, part]) > 27
    step = float(expected.max() - expected.min()) / 255  # what one scale would have done
    shared = torch.round(expected / step) * step
    assert noise(expected, shared) > 30 and noise(expected[:, 4:], shared[:, 4:]) < 10
    assert noise(simulated, seen) > 30


def test_a_detector_decodes_in_floats(tmp_path):
    model = with_power(Yolo(classes=5, width=8).eval(), torch.randn(2, 3, 64, 64))
    graph = capture(model, torch.randn(2, 3, 64, 64))
    Fold().run(graph, context(graph))
    after, (*_, outcome) = compiled(graph, Int8(rounding="nearest", equalise=False))
    declined = [d.reason for d in outcome.declines if d.site.startswith("head")]
    assert sum("averages over a distribution" in reason for reason in declined) == 1
    assert sum(reason == "no layer reads its result in integers" for reason in declined) == 3
    file = emit(after, tmp_path / "model.onnx").path
    decoding = [op for op, _ in runtime.optimized_nodes(file)][-12:]
    assert "Softmax" in decoding and not any(op.startswith("QLinear") for op in decoding)
    quantisers = [n for n in after.nodes if kind(n) == "quantize"]
    ends = [n.args[1:3] for n in quantisers if re.fullmatch(r"head\.cv[23]\.\d\.2", site(n.args[0]))]
    assert len(ends) == len(set(ends)) == 6  # distributions and scores of three scales


# ---------------------------------------------------------------- exact rewrites


def rewritten(graph: Graph, name: str) -> tuple[Graph, list[Match | Decline]]:
    copy = graph.copy()
    found = list(REWRITES[name](copy, QLINEAR))
    for match in found:
        if isinstance(match, Match):
            copy.replace_uses(match.node, match.build())
    copy.clean()
    copy.check()
    return copy, found


def same(graph: Graph, other: Graph) -> bool:
    expected, seen = graph.run(*graph.example)[0], other.run(*graph.example)[0]
    return bool((expected - seen).abs().max() <= 1e-6 * expected.abs().max()) and expected.shape == seen.shape


@pytest.mark.parametrize(
    "pooled",
    [
        lambda net, x: x.mean((2, 3)),
        lambda net, x: x.mean([-1, -2], keepdim=True),
        lambda net, x: F.adaptive_avg_pool2d(x, 1),
        lambda net, x: F.adaptive_avg_pool2d(x, (4, 2)),
        lambda net, x: F.adaptive_avg_pool2d(x, (16, 16)) * 2,
    ],
)
def test_means_over_space_become_average_pools(pooled):
    graph = graph_of(Net(pooled))
    after, found = rewritten(graph, "pool")
    assert len(found) == 1 and same(graph, after)
    assert not {operator_name(n) for n in after.nodes} & {"aten.mean.dim", "aten.adaptive_avg_pool2d.default"}


def test_means_that_no_pool_computes_stay():
    for other in (
        lambda net, x: x.mean((1, 2)),
        lambda net, x: x.mean(3),
        lambda net, x: x.mean((2, 3), dtype=torch.float64),
    ):
        assert rewritten(graph_of(Net(other)), "pool")[1] == []
    _, (uneven,) = rewritten(graph_of(Net(lambda net, x: F.adaptive_avg_pool2d(x, 5))), "pool")
    assert isinstance(uneven, Decline) and "[16, 16] does not divide into [5, 5]" in uneven.reason
    free = capture(Net(lambda net, x: x.mean((2, 3))), torch.randn(2, 3, 8, 8), inputs=[replace_shape("x")])
    _, (dynamic,) = rewritten(free, "pool")
    assert isinstance(dynamic, Decline) and "dynamic" in dynamic.reason


def replace_shape(name: str):
    from compressor.ir import Input

    return Input(name, torch.float32, ("batch", 3, "height", "width"))


@pytest.mark.parametrize(
    ("shortcut", "strides"),
    [
        (lambda net, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3)), [2, 2]),
        (lambda net, x: F.pad(x[:, :, ::3], (0, 0, 0, 0, 0, 5)), [3, 1]),
        (lambda net, x: F.pad(x[:, :, 0:16:5, ::2][:, :, :, ::2], (0, 0, 0, 0, 1, 0)), [5, 4]),
        (lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 1)), [1, 1]),
    ],
)
def test_a_shortcut_of_slices_and_zeros_becomes_a_selection(shortcut, strides):
    graph = graph_of(Net(shortcut))
    after, found = rewritten(graph, "selection")
    assert len(found) == 1 and same(graph, after)
    (conv2d,) = (n for n in after.nodes if kind(n) == "conv")
    assert conv2d.args[3] == strides
    weight = conv2d.args[1]
    after.set_tensor(weight, after.tensor(weight).roll(1, 0))  # the wrong channels
    assert not same(graph, after)


@pytest.mark.parametrize(
    "other",
    [
        lambda net, x: F.pad(x[:, :, ::2], (0, 0, 0, 0, 2, 2), value=1.0),
        lambda net, x: F.pad(x[:, :, ::2], (1, 1, 0, 0, 2, 2)),
        lambda net, x: F.pad(x[:, :, ::2], (0, 0, 0, 0, -1, 2)),
        lambda net, x: F.pad(x[:, :, ::2], (1, 1, 1, 1), mode="reflect"),
    ],
)
def test_pads_that_are_no_selection_stay(other):
    assert rewritten(graph_of(Net(other)), "selection")[1] == []


def test_a_slice_that_starts_later_is_left_in_front_of_the_selection():
    graph = graph_of(Net(lambda net, x: F.pad(x[:, :, 1::2, :9:2], (0, 0, 0, 0, 2, 3))))
    after, _ = rewritten(graph, "selection")
    assert same(graph, after) and any(kind(n) == "slice" for n in after.nodes)


@pytest.mark.parametrize("gated", [F.silu, F.hardswish])
def test_a_gate_behind_a_convolution_becomes_a_product(gated):
    graph = graph_of(Net(lambda net, x: gated(net.a(x)) + gated(x), a=conv(3, 3)))
    after, found = rewritten(graph, "gate")
    assert len(found) == 1 and same(graph, after)
    assert sum(operator_name(n) == f"aten.{gated.__name__}.default" for n in after.nodes) == 1


def test_hard_swishes_and_squeeze_excitation_are_all_integer(tmp_path):
    def forward(net, x):
        x = F.hardswish(net.a(x))
        x = x * F.hardsigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))
        return net.b(x)

    graph = graph_of(Net(forward, a=conv(3, 16), down=conv(16, 4, 1), up=conv(4, 16, 1), b=conv(16, 8)))
    constants = {n.target: n for n in graph.nodes if n.op == "get_attr"}
    graph.set_tensor(
        constants["a.weight"], graph.tensors["a.weight"] * 12
    )  # beyond where it clips, at either end
    after, (*_, outcome) = compiled(graph, Int8(rounding="nearest", equalise=False))
    (inputs,) = next(iter(data(graph, 64))).inputs
    (expected,), (simulated,) = graph.run(inputs), after.run(inputs)
    seen, operators = in_runtime(after, tmp_path, inputs)
    assert not runtime.float_operators_inside(tmp_path / "model.onnx")
    assert (operators["QLinearConv"], operators["QLinearMul"], operators["QLinearAdd"]) == (4, 2, 2)
    assert noise(expected, simulated) > 30 and noise(simulated, seen) > 35
    assert outcome.facts["integer"]["hardsigmoid"] == 2 and not outcome.facts["float"]


def test_narrow_groups_stay_float(tmp_path):
    layers = {"narrow": (16, 32, 16), "wide": (32, 32, 2), "depthwise": (32, 32, 32)}
    net = Net(
        lambda net, x: net.last(
            F.relu(net.depthwise(F.relu(net.wide(F.relu(net.narrow(F.relu(net.first(x))))))))
        ),
        first=conv(3, 16),
        last=conv(32, 4),
        **{name: nn.Conv2d(i, o, 3, padding=1, groups=g) for name, (i, o, g) in layers.items()},
    )
    graph = graph_of(net)
    after, (*_, outcome) = compiled(graph)
    assert [(d.site, d.reason) for d in outcome.declines] == [
        ("narrow (aten.conv2d.default)", "its groups of 1 channels are slower in integers")
    ]
    file = emit(after, tmp_path / "model.onnx", dialect=CPU.dialect).path
    operators = runtime.optimized_operators(file)
    assert operators["QLinearConv"] == 4 and operators["Conv"] == 1


@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), (2, 1, 1), (3, 3, 1), (5, 4, 2)])
@pytest.mark.parametrize("over", [True, False])
@pytest.mark.parametrize("counts", [True, False])
def test_pools_are_right_at_every_edge(pool, over, counts, tmp_path):
    """ONNX Runtime's integer kernel divides windows that hang over the edge otherwise."""
    size, step, pad = pool
    net = Net(
        lambda net, x: net.b(F.avg_pool2d(F.relu(net.a(x)), size, step, pad, over, counts)),
        a=conv(3, 16), b=nn.Conv2d(16, 8, 1),
    )  # fmt: skip
    graph = graph_of(net, 8, 3, 33, 33)
    made, _ = compiled(graph, Int8(equalise=False, rounding="nearest"))
    (inputs,) = next(iter(data(graph, 8))).inputs
    seen, ran = in_runtime(made, tmp_path, inputs)
    expected = made.run(inputs)[0]
    for axis in (2, 3):
        for edge in (0, -1):
            assert noise(expected.select(axis, edge), seen.select(axis, edge)) > 35
    assert ("QLinearAveragePool" in ran) != ("AveragePool" in ran) == bool(over and counts and pad)


@pytest.mark.parametrize("name", ["view", "unsqueeze", "split"])
def test_constants_and_inputs_may_be_called_like_operators(name):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            setattr(self, name, nn.Parameter(torch.randn(1, 5, 16)))

        def forward(self, identity: Tensor) -> Tensor:
            return self.layer(self.layer(identity) + getattr(self, name))

    made, _ = compiled(graph_of(Named(), 8, 5, 16))
    assert sum(kind(node) == "quantize" for node in made.nodes)


def test_the_first_input_may_be_a_number():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            return self.layer(x * scale)

    torch.manual_seed(0)
    example = torch.rand(()), torch.randn(32, 16)
    for spec in ("int8", "fp16"):
        graph = capture(Scaled(), example)
        found = open_data([example] * 2, graph.inputs)
        row = Pipeline(parse(spec, registry.passes()), registry.passes()).run(
            graph, Context(CPU, found, found)
        )[-1]
        assert row.status in ("proved", "unchanged", "kept"), row


def test_what_an_output_hands_on_is_not_rounded():
    from targets.openvino import OPENVINO

    net = Net(lambda net, x: (x, net.a(x)), a=conv(3, 16))
    graph = graph_of(net)
    made, _ = compiled(graph, Int8(equalise=False, rounding="nearest"), context(graph, OPENVINO))
    (inputs,) = next(iter(data(graph, 8))).inputs
    assert torch.equal(made.run(inputs)[0], inputs) and any(kind(node) == "quantize" for node in made.nodes)


def test_sums_of_few_products_stay_float(tmp_path):
    """Where rounding an output costs much, as in browsers: depthwise and thin convolutions; a sum of 128 is integer."""
    net = Net(
        lambda net, x: net.last(F.relu(net.depthwise(F.relu(net.wide(F.relu(net.first(x))))))),
        first=conv(3, 16),
        wide=conv(16, 128),
        depthwise=nn.Conv2d(128, 128, 3, padding=1, groups=128),
        last=conv(128, 4, 1),
    )
    graph = graph_of(net)
    after, (*_, outcome) = compiled(graph, Int8(measure=False), context(graph, WEB))
    assert [(d.site, d.reason) for d in outcome.declines] == [
        ("first (aten.conv2d.default)", "a sum of 27 products is slower in integers"),
        ("depthwise (aten.conv2d.default)", "a sum of 9 products is slower in integers"),
    ]
    file = emit(after, tmp_path / "model.onnx", dialect=WEB.dialect).path
    operators = runtime.optimized_operators(file)
    assert operators["QLinearConv"] == 2 and operators["Conv"] == 2
    (inputs,) = next(iter(data(graph, 64))).inputs
    (seen,) = runtime.run(runtime.session(file, threads=1, exact=True), [inputs.numpy()])
    assert noise(graph.run(inputs)[0], torch.from_numpy(seen)) > 30
    _, (*_, everything) = compiled(graph, Int8(measure=False))
    assert not everything.declines


def test_a_hard_sigmoid_clips_itself_where_its_quantiser_goes_further():
    graph = graph_of(Net(lambda net, x: net.b(F.hardsigmoid(net.a(x))), a=conv(3, 4), b=conv(4, 4)))
    for top, clips in ((1.0, False), (0.5, False), (1.5, True)):
        copy = graph.copy()
        plan = place(copy, CPU.quant)
        ranges = {n: (0.0, top) if "hardsigmoid" in n.name else (-9.0, 9.0) for n in plan.owner}
        insert_pairs(plan, ranges)
        copy.clean()
        assert any(operator_name(n) == "aten.hardsigmoid.default" for n in copy.nodes) == clips


def test_the_stopwatch_decides_where_the_table_cannot():
    def forward(net, x):
        x = F.relu(net.a(x))
        return F.relu(net.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3))

    graph = graph_of(Net(forward, a=conv(3, 4), b=nn.Conv2d(4, 8, 3, 2, 1)))
    seen: list[str] = []

    def clock(times: dict[str, float]) -> Callable[..., list[float]]:
        def time(trial: Graph) -> float:
            integer = any(kind(n) == "quantize" for n in trial.nodes)
            selects = sum(kind(n) == "conv" for n in trial.nodes) == 3
            seen.append("float" if not integer else "selects" if selects else "plain")
            return times[seen[-1]]

        return lambda *trials: [time(trial) for trial in trials]

    for slow in (False, True):
        times = {"selects": 2.0 if slow else 1.0, "plain": 1.5, "float": 3.0}
        after, (prepared, *_, outcome) = compiled(graph, ctx=context(graph, measure=clock(times)))
        assert any(kind(n) == "pad" for n in after.nodes) == slow
        assert any("average pool" in r.what for r in prepared.rewrites)
        facts = [outcome.facts[f"{name}_ms"] for name in ("int8", "int8_as_it_was", "float")]
        assert facts == list(times.values())
    assert seen == ["selects", "plain", "float"] * 2
    wide = graph_of(
        Net(forward, a=conv(3, 4), b=nn.Conv2d(4, 8, 31, 2, 15))
    )  # the selection is nothing beside it
    plain = graph_of(Net(lambda net, x: F.silu(net.a(x)).mean((2, 3)), a=conv(3, 4)))
    for certain in (wide, plain):
        compiled(certain, ctx=context(certain, measure=lambda *g: [1.0, 2.0][2 - len(g) :]))


def test_what_computes_with_a_number_stays_float():
    """ONNX Runtime has no integer kernel for it: a pair behind it would cost noise and time."""
    graph = graph_of(
        Net(lambda net, x: F.relu(net.b(F.relu(net.a(x)) * 0.3 + net.a(x) * 2.5)), a=conv(3, 4), b=conv(4, 4))
    )
    after, (*_, outcome) = compiled(graph, Int8(measure=False, equalise=False))
    assert "mul" not in outcome.facts["integer"]
    reasons = [one.reason for one in outcome.declines if "mul" in one.site]
    assert reasons == ["it also reads a constant"] * 2
    for node in (n for n in after.nodes if kind(n) == "mul"):
        assert not any(kind(user) == "quantize" for user in node.users)


def test_a_model_that_is_no_faster_in_integers_stays_float():
    graph = graph_of(Net(lambda net, x: net.a(x).relu(), a=conv(3, 4)))
    slower = context(graph, measure=lambda *graphs: [2.0, 1.5])
    after, (outcome,) = compiled(graph, ctx=slower)
    assert after.fingerprint() == graph.fingerprint()
    assert outcome.declines[0].reason == (
        "it is not faster: 2 ms in integers, 1.5 ms in floats (this host); int8(measure=false) quantises it anyway"
    )
    after, _ = compiled(graph, Int8(measure=False), slower)
    assert any(kind(n) == "quantize" for n in after.nodes)


# ---------------------------------------------------------------- options and refusals


def test_no_data_no_int8():
    graph = graph_of(Net(lambda net, x: net.a(x), a=conv(3, 4)))
    with pytest.raises(UsageError, match="--calib"):
        list(Int8().run(graph, Context(CPU, data(graph))))


def test_options_come_from_the_spec_string():
    (one,) = parse("int8(calibration=minmax,ignore=head+layer1.*,reduce_range=true)", {"int8": Int8})
    assert one == Int8(calibration="minmax", ignore=("head", "layer1.*"), reduce_range=True)
    for wrong in ("calibration=max", "percentile=30", "reduce_range=7"):
        with pytest.raises(UsageError):
            parse(f"int8({wrong})", {"int8": Int8})


def test_options_do_what_they_say():
    graph = graph_of(Net(lambda net, x: net.b(net.a(x).relu()), a=conv(3, 4), b=conv(4, 4)))
    default, _ = compiled(graph, Int8(calibration="percentile"))
    extremes, (*_, outcome) = compiled(graph, Int8(calibration="minmax"))
    cut, _ = compiled(graph, Int8(calibration="percentile", percentile=99.0))
    scales = [[n.args[1] for n in g.nodes if kind(n) == "quantize"] for g in (cut, default, extremes)]
    assert all(a < b <= c for a, b, c in zip(*scales, strict=True))
    assert outcome.facts["calibration"] == "extremes of 128 samples" and "few" not in outcome.facts
    seven, _ = compiled(graph, Int8(reduce_range=True))
    assert [g.tensors["a.weight_int8"].abs().max() for g in (default, seven)] == [127, 64]
    old, _ = compiled(graph, ctx=context(graph, TARGETS["cpu-avx2"]))
    assert torch.equal(old.tensors["a.weight_int8"], seven.tensors["a.weight_int8"])
    part, (*_, outcome) = compiled(graph, Int8(ignore=("b",)))
    assert [d.reason for d in outcome.declines] == ["left float as asked"] and "b.weight" in part.tensors
    first, _ = compiled(graph, Int8(equalise=False), context(graph, limit=1))
    assert "a.weight_int8" in first.tensors and "b.weight" in first.tensors


@pytest.mark.parametrize(
    ("end", "loud", "worst"),
    [
        (lambda x: x, slice(None, None, 8), "percentile"),
        (lambda x: x, slice(100, None, 16), "percentile"),
        (nn.functional.hardtanh, slice(None, None, 8), "minmax"),
    ],
    ids=["far", "far and late", "clipped"],
)
def test_auto_takes_the_ranges_that_leave_the_outputs_least_noise(end, loud, worst):
    # far values matter where they reach the output, in late samples too, and not where they are clipped on the way
    graph = graph_of(Net(lambda net, x: end(net.b(net.a(x).relu())), a=conv(3, 4), b=conv(4, 4)))
    few = [torch.randn(128, 3, 16, 16)]
    few[0][loud, :, ::5, ::7] *= 100
    ctx = dataclasses.replace(context(graph), calibration=open_data([tuple(few)], graph.inputs))
    plain = {"equalise": False, "rounding": "nearest", "percentile": 99.9, "measure": False}
    made = {
        name: compiled(graph, Int8(calibration=name, **plain), ctx)
        for name in ("minmax", "percentile", "mse")
    }
    heard = [batch.inputs[0] for batch in ctx.calibration]
    noise = {
        name: sum(float((one.run(x)[0] - graph.run(x)[0]).square().sum()) for x in heard)
        for name, (one, _) in made.items()
    }
    auto, _ = compiled(graph, Int8(**plain), ctx)
    best = min(noise, key=lambda name: noise[name])
    assert made[best][0].text() == auto.text()
    assert noise[worst] > 1.5 * noise[best]


def test_few_samples_take_extremes_and_scale_no_convolutions():
    graph = graph_of(Net(lambda net, x: net.b(net.a(x).relu()), a=conv(3, 4), b=conv(4, 4)))
    few = dataclasses.replace(context(graph), calibration=data(graph, 32))
    after, (_, equalised, *_, outcome) = compiled(graph, ctx=few)
    assert outcome.facts["calibration"] == "extremes of 32 samples" and "few" in outcome.facts
    assert "32 samples do not know how far each channel goes" in equalised.declines[0].reason
    asked, (*_, outcome) = compiled(graph, Int8(calibration="percentile", percentile=99.0), few)
    assert outcome.facts["calibration"] == "99 % percentiles of 32 samples"
    steps = [[n.args[1] for n in g.nodes if kind(n) == "quantize"] for g in (asked, after)]
    assert all(a < b for a, b in zip(*steps, strict=True))


def test_symmetric_pairs_for_tensorrt(tmp_path):
    graph = graph_of(Net(lambda net, x: F.relu(net.b(F.relu(net.a(x)))), a=conv(3, 4), b=conv(4, 4)))
    after, _ = compiled(graph, ctx=context(graph, GPU))
    pairs = [n for n in after.nodes if kind(n) == "quantize"]
    assert len(pairs) == 2 and all(n.args[2:] == (0, -128, 127, torch.int8) for n in pairs)
    assert after.tensors["a.bias"].dtype == torch.float32
    seen, _ = in_runtime(after, tmp_path, graph.example[0])
    assert noise(graph.run(*graph.example)[0], seen) > 30


def test_the_pipeline_holds_the_pass_to_its_contracts():
    graph = graph_of(
        Net(
            lambda net, x: net.b(net.n(net.a(x)).relu()).mean((2, 3)),
            a=conv(3, 4),
            n=nn.BatchNorm2d(4),
            b=conv(4, 4),
        )
    )
    pipeline = Pipeline([Int8()], {"fold": Fold, "int8": Int8})
    assert pipeline.inserted == ["fold"]
    rows = pipeline.run(graph, context(graph))
    assert [(r.name, r.status) for r in rows[1:]] == [("fold", "proved"), ("int8", "proved")]
    assert rows[-1].bytes < rows[0].bytes / 2


# ---------------------------------------------------------------- a trained model


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the trained models are not beside the checkout")
def test_resnet20_keeps_its_accuracy_and_is_all_integer(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SHARED / "models"))
    cifar = __import__("cifar_resnet")
    model, images, labels = cifar.load("resnet20")
    graph = capture(model, images[:2])
    calibration = open_data([(cifar.calibration(256)[0],)], graph.inputs)
    Fold().run(graph, Context(CPU, calibration))
    after, _ = compiled(graph, ctx=Context(CPU, calibration, calibration))
    (expected,), (simulated,) = graph.run(images), after.run(images)
    seen, operators = in_runtime(after, tmp_path, images)
    assert operators["QLinearConv"] == 21 and operators["QLinearAdd"] == 9 and operators["QGemm"] == 1
    assert not runtime.float_operators_inside(tmp_path / "model.onnx")
    assert noise(expected, seen) > 28 and noise(simulated, seen) > 35
    top1 = [float((logits.argmax(1) == labels).float().mean()) for logits in (expected, seen)]
    assert top1[0] == pytest.approx(0.9225) and top1[1] > top1[0] - 0.005
    sys.modules.pop("cifar_resnet")


# ---------------------------------------------------------------- budgets


def loud() -> Graph:
    """Three layers; between the first two lies a channel that is huge, and that nobody reads."""
    net = Net(lambda net, x: net.c(F.silu(net.b(F.silu(net.a(x))))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))
    graph = graph_of(net)
    constants = {n.target: n for n in graph.nodes if n.op == "get_attr"}
    graph.set_tensor(constants["a.bias"], torch.where(torch.arange(8) == 3, 300.0, 0.0))
    unread = graph.tensors["b.weight"] * (torch.arange(8) != 3).reshape(1, -1, 1, 1)
    graph.set_tensor(constants["b.weight"], unread)
    return graph


def test_a_budget_keeps_the_loudest_float():
    graph = loud()
    (inputs,) = next(iter(data(graph, 32))).inputs
    expected = graph.run(inputs)[0]
    plain, _ = compiled(graph)
    before = noise(expected, plain.run(inputs)[0])
    after, (*_, outcome) = compiled(graph, Int8(sqnr=before + 6))
    assert noise(expected, after.run(inputs)[0]) > before + 4
    assert 0 < len(outcome.facts["kept_float"]) < 3
    assert outcome.facts["sqnr"]["held_out_db"] >= before + 6
    kept = [d for d in outcome.declines if d.reason == "left float for the budget"]
    assert len(kept) == len(outcome.facts["kept_float"])
    _, (*_, outcome) = compiled(graph, Int8(sqnr=before - 10))
    assert not outcome.facts["kept_float"]


def test_a_budget_that_integers_cannot_keep_leaves_floats():
    graph = loud()
    after, (*_, outcome) = compiled(graph, Int8(sqnr=200.0))
    assert not any(kind(n) == "quantize" for n in after.nodes) and len(outcome.facts["kept_float"]) == 3


def test_a_metric_may_fall_so_far():
    graph = loud()
    (inputs,) = next(iter(data(graph, 32))).inputs
    expected = graph.run(inputs)[0]

    def score(found: Graph) -> float:
        return min(100.0, noise(expected, found.run(inputs)[0]))

    before = score(compiled(graph)[0])
    _, (*_, outcome) = compiled(graph, Int8(max_drop=100 - before - 6), context(graph, evaluate=score))
    assert outcome.facts["metric"]["after"] >= before + 6 and outcome.facts["kept_float"]
    with pytest.raises(UsageError, match="--eval"):
        compiled(graph, Int8(max_drop=1.0))


# ---------------------------------------------------------------- without data


def test_products_of_matrices_need_no_data(tmp_path):
    def forward(net, x):
        return net.norm(x + net.down(F.gelu(net.up(x)))).mean(1) @ net.head

    net = Net(forward, up=nn.Linear(32, 64), down=nn.Linear(64, 32), norm=nn.LayerNorm(32))
    net.head = nn.Parameter(torch.randn(32, 4))
    graph = graph_of(net, 4, 12, 32)
    held = data(graph, 8)
    after, (outcome,) = compiled(graph, ctx=Context(CPU, held, None))
    assert outcome.facts["integer"] == {"linear": 2, "matmul": 1}
    assert "no calibration data" in outcome.facts["scheme"]
    (inputs,) = next(iter(held)).inputs
    file = emit(after, tmp_path / "model.onnx", dialect=CPU.dialect).path
    (seen, *_) = runtime.run(runtime.session(file, threads=1, exact=True), [inputs.numpy()])
    simulated = after.run(inputs)[0]
    assert noise(simulated, torch.from_numpy(seen)) > 40 and noise(graph.run(inputs)[0], simulated) > 30
    asked, (outcome,) = compiled(graph, Int8(scheme="dynamic"))
    assert asked.fingerprint() == after.fingerprint() and "as asked" in outcome.facts["scheme"]


def test_convolutions_need_data():
    graph = graph_of(Net(lambda net, x: net.a(x).relu().mean((2, 3)), a=conv(3, 4)))
    with pytest.raises(UsageError, match="--calib"):
        compiled(graph, ctx=Context(CPU, data(graph, 8), None))


@pytest.mark.parametrize("size", [(1, 4), (7, 1)])
def test_dynamic_rounding_is_that_of_onnx(tmp_path, size):
    """Ranges above and below 0, and nothing but zeros."""
    graph = graph_of(Net(lambda net, x: net.a(x), a=nn.Linear(size[1], 3)), 4, *size)
    after, _ = compiled(graph, Int8(scheme="dynamic"))
    file = emit(after, tmp_path / "model.onnx", dialect=CPU.dialect).path
    session = runtime.session(file, threads=1, exact=True)
    for low, high in ((0.5, 2), (-3, -1), (-1, 1), (0, 0)):
        inputs = torch.empty(2, *size).uniform_(low, high, generator=torch.Generator().manual_seed(0))
        (seen,) = runtime.run(session, [inputs.numpy()])
        assert torch.allclose(torch.from_numpy(seen), after.run(inputs)[0], atol=1e-5)


def test_tables_of_embeddings_are_stored_as_integers(tmp_path):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.few = nn.Embedding(2048, 64, padding_idx=0), nn.Embedding(8, 64)
            self.up = nn.Linear(64, 64)

        def forward(self, ids):
            return self.up(self.words(ids) + self.few(ids % 8)).mean(1)

    torch.manual_seed(0)
    ids = torch.randint(0, 2048, (4, 12))
    graph = capture(Text().eval(), ids)
    held = open_data([(ids,)], graph.inputs)
    after, (outcome,) = compiled(graph, ctx=Context(CPU, held, None))
    assert [r.site for r in outcome.rewrites if "table" in r.what] == ["words"]
    assert after.tensors["words.weight_int8"].dtype == torch.int8 and "few.weight" in after.tensors
    file = emit(after, tmp_path / "model.onnx", dialect=CPU.dialect)
    assert file.bytes < 2048 * 64 * 2
    (seen,) = runtime.run(runtime.session(file.path, threads=1, exact=True), [ids.numpy()])
    assert noise(after.run(ids)[0], torch.from_numpy(seen)) > 40
    assert noise(graph.run(ids)[0], after.run(ids)[0]) > 30
    kept, _ = compiled(graph, Int8(ignore=("words",)), Context(CPU, held, None))
    assert "words.weight" in kept.tensors


# ---------------------------------------------------------------- data and weights as they should not be


def small() -> Net:
    def forward(net, x):
        return net.head(F.relu(net.b(F.relu(net.a(x)))).mean((2, 3)))

    torch.manual_seed(0)
    return Net(forward, a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 5)).eval()


def constant_channel(net, x):
    x[:, 1] = 0.5


def nothing(net, x):
    x.zero_()


def tiny(net, x):
    x *= 1e-38


def all_dead(net, x):
    net.a.bias.fill_(-1e3)


def dead_channels(net, x):
    net.a.weight[2], net.a.bias[2] = 0, 0
    net.a.weight[3] *= 1e-30


def huge_inside(net, x):
    net.a.weight *= 1e12
    net.b.weight *= 1e-12


def one_sample(net, x):
    x.resize_(1, *x.shape[1:])


@pytest.mark.parametrize(
    "spoil", [constant_channel, nothing, tiny, all_dead, dead_channels, huge_inside, one_sample]
)
def test_odd_data_and_odd_weights_give_finite_numbers(tmp_path, spoil):
    net, x = small(), torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        spoil(net, x)
    graph = capture(net, torch.randn(4, 3, 16, 16))
    samples = open_data([(x,)], graph.inputs)
    ctx, plain = Context(CPU, samples, samples), {"rounding": "nearest", "equalise": False}
    after, (*_, outcome) = compiled(graph, ctx=ctx)
    seen, _ = in_runtime(after, tmp_path, x)
    assert seen.isfinite().all() and noise(after.run(x)[0], seen) > 100
    assert f"know {len(x)} samples" in outcome.facts["few"]
    others = [Int8(calibration=m, **plain) for m in ("percentile", "minmax", "average", "mse", "entropy")]
    for made in (after, *(compiled(graph, config, ctx)[0] for config in others)):
        assert (
            noise(graph.run(x)[0], made.run(x)[0]) > 25
        )  # of rounding to 8 bits; a wrong scale would leave none


def test_data_and_weights_without_a_number_are_named():
    graph = capture(small(), torch.randn(4, 3, 16, 16))
    for value in (float("nan"), float("inf")):
        x = torch.randn(16, 3, 16, 16)
        x[3, 0, 0, 0] = value
        with pytest.raises(DataError, match="input 'x' holds NaN or infinite"):
            open_data([(x,)], graph.inputs)
    net = small()
    with torch.no_grad():
        net.a.weight *= 1e37
    with pytest.raises(DataError, match="samples 0 to .* give NaN or infinite values at avg_pool2d"):
        compiled(capture(net, torch.randn(4, 3, 16, 16)))


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("options", [{"scheme": "dynamic"}, {"scheme": "weight"}, {}])
def test_a_budget_that_nothing_measures_is_refused(options):
    graph = graph_of(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), 4, 8)
    samples = data(graph)
    ctx = dataclasses.replace(context(graph), calibration=samples if options else None)
    with pytest.raises(UsageError, match=r"int8\(sqnr=90\): a budget needs calibration data"):
        compiled(graph, Int8(sqnr=90, **options), ctx)


def test_integers_between_floats_must_pay_too():
    """All in integers would be faster; what the budget leaves of them is not, and all stays float."""
    graph = loud()
    (inputs,) = next(iter(data(graph, 32))).inputs
    plain, _ = compiled(graph)
    asked = noise(graph.run(inputs)[0], plain.run(inputs)[0]) + 6

    def clock(*trials: Graph) -> list[float]:
        """The more ways in and out, the slower, unless nothing is float."""
        layers = [sum(kind(n) == "quantize" for n in trial.nodes) for trial in trials]
        return [3.0 if not n else 1.0 if n == max_quantisers else 3.5 for n in layers]

    max_quantisers = sum(kind(n) == "quantize" for n in plain.nodes)
    after, (*_, outcome) = compiled(graph, Int8(sqnr=asked), context(graph, measure=clock))
    assert not any(kind(n) == "quantize" for n in after.nodes) and not outcome.rewrites
    assert outcome.declines[0].reason == (
        "left float for the budget, it is not faster: 3.5 ms in integers, 3 ms in floats (this host); "
        "int8(measure=false) quantises it anyway"
    )
    quick = context(graph, measure=lambda *trials: [1.0] * (len(trials) - 1) + [3.0])
    after, (*_, outcome) = compiled(graph, Int8(sqnr=asked), quick)
    assert any(kind(n) == "quantize" for n in after.nodes) and outcome.facts["int8_ms"] == 1.0


def test_tables_count_against_a_budget():
    """One column is a hundred times as loud as the others, and rows have one scale."""
    torch.manual_seed(0)
    table = nn.Embedding(2000, 64)
    with torch.no_grad():
        table.weight[:, 0] *= 100
    net = Net(lambda net, ids: net.b(F.relu(net.a(net.table(ids)[..., 1:]))), table=table, a=nn.Linear(63, 32),
              b=nn.Linear(32, 8))  # fmt: skip
    graph = capture(net.eval(), torch.randint(0, 2000, (4, 6)))
    drawn = torch.randint(0, 2000, (160, 6), generator=torch.Generator().manual_seed(1))
    samples = open_data([(drawn,)], graph.inputs)
    found = {}
    for asked in (None, 30.0):
        config = Int8(sqnr=asked, equalise=False, rounding="nearest", measure=False)
        after, (*_, outcome) = compiled(graph, config, Context(CPU, samples, samples))
        found[asked] = noise(graph.run(drawn)[0], after.run(drawn)[0])
        integers = {t.dtype for t in after.tensors.values()}
        assert (outcome.facts.get("tables"), torch.int8 in integers) == (
            ("float, for the budget", True) if asked else (None, True)
        )
    assert found[None] < 25 < 30 < found[30.0]
