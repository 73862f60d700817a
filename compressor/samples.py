"""Samples of a stream, drawn in any order: what a trainer needs, and a stream does not give."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .batches import Reader, rows_of
from .data import Data
from .ir import Input
from .spill import spilling

IN_MEMORY = 1 << 28  # bytes of samples held in memory; more lie in mapped files

Place = tuple[int, int]  # batch of the stream, row of the batch
Inputs = tuple[Tensor, ...]


class Samples:
    """Every sample of a stream, by its place. Samples of one shape can stand in one batch.

    fixed: the model's batch size where its batch axis is static, else None. A model without a batch axis takes the
    batches as they are.
    """

    def __init__(self, data: Data, inputs: Sequence[Input]) -> None:
        reader = Reader(inputs)
        self.batched, self.fixed = reader.batched, reader.fixed
        self.batches: list[Inputs] = []
        self.bytes = 0
        keep = spilling()
        for batch in data:
            self.bytes += sum(t.nbytes for t in batch.inputs)
            spill = self.bytes > IN_MEMORY
            self.batches.append(tuple(keep(t.contiguous()) if spill else t.detach() for t in batch.inputs))
        self._shapes = [self._shape(batch, i) for i, batch in enumerate(self.batches)]

    def places(self) -> list[Place]:
        rows = [rows_of(batch, self.batched) for batch in self.batches]
        return [(i, row) for i, count in enumerate(rows) for row in range(count)]

    def fingerprint(self) -> str:
        """SHA-256 over shapes and bytes of all samples."""
        digest = hashlib.sha256()
        for tensor in (t for batch in self.batches for t in batch):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def gather(self, places: Sequence[Place]) -> Inputs:
        """One batch of the samples at these places, which must be of one shape."""
        first = self.batches[places[0][0]]
        if not any(self.batched):
            return first
        return tuple(
            torch.stack([self.batches[i][k][row] for i, row in places]) if one else first[k]
            for k, one in enumerate(self.batched)
        )

    def grouped(
        self, places: Sequence[Place], size: int, draw: torch.Generator | None = None
    ) -> list[list[Place]]:
        """Batches of `size` (the model's own where that is static), in an order drawn at random if `draw` is given.

        What does not fill a batch is left out when drawing, for another epoch, unless it is all there is.
        """
        size = self.fixed or size if any(self.batched) else 1
        order = list(places) if draw is None else [places[i] for i in _drawn(len(places), draw)]
        shapes: dict[object, list[Place]] = {}
        for place in order:
            shapes.setdefault(self._shapes[place[0]], []).append(place)
        batches = [b for group in shapes.values() for b in self._cut(group, size, draw is not None)]
        return batches if draw is None else [batches[i] for i in _drawn(len(batches), draw)]

    def _cut(self, group: list[Place], size: int, drop: bool) -> Iterator[list[Place]]:
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            whole = len(batch) == size
            if whole or (self.fixed is None and (start == 0 or not drop)):
                yield batch

    def _shape(self, batch: Inputs, number: int) -> object:
        """Equal for batches whose samples can be mixed; inputs without a batch axis must be equal."""
        key: list[object] = []
        for tensor, first, one in zip(batch, self.batches[0], self.batched, strict=True):
            same = tensor.shape == first.shape and torch.equal(tensor, first)
            key.append(tuple(tensor.shape[1:]) if one else 0 if same else number)
        return tuple(key)


def _drawn(count: int, draw: torch.Generator) -> list[int]:
    return torch.randperm(count, generator=draw).tolist()
