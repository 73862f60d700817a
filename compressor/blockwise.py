"""Weights of few bits, with a scale and a zero point for every block of a row: what MatMulNBits of ONNX Runtime reads.

w = (integer - zero) * scale, integers from 0 to 2**bits - 1. Of each block the range is tried whole and clipped, and
the one that keeps the weights best in squares is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # shares of a block's range
ROWS = 1 << 22  # weights that are searched at once


@dataclass(frozen=True)
class Blocks:
    """packed: uint8 [outs, blocks, block * bits / 8]. scales: float32 [outs * blocks]. zeros: uint8, packed by row."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor


def quantise_blocks(weight: Tensor, bits: int, block: int) -> Blocks:
    """weight: [outs, ins], float; the last block of a row is filled up with zeros."""
    parts = [_some(rows, bits, block) for rows in weight.split(max(1, ROWS // weight.shape[1]))]
    integers, scales, zeros = (torch.cat(some) for some in zip(*parts, strict=True))
    return Blocks(pack(integers, bits), scales.reshape(-1), pack(zeros, bits).reshape(-1))


def _some(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    outs, ins = weight.shape
    wide = torch.nn.functional.pad(weight.detach().float(), (0, -ins % block)).reshape(outs, -1, block)
    top = 2**bits - 1
    low, high = wide.amin(2, keepdim=True).clamp(max=0), wide.amax(2, keepdim=True).clamp(min=0)
    least = torch.full_like(low, torch.inf)
    best = (torch.zeros_like(wide), torch.ones_like(low), torch.zeros_like(low))
    for share in CLIPS:
        scale = (high - low) * share / top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = (-low * share / scale).round().clamp(0, top)
        integers = ((wide / scale).round() + zero).clamp(0, top)
        error = ((integers - zero) * scale - wide).square().sum(2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(torch.where(better, a, b) for a, b in zip((integers, scale, zero), best, strict=True))  # type: ignore[assignment]
    integers, scale, zero = best
    return integers.to(torch.uint8), scale[..., 0], zero[..., 0].to(torch.uint8)


def pack(integers: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] of `bits` bits each as bytes, the first in the lowest bits."""
    each = 8 // bits
    if each == 1:
        return integers
    wide = torch.nn.functional.pad(integers, (0, -integers.shape[-1] % each)).unflatten(-1, (-1, each))
    return sum(wide[..., i] << (bits * i) for i in range(each)).to(torch.uint8)  # type: ignore[union-attr]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers of each row of bytes."""
    parts = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(parts, -1).flatten(-2)[..., :count]


def dequantise_blocks(
    packed: Tensor, scales: Tensor, zeros: Tensor, bits: int, block: int, ins: int
) -> Tensor:
    """float32 [outs, ins]."""
    outs, blocks, _ = packed.shape
    integers = unpack(packed, bits, block).float()
    zero = unpack(zeros.reshape(outs, -1), bits, blocks).float()
    return ((integers - zero[..., None]) * scales.float().reshape(outs, blocks, 1)).flatten(1)[:, :ins]


def round_blocks(x: Tensor, block: int) -> Tensor:
    """What is left of x [..., ins] after a round trip through int8, a symmetric scale for every block of columns."""
    ins = x.shape[-1]
    wide = torch.nn.functional.pad(x.float(), (0, -ins % block)).unflatten(-1, (-1, block))
    scale = wide.abs().amax(-1, keepdim=True) / 127
    rounded = (wide / torch.where(scale > 0, scale, torch.ones_like(scale))).round() * scale
    return rounded.flatten(-2)[..., :ins].to(x.dtype)
