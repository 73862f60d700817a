"""What nodes, sizes and values are called: in reports, in errors, and in the text of a graph."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from .errors import UnsupportedError

DTYPE_NAMES = {
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}


def operator_name(node: Node) -> str:
    """`aten.conv2d.default`, `operator.getitem`, or the target of a node that calls nothing."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target is operator.getitem:
        return "getitem"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def short_name(node: Node) -> str:
    """`conv2d` for `aten.conv2d.default`: what an operator is called in reports."""
    name = operator_name(node)
    return name.split(".")[-2] if name.count(".") > 1 else name


def site(node: Node) -> str:
    """Where a node stands in the user's model: `layer3.2.conv1`; the name of the tensor for a parameter."""
    if node.op == "get_attr":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(p) for p, _ in reversed(list(stack.values())) if p), "")
    return module_path(path) or node.name


def module_path(path: str) -> str:
    """`layers.0` of the exporter's `layers.slice(None, 2, None).0`: part of a list of modules is no module."""
    return re.sub(r"\.slice\([^)]*\)", "", path)


def source_line(node: Node) -> str:
    """The innermost line of the user's code behind a node: `model.py:33`, or an empty string."""
    trace = [
        line.strip()
        for line in node.meta.get("stack_trace", "").splitlines()
        if line.strip().startswith("File ")
    ]
    own = [line for line in trace if "site-packages/torch/" not in line] or trace
    if not own:
        return ""
    path, _, rest = own[-1].removeprefix('File "').partition('", line ')
    return f"{path.rsplit('/', 1)[-1]}:{rest.split(',')[0]}"


def describe(value: Any, symbols: Mapping[str, str] | None = None) -> str:
    """`f32[batch, 16, 32, 32]` of a tensor, `int` of a size, a tuple of these of several."""
    if isinstance(value, Tensor):
        sizes = ", ".join(_rename(str(s), symbols or {}) for s in value.shape)
        return f"{DTYPE_NAMES.get(value.dtype, str(value.dtype))}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(v, symbols) for v in value)})"
    return type(value).__name__.removeprefix("Sym").lower()


def size_of(size: Any, axes: Mapping[str, str | int]) -> int | str:
    """A size in the words of `Graph.axis_names`: `4*batch`, or a number where axes are fixed to some."""
    if isinstance(size, int) or str(size) in axes:
        return size if isinstance(size, int) else axes[str(size)]
    expr = size.node.expr
    known = {s: axes[str(s)] for s in expr.free_symbols if str(s) in axes}
    made = expr.subs({s: sympy.Symbol(one) if isinstance(one, str) else one for s, one in known.items()})
    return int(made) if made.is_Integer else str(made)


def unsupported(node: Node, why: str) -> UnsupportedError:
    """An UnsupportedError that names operator, module and source line."""
    line = source_line(node)
    return UnsupportedError(f"{operator_name(node)} at {site(node)}{f' ({line})' if line else ''}: {why}")


def _rename(text: str, symbols: Mapping[str, str]) -> str:
    for symbol, name in symbols.items():
        text = text.replace(symbol, name)
    return text
