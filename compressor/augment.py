"""Images as a small set of them does not hold: mirrored, shifted, mixed with each other.

A student that sees the same pictures every epoch learns them by heart. Its teacher labels whatever it is shown, so
mixtures of pictures that no label would fit are as good to learn from as pictures. Everything is drawn from a generator
that the caller seeds: the same numbers, the same images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ir import Input

_CHANNELS = (1, 3, 4)
_SHIFT = 8  # images move by up to an eighth of their size


def is_image(spec: Input) -> bool:
    """A float input [batch, 1 or 3 or 4, height, width]."""
    return spec.dtype.is_floating_point and len(spec.shape) == 4 and spec.shape[1] in _CHANNELS


def augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Mirrored with probability 1/2, shifted (edges reflected), and half of the batches mixed. [n, c, h, w]."""
    height, width = images.shape[2:]
    rows = _shifted(len(images), height, draw)
    columns = _shifted(len(images), width, draw)
    mirrored = torch.rand(len(images), generator=draw) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    moved = images.permute(0, 2, 3, 1)[
        torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)  # stays in the layout channels last
    return _mixed(moved, draw) if float(torch.rand((), generator=draw)) < 0.5 else moved


def _shifted(count: int, size: int, draw: torch.Generator) -> Tensor:
    """Index of the row that each row of each image shows: int64 [count, size], reflected at the edges."""
    most = size // _SHIFT
    shift = torch.randint(-most, most + 1, (count, 1), generator=draw)
    index = (torch.arange(size) + shift).abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _mixed(images: Tensor, draw: torch.Generator) -> Tensor:
    """Every image blended with another of the batch, by shares drawn evenly from 0 to 1.

    Source: Zhang et al. 2018 (arXiv:1710.09412); without labels, Beyer et al. 2022 (arXiv:2106.05237).
    """
    share = torch.rand((len(images), 1, 1, 1), generator=draw)
    return torch.lerp(images, images[torch.randperm(len(images), generator=draw)], share)
