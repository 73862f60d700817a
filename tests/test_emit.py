"""Graph -> ONNX: names, axes, bytes, and operators without a word in ONNX."""

import os
import threading
from collections import Counter

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

from compressor import delivery, publishing, runtime, sessions, translator
from compressor.capture import capture
from compressor.data import Batch
from compressor.emit import emit
from compressor.errors import ContractError, OutputError, TargetError, UnsupportedError
from compressor.ir import Input
from compressor.target import Target

TARGET = Target("cpu", "", ("CPUExecutionProvider",))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        hidden = self.stem(image).relu()
        return {"logits": self.head(hidden.mean((2, 3))), "hidden": hidden}


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return capture(Net(), (torch.randn(2, 3, 8, 8),))


def test_the_file_speaks_the_names_of_the_model(graph, tmp_path):
    emitted = emit(graph, tmp_path / "m.onnx", metadata={"spec": "merge"})
    proto = onnx.load(emitted.path)
    assert [i.name for i in proto.graph.input] == ["image"]
    assert [o.name for o in proto.graph.output] == ["logits", "hidden"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.graph.output[1].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {n.name for n in proto.graph.node} >= {"stem/Conv", "head/Gemm"}
    assert proto.ir_version == 9 and proto.opset_import[0].version == 20
    assert {p.key: p.value for p in proto.metadata_props} == {"spec": "merge"}


def test_the_bytes_are_the_same_and_carry_no_path(graph, tmp_path):
    a = emit(graph, tmp_path / "a.onnx").path.read_bytes()
    torch.manual_seed(0)
    (tmp_path / "elsewhere").mkdir()
    b = emit(capture(Net(), (torch.randn(2, 3, 8, 8),)), tmp_path / "elsewhere" / "b.onnx").path.read_bytes()
    assert a == b
    assert b"test_emit" not in a and str(tmp_path).encode() not in a


def test_numbers_match_on_every_size_of_a_dynamic_axis(graph, tmp_path):
    emitted = delivery.deliver(graph, TARGET, tmp_path, {}, {})
    checks = delivery.check_emitted(graph, emitted, [Batch((torch.randn(4, 3, 8, 8),))])
    assert max(c.error for c in checks) < 1e-5
    other = graph.copy()
    bias = next(n for n in other.nodes if n.target == "head.bias")
    other.set_tensor(bias, other.tensor(bias) + 0.01)
    with pytest.raises(ContractError, match="emitted model's output logits"):
        delivery.check_emitted(other, emitted, [Batch((torch.randn(4, 3, 8, 8),))])


def test_a_fixed_batch_is_fed_piece_by_piece(graph, tmp_path):
    emitted = delivery.deliver(graph, TARGET, tmp_path, {}, {"batch": 1})
    assert emitted.inputs[0].shape == (1, 3, 8, 8)
    x = torch.randn(4, 3, 8, 8)
    seen = sessions.run(runtime.session(emitted.path), emitted.inputs, (x,))
    torch.testing.assert_close(seen[0], graph.run(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 3, 2, 4, 8)])
def test_attention_of_other_ranks_is_emitted(shape, tmp_path):
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x * 2, x + 1)

    graph = capture(Attention(), (torch.randn(shape),))
    emitted = delivery.deliver(graph, TARGET, tmp_path, {}, {})
    delivery.check_emitted(graph, emitted, [Batch((torch.randn(shape),))])


def test_outputs_that_are_inputs_or_twice_the_same(tmp_path):
    class Echo(nn.Module):
        def forward(self, x):
            y = x * 2
            return x, y, y

    graph = capture(Echo(), (torch.randn(2, 4),))
    emitted = delivery.deliver(graph, TARGET, tmp_path, {}, {})
    delivery.check_emitted(graph, emitted, [Batch((torch.randn(3, 4),))])


def test_two_dynamic_axes_keep_their_names(tmp_path):
    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, ids, mask):
            return self.table(ids) * mask[..., None]

    specs = [
        Input("ids", torch.int64, ("batch", "sequence")),
        Input("mask", torch.int64, ("batch", "sequence")),
    ]
    graph = capture(Embed(), inputs=specs)
    emitted = delivery.deliver(graph, TARGET, tmp_path, {}, {})
    shape = onnx.load(emitted.path).graph.output[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["batch", "sequence", 4]
    batch = Batch((torch.randint(0, 10, (3, 7)), torch.ones(3, 7, dtype=torch.int64)))
    delivery.check_emitted(graph, emitted, [batch])


def test_an_operator_without_a_word_in_onnx_is_named(tmp_path):
    class Special(nn.Module):
        def forward(self, x):
            return torch.special.i0(x)

    graph = capture(Special(), (torch.randn(2, 4),))
    with pytest.raises(UnsupportedError, match=r"special_i0.*test_emit.py:\d+.*no translation"):
        emit(graph, tmp_path / "m.onnx")


def test_it_is_not_its_neighbour_that_is_named(tmp_path):
    """torch makes other operators of it, under names of their own."""

    class Special(nn.Module):
        def forward(self, x):
            return torch.nextafter(torch.relu(x) * 2 + 1, torch.digamma(x.relu())) + 1

    graph = capture(Special(), (torch.randn(2, 4),))
    with pytest.raises(UnsupportedError, match=r"digamma.*test_emit.py:\d+.*no translation"):
        emit(graph, tmp_path / "m.onnx")


def test_a_model_too_large_for_one_file_has_its_data_beside_it(graph, tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.emit.EXTERNAL_DATA_BYTES", 100)
    emitted = delivery.deliver(graph, TARGET, tmp_path, {}, {})
    data = (tmp_path / "model.onnx.data").stat().st_size
    assert data == 8 * 3 * 3 * 3 * 4 and emitted.bytes == data + (tmp_path / "model.onnx").stat().st_size
    delivery.check_emitted(graph, emitted, [Batch((torch.randn(4, 3, 8, 8),))])


def test_weights_lie_beside_a_small_model_on_request(graph, tmp_path):
    emitted = delivery.deliver(graph, TARGET, tmp_path, {}, {}, beside=True)
    assert (tmp_path / "model.onnx.data").stat().st_size == 8 * 3 * 3 * 3 * 4
    delivery.check_emitted(graph, emitted, [Batch((torch.randn(4, 3, 8, 8),))])


def test_staging_leaves_the_old_output_whole(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "model.onnx").write_text("old")
    with pytest.raises(RuntimeError), publishing.staging(output) as stage:
        (stage / "model.onnx").write_text("new")
        raise RuntimeError
    assert (output / "model.onnx").read_text() == "old"
    with publishing.staging(output) as stage:
        (stage / "model.onnx").write_text("new")
    assert (output / "model.onnx").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"), publishing.staging(tmp_path / "file"):
        pass


# ---------------------------------------------------------------- what ONNX says shorter


def operators(path):
    return Counter(n.op_type for n in onnx.load(path).graph.node if n.op_type != "Constant")


def emitted(body, *example, folder, **layers):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict(layers)

        def forward(self, *inputs):
            return body(self.layers, *inputs)

    torch.manual_seed(0)
    graph = capture(Model().eval(), example)
    made = delivery.deliver(graph, TARGET, folder, {}, {})
    fresh = [
        torch.randn(5, *t.shape[1:]) if t.is_floating_point() else t[:1].repeat(5, 1, 1, 1) for t in example
    ]
    checks = delivery.check_emitted(graph, made, [Batch(tuple(fresh))])
    assert max(c.error for c in checks) < 1e-5 and all(c.finite for c in checks)
    return operators(made.path)


def test_slices_along_several_axes_are_one(tmp_path):
    counts = emitted(lambda m, x: x[:, 1:, :, 1:3][:, :, ::2] + 0, torch.randn(2, 4, 6, 6), folder=tmp_path)
    assert counts["Slice"] == 1
    again = emitted(lambda m, x: x[:, 1:][:, 1:] + 0, torch.randn(2, 4, 6), folder=tmp_path)
    assert again["Slice"] == 2, "along one axis they do not commute"
    read = emitted(lambda m, x: (x[:, 1:, 2:] + 0, x[:, 1:].exp()), torch.randn(2, 4, 6), folder=tmp_path)
    assert read["Slice"] == 2


def test_equal_weights_are_stored_once(tmp_path):
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    b.load_state_dict(a.state_dict())
    emitted(lambda m, x: m["b"](m["a"](x).relu()), torch.randn(2, 64), folder=tmp_path, a=a, b=b)
    assert sum(i.dims == [64, 64] for i in onnx.load(tmp_path / "model.onnx").graph.initializer) == 1


def test_what_is_clipped_twice_has_bounds_of_its_own(tmp_path):
    """torch.onnx's optimiser names the bounds after what is clipped, and loses one pair of two."""

    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in (("a", -1.0), ("b", 1.0), ("c", -2.0), ("d", 0.5)):
                self.register_buffer(name, torch.tensor(value))

        def forward(self, x):
            h = 2.5 * x
            return h.clamp(self.a, self.b), h.clamp(self.c, self.d)

    x = torch.randn(4, 9)
    path = emit(capture(Clipped(), (x,)), tmp_path / "m.onnx").path
    assert Counter(n.op_type for n in onnx.load(path).graph.node) == {"Mul": 1, "Clip": 2}
    for found, expected in zip(runtime.run(runtime.session(path), [x.numpy()]), Clipped()(x), strict=True):
        np.testing.assert_allclose(found, expected.numpy())


def test_a_file_that_is_not_valid_is_written_without_the_optimiser(graph, tmp_path, monkeypatch):
    real, asked = translator.translate, []

    def broken(graph, opset, optimize):
        model = real(graph, opset, optimize)
        asked.append(optimize)
        if optimize:
            model.graph.node(0).replace_input_with(0, onnx_ir.Value(name="nowhere"))
        return model

    monkeypatch.setattr("compressor.emit.translate", broken)
    assert delivery.deliver(graph, TARGET, tmp_path, {}, {}).path.exists()
    assert asked == [True, False]
    monkeypatch.setattr("compressor.emit.translate", lambda graph, opset, _: broken(graph, opset, True))
    with pytest.raises(TargetError, match="not valid: .*nowhere"):
        delivery.deliver(graph, TARGET, tmp_path, {}, {})


def test_known_sizes_are_not_asked_for(tmp_path):
    counts = emitted(
        lambda m, x: F.unfold(x, (3, 1), padding=(1, 0)).reshape(x.shape[0], -1),
        torch.randn(2, 4, 6, 1),
        folder=tmp_path,
    )
    assert not {"Shape", "Range"} & counts.keys()


@pytest.mark.parametrize("mask", [None, "floats", "bools"])
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_attention_is_few_operators(mask, rank, tmp_path):
    if mask == "bools" and rank != 4:
        pytest.skip("left to the exporter")
    size = (*(2, 3, 4)[: rank - 2], 5, 8)
    example = [torch.randn(size) for _ in range(3)]
    if mask is not None:
        floats = torch.randn(size[0], *[1] * (rank - 3), 5, 5)
        example.append(floats if mask == "floats" else (floats > 0) | torch.eye(5, dtype=torch.bool))
    counts = emitted(
        lambda m, q, k, v, *a: F.scaled_dot_product_attention(q, k, v, *a), *example, folder=tmp_path
    )
    # an input may hold -inf, and rows of it: two operators keep what is left of these finite
    assert sum(counts.values()) <= {None: 5, "floats": 8, "bools": 9}[mask] and counts["MatMul"] == 2


def test_a_row_that_may_attend_to_nothing_is_what_it_is_in_torch(tmp_path):
    x = torch.randn(2, 1, 4, 8)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 1] = False
    graph = capture(Masked(), (x, mask))
    made = delivery.deliver(graph, TARGET, tmp_path, {}, {})
    checks = delivery.check_emitted(
        graph, made, [Batch((torch.randn(3, 1, 4, 8), mask[:1].repeat(3, 1, 1, 1)))]
    )
    assert max(c.error for c in checks) < 1e-5


class Masked(nn.Module):
    def forward(self, x, mask):
        return F.scaled_dot_product_attention(x, x, x, mask)


def test_parts_of_an_unbind_are_one_operator_each(tmp_path):
    counts = emitted(lambda m, x: sum(t.exp() for t in x.unbind(1)), torch.randn(2, 3, 4), folder=tmp_path)
    assert counts["Gather"] == 3 and not {"Split", "Squeeze"} & counts.keys()


@pytest.mark.parametrize(
    "options", [{}, {"correction": 0}, {"unbiased": False}, {"keepdim": True}, {"correction": 2}]
)
def test_a_variance_asks_for_no_sizes(options, tmp_path):
    counts = emitted(
        lambda m, x: x.exp().var((1, 2), **options) + 1, torch.randn(2, 3, 4, 5), folder=tmp_path
    )
    assert not {"Shape", "Reshape", "Expand"} & counts.keys()


def test_two_runs_at_once_leave_the_files_of_one(tmp_path, monkeypatch):
    """The second wants to publish while the first has moved one file of three."""
    replace, halfway, through = os.replace, threading.Event(), threading.Event()

    def publish(name: str) -> None:
        with publishing.staging(tmp_path / "out") as stage:
            for file in ("model.onnx", "signature.json", "report.json"):
                (stage / file).write_text(name)

    def slowly(source, target):
        replace(source, target)
        if threading.current_thread().name == "first" and not halfway.is_set():
            halfway.set()
            through.wait(0.5)

    publish("before")
    monkeypatch.setattr(publishing, "_exchange", lambda one, two: False)  # as where the system cannot
    monkeypatch.setattr(os, "replace", slowly)
    first = threading.Thread(target=publish, args=("first",), name="first")
    first.start()
    assert halfway.wait(5)
    publish("second")
    through.set()
    first.join()
    assert {file.read_text() for file in (tmp_path / "out").iterdir()} == {"second"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("value", [0.0, -1.0, float("-inf")])
def test_a_frame_around_a_maximum_counts(tmp_path, value):
    """ONNX Runtime takes zeros around an image for MaxPool's own frame, which is as good as minus infinity."""

    class Framed(nn.Module):
        def forward(self, x):
            return F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=value), 3, 2)

    x = torch.randn(2, 3, 8, 8) - 3
    graph = capture(Framed(), x)
    path = emit(graph, tmp_path / "framed.onnx").path
    (seen,) = runtime.run(runtime.session(path, threads=1), [x.numpy()])
    (expected,) = graph.run(x)
    assert torch.allclose(torch.from_numpy(seen), expected, atol=1e-30)
    assert float((expected - F.max_pool2d(x, 3, 2, 1)[..., :4, :4]).abs().max()) > 1 or value == float("-inf")


class Wordless(nn.Module):
    """Operators that the exporter has no words for: torch makes others of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, image):
        hidden = self.norm(self.stem(image))
        both = (hidden > 0).__and__(hidden < 1)
        return self.pool(hidden), both


def test_nothing_is_traced_but_what_the_exporter_has_no_words_for(tmp_path, monkeypatch):
    rewrites = pytest.importorskip("torch.onnx._internal.exporter._fx_passes")
    traces = []
    traced = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: traces.append(1) or traced(*a, **k))
    decompose = rewrites.decompose_with_registry
    monkeypatch.setattr(
        rewrites, "decompose_with_registry", lambda *args: traces.append(0) or decompose(*args)
    )
    torch.manual_seed(0)
    graph = capture(zoo.with_power(Wordless(), image := torch.randn(2, 3, 8, 8)), (image,))
    text = graph.text()
    traces.clear()
    quick = emit(graph, tmp_path / "quick.onnx")
    assert not traces and graph.text() == text
    monkeypatch.setattr(translator, "_quick", translator._plain)
    slow = emit(graph, tmp_path / "slow.onnx")
    assert traces == [1, 0]
    assert Counter(o for o, _ in quick.nodes) == Counter(o for o, _ in slow.nodes)
    for a, b, c in zip(
        *(runtime.run(runtime.session(e.path), [image.numpy()]) for e in (quick, slow)),
        graph.run(image),
        strict=True,
    ):
        assert (a == b).all()
        torch.testing.assert_close(torch.from_numpy(a), c)


TURNS = torch.view_as_complex(torch.randn(6, 2))
FIRST_FLOATS = """
import pathlib, torch, compressor
from compressor import registry, translator
from compressor.capture import capture
from compressor.emit import emit
translator._plain = None
x = torch.randn(64, 16)
net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
emit(capture(net, x[:2]), pathlib.Path("floats.onnx"), opset=registry.target(None).opset)
compressor.compress(net, x[:2], passes="int8", calibration=[x], output="out", measure=False)
"""


def test_operators_that_come_later_have_words_too(python):
    """Integers are operators of a library that a float model does not need; the same bytes whatever came before."""
    done = python("-c", FIRST_FLOATS)
    assert done.returncode == 0, done.stderr


VIEWS = {
    "narrow": lambda x: x.narrow(1, -2, 2).sum(1),
    "chunk": lambda x: torch.cat([c.sum(2, keepdim=True) for c in x.chunk(4, 2)], 2),
    "broadcast_to": lambda x: x[:, :1].broadcast_to((-1, 4, 6)),
    "mT": lambda x: (x > 0).mT,
    "rotary": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 2, 6, 2)) * TURNS).flatten(2),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_that_the_exporter_has_never_used_words_for(view, tmp_path):
    class One(nn.Module):
        def forward(self, x):
            return VIEWS[view](x)

    graph = capture(One(), (x := torch.randn(2, 4, 6),))
    emitted = emit(graph, tmp_path / "m.onnx")
    (seen,) = runtime.run(runtime.session(emitted.path), [x.numpy()])
    torch.testing.assert_close(torch.from_numpy(seen), *graph.run(x))


@pytest.mark.parametrize(
    "how", [{"size": "2T - 1", "align_corners": True}, {"scale_factor": 1.7}, {"scale_factor": 0.5}]
)
def test_a_line_of_any_length_is_stretched_by_one_operator(how, tmp_path):
    class Stretched(nn.Module):
        def forward(self, x):
            size = {"size": 2 * x.shape[2] - 1} if "size" in how else {}
            return F.interpolate(x, mode="linear", **{**how, **size})

    model = Stretched()
    graph = capture(model, (torch.randn(2, 3, 9),), inputs=[Input("x", torch.float32, ("batch", 3, "T"))])
    emitted = emit(graph, tmp_path / "m.onnx")
    assert [n.op_type for n in onnx.load(emitted.path).graph.node].count("Resize") == 1
    session = runtime.session(emitted.path)
    for length in (1, 2, 9, 40) if "size" in how else (2, 9, 40):
        x = torch.randn(1, 3, length)
        (seen,) = runtime.run(session, [x.numpy()])
        torch.testing.assert_close(torch.from_numpy(seen), model(x), rtol=1e-4, atol=2e-5)


def test_a_slope_that_only_training_draws(tmp_path):
    graph = capture(nn.RReLU(0.1, 0.4), (x := torch.randn(2, 6),))
    (seen,) = runtime.run(runtime.session(emit(graph, tmp_path / "m.onnx").path), [x.numpy()])
    torch.testing.assert_close(torch.from_numpy(seen), F.leaky_relu(x, 0.25))


TINY = {
    "add": lambda x: x / (x.sum(-1, keepdim=True) + 1e-8),
    "constant": lambda x: x / (x.sum(-1, keepdim=True) + torch.tensor(1e-9)),
    "sub": lambda x: torch.log(-(x.abs() - 1e-10)) - x,
    "mul": lambda x: (x + 1) * 1.000008 - (x + 1),
    "div": lambda x: (x + 1) / 1.000008 - (x + 1),
    "norm": lambda x: F.rms_norm(x, (6,), eps=1e-8),
}


@pytest.mark.parametrize("name", TINY)
def test_numbers_near_zero_and_one_stay_what_they_are(name, tmp_path):
    """The exporter's own optimiser takes 1e-8 for nothing, which shows where the rest is zero."""

    class One(nn.Module):
        def forward(self, x):
            return TINY[name](x)

    graph = capture(One(), (torch.rand(2, 6),))
    emitted = emit(graph, tmp_path / "m.onnx")
    (seen,) = runtime.run(runtime.session(emitted.path), [np.zeros((2, 6), np.float32)])
    expected = graph.run(torch.zeros(2, 6))[0]
    assert expected.isfinite().all()
    torch.testing.assert_close(torch.from_numpy(seen), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("frame", [(1, 1, 1, 1), (3, 0, 0, 3)])
@pytest.mark.parametrize("over", [True, False])
@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("own", [0, 1])
def test_means_of_windows_over_a_frame(frame, over, counts, own, tmp_path):
    """ONNX Runtime makes the frame the pool's own, and counts both then, or refuses one as wide as the window."""

    class Pools(nn.Module):
        def forward(self, x):
            return F.avg_pool2d(F.pad(x, frame), 3, 2, own, over, counts)

    graph = capture(Pools(), (x := torch.randn(2, 3, 9, 10),))
    (seen,) = runtime.run(runtime.session(emit(graph, tmp_path / "m.onnx").path), [x.numpy()])
    torch.testing.assert_close(torch.from_numpy(seen), *graph.run(x))


def test_what_only_a_second_trace_writes_out_is_written_out(tmp_path):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 8, 3))

        def forward(self, sound):
            return self.conv(sound)

    torch.manual_seed(0)
    graph = capture(Normed(), (sound := torch.randn(2, 3, 16),))
    emitted = emit(graph, tmp_path / "m.onnx")
    (seen,) = runtime.run(runtime.session(emitted.path), [sound.numpy()])
    torch.testing.assert_close(torch.from_numpy(seen), *graph.run(sound))


def test_rows_that_attend_to_nothing_and_bounds_of_two_kinds(tmp_path):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x, padding):
            made, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
            return made.clamp(0, 0.3)

    torch.manual_seed(0)
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    graph = capture(Attends().train(False), (x, padding))
    emitted = emit(graph, tmp_path / "m.onnx")
    padding[2] = True
    (seen,) = runtime.run(runtime.session(emitted.path), [x.numpy(), padding.numpy()])
    torch.testing.assert_close(torch.from_numpy(seen), *graph.run(x, padding))
