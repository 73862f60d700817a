"""What one file costs to run: latency, throughput, and energy where the machine counts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import delivery, measure, runtime

COUNTERS = Path("/sys/class/powercap")
BATCH = 8  # samples at once, on all cores, for throughput


def costs(paths: Sequence[Path], feeds: Any, many: Any, seconds: float) -> list[dict[str, float]]:
    """Of each file, timed in turns: p50_ms and p95_ms (`feeds`, one thread), throughput in samples a second (`many`
    inputs at once, all cores; NaN where the batch is fixed), joules of one run (NaN where nothing counts them)."""
    rows = []
    for path, one in zip(
        paths, measure.bench(paths, feeds=feeds, seconds=seconds, within=delivery.SURE), strict=True
    ):
        rows.append(
            {"p50_ms": one.median_ms, "p95_ms": one.p95_ms, "joules": joules(path, feeds, seconds / 4)}
        )
    if many is None:
        return [row | {"throughput": math.nan} for row in rows]
    fast = measure.bench(paths, feeds=many, threads=0, seconds=seconds, within=delivery.SURE)
    return [row | {"throughput": 1e3 * BATCH / one.median_ms} for row, one in zip(rows, fast, strict=True)]


def joules(path: Path, feeds: Any, seconds: float) -> float:
    """Energy of one run, of the whole processor while nothing else should run, by RAPL's counters."""
    if energy() is None:
        return math.nan
    stopwatch = measure.Stopwatch(runtime.session(path, threads=1), feeds, seconds)
    before = energy()
    runs = len(stopwatch.round())
    after = energy()
    if before is None or after is None or after < before:  # the counter began anew
        return math.nan
    return (after - before) / runs


def energy(counters: Path = COUNTERS) -> float | None:
    """Joules that all packages have used since some moment; None where none can be read."""
    found = []
    for package in sorted(counters.glob("intel-rapl:*")):
        if package.name.count(":") == 1:  # and not a part of one
            try:
                found.append(int((package / "energy_uj").read_text()) / 1e6)
            except (OSError, ValueError):
                return None
    return sum(found) if found else None
