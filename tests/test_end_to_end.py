"""The whole line as a user drives it: a file in, a folder out, and every bad input with one line and its own code."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import hears_ctrl_c
from nets import contents
from torch import nn

from compressor.report import read_report

Run = Callable[..., tuple[int, str, str]]


class Small(nn.Module):
    """Images [N, 3, 8, 8] to logits [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.classes = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classes(self.norm(self.conv(x)).relu().mean((2, 3)))


def save(model: nn.Module, path: Path) -> None:
    batch = torch.export.Dim("batch")
    example = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=({0: batch},)), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt2, other.pt2 (the same with other weights), data.npz, and out/ as the first run left it."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    for name in ("model", "other"):
        small = Small()
        small(torch.randn(64, 3, 8, 8))
        save(small.eval(), folder / f"{name}.pt2")
    x = np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=np.arange(64) % 5)
    words = ["model.pt2", "--passes", "merge,int8", "--calib", "data.npz", "--eval", "data.npz", "-o", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "compressor", *words, "--no-measure"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made` to work in."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_becomes_a_folder(made: Path) -> None:
    report = read_report(made / "out" / "report.json")
    assert [row["pass"] for row in report["rows"]] == ["input", "merge", "fold", "int8"]
    assert report["inserted"] == ["fold"] and report["command"].startswith(
        "compress model.pt2 --passes merge,int8"
    )
    assert {row["status"] for row in report["rows"][2:]} == {"proved"}
    signature = json.loads((made / "out" / "signature.json").read_text())
    assert [one["name"] for one in signature["inputs"]] == ["x"]
    out = (made / "stdout.txt").read_text()
    assert (
        "fold was added" in out
        and out.rstrip().splitlines()[-1] == "python -m compressor bench out/model.onnx"
    )
    assert (made / "stderr.txt").read_text() == "" and "\x1b" not in out


def test_the_other_commands_take_what_came_out(run: Run, here: Path) -> None:
    code, out, err = run("verify", "model.pt2", "out/model.onnx", "--data", "data.npz")
    assert (code, err) == (0, "") and "the two models agree" in out
    code, out, err = run("verify", "other.pt2", "out/model.onnx", "--data", "data.npz")
    assert code == 7 and "do not agree" in out and "differ from those of other.pt2" in err
    code, out, _ = run("bench", "out/model.onnx", "--seconds", "0.1")
    assert code == 0 and "1.00x" in out
    for path in ("out", "out/report.json", "out/model.onnx", "model.pt2"):
        code, out, err = run("inspect", path)
        assert (code, err) == (0, "") and out, path


def test_the_same_words_give_the_same_model(run: Run, here: Path) -> None:
    before = (here / "out" / "model.onnx").read_bytes()
    words = ("model.pt2", "--calib", "data.npz", "-o", "again", "--no-measure")
    assert run(*words, "--passes", "merge,int8")[0] == 0
    assert (here / "again" / "model.onnx").read_bytes() == before
    assert run(*words, "--passes", "merge,fold")[0] == 0
    assert (here / "again" / "model.onnx").read_bytes() != before


def test_a_checkpoint_with_its_architecture(run: Run, here: Path) -> None:
    torch.manual_seed(0)
    torch.save({"state_dict": Small().state_dict()}, "weights.pt")
    Path("net.py").write_text(Path(__file__).read_text())
    words = ("--model", "net.py:Small()", "--input", "x:f32[?,3,8,8]", "--passes", "fold", "--no-measure")
    assert run("weights.pt", *words)[0] == 0 and Path("weights-compressed/model.onnx").exists()
    code, _, err = run("weights.pt")
    assert code in (2, 3) and "--model" in err
    state = Small().state_dict()
    del state["classes.bias"]
    torch.save(state, "weights.pt")
    code, _, err = run("weights.pt", *words)
    assert code == 3 and "classes.bias" in err


def test_a_model_may_lie_where_its_files_go(run: Run, here: Path) -> None:
    """Its own name is no reason to refuse, but where it would be written over."""
    Path("home").mkdir()
    shutil.copy("model.pt2", "home/model.pt2")
    before = Path("home/model.pt2").read_bytes()
    words = ("home/model.pt2", "--passes", "fold", "--no-measure", "-o", "home")
    code, _, err = run(*words, "--emit", "pt2")
    assert code == 5 and "holds model.pt2" in err
    assert run(*words)[0] == 0 and Path("home/model.onnx").exists()
    assert run(*words, "--emit", "pt2")[0] == 5
    assert Path("home/model.pt2").read_bytes() == before


def test_what_a_pass_left_does_not_mix_with_json(run: Run, here: Path) -> None:
    words = (
        "model.pt2",
        "--passes",
        "fold",
        "--no-measure",
        "--json",
        "--print-after",
        "fold",
        "-o",
        "printed",
    )
    code, out, err = run(*words)
    assert code == 0 and json.loads(out)["spec"] == "fold" and "conv2d" in err


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(x):\n    raise ValueError('no camera')\n", "raised ValueError (theirs.py:2): no camera"),
        ("def f(x):\n    return [1, 2]\n", "returned a list"),
        ("def f(x):\n    return None\n", "returned a NoneType"),
        ("def f(x):\n    return {'a': 'b'}\n", "returned a dict"),
        ("def f(x:\n", "raised SyntaxError"),
        ("1 / 0\n", "raised ZeroDivisionError (theirs.py:1)"),
    ],
)
@pytest.mark.parametrize("option", ["--eval", "--preprocess"])
def test_what_functions_of_the_users_do_wrong_is_said(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, option: str, text: str, said: str
) -> None:
    (here / "theirs.py").write_text(text)
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    words = ("model.pt2", "--passes", "fold", "--calib", "data.npz", "--no-measure", "-o", "wrong")
    code, _, err = run(*words, option, "theirs:f")
    assert code == 4 and (said in err or "returned a" in said + err) and err.count("\n") == 1
    assert not Path("wrong").exists()


@pytest.mark.parametrize(
    ("described", "said"),
    [
        *(
            (f"x:{one}", "leave --input out")
            for one in ("f32[7,3,8,8]", "f64[?,3,8,8]", "f32[?,3,8]", "f32[?,3,9,8]")
        ),
        ("y:f32[?,3,8,8]", "has no such input"),
    ],
)
def test_a_program_takes_what_it_was_exported_with(run: Run, here: Path, described: str, said: str) -> None:
    code, _, err = run("model.pt2", "--passes", "fold", "--input", described, "--no-measure", "-o", "wrong")
    assert code == 2 and said in err and not Path("wrong").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "--diff", "out", "out", "--layers"),
        ("inspect", "out/model.onnx", "--model", "nope:nope"),
        ("inspect", "out/report.json", "--adapter", "nowhere"),
        ("bench", "out/model.onnx", "--advise", "--profile"),
        ("model.pt2", "--stop-after", "fold", "--emit", "pt2"),
        ("model.pt2", "--stop-after", "fold", "--max-mb", "1"),
    ],
)
def test_options_that_would_do_nothing_are_refused(run: Run, here: Path, words: tuple[str, ...]) -> None:
    code, _, err = run(*words)
    assert code == 2 and any(one in err for one in words if one.startswith("--"))


def text_file(here: Path) -> list[str]:
    (here / "model.pt").write_text("these are not weights")
    return ["model.pt"]


def truncated(here: Path) -> list[str]:
    data = (here / "model.pt2").read_bytes()
    (here / "model.pt2").write_bytes(data[: len(data) // 2])
    return ["model.pt2"]


def flipped(here: Path) -> list[str]:
    """One bit of the largest tensor."""
    data = bytearray((here / "model.pt2").read_bytes())
    weight = torch.export.load(here / "model.pt2").state_dict["conv.weight"].detach().numpy().tobytes()
    data[data.index(weight[:64]) + 40] ^= 1
    (here / "model.pt2").write_bytes(data)
    return ["model.pt2"]


def onnx_model(here: Path) -> list[str]:
    return ["out/model.onnx"]


def not_a_number(here: Path) -> list[str]:
    broken = Small().eval()
    with torch.no_grad():
        broken.conv.weight[0, 0, 0, 0] = float("nan")
    save(broken, here / "model.pt2")
    return ["model.pt2"]


def does_not_export(here: Path) -> list[str]:
    (here / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a = torch.nn.Linear(3, 3)\n"
        "    def forward(self, x):\n        return self.a(x) if x.sum().item() > 0 else x\n"
    )
    torch.save(nn.ModuleDict({"a": nn.Linear(3, 3)}).state_dict(), here / "w.pt")
    return ["w.pt", "--model", "net.py:Net()", "--input", "x:f32[?,3]"]


def unknown_pass(here: Path) -> list[str]:
    return ["model.pt2", "--passes", "merge,fodl"]


def unknown_option(here: Path) -> list[str]:
    return ["model.pt2", "--passes", "prune(mac=0.5)"]


def wrong_order(here: Path) -> list[str]:
    return ["model.pt2", "--passes", "int8,merge"]


def unknown_target(here: Path) -> list[str]:
    return ["model.pt2", "--target", "cpuu"]


def no_data_file(here: Path) -> list[str]:
    return ["model.pt2", "--passes", "int8", "--calib", "nothing.npz"]


def wrong_shape(here: Path) -> list[str]:
    np.savez(here / "data.npz", x=np.zeros((16, 3, 9, 9), np.float32))
    return ["model.pt2", "--passes", "int8", "--calib", "data.npz"]


def wrong_type(here: Path) -> list[str]:
    np.savez(here / "data.npz", x=np.zeros((16, 3, 8, 8), np.int64))
    return ["model.pt2", "--passes", "int8", "--calib", "data.npz"]


def no_data(here: Path) -> list[str]:
    return ["model.pt2", "--passes", "int8"]


def missing(here: Path) -> list[str]:
    return ["modle.pt2"]


def impossible_budget(here: Path) -> list[str]:
    return ["model.pt2", "--passes", "prune(macs=0)"]


def no_such_device(here: Path) -> list[str]:
    return ["model.pt2", "--passes", "fold", "--output", "/proc/nowhere/out", "--no-measure"]


def empty_data(here: Path) -> list[str]:
    np.savez(here / "data.npz", x=np.zeros((0, 3, 8, 8), np.float32))
    return ["model.pt2", "--passes", "int8", "--calib", "data.npz"]


def output_is_a_file(here: Path) -> list[str]:
    (here / "taken").touch()
    return ["model.pt2", "--passes", "fold", "--output", "taken", "--no-measure"]


@pytest.mark.parametrize(
    ("prepare", "code", "words"),
    [
        (text_file, 3, "model.pt"),
        (truncated, 3, "model.pt2"),
        (flipped, 3, "model.pt2"),
        (onnx_model, 3, ".onnx"),
        (not_a_number, 3, "conv.weight"),
        (does_not_export, 6, "net.py"),
        (unknown_pass, 2, "'fold'"),
        (unknown_option, 2, "'macs'"),
        (wrong_order, 2, "--passes"),
        (unknown_target, 2, "'cpu'"),
        (no_data_file, 4, "nothing.npz"),
        (wrong_shape, 4, "data.npz"),
        (wrong_type, 4, "data.npz"),
        (empty_data, 4, "data.npz"),
        (no_data, 2, "--calib"),
        (missing, 3, "did you mean 'model.pt2'"),
        (impossible_budget, 2, "macs"),
        (no_such_device, 5, "cannot write"),
        (output_is_a_file, 5, "taken"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_input(run: Run, here: Path, prepare: Callable[[Path], list[str]], code: int, words: str) -> None:
    typed = prepare(here)
    if "--output" not in typed:
        typed += ["--output", "out"]
    before = contents(here / "out")
    seen, out, err = run(*typed)
    assert (seen, out) == (code, ""), err
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and words in err
    assert all(line.startswith("  ") for line in lines[1:]), "one line, and lists below it"
    assert "Traceback" not in err and "bug in compressor" not in err
    assert contents(here / "out") == before


def test_the_same_words_without_the_fault_work(run: Run, here: Path) -> None:
    assert run("model.pt2", "--passes", "fold", "--output", "free", "--no-measure")[0] == 0


def test_ctrl_c_leaves_the_output_as_it_was(here: Path) -> None:
    (here / "slow.py").write_text(
        "import time\ndef metric(run):\n    print('here', flush=True)\n    time.sleep(60)\n"
    )
    before = contents(here / "out")
    words = ["model.pt2", "--passes", "fold", "--eval", "slow:metric", "--output", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "compressor", *words],
        cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
    assert contents(here / "out") == before
    assert not [path.name for path in here.iterdir() if path.name.startswith(".out")]


# ------------------------------------------------------------------------------ the demo


@pytest.mark.slow
def test_the_demo_keeps_its_promises(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy within a point, a fifth of the size, faster, every contract proved."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    script = Path(__file__).resolve().parent.parent / "examples" / "digits.py"
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True)
    words = "digits.pt2 --passes merge,prune,int8 --calib digits.npz --eval digits-test.npz"
    code, out, err = run(*words.split())
    assert code == 0, err
    report = read_report("digits-compressed/report.json")
    emitted, rows = report["emitted"], report["rows"]
    before, after = rows[0]["metric"]["top1"], emitted["metric"]["top1"]
    assert before > 0.97 and after >= before - 0.01
    assert emitted["float_bytes"] >= 5 * emitted["bytes"]
    assert emitted["latency"]["ratio"] > 1
    assert [row["status"] for row in rows] == ["", *["proved"] * 4]
    assert "digits-compressed/model.onnx" in out.splitlines()[-1]
