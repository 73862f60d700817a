"""The gate in front of `torch.export.load`: a .pt2 is hostile until every part of it is known to be data.

`torch.export.load` unpickles (sample inputs, weights marked `use_pickle`, custom objects), evaluates symbolic
expressions, loads compiled libraries, imports modules named in pytree specs, takes any attribute of `torch` as an
operator, and compiles Python source out of node names, argument names, attribute paths and guards. So before torch
sees the file: archive and checksums are verified, each pickle must load with `weights_only=True`, expressions and
guards are parsed with `ast` against a whitelist, operators come from a list, and a string that will be part of
generated source is an identifier, or at least free of quotes, backslashes and control characters.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader

from . import archive
from .errors import FileError

_LEGACY = "serialized_exported_program.json"
_LEGACY_PICKLES = ("serialized_state_dict.", "serialized_constants.", "serialized_example_inputs.")
_MAX_TEXT = 20_000  # characters of one expression
_MAX_BITS = 256  # of one integer in an expression
_MAX_DEGREE = 4096  # exponents multiplied along one path: more would only keep sympy busy for ever
_MAX_ELEMENTS = 1 << 40  # of one stored tensor

_FUNCTIONS = frozenset(
    [
        "Symbol",
        "Integer",
        "Float",
        "Rational",
        "Add",
        "Mul",
        "Pow",
        "Max",
        "Min",
        "Abs",
        "Mod",
        "floor",
        "ceiling",
        "FloorDiv",
        "PythonMod",
        "ModularIndexing",
        "CleanDiv",
        "CeilDiv",
        "CeilToInt",
        "FloorToInt",
        "TruncToInt",
        "TruncToFloat",
        "RoundToInt",
        "RoundDecimal",
        "ToFloat",
        "IntTrueDiv",
        "FloatTrueDiv",
        "FloatPow",
        "PowByNatural",
        "LShift",
        "RShift",
        "Where",
        "Identity",
        "IsNonOverlappingAndDenseIndicator",
        "Equality",
        "Unequality",
        "StrictLessThan",
        "LessThan",
        "StrictGreaterThan",
        "GreaterThan",
        "Eq",
        "Ne",
        "Lt",
        "Le",
        "Gt",
        "Ge",
        "And",
        "Or",
        "Not",
        "Piecewise",
        "ExprCondPair",
        "Tuple",
    ]
)
_POWERS = frozenset(["Pow", "PowByNatural", "FloatPow", "LShift", "RShift"])
_CONSTANTS = frozenset(["true", "false", "oo", "int_oo"])
_SYMBOL = re.compile(r"[a-z]+_?\d+|_[a-z]+\d+")
_NUMBER = re.compile(r"-?[\d.]+(e[+-]?\d+)?")
_EXPRESSION_NODES = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Tuple, ast.UnaryOp, ast.USub,
    ast.UAdd, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.Compare, ast.Eq,
    ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_GUARD_NODES = (
    *_EXPRESSION_NODES, ast.BoolOp, ast.And, ast.Or, ast.Not, ast.Div, ast.Subscript, ast.Attribute, ast.Is,
    ast.IsNot,
)  # fmt: skip
_GUARD_FUNCTIONS = _FUNCTIONS | {"max", "min", "abs", "int", "float", "bool"}
_GUARD_METHODS = frozenset(["size", "stride", "storage_offset", "dim", "numel", "element_size"])
_GUARD_MATH = frozenset(["floor", "ceil", "trunc", "sqrt", "isnan", "isinf", "inf", "nan"])

# namespace of operators -> the library that registers it
_NAMESPACES = {
    "aten": "torch",
    "prims": "torch",
    "quantized_decomposed": "torch.ao.quantization.fx._decomposed",
    "torchvision": "torchvision",
    "transformers": "transformers.integrations.moe",
    "compressor": "compressor.quantize",
}
_HIGHER_ORDER = frozenset(
    [
        "cond",
        "while_loop",
        "scan",
        "associative_scan",
        "map_impl",
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
        "invoke_subgraph",
        "wrap",
        "tag_activation_checkpoint",
        "strict_mode",
        "out_dtype",
        "flex_attention",
        "hints_wrapper",
        "auto_functionalized",
        "auto_functionalized_v2",
    ]
)
_FILES = frozenset(["from_file", "save"])  # the operators of aten that open files
_PYTHON_OPERATORS = frozenset(
    [
        "_operator.eq",
        "_operator.ne",
        "_operator.le",
        "_operator.ge",
        "_operator.lt",
        "_operator.gt",
        "_operator.neg",
        "_operator.pos",
        "_operator.mul",
        "_operator.add",
        "_operator.sub",
        "_operator.floordiv",
        "_operator.mod",
        "_operator.pow",
        "_operator.truediv",
        "_operator.and_",
        "_operator.or_",
        "_operator.lshift",
        "_operator.rshift",
        "_operator.getitem",
        "_operator.not_",
        "math.trunc",
        "math.floor",
        "math.ceil",
        "math.sqrt",
        "torch.sym_not",
        "torch.sym_int",
        "torch.sym_float",
        "torch.sym_ite",
        "torch.sym_max",
        "torch.sym_min",
        "torch.sym_sqrt",
        "torch._sym_sqrt",
        "torch.sym_sum",
    ]
)
_SOURCE = re.compile(r"[^\"'\\\x00-\x1f\x7f\x85\u2028\u2029]*")
_TRANSFORMERS = re.compile(r"transformers\.(modeling_outputs|cache_utils|models\.\w+\.modeling_\w+)")


class _Refused(Exception):
    """A part of the file is not data; the text says which."""


def open_program(data: bytes, name: str, *, trust: bool = False) -> ExportedProgram:
    """The exported program in `data`, the bytes of a .pt2 file; `name` is the file's name for messages.

    `trust` (the user's consent to run what is in the file) skips all checks but those of archive and checksums.
    Raises FileError for a damaged or refused file, and for one that torch cannot load.
    """
    found = archive.members(io.BytesIO(data), memoryview(data), name)
    if _LEGACY not in found:
        found = _same_as_torch_sees(data, found, name)
    if not trust:
        try:
            modules = _check(found)
        except (_Refused, RecursionError, MemoryError) as reason:
            raise FileError(
                f"{name} is refused: {reason or 'its description is nested too deep'}. Nothing in it was run. "
                f"If you trust whoever made it, add --trust-pickle."
            ) from None
        for module in sorted(modules):
            _import(module, name)
    with _torch_log() as log:
        try:
            return torch.export.load(io.BytesIO(data))
        except Exception as error:  # torch raises nearly everything here; the file is what is wrong
            cause = log.cause or error
            raise FileError(
                f"{name} cannot be loaded by torch {torch.__version__}: {_line(cause)}"
            ) from error


def _same_as_torch_sees(data: bytes, found: dict[str, memoryview], name: str) -> dict[str, memoryview]:
    """Members by their names below the root folder, after torch's own zip reader found the same ones."""
    _, inner = archive.root(found, name)
    if "archive_format" not in inner:
        raise FileError(f"{name} is not an exported program; it holds {', '.join(sorted(inner)[:3])}.")
    damaged = FileError(f"{name} is damaged: its directory and its members disagree.")
    try:
        reader = PT2ArchiveReader(io.BytesIO(data))
        if sorted(reader.get_file_names()) != sorted(inner):
            raise damaged
        offsets = {key: reader.archive_file.get_record_offset(key) for key in inner}
    except (RuntimeError, AssertionError, UnicodeDecodeError):
        raise damaged from None
    start = memoryview(data)
    for key, view in inner.items():
        if start[offsets[key] : offsets[key] + len(view)] != view:
            raise damaged
    return inner


def _check(found: Mapping[str, memoryview]) -> set[str]:
    """Check every member that torch reads; answer the modules whose pytree types it needs. Raises _Refused."""
    modules: set[str] = set()
    for key, view in found.items():
        if key.startswith("data/aotinductor/"):
            raise _Refused("it holds a compiled library (AOTInductor)")
        if key.startswith(("data/weights/", "data/constants/")) and key.endswith(".json"):
            _check_payloads(found, key, _json(view, key))
        elif key.startswith("models/") or key == _LEGACY:
            _walk(_json(view, key), "", modules)
        elif key.startswith("data/sample_inputs/") or key.endswith(".pt") or key.startswith(_LEGACY_PICKLES):
            _check_pickle(view, key)
    return modules


def _json(view: memoryview, key: str) -> Any:
    try:
        return json.loads(bytes(view))
    except (ValueError, UnicodeDecodeError):
        raise _Refused(f"its member {key!r} is not JSON") from None


def _check_pickle(view: memoryview, key: str) -> None:
    if not len(view):
        return
    try:
        torch.load(io.BytesIO(view), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever the pickle makes torch's restricted reader say
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
        what = f"calls {names[0]}" if names else "is more than tensors and plain data"
        kind = pickle.UnpicklingError.__name__ if isinstance(error, pickle.UnpicklingError) else _line(error)
        raise _Refused(
            f"the pickle {key!r} in it {what} ({kind})" if not names else f"the pickle {key!r} {what}"
        ) from None


def _check_payloads(found: Mapping[str, memoryview], key: str, config: Any) -> None:
    folder = key.rsplit("/", 1)[0]
    _walk(config, "", set())
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise _Refused(f"its member {key!r} is not a table of tensors")
    for fqn, entry in entries.items():
        path = entry.get("path_name") if isinstance(entry, dict) else None
        if not isinstance(path, str) or f"{folder}/{path}" not in found:
            raise _Refused(f"the tensor {fqn!r} is not in it")
        if entry.get("use_pickle"):
            raise _Refused(f"the tensor {fqn!r} is stored as a pickle, which can run code")
        if not path.startswith(("weight_", "tensor_")):
            raise _Refused(f"{fqn!r} is an object, not a tensor")
        sizes = [item.get("as_int") for item in entry["tensor_meta"]["sizes"]]
        elements = 1
        for size in sizes:
            elements *= size if isinstance(size, int) and size >= 0 else _MAX_ELEMENTS
        if elements >= _MAX_ELEMENTS or (elements and not len(found[f"{folder}/{path}"])):
            raise _Refused(f"the tensor {fqn!r} is larger than what is stored of it")


def _walk(value: Any, key: str, modules: set[str]) -> None:
    """Check every string of a JSON tree by the name of the field that it stands in."""
    if isinstance(value, dict):
        if key == "metadata":
            return  # stack traces and provenance: kept as text, never compiled
        for inner, item in value.items():
            _plain(inner)
            if inner in ("as_custom_obj", "custom_obj") or (inner == "custom_obj_values" and item):
                raise _Refused("it holds a custom object, not only tensors")
            _walk(item, inner, modules)
    elif isinstance(value, list):
        for item in value:
            _walk(item, key, modules)
    elif isinstance(value, str):
        if key in ("in_spec", "out_spec"):
            _check_spec(value, modules)
        else:
            _RULES.get(key, _plain)(value)


def _plain(text: str) -> None:
    if not _SOURCE.fullmatch(text):
        raise _Refused(f"{text[:60]!r} is no name of a parameter or field")


def _identifier(text: str) -> None:
    if text and not text.isidentifier():
        raise _Refused(f"{text[:60]!r} is no name")


def _free(text: str) -> None:
    """Text that torch keeps as text."""


def check_operator(target: str) -> None:
    """Refuse an operator outside torch.ops, operator and math, or one that opens files or runs foreign code."""
    if target in _PYTHON_OPERATORS:
        return
    parts = target.split(".")
    namespace, operator = parts[2:4] if parts[:2] == ["torch", "ops"] and len(parts) in (4, 5) else ("", "")
    allowed = operator in _HIGHER_ORDER if namespace == "higher_order" else namespace in _NAMESPACES
    if not allowed or operator in _FILES:
        raise _Refused(f"it calls {target[:60]!r}, which is no operator of torch, operator or math")
    if not _exists(parts[2:]) and namespace in _NAMESPACES:
        try:
            importlib.import_module(_NAMESPACES[namespace])
        except (
            ImportError,
            RuntimeError,
        ) as error:  # torchvision without its compiled part raises the latter
            raise _Refused(
                f"it calls {target!r}, and {_NAMESPACES[namespace]} does not import ({_line(error)})"
            ) from None
    if not _exists(parts[2:]):
        raise _Refused(f"it calls {target[:60]!r}, which torch {torch.__version__} does not have")


def _exists(parts: list[str]) -> bool:
    found: Any = torch.ops
    for part in parts:
        found = getattr(found, part, None)
    return isinstance(found, (OpOverload, HigherOrderOperator))


def check_expression(text: str) -> None:
    """Refuse a symbolic expression that is more than arithmetic on sizes."""
    tree = _parse(text, _EXPRESSION_NODES)
    named: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            _check_call(node, named, text)
        elif (
            isinstance(node, ast.Name)
            and node.id not in _CONSTANTS | _FUNCTIONS
            and not _SYMBOL.fullmatch(node.id)
        ):
            raise _Refused(f"the expression {text[:60]!r} uses the name {node.id!r}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in named:
            raise _Refused(f"the expression {text[:60]!r} holds text")
    _degree(tree, text)


def _check_call(node: ast.Call, named: set[int], text: str) -> None:
    if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
        raise _Refused(f"the expression {text[:60]!r} calls {ast.unparse(node.func)[:30]!r}")
    if any(not isinstance(keyword.value, ast.Constant) or keyword.arg is None for keyword in node.keywords):
        raise _Refused(f"the expression {text[:60]!r} is not arithmetic")
    pattern = {"Symbol": _SYMBOL, "Float": _NUMBER}.get(node.func.id)
    first = node.args[0] if node.args else None
    if (
        pattern
        and isinstance(first, ast.Constant)
        and isinstance(first.value, str)
        and pattern.fullmatch(first.value)
    ):
        named.add(id(first))


def check_guard(text: str) -> None:
    """Refuse a guard (torch compiles them as Python) that is more than a comparison of input sizes."""
    tree = _parse(text, _GUARD_NODES)
    refused = _Refused(f"the guard {text[:60]!r} is more than a comparison of sizes")
    texts = {id(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            method = isinstance(function, ast.Attribute) and function.attr in _GUARD_METHODS | _GUARD_MATH
            if node.keywords or not (
                method or (isinstance(function, ast.Name) and function.id in _GUARD_FUNCTIONS)
            ):
                raise refused
        elif (isinstance(node, ast.Attribute) and node.attr.startswith("_")) or (
            isinstance(node, ast.Name) and node.id not in _GUARD_FUNCTIONS | {"L", "math", "inf"}
        ):
            raise refused
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in texts or not _SOURCE.fullmatch(node.value):
                raise refused
    _degree(tree, text)


def _parse(text: str, allowed: tuple[type[ast.AST], ...]) -> ast.Expression:
    if len(text) > _MAX_TEXT:
        raise _Refused(f"the expression {text[:60]!r}... is {len(text)} characters long")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _Refused(f"{text[:60]!r} is no expression") from None
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            raise _Refused(f"the expression {text[:60]!r} is not arithmetic ({type(node).__name__})")
        if isinstance(node, ast.Constant):
            if not isinstance(node.value, (int, float, str, bool)):
                raise _Refused(f"the expression {text[:60]!r} is not arithmetic")
            if isinstance(node.value, int) and node.value.bit_length() > _MAX_BITS:
                raise _Refused(
                    f"the expression {text[:60]!r} holds a number of {node.value.bit_length()} bits"
                )
    return tree


def _degree(node: ast.AST, text: str) -> int:
    """Exponents multiplied along the steepest path; an exponent is a small number or one symbol."""
    below = max((_degree(child, text) for child in ast.iter_child_nodes(node)), default=1)
    exponent: ast.AST | None = None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        exponent = node.right
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _POWERS:
        exponent = node.args[1] if len(node.args) == 2 else node
    if exponent is None:
        return below
    numbers = [child.value for child in ast.walk(exponent) if isinstance(child, ast.Constant)]
    sizes = [abs(number) for number in numbers if isinstance(number, (int, float))]
    below *= max(1, int(max(sizes, default=1)))
    inner = {
        child.func.id
        for child in ast.walk(exponent)
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name)
    }
    if below > _MAX_DEGREE or inner - {"Integer", "Symbol", "Rational", "Float"}:
        raise _Refused(f"the expression {text[:60]!r} holds too high a power")
    return below


def _check_spec(text: str, modules: set[str]) -> None:
    """Check a pytree spec (JSON within JSON): keys become argument names, and contexts may name modules."""
    try:
        value = json.loads(text)
    except ValueError:
        raise _Refused(f"the pytree {text[:60]!r} is not JSON") from None
    _walk_spec(value, modules)


def _walk_spec(value: Any, modules: set[str]) -> None:
    if isinstance(value, list):
        for item in value:
            _walk_spec(item, modules)
    elif isinstance(value, dict):
        if "__enum__" in value or value.get("default_factory_module", "builtins") not in ("builtins", None):
            raise _Refused("a pytree in it would import a module")
        kind = value.get("type")
        if isinstance(kind, str) and _TRANSFORMERS.fullmatch(kind.rpartition(".")[0]):
            modules.add(kind.rpartition(".")[0])
        for key, item in value.items():
            _plain(key)
            _walk_spec(item, modules)
    elif isinstance(value, str):
        if value.startswith(("[", "{", '"')):
            _check_spec(value, modules)
        else:
            _plain(value)


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


def _import(module: str, name: str) -> None:
    """Import the transformers module that registers the pytree types of this file."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise FileError(
            f"{name} returns or takes types of {module}, which cannot be imported here ({_line(error)}): "
            f"install transformers."
        ) from None


class _Recorder(logging.Handler):
    """Keeps the exception that torch.export.load only logs before it raises a general one."""

    cause: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.cause = record.exc_info[1]


@contextmanager
def _torch_log() -> Iterator[_Recorder]:
    logger = logging.getLogger("torch.export")
    recorder, propagate = _Recorder(), logger.propagate
    logger.addHandler(recorder)
    logger.propagate = False
    try:
        yield recorder
    finally:
        logger.removeHandler(recorder)
        logger.propagate = propagate


def _line(error: BaseException) -> str:
    """The last line that says something: torch puts whole tracebacks into its messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
