"""Detections matched with another model's: how much of what the float model finds is found again, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .batches import Batch
from .nms import Detections, overlap

IOU = 0.5
SAME = 1e-4  # of the largest corner: boxes that differ by less are one
Run = Callable[..., Sequence[Tensor]]


class Matches:
    """Sums over pictures. Each detection, best first, takes the reference's one of its class that it overlaps most.

    overlap: the least intersection over union at which two boxes are one object.
    """

    def __init__(self, least: float = IOU) -> None:
        self.least = least
        self.expected = self.seen = self.matched = 0
        self.iou = self.difference = 0.0

    def update(self, reference: Detections, seen: Detections) -> None:
        """Detections of the same pictures: boxes, scores, labels and count, as `compressor::nms` returns them."""
        for i in range(len(reference[3])):
            ours, theirs = _picture(seen, i), _picture(reference, i)
            self.expected += len(theirs[1])
            self.seen += len(ours[1])
            self._match(*theirs, *ours)

    def _match(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, mine: Tensor, rated: Tensor, named: Tensor
    ) -> None:
        free = torch.ones(len(scores), dtype=torch.bool)
        low, high = torch.minimum(*boxes.split(2, 1)), torch.maximum(*boxes.split(2, 1))
        for box, score, label in zip(mine, rated, named, strict=True):
            corners = torch.minimum(*box.split(2)), torch.maximum(*box.split(2))
            shares = overlap(*corners, low, high)
            # a box that was cut to a line at the picture's edge overlaps nothing, not even itself
            shares = torch.where(((boxes - box).abs() <= SAME * box.abs().max()).all(1), 1.0, shares)
            shares = shares * (free & (labels == label))
            if len(shares) and float(shares.max()) >= self.least:
                best = int(shares.argmax())
                free[best] = False
                self.matched += 1
                self.iou += float(shares[best])
                self.difference += abs(float(score - scores[best]))

    def metrics(self) -> dict[str, float]:
        """By name; nothing where the reference detects nothing, which says nothing.

        recall: share of the reference's detections found again. precision: share of those seen that the reference has.
        iou: mean overlap of the pairs. score_change: mean change of their scores.
        """
        if not self.expected:
            return {}
        pairs = max(self.matched, 1)
        return {
            "recall": self.matched / self.expected,
            "precision": self.matched / self.seen if self.seen else 0.0,
            "iou": self.iou / pairs,
            "score_change": self.difference / pairs,
        }


def _picture(found: Detections, i: int) -> tuple[Tensor, Tensor, Tensor]:
    boxes, scores, labels, count = found
    kept = slice(int(count[i]))
    return boxes[i, kept], scores[i, kept], labels[i, kept]


class FoundAgain:
    """A metric of whatever runs the model: its detections, matched with those of the original.

    original: answers the detections that are to be found. batches: what both are run on, iterated once each time.
    read: the detections in what a run answers.
    """

    def __init__(
        self,
        original: Callable[..., Detections],
        batches: Iterable[Batch],
        read: Callable[[Sequence[Tensor]], Detections],
    ) -> None:
        self.batches, self.read = batches, read
        self.wanted = [original(*batch.inputs) for batch in batches]

    @property
    def nothing(self) -> bool:
        """True where the original detects nothing, and no answer could be told from another."""
        return not any(int(count.sum()) for *_, count in self.wanted)

    def __call__(self, run: Run) -> dict[str, float]:
        """`Matches.metrics` of a run."""
        found = Matches()
        for batch, reference in zip(self.batches, self.wanted, strict=True):
            found.update(reference, self.read(run(*batch.inputs)))
        return found.metrics()
