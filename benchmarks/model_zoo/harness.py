"""What the benchmarks over a zoo of architectures share: the models, a process for each, and the choice of some."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fnmatch
import gc
import json
import os
import platform
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.capture import capture
from compressor.errors import CompressorError
from compressor.ir import Graph

SECONDS = 300  # of processor time for one model
SIGNALS = {
    signal.SIGXCPU: "over its seconds of processor time",
    signal.SIGKILL: "killed: out of memory or time",
}
FAILED = "failed"
Row = dict[str, Any]
Measure = Callable[[Any], Iterator[Row]]


def models() -> dict[str, Any]:
    """Name -> a function that makes model and inputs: torchvision, a YOLO-shaped network, timm, transformers."""
    from . import timm_models, torchvision_models, transformers_models

    return torchvision_models.models() | timm_models.models() | transformers_models.models()


def chosen(patterns: Sequence[str]) -> dict[str, Any]:
    """The models that names or patterns pick, in their order; all if there is none. Ends the program where none is."""
    everything = models()
    if not patterns:
        return everything
    picked = {n: m for p in patterns for n, m in everything.items() if fnmatch.fnmatchcase(n, p)}
    if not picked:
        sys.exit(f"no model is called {', '.join(patterns)}; there are {', '.join(everything)}")
    return picked


def asked(words: str) -> argparse.Namespace:
    """The command line of a benchmark that can emit: `models`, names or patterns, and `no_onnx`. words: its help."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names or patterns")
    parser.add_argument("--no-onnx", action="store_true", help="do not emit")
    return parser.parse_args()


def conditions() -> str:
    """Date, machine and versions, for the head of a table."""
    return (
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, one thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def captured(make: Any, prepare: Callable[..., Any]) -> tuple[Any, Any, Graph | str]:
    """Model, inputs, and the graph; why there is none where it does not capture. prepare: gives weights power."""
    torch.manual_seed(0)
    model, inputs = make()
    try:
        prepare(model, *inputs)
        return model, inputs, capture(model, tuple(t[:2] for t in inputs))
    except (CompressorError, RuntimeError, ValueError, TypeError) as error:
        return model, inputs, first_line(error)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def minutes() -> str:
    """What the children have cost so far."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return f"{(spent.ru_utime + spent.ru_stime) / 60:.0f} minutes of processor time."


def table(
    columns: Mapping[str, str],
    patterns: Sequence[str],
    measure: Measure,
    *,
    seconds: int = SECONDS,
    kept: Path | None = None,
    measures: bool = True,
) -> dict[str, Row]:
    """Measures the chosen models one by one, and prints a row for each as it is there.

    seconds: of processor time for one model. kept: a file of rows; what it holds is not measured again, and new rows
    are added. measures: False for the rows of that file alone.
    """
    torch.set_num_threads(1)  # a process with threads cannot be forked
    print(f"| {' | '.join(columns.values())} |\n|{'---|' * len(columns)}", flush=True)
    lines = kept.read_text().splitlines() if kept is not None and kept.exists() else []
    known: dict[str, Row] = {row.pop("model"): row for row in map(json.loads, lines)}
    rows: dict[str, Row] = {}
    for name, make in chosen(patterns).items():
        if name in known:
            rows[name] = known[name]
        elif measures:
            rows[name] = isolated(make, measure, seconds)
            if kept is not None:
                with kept.open("a") as file:
                    print(json.dumps({"model": name, **rows[name]}), file=file)
            gc.collect()
        else:
            continue
        print(_line(columns, name, rows[name]), flush=True)
    return rows


def _line(columns: Mapping[str, str], name: str, row: Row) -> str:
    row = {**row, "model": name}
    if row.get("why"):
        row["verdict"] = f"{row['verdict']}: {row['why']}"
    if row.get("note"):
        row["onnx"] = f"{row['onnx']} ({row['note']})"
    return f"| {' | '.join(str(row.get(key, '')).replace('|', '/') for key in columns)} |"


def isolated(make: Any, measure: Measure, seconds: int = SECONDS) -> Row:
    """The row of one model, measured in a child; whatever becomes of the child, there is a row."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(writer, make, measure, seconds)
    os.close(writer)
    row = _received(reader, child, 4 * seconds)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and "verdict" not in row:
        number = os.WTERMSIG(status)
        row |= {"verdict": FAILED, "why": SIGNALS.get(signal.Signals(number), f"signal {number}")}
    return row


def _child(writer: int, make: Any, measure: Measure, seconds: int) -> None:
    """Never returns. Rows go out as lines of JSON; memory runs out here first, not in the parent."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("900")
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        with os.fdopen(writer, "w", buffering=1) as out:
            try:
                for part in measure(make):
                    print(json.dumps(part), file=out)
            except Exception as error:
                traceback.print_exc()
                print(
                    json.dumps({"verdict": FAILED, "why": f"{type(error).__name__}: {first_line(error)}"}),
                    file=out,
                )
    finally:
        os._exit(0)


def _received(reader: int, child: int, seconds: float) -> Row:
    row, text, deadline = {}, b"", time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(reader, 1 << 16)
        if not piece:
            break
        text += piece
    os.close(reader)
    for line in text.decode().splitlines():
        row |= json.loads(line)
    return row
