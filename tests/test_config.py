"""`compress.toml` and the plan: what a file says reaches the api, what is typed wins, and nothing runs code unasked."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sample_report import sample_report
from torch import nn

import compressor
from compressor import config, toml

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the api was called with, in a folder with model.pt2 and c.npz."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.pt2", "c.npz", "e.npz"):
        Path(name).touch()
    seen: list[dict[str, Any]] = []

    def compress(model: str, **options: Any) -> SimpleNamespace:
        options.pop("console")
        seen.append({"model": model, **options})
        return SimpleNamespace(output=None, onnx=None, report=sample_report())

    made = ModuleType("compressor.api")
    made.compress = compress  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "compressor.api", made)
    monkeypatch.setattr(compressor, "api", made, raising=False)
    return seen


EVERYTHING = (
    "model.pt2 --passes 'merge,prune(macs=0.5)' --target mobile --calib c.npz --calib-limit 64 --eval e.npz "
    "--model 'm.py:f(\"x\")' --adapter lora --adapter b:0.5 --combine cat --input 'x:f32[?,3]' --input 'y:i64[?]' "
    "--trust-pickle --static --no-measure --seed 3 --tolerance 0.001 --emit pt2 --limit fold=2 --limit merge=0 "
    "--max-mb 4.5 --latency-cmd 'time {onnx} \"a\\b\"' --time"
)


def test_what_is_saved_reads_back_to_the_same_command(run: Run, calls: list[dict[str, Any]]) -> None:
    code, _, err = run(*shlex.split(EVERYTHING), "--save-config", "saved.toml")
    assert (code, err) == (0, "")
    code, _, err = run("--config", "saved.toml")
    assert code == 0 and err == "options of saved.toml hold where none is typed\n"
    first, second = calls
    typed = first.pop("command"), second.pop("command")
    assert first == second
    assert typed[0].endswith("--save-config saved.toml")
    run(*shlex.split(typed[1])[1:])  # what the report says is a command that needs no file
    assert {**calls[2], "command": ""} == {**second, "command": ""}
    code, _, _ = run("--config", "saved.toml", "--save-config", "again.toml")
    assert Path("again.toml").read_text() == Path("saved.toml").read_text()


def test_what_cannot_be_saved_leaves_the_old_file(run: Run, calls: list[dict[str, Any]]) -> None:
    Path("saved.toml").write_text("seed = 1\n")
    code, _, err = run("model.pt2", "--output", "n\udcff", "--save-config", "saved.toml")
    assert code == 5 and "no UTF-8" in err and Path("saved.toml").read_text() == "seed = 1\n"
    assert not list(Path().glob(".saved*"))


def test_what_is_typed_beats_the_file(run: Run, calls: list[dict[str, Any]]) -> None:
    Path("compress.toml").write_text('passes = "fold"\nseed = 4\nmeasure = false\nadapter = ["a", "b"]\n')
    code, _, err = run("model.pt2", "--seed", "5", "--adapter", "c")
    assert code == 0 and err == "options of compress.toml hold where none is typed\n"
    assert calls[0].items() >= {"passes": "fold", "seed": 5, "measure": False, "adapter": ("c",)}.items()
    assert run("model.pt2", "-q") == (0, "", "")
    Path("other.toml").write_text('MODEL = "model.pt2"\nstatic = true\nemit = "pt2"\n')
    assert run("--config", "other.toml")[0] == 0
    assert calls[2].items() >= {"dynamic": False, "emit": ("pt2",)}.items() and "passes" not in calls[2]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('pases = "fold"', 2, "unknown key 'pases', did you mean 'passes'?"),
        ("config = 1", 2, "unknown key 'config'"),
        ('measure = "no"', 2, "'measure' is true or false"),
        ("passes = ['a', 'b']", 2, "'passes' takes one value"),
        ("seed = true", 2, "'seed' takes one value"),
        ("seed = -1", 2, "--seed"),
        ("passes =", 3, "not TOML"),
        ("[passes]\nfold = 1", 2, "'passes' takes one value"),
    ],
)
def test_a_file_that_is_wrong(run: Run, calls: list, text: str, code: int, message: str) -> None:
    Path("compress.toml").write_text(text)
    found, _, err = run("model.pt2")
    assert found == code and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert calls == []


@pytest.mark.parametrize(
    "text",
    [
        "trust-pickle = true",
        "latency-cmd = 'rm {onnx}'",
        "model = 'evil.py:f'",
        "eval = 'evil:f'",
        "preprocess = 'e:f'",
    ],
)
def test_a_file_that_nobody_named_runs_no_code(run: Run, calls: list, text: str) -> None:
    Path("compress.toml").write_text(text)
    code, _, err = run("model.pt2")
    assert (
        code == 2
        and "runs code; if you trust this file, name it: --config compress.toml" in err
        and not calls
    )
    assert run("model.pt2", "--config", "compress.toml")[0] == 0


def test_a_file_that_is_not_there(run: Run, calls: list) -> None:
    assert run("model.pt2", "--config", "none.toml") == (3, "", "error: none.toml: no such file\n")
    assert run("model.pt2", "--save-config", "no/folder.toml")[0] == 5 and calls == []


def test_text_survives_toml() -> None:
    values = {
        "MODEL": 'a "b"\\c\x7f\n\u00e9\U0001f600',
        "adapter": ["x", "y\t"],
        "seed": 3,
        "tolerance": 1e-05,
        "time": True,
    }
    assert toml.tomllib.loads(config.text(values)) == values


# -------------------------------------------------------------------------------- the plan


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3)
    ).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(net: Path, run: Run) -> None:
    before = sorted(net.iterdir())
    words = ("net.pt2", "--passes", "prune(macs=0.5),int8", "--dry-run", "--target", "mobile")
    code, out, _ = run(*words, "--json")
    plan = json.loads(out)
    rows = {row["pass"]: row for row in plan["passes"]}
    assert code == 0 and list(rows) == ["input", "prune", "fold", "int8"] and rows["fold"]["inserted"]
    params = 3 * 64 * 9 + 4 * 64 + 64 * 64 * 9 + 64
    assert (rows["input"]["params"], rows["input"]["bytes"]) == (params, 4 * params)
    assert rows["prune"]["macs"] == rows["input"]["macs"] / 2
    assert "pass some with --calib" in rows["int8"]["refuses"] and not rows["prune"]["refuses"]
    assert plan["target"]["name"] == "mobile" and plan["fixed"] == {"batch": 1}
    (net / "c.npz").touch()  # data are not read
    rows = {row["pass"]: row for row in json.loads(run(*words, "--json", "--calib", "c.npz")[1])["passes"]}
    assert not rows["int8"]["refuses"] and 0.25 < rows["int8"]["bytes"] / rows["fold"]["bytes"] < 0.3
    out = run(*words, "--calib", "c.npz")[1]
    assert "fold (added: a later pass needs it)" in out and "these are estimates" in out
    assert sorted(net.iterdir()) == [net / "c.npz", *before]
    assert run("net.pt2", "--passes", "int8,fold", "--dry-run")[0] == 2, "an order that cannot work"


def test_estimates_are_near_what_becomes_of_it(net: Path, run: Run) -> None:
    words = ("net.pt2", "--passes", "fold,fp16", "-o", "out", "--no-measure", "--target", "gpu")
    plan = {row["pass"]: row for row in json.loads(run(*words, "--dry-run", "--json")[1])["passes"]}
    report = json.loads(run(*words, "--json")[1])
    done = {row["pass"]: row for row in report["rows"]}
    assert plan["fold"]["params"] == pytest.approx(done["fold"]["params"], rel=0.01)
    assert plan["fp16"]["bytes"] == pytest.approx(done["fp16"]["bytes"], rel=0.02)
