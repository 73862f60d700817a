"""What became of each layer: its cost, its precision, its width, and how far its output is from the original's.

A layer is an operator that multiplies, or that reads weights: convolutions, products, attention, norms, tables. Which
value of the original its output stands for is known from what passes claimed on the way (`Graph.ancestors`); where no
pass said so, nothing is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .data import Batch
from .ir import Graph
from .names import DTYPE_NAMES, short_name, site
from .ops import CONTRACTIONS, NORMS, OPAQUE, arguments, is_constant, is_tensor, kind, node_macs
from .pipeline import Row
from .verify import side_by_side

SAMPLES = 8  # that outputs are compared on: enough for a decibel, a fraction of what the checks run on

_SUMS = frozenset({"add", "sub", "mul", "div"})  # a table of positions, a gain that nothing took in
_LAYERS = CONTRACTIONS | NORMS | _SUMS | {"batch_norm", "embedding", "prelu", "integer_matmul", OPAQUE}
_IN_FRONT = frozenset(
    {"conv", "conv_transpose", "batch_norm", "group_norm", "instance_norm"}
)  # channels: axis 1
_BEHIND = frozenset({"linear", "addmm", "matmul", "integer_matmul", "layer_norm", "rms_norm", "embedding"})


def layers(
    graph: Graph, original: Graph, rows: Iterable[Row], batches: Iterable[Batch] = ()
) -> list[dict[str, Any]]:
    """One row a layer of `graph`, in its order, as plain data for the report.

    site: module path. operator: `conv2d`. macs: of one sample. params, bytes: numbers in the tensors that it reads, and
    what they take as stored; a shared one counts at each reader. precision: dtype of what it reads and of its weight,
    `u8 x i8`, or one where both are the same. width: channels of its output in the original (None: it is not there) and
    now; None for a layer without weights. rank: of the pair or triple that a pass made of it. sqnr_db: of its output
    against the original's on `batches`, all positions of padded texts included; None where it cannot be told.

    original: the graph before the first pass of `rows`, which made `graph` of it.
    """
    ranks = _ranks(rows)
    stored = _stored(graph)
    found = {node: _weights(node, stored) for node in graph.nodes if kind(node) in _LAYERS}
    found = {node: weights for node, weights in found.items() if weights or node_macs(node)}
    there = {node.name: node for node in original.nodes}
    pairs = {node.name: there[name] for node in found if (name := _ancestor(graph, node)) in there}
    levels = _levels(graph, original, {new: old.name for new, old in pairs.items()}, batches)
    made = []
    for node, weights in found.items():
        tensors = [graph.tensor(one) for one in weights]
        place = site(node)
        made.append(
            {
                "site": place,
                "operator": short_name(node),
                "macs": node_macs(node),
                "params": sum(tensor.numel() for tensor in tensors),
                "bytes": sum(tensor.nbytes for tensor in tensors),
                "precision": _precision(node, stored),
                "width": _width(node, pairs.get(node.name)) if weights else None,
                "rank": ranks.get(place) if kind(node) in CONTRACTIONS else None,
                "sqnr_db": levels.get(node.name),
            }
        )
    return made


def _ranks(rows: Iterable[Row]) -> dict[str, Any]:
    """What passes say of the layers that they split, by site."""
    said = [row.facts.get("layers") for row in rows]
    split = [one for facts in said if isinstance(facts, list) for one in facts if isinstance(one, dict)]
    return {one["site"]: one["rank"] for one in split if "site" in one and "rank" in one}


# -------------------------------------------------------------------- weights


def _stored(graph: Graph) -> dict[Node, list[Node]]:
    """Every value that the graph's own tensors decide, dequantised weights for one -> these tensors."""
    found: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        operands = node.all_input_nodes
        if is_constant(node):
            found[node] = [node]
        elif node.op == "call_function" and operands and all(one in found for one in operands):
            found[node] = list(dict.fromkeys(tensor for one in operands for tensor in found[one]))
    return found


def _weights(node: Node, stored: Mapping[Node, Sequence[Node]]) -> list[Node]:
    """The tensors that an operator reads; none where they are single numbers."""
    tensors = dict.fromkeys(tensor for one in node.all_input_nodes for tensor in stored.get(one, ()))
    return list(tensors) if any(one.meta["val"].numel() > 1 for one in tensors) else []


def _precision(node: Node, stored: Mapping[Node, Sequence[Node]]) -> str:
    """Dtypes of the first value that an operator reads and of its largest tensor."""
    operands = [one for one in node.all_input_nodes if is_tensor(one)]
    values = [_dtype(one) for one in operands if one not in stored and kind(node) != "embedding"]
    tensors = [tensor for one in operands for tensor in stored.get(one, ())]
    names = values[:1]
    if kind(node) == "integer_matmul":
        names.append(f"i{arguments(node)['bits']}")
    elif tensors:
        names.append(_dtype(max(tensors, key=lambda one: one.meta["val"].numel())))
    return " x ".join(dict.fromkeys(names))


def _dtype(node: Node) -> str:
    """Of the integers, where a value is made of these."""
    if kind(node) == "quantize":  # on a scale of its own, and back
        return "u8"
    source = node.all_input_nodes[0] if kind(node) == "dequantize" else node
    dtype = source.meta["val"].dtype
    return DTYPE_NAMES.get(dtype, str(dtype))


def _width(node: Node, old: Node | None) -> list[int | None] | None:
    """Output channels of the value that a layer's output stands for, and its own."""
    axis = 1 if kind(node) in _IN_FRONT else -1
    if kind(node) not in _IN_FRONT | _BEHIND or not is_tensor(node):
        return None
    now = node.meta["val"].shape
    same = old is not None and len(old.meta["val"].shape) == len(now)
    was = old.meta["val"].shape[axis] if old is not None and same else None
    return [was if isinstance(was, int) else None, now[axis]] if isinstance(now[axis], int) else None


# -------------------------------------------------------------------- outputs


def _ancestor(graph: Graph, node: Node) -> str:
    """The value of the original that a value stands for; empty where there is none."""
    if node.name not in graph.ancestors:
        return node.name
    known = graph.ancestors[node.name]
    return known.name if known is not None else ""


@torch.no_grad()
def _levels(
    graph: Graph, original: Graph, pairs: Mapping[str, str], batches: Iterable[Batch]
) -> dict[str, float]:
    """SQNR in decibels by name; infinite where nothing differs. Only sums are kept."""
    nodes = {node.name: node for node in original.nodes}
    floats = {
        new: old
        for new, old in pairs.items()
        if is_tensor(nodes[old]) and nodes[old].meta["val"].dtype.is_floating_point
    }
    signal, noise = dict.fromkeys(floats, 0.0), dict.fromkeys(floats, 0.0)
    for batch in batches:
        for node, reference, value in side_by_side(original, graph, floats, graph.lineage, batch.inputs):
            known = graph.ancestors.get(node.name)
            seen = value.double()
            if known is not None and known.scale is not None and known.scale.dim() == seen.dim():
                seen = seen / known.scale
            fits = reference.shape == seen.shape
            signal[node.name] += _energy(reference.double())
            noise[node.name] += _energy(reference - seen) if fits else math.nan
    return {
        name: round(10 * math.log10(energy / noise[name]), 2) if noise[name] else math.inf
        for name, energy in signal.items()
        if energy > 0 and math.isfinite(energy) and math.isfinite(noise[name])
    }


def _energy(values: Tensor) -> float:
    return float(values.square().sum())
