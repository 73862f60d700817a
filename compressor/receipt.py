"""The receipt: what was done to a model so far. It travels with the model, and the next report begins with it.

It is JSON: in a `.pt2` the extra file `compressor.json`, on a module of `trainable()` its attribute `receipt`. A file
is anybody's, so a receipt is read field by field, by type; whatever else stands in it is left out. It says where the
model came from. It proves nothing: that the weights are still those of the last run is checked, not believed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CompressorError
from .ir import Graph, Input, terms
from .names import DTYPE_NAMES

MEMBER = "compressor.json"  # name of the extra file in a .pt2
FORMAT, VERSION = "compressor receipt", 1
MAX_BYTES = 1 << 24
_MAX_RUNS, _MAX_ITEMS, _MAX_TEXT, _MAX_DEPTH = 100, 100_000, 4_000, 12

_ROW: dict[str, Any] = {
    "pass": str, "config": str, "contract": str, "status": str, "params": int, "macs": int, "bytes": int,
    "total_db": float, "total_cosine": float, "total_agreement": float, "seconds": float, "peak_mb": float,
    "metric": {str: float}, "facts": {str: Any},
    "rewrites": [{"site": str, "what": str}],
    "declines": [{"site": str, "reason": str}],
    "checks": [{
        "output": str, "slice": str, "error": float, "tolerance": float, "power": float, "sqnr_db": float,
        "cosine": float, "agreement": float, "finite": bool, "discrete": bool,
    }],
}  # fmt: skip
_MODEL = {"path": str, "sha256": str, "hashed": str, "stem": str}
_RUN: dict[str, Any] = {
    "compressor": str, "command": str, "spec": str, "target": str, "seed": int, "model": _MODEL, "inserted": [str],
    "versions": {str: str}, "rows": [_ROW], "changed_before": bool,
}  # fmt: skip
_RECEIPT: dict[str, Any] = {
    "history": [_RUN],
    "weights_sha256": str,
    "inputs": [{"name": str, "dtype": str, "shape": [Any]}],
    "outputs": [str],
}
_REQUIRED = {id(_ROW): ("pass",), id(_RUN): ("model", "rows"), id(_RECEIPT): ("history", "weights_sha256")}


class Unreadable(CompressorError):
    """A receipt that is none; the text says why, without naming the file."""


@dataclass(frozen=True)
class Continued:
    """The receipt that came with a model. changed: whether its weights are others than those that it was made for."""

    receipt: Mapping[str, Any]
    changed: bool

    @property
    def runs(self) -> list[dict[str, Any]]:
        return list(self.receipt["history"])

    def facts(self) -> dict[str, Any]:
        """For a report: where the model came from first, and what was done to it before."""
        return {
            "original": self.runs[0]["model"],
            "spec": " -> ".join(run.get("spec", "") for run in self.runs),
            "runs": len(self.runs),
            "changed": self.changed,
        }


def continued(receipt: Mapping[str, Any], state: Mapping[str, Tensor]) -> Continued:
    """The receipt of a model with this state dict."""
    return Continued(receipt, receipt["weights_sha256"] != digest(state))


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# -------------------------------------------------------------------- writing


def issue(report: Mapping[str, Any], graph: Graph, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The receipt after the run of `report`, which made `graph`; `state` is what is kept of its tensors."""
    earlier = list(report.get("history") or ())
    changed = bool((report.get("continued_from") or {}).get("changed"))
    run = {
        "compressor": report["compressor"],
        "command": report["command"],
        "spec": report["spec"],
        "target": report["target"]["name"],
        "seed": report["seed"],
        "model": report["model"],
        "inserted": report["inserted"],
        "versions": report["versions"],
        "rows": report["rows"],
        "changed_before": changed,
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "history": [*earlier, _without_folders(run)],
        "weights_sha256": digest(state),
        "inputs": [
            {"name": one.name, "dtype": DTYPE_NAMES.get(one.dtype, str(one.dtype)), "shape": list(one.shape)}
            for one in graph.inputs
        ],
        "outputs": list(graph.outputs),
    }


_FOLDERS = re.compile(r"(?<![\w.~])(?:~|[A-Za-z]:)?[/\\](?:[^/\\\s'\"=:,]+[/\\])+")


def _without_folders(value: Any) -> Any:
    """Absolute paths in text are cut to their last part: a model that is handed on says nothing about a machine."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [_without_folders(one) for one in value]
    return value


# -------------------------------------------------------------------- reading


def read(data: bytes | memoryview) -> dict[str, Any]:
    """A receipt out of bytes that anybody may have written. Unreadable says what is wrong with it."""
    if len(data) > MAX_BYTES:
        raise Unreadable(f"it is larger than {MAX_BYTES >> 20} MB")
    try:
        value = json.loads(bytes(data))
    except (ValueError, RecursionError):
        raise Unreadable("it is not JSON") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise Unreadable("it is not a receipt of compress")
    if value.get("version") != VERSION:
        raise Unreadable(f"it is of another version than {VERSION}, which is read here")
    found: dict[str, Any] = _typed(value, _RECEIPT, "")
    if not 0 < len(found["history"]) <= _MAX_RUNS:
        raise Unreadable(f"its history has {len(found['history'])} runs")
    return {"format": FORMAT, "version": VERSION, **found}


def _typed(value: Any, schema: Any, where: str, depth: int = 0) -> Any:
    """The part of a value that the schema names, each of its type. Unreadable names the first that is not."""
    wrong = Unreadable(f"its {where.lstrip('.') or 'text'} is not what stands there in a receipt")
    if depth > _MAX_DEPTH or (isinstance(value, (list, dict)) and len(value) > _MAX_ITEMS):
        raise wrong
    if schema is Any:
        return _plain(value, wrong, depth)
    if isinstance(schema, list):
        if not isinstance(value, list):
            raise wrong
        return [_typed(one, schema[0], f"{where}[{i}]", depth + 1) for i, one in enumerate(value)]
    if isinstance(schema, dict):
        if not isinstance(value, dict) or any(
            value.get(key) is None for key in _REQUIRED.get(id(schema), ())
        ):
            raise wrong
        if str in schema:
            inner = schema[str]
            return {
                _clean(key): _typed(one, inner, f"{where}.{_clean(key)}", depth + 1)
                for key, one in value.items()
            }
        return {
            key: _typed(value[key], inner, f"{where}.{key}", depth + 1)
            for key, inner in schema.items()
            if value.get(key) is not None
        }
    return _scalar(value, schema, wrong)


def _scalar(value: Any, schema: type, wrong: Unreadable) -> Any:
    """Text without control characters, a truth value, or a number, which JSON may have had no word for."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if schema is str and isinstance(value, str):
        return _clean(value)
    if schema is bool and isinstance(value, bool):
        return value
    if schema is int and number and isinstance(value, int) and abs(value) < 1 << 63:
        return value
    if schema is float and value in ("inf", "-inf", "nan"):
        return float(value)
    if schema is float and number and not 1e300 < abs(value) < math.inf:
        return float(value)
    raise wrong


def _plain(value: Any, wrong: Unreadable, depth: int) -> Any:
    """Any JSON, not nested too deep, with text that a terminal only shows."""
    if depth > _MAX_DEPTH:
        raise wrong
    if isinstance(value, list):
        return [_plain(one, wrong, depth + 1) for one in value]
    if isinstance(value, dict):
        return {_clean(key): _plain(one, wrong, depth + 1) for key, one in value.items()}
    return _clean(value) if isinstance(value, str) else value


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text[:_MAX_TEXT])


# -------------------------------------------------------------------- names


def rename(graph: Graph, receipt: Mapping[str, Any]) -> None:
    """Inputs, outputs and dynamic axes by their names before the export, where they are still the same ones."""
    known = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    wanted = receipt.get("inputs") or ()
    if len(wanted) == len(graph.inputs):
        axes: dict[str, str] = {}
        inputs = []
        for spec, one in zip(graph.inputs, wanted, strict=True):
            sizes = one.get("shape") or []
            if known.get(one.get("dtype")) != spec.dtype or not _same_axes(spec, sizes, axes):
                return
            inputs.append(Input(str(one.get("name")), spec.dtype, tuple(sizes)))
        if len({one.name for one in inputs}) == len(inputs):
            graph.inputs = tuple(inputs)
    outputs = tuple(receipt.get("outputs") or ())
    fit = len(outputs) == len(graph.outputs) and len({*outputs, *(i.name for i in graph.inputs)}) == len(
        outputs
    ) + len(graph.inputs)
    if fit:
        graph.outputs = outputs


def _is_axis(name: Any) -> bool:
    return isinstance(name, str) and all(term.isidentifier() for term in terms(name))


def _same_axes(spec: Input, sizes: Sequence[Any], axes: dict[str, str]) -> bool:
    """Equal fixed sizes, and dynamic axes that stand for the same ones everywhere (noted in `axes`)."""
    if len(sizes) != len(spec.shape):
        return False
    for size, name in zip(spec.shape, sizes, strict=True):
        if isinstance(size, int):
            if size != name:
                return False
        elif not _is_axis(name) or axes.setdefault(size, name) != name:
            return False
    return True
