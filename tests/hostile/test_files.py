"""Files that are damaged, or made to do harm: one line and its exit code, in little memory, and nothing is run.

Every file is read in a sandbox (sandbox.py) that notes what is run or written. A few accidents of each kind here, all
attacks; `benchmarks/hostile.py --files` draws thousands of accidents. What other files test is not repeated: gadgets in
checkpoints (tests/test_pickles.py), attacks on .pt2 (tests/test_gate.py).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import attacks
import honest
import pytest
from attacks import ATTACKS, Place
from mutations import damaged
from sandbox import MODULE, Answer, Sandbox

# An honest file of these takes seconds, because all of its model is then captured.
SLOW = {"hf config", "hf weights", "adapter config", "adapter weights", "preprocess", "pt2"}
ACCIDENTS = 2


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers peft")
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as made:
        yield made


@pytest.fixture(scope="module")
def kinds(box: Sandbox) -> dict[str, honest.Kind]:
    return honest.kinds(box.root / "models")


def empty(box: Sandbox) -> Path:
    shutil.rmtree(box.root / "files", ignore_errors=True)
    (box.root / "files").mkdir()
    return box.root / "files"


def read(box: Sandbox, kind: honest.Kind, command: tuple[str, ...], content: bytes | None = None) -> Answer:
    file = honest.written(kind, empty(box), content=content)
    return box.run(*honest.words(command, file, box.root / "models"))


def test_honest_files_are_read(box: Sandbox, kinds: dict[str, honest.Kind]) -> None:
    """Or nothing would be shown by refusing damaged ones. Reading them leaves no trace."""
    for name in kinds.keys() - SLOW - {"report"}:
        answer = read(box, kinds[name], kinds[name].commands[-1])
        assert (answer.code, answer.bad) == (0, []), f"{name}: {answer.said}"
    assert read(box, kinds["report"], kinds["report"].commands[0]).code == 0


def test_damaged_files_are_one_line(box: Sandbox, kinds: dict[str, honest.Kind]) -> None:
    refused = 0
    for name, kind in kinds.items():
        content = next(iter(kind.files.values()))
        for number in range(ACCIDENTS if name not in SLOW else 1):
            rng = random.Random(f"{name} {number}")
            change = damaged if name in SLOW else rng.choice(kind.changes)
            answer = read(box, kind, rng.choice(kind.commands), change(content, rng))
            assert answer.bad == [], f"{name}, accident {number}: {answer}"
            refused += answer.code > 0
    assert refused > len(kinds)


HARMLESS = {  # read as data, or refused; what matters is that nothing is run, written, or taken
    "checkpoint_that_loads_another", "parquet_with_a_pickled_type", "folder_with_pickles_that_nobody_asked_for",
    "adapter_that_names_a_module", "attention_that_is_fetched", "program_whose_members_lead_outside",
    "npz_that_unpacks_without_end", "onnx_that_makes_an_enormous_constant", "names_that_command_a_terminal",
    "onnx_names_that_command_a_terminal", "report_that_commands_a_terminal",
}  # fmt: skip


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attack(box: Sandbox, kinds: dict[str, honest.Kind], name: str) -> None:
    place = Place(empty(box), box.root / "models", box.canary, box.root / "secret.bin")
    answer = box.run(*ATTACKS[name](place))
    assert answer.bad == []
    assert (answer.code == 0) <= (name in HARMLESS), "it was taken for an honest file"


# -------------------------------------------------------------------- the sandbox itself


def test_what_runs_is_noticed(box: Sandbox, kinds: dict[str, honest.Kind]) -> None:
    """By consent the bomb goes off; and an import shows."""
    import torch

    folder = empty(box)
    torch.save(attacks.Bomb(box.canary), folder / "net.pt")
    assert "code of the file was run" in box.run(str(folder / "net.pt"), "--trust-pickle").bad
    folder = empty(box)
    torch.save(attacks.Nested(box.canary), folder / "net.pt")
    assert "code of the file was run" in box.run(str(folder / "net.pt"), "--trust-pickle").bad
    words = ["--model", f"{MODULE}:evil", "--input", "x:f32[?,3]"]
    net = honest.written(kinds["pt"], empty(box))
    assert "code of the file was run" in box.run(str(net), *words).bad


def test_what_is_written_or_too_much_is_noticed(box: Sandbox, kinds: dict[str, honest.Kind]) -> None:
    net = honest.written(kinds["pt"], empty(box))
    code = "import os\nfrom torch import nn\ndef make():\n    {}\n    return nn.Linear(2, 2)\n"
    for line, words in (
        ("open('../beside', 'w').close()", "open ../beside"),
        ("os.system('true')", "os.system"),
        ("print('\\x1b[2J')", "control characters"),
        ("os._exit(9)", "the process ended with 9"),
    ):
        (net.parent / "code.py").write_text(code.format(line))
        answer = box.run(str(net), "--model", f"{net.parent / 'code.py'}:make", "--input", "x:f32[?,2]")
        assert any(words in one for one in answer.bad), (line, answer)
        for left in ("beside", "cwd/beside"):
            (box.root / left).unlink(missing_ok=True)
