"""Searches, sweeps and lists of models, as tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from .console import SEARCHED
from .report import table


def show_search(summary: Mapping[str, Any], console: Console) -> None:
    """The front of a search, best first, below the original; what it was asked for, and how it ended."""
    trials = {one["number"]: one for one in summary["trials"]}
    best = summary["best"]
    shown = [trials[number] for number in summary["front"]]
    if best is not None and best not in summary["front"]:
        shown.append(trials[best])
    key = summary["objectives"][0]
    shown.sort(key=lambda one: one["values"][key])
    names = [name for name in SEARCHED if any(name in one["values"] for one in shown)]
    made = table("", "passes", *(SEARCHED[name] for name in names), right=[SEARCHED[name] for name in names])
    original = summary["original"]
    made.add_row("", "original", *(_searched(name, original) for name in names))
    for one in shown:
        mark = "best" if one["number"] == best else f"{one['number']}"
        made.add_row(mark, escape(one["spec"]), *(_searched(name, one["values"]) for name in names))
    console.print(made)
    ended = Counter(one["state"] for one in trials.values())
    counts = ", ".join(f"{count} {state}" for state, count in ended.most_common())
    within = ", ".join(summary["constraints"])
    stopped = f"; {summary['stopped']}" if summary["stopped"] else ""
    stopped += f"; timed on {summary['timed_on']}" if summary["timed_on"] else ""
    console.print(escape(f"{len(trials)} trials ({counts}), {summary['feasible']} within {within}{stopped}"))


def show_sweep(lines: Sequence[Mapping[str, Any]], notices: Sequence[str], console: Console) -> None:
    """One row a spec: means over its seeds, and their spread where there are several."""
    names = [name for name in _SWEPT if any(name in line["values"] for line in lines)]
    made = table("passes", *(_SWEPT[name] for name in names), right=[_SWEPT[name] for name in names])
    for line in lines:
        cells = [_spread(*line["values"].get(name, (math.nan, math.nan))) for name in names]
        made.add_row(escape(line["spec"]), *cells)
        for why in line["failed"]:
            made.add_row(f"  {escape(why)}")
    console.print(made)
    for notice in notices:
        console.print(escape(notice))


_SWEPT = {
    "macs": "MACs left", "flops": "FLOPs", "params_count": "params", "size_mb": "MB", "metric": "metric",
    "drop": "drop", "sqnr": "SQNR dB", "agreement": "top-1 equal", "p50_ms": "p50 ms", "p95_ms": "p95 ms",
    "speedup": "speed", "throughput": "samples/s", "joules": "J",
}  # fmt: skip


def _spread(mean: float, spread: float) -> str:
    if math.isnan(mean):
        return "n/a"
    return f"{mean:.4g}" if math.isnan(spread) else f"{mean:.4g} ± {spread:.2g}"


def show_models(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One row a model of a list."""
    names = [name for name in SEARCHED if any(name in row["values"] for row in rows)]
    made = table(
        "model", "passes", *(SEARCHED[name] for name in names), right=[SEARCHED[name] for name in names]
    )
    for row in rows:
        what = row["spec"] if row["state"] == "done" else f"{row['state']}: {row['why']}"
        made.add_row(escape(row["model"]), escape(what), *(_searched(name, row["values"]) for name in names))
    console.print(made)


def _searched(name: str, values: Mapping[str, float]) -> str:
    value = values.get(name)
    if value is None:
        return ""
    digits = {"latency_ms": 3, "speedup": 2, "size_mb": 2, "macs": 2, "metric": 4, "drop": 2, "sqnr": 1}
    return f"{value:.{digits.get(name, 3)}f}" + ("x" if name == "speedup" else "")
