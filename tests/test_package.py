"""What gets installed: three packages, their type markers, two scripts, and versions that fit together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import compressor

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources, so that the checkout stays clean."""
    pytest.importorskip("setuptools", minversion="77")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("compressor", "passes", "targets", "tests", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"compressor", "passes", "targets", f"compressor-{compressor.__version__}.dist-info"}
    for package in ("compressor", "passes", "targets"):
        assert f"{package}/py.typed" in wheel.namelist()
        sources = {f"{package}/{path.name}" for path in (ROOT / package).glob("*.py")}
        assert sources <= set(wheel.namelist())


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"compressor-{compressor.__version__}.dist-info"
    meta = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert meta["License-Expression"] == "Apache-2.0" and meta["Requires-Python"] == ">=3.10"
    needs = meta.get_all("Requires-Dist")
    assert "torch>=2.9" in needs, "no cap on torch"
    assert {"hf", "dev", "demo"} <= set(meta.get_all("Provides-Extra"))
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    for name in ("compress", "compressor"):
        assert f"{name} = compressor.cli:main" in scripts
    assert "compressr = " not in scripts


def test_every_dependency_is_pinned_and_tested_torch_is_pinned_torch() -> None:
    pins = {
        re.split(r"[=;]", line)[0].strip().lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    text = (ROOT / "pyproject.toml").read_text()
    needed = {name.lower() for name in re.findall(r'^\s+"([\w-]+)>=', text, re.M)}
    needed |= {
        name.lower()
        for line in re.findall(r"^\w+ = \[(.*)\]$", text, re.M)
        for name in re.findall(r'"([\w-]+)>=', line)
    }
    assert needed and needed - pins == set()
    assert needed - (pins - {"torch"}) == {"torch"}
    torch_pin = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert torch_pin is not None and torch_pin[1] == compressor.TESTED_TORCH[1]


def test_constraints_offer_a_version_for_each_python() -> None:
    """A pin for newer Pythons only would leave 3.10 unpinned."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if ";" in line]
    newer = {line.split("==")[0] for line in lines if '>= "3.11"' in line}
    older = {line.split("==")[0] for line in lines if '< "3.11"' in line}
    assert newer == older and "numpy" in newer


def test_the_ci_script_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "make check" in text and "make test" in text and "set -euo pipefail" in text


def test_third_parties_add_passes_and_targets(tmp_path: Path) -> None:
    """Entry points of another package: its pass and target are listed behind ours."""
    (tmp_path / "theirs.py").write_text(
        "from dataclasses import dataclass, replace\n"
        "from compressor.pipeline import EXACT, Outcome, Pass\n"
        "from compressor.target import Target\n"
        "@dataclass(frozen=True)\nclass Mine(Pass):\n    '''Does nothing.'''\n"
        "    name = 'mine'\n    contract = EXACT\n    strength: float = 0.5\n"
        "    def run(self, graph, ctx): return Outcome()\n"
        "BOARD = Target('board', 'a board of theirs', ('CPUExecutionProvider',))\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[compressor.passes]\nmine = theirs:Mine\n[compressor.targets]\nboard = theirs:BOARD\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    def listed(command: str, pythonpath: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "compressor", command],
            capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": pythonpath},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "strength=0.5" in listed("passes", paths) and "a board of theirs" in listed("targets", paths)
    assert "mine" not in listed("passes", os.environ.get("PYTHONPATH", ""))
