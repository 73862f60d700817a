"""Whitelists for what an exported program says in text: symbolic sizes, guards, operators.

torch evaluates the first two (`sympify`, `exec`) and takes any attribute of `torch` for an operator. Here
expressions and guards are parsed with `ast`, and pass only as arithmetic on sizes and comparisons of input
shapes; operators come from known libraries, without those that open files or call back into code.
"""

from __future__ import annotations

import ast
import importlib
import re
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

_MAX_TEXT = 20_000  # characters of one expression
_MAX_BITS = 256  # of one integer in an expression
_MAX_DEGREE = 4096  # exponents multiplied along one path: more would keep sympy busy for ever

SOURCE = re.compile(
    r"[^\"'\\\x00-\x1f\x7f\x85\u2028\u2029]*"
)  # cannot leave a quoted string of generated code
_SYMBOL = re.compile(r"[a-z]+_?\d+|_[a-z]+\d+")
_NUMBER = re.compile(r"-?[\d.]+(e[+-]?\d+)?")
_FUNCTIONS = frozenset([
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "floor",
    "ceiling", "FloorDiv", "PythonMod", "ModularIndexing", "CleanDiv", "CeilDiv", "CeilToInt",
    "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt", "RoundDecimal", "ToFloat", "IntTrueDiv",
    "FloatTrueDiv", "FloatPow", "PowByNatural", "LShift", "RShift", "Where", "Identity",
    "IsNonOverlappingAndDenseIndicator", "Equality", "Unequality", "StrictLessThan", "LessThan",
    "StrictGreaterThan", "GreaterThan", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not",
    "Piecewise", "ExprCondPair", "Tuple",
])  # fmt: skip
_POWERS = frozenset(["Pow", "PowByNatural", "FloatPow", "LShift", "RShift"])
_NUMBERS = frozenset(["Integer", "Rational", "Float", "Symbol"])
_CONSTANTS = frozenset(["true", "false", "oo", "int_oo"])
_EXPRESSION_NODES = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Tuple, ast.UnaryOp, ast.USub,
    ast.UAdd, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.Compare, ast.Eq,
    ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_GUARD_NODES = (
    *_EXPRESSION_NODES, ast.BoolOp, ast.And, ast.Or, ast.Not, ast.Div, ast.Subscript, ast.Attribute, ast.Is,
    ast.IsNot,
)  # fmt: skip
_GUARD_NAMES = (_FUNCTIONS - {"Symbol", "Float"}) | {"max", "min", "abs", "int", "float", "bool"}
_GUARD_METHODS = frozenset([
    "size", "stride", "storage_offset", "dim", "numel", "element_size", "floor", "ceil", "trunc",
    "sqrt", "isnan", "isinf",
])  # fmt: skip
# namespace of operators -> the library that registers it
_NAMESPACES = {
    "aten": "torch",
    "prims": "torch",
    "quantized_decomposed": "torch.ao.quantization.fx._decomposed",
    "torchvision": "torchvision",
    "transformers": "transformers.integrations.moe",
}
_HIGHER_ORDER = frozenset([
    "cond", "while_loop", "scan", "associative_scan", "map_impl", "wrap_with_set_grad_enabled",
    "wrap_with_autocast", "invoke_subgraph", "wrap", "tag_activation_checkpoint", "strict_mode",
    "out_dtype", "flex_attention", "hints_wrapper", "auto_functionalized", "auto_functionalized_v2",
])  # fmt: skip
_OPEN_FILES = frozenset(["from_file", "save"])
_PYTHON = frozenset([
    "eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod", "pow",
    "truediv", "and_", "or_", "lshift", "rshift", "getitem", "not_",
])  # fmt: skip
_SIZES = frozenset(["math.trunc", "math.floor", "math.ceil", "math.sqrt"])
_SYMBOLIC = re.compile(r"torch\._?sym_(not|int|float|ite|max|min|sqrt|sum)")


class Refused(Exception):
    """A part of the file is not data; the text says which."""


def check_operator(target: str) -> None:
    """Refuse an operator outside torch.ops, operator and math, or one that opens files or runs foreign code."""
    module, _, name = target.rpartition(".")
    if (module == "_operator" and name in _PYTHON) or target in _SIZES or _SYMBOLIC.fullmatch(target):
        return
    parts = target.split(".")
    namespace, operator = parts[2:4] if parts[:2] == ["torch", "ops"] and len(parts) in (4, 5) else ("", "")
    allowed = operator in _HIGHER_ORDER if namespace == "higher_order" else namespace in _NAMESPACES
    if not allowed or operator in _OPEN_FILES:
        raise Refused(f"it calls {target[:60]!r}, which is no operator of torch, operator or math")
    if not _exists(parts[2:]) and namespace in _NAMESPACES:
        library = _NAMESPACES[namespace]
        try:
            importlib.import_module(library)
        except (ImportError, RuntimeError):  # the latter: torchvision without its compiled part
            raise Refused(f"it calls {target!r}, and {library} does not import here") from None
    if not _exists(parts[2:]):
        raise Refused(f"it calls {target[:60]!r}, which torch {torch.__version__} does not have")


def _exists(parts: list[str]) -> bool:
    found: Any = torch.ops
    for part in parts:
        found = getattr(found, part, None)
    return isinstance(found, (OpOverload, HigherOrderOperator))


def check_expression(text: str) -> None:
    """Refuse a symbolic expression that is more than arithmetic on sizes."""
    tree = _parse(text, _EXPRESSION_NODES)
    names: set[int] = set()  # the constants that are a symbol's name or a float's digits
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if not isinstance(function, ast.Name) or function.id not in _FUNCTIONS:
                raise _refused(text)
            if any(item.arg is None or not isinstance(item.value, ast.Constant) for item in node.keywords):
                raise _refused(text)
            pattern = {"Symbol": _SYMBOL, "Float": _NUMBER}.get(function.id)
            for first in node.args[:1]:
                if pattern and isinstance(first, ast.Constant) and pattern.fullmatch(str(first.value)):
                    names.add(id(first))
        elif isinstance(node, ast.Name) and not (
            node.id in _CONSTANTS | _FUNCTIONS or _SYMBOL.fullmatch(node.id)
        ):
            raise _refused(text)
    if any(
        isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in names
        for node in ast.walk(tree)
    ):
        raise _refused(text)
    _degree(tree, text)


def check_guard(text: str) -> None:
    """Refuse a guard (torch compiles them as Python) that is more than a comparison of input shapes."""
    tree = _parse(text, _GUARD_NODES)
    keys = {id(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            method = isinstance(function, ast.Attribute) and function.attr in _GUARD_METHODS
            if node.keywords or not (
                method or (isinstance(function, ast.Name) and function.id in _GUARD_NAMES)
            ):
                raise _refused(text)
        elif isinstance(node, ast.Attribute):
            if node.attr.startswith("_"):
                raise _refused(text)
        elif isinstance(node, ast.Name):
            if node.id not in _GUARD_NAMES | {"L", "math", "inf"}:
                raise _refused(text)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            key = id(node) in keys and SOURCE.fullmatch(node.value)
            if not key:
                raise _refused(text)
    _degree(tree, text)


def _refused(text: str) -> Refused:
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return Refused(f"the expression {shown!r} in it is more than arithmetic on sizes")


def _parse(text: str, allowed: tuple[type[ast.AST], ...]) -> ast.Expression:
    if len(text) > _MAX_TEXT:
        raise _refused(text)
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _refused(text) from None
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            raise _refused(text)
        if isinstance(node, ast.Constant):
            number = node.value.bit_length() if isinstance(node.value, int) else 0
            if not isinstance(node.value, (int, float, str)) or number > _MAX_BITS:
                raise _refused(text)
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
    inside = list(ast.walk(exponent))
    called = {
        item.func.id for item in inside if isinstance(item, ast.Call) and isinstance(item.func, ast.Name)
    }
    sizes = [
        abs(item.value)
        for item in inside
        if isinstance(item, ast.Constant) and isinstance(item.value, (int, float))
    ]
    below *= max(1, int(max(sizes, default=1)))
    if below > _MAX_DEGREE or called - _NUMBERS or any(isinstance(item, ast.BinOp) for item in inside):
        raise _refused(text)
    return below
