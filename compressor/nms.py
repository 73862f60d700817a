"""Non-maximum suppression as one operator: with a kernel for PyTorch, and its translation to ONNX.

Outputs have a fixed size and a count, as TensorRT's and TensorFlow Lite's detectors have them: an app allocates its
buffers once, a batch is a batch, and no axis of the model's answer depends on what is in the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Detections = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("compressor::nms", mutates_args=())
def nms(
    boxes: Tensor, scores: Tensor, iou: float, conf: float, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best boxes of each class: those over `conf` that no better one of the same class overlaps by more than `iou`.

    boxes [n, candidates, 4], two opposite corners; scores [n, classes, candidates], both float32. A box may be found
    once for each class. Returns boxes [n, most, 4], scores [n, most], labels [n, most] and count [n] (int32): the
    `count` best by score; of equal scores the lower class, then the earlier candidate, first. Behind them stand boxes
    and scores of 0 and labels of -1. Source: ONNX's NonMaxSuppression, whose comparisons these are (both strict).
    """
    found = boxes.new_zeros(len(boxes), most, 4), boxes.new_zeros(len(boxes), most)
    labels = torch.full((len(boxes), most), -1, dtype=torch.int32, device=boxes.device)
    count = labels.new_zeros(len(boxes))
    for i in range(len(boxes)):
        places = _kept(boxes[i], scores[i], iou, conf, most)
        kept, count[i] = slice(len(places)), len(places)
        found[0][i, kept] = boxes[i, places % boxes.shape[1]]
        found[1][i, kept] = scores[i].flatten()[places]
        labels[i, kept] = (places // boxes.shape[1]).int()
    return *found, labels, count


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, conf: float, most: int) -> Detections:
    n, whole = boxes.shape[0], torch.int32
    shapes = boxes.new_empty(n, most, 4), boxes.new_empty(n, most)
    return *shapes, boxes.new_empty(n, most, dtype=whole), boxes.new_empty(n, dtype=whole)


def _kept(boxes: Tensor, scores: Tensor, iou: float, conf: float, most: int) -> Tensor:
    """Positions in the flat scores [classes, candidates] of one picture, best first.

    All classes in one order: the best `most` of all that are kept are the first `most` that are.
    """
    flat = scores.flatten()
    left = (flat > conf).nonzero()[:, 0]
    left = left[flat[left].argsort(descending=True, stable=True)]
    low, high = torch.minimum(*boxes.split(2, 1)), torch.maximum(*boxes.split(2, 1))
    kept: list[Tensor] = []
    while len(left) and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(best)
        same = left // len(boxes) == best // len(boxes)
        place, others = best % len(boxes), left % len(boxes)
        left = left[~(same & (overlap(low[place], high[place], low[others], high[others]) > iou))]
    return torch.stack(kept) if kept else left


def overlap(low: Tensor, high: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
    """Intersection over union of one box with others, by their lower and upper corners; 0 for a box of no area."""
    inside = (torch.minimum(high, highs) - torch.maximum(low, lows)).clamp(min=0).prod(-1)
    area, areas = (high - low).prod(-1), (highs - lows).prod(-1)
    ratio = inside / (area + areas - inside)
    return torch.where((inside > 0) & (area > 0) & (areas > 0), ratio, torch.zeros_like(ratio))


def translations() -> dict[Any, Callable[..., Any]]:
    """What torch.onnx writes for it: the suppression, whose answer is a list, put back on a table of all scores.

    The best of every row of that table are its detections; of equal values TopK takes the earlier, as the kernel does.
    """
    from onnxscript import opset18

    op: Any = opset18

    def write(boxes: Any, scores: Any, iou: float, conf: float, most: int) -> Any:
        def whole(*values: int) -> Any:
            return op.Constant(value_ints=list(values))

        def single(value: float) -> Any:
            return op.Constant(value_float=value)

        limit = op.Constant(value_floats=[conf])
        picked = op.NonMaxSuppression(
            boxes, scores, whole(most), op.Constant(value_floats=[iou]), limit
        )  # rows of picture, class, candidate
        picture, label, candidate = op.Split(picked, axis=1, num_outputs=3)
        pictures, classes, candidates = op.Split(op.Shape(scores), axis=0, num_outputs=3)
        place = op.Concat(picture, op.Add(op.Mul(label, candidates), candidate), axis=1)
        width = op.Add(op.Mul(classes, candidates), whole(most))  # never fewer than are asked for
        table = op.ConstantOfShape(op.Concat(pictures, width, axis=0))
        table = op.ScatterND(table, place, op.GatherND(scores, picked))
        values, places = op.TopK(table, whole(most))
        found = op.Greater(values, limit)
        count = op.ReduceSum(op.Cast(found, to=6), whole(1), keepdims=0)
        labels = op.Div(places, candidates)
        row = op.Where(found, op.Sub(places, op.Mul(labels, candidates)), whole(0))
        corners = op.GatherND(boxes, op.Unsqueeze(row, whole(2)), batch_dims=1)
        return (
            op.Where(op.Unsqueeze(found, whole(2)), corners, single(0.0)),
            op.Where(found, values, single(0.0)),
            op.Cast(op.Where(found, labels, whole(-1)), to=6),
            count,
        )

    return {torch.ops.compressor.nms.default: write}
