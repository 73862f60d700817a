"""Processors that add 8-bit products in 16 bits: what is made for them, and what is said of files that are not."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import nn

import compressor
from compressor import measure, registry, runtime, sessions, tidy
from compressor.api import verify
from compressor.ir import Input

SPEC = "fold,int8(calibration=minmax,equalise=false,rounding=nearest)"
here = pytest.mark.skipif(
    not measure.saturation(), reason="sums of this machine's 8-bit products do not saturate"
)


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    for layer in net[::2]:
        nn.init.uniform_(
            layer.weight, 0.02, 0.03
        )  # all of one sign, so that each pair of products is near its limit
    return net.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, compressor.Result]:
    """A network of large products, for both kinds of processors. It stays integer: nothing is timed."""
    x = torch.rand(32, 64)
    folder = tmp_path_factory.mktemp("saturation")
    options = {"passes": SPEC, "calibration": [x], "measure": False}
    return {
        target: compressor.compress(network(), x[:4], target=target, output=folder / target, **options)
        for target in ("cpu", "cpu-avx2")
    }


@pytest.mark.parametrize(("isa", "name"), [("avx2", "cpu-avx2"), ("avx512_vnni", "cpu"), ("arm_dot", "cpu")])
def test_the_default_target_is_this_machine(monkeypatch, isa, name):
    monkeypatch.setattr(measure, "machine", lambda: {"cpu": "any", "cores": 1, "isa": isa})
    assert registry.native() == registry.target(None).name == name
    result = compressor.compress(nn.Linear(4, 4), torch.rand(2, 4), passes="fold", stop_after="fold")
    assert result.report["target"]["name"] == name
    assert any("no VNNI" in notice for notice in result.report["notices"]) == (name == "cpu-avx2")


def test_files_are_held_to_sums_that_do_not_saturate(made):
    for result in made.values():
        (check,) = result.report["emitted"]["checks"]
        assert check["sqnr_db"] > 40
        assert result.report["emitted"]["operators"].get("QGemm", 0) == 3


@here
def test_what_other_sessions_give_here_is_measured_and_said(made, tmp_path):
    said = [notice for notice in made["cpu"].report["notices"] if "x64quantprecision" in notice]
    assert len(said) == 1 and "dB here" in said[0]
    assert not any("x64quantprecision" in notice for notice in made["cpu-avx2"].report["notices"])
    x = torch.rand(16, 64)
    inputs = [Input("input", torch.float32, ("batch", 64))]
    found = {
        name: sessions.saturated(result.onnx, "CPUExecutionProvider", inputs, inputs, [[x]])
        for name, result in made.items()
    }
    assert found["cpu"] < 20 and found["cpu-avx2"] == math.inf


def test_usage_opens_the_session_that_does_not_saturate(made):
    wide, narrow = ((made[name].output / "usage.md").read_text() for name in ("cpu", "cpu-avx2"))
    assert wide.count('"session.x64quantprecision", "1"') == 2  # Python, C++
    assert "x64quantprecision" not in narrow


def test_each_weight_has_a_zero_point_of_its_own(made):
    """ONNX Runtime 1.31 loads no file whose weights share one with the option that keeps sums from saturating."""
    model = onnx.load(made["cpu"].onnx)
    bytes_ = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    read = [name for node in model.graph.node for name in node.input if name in bytes_]
    assert len(read) == len(set(read)) == 6


def test_weights_of_seven_bits(made):
    model = onnx.load(made["cpu-avx2"].onnx)
    weights = [
        onnx.numpy_helper.to_array(t).astype(int)
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.INT8
    ]
    assert 60 <= max(np.abs(w).max() for w in weights) <= 64


@here
def test_verify_says_what_sessions_without_the_option_give(made):
    x = torch.rand(16, 64)
    found = verify(network(), made["cpu"].onnx, data=x, example_inputs=x[:4])
    assert found["ok"] and "dB here" in found["warning"]
    assert "warning" not in verify(network(), made["cpu-avx2"].onnx, data=x, example_inputs=x[:4])


# -------------------------------------------------------------------- weights that several nodes read


class Twice(nn.Module):
    """One layer, applied twice, as in models that share the weights of their blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = network()[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x) / 64)


@pytest.mark.parametrize("target", ["cpu", "mobile"])
@pytest.mark.parametrize("spec", [SPEC, "fold,int8(scheme=dynamic)"])
def test_shared_weights_are_held_to_exact_sums_too(spec, target, tmp_path):
    torch.manual_seed(0)
    x = torch.rand(32, 64)
    data = None if "dynamic" in spec else [x]
    result = compressor.compress(
        Twice().eval(),
        x[:4],
        passes=spec,
        calibration=data,
        target=target,
        measure=False,
        output=tmp_path / "out",
    )
    (check,) = result.report["emitted"]["checks"]
    assert check["sqnr_db"] > 30
    said = any("several nodes read one weight" in notice for notice in result.report["notices"])
    assert said == (not runtime.takes_exact(result.onnx))
    assert said == (runtime.EXACT not in (tmp_path / "out" / "usage.md").read_text())
    model = onnx_ir.load(result.onnx)
    before = sum(value.dtype == onnx_ir.DataType.INT8 for value in model.graph.initializers.values())
    tidy.own_weights(model)
    uses = [len(v.uses()) for v in model.graph.initializers.values() if v.dtype == onnx_ir.DataType.INT8]
    assert len(uses) > before and set(uses) == {1}
