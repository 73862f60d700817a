"""report.json (schema 1) on disk, and the same report as terminal tables; `page` makes report.html of it.

The file is the record of one run: what each pass did, how its promise about the numbers was checked, and what
was emitted. Its `rows` are what `pipeline.Row` says of each pass, its `layers` what `layers.layers` says of each layer.
Nothing in the tables is measured anew: `compress inspect report.json` shows what the run showed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import FileError, OutputError, UsageError

SCHEMA = 1

_STYLES = {"proved": "green", "not proved": "yellow", "warned": "yellow", "unchanged": "dim"}
# fractions that people read as percentages
_SHARES = frozenset({"top1", "top5", "accuracy", "agreement", "recall", "precision", "iou", "map", "map50"})
_SITES = 3  # sites named in a line of the declines; the file has them all


# ------------------------------------------------------------------------------- the file


def dumps(report: Mapping[str, Any], indent: int | None = 1) -> str:
    """The report as JSON text. The same report gives the same text: sorted keys, fixed indentation; None: one line.

    Numbers that JSON has no word for are written as "inf", "-inf" and "nan".
    """
    return (
        json.dumps(_plain(report), sort_keys=True, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    )


def write_report(path: str | Path, report: Mapping[str, Any]) -> Path:
    """Write the report so that a reader sees the old file or the new one, never half of one.

    OutputError if the folder cannot be written.
    """
    return write_text(Path(path), dumps(report))


def write_text(path: Path, text: str) -> Path:
    """Write a text beside the one that is there, and put it in its place when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputError(f"{path}: cannot write the report: {error.strerror or error}") from error
    return path


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a report.json. FileError if it cannot be opened, UsageError if it is no report of this schema."""
    path = Path(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: cannot read the report: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a report, its text is not JSON ({error})") from error
    if not isinstance(report, dict) or "schema" not in report:
        raise UsageError(f"{path}: not a report of compress, it has no 'schema'")
    if report["schema"] != SCHEMA:
        raise UsageError(
            f"{path}: a report of schema {report['schema']}, and this version reads schema {SCHEMA}; "
            "run the compressor version that it names, or compress again"
        )
    rows = report.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "pass" in row for row in rows):
        raise UsageError(f"{path}: a damaged report, its 'rows' are not a list of passes")
    emitted = report.get("emitted") or {}
    if not isinstance(emitted, dict) or not isinstance(emitted.get("file", ""), str):
        raise UsageError(f"{path}: a damaged report, its 'emitted' names no file")
    return report


@contextlib.contextmanager
def showing(path: str | Path) -> Iterator[None]:
    """Turns what a report from a file, damaged in its depths, raises while it is printed into a UsageError."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"{path}: a damaged report ({type(error).__name__}: {error})") from error


def _plain(value: Any) -> Any:
    """JSON's own types only; numbers of numpy and torch become Python's, sets are sorted."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):  # a path may hold bytes that are no text
        return value.encode("utf-8", "backslashreplace").decode()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(one) for one in value)
    if isinstance(value, Sequence):
        return [_plain(one) for one in value]
    if isinstance(value, os.PathLike):
        return _plain(os.fspath(value))
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"a report holds plain data, not {type(value).__name__}")


# --------------------------------------------------------------------------------- words


def count(number: float | None) -> str:
    """1234567 -> `1.23 M`; None -> an empty cell."""
    return "" if number is None else _scaled(number, ("", " k", " M", " G", " T"))


def size(number: float | None) -> str:
    """1234567 bytes -> `1.23 MB` (powers of 1000); None -> an empty cell."""
    return "" if number is None else _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}" if number % 1 or unit != units[0] else f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.3g}{units[-1]}"


def metric(name: str, value: Any, before: Any = None) -> str:
    """`97.50 % (-0.28)` for shares, with the change in points; other metrics as four digits."""
    share = is_share(name)
    text = f"{100 * float(value):.2f} %" if share else f"{float(value):.4g}"
    if before is None:
        return text
    change = (float(value) - float(before)) * (100 if share else 1)
    return f"{text} ({change:+.2f})" if share else f"{text} ({change:+.2g})"


def is_share(name: str) -> bool:
    """Whether a metric is a share, of which changes are points of a percent."""
    return name in _SHARES


def error(contract: str, checks: Sequence[Mapping[str, Any]]) -> str:
    """The worst of the numbers that the contract is judged by: SQNR where loss is allowed, else error."""
    if "bounded" in contract:
        ratios = [float(check["sqnr_db"]) for check in checks if check.get("sqnr_db") is not None]
        return f"{min(ratios):.1f} dB" if ratios else ""
    errors = [check for check in checks if check.get("error") is not None]
    if not errors:
        return ""
    worst = max(errors, key=lambda check: float(check["error"]))
    text = f"{float(worst['error']):.1e}"
    return f"{text} of {float(worst['tolerance']):.0e}" if worst.get("tolerance") is not None else text


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s" if value < 99.95 else f"{value / 60:.1f} min"


# -------------------------------------------------------------------------------- tables


def render(report: Mapping[str, Any], console: Console, *, details: bool = False) -> None:
    """Print the report: one row a pass, what was left alone and why, notices, and the emitted file.

    details adds what ran (command, versions, model, data), the passes of earlier runs where the model came with a
    receipt, each pass's worst check and its first rewrites.
    """
    if details:
        _provenance(report, console)
    _history(report, console, details)
    console.print(_passes(report["rows"]))
    if details:
        _rewrites(report["rows"], console)
    _declines(report["rows"], console)
    for notice in report.get("notices", ()):
        _line(console, f"[yellow]notice[/]    {escape(notice)}")
    _emitted(report, console)


def _history(report: Mapping[str, Any], console: Console, details: bool) -> None:
    """Where a model that came with a receipt was made, and with details what each earlier run did to it."""
    came = report.get("continued_from")
    if not came:
        return
    original = came.get("original") or {}
    parts = [str(original.get("path", "")), _digest(original.get("sha256")), f"by {came.get('spec', '')}"]
    changed = "its weights changed since" if came.get("changed") else "its weights are as they were left"
    _line(console, f"continued from {escape(' '.join(filter(None, parts)))}; {changed}")
    for number, run in enumerate(report.get("history") or () if details else (), 1):
        target = f" for {run['target']}" if run.get("target") else ""
        trained = ", on changed weights" if run.get("changed_before") else ""
        _line(
            console, f"[bold]run {number}[/]  {escape(str(run.get('command', '')))}{escape(target)}{trained}"
        )
        console.print(_passes(run["rows"]))
    if details and report.get("history"):
        _line(console, "[bold]this run[/]")


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the house style; the columns in `right` are numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def _passes(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.get("metric") or ()))
    timed = any(row.get("latency") for row in rows)
    numbers = ["error", "in all", "params", "MACs", "size", *names, *(["latency"] if timed else []), "time"]
    made = table("pass", "contract", *numbers, right=numbers)
    first = (rows[0].get("metric") or {}) if rows else {}
    for i, row in enumerate(rows):
        checks, status = row.get("checks") or (), row.get("status", "")
        metrics = [_metric_cell(row.get("metric") or {}, name, first if i else {}) for name in names]
        contract = row.get("contract") or ""
        words = ", ".join(word for word in (contract, status) if word)
        made.add_row(
            escape(named(row)),
            f"[{_STYLES.get(status, 'default')}]{escape(words)}[/]",
            error(contract, checks),
            decibels(row.get("total_db")),
            count(row.get("params")),
            count(row.get("macs")),
            size(row.get("bytes")),
            *metrics,
            *([milliseconds(row.get("latency"))] if timed else []),
            seconds(row.get("seconds")),
        )
    return made


def decibels(value: Any) -> str:
    """SQNR against the model as it came; empty where nothing but rounding differs."""
    return f"{value:.1f} dB" if isinstance(value, (int, float)) and value < 80 else ""


def named(row: Mapping[str, Any]) -> str:
    """A pass as it was asked for, and its step."""
    title = row.get("config") or row["pass"]
    return f"{title}: {row['step']}" if row.get("step") else title


def _metric_cell(metrics: Mapping[str, Any], name: str, before: Mapping[str, Any]) -> str:
    return metric(name, metrics[name], before.get(name)) if name in metrics else ""


def milliseconds(latency: Mapping[str, Any] | None) -> str:
    if not latency or latency.get("median_ms") is None:
        return ""
    return f"{float(latency['median_ms']):.3g} ms"


def declines(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """What passes considered and left: (pass, reason) -> sites."""
    sites: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for decline in row.get("declines") or ():
            sites[row["pass"], decline["reason"]].append(decline["site"])
    return sites


def _declines(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One line a reason: the answer to *why not*."""
    sites = declines(rows)
    if not sites:
        return
    made = table("left alone by", "count", "because", "where", right=["count"])
    for (name, reason), where in sites.items():
        distinct = list(dict.fromkeys(where))
        more = f" and {len(distinct) - _SITES} more" if len(distinct) > _SITES else ""
        made.add_row(
            escape(name), str(len(where)), escape(reason), escape(", ".join(distinct[:_SITES]) + more)
        )
    console.print(made)


def _rewrites(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    for row in rows:
        found = Counter(rewrite["what"].split(" (")[0] for rewrite in row.get("rewrites") or ())
        facts = [f"{number} x {what}" for what, number in found.most_common(6)]
        if len(found) > len(facts):
            facts.append(f"and {len(found) - len(facts)} other kinds")
        worst = (row.get("checks") or [None])[0]
        if worst:
            power = f", power {float(worst['power']):.1e}" if worst.get("power") is not None else ""
            facts.append(f"worst output {worst.get('output', '?')}: {_check(worst)}{power}")
        if row.get("peak_mb") is not None and facts:
            facts.append(f"peak memory {row['peak_mb']:.0f} MB")
        for i, fact in enumerate(facts):
            console.print(f"  {escape(row['pass'] if i == 0 else ''):<8} {escape(fact)}", highlight=False)


def _check(check: Mapping[str, Any]) -> str:
    parts = [f"slice {check['slice']}"] if check.get("slice") not in (None, "", "all") else []
    if check.get("error") is not None:
        parts.append(f"error {float(check['error']):.1e}")
    if check.get("sqnr_db") is not None:
        parts.append(f"SQNR {float(check['sqnr_db']):.1f} dB")
    if check.get("cosine") is not None:
        parts.append(f"cosine {float(check['cosine']):.6f}")
    if check.get("agreement") is not None:
        parts.append(f"agreement {100 * float(check['agreement']):.1f} %")
    return ", ".join(parts)


def provenance(report: Mapping[str, Any]) -> dict[str, str]:
    """What ran, on what, in words; without what the report does not say."""
    model, machine = report.get("model") or {}, report.get("machine") or {}
    held = report.get("data") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items())
    facts = {
        "command": report.get("command"),
        "model": " ".join(str(part) for part in (model.get("path"), _digest(model.get("sha256"))) if part),
        "target": (report.get("target") or {}).get("name"),
        "passes": report.get("spec"),
        "inserted": ", ".join(report.get("inserted") or ()),
        "seed": report.get("seed"),
        "calibration": _source(held.get("calibration")),
        "held out": _source(held.get("held_out")),
        "versions": ", ".join(part for part in (f"compressor {report.get('compressor')}", versions) if part),
        "machine": ", ".join(f"{key} {value}" for key, value in machine.items()),
    }
    return {name: str(fact) for name, fact in facts.items() if fact not in (None, "")}


def _provenance(report: Mapping[str, Any], console: Console) -> None:
    for name, fact in provenance(report).items():
        console.print(f"[bold]{name:<12}[/]{escape(fact)}", highlight=False, soft_wrap=True)


def _digest(sha256: str | None) -> str:
    return f"(sha256 {sha256[:12]})" if sha256 else ""


def _source(data: Mapping[str, Any] | None) -> str:
    return f"{data.get('description', '')}, {data.get('samples', '?')} samples" if data else ""


def _emitted(report: Mapping[str, Any], console: Console) -> None:
    """File, size and latency beside the float model's, and how the file was verified."""
    emitted = report.get("emitted")
    if not emitted:
        _line(console, "nothing was emitted")
        return
    lines = [f"[bold]{escape(str(emitted.get('file', 'model.onnx')))}[/]  {size(emitted.get('bytes'))}"]
    if emitted.get("bytes") and emitted.get("float_bytes"):
        ratio = emitted["float_bytes"] / emitted["bytes"]
        lines[0] += f", {times(ratio, 'smaller', 'larger')} than fp32 ONNX ({size(emitted['float_bytes'])})"
    latency = emitted.get("latency") or {}
    if latency.get("model"):
        text = f"latency   {milliseconds(latency['model'])}"
        if latency.get("ratio") and latency.get("float"):
            faster = times(float(latency["ratio"]), "faster", "slower")
            text += f", {faster} than fp32 ONNX ({milliseconds(latency['float'])})"
        if latency.get("threads"):
            text += f", {latency['threads']} threads" if latency["threads"] != 1 else ", 1 thread"
        text += f"; {latency['note']}" if latency.get("note") else ""
        lines.append(text)
    if emitted.get("verified"):
        checks = emitted.get("checks") or ()
        numbers = f": {_check(checks[0])}" if checks else ""
        lines.append(f"verified  {escape(emitted['verified'])}{numbers}")
    before = (report["rows"][0].get("metric") or {}) if report["rows"] else {}
    for name, value in (emitted.get("metric") or {}).items():
        was = f"{metric(name, before[name])} -> " if name in before else ""
        lines.append(f"{name:<8}  {was}{metric(name, value, before.get(name))}")
    beside = emitted.get("program") or {}
    if beside:
        name = escape(str(beside.get("file", "model.pt2")))
        lines.append(
            f"[bold]{name}[/]  {size(beside.get('bytes'))}, {escape(str(beside.get('verified', '')))}"
        )
    lines += [f"{one['provider']}: {pieces(one)}" for one in emitted.get("partitions") or ()]
    memory = report.get("memory") or {}
    if memory.get("peak_resident_mb") and memory.get("peak_anonymous_mb"):
        most, own = (size(memory[f"peak_{kind}_mb"] * (1 << 20)) for kind in ("resident", "anonymous"))
        lines.append(f"memory    {most} at most, {own} of it not mapped from files")
    for line in lines:
        _line(console, line)


def pieces(one: Mapping[str, Any]) -> str:
    """What an accelerator takes of the model, in words."""
    number, taken = one["partitions"], f"{one['taken']} of {one['operators']} operators"
    if not number:
        return "takes nothing of the model"
    share = "" if one["share"] is None else f", {one['share']:.1%} of the MACs"
    return f"{number} partition{'s' if number > 1 else ''} with {taken}{share}"


def _line(console: Console, markup: str) -> None:
    console.print(f" {markup}", highlight=False, soft_wrap=True)


def times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.2f}x {more}" if ratio >= 1 else f"{1 / ratio:.2f}x {less}"
