"""Where the tokens and the features of an entry x [tokens..., features] lie in the axes of a value.

An axis is a product of atoms, slowest first, and an atom is either one token axis of x or a run of features.
`view(B, T, heads, d)` splits features, `view(B * T, d)` joins tokens, `transpose` moves both; all are followed exactly,
dynamic sizes included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from .ops import extents

Size = Any  # an int, or the sympy expression of a dynamic size


@dataclass(frozen=True)
class Atom:
    """A factor of an axis: `token` is the axis of the entry that it runs along, None for features."""

    size: Size
    token: int | None = None


Axis = tuple[Atom, ...]  # the first atom is the slowest; an axis of size 1 has none
Layout = tuple[Axis, ...]


def start(entry: Node) -> Layout | None:
    """The layout of an entry of floats: its last axis holds the features, the others are tokens."""
    value = entry.meta["val"]
    sizes = extents(value)
    if not value.dtype.is_floating_point or not sizes or not isinstance(sizes[-1], int):
        return None
    return (*_positions(sizes[:-1]), run(sizes[-1]))


def start_index(entry: Node) -> Layout | None:
    """The layout of an entry of indices: every axis holds tokens."""
    value = entry.meta["val"]
    whole = not (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool)
    return _positions(extents(value)) if whole and value.dim() else None


def is_exit(layout: Layout, entry: Node, node: Node) -> bool:
    """True when a value has the entry's token axes, in order, and then one axis of features."""
    first = start(entry)
    before = start_index(entry) if first is None else first[:-1]
    if before is None or len(layout) != len(before) + 1 or tokens(layout[-1]):
        return False
    return layout[:-1] == before and isinstance(node.meta["val"].shape[-1], int)


def _positions(sizes: Sequence[Size]) -> Layout:
    return tuple(() if s == 1 else (Atom(s, i),) for i, s in enumerate(sizes))


def reshaped(layout: Layout, sizes: Sequence[Size]) -> Layout | None:
    """The layout after a reshape to `sizes`, atoms dealt out to the axes in order; None where that splits tokens."""
    atoms = [a for axis in layout for a in axis]
    result = []
    for size in sizes:
        axis: list[Atom] = []
        while size != 1:
            if not atoms:
                return None
            head = atoms[0]
            rest = _divide(size, head.size)
            if rest is not None:
                atoms.pop(0)
            else:
                left = _divide(head.size, size) if head.token is None else None
                if left is None:
                    return None
                head, atoms[0], rest = Atom(size), Atom(left), 1
            axis.append(head)
            size = rest
        result.append(_joined(axis))
    return tuple(result)


def run(size: Size) -> Axis:
    """An axis of so many features."""
    return () if size == 1 else (Atom(size),)


def tokens(axis: Axis) -> list[int]:
    """The token axes of the entry that an axis runs along."""
    return [a.token for a in axis if a.token is not None]


def _divide(whole: Size, part: Size) -> Size | None:
    """whole / part when that is a whole number for every value of the dynamic sizes."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    quotient = sympy.cancel(sympy.sympify(whole) / sympy.sympify(part))
    if sympy.fraction(quotient)[1] != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient


def _joined(atoms: list[Atom]) -> Axis:
    """Neighbouring features are one run."""
    axis: list[Atom] = []
    for atom in atoms:
        if axis and axis[-1].token is None and atom.token is None:
            axis[-1] = Atom(axis[-1].size * atom.size)
        else:
            axis.append(atom)
    return tuple(axis)
