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
from .errors import FileError
from .export import load_program
from .expressions import SOURCE, Refused, check_expression, check_guard, check_operator

_LEGACY = "serialized_exported_program.json"  # torch 2.7 and older: a flat archive
# what a member holds, by its name; torch reads no others
_PROGRAM = re.compile(r"models/[\w\-]+\.json|" + re.escape(_LEGACY))
_TENSOR_TABLE = re.compile(r"data/(weights|constants)/[\w\-]+_config\.json")
_PICKLE = re.compile(
    r"data/(sample_inputs|weights|constants)/[\w\-]+\.pt"
    r"|serialized_(state_dict|constants|example_inputs)\.(pt|json)"
)
_PLAIN = re.compile(
    r"archive_format|archive_version|version|byteorder|\.[\w/]+|extra/.*"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_MAX_ELEMENTS = 1 << 40  # of one stored tensor
_TRANSFORMERS = re.compile(r"transformers\.(modeling_outputs|cache_utils|models\.\w+\.modeling_\w+)")
_FACTORIES = (None, "list", "dict", "set", "tuple", "int", "float", "str", "bool")
_MANY_DIGITS = re.compile(r"\d{8}")  # torch counts up to the number in a symbol's name


def is_program(names: list[str]) -> bool:
    """Whether an archive with members of these names is (or wants to be) an exported program."""
    return any(name == _LEGACY or name.endswith("/archive_format") or "/models/" in name for name in names)


def open_program(data: bytes, name: str, *, trust: bool = False) -> ExportedProgram:
    """The exported program in `data`, the bytes of a .pt2 file; `name` is the file's, for messages.

    `trust` (the user's consent to run what is in the file) skips all checks but those of archive and checksums.
    Raises FileError for a damaged or refused file, and for one that torch cannot load.
    """
    found = archive.members(io.BytesIO(data), memoryview(data), name)
    if _LEGACY not in found or any("/" in key for key in found):
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
    """Check every member; answer the modules whose pytree types the program needs. Raises Refused."""
    modules: set[str] = set()
    for key, view in found.items():
        if _TENSOR_TABLE.fullmatch(key):
            _check_tensors(found, key, _json(view, key))
        elif _PROGRAM.fullmatch(key):
            _walk(_json(view, key), ("", ""), modules)
        elif _PICKLE.fullmatch(key):
            _check_pickle(view, key)
        elif not _PLAIN.fullmatch(key):
            what = (
                "a compiled library" if key.startswith("data/aotinductor/") else "no part of a plain program"
            )
            raise Refused(f"its member {key[:60]!r} is {what}")
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
    _walk(table, ("", ""), set())
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
        for size in meta["sizes"] if isinstance(meta.get("sizes"), list) else ():
            length = size.get("as_int") if isinstance(size, dict) else None
            elements *= length if isinstance(length, int) and length >= 0 else _MAX_ELEMENTS
        if stored is None or elements >= _MAX_ELEMENTS or (elements and not len(stored)):
            raise Refused(f"the tensor {fqn!r} is larger than what is stored of it")


def _walk(value: Any, keys: tuple[str, str], modules: set[str]) -> None:
    """Check every string of a JSON tree by the field that it stands in: keys = (outer field, field)."""
    outer, key = keys
    if isinstance(value, dict):
        if key == "metadata" and all(isinstance(item, str) for item in value.values()):
            return  # stack traces and provenance: kept as text, never compiled
        for inner, item in value.items():
            _plain(inner)
            if inner in ("as_custom_obj", "custom_obj") or (inner == "custom_obj_values" and item):
                raise Refused("it holds a custom object, not only tensors")
            if inner == "range_constraints" and any(map(_MANY_DIGITS.search, item)):
                raise Refused("it numbers its symbolic sizes beyond any count")
            _walk(item, (key, inner), modules)
    elif isinstance(value, list):
        for item in value:
            _walk(item, keys, modules)
    elif isinstance(value, str):
        if key in ("in_spec", "out_spec"):
            _check_spec(value, modules)
        elif not (outer == "arg" and key in ("as_string", "as_strings")):  # operands are quoted by torch
            _RULES.get(key, _plain)(value)


def _check_spec(text: str, modules: set[str]) -> None:
    """Check a pytree spec, which is JSON: the keys below its root become names of arguments."""
    spec = _json(memoryview(text.encode()), text[:40])
    _walk_spec(spec, modules)
    root = spec[1] if isinstance(spec, list) and len(spec) == 2 and isinstance(spec[1], dict) else {}
    for child in root.get("children_spec") or ():
        context = child.get("context") if isinstance(child, dict) else None
        names = _json(memoryview(context.encode()), context) if isinstance(context, str) else None
        for name in names if isinstance(names, list) else ():
            _identifier(str(name))


def _walk_spec(value: Any, modules: set[str]) -> None:
    """Check types and contexts at every depth (there is JSON within its strings): some name modules."""
    if isinstance(value, list):
        for item in value:
            _walk_spec(item, modules)
    elif isinstance(value, dict):
        if "__enum__" in value or value.get("default_factory_module", "builtins") not in ("builtins", None):
            raise Refused("a pytree in it would import a module")
        if value.get("default_factory_name") not in _FACTORIES:
            raise Refused("a pytree in it would call a function")
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


_RULES: dict[str, Callable[[str], None]] = {
    "name": _identifier,
    "as_name": _identifier,
    "forward_arg_names": _identifier,
    "field_names": _identifier,
    "target": check_operator,
    "as_operator": check_operator,
    "expr_str": check_expression,
    "guards_code": check_guard,
}


def _line(error: BaseException) -> str:
    """The last line that says something: torch puts whole tracebacks into its messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
