"""compress sweep and compress batch: specs compared over seeds, and many models in one list."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from zoo import with_power

from compressor import cli
from compressor.errors import FileError, UsageError
from compressor.search import fleet, timing
from compressor.search.sweep import sweep


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    x = torch.randn(64, 3, 12, 12)
    with_power(net, x[:8])
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net.eval(), (x[:4],), dynamic_shapes=batch), folder / "net.pt2")
    np.savez(folder / "x.npz", input=x.numpy())
    return folder


def test_a_sweep_is_means_over_seeds_of_the_same_data(files, tmp_path):
    lines, notices = sweep(
        files / "net.pt2", "prune(macs={0.9,0.5},criterion=l1),fold",
        calibration=files / "x.npz", seeds=2, output=tmp_path / "out", workers=2,
    )  # fmt: skip
    assert [line.seeds for line in lines] == [2] * 2 and not any(line.failed for line in lines)
    by = {line.spec: line.values for line in lines}
    wide, narrow = by["prune(macs=0.9,criterion=l1),fold"], by["prune(macs=0.5,criterion=l1),fold"]
    assert narrow["macs"][0] < wide["macs"][0] < 1 and narrow["macs"][1] == 0
    assert narrow["flops"][0] == 2 * narrow["macs_count"][0]
    assert wide["p50_ms"][0] <= wide["p95_ms"][0] and wide["throughput"][0] > 0
    assert narrow["size_mb"][0] < wide["size_mb"][0]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "sweep.csv").read_text())))
    assert [row["spec"] for row in rows] == [line.spec for line in lines]
    assert float(rows[0]["macs"]) == pytest.approx(wide["macs"][0], rel=1e-5)
    assert rows[0]["joules"] == "n/a" or float(rows[0]["joules"]) > 0
    assert len(notices) == 2 and all(
        "was reached with" in said for said in notices
    )  # so small a network is cut in halves


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_the_command_says_of_a_sweep(files, tmp_path, capsys):
    words = [
        "sweep",
        str(files / "net.pt2"),
        "--passes",
        "fold",
        "--calib",
        str(files / "x.npz"),
        "--workers",
        "1",
    ]
    assert cli.main([*words, "--seeds", "2", "-o", str(tmp_path / "table")]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "fold" in line)
    assert "±" in row
    assert cli.main([*words, "--seeds", "1", "-o", str(tmp_path / "csv"), "--csv"]) == 0
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert line["spec"] == "fold" and float(line["macs"]) == 1

    none = [
        "int8" if word == "fold" else word for word in words if word not in ("--calib", str(files / "x.npz"))
    ]
    assert cli.main([*none, "--seeds", "1", "-o", str(tmp_path / "none"), "--json"]) == 2
    said = capsys.readouterr()
    (line,) = json.loads(said.out)["lines"]
    assert line["seeds"] == 0 and "no spec gave a model" in said.err and "--calib" in said.err


def test_budgets_that_were_reached_apart_are_called_so():
    from compressor.search.sweep import Line, _notices

    def line(spec: str, macs: float) -> Line:
        return Line(spec, 1, (), {"macs": (macs, math.nan)})

    (said,) = _notices([line("prune(macs=0.5,criterion=l1)", 0.50), line("prune(macs=0.5,criterion=l2)", 0.47),
                        line("prune(macs=0.7)", 0.70), line("prune(macs=0.7,align=1)", 0.704)])  # fmt: skip
    assert said.startswith("macs=0.5 was reached with 47.0 to 50.0 %")


def test_joules_where_the_machine_counts_them(tmp_path):
    assert timing.energy(tmp_path) is None
    for package, used in ((0, 5_000_000), (1, 7_500_000)):
        folder = tmp_path / f"intel-rapl:{package}"
        (folder / "core").mkdir(parents=True)
        (folder / "energy_uj").write_text(f"{used}\n")
    (tmp_path / "intel-rapl:0:0").mkdir()
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("1\n")
    assert timing.energy(tmp_path) == 12.5
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("not yours")
    assert timing.energy(tmp_path) is None


LIST = """
[defaults]
calib = "x.npz"

[[model]]
path = "net.pt2"
passes = "fold,int8(rounding=nearest,equalise=false)"
output = "small"

[[model]]
path = "net.pt2"
passes = "{fold,none},int8(rounding=nearest,equalise=false,calibration={minmax,mse})"
constraint = "sqnr>=10"
trials = 2
output = "searched"

[[model]]
path = "missing.pt2"

[[model]]
path = "net.pt2"
passes = "fold"
latency-cmd = "false {onnx}"
output = "untimed"
"""


def test_a_list_is_made_once_and_one_that_fails_costs_the_others_nothing(files, capsys):
    (files / "models.toml").write_text(LIST)
    words = ["batch", str(files / "models.toml"), "--workers", "2", "--json"]
    assert cli.main(words) == 2
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert [row["state"] for row in rows] == ["done", "done", "refused", "refused"]
    assert "missing.pt2" in said.err and "false" in rows[3]["why"]
    for name in ("small", "searched"):
        report = json.loads((files / name / "report.json").read_text())
        assert "int8" in report["spec"] and (files / name / "model.onnx").exists()
    assert all(row["values"]["speedup"] > 0 for row in rows[:2])
    before = {name: (files / name / "model.onnx").stat().st_mtime_ns for name in ("small", "searched")}
    assert not [path for path in files.iterdir() if path.name.startswith(".")]

    (files / "models.toml").write_text(
        LIST.replace('int8(rounding=nearest,equalise=false)"\noutput', 'fp16"\noutput')
    )
    assert cli.main([*words, "-v"]) == 2
    said = capsys.readouterr()
    again = json.loads(said.out)
    assert "compiling net.pt2, net.pt2 ..." in said.err and "timing net.pt2  " in said.err
    assert "   2  missing.pt2  refused: " in said.err
    assert again[0]["spec"] == "fold,fp16" and again[1] == rows[1]
    after = {name: (files / name / "model.onnx").stat().st_mtime_ns for name in ("small", "searched")}
    assert after["small"] != before["small"] and after["searched"] == before["searched"]

    entry = fleet.read(files / "models.toml", None)[0]
    key = json.loads((entry.output / fleet.RECEIPT).read_text())["key"]
    assert fleet._known(entry, key).state == "done"
    page = (entry.output / "report.html").read_text()
    (entry.output / "report.html").write_text("")
    assert fleet._known(entry, key) is None  # all that was published is held to the receipt
    (entry.output / "report.html").write_text(page)
    assert fleet._known(entry, key).state == "done"
    (entry.output / "model.onnx").unlink()
    assert fleet._known(entry, key) is None  # a receipt alone is no model

    (files / "models.toml").write_text(LIST.replace("sqnr>=10", "sqnr>=11"))  # another search, in its place
    assert cli.main([*words]) == 2
    assert json.loads(capsys.readouterr().out)[1]["state"] == "done"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("[[model]]\npasses = 'fold'", UsageError, "model 1: it has no path"),
        ("", UsageError, "at least one model"),
        ("[[model]]\npath = 'a.pt2'\npases = 'fold'", UsageError, "did you mean 'passes'"),
        ("[[model]]\npath = 'a.pt2'\n[[model]]\npath = 'a.pt2'", UsageError, "two models would be written"),
        ("[[model", FileError, "not TOML"),
        ("model = ['a.pt2']", UsageError, "at least one model in a table"),
        ("[default]\ntarget = 'web'\n[[model]]\npath = 'a.pt2'", UsageError, "did you mean 'defaults'"),
        ("[[model]]\npath = 'a.pt2'\npasses = 5", UsageError, "'passes' is a word, not 5"),
        (
            "[[model]]\npath = 'a.pt2'\nconstraint = ['drop<=1', 3]",
            UsageError,
            "'constraint' is a word, or a list",
        ),
        ("[[model]]\npath = 'a.pt2'\ntrials = 0", UsageError, "'trials' is a whole number, 1 or more, not 0"),
        ("[[model]]\npath = 'a.pt2'\ntrust-pickle = 1", UsageError, "'trust-pickle' is true or false"),
        ("[[model]]\npath = 'a.pt2'\nmax-mb = nan", UsageError, "'max-mb' is a number above 0"),
        (
            "[[model]]\npath = 'a.pt2'\nmin-ort = '1.17'\nmin_ort = '1.18'",
            UsageError,
            "'min_ort' is said twice",
        ),
        ("[[model]]\npath = 'a.pt2'\nmeasure = true", UsageError, "unknown key 'measure'"),
        (
            "[[model]]\npath = 'a.pt2'\noutput = 'x'\n[[model]]\npath = 'b.pt2'\noutput = 'y/../x'",
            UsageError,
            "two models would be written",
        ),
        (
            "[[model]]\npath = 'a.pt2'\ntrials = 1\n[[model]]\npath = 'b.pt2'\noutput = 'a-search'",
            UsageError,
            "two models would be written",
        ),
        ("[[model]]\npath = 'a.pt2'\noutput = '.'", UsageError, "where the list is"),
    ],
)
def test_what_a_list_gets_wrong_is_said_before_anything_runs(tmp_path, text, error, words):
    (tmp_path / "list.toml").write_text(text)
    with pytest.raises(error, match=words):
        fleet.read(tmp_path / "list.toml", None)


def test_names_are_relative_to_the_list_and_words_are_lists(tmp_path, monkeypatch):
    (tmp_path / "style").mkdir()
    (tmp_path / "arch.py").write_text("")
    (tmp_path / "list.toml").write_text(
        "[[model]]\npath = 'a.pt2'\nadapter = 'style:0.5'\nmodel = 'arch.py:net'\n"
        "allow-missing = '*head*'\neval = 'm:f'"
    )
    monkeypatch.chdir(tmp_path.parent)
    (entry,) = fleet.read(tmp_path / "list.toml", None)
    assert entry.path == tmp_path / "a.pt2"  # and no other of that name
    assert entry.options == {
        "adapter": [f"{tmp_path / 'style'}:0.5"], "model_spec": f"{tmp_path / 'arch.py'}:net",
        "allow_missing": ["*head*"], "evaluate": "m:f",
    }  # fmt: skip


def test_a_folder_of_others_is_not_touched(files, tmp_path, capsys):
    (tmp_path / "list.toml").write_text(
        f"[[model]]\npath = '{files / 'net.pt2'}'\ncalib = '{files / 'x.npz'}'\n"
        "passes = 'fold'\ntrials = 1\noutput = 'net'"
    )
    mine = tmp_path / "net-search" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    assert cli.main(["batch", str(tmp_path / "list.toml"), "--workers", "1"]) == 2
    assert mine.read_text() == "precious" and "no batch has made it" in capsys.readouterr().err
