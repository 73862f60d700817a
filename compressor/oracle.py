"""What a pruned graph must compute, and whether comparing with it proves anything.

The masked original: just before every contraction, its operand is multiplied by 0 where slices were removed. Masking
at the reader, after every pointwise operator, makes a removed channel add nothing whatever relu(0) or sigmoid(0) is.
Where channels go from under a normalisation, it takes its statistics over those that are left (`masked_norms.py`).
It is built from the slices of the groups on the unmodified graph; no code of `surgery.py` is called.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from .atoms import Array
from .channels import Group, contracted, paired
from .ir import Graph
from .masked_norms import mask_norms
from .ops import arguments, attention_scale, contractions, is_constant, kind

Floats = NDArray[np.float64]


def masked(graph: Graph, groups: Sequence[Group]) -> Graph:
    """A copy of `graph`, the one that the groups were found in, that ignores these groups and keeps its shapes."""
    twin = graph.copy()
    removed = groups[0].algebra.removed(groups) if groups else {}
    made: dict[tuple[Node, int], Node] = {}
    for reader in list(contractions(twin)):
        pairs = contracted(reader)
        present: dict[Node, Node] = {}  # an operand, as far as it is masked
        for i, (operand, axis) in enumerate(pairs):
            gone = removed.get(operand.name, {}).get(axis)
            if gone is None or (i > 0 and is_constant(operand)):
                continue
            now = present.get(operand, operand)
            if (now, axis) not in made:
                made[now, axis] = _mask(twin, now, axis, gone)
            present[operand] = made[now, axis]
            reader.replace_input_with(now, present[operand])
    mask_norms(twin, removed)
    return twin


def _mask(graph: Graph, operand: Node, axis: int, gone: Array) -> Node:
    """operand * mask, right behind the operand."""
    value: Tensor = operand.meta["val"]
    keep = torch.ones([value.shape[axis] if i == axis else 1 for i in range(value.dim())], dtype=value.dtype)
    keep.index_fill_(axis, torch.from_numpy(gone), 0)
    constant = graph.add_tensor(f"mask_{operand.name}_{axis}", keep)
    after = operand.next
    while after.op in ("placeholder", "get_attr"):
        after = after.next
    return graph.insert(torch.ops.aten.mul.Tensor, (operand, constant), before=after)


# -------------------------------------------------------------------- power


def power(graph: Graph, groups: Sequence[Group], inputs: Sequence[Tensor]) -> list[float]:
    """How far masking each group alone moves the output of some reader, relative to that output's largest value.

    A wrong slice in a reader shows at about this size, so a check at tolerance t proves a group whose power is well
    over t. From one batch, of the slice that counts most: max|x| max|w| where a weight is read, which is the move
    itself for a linear; rms(x) rms(y), which is less, where two values meet. For the scores of attention it is the
    change of a logit, which is the relative change of its weight.
    """
    if not groups:
        return []
    axes = groups[0].algebra.axes
    best = np.zeros(max(int(classes.max()) for classes in axes.values()) + 1)
    for operand, axis, moved in _moves(graph, inputs):
        classes = axes.get((operand.name, axis))
        if classes is not None:
            np.maximum.at(best, classes, moved)
    return [float(best[g.index]) for g in groups]


def _moves(graph: Graph, inputs: Sequence[Tensor]) -> Iterator[tuple[Node, int, Floats]]:
    """(operand, axis, relative move of the reader's output by each slice) of every reader but depthwise ones."""
    readers = {reader: paired(reader) for reader in contractions(graph)}
    wanted: dict[Node, set[int]] = {}
    for operand, axis in itertools.chain.from_iterable(map(contracted, readers)):
        wanted.setdefault(operand, set()).add(axis)
    sizes: dict[tuple[Node, int, bool], Floats] = {}
    for node, value in graph.values(*inputs):
        if not isinstance(value, Tensor) or not value.numel():
            continue
        for axis in wanted.get(node, ()):
            rows = (
                value.float().abs().movedim(axis, 0).flatten(1) if value.dim() > 1 else value.abs()[:, None]
            )
            sizes[node, axis, True] = rows.amax(1).double().numpy()
            sizes[node, axis, False] = rows.square().mean(1).sqrt().double().numpy()
        for pair in readers.get(node, ()):
            moved = _product(graph, node, pair, sizes)
            peak = 1.0 if kind(node) == "attention" else float(value.abs().max())
            if moved is not None and peak > 0:
                yield *pair[0], moved / peak


def _product(
    graph: Graph, node: Node, pair: list[tuple[Node, int]], sizes: dict[tuple[Node, int, bool], Floats]
) -> Floats | None:
    """What one slice of the summed axis adds to the result; None where all that it adds to goes with it."""
    (left, i), (right, j) = pair
    a, weighted = arguments(node), is_constant(right) or is_constant(left)
    if not {(left, i, weighted), (right, j, weighted)} <= sizes.keys():  # one of them is empty
        return None
    x, w = sizes[left, i, weighted], sizes[right, j, weighted]
    if kind(node) == "attention":
        return x * w * attention_scale(node)
    if len(x) == len(w):
        return x * w
    groups = a["groups"]  # a grouped convolution: its weight has the channels of one group on axis 1
    if groups == len(x) or not is_constant(right):
        return None
    per_group = graph.tensor(right).float().abs().flatten(2).amax(2).unflatten(0, (groups, -1)).amax(1)
    return x * per_group.reshape(-1).double().numpy()
