"""What comparing models, files and reports found, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from .console import named, value_text
from .report import error, table

_CHECK_FORMATS = (("sqnr_db", "{:.1f} dB"), ("cosine", "{:.6f}"), ("agreement", "{:.1%}"))


def show_verification(result: Mapping[str, Any], console: Console, layers: bool = False) -> None:
    """One row an output slice, worst first, and in a word whether the two models agree; then what is inside."""
    numbers = ["error", "SQNR", "cosine", "agreement"]
    made = table("output", "slice", *numbers, right=numbers)
    judged = result.get("judged_by") == "error"
    for check in result.get("checks") or ():
        made.add_row(
            escape(str(check.get("output", ""))),
            escape(str(check.get("slice") or "")),
            error("exact", [check if judged else {**check, "tolerance": None}]),
            *(_number(check, key, form) for key, form in _CHECK_FORMATS),
        )
    console.print(made)
    where = ", ".join(
        str(part)
        for part in (result.get("provider"), _samples(result.get("samples")))
        if part not in (None, "")
    )
    words = "the two models agree" if result.get("ok", True) else "the two models do not agree"
    if result.get("ok", True) and not result.get("proved", True):
        words += ", but would whatever the file says: the outputs of these samples hardly differ (try --data)"
    console.print(f" {words}" + (f" ({escape(where)})" if where else ""), highlight=False)
    if "warning" in result:
        console.print(f" {escape(result['warning'])}", highlight=False)
    if "inside" in result:
        _show_inside(result["inside"], console, layers)


def _show_inside(inside: Mapping[str, Any], console: Console, layers: bool) -> None:
    """The first layer that is wrong and the loudest; with `layers` one row for each that has a counterpart."""
    if layers:
        numbers = ["error", "SQNR"]
        made = table("layer", "operator", "in the model", *numbers, right=numbers)
        for row in inside["layers"]:
            words = (row["module"], row["operator"], row["counterpart"])
            made.add_row(*map(escape, words), f"{float(row['error']):.1e}", f"{float(row['sqnr_db']):.1f} dB")
        console.print(made)
    first, loudest = inside["first"], inside["loudest"]
    lines = []
    if first:
        unshown = "" if inside["shown"] else ", though no output shows it"
        lines.append(f"[bold]first wrong{unshown}[/]  {escape(_layer(first))}")
        lines.append(f"  error {float(first['before']):.1e} before it, {float(first['error']):.1e} after it")
        lines += [
            f"  {word}  {escape(first[key])}"
            for word, key in (("expected", "expected"), ("seen    ", "seen"))
        ]
        if first["through"]:
            lines.append(
                f"  or one of {escape(named(first['through']))}, which have no counterpart in the model"
            )
        if first["lacks"]:
            lines.append(f"  nothing in the file is the model's {escape(named(first['lacks']))}")
    if loudest and not first:
        lost = f"{float(loudest['before_db']):.1f} dB before it, {float(loudest['sqnr_db']):.1f} dB after it"
        lines.append(f"[bold]most is lost in[/]  {escape(_layer(loudest))}: {lost}")
    lines.append(f"{inside['paired']} of {inside['values']} values inside have a counterpart in the model")
    for line in lines:
        console.print(f" {line}", highlight=False, soft_wrap=True)


def _layer(row: Mapping[str, Any]) -> str:
    where = f" at {row['module']}" if row["module"] else ""
    return f"{row['operator']}{where} ({row['counterpart']} in the model)"


def _number(check: Mapping[str, Any], key: str, form: str) -> str:
    return "" if check.get(key) is None else form.format(float(check[key]))


def _samples(number: Any) -> str:
    return "" if number is None else f"{number} samples"


_HELD = {"held": "green", "not held": "red"}


def show_claims(result: Mapping[str, Any], console: Console) -> None:
    """One row a claim of a report: what it said, what is found now, and whether it holds."""
    made = table("claim", "said", "found", "", "")
    for row in result["claims"]:
        brief = [_brief(row[key]) for key in ("claimed", "found")]
        if row["state"] == "held" and brief[0] == brief[1]:
            brief[1] = "the same"
        state = f"[{_HELD.get(row['state'], 'yellow')}]{row['state']}[/]"
        made.add_row(escape(row["what"]), *map(escape, brief), state, escape(row["why"]))
    console.print(made)
    counts = Counter(row["state"] for row in result["claims"])
    words = ", ".join(f"{number} {state}" for state, number in counts.items())
    console.print(f" {words}: {escape(str(result['onnx']))}", highlight=False)


def _brief(value: Any) -> str:
    """What fits a column: of a hash its beginning, of a table how much it holds."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return f"{sum(value.values())} of {len(value)} kinds"
    if isinstance(value, list):
        return f"{len(value)} entries"
    text = value_text(value)
    return text[:12] if len(text) == 64 and " " not in text else text


def show_difference(result: Mapping[str, Any], console: Console) -> None:
    """One row whatever differs between two files: facts, then operators, weights or passes."""
    for key, first in (
        ("facts", "what"),
        ("operators", "operator"),
        ("passes", "what"),
        ("initializers", "tensor"),
    ):
        rows = result.get(key) or ()
        weights = key == "initializers"
        named = ["pass"] if key == "passes" else []
        made = table(*named, first, "A", "B", *(["", "error"] if weights else []), right=["error"])
        for row in rows:
            cells = [row["pass"]] if named else []
            cells += [row["name"] if weights else row["what"], *(_brief(row[one]) for one in "ab")]
            if weights:
                cells += [row["state"], "" if row["error"] is None else f"{float(row['error']):.1e}"]
            made.add_row(*map(escape, cells))
        if rows:
            console.print(made)
    equal = result.get("equal_initializers")
    words = "no difference" if result["same"] else f"A is {result['a']}, B is {result['b']}"
    console.print(f" {escape(words)}" + (f"; {equal} tensors are equal" if equal else ""), highlight=False)
