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
from compressor.data import Data, open_data
from compressor.emit import emit
from compressor.errors import UsageError
from compressor.ir import Graph
from compressor.ops import node_macs
from compressor.pipeline import Context, Outcome, Pass
from passes.fp16 import Fp16
from passes.int4 import Int4
from passes.int8 import Int8
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


def held_out(graph: Graph) -> Data:
    return open_data([(torch.cat([graph.example[0]] * 2),)], graph.inputs)


def compiled(graph: Graph, config: Pass | None = None, **options) -> tuple[Graph, Outcome]:
    copy = graph.copy()
    made = (config or Int4()).run(copy, Context(CPU, held_out(graph), **options))
    (outcome,) = [made] if isinstance(made, Outcome) else made
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
    assert noise(simulated, torch.from_numpy(seen)) > 100
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

    shared = capture(Net(twice, one=nn.Linear(128, 128)).eval(), torch.randn(2, 128))
    once, outcome = compiled(shared)
    assert len(outcome.rewrites) == 2 and sum(t.dtype == torch.uint8 for t in once.tensors.values()) == 2
    square = capture(
        Net(lambda n, x: n.one(x) + n.one.weight.sum(), one=nn.Linear(128, 128)).eval(), torch.randn(2, 128)
    )
    same, outcome = compiled(square)
    assert same.fingerprint() == square.fingerprint()
    assert {d.reason for d in outcome.declines} == {"its weight is read by others, too"}
    pictures = capture(Net(lambda net, x: net.a(x), a=conv(3, 8)).eval(), torch.randn(2, 3, 8, 8))
    assert not compiled(pictures)[1].rewrites


def test_a_head_that_is_the_table_of_embeddings_is_stored_by_each_use(tmp_path):
    def forward(net, ids):
        return F.linear(net.up(net.words(ids)).relu(), net.words.weight)

    torch.manual_seed(0)
    ids = torch.randint(0, 1024, (2, 6))
    graph = capture(Net(forward, words=nn.Embedding(1024, 128), up=nn.Linear(128, 128)).eval(), ids)
    after, outcome = compiled(graph)
    assert [r.site for r in outcome.rewrites if "table" in r.what] == ["words"]
    assert not any(t.dtype == torch.float32 and t.numel() >= 1024 * 128 for t in after.tensors.values())
    file = emit(after, tmp_path / "model.onnx", dialect=CPU.dialect)
    assert file.bytes < 1024 * 128 * 2
    (seen,) = runtime.run(runtime.session(file.path, threads=1), [ids.numpy()])
    assert noise(after.run(ids)[0], torch.from_numpy(seen)) > 100
    assert noise(graph.run(ids)[0], after.run(ids)[0]) > 15
    kept, _ = compiled(graph, Int4(ignore=("words",)))
    assert "words.weight" in kept.tensors


def test_activations_may_be_half(tmp_path):
    graph = mlp()
    after, _ = compiled(graph)
    outcome = Fp16().run(after, Context(CPU, held_out(graph)))
    after.clean()
    after.check()
    assert outcome.facts["half"] > 2
    file = emit(after, tmp_path / "model.onnx", dialect=CPU.dialect)
    read = {t.name: t.data_type for t in onnx.load(file.path).graph.initializer}
    products = [n for n in onnx.load(file.path).graph.node if n.op_type == "MatMulNBits"]
    assert len(products) == 2 and {read[n.input[2]] for n in products} == {onnx.TensorProto.FLOAT16}
    (seen,) = runtime.run(runtime.session(file.path, threads=1), [graph.example[0].numpy()])
    assert noise(after.run(graph.example[0])[0], torch.from_numpy(seen)) > 35


def test_int8_of_weights_alone_needs_no_data():
    graph = mlp()
    after, outcome = compiled(graph, Int8(scheme="weight"))
    assert (
        len(outcome.rewrites) == 2 and after.fingerprint() == compiled(graph, Int4(bits="8"))[0].fingerprint()
    )


def test_a_block_has_a_size_that_kernels_know():
    with pytest.raises(ValueError, match="16, 32, 64"):
        Int4(block=33)
