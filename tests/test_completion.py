"""What a shell is offered, as it asks for it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_imports import HEAVY

from compressor import registry

_CODE = (
    "import sys; sys.argv = ['compress']; from compressor.cli import main; code = main();"
    "print('LOADED', *{name.split('.')[0] for name in sys.modules}, file=sys.stderr); sys.exit(code)"
)


@pytest.fixture
def offered(tmp_path: Path) -> Callable[..., list[str]]:
    """What bash is offered for `compress WORDS... LAST`; nothing heavy may be loaded for it."""

    def ask(*words: str, shell: str = "bash") -> list[str]:
        line = ["compress", *words]
        where = line[-1] if shell == "fish" else str(len(line) - 1)
        variables = {
            "_COMPRESS_COMPLETE": f"{shell}_complete",
            "COMP_WORDS": " ".join(line),
            "COMP_CWORD": where,
        }
        done = subprocess.run(
            [sys.executable, "-c", _CODE], env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not set(done.stderr.split("LOADED ")[1].split()) & HEAVY
        return done.stdout.splitlines()

    return ask


def test_options_passes_and_targets(offered: Callable[..., list[str]]) -> None:
    assert offered("net.pt2", "--pas") == ["plain,--passes"]
    assert offered("--pas") == ["plain,--passes"], "also where no model stands in front"
    assert offered("net.pt2", "--passes", "s") == ["plain,shorten", "plain,squeeze"]
    assert offered("net.pt2", "--passes", "merge,pru") == ["plain,merge,prune"]
    assert offered("--passes", "merge", "--target", "qnn") == ["plain,qnn", "plain,qnn-a16"]
    assert offered("verify", "net.pt2", "x.onnx", "--aga") == ["plain,--against"]
    assert "plain,--partitions" in offered("inspect", "--")


def test_commands_and_files(offered: Callable[..., list[str]]) -> None:
    assert offered("ver") == ["plain,verify", "file,ver"]
    assert offered("bench", "a") == ["file,a"]
    assert offered("net.pt2", "--calib", "da") == ["file,da"]


def test_other_shells(offered: Callable[..., list[str]]) -> None:
    assert offered("net.pt2", "--pas", shell="fish")[0].startswith("plain")
    assert "--passes" in offered("net.pt2", "--pas", shell="zsh")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE], env=os.environ | {"_COMPRESS_COMPLETE": f"{shell}_source"}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "bash" in done.stderr and done.returncode:
        pytest.skip("no bash here to ask for its version")
    assert "_COMPRESS_COMPLETE" in done.stdout and "compress" in done.stdout


def test_the_names_are_those_of_the_table() -> None:
    assert set(registry.pass_names()) == set(registry.passes())
