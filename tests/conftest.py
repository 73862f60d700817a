"""Shared by all tests: one thread, a torchvision that imports, and the command line as a function.

pyproject.toml turns warnings that our own packages cause into errors.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "shim"

# Tests run side by side; a pool of threads in each of them would only fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import it before compressor does
os.environ.pop("COLUMNS", None)  # workers inherit their terminal's width, which tables would take
_SHIM = runpy.run_path(str(SHIM / "sitecustomize.py"))  # the operators live as long as what defined them
if str(SHIM) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SHIM), os.environ.get("PYTHONPATH")]))


def hears_ctrl_c() -> None:
    """For `preexec_fn`: a shell that starts the suite in the background has it ignore SIGINT, children included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same weights, whichever ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """`compress WORDS...` in this process: (exit code, standard output, standard error)."""
    from compressor.cli import main

    def call(*words: str | os.PathLike[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compress"])
        code = main([os.fspath(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python WORDS...` in a process of its own, by default in an empty folder."""

    def call(*words: str, cwd: Path = tmp_path, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **options,
        )

    return call
