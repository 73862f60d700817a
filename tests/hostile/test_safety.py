"""docs/safety.md: what it says is shown by tests that are there; and what no other file shows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from attacks import ATTACKS

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "safety.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[(\w+)\])?`")


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def missing(text: str) -> list[str]:
    """Names of tests that do not exist."""
    found = []
    for file, test, attack in NAMED.findall(text):
        there = (ROOT / file).is_file() and test in functions(ROOT / file)
        if not there or (attack and attack not in ATTACKS):
            found.append(f"{file}::{test}[{attack}]")
    return found


def test_every_test_that_the_page_names_exists() -> None:
    text = PAGE.read_text()
    assert missing(text) == [] and len(NAMED.findall(text)) > 40
    assert text.count("tests/") == len(NAMED.findall(text)) + text.count("`tests/hostile/sandbox.py`"), (
        "a name is no name"
    )
    assert missing("`tests/test_gate.py::test_nothing` `tests/none.py::test_x`") != []


def test_every_attack_is_on_the_page() -> None:
    named = {attack for *_, attack in NAMED.findall(PAGE.read_text())}
    assert set(ATTACKS) - named == set()


@pytest.mark.skipif(sys.platform != "linux", reason="where ONNX Runtime reports, it is on Linux")
def test_onnxruntime_reports_nothing(tmp_path: Path) -> None:
    """What it reports it first writes to the user's cache."""
    code = "from compressor import runtime; assert runtime.starts('CPUExecutionProvider')"
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    assert list(tmp_path.rglob("*")) == []
