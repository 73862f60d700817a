"""Common subexpressions: what is computed twice from the same operands is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from .constants import is_pure
from .ir import Graph


def share_equal(
    graph: Graph, which: Callable[[Node], bool] = lambda node: True, limit: int | None = None
) -> list[Node]:
    """Replaces operators by an earlier one that has the same operands; returns those that went.

    which: the operators to look at. limit: at most so many go. Random operators and those of other libraries are
    never shared.
    """
    seen: dict[tuple[Any, ...], Node] = {}
    gone: list[Node] = []
    for node in graph.nodes:
        if limit is not None and len(gone) >= limit:
            break
        if node.op != "call_function" or not is_pure(node) or not which(node):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            graph.replace_uses(node, first)
            graph.erase(node)
            gone.append(node)
    return gone


def _key(value: Any) -> Any:
    """Arguments as something that can be compared: types count, since 1 == 1.0 == True."""
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((name, _key(v)) for name, v in sorted(value.items()))
    return (type(value).__name__, str(value)) if not isinstance(value, Node) else value
