"""Composite operators, written with the operators that every analysis knows: `tensordot` is an einsum."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch.fx import Node

from .ir import Graph
from .names import operator_name
from .ops import arguments

_PRODUCTS = frozenset(f"aten.{name}.default" for name in ("tensordot", "inner", "outer"))


def spell_out(graph: Graph) -> None:
    """Replaces composite operators by others that compute the same."""
    for node in graph.nodes:
        made = _spelled(node)
        if made is None:
            continue
        new = graph.insert(*made, before=node)
        graph.replace_uses(node, new)
        graph.erase(node)


def _spelled(node: Node) -> tuple[Any, tuple] | None:
    """The operator and arguments that say the same; None where the node is no composite."""
    aten, name = torch.ops.aten, operator_name(node)
    if name in _PRODUCTS:
        first, second = node.args[:2]
        equation = _equation(node, _rank(first), _rank(second))
        return aten.einsum.default, (equation, [first, second])
    if name == "aten.einsum.default" and "->" not in str(node.args[0]):
        return aten.einsum.default, (_with_output(str(node.args[0])), node.args[1])
    if name in ("aten.movedim.int", "aten.movedim.intlist"):
        source, destination = (
            [a] if isinstance(a, int) else list(a)  # type: ignore[arg-type, call-overload]
            for a in node.args[1:3]
        )
        return aten.permute.default, (node.args[0], _moved(_rank(node.args[0]), source, destination))
    if name == "aten.cat.default":
        parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        kept = [part for part in parts if _rank(part) == _rank(node)]  # torch skips an empty vector
        if 0 < len(kept) < len(parts):
            return aten.cat.default, (kept, *node.args[1:])
    if name.startswith("aten.squeeze."):
        return _squeezed(node)
    if name in ("aten.tensor_split.sections", "aten.tensor_split.indices"):
        axis = arguments(node)["dim"]
        sizes = [part.shape[axis] for part in node.meta["val"]]
        if all(isinstance(size, int) for size in sizes):
            return aten.split_with_sizes.default, (node.args[0], sizes, axis)
    return None


def _squeezed(node: Node) -> tuple[Any, tuple] | None:
    """A dynamic axis stays, also where it is 1 long, as it does in the file: rank does not depend on sizes."""
    source: Any = node.args[0]
    size, bound = source.meta["val"].shape, arguments(node)
    given = bound.get("dim", range(len(size)))
    dims = [d % len(size) for d in ([given] if isinstance(given, int) else given)] if size else []
    if all(isinstance(size[d], int) for d in dims):
        return None
    alone = [d for d in dims if isinstance(size[d], int) and size[d] == 1]
    aten = torch.ops.aten
    return (aten.squeeze.dims, (source, alone)) if alone else (aten.alias.default, (source,))


def _rank(node: Any) -> int:
    return int(node.meta["val"].dim())


def _moved(rank: int, source: list[int], destination: list[int]) -> list[int]:
    """The permutation that moves some axes to other places and keeps the order of the rest."""
    places = {d % rank: s % rank for s, d in zip(source, destination, strict=True)}
    rest = iter(i for i in range(rank) if i not in places.values())
    return [places[i] if i in places else next(rest) for i in range(rank)]


def _with_output(equation: str) -> str:
    """An equation that leaves its output out means: the ellipsis, then every label that stands once, in order."""
    labels = equation.replace(" ", "").replace("...", "").replace(",", "")
    once = sorted(label for label in set(labels) if labels.count(label) == 1)
    return f"{equation}->{'...' if '...' in equation else ''}{''.join(once)}"


def _equation(node: Node, first: int, second: int) -> str:
    """The einsum of a product of two tensors with so many axes."""
    a, b = list(string.ascii_letters[:first]), list(string.ascii_letters[first : first + second])
    for i, j in _contracted(node, first, second):
        b[j] = a[i]
    free = [label for label in a + b if (label in a) != (label in b)]
    return f"{''.join(a)},{''.join(b)}->{''.join(free)}"


def _contracted(node: Node, first: int, second: int) -> list[tuple[int, int]]:
    """Pairs of axes that are summed over."""
    name = operator_name(node)
    if name == "aten.outer.default" or (name == "aten.inner.default" and not (first and second)):
        return []
    if name == "aten.inner.default":
        return [(first - 1, second - 1)]
    dims: Any = node.args[2:4]
    return [(i % first, j % second) for i, j in zip(*dims, strict=True)]
