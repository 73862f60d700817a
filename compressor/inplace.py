"""In-place operators: renamed to their pure forms where that is exact.

`relu_(x)` is `relu(x)` with later readers of x reading the result, as long as nothing else shares x's memory. A graph
where something does is functionalised by the exporter instead, which costs seconds and takes operators apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from .ops import kind


def restore_batch_norm(graph: fx.Graph) -> None:
    """Inference batch norm came apart when the graph was functionalised; passes know it by its usual name."""
    pieces = torch.ops.aten._native_batch_norm_legit_no_training.default
    for node in list(graph.nodes):
        if node.target is not pieces or any(user.args[1] != 0 for user in node.users):
            continue
        x, weight, bias, mean, variance, momentum, eps = node.args
        for user in list(node.users):
            user.target = torch.ops.aten.batch_norm.default
            user.args = (x, weight, bias, mean, variance, False, momentum, eps, False)
            user.meta = {**node.meta, **user.meta}
        graph.erase_node(node)


_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)


def in_place(node: Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def rename_in_place(graph: fx.Graph) -> bool:
    """True when every in-place operator could be renamed exactly; otherwise none that writes is."""
    for node in graph.nodes:  # dropout in evaluation writes nothing, so it is pure even on a view
        if node.target is torch.ops.aten.dropout_.default and node.args[2] is False:
            node.target = torch.ops.aten.dropout.default
        if node.target is torch.ops.aten.detach_.default:  # writes nothing either
            node.target = torch.ops.aten.detach.default
        if node.target in _NORMS and node.args[5]:  # writes running statistics, and says so nowhere
            node.args = (*node.args[:3], None, None, *node.args[5:])
    mutations = [n for n in graph.nodes if in_place(n)]
    order = {n: i for i, n in enumerate(graph.nodes)}
    plans = []
    for node in mutations:
        pure = _pure(node)
        written = node.args[0] if node.args else None
        if pure is None or not isinstance(written, Node) or _is_seen_elsewhere(written, node, order):
            return False
        if not _keeps_type(node, pure):
            return False
        plans.append((node, pure))
    for node, pure in plans:
        written = node.args[0]  # an earlier plan may have re-pointed it
        node.target = pure
        for reader in [user for user in written.users if order[user] > order[node]]:
            reader.replace_input_with(written, node)
    return True


def _pure(node: Node) -> Any:
    """aten.relu_.default -> aten.relu.default, when the schemas agree."""
    namespace, name, overload = str(node.target).split(".")
    packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None) if name.endswith("_") else None
    pure = getattr(packet, overload, None) if packet is not None else None
    if pure is None or pure._schema.is_mutable:
        return None
    formals, own = (
        [(str(a.type), a.default_value) for a in t._schema.arguments]
        for t in (pure, node.target)  # type: ignore[union-attr]
    )
    return pure if formals == own else None


def _keeps_type(node: Node, pure: Any) -> bool:
    """False where the pure form gives another type than that of what is written: wider operands, comparisons."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    written: Any = args[0]
    with written.fake_mode, torch.no_grad():
        made: Any = pure(*args, **kwargs)
    return isinstance(made, Tensor) and made.dtype == written.dtype


def _is_seen_elsewhere(written: Node, mutation: Node, order: dict[Node, int]) -> bool:
    """True when memory of the caller is written, or what is written may be read later under another name."""
    root = written
    while _may_view(root) or in_place(root):
        root = root.all_input_nodes[0]
    if root.op == "get_attr" or (root.op == "placeholder" and root is not written):
        return True
    family, stack = {root}, [root]
    while stack:
        for user in stack.pop().users:
            alias = _may_view(user) or (in_place(user) and user.args[0] in family)
            if alias and user is not mutation and user not in family:
                family.add(user)
                stack.append(user)
    return any(order[user] > order[mutation] for one in family - {written} for user in one.users)


def _may_view(node: Node) -> bool:
    if node.op != "call_function" or in_place(node):
        return False
    if kind(node) in ("identity", "cast", "getitem"):
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and any(r.alias_info is not None for r in schema.returns))
