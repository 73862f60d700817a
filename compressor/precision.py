"""Mean average precision of detections, against boxes that somebody drew: COCO's definition, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .batches import Batch
from .errors import DataError, UsageError
from .nms import Detections

COLUMNS = 5  # of a labelled box: x1, y1, x2, y2, class
Run = Callable[..., Sequence[Tensor]]


def are_boxes(labels: Tensor | None) -> bool:
    """Labels [n, most, 5]: opposite corners in the unit of the model, and the class, negative behind the last box."""
    return labels is not None and labels.dim() == 3 and labels.shape[2] == COLUMNS


class AveragePrecision:
    """A metric of whatever runs a detector: `map`, the mean over IoU 0.5 to 0.95, and `map50`, at 0.5; both 0 to 1.

    batches: with labels as `are_boxes` has them, iterated once each time. read: the detections in what a run answers.
    Source: Lin et al. 2014 (arXiv:1405.0312) and https://cocodataset.org/#detection-eval. UsageError where pycocotools
    is missing, DataError where no picture has a box.
    """

    def __init__(self, batches: Iterable[Batch], read: Callable[[Sequence[Tensor]], Detections]) -> None:
        try:
            from pycocotools.coco import COCO
        except ImportError as error:
            raise UsageError(
                "--eval with boxes needs pycocotools: pip install 'compressor[detect]'"
            ) from error
        self.batches, self.read = batches, read
        drawn = [picture for batch in batches if batch.labels is not None for picture in batch.labels]
        self.truth = COCO()
        self.truth.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(drawn))],
            "annotations": list(_annotations(drawn)),
            "categories": [
                {"id": c} for c in sorted({int(box[4]) for one in drawn for box in one if box[4] >= 0})
            ],
        }
        if not self.truth.dataset["annotations"]:
            raise DataError("the evaluation data have no box: their classes are all negative")
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth.createIndex()

    def __call__(self, run: Run) -> dict[str, float]:
        """`map` and `map50` of a run."""
        from pycocotools.cocoeval import COCOeval

        rows: list[NDArray[np.float64]] = []
        first = 0
        for batch in self.batches:
            boxes, scores, labels, count = (value.detach().cpu() for value in self.read(run(*batch.inputs)))
            for i, kept in enumerate(map(int, count)):
                corners = boxes[i, :kept].double().numpy()
                low, high = np.minimum(*np.split(corners, 2, 1)), np.maximum(*np.split(corners, 2, 1))
                told = (
                    np.full(kept, first + i),
                    scores[i, :kept].double().numpy(),
                    labels[i, :kept].double().numpy(),
                )
                rows.append(np.column_stack([told[0], low, high - low, told[1], told[2]]))
            first += len(count)
        seen = np.concatenate(rows) if rows else np.empty((0, 7))
        if not len(seen):
            return {"map": 0.0, "map50": 0.0}
        with contextlib.redirect_stdout(io.StringIO()):
            judged = COCOeval(self.truth, self.truth.loadRes(seen), "bbox")
            judged.evaluate()
            judged.accumulate()
            judged.summarize()
        return {"map": float(judged.stats[0]), "map50": float(judged.stats[1])}


def _annotations(pictures: Sequence[Tensor]) -> Iterable[dict[str, object]]:
    number = 0  # counted from 1: pycocotools takes 0 for none
    for i, picture in enumerate(pictures):
        for x1, y1, x2, y2, label in picture.double().tolist():
            if label >= 0:
                number += 1
                box = [min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)]
                yield {
                    "id": number, "image_id": i, "category_id": int(label), "bbox": box, "area": box[2] * box[3],
                    "iscrowd": 0,
                }  # fmt: skip
