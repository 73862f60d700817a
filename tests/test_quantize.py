"""Integers for floats: scales and zero points at their limits, calibration, and where Q/DQ pairs stand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import Net, conv, noise
from torch import Tensor, nn
from torch.nn import functional as F

from compressor import pieces, quantize
from compressor.batches import Batch
from compressor.capture import capture
from compressor.data import batch_for
from compressor.errors import DataError, UnsupportedError, UsageError
from compressor.ir import Graph
from compressor.names import operator_name
from compressor.ops import kind
from compressor.place import Placement, place
from compressor.quantize import (
    calibrate,
    fake_quantise,
    insert_pairs,
    percentile,
    quantise_bias,
    quantise_weight,
    room_for_bias,
    tensor_params,
    weight_scales,
)
from compressor.target import QLINEAR, QuantSpec

SYMMETRIC = QuantSpec(activation="s8")


def graph_of(model: nn.Module, *shape: int) -> Graph:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return capture(model.eval(), torch.randn(shape or (4, 3, 8, 8)))


def quantised(graph: Graph, spec: QuantSpec = QLINEAR, **options) -> tuple[Graph, Placement]:
    """A copy with pairs, calibrated on the graph's example."""
    copy = graph.copy()
    batches = [Batch(copy.example)]
    ranges = calibrate(copy, place(copy, spec, **options).owner, batches)
    plan = place(copy, spec, ranges, **options)
    insert_pairs(plan, ranges)
    copy.clean()
    copy.check()
    return copy, plan


def pairs(graph: Graph) -> int:
    return sum(kind(n) == "quantize" for n in graph.nodes)


def integers(plan: Placement) -> list[str]:
    return sorted(operator_name(n).split(".")[1] for n in plan.operators)


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize(
    ("low", "high", "spec", "zero_point"),
    [
        (0.0, 6.0, QLINEAR, 0),
        (2.0, 6.0, QLINEAR, 0),  # the range is widened to 0
        (-1.0, 3.0, QLINEAR, 64),
        (-5.0, -1.0, QLINEAR, 255),
        (-1.0, 3.0, SYMMETRIC, 0),
        (-1e30, 1e30, QLINEAR, 128),
        (0.0, 1e-30, QLINEAR, 0),
        (0.0, 0.0, QLINEAR, 0),
    ],
)
def test_a_round_trip_errs_by_half_a_step_and_keeps_zero(low, high, spec, zero_point):
    params = tensor_params(low, high, spec)
    assert params.zero_point == zero_point and params.scale >= 2.0**-60
    values = torch.linspace(min(low, 0), max(high, 0), 1001)
    error = (fake_quantise(values, params) - values).abs().max()
    assert error <= 0.5001 * params.scale
    wrong = replace(
        params, zero_point=params.zero_point - 9 if params.zero_point > 99 else params.zero_point + 9
    )
    if high > 1e-20:
        assert (fake_quantise(values, wrong) - values).abs().max() > 2 * params.scale
    assert not fake_quantise(torch.zeros(1), params).any()


@pytest.mark.parametrize("high", [6.0, 0.1, 1 / 3, 255.0, 17.123])
def test_no_integer_stands_for_more_than_the_range(high):
    scale = tensor_params(0.0, high, QLINEAR).scale
    product = torch.tensor(scale, dtype=torch.float32) * 255
    assert product <= torch.tensor(high, dtype=torch.float64)
    assert product > 0.999999 * high


def test_weights_have_a_scale_for_each_output_channel():
    weight = torch.randn(5, 3, 2, 2) * torch.tensor([1.0, 100.0, 1e-4, 0.0, 1.0])[:, None, None, None]
    scales = weight_scales(weight, 0, QLINEAR)
    restored = quantise_weight(weight, scales, 0, QLINEAR) * scales[:, None, None, None]
    assert ((restored - weight).abs() <= 0.5001 * scales[:, None, None, None]).all()
    assert scales[3] == 1 and not restored[3].any()
    one = torch.full((5,), float(scales.max()))  # one scale for all would lose the small channels
    assert noise(weight[2], (quantise_weight(weight, one, 0, QLINEAR) * one[0])[2]) < 1
    assert noise(weight[2], restored[2]) > 35
    across = weight_scales(weight.transpose(0, 1), 1, QLINEAR)
    assert torch.equal(across, scales)


def test_seven_bits_keep_two_products_inside_sixteen():
    weight = torch.randn(4, 9)
    narrow = replace(QLINEAR, reduce_range=True)
    for spec, limit in ((QLINEAR, 127), (narrow, 64)):
        found = quantise_weight(weight, weight_scales(weight, 0, spec), 0, spec).int().abs().max()
        assert found == limit
    assert 2 * 255 * 64 < 2**15 < 2 * 255 * 127


def test_a_bias_on_dead_weights_keeps_its_value():
    weight = torch.zeros(2, 4)
    weight[1] = 1e-12
    bias = torch.tensor([3.0, -7.0])
    scales = weight_scales(weight, 0, QLINEAR)
    roomy = room_for_bias(scales, bias, 1e-3)
    restored = quantise_bias(bias, roomy * 1e-3) * (roomy * 1e-3).double()
    assert torch.allclose(restored.float(), bias, rtol=1e-3)
    clipped = quantise_bias(bias, scales * 1e-3) * (scales * 1e-3).double()
    assert abs(float(clipped[1]) + 7) > 6.9  # without room the second saturates


# ---------------------------------------------------------------- calibration


def relu(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(x).relu())


def test_ranges_are_those_of_all_batches():
    graph = graph_of(Net(relu, a=conv(3, 4), b=conv(4, 2)))
    batches = [Batch((torch.randn(n, 3, 8, 8),)) for n in (3, 5, 2)]
    nodes = place(graph, QLINEAR).owner
    ranges = calibrate(graph, nodes, batches)
    whole = torch.cat([b.inputs[0] for b in batches])
    for node, value in graph.values(whole):
        if node in nodes:
            assert ranges[node] == pytest.approx((float(value.min()), float(value.max())), rel=1e-5)
    assert ranges != calibrate(graph, nodes, batches[:2])
    counted: list[int] = []
    cut = calibrate(graph, nodes, batches, percentile(99.0), counted.append)
    assert all(cut[n][1] < ranges[n][1] for n in nodes) and counted == [3, 5, 2]


def test_data_without_a_range_is_refused_by_name():
    graph = graph_of(Net(lambda net, x: net.b(net.a(x).log()), a=conv(3, 4), b=conv(4, 2)))
    with pytest.raises(
        DataError, match=r"samples 0 to 3 give NaN or infinite values at log \(aten.log.default\)"
    ):
        calibrate(graph, place(graph, QLINEAR).owner, [Batch(graph.example)])
    with pytest.raises(DataError, match="empty"):
        calibrate(graph, graph.nodes, [])


def test_weights_without_a_range_are_refused_by_name():
    graph = graph_of(Net(relu, a=conv(3, 4), b=conv(4, 2)))
    node = next(n for n in graph.nodes if n.name == "b_weight")
    graph.set_tensor(node, graph.tensor(node) * float("nan"))
    plan = place(graph, QLINEAR)
    with pytest.raises(UnsupportedError, match=r"b\.weight holds NaN"):
        insert_pairs(plan, {value: (0.0, 1.0) for value in plan.owner})


# ---------------------------------------------------------------- placement


def test_a_convolution_before_and_after():
    graph = graph_of(Net(lambda net, x: net.a(x).relu(), a=conv(3, 4)))
    after, _ = quantised(graph)
    lines = [line.split(" = ")[1] for line in after.text().splitlines() if " = " in line]
    operators = [line.split("(")[0] for line in lines if "(" in line]
    assert operators == [
        "quantized_decomposed.quantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_channel.default",
        "quantized_decomposed.dequantize_per_channel.default",
        "aten.conv2d.default",
        "aten.relu.default",
        "quantized_decomposed.quantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_tensor.default",
    ]
    assert after.tensors["a.weight_int8"].dtype == torch.int8
    assert after.tensors["a.bias_int32"].dtype == torch.int32
    assert "a.weight" not in after.tensors
    (expected,), (seen,) = graph.run(*graph.example), after.run(*graph.example)
    assert noise(expected, seen) > 35
    scale = after.node("a_weight_scale")
    after.set_tensor(scale, after.tensor(scale).roll(1))  # scales of the wrong channels
    assert noise(expected, after.run(*graph.example)[0]) < 20


def residual(net: Net, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    return net.c((net.b(y) + y).relu())


def test_a_residual_sum_is_integer_and_every_value_has_one_quantiser():
    graph = graph_of(Net(residual, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4)))
    after, plan = quantised(graph)
    assert integers(plan) == ["add", "conv2d", "conv2d", "conv2d"]
    assert (
        pairs(after) == 5
    )  # x, relu, b, relu of the sum, c: the first relu has two readers and one quantiser
    readers = [n for n in after.nodes if kind(n) in ("conv", "add")]
    assert all(kind(a) == "dequantize" for n in readers for a in n.all_input_nodes)


def test_a_float_operand_keeps_a_sum_float():
    graph = graph_of(Net(lambda net, x: net.b(net.a(x) + x.cos()), a=conv(3, 3), b=conv(3, 4)))
    _, plan = quantised(graph)
    assert integers(plan) == ["conv2d", "conv2d"]
    assert [(n.name, why) for n, why in plan.declines] == [
        ("add", "it also reads aten.cos.default, which is float")
    ]


def test_integers_pass_through_pooling_and_reshaping_with_their_scale():
    def forward(net, x):
        return net.l(F.max_pool2d(net.a(x).relu(), 2).flatten(1))

    graph = graph_of(Net(forward, a=conv(3, 4), l=nn.Linear(64, 5)))
    after, plan = quantised(graph)
    params = [n.args[1:3] for n in after.nodes if kind(n) == "quantize"]
    assert len(params) == 4 and len(set(params)) == 2  # x; relu, pool, flatten
    assert {plan.owner[n].name for n in plan.owner} == {"x", "relu"}


def test_what_no_integer_operator_reads_is_not_quantised_again():
    graph = graph_of(Net(lambda net, x: net.a(x).flatten(1).softmax(1), a=conv(3, 4)))
    after, _ = quantised(graph)
    assert pairs(after) == 2  # x and the convolution's output; flatten reads floats


def test_a_split_hands_on_its_parts():
    def forward(net, x):
        left, right = net.a(x).relu().chunk(2, 1)
        return net.b(left), right.exp()

    graph = graph_of(Net(forward, a=conv(3, 8), b=conv(4, 4)))
    after, plan = quantised(graph)
    assert pairs(after) == 5  # x, relu, both parts, b
    assert len({plan.owner[n] for n in plan.owner}) == 3


def test_what_no_layer_reads_stays_float():
    def forward(net, x):
        joined = torch.cat([net.a(x), net.b(x)], 1)
        return torch.cat([joined.sigmoid(), net.a(x) + net.b(x)], 1), net.c(torch.cat([net.a(x), x], 1))

    _, plan = quantised(graph_of(Net(forward, a=conv(3, 4), b=conv(3, 4), c=conv(7, 2))))
    assert integers(plan).count("cat") == 1
    assert (
        sum(why == "no layer reads its result in integers" for _, why in plan.declines) == 2
    )  # a cat and a sum


def test_a_mean_over_a_distribution_stays_float():
    def forward(net, x):
        shares = net.a(x).flatten(2).unflatten(1, (2, 4)).transpose(1, 2).softmax(1)
        return net.bins(shares)

    _, plan = quantised(graph_of(Net(forward, a=conv(3, 8), bins=conv(4, 1, 1))))
    assert integers(plan) == ["conv2d"] and "averages over a distribution" in plan.declines[0][1]


@pytest.mark.parametrize(("factor", "shared"), [(1.0, True), (4.0, True), (40.0, False)])
def test_a_concat_shares_one_scale_unless_its_operands_differ_too_much(factor, shared):
    def forward(net, x):
        joined = torch.cat([net.a(x), net.b(x)], 1)
        return joined, net.c(joined)

    graph = graph_of(Net(forward, a=conv(3, 4), b=conv(3, 4), c=conv(8, 2)))
    for name in ("a_weight", "a_bias"):
        graph.set_tensor(graph.node(name), graph.tensor(graph.node(name)) * factor)
    after, plan = quantised(graph)
    assert ("cat" in integers(plan)) == shared
    assert any("their" in why or "span" in why for _, why in plan.declines) == (not shared)
    (expected, _), (seen, _) = graph.run(*graph.example), after.run(*graph.example)
    assert noise(expected[:, 4:], seen[:, 4:]) > 25  # the narrow part
    if not shared:
        ranges = calibrate(graph, place(graph, QLINEAR).owner, [Batch(graph.example)])
        insert_pairs(place(graph, QLINEAR), ranges)  # the placement that does not look at ranges
        ruined, _ = graph.run(*graph.example)
        assert noise(expected[:, 4:], ruined[:, 4:]) < 15 and noise(expected, ruined) > 30


def test_only_activations_that_clip_at_zero_disappear():
    for activation, alone in (
        (nn.ReLU6(), 2),
        (nn.Hardtanh(0, 4), 2),
        (nn.Hardtanh(-1, 1), 3),
        (nn.SiLU(), 3),
    ):
        graph = graph_of(Net(lambda net, x: net.b(net.f(net.a(x))), a=conv(3, 4), f=activation, b=conv(4, 4)))
        assert pairs(quantised(graph)[0]) == alone + 1, activation


def test_three_axes_keep_a_float_bias_and_a_float_output():
    def forward(net, x):
        return net.b(F.gelu(net.a(x))) + x

    model = Net(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 8))
    after, plan = quantised(graph_of(model, 4, 5, 8))
    assert pairs(after) == 2 and integers(plan) == ["linear", "linear"]
    assert "a.bias" in after.tensors and "a.bias_int32" not in after.tensors
    assert {n.name for n in after.node("add").all_input_nodes} == {"linear_1", "x"}
    flat, _ = quantised(graph_of(model, 4, 8))
    assert "a.bias_int32" in flat.tensors


def test_products_with_a_constant_on_the_right():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return (
                torch.addmm(self.b, x, self.w),
                x @ self.w,
                x @ x.t(),
                torch.addmm(self.b, x, self.w, alpha=2),
            )

    graph = graph_of(Products(), 8, 8)
    after, plan = quantised(graph)
    assert integers(plan) == ["addmm", "matmul"]
    assert sorted(why for _, why in plan.declines) == [
        "both its operands change from sample to sample",
        "it scales its operands by alpha or beta",
    ]
    assert after.tensors["w_scale"].shape == (6,)
    for expected, seen in zip(graph.run(*graph.example), after.run(*graph.example), strict=True):
        assert noise(expected, seen) > 35


def test_a_shared_weight_is_stored_once():
    layer = conv(3, 3)
    after, _ = quantised(graph_of(Net(lambda net, x: net.a(net.a(x).relu()), a=layer)))
    assert [t for t in after.tensors if "weight_int8" in t] == ["a.weight_int8"]


def test_near_misses_stay_float():
    graph = graph_of(Net(lambda net, x: F.conv2d(x, net.a.weight.tanh()), a=conv(3, 4)))
    assert [why for _, why in place(graph, QLINEAR).declines] == [
        "both its operands change from sample to sample"
    ]
    double = capture(conv(3, 4).double(), torch.randn(2, 3, 8, 8).double())
    assert [why for _, why in place(double, QLINEAR).declines] == [
        "it computes in f64; integers are made from f32"
    ]
    once, _ = quantised(graph_of(Net(relu, a=conv(3, 4), b=conv(4, 2))))
    twice, plan = quantised(once)
    assert not plan.operators and pairs(once) == pairs(twice)
    assert {why for _, why in plan.declines} == {"its weight is quantised already"}


def test_ignored_modules_and_limits():
    graph = graph_of(Net(residual, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4)))
    _, plan = quantised(graph, ignore=("b",))
    assert integers(plan) == ["conv2d", "conv2d"]
    assert ("conv2d_1", "left float as asked") in [(n.name, why) for n, why in plan.declines]
    with pytest.raises(UsageError, match=r"ignore=layer9 matches no operator .* there are a, add, b, c"):
        place(graph, QLINEAR, ignore=("layer9",))
    assert [n.name for n in place(graph, QLINEAR, limit=2).operators] == ["conv2d", "conv2d_1"]


def test_a_provider_that_quantises_inputs_only():
    spec = QuantSpec(activation="s8", bias="float", weighted=frozenset({"conv"}), everywhere=True)
    after, _ = quantised(graph_of(Net(residual, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4))), spec)
    assert pairs(after) == 3  # x, relu, relu of the sum
    assert all(n.args[2] == 0 and n.args[5] == torch.int8 for n in after.nodes if kind(n) == "quantize")
    assert kind(after.node("add").args[1]) == "dequantize"  # the shortcut is read through its quantiser
    assert "a.bias" in after.tensors


def test_channels_stay_together_where_no_view_forbids_it():
    net = Net(lambda net, x: net.b(net.a(x).relu()).sum((2, 3)), a=conv(3, 8), b=conv(8, 4))
    graph = graph_of(net)
    quick = quantize._channels_last(graph, graph.example)
    assert quick is not graph and quick.tensors["b.weight"].is_contiguous(memory_format=torch.channels_last)
    nodes = place(graph, QLINEAR).owner
    found = calibrate(graph, nodes, [Batch(graph.example)])
    for node, value in graph.values(*graph.example):
        if node in found:
            assert found[node] == pytest.approx((float(value.min()), float(value.max())), abs=1e-5)
    viewed = graph_of(Net(lambda net, x: net.a(x).view(x.shape[0], -1), a=conv(3, 8)))
    assert quantize._channels_last(viewed, viewed.example) is viewed


def test_batches_are_small_where_values_are_large():
    graph = graph_of(Net(lambda net, x: net.a(x), a=conv(3, 8)))
    assert batch_for(graph) == 32
    wide = capture(Net(lambda net, x: net.a(x), a=conv(3, 8)).eval(), torch.randn(2, 3, 256, 256))
    assert batch_for(wide) == (1 << 24) // (4 * 8 * 256 * 256)


# ---------------------------------------------------------------- 16 bits, to the end


def test_16_bits_are_256_times_finer():
    coarse, fine = (tensor_params(-1.0, 2.0, replace(QLINEAR, activation=bits)) for bits in ("u8", "u16"))
    assert (fine.low, fine.high, fine.dtype) == (0, 65535, torch.uint16)
    assert coarse.scale / fine.scale == pytest.approx(257, rel=1e-6)
    x = torch.linspace(-1, 2, 4001)
    errors = [(fake_quantise(x, p) - x).abs().max() for p in (coarse, fine)]
    assert errors[1] < errors[0] / 200


def test_integers_go_on_to_the_end_where_asked():
    net = Net(lambda net, x: torch.tanh(net.a(x) + net.b(x)), a=conv(3, 4), b=conv(3, 4))
    graph = graph_of(net)
    fuses = frozenset({"add.Tensor", "tanh.default"})
    plain, whole = (
        quantised(graph, replace(QLINEAR, fuses=fuses, to_the_end=flag))[1] for flag in (False, True)
    )
    assert integers(plain) == ["conv2d", "conv2d"]
    assert integers(whole) == ["add", "conv2d", "conv2d", "tanh"]


@pytest.mark.parametrize("rescales", [True, False])
def test_a_value_has_one_scale_where_the_provider_knows_one(rescales):
    """A hard sigmoid is a sum of its operand's integers at a sixth of their scale, or itself."""
    graph = graph_of(Net(lambda net, x: net.b(F.hardsigmoid(net.a(x))), a=conv(3, 4, 5), b=conv(4, 4)))
    spec = replace(QLINEAR, fuses=frozenset({"hardsigmoid.default"}), rescales=rescales)
    after, _ = quantised(graph, spec)
    scales: dict[object, set[object]] = {}
    for node in after.nodes:
        if operator_name(node).endswith("dequantize_per_tensor.default"):
            scales.setdefault(node.args[0], set()).add(node.args[1])
        elif kind(node) == "quantize":
            scales.setdefault(node, set()).add(node.args[1])
    assert max(map(len, scales.values())) == (2 if rescales else 1)


@pytest.mark.parametrize(("dtype", "zero"), [(torch.uint8, 117), (torch.int8, -3), (torch.uint16, 32768)])
@pytest.mark.parametrize("size", [0, 1, 300_001])
def test_pieces_are_the_same_numbers(dtype, zero, size):
    decomposed = torch.ops.quantized_decomposed
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 3
    x[::7] = 0.0125 * torch.arange(len(x[::7])) % 4  # ties
    facts = (0.025, zero, torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype)
    with torch.no_grad():
        integers = pieces.quantize(x, *facts)
        assert integers.equal(decomposed.quantize_per_tensor.default(x, *facts))
        floats = pieces.dequantize(integers, *facts)
        assert floats.equal(decomposed.dequantize_per_tensor.default(integers, *facts))
        assert pieces.kernel(decomposed.quantize_per_tensor.default, (x,), {}) is pieces.quantize
        assert pieces.kernel(torch.ops.aten.relu.default, (x,), {}) is torch.ops.aten.relu.default
    assert pieces.kernel(decomposed.quantize_per_tensor.default, (x,), {}) is not pieces.quantize
