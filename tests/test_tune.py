"""compress tune: searches end with the best model that keeps to the constraints, whatever happens on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import optuna
import pytest
import torch
from nets import Net, conv
from torch import nn
from zoo import with_power

from compressor import cli, registry
from compressor.errors import CompressorError, DataError, UsageError
from compressor.search.objectives import constraint
from compressor.search.space import Space
from compressor.search.study import Study
from compressor.search.trial import Outcome
from compressor.search.tune import default_space, made_task, tune

INT8 = "int8(equalise=false,rounding=nearest,calibration={minmax,mse,percentile})"
SPACE = f"fold,{{{INT8},none}}"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A small network, samples, and labels that it gives itself."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    x = torch.randn(96, 3, 16, 16)
    with_power(net, x[:8])
    net.eval()
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net, (x[:4],), dynamic_shapes=batch), folder / "net.pt2")
    np.savez(folder / "x.npz", input=x.numpy())
    with torch.no_grad():
        np.savez(folder / "test.npz", input=x[:64].numpy(), y=net(x[:64]).argmax(1).numpy())
    return folder


def search(files: Path, output: Path, **options: Any) -> Study:
    plain: dict[str, Any] = {"passes": SPACE, "trials": 4, "workers": 1}
    return tune(files / "net.pt2", calibration=files / "x.npz", output=output, **{**plain, **options})


@pytest.fixture(scope="module")
def found(files, tmp_path_factory) -> Study:
    """A whole search of a space of four."""
    return search(files, tmp_path_factory.mktemp("whole") / "out", evaluate=str(files / "test.npz"))


def test_the_best_model_is_on_disk_with_its_receipt(found):
    best = found.best
    assert best is not None and best in found.feasible and best.number in [one.number for one in found.front]
    onnx.checker.check_model(str(found.folder / "best" / "model.onnx"))
    report = json.loads((found.folder / "best" / "report.json").read_text())
    assert report["spec"] == best.spec and report["emitted"]["sha256"] == best.sha256
    assert best.values["latency_ms"] == min(one.values["latency_ms"] for one in found.feasible)
    front = sorted(int(one.name) for one in (found.folder / "pareto").iterdir())
    assert front == [one.number for one in found.front]
    kept = {int(one.name) for one in (found.folder / "trials").iterdir()}
    assert kept == {best.number, *front}


def test_trials_are_told_apart_and_measured(found):
    assert [one.spec for one in found.done] == list(dict.fromkeys(one.spec for one in found.done))
    integers = [one for one in found.done if "int8" in one.spec]
    (plain,) = (one for one in found.done if one.spec == "fold")
    assert len(integers) == 3
    assert all(one.values["size_mb"] < plain.values["size_mb"] for one in integers)
    assert plain.values["speedup"] == pytest.approx(1, abs=0.35) and plain.values["drop"] == 0
    assert plain.values["sqnr"] > 90 > max(one.values["sqnr"] for one in integers)
    assert any(one.reused for one in integers)  # fold was made once
    assert found.stopped == "" and found.summary()["best"] == found.best.number


def test_the_same_table_and_seed_find_the_same_with_more_workers(found, files, tmp_path):
    again = search(
        files, tmp_path / "out", evaluate=str(files / "test.npz"), workers=2,
        latency_table=found.folder / "tune.json",
    )  # fmt: skip
    assert [(one.number, one.spec, one.sha256) for one in again.done] == [
        (one.number, one.spec, one.sha256) for one in found.done
    ]
    assert [one.number for one in again.front] == [one.number for one in found.front]
    assert again.best is not None and again.best.values == found.best.values


def test_a_search_that_is_killed_loses_nothing(files, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "compressor", "tune", "net.pt2", "--calib", "x.npz", "--passes", SPACE]
    command += ["--output", str(out), "--workers", "1", "--trials", "4"]
    driver = subprocess.Popen(command, cwd=files, stderr=subprocess.PIPE)
    until(lambda: (out / "trials" / "0001" / "outcome.json").exists() or driver.poll() is not None)
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    made = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("trials/*/outcome.json")}
    assert 2 <= len(made) < 4
    until(lambda: not any(alive(int(child)) for child in children))
    with (out / "search.log").open("ab") as log:
        log.write(b'{"op_code": 6, "wor')  # a machine that goes down in the middle of a line
    study = search(files, out, resume=True)
    originals = [one.values["latency_ms"] * one.values["speedup"] for one in study.done]
    assert originals == pytest.approx([originals[0]] * 4)
    assert len(study.done) == len({one.spec for one in study.done}) == 4
    for path in out.glob("trials/*/outcome.json"):
        assert path.stat().st_mtime_ns == made.get(path.parent.name, path.stat().st_mtime_ns)
    with pytest.raises(UsageError, match="--resume"):
        search(files, out)
    for other, named in (
        ({"passes": "fold,{int8(equalise=false,rounding={nearest,adaptive}),none}"}, "another --passes"),
        ({"objectives": ["size", "latency"]}, "another --objective"),
        ({"constraints": ["sqnr>=5"]}, "another --constraint"),
        ({"calib_limit": 40}, "another model, data or options"),
    ):
        with pytest.raises(UsageError, match=named):
            search(files, out, resume=True, **other)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_worker_that_dies_and_a_metric_that_raises_cost_their_trials_alone(files, tmp_path, monkeypatch):
    (tmp_path / "moody.py").write_text(
        "import os, sys\n"
        "def metric(run):\n"
        "    frame = sys._getframe()\n"
        "    while frame and (frame.f_code.co_name != 'run' or 'trial' not in frame.f_locals):\n"
        "        frame = frame.f_back\n"
        "    spec = frame.f_locals['spec'] if frame else ''\n"
        "    if 'minmax' in spec: raise RuntimeError('no camera')\n"
        "    if 'mse' in spec: os._exit(9)\n"
        "    return float('nan') if 'percentile' in spec else 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # which workers inherit
    study = search(files, tmp_path / "out", evaluate="moody:metric", workers=2)
    why = {
        one.spec.partition("calibration=")[2].partition(",")[0]: one.why for one in study.outcomes.values()
    }
    assert why["minmax"] == "--eval metric raised RuntimeError (moody.py:7): no camera"
    assert why["percentile"] == "its metric is not a number"
    assert "worker died" in why["mse"]
    assert [one.spec for one in study.done] == ["fold"] and study.best == study.done[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibration": "missing.npz"}, "missing.npz"),
        ({"evaluate": "missing:metric"}, "missing"),
        ({"output": "taken"}, "it is a file"),
    ],
)
def test_what_no_trial_could_do_is_said_before_a_search_begins(files, tmp_path, options, words):
    (tmp_path / "taken").touch()
    given = {"calibration": files / "x.npz", "output": tmp_path / "out"} | options
    if "output" in options:
        given["output"] = tmp_path / options["output"]
    with pytest.raises(CompressorError, match=words):
        tune(files / "net.pt2", passes=SPACE, trials=4, workers=1, **given)
    assert not (tmp_path / "out" / "search.log").exists()


def test_a_metric_that_is_no_number_ends_the_search_at_once(files, tmp_path, monkeypatch):
    (tmp_path / "lost.py").write_text("def metric(run):\n    return float('nan')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="on the model as it came, gives nan"):
        search(files, tmp_path / "out", evaluate="lost:metric", constraints=["sqnr>=1"])
    assert not (tmp_path / "out" / "trials").exists()


@pytest.mark.parametrize("name", ["best/weights.pt", "trials/0000/notes.txt", "tune.json"])
def test_what_is_not_of_a_search_is_not_replaced(files, tmp_path, name):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(UsageError, match="which the search would replace"):
        search(files, tmp_path / "out")
    assert mine.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "text"), [("tune.json", "{"), ("tune.json", '{"a": 1}'), ("search.log", "hm\n")]
)
def test_damaged_files_of_a_search_are_named(files, tmp_path, name, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "search.log").touch()
    (tmp_path / "out" / name).write_text(text)
    with pytest.raises(UsageError, match=f"{name} is damaged"):
        search(files, tmp_path / "out", resume=True)


def test_a_pass_that_learns_may_win_back_what_is_lost(files, tmp_path):
    study = object.__new__(Study)
    study.space = Space("prune(macs=0.5),{fold,distill}", registry.passes())
    study.outcomes = {0: Outcome(0, "prune(macs=0.5),fold", "hopeless", doomed="prune(macs=0.5)")}
    assert study._is_doomed("prune(macs=0.5),fold")
    assert not study._is_doomed("prune(macs=0.5),distill") and not study._is_doomed("prune(macs=0.6),fold")


def test_what_lost_too_much_is_taught_once(files, tmp_path):
    """The spec that lost the least learns, and only that: lessons take minutes."""
    space = "prune(macs={0.9,0.7,0.5},criterion=l1),distill?(epochs=2,minutes=none)"
    study = search(files, tmp_path / "out", passes=space, constraints=["sqnr>=60"], trials=5)
    learned = [one for one in study.outcomes.values() if "distill" in one.spec]
    plain = sorted(
        (one for one in study.outcomes.values() if "distill" not in one.spec),
        key=lambda one: -one.values["sqnr"],
    )
    assert len(plain) == 3 and [one.spec.partition(",distill")[0] for one in learned] == [
        one.spec for one in plain[:2]
    ]
    for one, before in zip(learned, plain, strict=False):
        assert one.state == "done" and one.values["sqnr"] >= before.values["sqnr"]
    study = search(files, tmp_path / "none", passes=space, constraints=["sqnr>=1"], trials=5)
    assert len(study.outcomes) == 3 and study.stopped.startswith("every spec")


def test_who_learns_misses_nothing_else_and_has_not_lost_it_all():
    study, asked = object.__new__(Study), optuna.create_study()
    study.space = Space("prune(macs={0.9,0.5}),distill?(epochs=2,minutes=none)", registry.passes())
    study.constraints = (constraint("drop<=1.0"), constraint("size_mb<=1"))
    words = optuna.distributions.CategoricalDistribution(["without", "with"])
    study.outcomes = {}
    for drop, size in ((3.0, 0.9), (2.0, 1.2), (13.0, 0.8), (0.5, 0.9), (2.5, 0.9), (4.0, 0.9)):
        asked.add_trial(
            optuna.create_trial(params={"distill": "without"}, distributions={"distill": words}, value=1.0)
        )
        number = len(study.outcomes)
        values = {"drop": drop, "size_mb": size, "macs": 1.0 if drop == 0.5 else 0.5}
        study.outcomes[number] = Outcome(number, "prune(macs=0.5)", "done", values=values)
    assert [number for _, number in study._lessons(asked)] == [4, 0]
    assert all(answers == {"distill": "with"} for answers, _ in study._lessons(asked))


def test_of_equally_fast_models_the_best_is_the_one_that_lost_least():
    study = object.__new__(Study)
    study.objectives, study.constraints, study.outcomes = ("latency_ms",), (), {}
    for number, (ms, db) in enumerate(((1.02, 30.0), (1.0, 20.0), (1.1, 50.0), (1.01, 29.0))):
        values = {"latency_ms": ms, "size_mb": ms, "sqnr": db}
        study.outcomes[number] = Outcome(number, "fold", "done", values=values)
    assert study.best is study.outcomes[0]
    study.objectives = ("size_mb",)  # which is no matter of chance
    assert study.best is study.outcomes[1]


def test_lessons_go_before_the_guesses_that_are_left():
    study, asked = object.__new__(Study), optuna.create_study()
    study.space = Space("prune?(macs={0.9,0.7,0.5}),distill?(epochs=2,minutes=none),fold", registry.passes())
    study.constraints, study.outcomes, study.sampler, study.seed = (constraint("drop<=1.0"),), {}, "random", 0
    study.guesses = [{"prune": "with", "prune.macs": macs} for macs in ("0.9", "0.7", "0.5")]
    specs = []
    for _ in range(2):
        for trial, spec in study._asked(asked, 2, lessons=True):
            specs.append(spec)
            values = {"drop": 2.0, "macs": 0.8} if "prune" in spec else {"drop": 0.0, "macs": 1.0}
            study.outcomes[trial.number] = Outcome(trial.number, spec, "done", values=values)
            asked.tell(trial, 1.0)
    taught = "prune(macs=0.9),distill(epochs=2,minutes=None),fold"
    assert specs == ["fold", "prune(macs=0.9),fold", taught, "prune(macs=0.7),fold"]


def test_lessons_are_as_long_as_there_is_time(files):
    from compressor.capture import capture

    small = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(2, 3, 8, 8))
    large = capture(nn.Sequential(nn.Conv2d(256, 256, 3), nn.ReLU()), torch.randn(2, 256, 64, 64))
    texts = [
        default_space(graph, registry.target("cpu"), ("latency_ms",), 256, timeout)
        for graph, timeout in ((small, None), (small, 0.001), (large, None))
    ]
    assert ["distill" in text for text in texts] == [True, False, False] and "epochs=60" in texts[0]


def test_what_cannot_be_reached_gives_the_nearest_and_its_distance(files, tmp_path, capsys):
    words = [
        str(files / "net.pt2"),
        "--calib",
        str(files / "x.npz"),
        "--passes",
        "fold,{int8(rounding=nearest),none}",
    ]
    words += ["-o", str(tmp_path / "out"), "--workers", "1", "--constraint", "size_mb<=0.001"]
    assert cli.main(["tune", *words, "--constraint", "sqnr>=10"]) == 2
    said = capsys.readouterr()
    assert "keeps to size_mb<=0.001" in said.err and "size_mb 0.0" in said.err and "int8" in said.out
    assert "   1  fold,int8" in said.err or "   0  fold,int8" in said.err
    assert (tmp_path / "out" / "best" / "model.onnx").exists()


def test_a_search_says_what_it_does_in_lines_of_json(files, tmp_path, capsys):
    words = ["tune", str(files / "net.pt2"), "--calib", str(files / "x.npz"), "--passes", "{fold,merge}"]
    assert cli.main([*words, "-o", str(tmp_path / "out"), "--workers", "1", "--log-format", "json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    begun = [event["what"] for event in events if event["event"] == "begin"]
    assert begun[:2] == ["the original", "trials 1 to 2"] and "timing trial 0" in begun
    trials = [event for event in events if event["event"] == "trial"]
    assert sorted(one["spec"] for one in trials) == ["fold", "merge"] and trials[0]["values"]["speedup"] > 0
    (rounds,) = (event for event in events if event["event"] == "end" and event["what"] == "trials 1 to 2")
    assert rounds["count"] == 2


def test_trials_without_hope_end_early(files, tmp_path):
    study = search(
        files, tmp_path / "out", passes="prune(macs={0.95,0.15},reach=best,criterion=l1),fold,{none,fp16,int8}",
        constraints=["sqnr>=200"], trials=6,
    )  # fmt: skip
    assert [one.state for one in study.outcomes.values()] == ["hopeless"] * 4  # the first round
    assert len({one.doomed for one in study.outcomes.values()}) == 2 and study.stopped.startswith(
        "every spec"
    )
    assert all("after prune" in one.why and "sqnr>=200" in one.why for one in study.outcomes.values())
    assert "no trial gave a model" in study.failure()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objectives": ["speed"]}, "there are latency"),
        ({"constraints": ["drop<=1"]}, "needs a metric"),
        ({"sampler": "grid"}, "there are tpe"),
        ({"engine": "slurm"}, "there are local and ray"),
        ({"passes": "fold,int9"}, "did you mean 'int8'"),
        ({"resume": True}, "no search to resume"),
        ({"latency_table": "missing.json"}, "not the tune.json"),
        ({"calib_limits": 3}, "did you mean 'calib_limit'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(files, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        search(files, tmp_path / "out", **options)


def test_the_default_space_suits_the_model(files):
    from compressor.capture import capture
    from compressor.registry import passes, target
    from compressor.search.space import Space

    convolves = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(2, 3, 8, 8))
    multiplies = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 8))
    adds = capture(Net(lambda net, x: torch.relu(x + net.body(x)), body=conv(3, 3)), torch.randn(2, 3, 8, 8))
    for graph in (convolves, multiplies, adds):
        for name in ("cpu", "gpu", "mobile"):
            for samples in (256, 0):
                Space(default_space(graph, target(name), ("size_mb",), samples), passes())
    assert "scheme=dynamic" in default_space(multiplies, target("cpu"), ("latency_ms",), 0)
    assert "int8" not in default_space(convolves, target("cpu"), ("latency_ms",), 0)
    shortened = [
        "shorten" in default_space(g, target("cpu"), ("latency_ms",), 256) for g in (convolves, adds)
    ]
    assert shortened == [False, True]
    assert "int4" in default_space(multiplies, target("cpu"), ("size_mb",), 256)
    assert "fp16" in default_space(convolves, target("gpu"), ("latency_ms",), 256)


def test_a_metric_in_the_working_directory_is_known_by_what_it_says(files, tmp_path, monkeypatch):
    """The command finds modules there, although its own folder is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])
    digests = []
    for text in ("f = lambda run: 0.9", "f = lambda run: 0.5"):
        (tmp_path / "own_score.py").write_text(text)
        options = {"evaluate": "own_score:f"}
        digests.append(made_task(files / "net.pt2", None, "cpu", tmp_path / "out", options)[0].digest)
    assert digests[0] != digests[1]


def test_files_of_the_same_weights_are_told_apart(files, tmp_path):
    """The file's hash is written into what is made of it, so trials of one are not the other's."""
    program = torch.export.load(files / "net.pt2")
    torch.export.save(program, tmp_path / "again.pt2", extra_files={"note": "exported again"})
    made = [
        made_task(path, None, "cpu", tmp_path, {})[0] for path in (files / "net.pt2", tmp_path / "again.pt2")
    ]
    assert made[0].digest != made[1].digest
