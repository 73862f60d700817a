"""`bench --advise`: what is tried, what is chosen, and that sessions get it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net
from torch import nn

from compressor import advice, api, runtime
from compressor.advice import Settings
from compressor.capture import capture
from compressor.emit import emit
from compressor.errors import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = Net(lambda net, x: net.a(x).relu(), a=nn.Linear(64, 64)).eval()
    return emit(capture(net, torch.randn(2, 64)), tmp_path_factory.mktemp("advice") / "model.onnx").path


def row(settings: Settings, median: float, cpu: float, mb: float = 100.0) -> tuple[Settings, dict[str, Any]]:
    return settings, {"median_ms": median, "cpu_ms": cpu, "mb": mb}


def test_what_is_tried():
    assert advice.grid(1) == [Settings(1)]
    assert [(s.threads, s.spinning) for s in advice.grid(6)] == [
        (1, True), (2, True), (2, False), (4, True), (4, False), (6, True), (6, False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        # twice as fast is worth the cores
        ([row(Settings(1), 10, 10), row(Settings(2), 5, 11)], Settings(2)),
        # 3 % is not
        ([row(Settings(1), 10, 10), row(Settings(2), 9.7, 19)], Settings(1)),
        # spinning that gains nothing burns a core
        ([row(Settings(1), 10, 10), row(Settings(2), 5, 12), row(Settings(2, False), 5.1, 10)], Settings(2, False)),
        # memory that is not saved, or costs time
        ([row(Settings(1), 10, 10), row(Settings(1, arena=False), 10, 10, 95)], Settings(1)),
        ([row(Settings(1), 10, 10), row(Settings(1, arena=False), 12, 12, 50)], Settings(1)),
        ([row(Settings(1), 10, 10), row(Settings(1, arena=False), 10.2, 10, 50)], Settings(1, arena=False)),
        # the arena costs time
        ([row(Settings(1), 10, 10), row(Settings(1, arena=False), 9, 9)], Settings(1, arena=False)),
    ],
)  # fmt: skip
def test_what_is_chosen(rows, wanted):
    assert advice.choice(rows)[0] == wanted


def test_a_model_is_measured(model, run):
    rows = api.bench([model], advise=True, threads=2, seconds=0.4)
    assert {(r["threads"], r["spinning"]) for r in rows} >= {(1, True), (2, True), (2, False)}
    assert sum(r["advised"] for r in rows) == 1 and sum(not r["arena"] for r in rows) == 1
    assert all(r["median_ms"] > 0 and r["cpu_ms"] > 0 and r["mb"] > 10 and r["runs"] >= 2 for r in rows)
    code, out, _ = run("bench", str(model), "--advise", "--threads", "1", "--seconds", "0.2")
    assert code == 0 and "advised" in out and "options.intra_op_num_threads = 1" in out
    assert len(json.loads(run("bench", str(model), "--advise", "--seconds", "0.2", "--json")[1])) >= 2
    with pytest.raises(UsageError, match="--advise is about one model"):
        api.bench([model, model], advise=True)


def test_sessions_get_what_was_asked_for(model):
    for spinning, wanted in ((True, "1"), (False, "0")):
        options = runtime.session(model, spinning=spinning, arena=spinning).get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == wanted
        assert options.enable_cpu_mem_arena is spinning
