"""What stopwatches and profilers found, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from .report import table


def show_latencies(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One row a model, or one for each number of threads and size of a batch; speed is the first model's median over
    this one's (above 1 is faster), with its quartiles.

    A provider is named where it is not the CPU's.
    """
    keys = [key for key in ("threads", "batch") if len({row.get(key) for row in rows}) > 1]
    numbers = [*keys, "median ms", "p95 ms", "iqr ms", "runs", "speed"]
    made = table("model", *numbers, right=numbers)
    firsts: dict[tuple[Any, ...], float] = {}
    for row in rows:
        cell = tuple(row.get(key) for key in keys)
        median = float(row["median_ms"])
        first = firsts.setdefault(cell, median)
        provider = str(row.get("provider", "CPU")).removesuffix("ExecutionProvider")
        on = "" if provider == "CPU" else f" (on {provider})"
        speed = f"{row.get('ratio', first / median):.2f}x" if median else ""
        low, high = row.get("spread") or (1, 1)
        spread = f" ({low:.2f}-{high:.2f})" if low != high else ""
        made.add_row(
            escape(f"{row.get('path', '')}{on}"),
            *map(str, cell),
            f"{median:.3f}",
            *(f"{float(row[key]):.3f}" if row.get(key) is not None else "" for key in ("p95_ms", "iqr_ms")),
            str(row.get("runs", "")),
            f"{speed}{spread}",
        )
    console.print(made)


_TOP = 15  # rows of a profile; --json has them all


def show_profile(files: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Milliseconds of one run by module, by operator and by node, the slowest first; a column for each file."""
    times = ["ms"] if len(files) == 1 else [f"ms {letter}" for letter in "ABCDEFGH"[: len(files)]]
    for key, group in (("module", "modules"), ("operator", "operators"), ("node", "nodes")):
        tables = [{row[key]: row["ms"] for row in one[group]} for one in files]
        names = sorted(
            {name for one in tables for name in one}, key=lambda n: -max(one.get(n, 0.0) for one in tables)
        )
        made = table(key, *times, "share", right=[*times, "share"])
        whole = sum(tables[0].values()) or 1.0
        for name in names[:_TOP]:
            words = "(the runtime's own)" if name is None else name or "(the model itself)"
            cells = [f"{one[name]:.3f}" if name in one else "" for one in tables]
            made.add_row(escape(words), *cells, f"{tables[0].get(name, 0.0) / whole:.1%}")
        if len(names) > _TOP:
            rest = [sum(one.get(n, 0.0) for n in names[_TOP:]) for one in tables]
            share = f"{rest[0] / whole:.1%}"
            made.add_row(f"{len(names) - _TOP} others", *(f"{ms:.3f}" for ms in rest), share)
        console.print(made)
    for letter, one in zip("ABCDEFGH" if len(files) > 1 else " ", files, strict=False):
        words = f"{one['ms']:.3f} ms a run, median of {one['runs']}, the profiler at work"
        mapped = f"{one['mapped']:.1%} of the operators' time has a module"
        console.print(
            f" {letter} {escape(one['path'])}: {words}; {mapped}".replace("   ", " "),
            highlight=False,
            soft_wrap=True,
        )


def show_settings(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One row a setting, fastest first, and the advised one in words that can be copied."""
    numbers = ["threads", "median ms", "p95 ms", "all cores ms", "MB"]
    made = table("", *numbers, "spinning", "arena", right=numbers)
    for row in rows:
        made.add_row(
            "advised" if row["advised"] else "",
            str(row["threads"]),
            *(f"{float(row[key]):.3f}" for key in ("median_ms", "p95_ms", "cpu_ms")),
            f"{float(row['mb']):.0f}",
            *("yes" if row[key] else "no" for key in ("spinning", "arena")),
        )
    console.print(made)
    best = next(row for row in rows if row["advised"])
    lines = [f"options.intra_op_num_threads = {best['threads']}"]
    if not best["spinning"]:
        lines.append('options.add_session_config_entry("session.intra_op.allow_spinning", "0")')
    if not best["arena"]:
        lines.append("options.enable_cpu_mem_arena = False")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
