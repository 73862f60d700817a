"""Adapters of one linear, each written as its paper runs it: on the activation wherever the paper does so.

A method is its parameters, an axis a letter, and a function of the activation:
i inputs, o outputs, s the smaller of both, r the rank, n = i / r, m = o / r, h = i / 2, g = o / 2, k terms of a sum.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RANK, TERMS = 4, 2


class Method(nn.Module):
    """A linear and an adapter that adds `change(x)` to its output."""

    shapes: ClassVar[dict[str, str]] = {}

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.ins, self.outs = ins, outs
        self.base, self.drop = nn.Linear(ins, outs), nn.Dropout(0.1)
        sizes = {
            "i": ins,
            "o": outs,
            "s": min(ins, outs),
            "r": RANK,
            "k": TERMS,
            "h": ins // 2,
            "g": outs // 2,
        }
        sizes |= {"n": ins // RANK, "m": outs // RANK}
        for name, axes in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones([sizes.get(a) or int(a) for a in axes])))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        raise NotImplementedError


# ------------------------------------------------------------------------- low rank


class LoRA(Method):
    """W x + s B A x. Hu et al. 2021 (arXiv:2106.09685)."""

    shapes: ClassVar = {"a": "ri", "b": "or"}
    scale = 8 / RANK

    def change(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.drop(x), self.a), self.b) * self.scale


class RsLoRA(LoRA):
    """The scale is alpha / sqrt(r). Kalajdzievski 2023 (arXiv:2312.03732)."""

    scale = 8 / RANK**0.5


class BiasedLoRA(Method):
    """Both factors have a bias."""

    shapes: ClassVar = {"a": "ri", "a_bias": "r", "b": "or", "b_bias": "o"}

    def change(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a, self.a_bias), self.b, self.b_bias)


class DoRA(Method):
    """Direction W + s B A of columns with norm 1, times a magnitude. Liu et al. 2024 (arXiv:2402.09353)."""

    shapes: ClassVar = {"a": "ri", "b": "or", "magnitude": "o"}

    def change(self, x: Tensor) -> Tensor:
        weight = self.base.weight + 0.5 * self.b @ self.a
        gain = self.magnitude / weight.norm(p=2, dim=1)
        lora = F.linear(F.linear(self.drop(x), self.a), self.b)
        return (gain - 1) * F.linear(x, self.base.weight) + gain * lora * 0.5


class VeRA(Method):
    """Frozen factors, one vector behind each. Kopiczko et al. 2023 (arXiv:2310.11454)."""

    shapes: ClassVar = {"a": "ri", "b": "or", "d": "r", "e": "o"}

    def change(self, x: Tensor) -> Tensor:
        return self.e * F.linear(self.d * F.linear(x, self.a), self.b)


class NOLA(Method):
    """Both factors are sums of random matrices. Koohpayegani et al. 2023 (arXiv:2310.02556)."""

    shapes: ClassVar = {"a": "kri", "b": "kor", "alpha": "k", "beta": "k"}

    def change(self, x: Tensor) -> Tensor:
        a, b = torch.einsum("k,kri->ri", self.alpha, self.a), torch.tensordot(self.beta, self.b, dims=1)
        return x @ a.T @ b.T


class RandLoRA(Method):
    """A sum of random low-rank pairs, scaled by diagonals. Albert et al. 2025 (arXiv:2502.00987)."""

    shapes: ClassVar = {"a": "kri", "b": "kor", "lambda_": "kr", "gamma": "ki"}

    def change(self, x: Tensor) -> Tensor:
        inner = torch.einsum("...i,ki,kri->...kr", x, self.gamma, self.a) * self.lambda_
        return torch.einsum("...kr,kor->...o", inner, self.b)


class LoRAXS(Method):
    """A small square matrix between frozen factors. Balazy et al. 2024 (arXiv:2405.17604)."""

    shapes: ClassVar = {"a": "ri", "core": "rr", "b": "or"}

    def change(self, x: Tensor) -> Tensor:
        return x.matmul(self.a.t()).matmul(self.core).matmul(self.b.t())


class AdaLoRA(Method):
    """P diag(lambda) Q, over the ranks that are left. Zhang et al. 2023 (arXiv:2303.10512)."""

    shapes: ClassVar = {"a": "ri", "e": "r1", "b": "or"}

    def change(self, x: Tensor) -> Tensor:
        return (self.drop(x) @ (self.a * self.e).T @ self.b.T) * 2 / (RANK + 1e-5)


class Triangular(Method):
    """Triangular factors."""

    shapes: ClassVar = {"a": "ri", "b": "or"}

    def change(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.triu()), self.b.tril())


class BlockDiagonal(Method):
    """The first factor is block-diagonal: every block of the input has its own ranks."""

    shapes: ClassVar = {"a": "n2r", "b": "on2"}

    def change(self, x: Tensor) -> Tensor:
        inner = torch.einsum("...nr,ntr->...nt", x.unflatten(-1, (-1, RANK)), self.a)
        return inner.flatten(-2) @ self.b.flatten(1).T


class MELoRA(Method):
    """Mini adapters on pieces of the features. Ren et al. 2024 (arXiv:2402.17263)."""

    shapes: ClassVar = {"a": "k2h", "b": "kg2"}

    def change(self, x: Tensor) -> Tensor:
        pieces = zip(x.chunk(TERMS, dim=-1), self.a, self.b, strict=True)
        return torch.cat([F.linear(F.linear(piece, a), b) for piece, a, b in pieces], dim=-1)


class SoRA(Method):
    """A gate a rank, some of them pruned to zero. Ding et al. 2023 (arXiv:2311.11696)."""

    shapes: ClassVar = {"a": "ri", "gate": "r", "b": "or"}

    def change(self, x: Tensor) -> Tensor:
        gate = self.gate * (self.gate > self.gate.mean())
        return F.linear(F.linear(self.drop(x), self.a) * gate, self.b)


class DyLoRA(Method):
    """Trained for every rank, run at a chosen one. Valipour et al. 2022 (arXiv:2210.07558)."""

    shapes: ClassVar = {"a": "ri", "b": "or"}

    def change(self, x: Tensor) -> Tensor:
        return x @ self.a[:3].T @ self.b[:, :3].T * (8 / 3)


# ------------------------------------------------------------------------- sparse, block-affine, bias and scale


class SHiRA(Method):
    """A sparse update, written into a dense one. Bhardwaj et al. 2024 (arXiv:2406.13175)."""

    shapes: ClassVar = {"values": "r3"}

    def change(self, x: Tensor) -> Tensor:
        places = torch.arange(self.values.numel())
        rows, columns = 7 * places % self.outs, 5 * places % self.ins
        sparse = torch.zeros_like(self.base.weight).index_put((rows, columns), self.values.flatten())
        return F.linear(x, sparse)


class Scattered(SHiRA):
    """The same on the activation: columns picked, scaled, and added up where they belong."""

    def change(self, x: Tensor) -> Tensor:
        places = torch.arange(self.values.numel())
        picked = x[..., 5 * places % self.ins] * self.values.flatten()
        return x.new_zeros(*x.shape[:-1], self.outs).index_add(-1, 7 * places % self.outs, picked)


class MiSS(Method):
    """Folded inputs added up, one small matrix. Kang and Yin 2024 (arXiv:2409.15371)."""

    shapes: ClassVar = {"d": "ro"}

    def change(self, x: Tensor) -> Tensor:
        return torch.sum(x.view(*x.shape[:-1], x.size(-1) // RANK, RANK), dim=-2) @ self.d


class Bone(Method):
    """Blocks of the weight times one small matrix, plus it. Same source."""

    shapes: ClassVar = {"d": "mrr"}

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.base.weight.reshape(-1, RANK, self.ins // RANK, RANK).transpose(1, 2)
        moved = torch.einsum("mnab,mbc->mnac", blocks, self.d) + self.d[:, None] + blocks
        return F.linear(x, moved.transpose(1, 2).reshape(self.outs, self.ins), self.base.bias)


class Hydra(Method):
    """One low-rank branch beside the linear, one behind it. Kim et al. 2023 (arXiv:2309.06922)."""

    shapes: ClassVar = {"a": "ri", "b": "or", "c": "ro", "d": "or"}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + F.linear(F.linear(x, self.a), self.b) + F.linear(F.linear(y, self.c), self.d)


class LoReFT(Method):
    """h + R' (V h + b - R h) at every position. Wu et al. 2024 (arXiv:2404.03592)."""

    shapes: ClassVar = {"r": "ro", "v": "ro", "b": "r"}

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        return h + torch.matmul(F.linear(h, self.v, self.b) - torch.matmul(h, self.r.T), self.r)


class IA3(Method):
    """A vector on the outputs, or on the inputs where the layer narrows. Liu et al. 2022 (arXiv:2205.05638)."""

    shapes: ClassVar = {"narrow": "i", "wide": "o"}

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x * self.narrow) if self.ins > self.outs else self.base(x) * self.wide


class SSF(Method):
    """Scale and shift behind the linear. Lian et al. 2022 (arXiv:2210.08823)."""

    shapes: ClassVar = {"scale": "o", "shift": "o"}

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale + self.shift


class BitFit(Method):
    """Only the bias is trained, kept apart from the frozen one. Ben Zaken et al. 2021 (arXiv:2106.10199)."""

    shapes: ClassVar = {"shift": "o"}

    def change(self, x: Tensor) -> Tensor:
        return self.shift


# ------------------------------------------------------------------------- several at once


class Several(Method):
    """Three LoRA adapters at once, with weights."""

    shapes: ClassVar = {"a": "3ri", "b": "3or", "weights": "3"}

    def change(self, x: Tensor) -> Tensor:
        each = [F.linear(F.linear(x, a), b) for a, b in zip(self.a, self.b, strict=True)]
        return sum(weight * part for weight, part in zip(self.weights, each, strict=True))


class Stacked(Several):
    """The same, stacked and added up."""

    def change(self, x: Tensor) -> Tensor:
        each = [F.linear(F.linear(x, a), b) for a, b in zip(self.a, self.b, strict=True)]
        return (torch.stack(each, dim=-2) * self.weights.unsqueeze(-1)).sum(-2)


class Nested(Method):
    """An adapter on the adapter's first factor, and one on the whole."""

    shapes: ClassVar = {
        "a": "ri",
        "b": "or",
        "inner_a": "2i",
        "inner_b": "r2",
        "outer_a": "ri",
        "outer_b": "or",
    }

    def forward(self, x: Tensor) -> Tensor:
        down = F.linear(x, self.a) + F.linear(F.linear(x, self.inner_a), self.inner_b)
        first = self.base(x) + 0.5 * F.linear(down, self.b)
        return first + 0.5 * F.linear(F.linear(x, self.outer_a), self.outer_b)


class TwoDoRA(Method):
    """Two DoRA adapters on one linear: each adds what it would add to the base alone."""

    shapes: ClassVar = {"a": "kri", "b": "kor", "magnitude": "ko"}

    def change(self, x: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for a, b, magnitude in zip(self.a, self.b, self.magnitude, strict=True):
            gain = (magnitude / torch.linalg.norm(self.base.weight + b @ a, dim=1)).view(1, -1)
            total = total + (gain - 1) * F.linear(x, self.base.weight) + gain * (x @ a.T @ b.T)
        return total


METHODS = (
    LoRA, RsLoRA, BiasedLoRA, DoRA, VeRA, NOLA, RandLoRA, LoRAXS, AdaLoRA, Triangular, BlockDiagonal, MELoRA, SoRA,
    DyLoRA, SHiRA, Scattered, MiSS, Bone, Hydra, LoReFT, IA3, SSF, BitFit, Several, Stacked, Nested, TwoDoRA,
)  # fmt: skip
