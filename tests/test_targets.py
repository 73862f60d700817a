"""What a target's runtime lacks is refused before anything is written; it is verified and timed where it runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from nets import Net, conv
from torch import nn
from torch.nn import functional as F

import compressor
from compressor import api, delivery, runtime
from compressor.capture import capture
from compressor.emit import emit
from compressor.errors import TargetError, UsageError
from compressor.stopwatch import Stopwatch
from targets import TARGETS
from targets.cpu import CPU
from targets.gpu import GPU
from targets.openvino import OPENVINO
from targets.web import WEB


def bent() -> nn.Module:
    """Reads between pixels, in a module of its own."""
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 4, 8, 8], align_corners=False)
    warp = Net(
        lambda net, x: F.grid_sample(x, net.grid.expand(len(x), -1, -1, -1), align_corners=False), grid=grid
    )
    return Net(
        lambda net, x: net.last(net.warp(net.first(x))), first=conv(3, 4), last=conv(4, 2), warp=warp
    ).eval()


def block() -> nn.Module:
    return Net(
        lambda net, x: net.down(F.relu(net.up(x))), up=nn.Linear(16, 32), down=nn.Linear(32, 16)
    ).eval()


def without(monkeypatch: pytest.MonkeyPatch, *lacks: str) -> str:
    monkeypatch.setitem(TARGETS, "small", replace(WEB, name="small", lacks=frozenset(lacks)))
    return "small"


def test_an_operator_without_a_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = without(monkeypatch, "GridSample", "com.microsoft::Conv")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_text("of an earlier run")
    (out / "report.json").write_text('{"inputs": []}')
    with pytest.raises(TargetError) as caught:
        compressor.compress(
            bent(), torch.randn(2, 3, 8, 8), passes="fold", target=target, output=out, measure=False
        )
    assert str(caught.value) == (
        "warp/GridSample: the runtime of target small has no kernel for GridSample; replace it in warp, or choose a "
        "target that has it (--target cpu)"
    )
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["model.onnx", "out", "report.json"]
    assert (out / "model.onnx").read_text() == "of an earlier run"


def test_an_operator_that_a_pass_brings_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float model runs there; the integer one does not."""
    x = torch.randn(8, 4, 16)
    for lacks in ("com.microsoft::MatMulIntegerToFloat", "MatMulIntegerToFloat"):
        target = without(monkeypatch, lacks)
        options = {"target": target, "output": tmp_path / "out", "measure": False}
        compressor.compress(block(), x, passes="fold", **options)
        integer = {"passes": "int8(rounding=nearest,measure=false)", "calibration": [torch.randn(64, 4, 16)]}
        if "::" not in lacks:  # an operator of the same name, and another domain
            compressor.compress(block(), x, **integer, **options)
            continue
        with pytest.raises(
            TargetError, match=r"^(up|down)/MatMulIntegerToFloat: .* com\.microsoft::MatMulInteger"
        ):
            compressor.compress(block(), x, **integer, **options)


def test_ends_that_cannot_be_said_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        TargetError, match=r"^\w+ is bf16, which the runtime of target web neither takes nor gives"
    ):
        compressor.compress(
            block().bfloat16(), torch.randn(2, 16).bfloat16(), passes="fold", target="web", output=tmp_path / "out",
            measure=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_what_is_slower_there_is_said(tmp_path: Path) -> None:
    net = Net(lambda net, x: net.a(x), a=nn.Linear(256, 256)).eval()
    said = {}
    for target in ("web", "cpu"):
        made = compressor.compress(
            net, torch.randn(2, 256), passes="int4", target=target, output=tmp_path / target, measure=False
        )
        said[target] = any("MatMulNBits slower than floats" in words for words in made.report["notices"])
    assert said == {"web": True, "cpu": False}


def test_browsers_take_what_they_have_kernels_for(tmp_path: Path) -> None:
    made = compressor.compress(
        bent(), torch.randn(2, 3, 8, 8), passes="fold", target="web", output=tmp_path / "out", measure=False
    )
    assert made.report["emitted"]["operators"]["GridSample"] == 1
    assert made.report["emitted"]["oldest_runtime"] == "1.17"
    assert all(name == "bf16" or "::" in name for name in WEB.lacks)


# ---------------------------------------------------------------- the size of the file


def test_a_file_that_is_too_large_is_not_written(tmp_path: Path) -> None:
    net = Net(
        lambda net, x: net.down(F.relu(net.up(x))), up=nn.Linear(64, 256), down=nn.Linear(256, 16)
    ).eval()
    x, out = torch.randn(4, 64), tmp_path / "out"
    options = {"output": out, "measure": False, "calibration": [torch.randn(64, 64)]}
    with pytest.raises(UsageError) as caught:
        compressor.compress(net, x, passes="fold", max_mb=0.05, **options)
    said = str(caught.value)
    assert re.match(
        r"model\.onnx has 0\.08\d* MB, and --max-mb 0\.05 was asked for: add int8, prune, squeeze; ", said
    )
    assert said.endswith(
        "its largest tensors are up.weight (0.06554 MB), down.weight (0.01638 MB), up.bias (0.001024 MB)"
    )
    assert list(tmp_path.iterdir()) == []
    integer = "int8(rounding=nearest,measure=false)"
    made = compressor.compress(net, x, passes=integer, max_mb=0.05, **options)
    assert 0.02e6 < made.report["emitted"]["bytes"] < 0.05e6
    with pytest.raises(
        UsageError, match=r"^model\.ort has .* add prune, squeeze; its largest tensors are up\.weight"
    ):
        compressor.compress(net, x, passes=integer, target="mobile", max_mb=0.02, **options)
    assert made.onnx is not None and made.onnx.exists() and not (out / "model.ort").exists()


def test_the_command_line_takes_a_size(run, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(block(), (torch.randn(2, 16),)), tmp_path / "block.pt2")
    words = (tmp_path / "block.pt2", "--passes", "fold", "--no-measure", "-o", tmp_path / "out", "--max-mb")
    code, _, err = run(*words, "0.001")
    assert code == 2 and err.startswith("error: model.onnx has 0.0") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run(*words, "1")[0] == 0 and run(*words, "0")[0] == 2


# ---------------------------------------------------------------- openvino

OURS, THEIRS = "CPUExecutionProvider", "OpenVINOExecutionProvider"


def attention() -> nn.Module:
    """A convolution with SiLU, a sum, a pool, and attention under a mask that may hide everything."""

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(net.first(x))
        x = F.max_pool2d(x + F.relu(net.second(x)), 2).flatten(2).transpose(1, 2)
        shown = (x.sum(-1) > 0)[:, None, None]
        return net.last(F.scaled_dot_product_attention(*(net.qkv(x)[:, None].chunk(3, -1)), attn_mask=shown))

    layers = {"first": conv(3, 8), "second": conv(8, 8), "qkv": nn.Linear(8, 24), "last": nn.Linear(8, 4)}
    return Net(forward, **layers).eval()


def compiled(out: Path) -> compressor.Result:
    torch.manual_seed(0)
    calibration, x = [torch.randn(128, 3, 8, 8)], torch.randn(2, 3, 8, 8)
    passes = "fold,int8(rounding=nearest,equalise=false,measure=false)"
    return compressor.compress(
        attention(), x, passes=passes, target="openvino", calibration=calibration, output=out
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> compressor.Result:
    return compiled(tmp_path_factory.mktemp("openvino") / "out")


def test_openvino_gets_pairs_at_the_inputs_of_layers(made: compressor.Result) -> None:
    model = onnx.load(made.onnx)
    makers = {name: node for node in model.graph.node for name in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    constants = {i.name: i for i in model.graph.initializer}

    def quantised(name: str) -> onnx.NodeProto | None:
        """What made a value of integers, behind what only moves it."""
        while name in makers and makers[name].op_type in ("Transpose", "Reshape"):
            name = makers[name].input[0]
        return makers[name] if name in makers and makers[name].op_type == "DequantizeLinear" else None

    weighted = [node for node in layers if (q := quantised(node.input[1])) and q.input[0] in constants]
    assert len(weighted) == 4
    for node in weighted:
        read, weight = quantised(node.input[0]), quantised(node.input[1])
        assert read is not None and weight is not None
        assert constants[read.input[2]].data_type == onnx.TensorProto.UINT8
        assert constants[weight.input[0]].data_type == onnx.TensorProto.INT8
        assert len(constants[weight.input[1]].dims) == 1  # a scale for each channel
    bounds = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    makers_of_bounds = {makers[b].op_type for b in bounds if b in makers}
    assert len(bounds) == 4 and not makers_of_bounds & {"Conv", "Sigmoid", "Relu"}  # SiLU and sums are fused
    operators = {node.op_type for node in model.graph.node}
    assert "IsNaN" not in operators and all(node.domain == "" for node in model.graph.node)


def test_what_is_not_a_number_is_found_without_is_nan(tmp_path: Path) -> None:
    """Under a mask that hides everything, a softmax gives no numbers."""
    x = -torch.rand(2, 3, 8, 8)
    hidden = Net(
        lambda net, x: F.scaled_dot_product_attention(x, x, x, attn_mask=(x.sum(-1) > 0)[:, :, None])
    )
    graph = capture(hidden.eval(), x)
    (expected,) = graph.run(x)
    assert not expected.any()
    for name, dialect in (("IsNaN", ()), ("Equal", {"nans"})):
        file = emit(graph, tmp_path / f"{name}.onnx", dialect=dialect).path
        assert name in {node.op_type for node in onnx.load(file).graph.node}
        (seen,) = runtime.run(runtime.session(file), [x.numpy()])
        assert (seen == 0).all()


def test_without_its_provider_numbers_are_the_cpus_and_times_decide_nothing(made: compressor.Result) -> None:
    if THEIRS in runtime.providers():
        pytest.skip("OpenVINO's provider is installed")
    emitted = made.report["emitted"]
    assert emitted["verified"].startswith(f"on {OURS}: {THEIRS} is not installed here")
    assert emitted["latency"]["note"] == "timed on this host, not on the target"
    assert Stopwatch(OPENVINO, None, {}).elsewhere and not Stopwatch(CPU, None, {}).elsewhere


def test_a_file_runs_where_its_target_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verified, timed and compared with the provider of its target; OpenVINO's is played by the CPU's."""
    real, asked = runtime.session, list[str]()

    def session(model: Any, *, providers: Sequence[str] = (OURS,), **options: Any) -> Any:
        asked.extend(providers)
        return real(model, **options)

    monkeypatch.setattr(runtime, "session", session)
    monkeypatch.setattr(runtime, "providers", lambda: (THEIRS, OURS))
    monkeypatch.setattr(runtime, "starts", lambda provider: True)
    made = compiled(tmp_path / "out")
    assert made.report["emitted"]["provider"] == THEIRS and THEIRS in asked
    assert "note" not in made.report["emitted"]["latency"]
    asked.clear()
    model, example = attention(), torch.randn(2, 3, 8, 8)
    assert api.verify(model, made.onnx, example_inputs=example, tolerance=9.0)["provider"] == THEIRS
    assert THEIRS in asked
    other = emit(capture(model, example), tmp_path / "other.onnx").path
    asked.clear()
    rows = api.bench([other, made.onnx], seconds=0.05)
    assert [row["provider"] for row in rows] == [OURS, THEIRS] and asked[-2:] == [OURS, THEIRS]


def test_openvino_computes_floats_as_f32() -> None:
    name, options = runtime._with_options(THEIRS, 2)
    assert name == THEIRS and options["device_type"] == "CPU" and options["num_of_threads"] == "2"
    assert json.loads(options["load_config"]) == {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}
    assert runtime._with_options(OURS, 2) == (OURS, {})


def test_gpu_and_openvino_differ_in_the_zero_point_alone() -> None:
    assert replace(GPU.quant, activation="u8") == OPENVINO.quant


def test_the_next_provider_is_taken_where_one_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt, cuda = GPU.providers  # the wheel for GPUs lists both, also without TensorRT's libraries
    monkeypatch.setattr(runtime, "providers", lambda: (tensorrt, cuda, OURS))
    for able, words in (
        (cuda, f"on {cuda}: {tensorrt} does not start here"),
        (OURS, f"on {OURS}: {tensorrt} does"),
    ):
        monkeypatch.setattr(runtime, "starts", lambda provider, able=able: provider == able)
        provider, said = delivery.provider_of(GPU)
        assert provider == able and said.startswith(words)


def test_whether_a_provider_starts() -> None:
    assert runtime.starts(OURS) and not runtime.starts("NoSuchExecutionProvider")


def test_a_provider_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_create", lambda *_, **__: SimpleNamespace(get_providers=list))
    with pytest.raises(TargetError, match=f"{OURS} is installed, but did not start"):
        runtime.session(b"")
