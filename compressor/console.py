"""What the commands print besides the report: consoles that behave in a pipe, and small tables."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from .errors import UsageError, printable
from .report import count, error, pieces, size, table

_PIPE_WIDTH = 120  # columns where the output is no terminal; COLUMNS overrides
_FORMATS = {"params": count, "macs": count, "bytes": size}


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


def show_targets(registry: Mapping[str, Any], console: Console) -> None:
    """One row a target: what it is for, and its settings."""
    made = table("target", "what it is for", "settings")
    for name, target in registry.items():
        settings = [
            f"{field.name}={_value(getattr(target, field.name))}"
            for field in dataclasses.fields(target)
            if field.name not in ("name", "summary", "quant", "lacks")
        ]
        made.add_row(escape(name), escape(target.summary), escape(", ".join(settings)))
    console.print(made)


def show_latencies(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One row a model; the ratio is the first model's median over this one's (above 1 is faster).

    A provider is named where it is not the CPU's.
    """
    numbers = ["median ms", "p95 ms", "iqr ms", "runs", "speed"]
    made = table("model", *numbers, right=numbers)
    for row in rows:
        median = float(row["median_ms"])
        provider = str(row.get("provider", "CPU")).removesuffix("ExecutionProvider")
        on = "" if provider == "CPU" else f" (on {provider})"
        speed = f"{float(rows[0]['median_ms']) / median:.2f}x" if median else ""
        made.add_row(
            escape(f"{row.get('path', '')}{on}"),
            f"{median:.3f}",
            *(f"{float(row[key]):.3f}" if row.get(key) is not None else "" for key in ("p95_ms", "iqr_ms")),
            str(row.get("runs", "")),
            speed,
        )
    console.print(made)


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


def show_verification(result: Mapping[str, Any], console: Console) -> None:
    """One row an output slice, worst first, and in a word whether the two models agree."""
    numbers = ["error", "SQNR", "cosine", "agreement"]
    made = table("output", "slice", *numbers, right=numbers)
    for check in result.get("checks") or ():
        made.add_row(
            escape(str(check.get("output", ""))),
            escape(str(check.get("slice") or "")),
            error("exact", [check]),
            *(_number(check, key, form) for key, form in _CHECK_FORMATS),
        )
    console.print(made)
    where = ", ".join(
        str(part)
        for part in (result.get("provider"), _samples(result.get("samples")))
        if part not in (None, "")
    )
    words = "the two models agree" if result.get("ok", True) else "the two models do not agree"
    console.print(f" {words}" + (f" ({escape(where)})" if where else ""), highlight=False)


_CHECK_FORMATS = (("sqnr_db", "{:.1f} dB"), ("cosine", "{:.6f}"), ("agreement", "{:.1%}"))


def ledger_of(report: Mapping[str, Any], where: os.PathLike[str]) -> dict[str, Any]:
    """What the last pass that pruned says of all channels; UsageError where none did."""
    for row in reversed(report["rows"]):
        facts = row.get("facts") or {}
        if "ledger" in facts:
            return {"least": facts.get("least") or {}, "groups": facts["ledger"]}
    raise UsageError(
        f"{os.fspath(where)}: no pass of this run pruned, so it has no groups; inspect the model instead"
    )


def show_ledger(facts: Mapping[str, Any], console: Console) -> None:
    """One row for all channels that stand on the same axes: width, how narrow it may be, what it costs, what became
    of it, and why."""
    numbers = ["channels", "least", "tensors", "params", "MACs"]
    made = table("where", *numbers, "state", "why", right=numbers)
    for row in facts["groups"]:
        tensors = row["tensors"] if isinstance(row["tensors"], int) else len(row["tensors"])
        width = f"{row['width']}" + (f" -> {row['left']}" if row["left"] != row["width"] else "")
        cells = (width, str(row["least"]), str(tensors), count(row["params"]), count(row["macs"]))
        state = f"[{_STATES.get(row['state'], 'default')}]{escape(row['state'])}[/]"
        why = "; ".join(filter(None, (row["why"], row.get("remedy"))))
        made.add_row(escape(row["where"]), *cells, state, escape(why))
    console.print(made)
    least = facts["least"]
    if least:
        console.print(
            f" with every layer at its least width {least['macs']:.0%} of the MACs and {least['params']:.0%} of the "
            "parameters stay",
            highlight=False,
        )  # fmt: skip


_MINOR = 0.01  # of all bytes moved: operators without MACs that move less are one row


def show_layers(facts: Mapping[str, Any], console: Console) -> None:
    """One row an operator, the costliest first; those that multiply nothing and move little in one row; the total."""
    rows = facts["layers"]
    moved = sum(row["bytes"] for row in rows)
    minor = [row for row in rows if not row["macs"] and row["bytes"] < _MINOR * moved]
    numbers = ["params", "MACs", "share", "bytes", "FLOPs/byte"]
    made = table("layer", "operator", "output", "weight", *numbers, right=numbers)
    for row in rows:
        if row["macs"] or row["bytes"] >= _MINOR * moved:
            words = (row["site"], _operator(row["operator"]), _shape(row["shape"]), _shape(row["weight"]))
            made.add_row(*map(escape, words), *_costs(row, row["share"]))
    if minor:
        params, bytes_ = (sum(row[key] for row in minor) for key in ("params", "bytes"))
        others = f"{len(minor)} other{'s' if len(minor) > 1 else ''}"
        made.add_row(others, "", "", "", *_costs({"params": params, "macs": 0, "bytes": bytes_}, 0.0))
    total = {"params": facts["params"], "macs": facts["macs"], "bytes": moved}
    made.add_row("[bold]total[/]", "", "", "", *_costs(total, 1.0 if facts["macs"] else 0.0))
    console.print(made)
    console.print(" for one sample; the bytes of what each operator reads and writes", highlight=False)


def _costs(row: Mapping[str, Any], share: float) -> tuple[str, ...]:
    """Cells of numbers; empty where there is nothing to count."""
    intensity = 2 * row["macs"] / row["bytes"] if row["bytes"] else 0.0
    return (
        count(row["params"] or None),
        count(row["macs"] or None),
        f"{share:.1%}" if row["macs"] else "",
        size(row["bytes"]),
        f"{intensity:.1f}" if row["macs"] else "",
    )


def _operator(name: str) -> str:
    """`conv2d` of `aten.conv2d.default`; attention without `scaled_dot_product`."""
    return name.split(".")[1].removeprefix("scaled_dot_product_") if name.count(".") > 1 else name


def _shape(sizes: Sequence[int] | None) -> str:
    return "" if sizes is None else "x".join(map(str, sizes)) or "scalar"


_MODULES = 4  # named in a row; --json has them all


def show_partitions(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """For each accelerator: what it takes, and one row for the operators that fall back for one reason."""
    for one in rows:
        console.print(f"[bold]{escape(one['title'])}[/]: {pieces(one)}", highlight=False, soft_wrap=True)
        numbers = ["count", "MACs"]
        made = table("falls back", *numbers, "because", "in", right=numbers)
        for row in one["fallback"]:
            named, more = row["modules"][:_MODULES], len(row["modules"]) - _MODULES
            where = ", ".join(named) + (f" and {more} more" if more > 0 else "")
            cells = (str(row["count"]), count(row["macs"] or None))
            made.add_row(escape(row["operator"]), *cells, escape(row["reason"]), escape(where))
        if one["fallback"]:
            console.print(made)
        if one["uncounted"]:
            console.print(f" not counted: the MACs of {', '.join(one['uncounted'])}", highlight=False)
        if one["note"]:
            console.print(f" {escape(one['note'])}", highlight=False)
    console.print(
        " judged by ONNX Runtime's rules for each provider; the device has the last word", highlight=False
    )


_STATES = {"pruned": "green", "frozen": "yellow"}


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
            console.print(f"{label}{gap}{escape(_value(value, str(key)))}", highlight=False, soft_wrap=True)


def _records(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numbers = [c for c in columns if all(isinstance(row.get(c), (int, float)) for row in rows)]
    made = table(*columns, right=numbers)
    for row in rows:
        made.add_row(*(escape(_value(row.get(column), column)) for column in columns))
    console.print(made)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _options(cls: type) -> str:
    if not dataclasses.is_dataclass(cls):
        return ""
    return ", ".join(f"{field.name}={_value(_default(field))}" for field in dataclasses.fields(cls))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "..." if field.default is dataclasses.MISSING else field.default


def _value(value: Any, key: str = "") -> str:
    if value is None:
        return "none"
    if key in _FORMATS and isinstance(value, (int, float)):
        return _FORMATS[key](value)
    if isinstance(value, (list, tuple, set, frozenset)):
        ordered = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        joined = ("," if key == "shape" else "+").join(_value(one) for one in ordered)
        return f"[{joined}]" if key == "shape" else joined or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(check: Mapping[str, Any], key: str, form: str) -> str:
    return "" if check.get(key) is None else form.format(float(check[key]))


def _samples(number: Any) -> str:
    return "" if number is None else f"{number} samples"
