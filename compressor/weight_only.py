"""Weights as integers of few bits, in blocks, that matrix products read; between products, activations stay float.

What is bound by memory gains: a language model that answers token by token reads every weight once for each of them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Node

from .blockwise import quantise_blocks
from .ir import Graph
from .names import short_name, site
from .ops import kind
from .pipeline import Context, Decline, Outcome, Rewrite
from .place import ignored
from .readers import Layer, layer_of
from .tables import is_lookup, store_tables

LEAST = 128  # columns of a weight from which on it is worth it


def store_weights(graph: Graph, ctx: Context, bits: int, block: int, ignore: Collection[str]) -> Outcome:
    """Products with constant weights read integers of 4 or 8 bits; tables of embeddings become integers of 8.

    block: columns that share a scale. ignore: patterns of sites that stay float.
    """
    outcome = Outcome()
    layers = {node: layer for node in graph.nodes if (layer := _product(node)) is not None}
    left = ignored([*layers, *filter(is_lookup, graph.nodes)], ignore)
    before = after = 0
    stored: dict[Node, tuple[Node, ...]] = {}
    with ctx.progress(f"rounding weights to {bits} bits", len(layers)) as advance:
        for node, layer in layers.items():
            reason = "left float as asked" if node in left else _refuse(graph, layer)
            if reason:
                outcome.declines.append(Decline.at(node, reason))
            elif ctx.limit is None or len(outcome.rewrites) < ctx.limit:
                if layer.weight not in stored:
                    stored[layer.weight] = _rounded(graph, layer, bits, block)
                    before += graph.tensor(layer.weight).nbytes
                    after += sum(graph.tensor(part).nbytes for part in stored[layer.weight])
                made = graph.insert(
                    torch.ops.compressor.matmul_blocks.default,
                    (layer.source, *stored[layer.weight], layer.bias, bits, block, layer.ins),
                    before=node,
                )
                graph.replace_uses(node, made)
                graph.erase(node)
                graph.clean()
                what = f"{short_name(node)}: weights of {bits} bits in blocks of {block}"
                outcome.rewrites.append(Rewrite(site(node), what))
            advance(1)
    outcome.facts = {"products": len(outcome.rewrites), "mb_before": before / 1e6, "mb_after": after / 1e6}
    store_tables(graph, outcome, ignore, ctx.limit)
    graph.clean()
    return outcome


def _rounded(graph: Graph, layer: Layer, bits: int, block: int) -> tuple[Node, ...]:
    """Integers, scales and zero points of a layer's weight, as constants."""
    (weight,), name = layer.matrix(graph.tensor(layer.weight)), str(layer.weight.target)
    blocks = quantise_blocks(weight, bits, block)
    parts = {f"int{bits}": blocks.packed, "scale": blocks.scales, "zero_point": blocks.zeros}
    return tuple(graph.add_tensor(f"{name}_{part}", tensor) for part, tensor in parts.items())


def _product(node: Node) -> Layer | None:
    """A product of a value with a matrix of constants."""
    layer = layer_of(node) if node.op == "call_function" else None
    return None if layer is None or layer.kernel or kind(node) == "conv" else layer


def _shares(node: Node, layer: Layer) -> bool:
    """Whether a product reads the weight of another in the same way."""
    other = _product(node)
    return other is not None and other.weight is layer.weight and kind(node) == kind(layer.node)


def _refuse(graph: Graph, layer: Layer) -> str:
    weight = graph.tensor(layer.weight)
    if not all(is_lookup(user) or _shares(user, layer) for user in layer.weight.users):
        return "its weight is read by others, too"
    if weight.dtype != torch.float32 or layer.node.meta["val"].dtype != torch.float32:
        return "it does not compute in f32"
    if not bool(torch.isfinite(weight).all()):
        return "its weight holds NaN or infinite values"
    if layer.ins < LEAST:
        return f"{layer.ins} columns are too few"
    return ""
