"""Detectors in integers: what is lost output by output, how many detections are found again, and how fast they are.

    python benchmarks/detectors.py                 all of them
    python benchmarks/detectors.py ssdlite yolo    those named

Random weights with power (`tests/zoo.py`), smooth random pictures: 32, one in five of them held out. The last layers
are scaled down so that scores are not all 0 or 1; `conf` is where the float model finds about 30 things a picture.
*outputs*: SQNR of each raw output against the model as it came. *found*, *right*: share of the float model's detections
that the emitted file finds again, and of its own that the float model has (same class, IoU over 0.5). *IoU*, *score*:
mean of the pairs, and mean change of their scores. *file*: share of detections that file and simulation have in common.
*speed*: how many times faster than the float file, both ending in suppression; batch 1, one thread, in turns.

Random networks are the worst case for *found*: their scores crowd at the threshold, and no object stands out.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from zoo import torchvision_model, with_power  # noqa: E402, I001  defines what torchvision needs, before it is imported

from yolo import AnchoredYolo  # noqa: E402
import compressor  # noqa: E402
from compressor import detectors, heads, measure  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.errors import CompressorError  # noqa: E402
from compressor.postprocess import Nms  # noqa: E402

SAMPLES, FOUND = 32, 30
PASSES = "fold,int8(rounding=nearest,equalise=false)"
Made = tuple[nn.Module, Tensor]


def pictures(size: int) -> Tensor:
    """Smooth noise from 0 to 1: neighbouring pixels of a picture are alike."""
    coarse = torch.rand(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def quieter(layers: list[nn.Module], share: float) -> None:
    for layer in layers:
        layer.weight.data *= share


def of_torchvision(name: str, size: int, share: float) -> Made:
    model, x = torchvision_model(name, weights_backbone=None), pictures(size)
    with_power(detectors.bare(model, (x,), {}), x[:8])
    parts = (model.head.classification_head, model.head.regression_head)
    if name.startswith("ssd"):
        quieter([block[1] for part in parts for block in part.module_list], share)
    else:
        quieter([parts[0].cls_logits, parts[1].bbox_reg], share)
    return model, x


def yolo() -> Made:
    model, x = AnchoredYolo(160, classes=20, width=16).eval(), pictures(160)
    with_power(model.net, x[:8])
    quieter([branch[2] for branch in model.net.head.cv3], 0.1)
    return model, x


def detr() -> Made:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        encoder_layers=3, decoder_layers=3, d_model=128, encoder_ffn_dim=512, decoder_ffn_dim=512,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=100, num_labels=20,
    )  # fmt: skip
    x = pictures(224)
    return with_power(DetrForObjectDetection(config).eval(), x[:8]), x


def yolos() -> Made:
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=[224, 224],
        num_detection_tokens=100, num_labels=20,
    )  # fmt: skip
    x = pictures(224)
    return with_power(YolosForObjectDetection(config).eval(), x[:8]), x


MODELS: dict[str, Callable[[], Made]] = {
    "ssdlite": lambda: of_torchvision("ssdlite320_mobilenet_v3_large", 160, 0.1),
    "retinanet": lambda: of_torchvision("retinanet_resnet50_fpn", 128, 0.1),
    "yolo": yolo,
    "detr": detr,
    "yolos": yolos,
}


def threshold(model: nn.Module, x: Tensor, iou: float) -> float:
    """Where the float model finds about as many things a picture as wanted."""
    graph = capture(model, x[:2])
    plan = heads.plan(graph, Nms(iou=iou, conf=0.0, max=4 * FOUND), detectors.known(model))
    _, scores, *_ = plan.of(graph.outputs, graph.run(x[:8]))
    return float(scores[:, FOUND].mean())


def row(name: str) -> str:
    model, x = MODELS[name]()
    iou = 1.0 if name == "detr" else 0.5
    conf = threshold(model, x, iou)
    with tempfile.TemporaryDirectory() as folder:
        made = compressor.compress(
            model, x[:2], passes=PASSES, calibration=x, output=Path(folder) / "out",
            postprocess=f"nms(iou={iou},conf={conf:.4f},max=100)",
        ).report  # fmt: skip
    emitted, last = made["emitted"], made["rows"][-1]
    found = emitted["metric"]
    outputs: dict[str, float] = {}
    for check in last["checks"]:
        if isinstance(check["sqnr_db"], float):
            key = f"{check['output']}{check['slice']}"
            outputs[key] = min(outputs.get(key, 999.0), check["sqnr_db"])
    agreed = next(c["agreement"] for c in emitted["checks"] if c["output"].startswith("detections"))
    latency = emitted["latency"]
    cells = [
        name, f"{x.shape[-1]}", f"{conf:.3f}", ", ".join(f"{k} {v:.1f} dB" for k, v in sorted(outputs.items())),
        f"{found['recall']:.1%}", f"{found['precision']:.1%}", f"{found['iou']:.3f}", f"{found['score_change']:.4f}",
        f"{agreed:.1%}", f"{latency['float']['median_ms']:.1f}", f"{latency['model']['median_ms']:.1f}",
        f"{latency['ratio']:.2f}x",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(f"{datetime.date.today()}; {measure.versions()}; {measure.machine()}\n")
    print(
        "| model | size | conf | outputs | found | right | IoU | score | file | float ms | int8 ms | speed |"
    )
    print(f"|{'---|' * 12}")
    for name in sys.argv[1:] or MODELS:
        try:
            print(row(name), flush=True)
        except CompressorError as error:
            print(f"| {name} | {type(error).__name__}: {error} |{' |' * 10}", flush=True)


if __name__ == "__main__":
    main()
