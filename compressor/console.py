"""What the commands print besides the report: consoles that behave in a pipe, a log, and small tables."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from .errors import printable
from .report import count, dumps, seconds, size, table

_PIPE_WIDTH = 120  # columns where the output is no terminal; COLUMNS overrides
_FORMATS = {"params": count, "macs": count, "bytes": size}
_NAMED = 4  # in a row; --json has them all


class _Console(Console):
    """A rich console that leaves a reader's early goodbye (`compress inspect ... | head`) to `main`.

    Nothing that it is given reaches a terminal as a command.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def output() -> Console:
    """Standard output: colours and the terminal's width there, plain text of fixed width in a pipe."""
    return _console(sys.stdout)


def progress(quiet: bool = False) -> Console:
    """Standard error, for spinners and bars, which rich shows on a terminal only."""
    made = _console(sys.stderr)
    made.quiet = quiet
    return made


def _console(file: IO[str]) -> Console:
    fixed = not file.isatty() and "COLUMNS" not in os.environ
    return _Console(file=file, width=_PIPE_WIDTH if fixed else None)


def logging(quiet: bool, verbose: bool, log_format: str) -> dict[str, Any]:
    """Where the api shows its work, as its options: bars, or lines on standard error instead.

    `log` is there only where the user asked for lines. Quiet, only lines of JSON are written.
    """
    if log_format == "json":
        return {"console": progress(True), "log": _write_json}
    if verbose and not quiet:
        return {"console": progress(True), "log": _write_line}
    return {"console": progress(quiet)}


def _write_json(event: Mapping[str, Any]) -> None:
    print(dumps({"time": round(time.time(), 3), **event}, indent=None), end="", file=sys.stderr, flush=True)


def _write_line(event: Mapping[str, Any]) -> None:
    """`  calibrating int8  1.2 s, 64 at 53.3/s, peak 512 MB`: of what ended; of a pass, what became of it."""
    if event["event"] == "begin":
        words = f"{'  ' * event['depth']}{event['what']} ..."
    elif event["event"] == "end":
        rate = f", {event['count']} at {event['rate']:.3g}/s" if event.get("count") else ""
        failed = " failed after" if event["status"] == "failed" else ""
        words = f"{'  ' * event['depth']}{event['what']}{failed}  {seconds(event['seconds'])}{rate}"
        words += f", peak {event['peak_mb']:.0f} MB"
    elif event["event"] == "trial":
        words = trial_line(event)
    else:
        words = f"{event['what']}: {', '.join(filter(None, (event['contract'], event['status'])))}"
    print(words, file=sys.stderr, flush=True)


# Values of a trial, and what they are called in a table.
SEARCHED = {
    "latency_ms": "ms", "speedup": "speed", "size_mb": "MB", "macs": "MACs", "metric": "metric", "drop": "drop",
    "sqnr": "SQNR dB", "agreement": "top-1 equal",
}  # fmt: skip


def searching(quiet: bool, verbose: bool, log_format: str) -> dict[str, Any]:
    """What `logging` says, for work that consists of trials: a line for each as it ends, where no log has them all."""
    shown = logging(quiet, verbose, log_format)
    errors = shown["console"]

    def lines(event: Mapping[str, Any]) -> None:
        if event["event"] == "trial":
            errors.print(escape(trial_line(event)), highlight=False, soft_wrap=True)

    return {"log": lines, **shown}


def trial_line(trial: Mapping[str, Any]) -> str:
    """`   3  fold,int8  latency_ms 1.25, speedup 2.1  (14 s)`, or why there is no model; its name first in a list."""
    values = ", ".join(f"{name} {trial['values'][name]:.4g}" for name in SEARCHED if name in trial["values"])
    what = values if trial["state"] == "done" else f"{trial['state']}: {trial['why']}"
    words = filter(None, (trial.get("model"), trial["spec"], what, f"({trial['seconds']:.0f} s)"))
    return f"{trial['number']:>4}  {'  '.join(words)}"


def working(console: Console, words: str) -> AbstractContextManager[Any]:
    """A transient spinner while something without steps of its own runs."""
    return console.status(words)


# -------------------------------------------------------------------------------- tables


def show_passes(registry: Mapping[str, type], console: Console) -> None:
    """One row a pass, in default order: contract, what it does, and its options with their defaults."""
    made = table("pass", "contract", "what it does", "options")
    for name, cls in registry.items():
        contract = getattr(cls, "contract", None)
        made.add_row(
            escape(name), getattr(contract, "name", ""), escape(_first_line(cls)), escape(_options(cls))
        )
    console.print(made)


def show_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Where the model is to run, one row a pass in order with estimates of what is left, and what would refuse."""
    settings = plan["target"] | (
        {"sizes": ", ".join(f"{k}={v}" for k, v in plan["fixed"].items())} if plan["fixed"] else {}
    )
    words = ", ".join(f"{key}={value_text(value)}" for key, value in settings.items() if key != "name")
    console.print(
        f" [bold]target {escape(settings['name'])}[/]: {escape(words)}", highlight=False, soft_wrap=True
    )
    numbers = ["params", "MACs", "size"]
    made = table("pass", "contract", *numbers, "estimated by", right=numbers)
    for row in plan["passes"]:
        name = f"{row.get('config') or row['pass']}{' (added: a later pass needs it)' if row.get('inserted') else ''}"
        why = f"[red]refuses[/]: {escape(row['refuses'])}" if row.get("refuses") else escape(row["rule"])
        costs = (count(round(row["params"])), count(round(row["macs"])), size(round(row["bytes"])))
        made.add_row(escape(name), row.get("contract", ""), *costs, why)
    console.print(made)
    console.print(
        f" these are estimates; nothing was run, and nothing written to {escape(plan['output'])}",
        highlight=False,
    )


def show_targets(registry: Mapping[str, Any], native: str, console: Console) -> None:
    """One row a target: what it is for, and its settings. native: the one that is this machine."""
    made = table("target", "what it is for", "settings")
    for name, target in registry.items():
        settings = [
            f"{field.name}={value_text(getattr(target, field.name))}"
            for field in dataclasses.fields(target)
            if field.name not in ("name", "summary", "quant", "lacks")
        ]
        summary = f"{target.summary}; this machine" if name == native else target.summary
        made.add_row(escape(name), escape(summary), escape(", ".join(settings)))
    console.print(made)


def show_facts(facts: Mapping[str, Any], console: Console, indent: int = 0) -> None:
    """Plain data as lines; lists of records as tables; nested data indented below its name."""
    width = max((len(str(key)) for key in facts), default=0) + 2
    for key, value in facts.items():
        label = f"{' ' * indent}[bold]{escape(str(key))}[/]"
        if isinstance(value, Mapping) and value:
            console.print(label)
            show_facts(value, console, indent + 2)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(one, Mapping) for one in value):
            console.print(label)
            _records(value, console)
        else:
            gap = " " * (width - len(str(key)))
            console.print(
                f"{label}{gap}{escape(value_text(value, str(key)))}", highlight=False, soft_wrap=True
            )


def _records(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numbers = [c for c in columns if all(isinstance(row.get(c), (int, float)) for row in rows)]
    made = table(*columns, right=numbers)
    for row in rows:
        made.add_row(*(escape(value_text(row.get(column), column)) for column in columns))
    console.print(made)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _options(cls: type) -> str:
    if not dataclasses.is_dataclass(cls):
        return ""
    return ", ".join(f"{field.name}={value_text(_default(field))}" for field in dataclasses.fields(cls))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "..." if field.default is dataclasses.MISSING else field.default


def value_text(value: Any, key: str = "") -> str:
    """A value in a cell."""
    if value is None:
        return "none"
    if key in _FORMATS and isinstance(value, (int, float)):
        return _FORMATS[key](value)
    if isinstance(value, (list, tuple, set, frozenset)):
        ordered = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        joined = ("," if key == "shape" else "+").join(value_text(one) for one in ordered)
        return f"[{joined}]" if key == "shape" else joined or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def named(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
