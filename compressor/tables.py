"""Tables of embeddings as 8-bit integers, a scale for every row; what is looked up is float again at once.

A lookup reads a few rows of a table that may well be half of a model: this saves bytes, and no time.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Node

from .ir import Graph
from .names import operator_name, site
from .ops import is_constant
from .pipeline import Outcome, Rewrite
from .place import under
from .quantize import redirect

LEAST = 1 << 16  # numbers in a table from which on it is worth it
aten = torch.ops.aten


def is_lookup(node: Node) -> bool:
    """Whether a node looks up rows of a constant table."""
    return operator_name(node) == "aten.embedding.default" and is_constant(node.args[0])


def has_tables(graph: Graph, ignore: Collection[str]) -> bool:
    """Whether `store_tables` would store any."""
    return any(
        _is_worth(graph, node) and not any(under(node, pattern) for pattern in ignore) for node in graph.nodes
    )


def store_tables(graph: Graph, outcome: Outcome, ignore: Collection[str], limit: int | None) -> None:
    """Stores large tables that nothing else reads as integers, and enters each lookup into the outcome.

    ignore: patterns of sites that stay float. limit: rewrites that the outcome may come to.
    """
    stored: dict[Node, tuple[Node, Node]] = {}
    for node in graph.nodes:
        full = limit is not None and len(outcome.rewrites) >= limit
        if not _is_worth(graph, node) or any(under(node, pattern) for pattern in ignore) or full:
            continue
        table, places, *rest = node.args
        if table not in stored:
            stored[table] = _by_row(graph, table)  # type: ignore[index, arg-type]
        rows, scales = (
            graph.insert(aten.embedding.default, (part, places, *rest), before=node)
            for part in stored[table]  # type: ignore[index]
        )
        floats = graph.insert(aten.to.dtype, (rows, torch.float32), before=node)
        made = graph.insert(aten.mul.Tensor, (floats, scales), before=node)
        outcome.rewrites.append(Rewrite(site(node), "table stored as integers, a scale for each row"))
        for user in list(node.users):
            redirect(graph, user, node, made)
        graph.erase(node)


def _is_worth(graph: Graph, node: Node) -> bool:
    if not is_lookup(node):
        return False
    source: Node = node.args[0]  # type: ignore[assignment]
    if not all(is_lookup(user) and user.args[0] is source for user in source.users):
        return False
    table = graph.tensor(source)
    large = table.dtype == torch.float32 and table.numel() >= LEAST
    return large and bool(torch.isfinite(table).all())


def _by_row(graph: Graph, source: Node) -> tuple[Node, Node]:
    """Integers [rows, columns] and scales [rows, 1] of a table."""
    table, name = graph.tensor(source).detach(), str(source.target)
    scales = table.abs().amax(1, keepdim=True) / 127
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    integers = (table / scales).round().clamp(-127, 127).to(torch.int8)
    return graph.add_tensor(f"{name}_int8", integers), graph.add_tensor(f"{name}_scale", scales)
