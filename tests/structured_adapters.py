"""More adapters of one linear: products of small matrices, transforms, rotations, and the base taken apart."""

from __future__ import annotations

from typing import ClassVar

import torch
from adapters import RANK, Method
from torch import Tensor
from torch.nn import functional as F

# ------------------------------------------------------------------------- products of matrices


class LoHa(Method):
    """(B A) * (D C), elementwise. Hyeon-Woo et al. 2021 (arXiv:2108.06098)."""

    shapes: ClassVar = {"a": "ri", "b": "or", "c": "ri", "d": "or"}

    def change(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.b @ self.a) * (self.d @ self.c))


class FactoredLoHa(LoHa):
    """The same on the activation: rank r^2, never a dense weight."""

    def change(self, x: Tensor) -> Tensor:
        inner = torch.einsum("...i,ri,qi->...rq", x, self.a, self.c)
        return torch.einsum("...rq,or,oq->...o", inner, self.b, self.d)


class LoKr(Method):
    """kron(C, B A). Yeh et al. 2023 (arXiv:2309.14859)."""

    shapes: ClassVar = {"c": "rr", "a": "2n", "b": "m2"}

    def change(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.kron(self.c, self.b @ self.a))


class KronA(Method):
    """kron(A, B) x as A X B' on the folded activation. Edalati et al. 2022 (arXiv:2212.10650)."""

    shapes: ClassVar = {"a": "rr", "b": "mn"}

    def change(self, x: Tensor) -> Tensor:
        folded = x.reshape(*x.shape[:-1], RANK, -1)
        return (self.a @ folded @ self.b.mT).reshape(*x.shape[:-1], self.outs)


class SoKA(Method):
    """A sum of Kronecker products, each with a singular value. 2025."""

    shapes: ClassVar = {"a": "krr", "sigma": "k", "b": "kmn"}

    def change(self, x: Tensor) -> Tensor:
        folded = x.unflatten(-1, (RANK, -1))
        return torch.einsum("k,...pn,kqp,kmn->...qm", self.sigma, folded, self.a, self.b).flatten(-2)


class TensorTrain(Method):
    """A train of cores over the folded features. Yang et al. 2024, LoRETTA (arXiv:2402.11417)."""

    shapes: ClassVar = {"first": "nmk", "second": "krr"}

    def change(self, x: Tensor) -> Tensor:
        inner = torch.tensordot(x.unflatten(-1, (-1, RANK)), self.first, dims=([-2], [0]))
        return torch.tensordot(inner, self.second, dims=([-1, -3], [0, 1])).flatten(-2)


class Circuit(Method):
    """Small matrices on pairs of axes of the folded features. Chen et al. 2024, QuanTA (arXiv:2406.00132)."""

    shapes: ClassVar = {"first": "nrrn", "second": "rr", "last": "on2", "narrow": "r2"}

    def change(self, x: Tensor) -> Tensor:
        folded = torch.einsum("...nr,nrqt->...tq", x.unflatten(-1, (-1, RANK)), self.first)
        folded = torch.einsum("...tq,qp,pz->...tz", folded, self.second, self.narrow)
        return torch.einsum("otz,...tz->...o", self.last, folded)


class MoRA(Method):
    """A square matrix between fixed maps that fold and unfold features. Jiang et al. 2024 (arXiv:2405.12130)."""

    shapes: ClassVar = {"core": "rr"}

    def change(self, x: Tensor) -> Tensor:
        folded = x.view(*x.shape[:-1], -1, RANK)
        angles = torch.outer(torch.arange(folded.shape[-2]), 1.0 / 10 ** (torch.arange(0, RANK, 2) / RANK))
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        half = torch.cat([-folded[..., RANK // 2 :], folded[..., : RANK // 2]], -1)
        out = ((folded * cos + half * sin) @ self.core).flatten(-2)
        return out.repeat(*[1] * (x.dim() - 1), -(-self.outs // self.ins))[..., : self.outs]


# ------------------------------------------------------------------------- transforms


def cosine(size: int) -> Tensor:
    """The orthonormal matrix of the second discrete cosine transform."""
    table = torch.cos(torch.pi / size * torch.outer(torch.arange(size), torch.arange(size) + 0.5))
    return table * (2 / size) ** 0.5 * torch.cat([torch.tensor([0.5**0.5]), torch.ones(size - 1)])[:, None]


def haar(x: Tensor) -> Tensor:
    """One level of the Haar wavelet along the features: sums, then differences."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even + odd, even - odd], -1) * 0.5**0.5


def unhaar(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.stack([low + high, low - high], -1).flatten(-2) * 0.5**0.5


def hadamard(x: Tensor) -> Tensor:
    """The fast Walsh-Hadamard transform along the features, stage by stage."""
    shape, size, stride = x.shape, x.shape[-1], 1
    while stride < size:
        a, b = x.view(*shape[:-1], size // (2 * stride), 2, stride).unbind(-2)
        x = torch.stack([a + b, a - b], -2)
        stride *= 2
    return x.reshape(shape) / size**0.5


class Spectrum(Method):
    """Few coefficients of a spectrum, at fixed places of an o x i matrix."""

    shapes: ClassVar = {"values": "r3"}

    def spectrum(self) -> Tensor:
        places = torch.arange(self.values.numel())
        table = self.values.new_zeros(self.outs, self.ins)
        table[7 * places % self.outs, 5 * places % self.ins] = 4 * self.values.flatten()
        return table


class FourierFT(Spectrum):
    """The update's two-dimensional spectrum is sparse. Gao et al. 2024 (arXiv:2405.03003)."""

    def change(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.fft.ifft2(self.spectrum()).real * self.outs)


class LoCA(Spectrum):
    """The same with cosines, here on the activation. Du et al. 2025 (arXiv:2502.06820)."""

    def change(self, x: Tensor) -> Tensor:
        into, back = (cosine(size).to(x.dtype) for size in (self.ins, self.outs))
        return x @ into.T @ self.spectrum().T @ back


class WaveFT(Spectrum):
    """The same with wavelets. Bilican et al. 2025 (arXiv:2505.12532)."""

    def change(self, x: Tensor) -> Tensor:
        return unhaar(F.linear(haar(x), self.spectrum()))


class WalshHadamard(Spectrum):
    """The same with the Walsh-Hadamard transform."""

    def change(self, x: Tensor) -> Tensor:
        return hadamard(F.linear(hadamard(x), self.spectrum()))


class Fastfood(Method):
    """Hadamard, diagonal, permutation, Hadamard. Aghajanyan et al. 2020 (arXiv:2012.13255)."""

    shapes: ClassVar = {"b": "i", "g": "i", "tall": "or", "wide": "ri"}

    def change(self, x: Tensor) -> Tensor:
        order = (5 * torch.arange(self.ins) + 3) % self.ins
        mixed = hadamard(hadamard(x * self.b)[..., order] * self.g)
        return F.linear(F.linear(mixed, self.wide), self.tall)


class C3A(Method):
    """Circular convolution of blocks of features. Chen et al. 2024 (arXiv:2407.19342)."""

    shapes: ClassVar = {"kernel": "mnr"}

    def change(self, x: Tensor) -> Tensor:
        blocks = torch.fft.rfft(x.unflatten(-1, (-1, RANK)))
        mixed = torch.einsum("...nf,mnf->...mf", blocks, torch.fft.rfft(self.kernel))
        return torch.fft.irfft(mixed, n=RANK).flatten(-2)


# ------------------------------------------------------------------------- rotations of the input


def cayley(skew: Tensor) -> Tensor:
    """Orthogonal matrices (I + Q) (I - Q)^-1 of the skew parts of [n, r, r]."""
    skew, eye = skew - skew.mT, torch.eye(skew.shape[-1])
    return (eye + skew) @ torch.linalg.inv(eye - skew)


class OFT(Method):
    """A block-diagonal rotation of the inputs. Qiu et al. 2023 (arXiv:2306.07280)."""

    shapes: ClassVar = {"skew": "nrr"}

    def forward(self, x: Tensor) -> Tensor:
        blocks = torch.einsum("...nr,nrq->...nq", x.unflatten(-1, (-1, RANK)), cayley(self.skew))
        return self.base(blocks.reshape(x.shape))


class BOFT(Method):
    """Rotations of blocks that lie apart, a butterfly. Liu et al. 2023 (arXiv:2311.06243)."""

    shapes: ClassVar = {"near": "nrr", "far": "nrr"}

    def forward(self, x: Tensor) -> Tensor:
        x = (x.unflatten(-1, (-1, 1, RANK)) @ cayley(self.near)).flatten(-3)
        apart = x.unflatten(-1, (RANK, -1)).transpose(-1, -2)
        apart = (apart.unsqueeze(-2) @ cayley(self.far)).squeeze(-2)
        return self.base(apart.transpose(-1, -2).flatten(-2))


class HRA(Method):
    """Householder reflections of the inputs, one after the other. Yuan et al. 2024 (arXiv:2405.17484)."""

    shapes: ClassVar = {"u": "ki"}

    def forward(self, x: Tensor) -> Tensor:
        for u in self.u - 1:
            u = u / u.norm()
            x = x - 2 * (x @ u).unsqueeze(-1) * u
        return self.base(x)


class RoAd(Method):
    """Rotations of pairs of outputs. Liao et al. 2024 (arXiv:2409.00119)."""

    shapes: ClassVar = {"theta": "g", "alpha": "g"}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        cos, sin = ((self.alpha * f(self.theta)).repeat_interleave(2) for f in (torch.cos, torch.sin))
        turned = torch.stack([-y[..., 1::2], y[..., ::2]], dim=-1).reshape(y.shape)
        return y * cos + turned * sin


# ------------------------------------------------------------------------- the base taken apart


class LoLDU(Method):
    """A residual, and P L D U with a trained diagonal. Shi et al. 2024 (arXiv:2410.13618)."""

    shapes: ClassVar = {"lower": "or", "diagonal": "r", "upper": "ri"}

    def change(self, x: Tensor) -> Tensor:
        order = torch.arange(self.outs).flip(0)
        return F.linear(F.linear(x, self.upper.triu()) * self.diagonal, self.lower.tril())[..., order] * 1.5


class SVFit(Method):
    """U S V' with trained singular values and no other base. Sun et al. 2024 (arXiv:2409.05926)."""

    shapes: ClassVar = {"u": "os", "sigma": "s", "v": "si"}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.v) * self.sigma, self.u, self.base.bias)


class SVDiff(SVFit):
    """Singular values shifted and kept positive. Han et al. 2023 (arXiv:2303.11305)."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.v.T @ torch.diag(F.relu(self.sigma - 0.7)) @ self.u.T + self.base.bias


class SALT(Method):
    """Large singular values scaled and shifted, the rest of low rank. Elsayed et al. 2025 (arXiv:2503.16055)."""

    shapes: ClassVar = {"u": "os", "sigma": "s", "v": "si", "scale": "r", "shift": "r", "x": "sr", "y": "rs"}

    def forward(self, x: Tensor) -> Tensor:
        large = self.scale * self.sigma[:RANK] + self.shift
        sigma = torch.diag(torch.cat([large, self.sigma[RANK:]])) + self.x @ self.y
        return F.linear(F.linear(F.linear(x, self.v), sigma), self.u, self.base.bias)


class SLTrain(Method):
    """Low rank plus sparse instead of a dense base. Han et al. 2024 (arXiv:2406.02214)."""

    shapes: ClassVar = {"a": "si", "b": "os", "values": "r2"}

    def forward(self, x: Tensor) -> Tensor:
        places = 11 * torch.arange(self.values.numel())
        sparse = (self.b @ self.a).flatten().scatter_add(0, places, self.values.flatten())
        return F.linear(x, sparse.view(self.outs, self.ins), self.base.bias)


METHODS = (
    LoHa, FactoredLoHa, LoKr, KronA, SoKA, TensorTrain, Circuit, MoRA, FourierFT, LoCA, WaveFT, WalshHadamard, Fastfood,
    C3A, OFT, BOFT, HRA, RoAd, LoLDU, SVFit, SVDiff, SALT, SLTrain,
)  # fmt: skip
