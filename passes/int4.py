"""Weights of 4 bits: matrix products read them in blocks.

For models that memory bounds, a language model that answers token by token: a weight is read once for each, and an
eighth of the bytes is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from compressor.costs import weights_share
from compressor.ir import Graph
from compressor.pipeline import BOUNDED, Context, Contract, Outcome, Pass, Size
from compressor.weight_only import store_weights


@dataclass(frozen=True)
class Int4(Pass):
    """Weights of matrix products become integers of 4 bits, or 8, with a scale for every block of a row.

    It needs no data: every block keeps the range that its weights lose least by. ONNX Runtime's processor kernels round
    what a product reads to 8 bits, block by block, as well, and the numbers of the report are with that. Tables of
    embeddings become integers of 8 bits with a scale for every row; convolutions stay float.

    bits: of a weight; 8 is twice the file and far less noise. block: columns that share a scale. ignore: modules that
    stay float (`int4(ignore=lm_head)`).
    """

    name: ClassVar[str] = "int4"
    contract: ClassVar[Contract] = BOUNDED
    after: ClassVar[tuple[str, ...]] = ("merge", "shorten", "prune", "squeeze", "distill", "fold")
    requires: ClassVar[tuple[str, ...]] = ("fold",)

    bits: Literal["4", "8"] = "4"
    block: int = 32
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"a block has 16, 32, 64, 128 or 256 columns, got {self.block}")

    def plan(self, size: Size, graph: Graph, data: bool) -> tuple[Size, str]:
        share = weights_share(graph, {"linear", "addmm", "matmul"})
        bits = int(self.bits) + 32 / self.block
        saved = 1 - share * (1 - bits / 32)
        rule = f"{bits:g} bits, with scales, for each of the {share:.0%} of the numbers that products multiply by"
        return Size(size.params, size.macs, size.bytes * saved), rule

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        return store_weights(graph, ctx, int(self.bits), self.block, self.ignore)
