"""Layers, groups of channels and parts of accelerators, as tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from .console import named
from .errors import UsageError
from .report import count, pieces, size, table


def ledger_of(report: Mapping[str, Any], where: os.PathLike[str]) -> dict[str, Any]:
    """What the last pass that pruned says of all channels; UsageError where none did."""
    for row in reversed(report["rows"]):
        facts = row.get("facts") or {}
        if "ledger" in facts:
            return {"least": facts.get("least") or {}, "groups": facts["ledger"]}
    raise UsageError(
        f"{os.fspath(where)}: no pass of this run pruned, so it has no groups; inspect the model instead"
    )


_STATES = {"pruned": "green", "frozen": "yellow"}


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


def show_partitions(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """For each accelerator: what it takes, and one row for the operators that fall back for one reason."""
    for one in rows:
        console.print(f"[bold]{escape(one['title'])}[/]: {pieces(one)}", highlight=False, soft_wrap=True)
        numbers = ["count", "MACs"]
        made = table("falls back", *numbers, "because", "in", right=numbers)
        for row in one["fallback"]:
            cells = (str(row["count"]), count(row["macs"] or None))
            made.add_row(
                escape(row["operator"]), *cells, *map(escape, (row["reason"], named(row["modules"])))
            )
        if one["fallback"]:
            console.print(made)
        if one["uncounted"]:
            console.print(f" not counted: the MACs of {', '.join(one['uncounted'])}", highlight=False)
        if one["note"]:
            console.print(f" {escape(one['note'])}", highlight=False)
    console.print(
        " judged by ONNX Runtime's rules for each provider; the device has the last word", highlight=False
    )
