"""report.html of a search: its front as a picture, every trial as a row. All of it is in tune.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..page import NAME, Cell, laid_out
from ..report import write_text

WIDTH, HEIGHT = 900, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 880, 34, 410
ROOM = 0.08  # of the range, around what must be seen
TICKS = 6
# Name of a value -> its name on the page, and how it is written.
VALUES = {
    "latency_ms": ("latency, ms", "{:.3g}"),
    "speedup": ("speed", "{:.2f}x"),
    "size_mb": ("MB", "{:.3g}"),
    "macs": ("MACs left", "{:.0%}"),
    "params": ("params left", "{:.0%}"),
    "metric": ("metric", "{:.4f}"),
    "drop": ("drop", "{:.2f}"),
    "sqnr": ("SQNR, dB", "{:.1f}"),
    "agreement": ("top-1 equal", "{:.1%}"),
}
_SHARE = 100.0  # a drop is in points, a metric in shares

Summary = Mapping[str, Any]
Point = tuple[float, float]


def write(folder: Path, summary: Summary) -> None:
    """Writes the page of a search, `summary` being what its tune.json holds. OutputError if it cannot be written."""
    write_text(folder / NAME, laid_out("search.html.j2", facts, summary))


def facts(summary: Summary) -> dict[str, Any]:
    """Everything that the page shows."""
    trials = summary["trials"]
    known = [name for name in VALUES if any(name in one["values"] for one in trials)]
    ended = Counter(one["state"] for one in trials)
    within = " and ".join(summary["constraints"])
    best = next((one for one in trials if one["number"] == summary["best"]), None)
    return {
        "title": summary["model"],
        "target": summary["target"],
        "space": summary["space"],
        "within": within,
        "cards": list(_cards(summary, best, within, ended)),
        "plot": _plot(summary, trials, known),
        "columns": [VALUES[name][0] for name in known],
        "rows": [
            {
                **{key: one[key] for key in ("number", "spec", "state", "why")},
                "kind": _kind(summary, one),
                "cells": [_cell(name, one["values"]) for name in known],
                "seconds": Cell(one["seconds"], f"{one['seconds']:.1f}"),
            }
            for one in trials
        ],
    }


def _cards(
    summary: Summary, best: Summary | None, within: str, ended: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    values = best["values"] if best is not None else {}
    for name in ("speedup", "size_mb", "metric", "drop", "sqnr"):
        if name in values:
            was = summary["original"].get(name)
            said = [f"was {_text(name, was)}"] if was is not None else []
            yield {"label": VALUES[name][0], "now": _text(name, values[name]), "said": said}
    missed = ", ".join(summary["missed"])
    counts = ", ".join(f"{count} {state}" for state, count in ended.items())
    yield {
        "label": f"within {within}",
        "now": f"{summary['feasible']} of {len(summary['trials'])}",
        "said": [counts, *([f"the nearest misses {missed}"] if missed else [])],
    }


def _kind(summary: Summary, one: Summary) -> str:
    if one["number"] == summary["best"]:
        return "best"
    return "front-point" if one["number"] in summary["front"] else "other"


def _number(values: Mapping[str, Any], name: str) -> float:
    return float(values.get(name, math.nan))


def _text(name: str, value: Any) -> str:
    number = float(value)
    return "\u221e" if number == math.inf else VALUES[name][1].format(number)


def _cell(name: str, values: Mapping[str, Any]) -> Cell:
    return Cell(_number(values, name), _text(name, values[name])) if name in values else Cell(None, "")


# -------------------------------------------------------------------- the picture


def _plot(summary: Summary, trials: Sequence[Summary], known: Sequence[str]) -> dict[str, Any]:
    """The first objective from left to right, what is lost from the top down; better is further left, further up."""
    x = summary["objectives"][0]
    y = "metric" if "metric" in known else "sqnr"
    places = {one["number"]: (_number(one["values"], x), _number(one["values"], y)) for one in trials}
    places = {number: place for number, place in places.items() if all(map(math.isfinite, place))}
    original = (_number(summary["original"], x), _number(summary["original"], y))
    limits = list(_limits(summary, x, y))
    must = [places[n] for n in (*summary["front"], summary["best"]) if n in places] or list(places.values())
    must += [original] if all(map(math.isfinite, original)) else []
    if not must:
        return {"points": []}
    across = _range([one[0] for one in must] + [at for name, at, _ in limits if name == x])
    up = _range([one[1] for one in must] + [at for name, at, _ in limits if name == y])

    def at(place: Point) -> tuple[float, float]:
        return (
            round(LEFT + (place[0] - across[0]) / (across[1] - across[0]) * (RIGHT - LEFT), 1),
            round(BOTTOM - (place[1] - up[0]) / (up[1] - up[0]) * (BOTTOM - TOP), 1),
        )

    inside = {
        number: place
        for number, place in places.items()
        if across[0] <= place[0] <= across[1] and up[0] <= place[1] <= up[1]
    }
    shown = [one for one in trials if one["number"] in inside]
    points = [
        {
            "number": one["number"],
            "kind": _kind(summary, one),
            "at": at(inside[one["number"]]),
            "words": _words(one["spec"], one["values"], known),
        }
        for one in shown
    ]
    front = sorted(inside[n] for n in summary["front"] if n in inside)
    seen = original if all(map(math.isfinite, original)) else None
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": RIGHT,
        "top": TOP,
        "bottom": BOTTOM,
        "x": VALUES[x][0],
        "y": VALUES[y][0],
        "across": [{"at": at((tick, up[0]))[0], "text": f"{tick:g}"} for tick in _ticks(across)],
        "up": [{"at": at((across[0], tick))[1], "text": f"{tick:g}"} for tick in _ticks(up)],
        "points": sorted(points, key=lambda one: one["kind"] != "other"),  # the best are drawn last
        "front": "M" + "L".join(f"{a} {b}" for a, b in map(at, front)) if len(front) > 1 else "",
        "original": {"at": at(seen), "words": _words("the model as it came", summary["original"], known)}
        if seen is not None
        else None,
        "limits": [_line(name == x, at((limit, limit)), words) for name, limit, words in limits],
        "outside": len(places) - len(inside),
    }


def _limits(summary: Summary, x: str, y: str) -> Iterator[tuple[str, float, str]]:
    """Axis, place and words of every constraint that can be drawn."""
    for words in summary["constraints"]:
        name, _, limit = words.replace("<=", " ").replace(">=", " ").partition(" ")
        if name in (x, y):
            yield name, float(limit), words
        elif name == "drop" and y == "metric":
            yield y, _number(summary["original"], y) - float(limit) / _SHARE, words


def _line(vertical: bool, at: tuple[float, float], words: str) -> dict[str, Any]:
    if vertical:
        return {"path": f"M{at[0]} {TOP}V{BOTTOM}", "at": (at[0] - 6, TOP + 14), "text": words}
    return {"path": f"M{LEFT} {at[1]}H{RIGHT}", "at": (RIGHT - 6, at[1] - 6), "text": words}


def _range(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    room = ROOM * (high - low) or ROOM * abs(high) or 1.0
    return low - room, high + room


def _ticks(ends: Point) -> Iterator[float]:
    """Round numbers within a range."""
    rough = (ends[1] - ends[0]) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
    first = math.ceil(ends[0] / step)
    for i in range(first, math.floor(ends[1] / step) + 1):
        yield round(i * step, 12)


def _words(spec: str, values: Mapping[str, Any], known: Sequence[str]) -> str:
    return "\n".join([spec, *(f"{VALUES[n][0]} {_text(n, values[n])}" for n in known if n in values)])
