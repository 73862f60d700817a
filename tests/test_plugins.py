"""Passes and targets of other packages, installed as a user installs them and used by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages of examples/, as pip puts them into one."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("plugin_pass", "plugin_target"):
        source = tmp_path_factory.mktemp(name)
        for file in (ROOT / "examples" / name).iterdir():
            if file.is_file():
                (source / file.name).write_bytes(file.read_bytes())
        words = [
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            str(folder),
            str(source),
        ]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=120)
    return folder


def command(site: Path, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "compressor", *words],
        cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_they_are_listed(installed: Path) -> None:
    passes, targets = (command(installed, one).stdout for one in ("passes", "targets"))
    assert "hardswish" in passes and "no exponential" in passes
    assert "kiosk" in targets and "Arm board" in targets


def test_they_are_used_by_name(installed: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    program = torch.export.export(
        net.eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save(torch.randn(40, 3, 8, 8), tmp_path / "data.pt")
    spec = "fold,hardswish(ignore=3),int8(rounding=nearest)"
    done = command(
        installed,
        "net.pt2",
        "--target",
        "kiosk",
        "--passes",
        spec,
        "--calib",
        "data.pt",
        "-o",
        "out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    row = next(one for one in report["rows"] if one["pass"] == "hardswish")
    assert (row["contract"], row["status"], len(row["rewrites"])) == ("bounded", "proved", 1)
    assert row["declines"][0]["reason"] == "it is in `ignore`"
    assert report["target"]["name"] == "kiosk" and report["emitted"]["oldest_runtime"] == "1.16"
    assert json.loads((tmp_path / "out" / "signature.json").read_text())["inputs"][0]["shape"][0] == 1


def test_one_that_does_not_import_is_named(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compressor.passes]\nbroken = no_such_module:Pass\n")
    done = command(tmp_path, "passes")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert (
        "broken" in done.stderr and "no_such_module" in done.stderr and "pip uninstall broken" in done.stderr
    )
