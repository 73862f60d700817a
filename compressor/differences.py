"""What differs between two ONNX files, or two reports: as plain data, equal parts counted and not listed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from .errors import UsageError
from .external import beside
from .report import read_report, showing

# Of a report, what a run may not repeat to the last digit, and long lists that the file itself has.
_LEFT_OUT = {
    *("seconds", "peak_mb", "memory", "steps", "latency_table", "rewrites", "declines", "ledger", "history"),
    *("power", "files", "hashes", "p95_ms", "iqr_ms", "runs", "spread", "start_anonymous_mb"),
}


def between(a: Path, b: Path) -> dict[str, Any]:
    """{"kind": "onnx" or "report", "a", "b", "same", "facts": rows of what differs, ...}; UsageError for a mixture."""
    kinds = {path: "report" if path.suffix == ".json" else "onnx" for path in (a, b)}
    if len(set(kinds.values())) > 1:
        raise UsageError(f"{a} and {b}: --diff compares two ONNX files, or two reports")
    found = _of_reports(a, b) if kinds[a] == "report" else _of_onnx(a, b)
    lists = [value for value in found.values() if isinstance(value, list)]
    return {"kind": kinds[a], "a": str(a), "b": str(b), "same": not any(lists), **found}


def _rows(what: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a key whose values differ; None where there is none."""
    keys = list(dict.fromkeys([*what, *other]))
    return [{"what": k, "a": what.get(k), "b": other.get(k)} for k in keys if what.get(k) != other.get(k)]


# -------------------------------------------------------------------- ONNX files


def _of_onnx(a: Path, b: Path) -> dict[str, Any]:
    files = [(path, *beside(path)) for path in (a, b)]
    models = [onnx_ir.load(path.resolve()) for path in (a, b)]
    counts = [Counter(_operator(node) for node in model.graph.all_nodes()) for model in models]
    weights = [dict(model.graph.initializers) for model in models]
    changed, equal = [], 0
    for name in dict.fromkeys([*weights[0], *weights[1]]):
        row = _tensors(name, *(one[name].const_value if name in one else None for one in weights))
        equal += row is None
        changed += [row] if row is not None else []
    return {
        "facts": _rows(*map(_facts, models, files)),
        "operators": _rows(*counts),
        "initializers": changed,
        "equal_initializers": equal,
    }


def _operator(node: onnx_ir.Node) -> str:
    return f"{node.domain}::{node.op_type}".removeprefix("::")


def _facts(model: onnx_ir.Model, files: Iterable[Path]) -> dict[str, Any]:
    ends = {"input": model.graph.inputs, "output": model.graph.outputs}
    return {
        "bytes": sum(one.stat().st_size for one in files),
        "IR version": model.ir_version,
        **{f"opset {domain}".strip(): version for domain, version in model.opset_imports.items()},
        **{f"{end} {v.name}": _described(v.dtype, v.shape) for end, values in ends.items() for v in values},
        **{f"metadata {key}": value for key, value in model.metadata_props.items()},
        "nodes": sum(1 for _ in model.graph.all_nodes()),
    }


def _described(dtype: Any, shape: Any) -> str:
    """`FLOAT[batch,3,8,8]`."""
    sizes = ",".join(str(getattr(size, "value", size)) for size in shape) if shape is not None else "?"
    return f"{getattr(dtype, 'name', '?')}[{sizes}]"


def _tensors(name: str, a: Any, b: Any) -> dict[str, Any] | None:
    """A row for two tensors that are not the same; None where they are. error: max|a - b| / max|a|."""
    words = [None if one is None else _described(one.dtype, one.shape) for one in (a, b)]
    row = {"name": name, "a": words[0], "b": words[1], "state": "changed", "error": None}
    if a is None or b is None:
        return row | {"state": "only in b" if a is None else "only in a"}
    if words[0] != words[1]:
        return row
    if a.tobytes() == b.tobytes():
        return None
    x, y = (np.asarray(one.numpy()).astype(np.float64) for one in (a, b))
    scale = float(np.abs(x).max()) or 1.0
    error = float(np.abs(x - y).max()) / scale
    return row | {"error": error if math.isfinite(error) else "nan"}


# -------------------------------------------------------------------- reports


def _of_reports(a: Path, b: Path) -> dict[str, Any]:
    with showing(f"{a} or {b}"):
        return _between(*(_plain(read_report(path)) for path in (a, b)))


def _between(*reports: dict[str, Any]) -> dict[str, Any]:
    rows = [dict(_named_rows(report.pop("rows"))) for report in reports]
    return {
        "facts": _rows(*(dict(_leaves(report)) for report in reports)),
        "passes": [
            {"pass": name, **row}
            for name in dict.fromkeys([*rows[0], *rows[1]])
            for row in _of_passes(*(one.get(name) for one in rows))
        ],
    }


def _of_passes(a: dict[str, Any] | None, b: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pass that only one of the runs had is one row: what it is and what became of it."""
    if a is None or b is None:
        words = [one and ", ".join(filter(None, (one.get("config"), one.get("status")))) for one in (a, b)]
        return [{"what": "", "a": words[0], "b": words[1]}]
    return _rows(dict(_leaves(a)), dict(_leaves(b)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if key not in _LEFT_OUT}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _named_rows(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A pass that ran twice has a number behind its name."""
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row["pass"]] += 1
        number = seen[row["pass"]]
        yield row["pass"] if number == 1 else f"{row['pass']} {number}", row


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """`emitted.latency.ratio` and what stands there."""
    if isinstance(value, dict) and value:
        for key, one in value.items():
            yield from _leaves(one, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(one, (dict, list)) for one in value):
        for number, one in enumerate(value):
            yield from _leaves(one, f"{path}.{number}")
    elif value not in ("", [], {}):
        yield path, value
