"""torchvision: every classifier, segmentation and detection network, and the video models' smallest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from yolo import Yolo
from zoo import torchvision_model

Made = tuple[nn.Module, tuple[Tensor, ...]]
SAMPLES = 5
# Sizes that an architecture needs; every other classifier takes 64 x 64.
SIZES = {"inception_v3": 96, "maxvit_t": 224, "raft_small": 128}
OPTIONS: dict[str, dict[str, Any]] = {"maxvit_t": {"input_size": (224, 224)}}
OTHERS = ("r3d_18", "mc3_18", "r2plus1d_18", "swin3d_t", "raft_small")  # s3d and MViT take minutes a clip


class Maps(nn.Module):
    """A segmentation network; its maps as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(x).values())


class RawDetector(nn.Module):
    """Backbone, feature pyramid and every head of a detector: what stands before anchors, non-maximum suppression.

    Where heads read regions of interest, a whole feature map pooled to their size stands in for a region.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> list[Tensor]:
        model = self.detector
        features = model.backbone(x)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        if not hasattr(model, "rpn"):
            return list(model.head(maps).values())
        scores, boxes = model.rpn.head(maps)
        heads, found = model.roi_heads, [*scores, *boxes]
        found += heads.box_predictor(heads.box_head(F.adaptive_avg_pool2d(maps[0], 7)))
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"{kind}_head", None) is not None:
                region = F.adaptive_avg_pool2d(maps[0], 14)
                found.append(getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(region)))
        return found


class Flow(nn.Module):
    """RAFT, one refinement."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.model(first, second, num_flow_updates=1)[-1]


def _classifier(name: str) -> Made:
    options, size = OPTIONS.get(name, {}), SIZES.get(name, 64)
    if name.startswith("vit_"):
        options = {"image_size": 64 if "16" in name or "32" in name else 56}
        size = options["image_size"]
    return torchvision_model(name, **options), (torch.randn(SAMPLES, 3, size, size),)


def _segmentation(name: str) -> Made:
    model = torchvision_model(name, weights_backbone=None, num_classes=21)
    return Maps(model), (torch.randn(SAMPLES, 3, 64, 64),)


def _detector(name: str) -> Made:
    model = torchvision_model(name, weights_backbone=None)
    size = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name, 128)
    return RawDetector(model).eval(), (torch.randn(3, 3, size, size),)


def _video(name: str) -> Made:
    model = torchvision_model(name)
    return model, (torch.randn(3, 3, 8, 64, 64),)


def _raft(name: str) -> Made:
    return Flow(torchvision_model(name)).eval(), tuple(torch.randn(3, 3, 128, 128) for _ in range(2))


def _yolo(name: str) -> Made:
    return Yolo(classes=20).eval(), (torch.randn(SAMPLES, 3, 64, 64),)


def models() -> dict[str, Callable[[], Made]]:
    found: dict[str, Callable[[], Made]] = {}
    packages = (
        (torchvision.models, _classifier),
        (torchvision.models.segmentation, _segmentation),
        (torchvision.models.detection, _detector),
    )
    for package, make in packages:
        for name in torchvision.models.list_models(module=package):
            found[name] = functools.partial(make, name)
    found |= {name: functools.partial(_raft if name.startswith("raft") else _video, name) for name in OTHERS}
    return found | {"yolo (C2f, SPPF, DFL)": functools.partial(_yolo, "yolo")}
