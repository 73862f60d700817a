"""The gate in front of `torch.export.load`: a .pt2 is hostile until every part of it is known to be data.

`torch.export.load` unpickles (sample inputs, weights marked `use_pickle`, custom objects), evaluates symbolic
expressions, loads compiled libraries, imports modules that pytree specs name, takes any attribute of `torch` for
an operator, and compiles Python source out of node names, argument names, attribute paths and guards. So before
torch sees the file, its archive and checksums are verified, each pickle must load with `weights_only=True`,
expressions, guards and operators pass a whitelist (expressions.py), and text that will be part of generated source
is an identifier, or at least free of quotes, backslashes and control characters. torch gets those same bytes.
"""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader

from . import archive
from .capture import load_program
from .errors import FileError
from .expressions import SOURCE, Refused, check_expression, check_guard, check_operator

_LEGACY = "serialized_exported_program.json"  # torch 2.7 and older
_LEGACY_PICKLES = ("serialized_state_dict.", "serialized_constants.", "serialized_example_inputs.")
_MAX_ELEMENTS = 1 << 40  # of one stored tensor
_TRANSFORMERS = re.compile(r"transformers\.(modeling_outputs|cache_utils|models\.\w+\.modeling_\w+)")


def is_program(names: list[str]) -> bool:
    """Whether an archive with members of these names is (or wants to be) an exported program."""
    return any(name == _LEGACY or name.endswith("/archive_format") or "/models/" in name for name in names)


def open_program(data: bytes, name: str, *, trust: bool = False) -> ExportedProgram:
    """The exported program in `data`, the bytes of a .pt2 file; `name` is the file's, for messages.

    `trust` (the user's consent to run what is in the file) skips all checks but those of archive and checksums.
    Raises FileError for a damaged or refused file, and for one that torch cannot load.
    """
    found = archive.members(io.BytesIO(data), memoryview(data), name)
    if _LEGACY not in found:
        found = _as_torch_sees_it(data, found, name)
    if not trust:
        try:
            for module in sorted(_check(found)):
                importlib.import_module(module)
        except (Refused, RecursionError, MemoryError) as reason:
            why = str(reason) or "its description is nested too deep"
            raise FileError(
                f"{name} is refused: {why}. Nothing in it was run. "
                f"If you trust whoever made it, add --trust-pickle."
            ) from None
        except ImportError as error:
            raise FileError(f"{name} returns types of transformers: install it ({_line(error)}).") from None
    try:
        return load_program(data)
    except Exception as error:  # torch raises nearly everything here; the file is what is wrong
        raise FileError(f"{name} cannot be loaded by torch {torch.__version__}: {_line(error)}") from error


def _as_torch_sees_it(data: bytes, found: dict[str, memoryview], name: str) -> dict[str, memoryview]:
    """Members by their names below the root folder, once torch's own zip reader finds the same ones."""
    inner = archive.below_root(found, name)
    if "archive_format" not in inner:
        raise FileError(f"{name} is not an exported program; it holds {', '.join(sorted(inner)[:3])}.")
    damaged = FileError(f"{name} is damaged: its directory and its members disagree.")
    try:
        reader = PT2ArchiveReader(io.BytesIO(data))
        if sorted(reader.get_file_names()) != sorted(inner):
            raise damaged
        if any(reader.read_bytes(key) != view for key, view in inner.items() if len(view)):
            raise damaged
    except (RuntimeError, AssertionError, UnicodeDecodeError):
        raise damaged from None
    return inner


def _check(found: Mapping[str, memoryview]) -> set[str]:
    """Check every member that torch reads; answer the modules whose pytree types it needs. Raises Refused."""
    modules: set[str] = set()
    for key, view in found.items():
        if key.startswith("data/aotinductor/"):
            raise Refused("it holds a compiled library (AOTInductor)")
        if key.startswith(("data/weights/", "data/constants/")) and key.endswith(".json"):
            _check_tensors(found, key, _json(view, key))
        elif key.startswith("models/") or key == _LEGACY:
            _walk(_json(view, key), "", modules)
        elif key.startswith("data/sample_inputs/") or key.endswith(".pt") or key.startswith(_LEGACY_PICKLES):
            _check_pickle(view, key)
    return modules


def _json(view: memoryview, key: str) -> Any:
    try:
        return json.loads(bytes(view))
    except ValueError:
        raise Refused(f"its member {key!r} is not JSON") from None


def _check_pickle(view: memoryview, key: str) -> None:
    if not len(view):
        return
    try:
        torch.load(io.BytesIO(view), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever the pickle makes torch's restricted reader say
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
        what = f"would run {names[0]}" if names else "is more than tensors and plain data"
        raise Refused(f"the pickle {key!r} in it {what}") from None


def _check_tensors(found: Mapping[str, memoryview], key: str, table: Any) -> None:
    """Check the table of weights or constants: each one stored as plain bytes, no shorter than its shape."""
    _walk(table, "", set())
    folder = key.rsplit("/", 1)[0]
    entries = table.get("config") if isinstance(table, dict) else None
    if not isinstance(entries, dict):
        raise Refused(f"its member {key!r} is no table of tensors")
    for fqn, entry in entries.items():
        fields = entry if isinstance(entry, dict) else {}
        path, meta = str(fields.get("path_name")), fields.get("tensor_meta")
        if fields.get("use_pickle"):
            raise Refused(f"the tensor {fqn!r} in it is a pickle, which can run code")
        if not path.startswith(("weight_", "tensor_")) or not isinstance(meta, dict):
            raise Refused(f"{fqn!r} in it is an object, not a tensor")
        stored = found.get(f"{folder}/{path}")
        elements = 1
        for size in meta.get("sizes", ()):
            length = size.get("as_int") if isinstance(size, dict) else None
            elements *= length if isinstance(length, int) and length >= 0 else _MAX_ELEMENTS
        if stored is None or elements >= _MAX_ELEMENTS or (elements and not len(stored)):
            raise Refused(f"the tensor {fqn!r} is larger than what is stored of it")


def _walk(value: Any, key: str, modules: set[str]) -> None:
    """Check every string of a JSON tree by the name of the field that it stands in."""
    if isinstance(value, dict):
        if key == "metadata":
            return  # stack traces and provenance: kept as text, never compiled
        for inner, item in value.items():
            _plain(inner)
            if inner in ("as_custom_obj", "custom_obj") or (inner == "custom_obj_values" and item):
                raise Refused("it holds a custom object, not only tensors")
            _walk(item, inner, modules)
    elif isinstance(value, list):
        for item in value:
            _walk(item, key, modules)
    elif isinstance(value, str):
        if key in ("in_spec", "out_spec"):
            _walk_spec(_json(memoryview(value.encode()), key), modules)
        else:
            _RULES.get(key, _plain)(value)


def _walk_spec(value: Any, modules: set[str]) -> None:
    """Check a pytree spec (JSON, with JSON in it): keys become argument names, contexts may name modules."""
    if isinstance(value, list):
        for item in value:
            _walk_spec(item, modules)
    elif isinstance(value, dict):
        if "__enum__" in value or value.get("default_factory_module", "builtins") not in ("builtins", None):
            raise Refused("a pytree in it would import a module")
        module = str(value.get("type")).rpartition(".")[0]
        if _TRANSFORMERS.fullmatch(module):
            modules.add(module)
        for key, item in value.items():
            _plain(key)
            _walk_spec(item, modules)
    elif isinstance(value, str):
        if value.startswith(("[", "{", '"')):
            _walk_spec(_json(memoryview(value.encode()), value[:40]), modules)
        else:
            _plain(value)


def _plain(text: str) -> None:
    if not SOURCE.fullmatch(text):
        raise Refused(f"{text[:60]!r} in it is no name of a parameter or field")


def _identifier(text: str) -> None:
    if text and not text.isidentifier():
        raise Refused(f"{text[:60]!r} in it is no name of a value")


def _free(text: str) -> None:
    """Text that torch keeps as text."""


_RULES: dict[str, Callable[[str], None]] = {
    "name": _identifier,
    "as_name": _identifier,
    "forward_arg_names": _identifier,
    "field_names": _identifier,
    "target": check_operator,
    "as_operator": check_operator,
    "expr_str": check_expression,
    "guards_code": check_guard,
    "as_string": _free,
    "as_strings": _free,
}


def _line(error: BaseException) -> str:
    """The last line that says something: torch puts whole tracebacks into its messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
