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
from compressor.errors import TargetError, UsageError
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
    assert said.startswith(
        "model.onnx has 0.08 MB, and --max-mb 0.05 was asked for: add int8, prune, squeeze; "
    )
    assert said.endswith(
        "its largest tensors are up.weight (0.07 MB), down.weight (0.02 MB), up.bias (0.00 MB)"
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
