"""Constants that are merely repeated along a dynamic axis: computed once, for one sample, and repeated afterwards.

    f(expand(w, [batch, ...])) = expand(f(w), [batch, ...])      when f looks at no other sample

A prompt encoder is one: it reads nothing of the input but the batch's size, and would run for every sample of it.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from .constants import DataFree, ancestors, shape_only
from .ir import Graph
from .names import site
from .ops import extents, is_tensor, kind

_FREE = frozenset(
    {"get_attr", "create", "create_like", "expand", "view", "flatten", "unflatten", "permute", "transpose",
     "unsqueeze", "squeeze", "size", "identity", "cast"}
)  # fmt: skip


def fold_uniform(graph: Graph, max_bytes: int, limit: int | None = None) -> list[tuple[str, str]]:
    """Replaces every largest such value by a constant that is repeated; (site, what) of each.

    max_bytes: how large the constant may be. limit: at most so many.
    """
    free = DataFree(graph)
    uniform = {node for node in graph.nodes if _is_uniform(node, free)}
    made: list[tuple[str, str]] = []
    ours: set[Node] = set()  # what stands in the place of values before this one
    for node in graph.nodes:
        if limit is not None and len(made) >= limit:
            break
        if node not in uniform or all(user in uniform for user in node.users):
            continue
        sizes = extents(node.meta["val"])
        under = ancestors(node, lambda n: kind(n) == "size" or (n not in free and n not in ours))
        count = sum(kind(n) not in _FREE for n in under)
        if count == 0 or not _is_told_a_size(under):
            continue
        if math.prod(map(_one, sizes)) * node.meta["val"].dtype.itemsize > max_bytes:
            continue
        constant = graph.add_tensor(f"{site(node)}.{node.name}", _of_one_sample(graph, under))
        ours.add(constant)
        what = f"{count} operator{'s' * (count > 1)} on a repeated constant into one tensor"
        if any(isinstance(s, sympy.Symbol) for s in sizes):
            repeats = [_size(graph, s) if isinstance(s, sympy.Symbol) else -1 for s in sizes]
            constant = graph.insert(torch.ops.aten.expand.default, (constant, repeats), before=node)
            ours.add(constant)
        graph.replace_uses(node, constant)
        made.append((site(node), what))
    if made:
        graph.clean()
    return made


def _is_told_a_size(nodes: list[Node]) -> bool:
    """True where something outside, which can be a dynamic size only, has a part in these constants."""
    inside = set(nodes)
    return any(n not in inside for node in nodes for n in node.all_input_nodes)


def _is_uniform(node: Node, free: DataFree) -> bool:
    """True for a tensor of constants that is the same all along its dynamic axes, if any, each of one symbol."""
    if node.op != "call_function" or node not in free or not is_tensor(node):
        return False
    dynamic = {i: s for i, s in enumerate(extents(node.meta["val"])) if not isinstance(s, int)}
    plain = all(isinstance(s, sympy.Symbol) for s in dynamic.values())
    return plain and not any(free.varies(node, axis) for axis in dynamic)


def _of_one_sample(graph: Graph, nodes: list[Node]) -> Tensor:
    """The value of the last node where every dynamic size is 1."""
    env: dict[Node, Any] = {}
    inside = set(nodes)
    with torch.no_grad():
        for node in nodes:
            others = [n for n in node.all_input_nodes if n not in inside]
            assert all(shape_only(node, n) for n in others), f"{node} reads data of {others}"
            outside = {n: _shape_of_one(n) for n in others}
            env[node] = graph.execute(node, {**env, **outside})
    value: Tensor = env[nodes[-1]]
    return value.clone() if 0 in value.stride() else value


def _shape_of_one(node: Node) -> Any:
    """A dynamic size as a number; of a tensor whose shape alone is asked for, one of that shape."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        sizes = [_one(s) for s in extents(value)]
        return torch.empty((), dtype=value.dtype).expand(sizes)
    return _one(value.node.expr) if hasattr(value, "node") else value


def _one(size: Any) -> int:
    return size if isinstance(size, int) else int(size.subs({symbol: 1 for symbol in size.free_symbols}))


def _size(graph: Graph, symbol: sympy.Symbol) -> Node:
    """A node that gives a dynamic size, behind the input that has it."""
    for placeholder in graph.placeholders:
        for axis, size in enumerate(extents(placeholder.meta["val"])):
            if size == symbol:
                first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
                return graph.insert(torch.ops.aten.sym_size.int, (placeholder, axis), before=first)
    raise LookupError(f"no input has the size {symbol}")
