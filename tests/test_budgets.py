"""Budgets as a user gives them on the command line: what is measured where, what is out of reach, what is shown."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from zoo import with_power

from compressor import device, registry
from compressor.budgets import closest, on_the_way
from compressor.report import read_report

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.pt2 (convolutions of 32 and 24 channels, five classes) and calib.npz with labels."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    x = torch.randn(64, 3, 8, 8)
    program = torch.export.export(
        with_power(net, x), (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
    )
    torch.export.save(program, folder / "net.pt2")
    np.savez(folder / "calib.npz", x=x.numpy(), y=net(x).argmax(1).numpy())
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("net.pt2", "calib.npz"):
        shutil.copy(made / name, name)
    return tmp_path


def row(folder: Path) -> dict:
    return next(r for r in read_report(folder / "report.json")["rows"] if r["pass"] == "prune")


def test_an_impossible_budget_is_wrong_usage_and_writes_nothing(run: Run, files: Path) -> None:
    code, out, err = run("net.pt2", "--passes", "prune(macs=0.01)", "--output", "out", "--no-measure")
    assert (code, out) == (2, "") and not Path("out").exists()
    assert err.startswith("error: prune(macs=0.01): out of reach, 0.") and err.count("\n") == 1
    assert "'compress inspect MODEL --groups' says why the rest stays" in err
    assert sorted(p.name for p in files.iterdir()) == ["calib.npz", "net.pt2"]


def test_latency_is_measured_by_the_users_command_and_replayed(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device whose milliseconds are bytes of the file, which notes each time that it is asked."""
    Path("time.sh").write_text('echo asked >> asked\nprintf "runs: 50, median: %d ms\\n" "$(wc -c < "$1")"\n')
    monkeypatch.setattr("compressor.budgets.TRIES", 3)
    words = ("net.pt2", "--passes", "prune(latency=0.85,align=1)", "--latency-cmd", "sh time.sh {onnx}")
    code, out, err = run(*words, "--target", "mobile", "--output", "a")
    assert (code, err) == (0, ""), err
    said = row(Path("a"))["facts"]["latency"]
    assert said["timed_on"] == "the device, by --latency-cmd"
    assert 0.7 * said["before_ms"] < said["after_ms"] <= 0.85 * said["before_ms"]
    report = read_report("a/report.json")
    assert report["emitted"]["latency"]["ratio"] > 1.1
    assert "timed on the device, by --latency-cmd" in report["emitted"]["latency"]["note"]
    assert any("prune(latency=0.85,align=1): " in n and "the device" in n for n in report["notices"])
    assert "timed on the device, by --latency-cmd" in " ".join(out.split())
    asked = len(Path("asked").read_text().splitlines())
    again = ("--latency-table", "a/report.json", "--stop-after", "prune", "--json")
    code, out, err = run(*words, "--target", "mobile", *again)
    assert code == 0 and json.loads(out)["rows"][1]["facts"] == row(Path("a"))["facts"]
    assert len(Path("asked").read_text().splitlines()) == asked, "every answer was in the table"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("true", 2, "error: --latency-cmd 'true': write {onnx} where the path of the ONNX file goes"),
        ("false {onnx}", 8, "error: --latency-cmd 'false {onnx}': exit code 1"),
        ("echo {onnx} >/dev/null; echo well", 8, "must be milliseconds; it printed 'well'"),
        ("sleep 9 # {onnx}", 8, "no answer within 0.2 s"),
    ],
)
def test_a_command_that_fails_is_one_line(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, command: str, code: int, message: str
) -> None:
    honest = device.milliseconds
    monkeypatch.setattr(device, "milliseconds", lambda command, path: honest(command, path, timeout=0.2))
    done, out, err = run(
        "net.pt2", "--passes", "prune(latency=0.6)", "--latency-cmd", command, "--stop-after", "prune"
    )
    assert (done, out) == (code, "") and message in err and err.count("\n") == 1


def test_a_latency_of_another_machine_says_where_it_was_timed(run: Run, files: Path) -> None:
    code, out, err = run(
        "net.pt2",
        "--passes",
        "prune(latency_ms=1000)",
        "--target",
        "mobile",
        "--stop-after",
        "prune",
        "--json",
    )
    assert (code, err) == (0, "")
    (notice,) = [n for n in json.loads(out)["notices"] if n.startswith("prune(latency_ms=1000")]
    assert notice.endswith("timed on this host, not on the target")


def test_a_metric_of_the_users_says_how_far(run: Run, files: Path) -> None:
    words = ("net.pt2", "--passes", "prune(max_drop=0.25,align=1)", "--no-measure")
    code, _, err = run(*words, "--stop-after", "prune")
    assert code == 2 and "prune(max_drop=0.25): needs a metric: --eval DATA (with labels y)" in err
    code, _, err = run(*words, "--eval", "calib.npz", "--output", "out")
    assert (code, err) == (0, "")
    facts = row(Path("out"))["facts"]
    assert facts["metric"]["before"] == 1.0 and 0.75 <= facts["metric"]["after"] < 1
    assert row(Path("out"))["metric"]["top1"] == facts["metric"]["after"] and facts["macs"] < 1


def test_labels_of_the_calibration_data_serve_taylor(run: Run, files: Path) -> None:
    words = (
        "net.pt2",
        "--passes",
        "prune(macs=0.6,criterion=taylor)",
        "--no-measure",
        "--stop-after",
        "prune",
        "--json",
    )
    code, _, err = run(*words)
    assert code == 2 and "needs calibration data" in err
    code, out, err = run(*words, "--calib", "calib.npz")
    assert (code, err) == (0, "")
    facts = json.loads(out)["rows"][1]["facts"]
    assert facts["criterion"] == "taylor" and 0.5 < facts["macs"] <= 0.6
    Path("mine.py").write_text("def loss(outputs, labels):\n    return outputs[0].square().mean()\n")
    named = words[2].replace("taylor", "taylor,loss=mine:loss")
    code, out, err = run(*words[:2], named, *words[3:], "--calib", "calib.npz")
    assert (code, err) == (0, "") and json.loads(out)["rows"][1]["config"] == named
    code, _, err = run(*words[:2], named.replace("mine:loss", "mine:los"), *words[3:], "--calib", "calib.npz")
    assert code == 2 and err.startswith("error: prune(loss=...) mine:los: ")


def test_inspect_shows_the_groups_of_a_model_and_of_a_run(run: Run, files: Path) -> None:
    code, out, err = run("inspect", "net.pt2", "--groups")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"0 32 {registry.target(None).channel_multiple} 3 7.81 k 498 k kept" in lines
    assert "6 5 5 2 125 120 frozen it reaches output output" in lines
    assert any(line.startswith("with every layer at its least width") for line in lines)
    code, out, _ = run("inspect", "net.pt2", "--groups", "--json")
    groups = json.loads(out)["groups"]
    assert groups[0]["tensors"] == ["0.weight", "0.bias", "2.weight"] and groups[0]["state"] == "kept"
    assert run("net.pt2", "--passes", "prune(macs=0.5,align=8)", "--no-measure", "--output", "out")[0] == 0
    code, out, _ = run("inspect", "out/report.json", "--groups")
    assert code == 0 and any("-> " in line and " pruned" in line for line in out.splitlines())
    ledger = row(Path("out"))["facts"]["ledger"]
    assert (ledger[0]["state"], ledger[0]["width"], ledger[0]["tensors"]) == ("pruned", 32, 3)
    assert f"32 -> {ledger[0]['left']} channels" in [r["what"] for r in row(Path("out"))["rewrites"]]
    assert run("inspect", "out", "--groups")[1] == out
    code, _, err = run("inspect", "out/model.onnx", "--groups")
    assert code == 2 and "--groups is for a PyTorch model, or the report.json" in err
    assert run("net.pt2", "--passes", "fold", "--no-measure", "--output", "folded")[0] == 0
    code, _, err = run("inspect", "folded", "--groups")
    assert code == 2 and "no pass of this run pruned" in err


def test_halving_ends_at_the_last_that_fits() -> None:
    asked: list[float] = []

    def fits(share: float) -> bool:
        asked.append(share)
        return share <= 0.4

    assert closest(fits, good=0.0, bad=1.0, tries=6) == pytest.approx(0.4, abs=1 / 64) and len(asked) == 6
    assert closest(lambda share: share >= 0.7, good=1.0, bad=0.2, tries=8) == pytest.approx(
        0.7, abs=0.8 / 256
    )
    assert closest(lambda share: False, good=0.0, bad=1.0, tries=3) == 0.0


def test_the_way_to_a_goal_has_steps_of_the_same_share() -> None:
    before, goal = {"macs": 100.0, "params": 10.0, "bytes": 0.0}, {"macs": 25.0, "bytes": 0.0}
    assert list(on_the_way(before, goal, 2)) == [{"macs": 50, "bytes": 0}, {"macs": 25, "bytes": 0}]


def test_examples_are_scripts() -> None:
    script = Path(__file__).resolve().parent.parent / "examples" / "latency_over_adb.sh"
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
