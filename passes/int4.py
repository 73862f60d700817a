"""Weights of 4 bits: matrix products read them in blocks, activations stay float.

For models that memory bounds, a language model that answers token by token: a weight is read once for each, and an
eighth of the bytes is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.fx import Node

from compressor.blockwise import quantise_blocks
from compressor.ir import Graph, short_name, site
from compressor.ops import kind
from compressor.pipeline import BOUNDED, Context, Contract, Decline, Outcome, Pass, Rewrite
from compressor.place import ignored
from compressor.readers import Layer, layer_of

LEAST = 128  # columns of a weight from which on it is worth it


@dataclass(frozen=True)
class Int4(Pass):
    """Weights of matrix products become integers of 4 bits, or 8, with a scale for every block of a row.

    It needs no data: every block keeps the range that its weights lose least by. What embeds tokens, convolutions, and
    weights that others read too, stay float. block: columns that share a scale. ignore: modules that stay float
    (`int4(ignore=lm_head)`).
    """

    name: ClassVar[str] = "int4"
    contract: ClassVar[Contract] = BOUNDED
    after: ClassVar[tuple[str, ...]] = ("merge", "prune", "squeeze", "distill", "fold")
    requires: ClassVar[tuple[str, ...]] = ("fold",)

    bits: Literal["4", "8"] = "4"
    block: int = 32
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"a block has 16, 32, 64, 128 or 256 columns, got {self.block}")

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        layers = {node: layer for node in graph.nodes if (layer := _product(node)) is not None}
        left = ignored(list(layers), self.ignore)
        before = after = 0
        with ctx.progress("int4: rounding weights", len(layers)) as advance:
            for node, layer in layers.items():
                reason = "left float as asked" if node in left else _refuse(graph, layer)
                if reason:
                    outcome.declines.append(Decline.at(node, reason))
                elif ctx.limit is None or len(outcome.rewrites) < ctx.limit:
                    before += graph.tensor(layer.weight).nbytes
                    after += self._round(graph, layer)
                    what = f"{short_name(node)}: weights of {self.bits} bits in blocks of {self.block}"
                    outcome.rewrites.append(Rewrite(site(node), what))
                advance(1)
        graph.clean()
        outcome.facts = {
            "products": len(outcome.rewrites),
            "mb_before": before / 1e6,
            "mb_after": after / 1e6,
        }
        return outcome

    def _round(self, graph: Graph, layer: Layer) -> int:
        """Puts the product with rounded weights in the place of one; bytes of what it now reads."""
        weight, name, bits = (
            layer.matrix(graph.tensor(layer.weight))[0],
            str(layer.weight.target),
            int(self.bits),
        )
        blocks = quantise_blocks(weight, bits, self.block)
        parts = {f"int{bits}": blocks.packed, "scale": blocks.scales, "zero_point": blocks.zeros}
        stored = [graph.add_tensor(f"{name}_{part}", tensor) for part, tensor in parts.items()]
        made = graph.insert(
            torch.ops.compressor.matmul_blocks.default,
            (layer.source, *stored, layer.bias, bits, self.block, layer.ins),
            before=layer.node,
        )
        graph.replace_uses(layer.node, made)
        graph.erase(layer.node)
        graph.clean()
        return sum(tensor.nbytes for tensor in parts.values())


def _product(node: Node) -> Layer | None:
    """A product of a value with a matrix of constants."""
    layer = layer_of(node) if node.op == "call_function" else None
    return None if layer is None or layer.kernel or kind(node) == "conv" else layer


def _refuse(graph: Graph, layer: Layer) -> str:
    weight = graph.tensor(layer.weight)
    if layer.is_tied:
        return "its weight is read by others, too"
    if weight.dtype != torch.float32 or layer.node.meta["val"].dtype != torch.float32:
        return "it does not compute in f32"
    if not bool(torch.isfinite(weight).all()):
        return "its weight holds NaN or infinite values"
    if layer.ins < LEAST:
        return f"{layer.ins} columns are too few"
    return ""
