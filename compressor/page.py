"""report.html: a report as one page that needs nothing but itself, and asks no network for anything.

What the page says is worked out here, from the report alone; templates/page.html.j2 lays it out. Names in a report come
from models, so they are anybody's: they are escaped, and the page's own policy lets no script run but ours.
"""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from . import report as words
from .errors import UsageError

NAME = "report.html"
ARROW, ENDLESS = " \u2192 ", "\u221e"
LOUD_DB, QUIET_DB = 10.0, 50.0  # ends of the heat strip's scale
BEND = 1.5  # of that scale, so that 20 and 30 dB are told apart
FAINTEST = 0.06  # of its colour, so that every layer is seen
NARROW, WIDE, LETTER = 320, 1000, 7  # pixels: of a phone's and a desktop's strip, and of a letter under it
PARTS = 12  # of the network that are named under the heat strip, at most
CHECKS = 20  # of a pass that are listed, the worst first

_VERDICTS = {"proved": "Proved", "warned": "Warned", "not proved": "Not proved"}  # best first
_COUNTS = ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"))
_BYTES = ((1, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"))

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A number of the report, which a table is sorted by, and how it is written there."""

    value: float | None
    text: str

    @property
    def data(self) -> str:
        """As JavaScript reads it."""
        return "" if self.value is None else repr(self.value).replace("inf", "Infinity")


def write(path: Path, report: Report) -> None:
    """The page of a report that `read_report` gave. OutputError if it cannot be written."""
    words.write_text(path, render(report))


def render(report: Report) -> str:
    """The page; the same report gives the same text. UsageError where the report is not what this version writes."""
    return laid_out("page.html.j2", facts, report)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("compressor", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def laid_out(template: str, said: Callable[[Report], Mapping[str, Any]], report: Report) -> str:
    """The text of a template that shows what `said` finds in a report, in the look of all our pages."""
    environment = _environment()
    parts = {name: environment.loader.get_source(environment, f"page.{name}")[0] for name in ("css", "js")}
    policy = {name: f"'sha256-{_digest(text)}'" for name, text in parts.items()}
    try:
        text = environment.get_template(template).render(said(report), **parts, policy=policy)
        return text.encode("utf-8", "replace").decode()  # half a surrogate pair is JSON, and no text
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"a damaged report: {type(error).__name__}: {error}") from error


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def facts(report: Report) -> dict[str, Any]:
    """Everything that the page shows, in words and `Cell`s."""
    rows, emitted = report["rows"], report.get("emitted") or {}
    known = words.provenance(report)
    command = known.pop("command", "")
    layers = report.get("layers") or []
    return {
        "title": str((report.get("model") or {}).get("stem") or "model"),
        "target": known.get("target", ""),
        "spec": known.get("passes", ""),
        "compressor": str(report.get("compressor") or ""),
        "verdict": _verdict(rows, emitted),
        "cards": list(_cards(rows, emitted, report.get("inputs") or ())),
        "notices": [str(notice) for notice in report.get("notices") or ()],
        "runs": _runs(report),
        "table": _table(layers),
        "strip": _strip(layers),
        "left": _left(rows),
        "checks": _checks(rows, emitted),
        "command": command,
        "provenance": {**known, **_costs(report)},
        "accelerators": [
            f"{one['provider']}: {words.pieces(one)}" for one in emitted.get("partitions") or ()
        ],
    }


# -------------------------------------------------------------------- the summary


def _verdict(rows: Sequence[Report], emitted: Report) -> dict[str, Any]:
    judged = [row for row in rows if row.get("status") in _VERDICTS]
    worst = max((row["status"] for row in judged), key=list(_VERDICTS).index, default="unchanged")
    said = []
    for status in reversed(_VERDICTS):
        if names := [words.named(row) for row in judged if row["status"] == status]:
            said.append(f"{status}: {', '.join(names)}")
    if emitted.get("verified"):
        checks = emitted.get("checks") or ()
        level = f", {words.error('bounded', checks)}" if words.error("bounded", checks) else ""
        said.append(f"file: verified {emitted['verified']}{level}")
    elif not emitted:
        said.append("nothing was emitted")
    return {
        "state": worst.replace(" ", "-"),
        "word": _VERDICTS.get(worst, "Unchanged"),
        "said": said,
    }


def _cards(rows: Sequence[Report], emitted: Report, inputs: Sequence[Report]) -> Iterator[dict[str, str]]:
    """What the run was for: before, after, and the change in words."""
    first, last = rows[0], rows[-1]
    was, now = first.get("bytes"), last.get("bytes")
    kind = "of tensors"
    if emitted.get("bytes") and emitted.get("float_bytes"):
        was, now, kind = emitted["float_bytes"], emitted["bytes"], "than fp32 ONNX"
    if was and now:
        yield _card(
            "size", words.size(now), words.size(was), f"{words.times(was / now, 'smaller', 'larger')} {kind}"
        )
    latency = emitted.get("latency") or {}
    if latency.get("model"):
        yield _card("latency", words.milliseconds(latency["model"]), *_faster(latency))
    before, after = first.get("metric") or {}, emitted.get("metric") or last.get("metric") or {}
    for name, value in after.items():
        known = before.get(name)
        change = words.metric(name, value, known).partition(" (")[2].rstrip(")") if known is not None else ""
        points = " points" if change and words.is_share(name) else ""
        was = words.metric(name, known) if known is not None else ""
        yield _card(name, words.metric(name, value), was, change + points)
    if (level := _number(last.get("total_db"))) is not None:
        text = f"{level:.1f} dB" if level < math.inf else f"{ENDLESS} dB"
        yield _card("SQNR", text, "", "of the outputs, against the model as it came")
    if first.get("macs") and last.get("macs"):
        was, now = first["macs"], last["macs"]
        left = "unchanged" if now == was else f"{now / was:.0%} left"
        sizes = [one["shape"][0] for one in inputs if one.get("shape")]
        unit = "run" if sizes and all(isinstance(size, int) for size in sizes) else "sample"
        yield _card("MACs", words.count(now), words.count(was), f"of one {unit}, {left}")


def _card(label: str, now: str, was: str = "", change: str = "") -> dict[str, str]:
    return {"label": label, "now": now, "was": was if was != now else "", "change": change}


def _faster(latency: Report) -> tuple[str, str]:
    """What it was, and the change with where it was timed."""
    threads = latency.get("threads")
    said = [f"{threads} thread" + ("s" if threads != 1 else "")] if threads else []
    if latency.get("note"):
        said.append(str(latency["note"]))
    if latency.get("ratio") and latency.get("float"):
        faster = words.times(float(latency["ratio"]), "faster", "slower")
        return words.milliseconds(latency["float"]), "; ".join([f"{faster} than fp32 ONNX", *said])
    return "", "; ".join(said)


# -------------------------------------------------------------------- passes


def _runs(report: Report) -> list[dict[str, Any]]:
    """The passes of earlier runs, where the model came with a receipt, and of this one."""
    earlier = [run["rows"] for run in report.get("history") or ()]
    names = [f"run {number}" for number in range(1, len(earlier) + 1)]
    runs = [_steps(name, rows, {}) for name, rows in zip(names, earlier, strict=True)]
    return [*runs, _steps("this run" if earlier else "", report["rows"], report.get("emitted") or {})]


def _steps(name: str, rows: Sequence[Report], emitted: Report) -> dict[str, Any]:
    metrics = list(dict.fromkeys(key for row in rows for key in row.get("metric") or ()))
    first = rows[0].get("metric") or {} if rows else {}
    steps = []
    for i, row in enumerate(rows):
        contract, status = row.get("contract") or "", row.get("status") or ""
        found = row.get("metric") or {}
        steps.append(
            {
                "name": words.named(row),
                "contract": contract,
                "status": status,
                "error": words.error(contract, row.get("checks") or ()).partition(" of ")[0],
                "total": words.decibels(row.get("total_db")),
                "params": words.count(row.get("params")),
                "macs": words.count(row.get("macs")),
                "bytes": row.get("bytes"),
                "ms": _milliseconds(row),
                "metrics": [
                    words.metric(key, found[key], first.get(key) if i else None) if key in found else ""
                    for key in metrics
                ],
                "seconds": words.seconds(row.get("seconds")) if i else "",
            }
        )
    if emitted:
        steps.append(_file(emitted, metrics, first))
    _draw(steps)
    return {
        "name": name,
        "steps": steps,
        "metrics": metrics,
        "timed": any(step["ms"] for step in steps),
    }


def _file(emitted: Report, metrics: Sequence[str], first: Report) -> dict[str, Any]:
    """The row of the emitted file."""
    latency, found = emitted.get("latency") or {}, emitted.get("metric") or {}
    pair = tuple(_number((latency.get(key) or {}).get("median_ms")) for key in ("float", "model"))
    return {
        **dict.fromkeys(("contract", "status", "total", "params", "macs", "seconds"), ""),
        "name": str(emitted.get("file") or "model.onnx"),
        "error": words.error("bounded", emitted.get("checks") or ()),
        "bytes": emitted.get("bytes"),
        "ms": pair if pair[1] is not None else None,
        "metrics": [words.metric(key, found[key], first.get(key)) if key in found else "" for key in metrics],
    }


def _milliseconds(row: Report) -> tuple[float | None, float | None] | None:
    """Median latency before and after a pass, where it was timed for the pass to decide."""
    said = row.get("facts") or {}
    before, after = said.get("float_ms"), [said.get("int8_ms"), said.get("int8_as_it_was_ms")]
    for key, names in (("latency", ("before_ms", "after_ms")), ("ms", ("before", "after"))):
        if isinstance(said.get(key), Mapping):
            before, after = said[key].get(names[0]), [said[key].get(names[1])]
    times = [ms for one in after if (ms := _number(one)) is not None]
    return (_number(before), min(times)) if times and row.get("status") != "unchanged" else None


def _draw(steps: Sequence[dict[str, Any]]) -> None:
    """Words and bars of size and latency: what is left, and what the step took off or put on, in shares of the most."""
    sizes = [_number(step["bytes"]) or 0.0 for step in steps]
    times = [step["ms"] or (None, None) for step in steps]
    slowest = max((ms for pair in times for ms in pair if ms is not None), default=0.0)
    for i, (step, now, (slow, fast)) in enumerate(zip(steps, sizes, times, strict=True)):
        step["size"] = Cell(now, words.size(step["bytes"]))
        step["size_bar"] = _bar(sizes[i - 1] if i and step["contract"] else now, now, max(sizes))
        shown = [f"{ms:.3g}" for ms in (slow, fast) if ms is not None]
        step["latency"] = f"{ARROW.join(shown)} ms" if shown else ""
        step["latency_bar"] = (
            _bar(slow if slow is not None else fast or 0.0, fast or 0.0, slowest) if shown else None
        )


def _bar(before: float, after: float, most: float) -> dict[str, float]:
    """left: of what is there before and after. gone, more: of what only the one or the other has. In percent."""
    share = 100 / most if most else 0.0
    return {
        "left": round(min(before, after) * share, 2),
        "gone": round(max(before - after, 0) * share, 2),
        "more": round(max(after - before, 0) * share, 2),
    }


# -------------------------------------------------------------------- layers


def _table(layers: Sequence[Report]) -> dict[str, Any]:
    """Rows in the network's order, and the columns of numbers with their units."""
    macs, macs_unit = _column([row.get("macs") for row in layers], _COUNTS)
    stored, stored_unit = _column([row.get("bytes") for row in layers], _BYTES)
    rows = [
        {
            "site": str(row["site"]),
            "operator": str(row["operator"]).removeprefix("scaled_dot_product_"),
            "macs": macs[i],
            "bytes": stored[i],
            "precision": str(row.get("precision") or "").replace(" x ", " \u00d7 "),
            "width": _width(row.get("width")),
            "rank": _rank(row.get("rank")),
            "sqnr": _decibels(row.get("sqnr_db")),
            "heat": _heat(row.get("sqnr_db")),
        }
        for i, row in enumerate(layers)
    ]
    return {"rows": rows, "macs_unit": macs_unit, "bytes_unit": stored_unit}


def _column(values: Sequence[Any], units: Sequence[tuple[float, str]]) -> tuple[list[Cell], str]:
    """One unit for a whole column, that of its median, so that the digits stand in line; nothing for zeros."""
    numbers = [_number(value) for value in values]
    middle = statistics.median([abs(n) for n in numbers if n] or [0])
    scale, unit = max((one for one in units if one[0] <= middle), default=units[0])
    digits = 0 if scale == 1 else 1 if middle / scale >= 100 else 2
    return [Cell(n, f"{n / scale:,.{digits}f}".replace(",", "\u202f") if n else "") for n in numbers], unit


def _width(width: Sequence[int | None] | None) -> dict[str, Any]:
    was, now = width or (None, None)
    changed = was is not None and was != now
    text = "" if now is None else f"{was}{ARROW}{now}" if changed else str(now)
    return {"cell": Cell(_number(now), text), "changed": changed}


def _rank(rank: Any) -> Cell:
    ranks = rank if isinstance(rank, list) else [] if rank is None else [rank]
    return Cell(_number(ranks[0]) if ranks else None, ", ".join(map(str, ranks)))


def _decibels(value: Any) -> Cell:
    level = _number(value)
    return Cell(level, "" if level is None else f"{level:.1f}" if level < math.inf else ENDLESS)


def _heat(value: Any) -> float | None:
    """How much of the heat's colour: 1 where the noise is loudest, None where nothing can be told."""
    level = _number(value)
    if level is None:
        return None
    share = min(max((QUIET_DB - level) / (QUIET_DB - LOUD_DB), 0.0), 1.0)
    return round(max(share**BEND, FAINTEST), 3)


def _strip(layers: Sequence[Report]) -> dict[str, Any]:
    """What stands round the heat strip: the worst layer, the parts of the network in order, and the colours' meaning.

    A part's name is shown where it has room: `wide`, on a large screen, or everywhere.
    """
    paths = [str(row["site"]).split(".") for row in layers]
    names = [("", len(paths))]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        finer = [(_part(name), len(list(run))) for name, run in groupby(path[:depth] for path in paths)]
        if len(finer) > PARTS:
            break
        names = finer
    parts, start = [], 0.0
    for name, count in names:
        share = 100 * count / len(paths) if paths else 100.0
        fits = [len(name) * LETTER < share / 100 * width for width in (NARROW, WIDE)]
        shown = "" if fits[0] else "wide" if fits[1] else "hidden"
        parts.append({"name": name, "start": round(start, 3), "share": round(share, 3), "shown": shown})
        start += share
    told = [(one, str(row["site"])) for row in layers if (one := _number(row.get("sqnr_db"))) is not None]
    worst, where = min(told, default=(math.inf, ""))
    ends = [LOUD_DB + (QUIET_DB - LOUD_DB) * i / 4 for i in range(5)]
    return {
        "told": len(told),
        "worst": f"{where} at {worst:.1f} dB" if worst < math.inf else "",
        "parts": parts,
        "legend": [(f"{level:g}", _heat(level)) for level in ends],
    }


def _part(path: Sequence[str]) -> str:
    """`layer.3` of `encoder.layer.3`: a number means nothing without the name in front of it."""
    return ".".join(path[-2:]) if path[-1].isdigit() else path[-1]


# -------------------------------------------------------------------- what was left, and the checks


def _left(rows: Sequence[Report]) -> list[dict[str, Any]]:
    """By pass, and in it by reason, the sites that it considered and left."""
    found: dict[str, list[dict[str, Any]]] = {}
    for (name, reason), sites in words.declines(rows).items():
        found.setdefault(name, []).append(
            {"reason": reason, "count": len(sites), "sites": list(dict.fromkeys(sites))}
        )
    return [
        {"name": name, "count": sum(one["count"] for one in reasons), "reasons": reasons}
        for name, reasons in found.items()
    ]


_FORMATS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("error", "{:.1e}".format),
    ("tolerance", "{:.0e}".format),
    ("power", "{:.1e}".format),
    ("sqnr_db", "{:.1f}".format),
    ("cosine", "{:.6f}".format),
    ("agreement", "{:.1%}".format),
)


def _checks(rows: Sequence[Report], emitted: Report) -> list[dict[str, Any]]:
    """By pass, its checks with their power, the worst first; those of the file at the end."""
    named = [(words.named(row), row.get("status") or "", row.get("checks") or ()) for row in rows]
    named.append((str(emitted.get("file") or "model.onnx"), "", emitted.get("checks") or ()))
    return [
        {
            "name": name,
            "status": status,
            "rows": [_check(one) for one in checks[:CHECKS]],
            "more": len(checks[CHECKS:]),
        }
        for name, status, checks in named
        if checks
    ]


def _check(check: Report) -> dict[str, Any]:
    cells = []
    for key, form in _FORMATS:
        value = _number(check.get(key))
        cells.append(Cell(value, "" if value is None else ENDLESS if value == math.inf else form(value)))
    where = f"{check.get('output', '')}{check.get('slice') or ''}"
    return {"where": where, "cells": cells}


def _costs(report: Report) -> dict[str, str]:
    """What the run took."""
    peak = (report.get("memory") or {}).get("peak_resident_mb")
    found = {
        "took": words.seconds(report.get("seconds")),
        "memory": f"{words.size(peak * (1 << 20))} at most" if peak else "",
        "needs": f"ONNX Runtime {oldest} or newer"
        if (oldest := (report.get("emitted") or {}).get("oldest_runtime"))
        else "",
    }
    return {name: text for name, text in found.items() if text}


def _number(value: Any) -> float | None:
    """A number, also one that JSON has no word for; None for anything else."""
    if value in ("inf", "-inf"):
        return float(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
