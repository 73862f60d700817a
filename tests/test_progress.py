"""What is seen of work: events of a log, in order and with numbers; bars with rates; nothing where nobody looks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from compressor import progress
from compressor.progress import Watch, counted, rated

Run = Callable[..., tuple[int, str, str]]


def test_events_are_nested_and_counted() -> None:
    events: list[dict[str, Any]] = []
    watch = Watch(None, events.append)
    with pytest.raises(ValueError), watch("outer"):
        with watch("inner", 4) as advance:
            assert list(counted([1, 3], advance, int)) == [1, 3]
        raise ValueError
    assert [(e["event"], e["what"], e["depth"]) for e in events] == [
        *(("begin", "outer", 0), ("begin", "inner", 1), ("end", "inner", 1), ("end", "outer", 0)),
    ]
    inner, outer = events[2:]
    assert (inner["status"], inner["count"], outer["status"]) == ("done", 4, "failed")
    assert inner["rate"] == pytest.approx(4 / inner["seconds"]) and inner["peak_mb"] > 10
    assert "count" not in outer


def test_bars_say_rates_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    said = io.StringIO()
    watch = Watch(Console(file=said, force_terminal=True, width=100))
    with watch("reading", 8) as advance:
        for _ in range(4):
            advance(2)
        watch._bar.refresh()
    assert "reading" in said.getvalue() and "8/8" in said.getvalue()
    piped = io.StringIO()
    with Watch(Console(file=piped))("reading", 8) as advance:
        advance(8)
    assert piped.getvalue() == ""
    assert rated(40, 64, 12.51) == "40/64  12.5/s" and rated(3, None, 2.0) == rated(3, 0, 2.0) == ""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("progress") / "net.pt2"
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),)), path)
    return path


def test_a_run_writes_lines_of_json(model: Path, run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        model, "--passes", "fold", "-o", tmp_path / "out", "--no-measure", "--log-format", "json"
    )
    events = [json.loads(line) for line in err.splitlines()]
    assert code == 0 and "fold" in out
    begun = [e["what"] for e in events if e["event"] == "begin"]
    ended = [e["what"] for e in events if e["event"] == "end"]
    assert sorted(begun) == sorted(ended) and {
        "reading the model",
        "capturing",
        "fold",
        "emitting",
        "verifying",
    } <= set(begun)
    assert all(
        e["status"] == "done" and e["seconds"] >= 0 and e["peak_mb"] > 0
        for e in events
        if e["event"] == "end"
    )
    (row,) = (e for e in events if e["event"] == "pass")
    assert (row["what"], row["status"]) == ("fold", "proved")
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)
    onnx = tmp_path / "out/model.onnx"
    code, out, err = run("verify", model, onnx, "--json", "--log-format", "json")
    assert json.loads(out)["ok"] and "comparing" in [json.loads(line)["what"] for line in err.splitlines()]


def test_verbose_says_it_in_words_and_quiet_wins(model: Path, run: Run, tmp_path: Path) -> None:
    words = (model, "--passes", "fold", "-o", tmp_path / "out", "--no-measure", "--stop-after", "fold")
    code, _, err = run(*words, "-v")
    assert code == 0 and "fold: exact, proved\n" in err and "capturing ..." in err and "peak" in err
    assert run(*words, "-v", "-q") == (0, "", "")
    assert run(*words)[2] == ""


def test_memory_is_read_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(progress, "peak_memory_mb", lambda: 123.0)
    with Watch(None, events.append)("work"):
        pass
    assert events[-1]["peak_mb"] == 123.0
