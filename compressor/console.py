"""What the commands print besides the report: consoles that behave in a pipe, and small tables."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from .errors import UsageError, printable
from .report import count, dumps, error, pieces, seconds, size, table

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
    else:
        words = f"{event['what']}: {', '.join(filter(None, (event['contract'], event['status'])))}"
    print(words, file=sys.stderr, flush=True)


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
    words = ", ".join(f"{key}={_value(value)}" for key, value in settings.items() if key != "name")
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
            f"{field.name}={_value(getattr(target, field.name))}"
            for field in dataclasses.fields(target)
            if field.name not in ("name", "summary", "quant", "lacks")
        ]
        summary = f"{target.summary}; this machine" if name == native else target.summary
        made.add_row(escape(name), escape(summary), escape(", ".join(settings)))
    console.print(made)


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


def trial_line(console: Console) -> Callable[[Any], None]:
    """Prints one line for every trial of a search, as it ends."""

    def told(outcome: Any) -> None:
        values = ", ".join(
            f"{name} {outcome.values[name]:.4g}" for name in _SEARCHED if name in outcome.values
        )
        what = values if outcome.state == "done" else f"{outcome.state}: {outcome.why}"
        line = f"{outcome.number:>4}  {outcome.spec}  {what}  ({outcome.seconds:.0f} s)"
        console.print(escape(line), highlight=False, soft_wrap=True)

    return told


_SEARCHED = {
    "latency_ms": "ms", "speedup": "speed", "size_mb": "MB", "macs": "MACs", "metric": "metric", "drop": "drop",
    "sqnr": "SQNR dB", "agreement": "top-1 equal",
}  # fmt: skip


def show_search(summary: Mapping[str, Any], console: Console) -> None:
    """The front of a search, best first, below the original; what it was asked for, and how it ended."""
    trials = {one["number"]: one for one in summary["trials"]}
    best = summary["best"]
    shown = [trials[number] for number in summary["front"]]
    if best is not None and best not in summary["front"]:
        shown.append(trials[best])
    key = summary["objectives"][0]
    shown.sort(key=lambda one: one["values"][key])
    names = [name for name in _SEARCHED if any(name in one["values"] for one in shown)]
    made = table(
        "", "passes", *(_SEARCHED[name] for name in names), right=[_SEARCHED[name] for name in names]
    )
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
    names = [name for name in _SEARCHED if any(name in row["values"] for row in rows)]
    made = table(
        "model", "passes", *(_SEARCHED[name] for name in names), right=[_SEARCHED[name] for name in names]
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
                f"  or one of {escape(_named(first['through']))}, which have no counterpart in the model"
            )
        if first["lacks"]:
            lines.append(f"  nothing in the file is the model's {escape(_named(first['lacks']))}")
    if loudest and not first:
        lost = f"{float(loudest['before_db']):.1f} dB before it, {float(loudest['sqnr_db']):.1f} dB after it"
        lines.append(f"[bold]most is lost in[/]  {escape(_layer(loudest))}: {lost}")
    lines.append(f"{inside['paired']} of {inside['values']} values inside have a counterpart in the model")
    for line in lines:
        console.print(f" {line}", highlight=False, soft_wrap=True)


def _layer(row: Mapping[str, Any]) -> str:
    where = f" at {row['module']}" if row["module"] else ""
    return f"{row['operator']}{where} ({row['counterpart']} in the model)"


def _named(names: Sequence[str]) -> str:
    more = len(names) - _MODULES
    return ", ".join(names[:_MODULES]) + (f" and {more} more" if more > 0 else "")


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
    text = _value(value)
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
