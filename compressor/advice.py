"""Which session settings a model runs best with here: threads, spinning, arena; each tried in a process of its own.

Threads that spin wait for the next run at full speed: quicker to start, at the price of a core each. The arena keeps
what a run allocated for the next one. What they are worth depends on the model and the machine, so they are measured:
latency, time of all cores, and memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import apart, measure

CPU = "CPUExecutionProvider"
NEAR = 1.05  # times the fastest: what is as fast as it
LIGHTER = 0.9  # of its memory: what is worth a slower run


@dataclass(frozen=True)
class Settings:
    """Of a session. threads: inside an operator. arena: memory of a run is kept for the next."""

    threads: int
    spinning: bool = True
    arena: bool = True


Row = tuple[Settings, dict[str, Any]]


def advise(
    path: Path, feeds: measure.Feeds, *, most: int = 0, seconds: float = 5.0, provider: str = CPU
) -> list[dict[str, Any]]:
    """Rows of settings with their numbers, fastest first; `advised` is true for one of them (`choice`).

    median_ms, p95_ms: of one run. cpu_ms: time of all cores for it. mb: resident memory. most: threads, 0 for as many
    as there are cores.
    """
    rows = measured(path, feeds, grid(most or os.cpu_count() or 1), seconds * 0.8, provider)
    best = choice(rows)
    rows += measured(path, feeds, [replace(best[0], arena=False)], seconds * 0.2, provider)
    advised = choice(rows)
    rows.sort(key=lambda row: row[1]["median_ms"])
    return [{**asdict(settings), **row, "advised": settings == advised[0]} for settings, row in rows]


def grid(most: int) -> list[Settings]:
    """One thread, then twice as many as before up to `most`, with spinning and without."""
    counts = sorted({min(2**i, most) for i in range(most.bit_length() + 1)})
    return [Settings(n, spin) for n in counts for spin in ((True, False) if n > 1 else (True,))]


def choice(rows: Sequence[Row]) -> Row:
    """Of those within 5 % of the fastest the one that takes least time of all cores.

    Without the arena only where that saves a tenth of the memory.
    """
    fastest = min(row["median_ms"] for _, row in rows)
    near = [one for one in rows if one[1]["median_ms"] <= NEAR * fastest]
    best = min(
        (one for one in near if one[0].arena),
        key=lambda one: (one[1]["cpu_ms"], one[0].threads),
        default=near[0],
    )
    lighter = [one for one in near if not one[0].arena and one[1]["mb"] <= LIGHTER * best[1]["mb"]]
    return lighter[0] if lighter else best


def measured(
    path: Path, feeds: measure.Feeds, settings: Sequence[Settings], seconds: float, provider: str
) -> list[Row]:
    """Numbers of each, in turns: there and back."""
    visits: dict[Settings, list[dict[str, Any]]] = {one: [] for one in settings}
    share = seconds / (2 * len(settings))
    for one in (*settings, *reversed(settings)):
        with apart.Session(path, providers=[provider], **asdict(one)) as session:
            visits[one].append(session.call(_visit, feeds, share))
    rows = []
    for one, seen in visits.items():
        times = [time for visit in seen for time in visit["times"]]
        median, p95 = np.percentile(times, [50, 95]).tolist()
        cpu = sum(visit["cpu_ms"] for visit in seen) / len(times)
        most = max(visit["mb"] for visit in seen)
        rows.append(
            (one, {"median_ms": median, "p95_ms": p95, "runs": len(times), "cpu_ms": cpu, "mb": most})
        )
    return rows


def _visit(session: Any, feeds: measure.Feeds, seconds: float) -> dict[str, Any]:
    """Over there: ms of each run, time of all cores for all of them, and memory."""
    stopwatch = measure.Stopwatch(session, feeds, seconds)
    start = time.process_time()
    times = stopwatch.round()
    return {
        "times": times,
        "cpu_ms": (time.process_time() - start) * 1e3,
        "mb": measure.resident_memory_mb() or 0.0,
    }
