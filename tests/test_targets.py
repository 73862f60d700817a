"""What a target's runtime lacks is refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import Net, conv
from torch import nn
from torch.nn import functional as F

import compressor
from compressor.errors import TargetError
from targets import TARGETS
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
    with pytest.raises(TargetError) as caught:
        compressor.compress(
            bent(), torch.randn(2, 3, 8, 8), passes="fold", target=target, output=out, measure=False
        )
    assert str(caught.value) == (
        "warp/GridSample: the runtime of target small has no kernel for GridSample; replace it in warp, or choose a "
        "target that has it (--target cpu)"
    )
    assert [f.name for f in tmp_path.rglob("*")] == ["out", "model.onnx"]
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


def test_browsers_take_what_they_have_kernels_for(tmp_path: Path) -> None:
    made = compressor.compress(
        bent(), torch.randn(2, 3, 8, 8), passes="fold", target="web", output=tmp_path / "out", measure=False
    )
    assert made.report["emitted"]["operators"]["GridSample"] == 1
    assert made.report["emitted"]["oldest_runtime"] == "1.17"
    assert all(name == "bf16" or "::" in name for name in WEB.lacks)
