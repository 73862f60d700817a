"""Padding, left out of statistics: nothing was trained, and nobody asks, for what stands there.

A mask among the inputs, [batch, sequence] of ones and zeros named like `attention_mask`, says which positions of a
batch are real; `positions.py` says where these two axes lie in every other value. A value that lacks one of them is
kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .ir import Graph, Input
from .layout import Layout, Size
from .ops import extents
from .positions import follow

_WORDS = {"attention", "attn", "decoder", "encoder", "input", "key", "pad", "padding", "query", "sequence", "source",
          "src", "target", "text", "tgt", "valid"}  # fmt: skip
_BATCH = 0  # token of the batch axis; sequences count from 1


class Padding:
    """Which inputs of a graph are masks, and where batch and sequence lie in its values."""

    def __init__(self, graph: Graph) -> None:
        masks = {i: spec.shape for i, spec in enumerate(graph.inputs) if is_mask(spec)}
        shapes = list(dict.fromkeys(masks.values()))
        self._tokens = {i: shapes.index(shape) + 1 for i, shape in masks.items()}
        self._inverted = {i for i in masks if "pad" in _last(graph.inputs[i])}
        named = {
            name: t for t, shape in enumerate(shapes, 1) for name, t in zip(shape, (_BATCH, t), strict=True)
        }
        dynamic: dict[Size, int] = {}
        marks: dict[Node, dict[int, int]] = {}
        for spec, node in zip(graph.inputs, graph.placeholders, strict=True):
            sizes = extents(node.meta["val"])
            dynamic |= {
                size: named[name]
                for size, name in zip(sizes, spec.shape, strict=True)
                if isinstance(name, str) and name in named
            }
            if spec.shape[:2] in shapes:
                tokens = (_BATCH, shapes.index(spec.shape[:2]) + 1)
                marks[node] = {i: token for i, token in enumerate(tokens) if sizes[i] != 1}
        self._layouts = follow(graph, marks, dynamic) if masks else {}

    def of(self, inputs: Sequence[Tensor]) -> Real:
        """The real positions of one batch. A mask that leaves none of them, or holds other numbers, tells nothing."""
        masks: dict[int, Tensor] = {}
        for i, token in self._tokens.items():
            real = inputs[i] == (0 if i in self._inverted else 1)
            if bool(real.any()) and bool(((inputs[i] == 0) | (inputs[i] == 1)).all()):
                masks[token] = real & masks.get(token, real)
        return Real(self._layouts, {t: mask for t, mask in masks.items() if not bool(mask.all())})


class Real:
    """The real positions of one batch. masks: token of a sequence -> bool [batch, sequence], where it has padding."""

    def __init__(self, layouts: Mapping[Node, Any], masks: Mapping[int, Tensor]) -> None:
        self._layouts = layouts
        self._masks = masks
        self._kept: dict[Layout, tuple[list[int], Tensor] | None] = {}

    def values(self, node: Node, value: Any) -> Any:
        """What a node computed, without padding: [positions, other axes...]; as it is where it holds none."""
        layout = self._layouts.get(node)
        if not self._masks or layout is None:
            return value
        if isinstance(layout, list):
            return [self._without(v, one, []) for v, one in zip(value, layout, strict=True)]
        return self._without(value, layout, [])

    def rows(self, node: Node, value: Tensor, axis: int) -> Tensor:
        """The same with `axis` last. Where that is an axis of positions itself, all of them are kept."""
        if not self._masks or node not in self._layouts:
            return value.movedim(axis, -1)
        return self._without(value, self._layouts[node], [axis % value.dim()])

    def _without(self, value: Tensor, layout: Layout, last: list[int]) -> Tensor:
        if layout not in self._kept:
            self._kept[layout] = self._real(layout)
        axes, real = self._kept[layout] or ([], None)
        if real is None or set(axes) & set(last):
            return value.movedim(last[0], -1) if last else value
        others = [i for i in range(value.dim()) if i not in (*axes, *last)]
        return value.permute(*axes, *others, *last)[real.to(value.device)]

    def _real(self, layout: Layout) -> tuple[list[int], Tensor] | None:
        """The axes that hold positions, and bool [their sizes]; None where a value has none to leave out."""
        axes = [i for i, axis in enumerate(layout) if any(atom.token is not None for atom in axis)]
        atoms = [atom for i in axes for atom in layout[i]]
        found = [atom.token for atom in atoms]
        rows = len(next(iter(self._masks.values())))
        alone = rows == 1 and _BATCH not in found  # a batch of one, whose axis need not show
        if not (alone or found.count(_BATCH) == 1) or not any(token in found for token in self._masks):
            return None
        lengths = {_BATCH: rows} | {token: mask.shape[1] for token, mask in self._masks.items()}
        sizes: list[Any] = [
            atom.size if atom.token is None else lengths.get(atom.token, atom.size) for atom in atoms
        ]
        if not all(isinstance(size, int) for size in sizes):
            return None
        real = torch.ones(sizes, dtype=torch.bool)
        for token, mask in self._masks.items():
            for place in (i for i, one in enumerate(found) if one == token):
                real &= _placed(mask, len(found), None if alone else found.index(_BATCH), place)
        ends = accumulate((len(layout[i]) for i in axes), initial=0)
        return axes, real.reshape([math.prod(sizes[a:b]) for a, b in pairwise(ends)])


def is_mask(spec: Input) -> bool:
    """An input [batch, sequence] that is named like an attention mask.

    `attention_mask`, `mask`, `decoder_attention_mask`: 1 is real. With `pad` in the name, as `key_padding_mask`: 1 is
    padding, as in torch.nn. Not meant: `token_type_ids`, `global_attention_mask`, `special_tokens_mask`.
    """
    *words, last = _last(spec).split("_")
    return len(spec.shape) == 2 and last == "mask" and _WORDS.issuperset(words)


def _last(spec: Input) -> str:
    return spec.name.rpartition(".")[2].lower()


def _placed(mask: Tensor, rank: int, batch: int | None, sequence: int) -> Tensor:
    """A mask [batch, sequence] with its axes at these places of `rank`, for broadcasting."""
    shape = [1] * rank
    shape[sequence] = mask.shape[1]
    if batch is not None:
        shape[batch] = len(mask)
        mask = mask if batch < sequence else mask.T
    return mask.reshape(shape)
