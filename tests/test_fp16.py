"""Half precision: what becomes float16, what the numbers keep in float32, and what comes out of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from nets import Net, noise
from torch import Tensor, nn
from torch.nn import functional as F

from compressor import runtime
from compressor.capture import capture
from compressor.data import open_data
from compressor.emit import emit, feeds
from compressor.errors import UsageError
from compressor.ir import Graph
from compressor.names import operator_name
from compressor.ops import is_tensor, kind
from compressor.pipeline import Context, Outcome, Pipeline, parse
from passes.fp16 import Fp16
from passes.int8 import Int8
from targets.cpu import CPU
from targets.gpu import GPU

HALF = torch.float16


def halved(model: nn.Module, *example: Tensor, **options) -> tuple[Graph, Graph, Outcome]:
    """The graph as captured, a copy after the pass, and what the pass said."""
    graph = capture(model.eval(), example)
    after = graph.copy()
    samples = open_data([example], graph.inputs)
    outcome = Fp16(**options).run(after, Context(GPU, samples, samples))
    after.clean()
    after.check()
    return graph, after, outcome


def dtypes(graph: Graph) -> dict[str, torch.dtype]:
    """Node name -> dtype of every operator that gives a tensor."""
    return {n.name: n.meta["val"].dtype for n in graph.nodes if n.op == "call_function" and is_tensor(n)}


def kept(graph: Graph, after: Graph) -> set[str]:
    """Operators of the original that still give float32."""
    single = {name for name, dtype in dtypes(after).items() if dtype == torch.float32}
    return {operator_name(n).split(".")[1] for n in graph.nodes if n.name in single}


def casts(graph: Graph) -> int:
    return sum(kind(n) == "cast" for n in graph.nodes)


def in_runtime(graph: Graph, path: Path, *inputs: Tensor) -> Tensor:
    file = emit(graph, path / "model.onnx").path
    return torch.from_numpy(runtime.run(runtime.session(file, exact=True), [t.numpy() for t in inputs])[0])


def block(net: Net, x: Tensor) -> Tensor:
    return net.b(F.layer_norm(F.gelu(net.a(x)), (16,))).softmax(-1)


def test_everything_between_two_casts_is_half(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    graph, after, outcome = halved(Net(block, a=nn.Linear(8, 16), b=nn.Linear(16, 4)), x)
    assert casts(after) == 2 == outcome.facts["casts"] and not outcome.declines
    assert {t.dtype for t in after.tensors.values()} == {HALF}
    assert dtypes(after)[after.results[0].name] == torch.float32 == after.inputs[0].dtype
    assert after.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    (expected,), (seen,) = graph.run(x), after.run(x)
    assert 45 < noise(expected, seen) < 100  # rounded, and not by more than half precision rounds
    assert noise(expected, in_runtime(after, tmp_path, x)) > 45
    proto = onnx.load(tmp_path / "model.onnx")
    assert {i.data_type for i in proto.graph.initializer if i.dims} <= {
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.INT64,
    }
    weight = after.node("a_weight")
    after.set_tensor(weight, after.tensor(weight).to(torch.float8_e5m2).to(HALF))  # a precision too low shows
    assert noise(expected, after.run(x)[0]) < 40


def test_inputs_and_outputs_become_half_on_request(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    _, after, _ = halved(Net(block, a=nn.Linear(8, 16), b=nn.Linear(16, 4)), x, io="half")
    assert after.inputs[0].dtype == HALF == after.example[0].dtype and not casts(after)
    assert in_runtime(after, tmp_path, x.half()).dtype == HALF
    assert feeds(after.inputs, [x])["x"].dtype.name == "float16"  # float data still fits


def test_values_that_overflow_stay_single_and_only_they():
    torch.manual_seed(0)
    x = 300 * torch.randn(6, 8)

    def norm(net, x):
        x = net.a(x)
        return net.b(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    model = Net(norm, a=nn.Linear(8, 16), b=nn.Linear(16, 4))
    graph, after, outcome = halved(model, x)
    assert {"pow", "mean", "rsqrt"} <= kept(graph, after) and "linear" not in kept(graph, after)
    assert any("and half precision ends at 65504" in d.reason for d in outcome.declines)
    (expected,), (seen,) = graph.run(x), after.run(x)
    assert noise(expected, seen) > 45
    blind = model.half()(x.half())
    assert noise(expected, blind) < 20


def test_a_tiny_epsilon_keeps_its_meaning():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    x[0] = 1.0  # no variance: 0 * rsqrt(0) in half precision

    def norm(net, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-12) + 1

    graph, after, outcome = halved(Net(norm), x)
    assert noise(graph.run(x)[0], after.run(x)[0]) > 45
    assert "rsqrt" in kept(graph, after) and outcome.declines
    assert not norm(None, x.half()).isfinite().all()


RATIOS = {
    "normalize": lambda x: F.normalize(x, dim=-1),
    "sum": lambda x: x / (x.sum(-1, keepdim=True) + 1e-8),
    "pooling": lambda x: x.sum(0) / x.abs().sum(0).clamp(min=1e-9),
    "log": lambda x: torch.log(x.abs() + 1e-10),
    "rsqrt": lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12),
    "norm": lambda x: F.rms_norm(x, (8,), eps=1e-8),
    "constant": lambda x: x / (x.abs().sum(-1, keepdim=True) + torch.tensor(1e-8)),
}


@pytest.mark.parametrize("ratio", RATIOS)
def test_what_only_a_zero_would_show(ratio, tmp_path):
    """No sample is zero, and what keeps zeros finite is zero in half precision."""

    def net(net, x):
        return RATIOS[ratio](F.relu(net.a(x)))

    x = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    model = Net(net, a=nn.Linear(8, 8, bias=False))
    nn.init.eye_(model.a.weight)
    graph, after, _ = halved(model, x)
    assert "linear" not in kept(graph, after)
    for one in (x, torch.zeros(6, 8)):
        torch.testing.assert_close(in_runtime(after, tmp_path, one), graph.run(one)[0], rtol=2e-3, atol=2e-3)


def test_what_stays_single_anyway_hands_on_what_keeps_from_zero(tmp_path):
    def net(net, x):
        return F.normalize(F.relu(net.a(x)), dim=-1)

    model = Net(net, a=nn.Linear(8, 8, bias=False))
    x = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    graph, after, _ = halved(model, x, ignore=("expand_as",))
    assert "div" in kept(graph, after)
    assert in_runtime(after, tmp_path, torch.zeros(6, 8)).isfinite().all()


def test_ignore_names_something():
    with pytest.raises(UsageError, match="matches no operator"):
        halved(Net(lambda net, x: net.a(x), a=nn.Linear(8, 8)), torch.randn(2, 8), ignore=("nowhere.*",))


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9, -1000000000, -10000.0])
def test_masks_stay_masks(lowest, tmp_path):
    torch.manual_seed(0)
    x, mask = torch.randn(4, 6, 6), torch.rand(4, 6, 6) > 0.5
    mask[0, 0] = True  # everything masked: uniform, not NaN

    def attend(net, x, mask):
        return (x.masked_fill(mask, lowest) + 0.0 * x).softmax(-1) @ x

    graph, after, _ = halved(Net(attend), x, mask)
    (expected,), (seen,) = graph.run(x, mask), after.run(x, mask)
    assert noise(expected, seen) > 45
    assert not kept(graph, after)
    assert noise(expected, in_runtime(after, tmp_path, x, mask)) > 45
    assert dtypes(after)["masked_fill"] == HALF


def test_a_mask_that_is_an_input_keeps_rows_finite():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 6), torch.where(torch.rand(4, 6) > 0.5, torch.finfo(torch.float32).min, 0.0)
    mask[0] = torch.finfo(torch.float32).min
    graph, after, _ = halved(Net(lambda net, x, mask: (x + mask).softmax(-1)), x, mask)
    (expected,), (seen,) = graph.run(x, mask), after.run(x, mask)
    assert seen.isfinite().all() and noise(expected[1:], seen[1:]) > 45
    assert not (x.half() + mask.half()).softmax(-1).isfinite().all()


def test_positions_need_their_digits():
    def rotate(net, x):
        angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * net.rates
        return net.a(x * angles.cos() + x * angles.sin())

    torch.manual_seed(0)
    x = torch.randn(2, 700, 8)
    graph, after, outcome = halved(Net(rotate, rates=torch.logspace(0, -3, 8), a=nn.Linear(8, 8)), x)
    assert {"cos", "sin", "mul"} <= kept(graph, after) and "linear" not in kept(graph, after)
    assert after.tensors["rates"].dtype == torch.float32
    assert any("needs more digits" in d.reason for d in outcome.declines)
    (expected,), (seen,) = graph.run(x), after.run(x)
    assert noise(expected, seen) > 45


def test_sampling_between_pixels_stays_single():
    def sample(m: nn.Module, x: Tensor) -> Tensor:
        return m.b(F.grid_sample(m.a(x), m.c(x).tanh().permute(0, 2, 3, 1), align_corners=True))

    net = Net(sample, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1), c=nn.Conv2d(3, 2, 1))
    graph, after, outcome = halved(net, torch.randn(2, 3, 6, 6))
    assert "grid_sampler" in kept(graph, after)
    assert any("at places that half precision would move" in d.reason for d in outcome.declines)


def test_decisions_that_floats_make_stay_single():
    torch.manual_seed(0)
    x = torch.rand(64, 8)
    table, mix = nn.Embedding(1000, 8), nn.Linear(8, 8)

    def forward(net, x):
        return net.t((x[:, 0] * 999).to(torch.int64)) + net.a(x)

    graph, after, _ = halved(Net(forward, t=table, a=mix), x)
    (expected,), (seen,) = graph.run(x), after.run(x)
    assert noise(expected, seen) > 45
    assert {"select", "mul"} <= kept(graph, after) and "linear" not in kept(graph, after)
    assert noise(expected, table((x.half()[:, 0] * 999).long()) + mix(x)) < 20
    assert after.tensors["t.weight"].dtype == HALF


def test_a_mask_may_be_read_in_two_precisions(tmp_path):
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            t = self.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
            return self.o(F.scaled_dot_product_attention(t, t, t, attn_mask=mask).transpose(1, 2).flatten(-2))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Attends(), Attends()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            mask = mask[:, None, None, :]
            x = x + self.a(x, mask)
            return x + self.b(x, mask)

    torch.manual_seed(0)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    example = torch.randn(2, 6, 32), mask
    _, after, _ = halved(Two(), *example, ignore=("a",))
    emitted = emit(after, tmp_path / "m.onnx")
    (seen,) = runtime.run(runtime.session(emitted.path), [t.numpy() for t in example])
    assert noise(after.run(*example)[0], torch.from_numpy(seen)) > 50


def test_literal_dtypes_follow():
    def forward(net, x):
        rows = torch.zeros(x.shape[0], 4, dtype=torch.float32) + torch.ones(4)
        return net.a(torch.cat([x.softmax(-1, dtype=torch.float32), rows, (x > 0).to(torch.float32)], 1))

    x = torch.randn(6, 8)
    graph, after, _ = halved(Net(forward, a=nn.Linear(20, 4)), x)
    assert not kept(graph, after) and noise(graph.run(x)[0], after.run(x)[0]) > 45


def test_a_constant_with_two_kinds_of_readers_exists_twice():
    x = 300 * torch.randn(6, 8)
    graph, after, _ = halved(
        Net(lambda net, x: net.a((x * net.s).pow(2) * net.s / 1e6), s=torch.rand(8) + 1, a=nn.Linear(8, 8)), x
    )
    assert noise(graph.run(x)[0], after.run(x)[0]) > 45
    assert after.tensors["s"].dtype == torch.float32


def test_cheap_operators_between_casts_are_not_worth_two():
    x = torch.randn(6, 8)
    _, after, outcome = halved(Net(lambda net, x: (x + 1).relu()), x)
    assert not casts(after) and not outcome.rewrites
    _, after, _ = halved(Net(lambda net, x: (x + 1).relu()), x, io="half")
    assert {dtype for dtype in dtypes(after).values()} == {HALF}


def test_integer_sections_stay_what_they_are(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 16)

    def mix(net, x):
        x = net.a(x)
        return net.b((x @ x.transpose(1, 2)).softmax(-1) @ x)

    model = Net(mix, a=nn.Linear(16, 32), b=nn.Linear(32, 16))
    graph = capture(model, x)
    samples = open_data([(x,)], graph.inputs)
    ctx = Context(CPU, samples, samples)
    after = graph.copy()
    list(Int8().run(after, ctx))
    outcome = Fp16().run(after, ctx)
    after.check()
    assert {n for n, d in dtypes(after).items() if d == HALF} >= {"matmul", "softmax"}
    assert all(
        dtypes(after)[n.name] == torch.float32 for n in after.nodes if kind(n) in ("linear", "dequantize")
    )
    assert "it belongs to an integer section" in {d.reason for d in outcome.declines}
    assert noise(graph.run(x)[0], in_runtime(after, tmp_path, x)) > 30


def test_options_limits_and_graphs_without_floats():
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    model = Net(block, a=nn.Linear(8, 16), b=nn.Linear(16, 4))
    _, after, outcome = halved(model, x, ignore=("a",))
    assert after.tensors["a.weight"].dtype == torch.float32 and after.tensors["b.weight"].dtype == HALF
    assert [d.reason for d in outcome.declines] == ["left in single precision as asked"]
    graph = capture(model, x)
    samples = open_data([(x,)], graph.inputs)
    limited = Fp16().run(graph, Context(GPU, samples, limit=1))
    assert len(limited.rewrites) == 1
    _, after, outcome = halved(nn.Linear(8, 4).half(), x.half())
    assert not outcome.rewrites and not casts(after)
    assert parse("fp16(io=half,ignore=head)", {"fp16": Fp16}) == [Fp16(io="half", ignore=("head",))]


def test_the_pipeline_accepts_it_without_data():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    ).eval()
    x = torch.randn(4, 3, 8, 8)
    for io in ("keep", "half"):
        graph = capture(model, x)
        rows = Pipeline([Fp16(io=io)], {"fp16": Fp16}).run(
            graph, Context(GPU, open_data([(x,)], graph.inputs))
        )
        assert rows[-1].status == "proved" and rows[-1].checks[0].sqnr_db > 50
        assert rows[-1].bytes * 2 == rows[0].bytes
