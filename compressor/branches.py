"""Branches: addends that nothing else reads, so that they can go as a whole; residual blocks above all.

Taking one out leaves the other addend in the place of the sum. That computes what the model computes with the branch
times zero, which is how the reference is built here: no code of `bypass` is called for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from torch.fx import Node

from .constants import DataFree
from .data import Batch
from .elimination import ridged, trust
from .identities import alike, loosen_views
from .ir import Graph
from .names import site
from .ops import is_tensor, kind, node_macs, shape
from .padding import Padding
from .readers import channel_axis
from .statistics import Gram

aten = torch.ops.aten


@dataclass(frozen=True)
class Branch:
    """total: name of the sum. position: of the addend that can go, 0 or 1. site: module path of what computes it.

    sites: of its operators that multiply. macs: what they cost, for one sample.
    """

    total: str
    position: int
    site: str
    sites: tuple[str, ...]
    macs: int


def branches(graph: Graph) -> Iterator[Branch]:
    """Every addend with multiplications of its own, whose sum is as large as both and stays one of the inputs."""
    free = DataFree(graph)
    for total in graph.nodes:
        if kind(total) != "add" or total.kwargs or len(total.args) != 2:  # alpha would stay with the other
            continue
        addends = [n for n in total.args if isinstance(n, Node) and is_tensor(n) and alike(n, total)]
        if len(addends) != 2:
            continue
        for position, gone in enumerate(addends):
            kept = addends[1 - position]
            if gone is kept or kept in free or (total in graph.results and kept.op != "call_function"):
                continue
            dead = [n for n in _alone(gone, total) if node_macs(n)]
            if dead:
                sites = tuple(dict.fromkeys(map(site, reversed(dead))))
                yield Branch(total.name, position, _shared(sites), sites, sum(map(node_macs, dead)))


def bypass(graph: Graph, branch: Branch) -> None:
    """Takes a branch out; what nothing reads any more goes with it."""
    total = graph.node(branch.total)
    kept: Node = total.args[1 - branch.position]  # type: ignore[assignment]
    graph.supplant(total, kept)
    if str(kept.meta["val"].stride()) != str(total.meta["val"].stride()):
        loosen_views(graph, {kept})
    graph.clean()


def imitate(graph: Graph, branch: Branch, batches: Iterable[Batch]) -> None:
    """Puts in the place of a branch the affine map of the other addend that comes nearest to it, on these batches.

    About so much can the layers behind make up for, which read that addend, too. Too few rows tell of means alone.
    """
    total = graph.node(branch.total)
    gone, kept = total.args[branch.position], total.args[1 - branch.position]
    assert isinstance(gone, Node) and isinstance(kept, Node)
    sizes, dtype = shape(total), total.meta["val"].dtype
    axis = channel_axis(gone) if sizes else 0
    width = sizes[axis] if sizes else None
    if not (isinstance(width, int) and dtype.is_floating_point):
        return bypass(graph, branch)
    gram, padding = Gram(width, width), Padding(graph)
    for batch in batches:
        real, seen = padding.of(batch.inputs), dict[Node, Tensor]()
        for node, value in graph.values(*batch.inputs):
            if node is total:
                break
            if node in (gone, kept):
                seen[node] = real.rows(total, value, axis)
        gram.update(seen[kept], seen[gone])
    count, belief = max(gram.count, 1), trust(gram.count, width)
    mean, aim = gram.total / count, gram.target_total / count
    weight = torch.zeros_like(gram.xx)
    if belief:
        spread = gram.xx / count - torch.outer(mean, mean)
        weight = belief * torch.linalg.solve(ridged(spread), gram.xy / count - torch.outer(mean, aim)).T
    given = [
        graph.add_tensor(f"{branch.total}_{name}", tensor.to(dtype), before=total)
        for name, tensor in (("slope", weight), ("shift", aim - weight @ mean))
    ]
    turned = graph.insert(aten.transpose.int, (kept, axis, -1), before=total)
    mapped = graph.insert(aten.linear.default, (turned, *given), before=total)
    _give(graph, branch, graph.insert(aten.transpose.int, (mapped, axis, -1), before=total))
    graph.clean()


def masked(graph: Graph, gone: Iterable[Branch]) -> Graph:
    """A copy of the graph that the branches were found in, or in what was left of it, with them times zero."""
    twin = graph.copy()
    for branch in gone:
        total = twin.node(branch.total)
        _give(twin, branch, twin.insert(aten.mul.Tensor, (total.args[branch.position], 0.0), before=total))
    return twin


def _give(graph: Graph, branch: Branch, addend: Node) -> None:
    """Lets the sum of a branch read this in its place."""
    total = graph.node(branch.total)
    args = list(total.args)
    args[branch.position] = addend
    graph.set_args(total, tuple(args))


def _alone(value: Node, reader: Node) -> list[Node]:
    """A value that this reader alone reads, and all that is computed for it alone; the last first."""
    if set(value.users) != {reader}:
        return []
    found: dict[Node, None] = {}
    todo = [value]
    while todo:
        node = todo.pop()
        if node.op == "call_function" and (node is value or found.keys() >= node.users.keys()):
            found[node] = None
            todo += [n for n in node.all_input_nodes if n not in found]
    return list(found)


def _shared(sites: tuple[str, ...]) -> str:
    """The module that holds them all, or else the last of them."""
    if len(sites) == 1:
        return sites[0]
    parts = zip(*(one.split(".") for one in sites), strict=False)
    return ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts)) or sites[-1]
