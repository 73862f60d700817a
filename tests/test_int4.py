"""Weights in blocks of few bits: packed as ONNX Runtime reads them, clipped where that keeps them best."""

from __future__ import annotations

import onnx
import pytest
import torch
from nets import Net, conv, noise
from torch import nn
from torch.nn import functional as F

from compressor import runtime
from compressor.blockwise import dequantise_blocks, pack, quantise_blocks, unpack
from compressor.capture import capture
from compressor.data import open_data
from compressor.emit import emit
from compressor.errors import UsageError
from compressor.ir import Graph
from compressor.ops import node_macs
from compressor.pipeline import Context, Outcome
from passes.int4 import Int4
from targets.cpu import CPU


def mlp() -> Graph:
    torch.manual_seed(0)
    net = Net(
        lambda net, x: x + net.down(F.gelu(net.up(x))) + net.thin(x[..., :32]),
        up=nn.Linear(160, 256),
        down=nn.Linear(256, 160, bias=False),
        thin=nn.Linear(32, 160),
    )
    return capture(net.eval(), torch.randn(2, 5, 160))


def compiled(graph: Graph, config: Int4 | None = None, **options) -> tuple[Graph, Outcome]:
    copy = graph.copy()
    held = open_data([(torch.randn(4, *graph.example[0].shape[1:]),)], graph.inputs)
    outcome = (config or Int4()).run(copy, Context(CPU, held, **options))
    copy.check()
    return copy, outcome


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_lossless(bits):
    integers = torch.randint(0, 2**bits, (3, 7), dtype=torch.uint8)
    assert torch.equal(unpack(pack(integers, bits), bits, 7), integers)


@pytest.mark.parametrize(("bits", "least"), [(4, 20.0), (8, 44.0)])
@pytest.mark.parametrize("ins", [96, 100])
def test_blocks_are_near_their_weights(bits, least, ins):
    weight = torch.randn(8, ins, generator=torch.Generator().manual_seed(0))
    found = quantise_blocks(weight, bits, 32)
    made = dequantise_blocks(found.packed, found.scales, found.zeros, bits, 32, ins)
    assert found.packed.shape == (8, -(-ins // 32), 32 * bits // 8) and made.shape == weight.shape
    assert noise(weight, made) > least


def test_an_outlier_is_clipped_where_that_pays():
    weight = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([1.2])])[None]
    found = quantise_blocks(weight, 4, 32)
    made = dequantise_blocks(found.packed, found.scales, found.zeros, 4, 32, 32)
    scale = 2.2 / 15
    whole = ((weight / scale).round() + round(1 / scale)).clamp(0, 15).sub(round(1 / scale)) * scale
    assert (made - weight).square().sum() <= (whole - weight).square().sum() + 1e-6
    zeros = quantise_blocks(torch.zeros(1, 32), 4, 32)
    assert not dequantise_blocks(zeros.packed, zeros.scales, zeros.zeros, 4, 32, 32).any()


@pytest.mark.parametrize("config", [Int4(), Int4(bits="8"), Int4(block=128)])
def test_onnx_runtime_reads_what_was_meant(tmp_path, config):
    graph = mlp()
    after, outcome = compiled(graph, config)
    assert len(outcome.rewrites) == 2 and [d.reason for d in outcome.declines] == ["32 columns are too few"]
    assert sum(map(node_macs, after.nodes)) == sum(map(node_macs, graph.nodes))
    file = emit(after, tmp_path / "model.onnx", dialect=CPU.dialect)
    found = [n.op_type for n in onnx.load(file.path).graph.node]
    assert found.count("MatMulNBits") == 2 and file.integer
    (seen,) = runtime.run(runtime.session(file.path, threads=1), [graph.example[0].numpy()])
    simulated = after.run(graph.example[0])[0]
    assert noise(simulated, torch.from_numpy(seen)) > 35
    assert noise(graph.run(graph.example[0])[0], simulated) > (40 if config.bits == "8" else 15)
    assert outcome.facts["mb_after"] < outcome.facts["mb_before"] / (3 if config.bits == "8" else 5)


def test_what_stays_float(tmp_path):
    graph = mlp()
    _, outcome = compiled(graph, Int4(ignore=("down",)))
    assert len(outcome.rewrites) == 1 and "left float as asked" in [d.reason for d in outcome.declines]
    with pytest.raises(UsageError, match="matches no operator"):
        compiled(graph, Int4(ignore=("nobody",)))
    _, outcome = compiled(graph, limit=1)
    assert len(outcome.rewrites) == 1

    def twice(net, x):
        return net.one(x) + F.linear(x, net.one.weight)

    tied = capture(Net(twice, one=nn.Linear(128, 128)).eval(), torch.randn(2, 128))
    same, outcome = compiled(tied)
    assert same.fingerprint() == tied.fingerprint()
    assert {d.reason for d in outcome.declines} == {"its weight is read by others, too"}
    pictures = capture(Net(lambda net, x: net.a(x), a=conv(3, 8)).eval(), torch.randn(2, 3, 8, 8))
    assert not compiled(pictures)[1].rewrites


def test_a_block_has_a_size_that_kernels_know():
    with pytest.raises(ValueError, match="16, 32, 64"):
        Int4(block=33)
