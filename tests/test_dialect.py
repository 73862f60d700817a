"""What is said in ONNX Runtime's own words computes the same, and runs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from nets import Net, noise
from torch import nn
from torch.nn import functional as F

from compressor import runtime
from compressor.capture import capture
from compressor.data import open_data
from compressor.emit import emit
from compressor.ir import Graph
from compressor.pipeline import Context
from compressor.target import ONNXRUNTIME
from passes.int8 import Int8
from targets.cpu import CPU


def block(**options: bool) -> Graph:
    """A block of a transformer in integers."""

    def forward(net, x):
        return net.norm(x + net.down(F.gelu(net.up(x))))

    torch.manual_seed(0)
    net = Net(
        forward,
        up=nn.Linear(32, 64, **options),
        down=nn.Linear(64, 32, **options),
        norm=nn.LayerNorm(32),
    )
    graph = capture(net.eval(), torch.randn(4, 12, 32))
    samples = open_data([(torch.randn(32, 12, 32),)], graph.inputs)
    list(Int8(rounding="nearest").run(graph, Context(CPU, samples, samples)))
    return graph


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("fixed", [{}, {"batch": 1}])
@pytest.mark.parametrize("bias", [True, False])
def test_products_take_their_bias_in(tmp_path, bias, fixed):
    graph = block(bias=bias)
    plain = emit(graph, tmp_path / "plain.onnx", fixed=fixed).path
    said = emit(graph, tmp_path / "said.onnx", fixed=fixed, dialect=ONNXRUNTIME).path
    found = operators(said)
    assert found.count("MatMulIntegerToFloat") == 2 and "MatMul" not in found and "Transpose" not in found
    assert found.count("Add") == 0 and found.count("Sum") == 1
    inputs = [torch.randn(1, 12, 32).numpy()]
    first, second = (
        torch.from_numpy(runtime.run(runtime.session(path, threads=1, exact=True), inputs)[0])
        for path in (plain, said)
    )
    assert noise(first, second) > 60
    ran = runtime.optimized_operators(said)
    assert ran["MatMulIntegerToFloat"] == 2 and "SkipLayerNormalization" not in ran and "Gemm" not in ran
    assert said.stat().st_size <= plain.stat().st_size + 256


def test_weights_that_others_read_too_are_stored_once(tmp_path):
    def forward(net, x):
        return net.norm(net.one(x) + F.linear(x + 1, net.one.weight))

    torch.manual_seed(0)
    net = Net(forward, one=nn.Linear(32, 32), norm=nn.LayerNorm(32))
    graph = capture(net.eval(), torch.randn(4, 12, 32))
    samples = open_data([(torch.randn(32, 12, 32),)], graph.inputs)
    list(Int8(rounding="nearest", reduce_range=True).run(graph, Context(CPU, samples, samples)))
    said = emit(graph, tmp_path / "said.onnx", dialect=ONNXRUNTIME).path
    large = [i.name for i in onnx.load(said).graph.initializer if len(i.dims) == 2]
    assert len(large) == 1
    (seen,) = runtime.run(runtime.session(said, threads=1), [graph.example[0].numpy()])
    assert noise(graph.run(graph.example[0])[0], torch.from_numpy(seen)) > 40


@pytest.mark.parametrize("middle", ["conv", "gray", "transposed", "gemm"])
def test_what_stays_float_between_integers_is_float(tmp_path, middle):
    """ONNX Runtime would quantise it by itself, with one scale for all channels of its weight."""

    def forward(net, x):
        x = F.relu(net.middle(F.relu(net.first(x))))
        return net.last(x)

    def flat(net, x):
        return net.last(F.relu(net.middle(F.relu(net.first(x)).flatten(1))))

    layers = {
        "conv": nn.Conv2d(8, 8, 3, padding=1),
        "gray": nn.Conv2d(1, 8, 3, padding=1),
        "transposed": nn.ConvTranspose2d(8, 8, 3, padding=1),
        "gemm": nn.Linear(8 * 64, 8),
    }
    torch.manual_seed(0)
    net = Net(
        flat if middle == "gemm" else forward,
        first=nn.Conv2d(3, 1 if middle == "gray" else 8, 3, padding=1),
        middle=layers[middle],
        last=nn.Linear(8, 8) if middle == "gemm" else nn.Conv2d(8, 8, 3),
    )
    with torch.no_grad():
        net.middle.weight.select(1 if middle == "transposed" else 0, 0).mul_(200)
        net.middle.bias[0] = -1e4  # a channel that is dead, and whose weights are large
    graph = capture(net.eval(), torch.randn(4, 3, 8, 8))
    samples = open_data([(torch.randn(32, 3, 8, 8),)], graph.inputs)
    kept = Int8(rounding="nearest", ignore=() if middle == "transposed" else ("middle",))
    list(kept.run(graph, Context(CPU, samples, samples)))
    assert "middle.weight" in graph.tensors
    inputs = graph.example[0]
    heard = {}
    for name, dialect in (("plain", ()), ("said", ONNXRUNTIME)):
        file = emit(graph, tmp_path / f"{name}.onnx", dialect=dialect).path
        (seen,) = runtime.run(runtime.session(file, threads=1, exact=True), [inputs.numpy()])
        heard[name] = noise(graph.run(inputs)[0], torch.from_numpy(seen))
    assert heard["plain"] < 20 < 40 < heard["said"]


def test_floats_are_said_plainly(tmp_path):
    graph = capture(nn.Linear(8, 8).eval(), torch.randn(2, 4, 8))
    said = emit(graph, tmp_path / "said.onnx", dialect=ONNXRUNTIME).path
    assert all(node.domain == "" for node in onnx.load(said).graph.node)


def test_half_precision_has_no_other_words(tmp_path):
    net = Net(lambda net, x: net.norm(x + net.one(x)), one=nn.Linear(32, 32), norm=nn.LayerNorm(32))
    graph = capture(net.eval().half(), torch.randn(4, 12, 32).half())
    said = emit(graph, tmp_path / "said.onnx", dialect=ONNXRUNTIME).path
    assert "Sum" not in operators(said)
    runtime.run(runtime.session(said, threads=1, exact=True), [graph.example[0].numpy()])


def test_a_shift_of_all_columns_is_no_bias(tmp_path):
    torch.manual_seed(0)
    net = Net(lambda net, x: net.b(F.gelu(net.a(x))) + net.shift, a=nn.Linear(32, 64), b=nn.Linear(64, 32, bias=False),
              shift=torch.ones(1))  # fmt: skip
    graph = capture(net.eval(), x := torch.randn(4, 12, 32))
    samples = open_data([(torch.randn(32, 12, 32),)], graph.inputs)
    list(Int8(rounding="nearest").run(graph, Context(CPU, samples, samples)))
    path = emit(graph, tmp_path / "m.onnx", dialect=ONNXRUNTIME).path
    (seen,) = runtime.run(runtime.session(path, exact=True), [x.numpy()])
    assert noise(graph.run(x)[0], torch.from_numpy(seen)) > 30
