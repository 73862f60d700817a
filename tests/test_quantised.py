"""Models that come quantised: their scales and integers are those of the emitted model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from nets import Net, conv, noise
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from compressor import runtime
from compressor.capture import capture
from compressor.data import open_data
from compressor.emit import emit
from compressor.errors import UnsupportedError, UsageError
from compressor.ir import Graph
from compressor.ops import kind
from compressor.pipeline import Context, Outcome
from passes.fold import Fold
from passes.int8 import Int8
from targets.cpu import CPU, CPU_AVX2
from targets.gpu import GPU

qd = torch.ops.quantized_decomposed
SCALES = {"x": (0.03, 120), "a": (0.02, 0), "sum": (0.05, 7), "pooled": (0.01, 3), "out": (0.004, 128)}


def pair(x: Tensor, name: str, low: int = 0, high: int = 255, dtype: torch.dtype = torch.uint8) -> Tensor:
    rest = (*SCALES[name], low, high, dtype)
    return qd.dequantize_per_tensor(qd.quantize_per_tensor(x, *rest), *rest)


class Stored(nn.Module):
    """A weight as integers, -128 among them, behind a dequantiser."""

    def __init__(self, shape: tuple[int, ...], seed: int):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("integers", torch.randint(-128, 128, shape, generator=draw).to(torch.int8))
        self.register_buffer("scale", torch.rand(shape[0], generator=draw) * 0.002 + 0.001)
        self.register_buffer("zero", torch.zeros(shape[0], dtype=torch.int64))

    def forward(self) -> Tensor:
        return qd.dequantize_per_channel(self.integers, self.scale, self.zero, 0, -128, 127, torch.int8)


def as_pairs(net, x):
    """What `convert_pt2e` leaves."""
    a = pair(F.relu(F.conv2d(pair(x, "x"), net.a(), padding=1)), "a")
    b = pair(a + pair(F.conv2d(a, net.b(), padding=1), "sum"), "sum")
    return pair(F.linear(pair(b.mean((2, 3)), "pooled"), net.c()), "out")


def net(forward=as_pairs) -> Net:
    return Net(forward, a=Stored((8, 3, 3, 3), 0), b=Stored((8, 8, 3, 3), 1), c=Stored((5, 8), 2)).eval()


def inputs(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def graph_of(forward=as_pairs) -> Graph:
    return capture(net(forward), inputs(4))


def compiled(
    graph: Graph, config: Int8 | None = None, target=CPU, calibrated: bool = False
) -> tuple[Graph, list[Outcome]]:
    copy = graph.copy()
    data = open_data([(inputs(16),)], graph.inputs)
    outcomes = list((config or Int8()).run(copy, Context(target, data, data if calibrated else None)))
    copy.clean()
    copy.check()
    return copy, outcomes


def said(file: Path) -> tuple[set[tuple[float, int]], list[np.ndarray]]:
    """Scales and zero points of all quantisers, and integer weights."""
    model = onnx.load(file)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    pairs = {
        (round(float(stored[n.input[1]]), 7), int(stored[n.input[2]]))
        for n in model.graph.node
        if n.op_type == "QuantizeLinear"
    }
    return pairs, [a for a in stored.values() if a.dtype == np.int8 and a.ndim > 1]


def test_pairs_and_integers_are_kept_and_need_no_data(tmp_path):
    graph = graph_of()
    after, (apart, *_, outcome) = compiled(graph)
    assert (
        apart.step == "taking integers apart"
        and not outcome.facts["float"]
        and "calibration" not in outcome.facts
    )
    file = emit(after, tmp_path / "model.onnx")
    pairs, weights = said(file.path)
    assert pairs == {pair for name, pair in SCALES.items() if name != "out"}  # which is float again at once
    wanted = {
        tuple(t.flatten().tolist()) for t in graph.tensors.values() if t.dtype == torch.int8 and t.dim() > 1
    }
    assert {tuple(w.flatten().tolist()) for w in weights} == wanted and any(
        (w == -128).any() for w in weights
    )
    operators = runtime.optimized_operators(file.path)
    assert (operators["QLinearConv"], operators["QLinearAdd"], operators["QGemm"]) == (2, 1, 1)
    (seen,) = runtime.run(runtime.session(file.path, threads=1), [inputs(32).numpy()])
    assert noise(graph.run(inputs(32))[0], torch.from_numpy(seen)) > 35
    one_off = 10 ** (-35 / 20)  # a scale that is off by 2 %, for one, would show
    assert one_off < 0.02


def test_what_has_no_scale_needs_data():
    def forward(net, x):
        return F.linear(F.relu(F.conv2d(pair(x, "x"), net.a(), padding=1)).mean((2, 3)), net.c())

    graph = graph_of(forward)
    with pytest.raises(UsageError, match="no range for 3 values, relu for one"):
        compiled(graph)
    after, (*_, outcome) = compiled(graph, calibrated=True)
    assert not outcome.facts["float"] and noise(graph.run(inputs(8))[0], after.run(inputs(8))[0]) > 30
    assert any(kind(n) == "quantize" and n.args[1:3] == SCALES["x"] for n in after.nodes)


def faked(net, x):
    """Fake quantisers, whose weights are floats that training still moved."""
    fake = torch.fake_quantize_per_tensor_affine
    scale = torch.full((8,), 0.01)
    x = fake(x, *SCALES["x"], 0, 255)
    weight = torch.fake_quantize_per_channel_affine(
        net.conv.weight, scale, torch.zeros(8, dtype=torch.int32), 0, -128, 127
    )
    x = fake(F.relu(F.conv2d(x, weight, net.conv.bias)), *SCALES["a"], 0, 255)
    head = fake(net.head.weight, 0.005, 0, -128, 127)
    return fake(F.linear(x.flatten(1), head), *SCALES["out"], 0, 255)


def test_fake_quantisers_are_pairs(tmp_path):
    torch.manual_seed(0)
    graph = capture(Net(faked, conv=nn.Conv2d(3, 8, 8), head=nn.Linear(8, 5)).eval(), inputs(4))
    Fold().run(graph, Context(CPU, open_data([(inputs(4),)], graph.inputs)))
    after, (apart, *_, outcome) = compiled(graph)
    assert len(apart.rewrites) == 5 and not outcome.facts["float"]
    file = emit(after, tmp_path / "model.onnx")
    pairs, weights = said(file.path)
    assert pairs == {SCALES["x"], SCALES["a"]}
    rounded = (graph.tensors["head.weight"] / 0.005).round().clamp(-128, 127).to(torch.int8).numpy()
    assert any(np.array_equal(w, rounded) or np.array_equal(w, rounded.T) for w in weights)
    (seen,) = runtime.run(runtime.session(file.path, threads=1), [inputs(4).numpy()])
    assert noise(graph.run(inputs(4))[0], torch.from_numpy(seen)) > 35


def test_integers_of_another_kind_keep_their_range():
    """Seven bits of somebody else, and a target whose zero points are 0."""

    def forward(net, x):
        return F.linear(pair(x, "x", 0, 127).mean((2, 3)).repeat(1, 3)[:, :8], net.c())

    after, _ = compiled(graph_of(forward), calibrated=True)
    scale, zero = next(n.args[1:3] for n in after.nodes if kind(n) == "quantize")
    assert scale != SCALES["x"][0] and zero != SCALES["x"][1]
    symmetric, _ = compiled(graph_of(), target=GPU, calibrated=True)
    assert {n.args[2] for n in symmetric.nodes if kind(n) == "quantize"} == {0}
    narrow, _ = compiled(graph_of(), target=CPU_AVX2, calibrated=True)
    integers = [t for t in narrow.tensors.values() if t.dtype == torch.int8 and t.dim() > 1]
    assert max(int(t.int().abs().max()) for t in integers) <= 65


def test_a_budget_weighs_the_scales_that_are_there():
    graph = graph_of()
    after, (*_, outcome) = compiled(graph, Int8(sqnr=200), calibrated=True)
    assert outcome.facts["kept_float"] and not any(kind(n) == "quantize" for n in after.nodes)


def test_a_value_that_is_rounded_in_two_ways_keeps_the_second():
    def forward(net, x):
        return F.linear(pair(x, "x").mean((2, 3)).repeat(1, 3)[:, :8] + pair(x, "out").sum(), net.c())

    after, _ = compiled(graph_of(forward), calibrated=True)
    assert sum(kind(n) == "quantize" and n.args[1] == SCALES["out"][0] for n in after.nodes) == 1


def test_a_weight_that_is_rounded_in_two_ways_is_two():
    def forward(net, x):
        a, b = (torch.fake_quantize_per_tensor_affine(net.w.weight, s, 0, -128, 127) for s in (0.01, 0.02))
        return F.linear(x.mean((2, 3)), a) + F.linear(x.amax((2, 3)), b)

    graph = capture(Net(forward, w=nn.Linear(3, 5)).eval(), inputs(4))
    after, (apart, *_) = compiled(graph, calibrated=True)
    assert len(apart.rewrites) == 2 and not any(kind(n) == "fake_quantize" for n in after.nodes)
    assert noise(graph.run(inputs(4))[0], after.run(inputs(4))[0]) > 30


@pytest.mark.parametrize(("zero", "low", "high", "least"), [(0, -8, 7, 35), (7, 0, 15, 30)])
def test_weights_of_four_bits_keep_their_rounding_and_clipping(zero, low, high, least):
    """Their scale alone, on levels of eight bits, is another network: 16 dB."""

    def forward(net, x):
        fake = torch.fake_quantize_per_tensor_affine
        x = fake(x, *SCALES["x"], 0, 255)
        return F.linear(x.mean((2, 3)), fake(net.w.weight, 0.05, zero, low, high))

    torch.manual_seed(0)
    graph = capture(Net(forward, w=nn.Linear(3, 5)).eval(), inputs(4))
    after, _ = compiled(graph, Int8(rounding="nearest", equalise=False), calibrated=True)
    assert noise(graph.run(inputs(4))[0], after.run(inputs(4))[0]) > least
    raw = F.linear(inputs(4).mean((2, 3)), graph.tensors["w.weight"])
    assert noise(graph.run(inputs(4))[0], raw) < least - 10


def test_parts_that_differ_have_the_widest_scale():
    """Two halves of one value, quantised apart: one hands on the integers of the whole, which must not clip it."""

    def forward(net, x):
        fake = torch.fake_quantize_per_tensor_affine
        one, other = F.conv2d(pair(x, "x"), net.a(), padding=1).chunk(2, 1)
        one, other = fake(one, 4 / 255, 0, 0, 255), fake(other, 16 / 255, 0, 0, 255)
        return F.conv2d(torch.cat([one, other], 1), net.b(), padding=1)

    graph = graph_of(forward)
    graph.set_tensor(
        next(n for n in graph.nodes if n.target == "a.integers"), graph.tensors["a.integers"] // 2
    )
    after, (*_, outcome) = compiled(graph, Int8(rounding="nearest"), calibrated=True)
    scales = {round(float(n.args[1]), 5) for n in after.nodes if kind(n) == "quantize"}
    assert round(16 / 255, 5) in scales
    assert any("its scale is not kept" in decline.reason for decline in outcome.declines)
    assert noise(graph.run(inputs(8))[0], after.run(inputs(8))[0]) > 20


def test_bytes_with_a_scale_of_their_own_are_quantised_as_such():
    def forward(net, x):
        y = torch.fake_quantize_per_tensor_affine(x.float(), 200 / 255, 0, 0, 255)
        return F.conv2d(y, net.a(), padding=1)

    drawn = torch.randint(0, 201, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    graph = capture(net(forward), drawn)
    copy, data = graph.copy(), open_data([(drawn,)], graph.inputs)
    list(Int8(rounding="nearest").run(copy, Context(CPU, data, data)))
    assert noise(graph.run(drawn)[0], copy.run(drawn)[0]) > 30


def test_an_exported_program_has_one_mode():
    class Exported(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv(3, 8)

        def forward(self, x):
            return self.a(x)

        def train(self, mode=True):
            raise NotImplementedError("Calling train() or eval() is not supported for exported models.")

    assert capture(Exported(), inputs(2)).run(inputs(2))


def test_quantisers_that_still_observe_are_refused():
    def forward(net, x):
        state = (net.low, net.high, net.scale, net.zero)
        on = torch.ones(1, dtype=torch.int64)
        return torch.fused_moving_avg_obs_fake_quant(x, on, on, *state, 0.01, 0, 255, 0)

    model = Net(forward)
    for name, value in (("low", 0.0), ("high", 0.0), ("scale", 1.0)):
        model.register_buffer(name, torch.full((1,), value))
    model.register_buffer("zero", torch.zeros(1, dtype=torch.int32))
    with pytest.raises(UnsupportedError, match="convert_pt2e"):
        capture(model.eval(), inputs(2))
