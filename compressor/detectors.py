"""Detectors: the network inside torchvision's, and what is known of a detector's outputs.

torchvision's SSD and RetinaNet take lists of pictures of any size, and resize, normalise, threshold and suppress in
Python. What compiles is the network between: `bare` makes it, with the anchors of one size as constants. An object
of these classes is told by its class; torchvision is not imported for it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UsageError
from .ir import Input

_CLASSES = {"SSD": "torchvision.models.detection.ssd", "RetinaNet": "torchvision.models.detection.retinanet"}
_SOFTMAX = {"boxes": "pred_boxes", "scores": "logits", "format": "cxcywh", "activation": "softmax",
            "background": "-1"}  # fmt: skip
_SIGMOID = {**_SOFTMAX, "activation": "sigmoid", "background": "none"}
# transformers' `model_type` -> how its own post_process_object_detection reads the outputs
_TRANSFORMERS = {
    **dict.fromkeys(("detr", "yolos", "table-transformer"), _SOFTMAX),
    **dict.fromkeys(("conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"), _SIGMOID),
}


class BareDetector(nn.Module):
    """The network of a torchvision SSD or RetinaNet for pictures of one size, under the detector's own key names.

    images [n, 3, h, w] with values 0 to 1, which it normalises as the detector does -> boxes [n, anchors, 4], corners
    x1, y1, x2, y2 in pixels of the picture, cut at its edges; scores [n, anchors, classes] from 0 to 1, those of an SSD
    with the background as class 0. These are the detector's own before it drops any.
    """

    mean: Tensor
    std: Tensor
    edges: Tensor
    centre: Tensor
    extent: Tensor
    step: Tensor
    growth: Tensor

    def __init__(self, detector: Any, height: int, width: int) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head
        self.softmax = _kind(detector) == "SSD"
        self.clip = detector.box_coder.bbox_xform_clip
        constants = {
            "mean": torch.tensor(detector.transform.image_mean).reshape(1, -1, 1, 1),
            "std": torch.tensor(detector.transform.image_std).reshape(1, -1, 1, 1),
            "edges": torch.tensor([width, height, width, height], dtype=torch.float32),
            **self._anchors(detector, height, width),
        }
        dtype = next(self.backbone.parameters()).dtype
        for name, value in constants.items():  # not persistent: they stand in no checkpoint
            self.register_buffer(name, value.to(dtype), persistent=False)

    @torch.no_grad()
    def _anchors(self, detector: Any, height: int, width: int) -> dict[str, Tensor]:
        """Centre and size of each anchor; what an offset and a growth of one are worth, in pixels and in ratio."""
        from torchvision.models.detection.image_list import ImageList

        like = next(self.backbone.parameters())
        pictures = torch.zeros(2, 3, height, width, dtype=like.dtype, device=like.device)
        sizes = [(height, width)]
        low, high = detector.anchor_generator(ImageList(pictures, sizes), self._features(pictures))[0].split(
            2, 1
        )
        weights = torch.tensor(detector.box_coder.weights, dtype=low.dtype, device=low.device)
        return {
            "centre": (low + high) / 2,
            "extent": high - low,
            "step": (high - low) / weights[:2],
            "growth": 1 / weights[2:],
        }

    def _features(self, images: Tensor) -> list[Tensor]:
        found = self.backbone(images)
        return [found] if isinstance(found, Tensor) else list(found.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        answer = self.head(self._features((images - self.mean) / self.std))
        offset, growth = answer["bbox_regression"].split(2, -1)
        centre = offset * self.step + self.centre
        half = (growth * self.growth).clamp(max=self.clip).exp() * self.extent / 2
        boxes = torch.cat((centre - half, centre + half), -1)
        logits = answer["cls_logits"]
        return {
            "boxes": torch.minimum(boxes.clamp(min=0), self.edges),
            "scores": logits.softmax(-1) if self.softmax else logits.sigmoid(),
        }


def bare(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """The network of a torchvision detector in evaluation mode, for pictures like those; any other model as it is."""
    if _kind(model) is None:
        return model
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].dim() != 4:
        raise UsageError(
            f"{type(model).__name__}: the example must be one batch of pictures of the network's size, values 0 to 1: "
            "a tensor [n, 3, height, width]; a list of pictures has no ONNX form"
        )
    height, width = given[0].shape[2:]
    return BareDetector(model, height, width).eval()


def notice(model: nn.Module) -> str:
    """What the user of a bare network should know."""
    return (
        "captured as the detector's network: pictures of this one size with values 0 to 1, which it normalises itself, "
        "to boxes and scores; add --postprocess nms for detections"
        if isinstance(model, BareDetector)
        else ""
    )


def inputs(model: Any) -> tuple[Input, ...]:
    """What a torchvision detector takes where its class fixes the size; nothing otherwise."""
    size = getattr(model.transform, "fixed_size", None) if _kind(model) else None
    if size is None:
        return ()
    width, height = size
    return (Input("images", torch.float32, ("batch", 3, height, width)),)


def known(model: Any) -> dict[str, str]:
    """Options of `nms(...)` that the class of a model tells; empty for a model of a class that is not known."""
    kind = _kind(model)
    if kind is not None:
        options = {"boxes": "boxes", "scores": "scores", "format": "xyxy", "activation": "none"}
        return {**options, "background": "0" if kind == "SSD" else "none"}
    return dict(_TRANSFORMERS.get(getattr(getattr(model, "config", None), "model_type", ""), {}))


def _kind(model: Any) -> str | None:
    """`SSD` or `RetinaNet` for an object of these classes of torchvision, or of one derived from them."""
    for name, module in _CLASSES.items():
        found = getattr(sys.modules.get(module), name, None)
        if found is not None and isinstance(model, found):
            return name
    return None
