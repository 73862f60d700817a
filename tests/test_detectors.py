"""Detectors: their networks captured, suppression at their end, detections found again; each check broken once."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from yolo import AnchoredYolo
from zoo import torchvision_model, with_power

import compressor
from compressor import api, detections, detectors, heads, nms, postprocess, runtime
from compressor.capture import capture
from compressor.data import synthetic
from compressor.emit import emit
from compressor.errors import ContractError, UsageError
from compressor.matching import FoundAgain, Matches

SSDLITE = "ssdlite320_mobilenet_v3_large"


def plan_of(graph, words, known=None):
    return heads.plan(graph, postprocess.parse(words), known or {})


# ------------------------------------------------------------------------------ the operator


def reference_nms(boxes: NDArray, scores: NDArray, iou: float, conf: float, most: int):
    """What torchvision.ops.batched_nms and a cut to the best do, for one picture: pairs (class, candidate)."""
    kept = []
    for label, row in enumerate(scores):
        order = [j for j in np.argsort(-row, kind="stable") if row[j] > conf]
        while order:
            best, order = order[0], order[1:]
            kept.append((label, best))
            order = [
                j for j, share in zip(order, _iou(boxes[best], boxes[order]), strict=True) if not share > iou
            ]
    return sorted(kept, key=lambda pair: -scores[pair])[:most]


def _iou(a: NDArray, b: NDArray) -> NDArray:
    sides = np.minimum(a[2:], b[:, 2:]) - np.maximum(a[:2], b[:, :2])
    inside = sides.clip(0).prod(1)
    return inside / np.maximum((a[2:] - a[:2]).prod() + (b[:, 2:] - b[:, :2]).prod(1) - inside, 1e-12)


class Suppress(nn.Module):
    def __init__(self, iou: float, conf: float, most: int) -> None:
        super().__init__()
        self.settings = (iou, conf, most)

    def forward(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        return nms.nms(boxes, scores, *self.settings)


def candidates(n: int, tied: bool, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 40, 2, generator=generator) * 8
    boxes = torch.cat((low, low + 1 + 4 * torch.rand(n, 40, 2, generator=generator)), -1)
    scores = torch.rand(n, 3, 40, generator=generator)
    return (boxes.round(), (10 * scores).round() / 10) if tied else (boxes, scores)


def test_the_operator_is_torchvisions_suppression():
    for seed in range(6):
        boxes, scores = candidates(2, seed % 2 == 1, seed)
        found, rated, labels, count = nms.nms(boxes, scores, 0.45, 0.3, 40)
        for i in range(2):
            wanted = reference_nms(boxes[i].numpy(), scores[i].numpy(), 0.45, 0.3, 40)
            kept = slice(int(count[i]))
            assert int(count[i]) == len(wanted) > 5
            assert labels[i, kept].tolist() == [label for label, _ in wanted]
            assert torch.equal(found[i, kept], boxes[i, [j for _, j in wanted]])
            assert rated[i, kept].tolist() == [float(scores[i][pair]) for pair in wanted]
        other = nms.nms(boxes, scores, 0.9, 0.3, 40)
        assert not torch.equal(other[0], found)  # the threshold tells


def test_behind_the_count_everything_is_empty():
    boxes, scores = candidates(2, False, 0)
    found, rated, labels, count = nms.nms(
        boxes, scores * torch.tensor([0.0, 1.0])[:, None, None], 0.5, 0.9, 30
    )
    assert count[0] == 0 < count[1] < 30
    for i, number in enumerate(count.tolist()):
        assert (
            not found[i, number:].any() and not rated[i, number:].any() and (labels[i, number:] == -1).all()
        )


def test_onnx_runtime_gives_the_same_bits(tmp_path):
    """Ties, nothing over conf, more places than candidates, and every batch from one file."""
    for most in (12, 200):
        graph = capture(Suppress(0.5, 0.6, most), candidates(2, False, 0))
        session = runtime.session(emit(graph, tmp_path / "m.onnx").path)
        for seed, share in enumerate((1.0, 1.0, 1.0, 0.5)):
            boxes, scores = candidates(1 + seed, seed % 2 == 0, seed)
            expected = graph.run(boxes, scores * share)
            seen = runtime.run(session, [boxes.numpy(), (scores * share).numpy()])
            assert all(np.array_equal(a.numpy(), b) for a, b in zip(expected, seen, strict=True))
            assert bool(expected[3].any()) == (share == 1)


# ------------------------------------------------------------------------------ networks


@pytest.fixture(scope="module")
def ssdlite() -> nn.Module:
    model = torchvision_model(SSDLITE, weights_backbone=None, num_classes=4)
    x = pictures(96, 12)
    with_power(detectors.bare(model, (x,), {}), x)
    for head in (model.head.classification_head, model.head.regression_head):
        for block in head.module_list:
            block[1].weight.data *= 0.1
    return model


def pictures(size: int, count: int) -> Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def theirs(model: nn.Module, x: Tensor, monkeypatch) -> list[dict[str, Tensor]]:
    """torchvision's own detections, its missing compiled operator written above."""
    import torchvision

    def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        kept = reference_nms(boxes.double().numpy(), scores[None].numpy(), threshold, -1.0, len(boxes))
        return torch.tensor([j for _, j in kept], dtype=torch.int64)

    monkeypatch.setattr(torchvision.ops.boxes, "nms", suppress)
    monkeypatch.setattr(model.transform, "fixed_size", tuple(x.shape[:1:-1]), raising=False)
    monkeypatch.setattr(model.transform, "min_size", (x.shape[-1],))
    model.score_thresh, model.nms_thresh, model.detections_per_img = 0.3, 0.5, 20
    model.topk_candidates = 10_000
    with torch.no_grad():
        return model(list(x))


@pytest.mark.parametrize("name", ["ssdlite", "retinanet"])
def test_torchvisions_detectors_are_their_networks(name, ssdlite, monkeypatch):
    x = pictures(96, 2)
    if name == "ssdlite":
        model = ssdlite
    else:
        model = torchvision_model("retinanet_resnet50_fpn", weights_backbone=None, num_classes=4)
        with_power(detectors.bare(model, (x,), {}), x)
        model.head.classification_head.cls_logits.weight.data *= 0.1
        model.head.regression_head.bbox_reg.weight.data *= 0.1
    graph = capture(model, x)
    assert graph.outputs == ("boxes", "scores") and graph.inputs[0].shape == ("batch", 3, 96, 96)
    keys = set(model.state_dict())
    assert (
        set(detectors.bare(model, (x,), {}).state_dict()) == keys
    )  # own checkpoints load by their own names
    assert graph.parameters <= keys
    plan = plan_of(graph, "nms(iou=0.5,conf=0.3,max=20)", detectors.known(model))
    boxes, scores, labels, count = plan.of(graph.outputs, graph.run(x))
    for i, expected in enumerate(theirs(model, x, monkeypatch)):
        kept = slice(int(count[i]))
        assert int(count[i]) == len(expected["scores"]) > 5
        assert labels[i, kept].tolist() == expected["labels"].tolist()
        assert torch.allclose(scores[i, kept], expected["scores"], atol=1e-5)
        assert torch.allclose(boxes[i, kept], expected["boxes"], atol=1e-3)


def test_an_ssd_says_what_it_takes(ssdlite):
    assert str(detectors.inputs(ssdlite)[0]) == "images:f32[batch,3,320,320]"
    assert detectors.inputs(nn.ReLU()) == () and detectors.known(nn.ReLU()) == {}
    with pytest.raises(UsageError, match="one batch of pictures"):
        capture(ssdlite, ([torch.rand(3, 96, 96)],))


# ------------------------------------------------------------------------------ inference


class Ends(nn.Module):
    """Outputs by name from one input [n, 6, 4 + classes]."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor):
        return self.make(x)


def ending(make):
    return capture(Ends(make), torch.rand(2, 6, 9))


def test_a_yolo_head_is_read_without_a_word():
    graph = capture(AnchoredYolo(64, classes=5, width=8).eval(), torch.randn(2, 3, 64, 64))
    plan = plan_of(graph, "nms")
    assert (plan.columns, plan.format, plan.activation, plan.background) == (True, "cxcywh", "none", None)
    assert plan.classes == 5 and plan.options == postprocess.Nms()


@pytest.mark.parametrize(
    ("make", "words", "told"),
    [
        # keypoints behind the scores would be classes
        (
            lambda x: torch.cat((x[..., :4].mT, x[..., 4:5].sigmoid().mT, x[..., 5:].mT), 1),
            "nms",
            "which outputs",
        ),
        (lambda x: {"boxes": x[..., :4], "scores": x[..., 4:].sigmoid()}, "nms", "format=xyxy"),
        (lambda x: {"pred_boxes": x[..., :4], "logits": x[..., 4:]}, "nms", "activation=sigmoid"),
        (
            lambda x: {"pred_boxes": x[..., :4], "logits": x[..., 4:]},
            "nms(activation=softmax)",
            "background=CLASS",
        ),
        (lambda x: {"pred_boxes": x[..., :4], "scores": x[..., 4:].softmax(-1)}, "nms", "background=CLASS"),
        (lambda x: {"boxes": x[..., :4], "scores": x[..., 4:].mT}, "nms", "boxes are .n, candidates, 4"),
        (lambda x: {"boxes": x[..., :4], "scores": x[..., 4:].sigmoid()}, "nms(boxes=box)", "no such output"),
        (
            lambda x: {"pred_boxes": x[..., :4], "scores": x[..., 4:].sigmoid()},
            "nms(background=7)",
            "classes 0 to 4",
        ),
    ],
)
def test_what_is_not_certain_is_asked_for(make, words, told):
    with pytest.raises(UsageError, match=told):
        plan_of(ending(make), words)


@pytest.mark.parametrize(
    "words", ["nms(iou=2)", "nms(max=0)", "nms(conf=1)", "nms(background=x)", "soft", "nms,nms"]
)
def test_wrong_words_are_refused(words):
    with pytest.raises(UsageError):
        postprocess.parse(words)


def test_forms_are_read_as_they_are_named():
    """Corners or centres, rows or columns, with and without a background: the same detections."""
    x = torch.rand(2, 6, 9, generator=torch.Generator().manual_seed(0))
    low, size, logits = x[..., :2] * 9, 1 + x[..., 2:4], 6 * x[..., 4:] - 3
    corners, centres = torch.cat((low, low + size), -1), torch.cat((low + size / 2, size), -1)
    expected = nms.nms(
        corners, logits.softmax(-1).mT.contiguous() * torch.tensor([0.0, 1, 1, 1, 1])[:, None], 0.5, 0.1, 9
    )

    def seen(boxes: Tensor, scores: Tensor, words: str):
        graph = capture(
            Ends(lambda a, b=boxes, c=scores: {"p": b + 0 * a[:, :1, :1], "q": c + 0 * a[:, :1, :1]}), x
        )
        plan = plan_of(graph, f"nms(conf=0.1,max=9,boxes=p,scores=q,{words})")
        return plan.of(graph.outputs, graph.run(x))

    for found in (
        seen(corners, logits, "format=xyxy,activation=softmax,background=0"),
        seen(centres, logits, "format=cxcywh,activation=softmax,background=-5"),
        seen(centres.mT, logits.softmax(-1).mT, "format=cxcywh,activation=none,background=0"),
    ):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True))
    wrong = seen(centres, logits, "format=xyxy,activation=softmax,background=0")
    assert not torch.allclose(wrong[0], expected[0], atol=1e-2)


def test_doubts_about_a_plan_are_said():
    graph = ending(lambda x: {"boxes": x[..., :4], "scores": 5 * x[..., 4:]})
    (turned, outside) = plan_of(graph, "nms(format=xyxy,activation=none)").doubts(graph)
    assert "format=cxcywh?" in turned and "activation=sigmoid" in outside


def test_transformers_detectors_are_known_by_their_type():
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[32, 32],
        num_detection_tokens=10, num_labels=3,
    )  # fmt: skip
    model = YolosForObjectDetection(config).eval()
    graph = capture(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    plan = plan_of(graph, "nms(conf=0.1,max=5)", detectors.known(model))
    assert (plan.format, plan.activation, plan.background, plan.classes) == ("cxcywh", "softmax", -1, 4)
    shipped = plan.applied(graph)
    assert shipped.outputs == ("last_hidden_state", "boxes", "scores", "labels", "count")
    labels, count = shipped.run(*graph.example)[3:]
    assert int(labels.max()) < 3 and count.sum() > 0  # the last class is no object


# ------------------------------------------------------------------------------ found again


def of_one(boxes, scores, labels):
    return torch.tensor([boxes]), torch.tensor([scores]), torch.tensor([labels]), torch.tensor([len(scores)])


def test_a_box_without_area_is_itself():
    boxes = torch.tensor([[[5.0, 0.0, 90.0, 0.0], [5.0, 0.0, 60.0, 0.0]]])  # cut at the picture's upper edge
    found = boxes, torch.tensor([[0.9, 0.8]]), torch.tensor([[1, 1]]), torch.tensor([2])
    matches = Matches(0.999)
    matches.update(found, found)
    assert matches.metrics() == {"recall": 1.0, "precision": 1.0, "iou": 1.0, "score_change": 0.0}
    other = boxes + torch.tensor([0.0, 0.0, 9.0, 0.0]), *found[1:]
    matches = Matches(0.999)
    matches.update(found, other)
    assert matches.metrics()["recall"] == 0.0


def test_detections_are_matched_by_class_and_overlap():
    reference = of_one([[0.0, 0, 4, 4], [10, 10, 14, 14], [20, 20, 24, 24]], [0.9, 0.8, 0.7], [1, 2, 1])
    seen = of_one(
        [[0.0, 0, 4, 4], [0, 0, 4, 3], [10, 10, 14, 14], [20, 20, 24, 22.8]],
        [0.8, 0.7, 0.6, 0.5],
        [1, 1, 1, 1],
    )
    matches = Matches()
    matches.update(reference, seen)
    found = matches.metrics()  # a second one of the same object, another class, 0.7 of a box
    assert found == pytest.approx({"recall": 2 / 3, "precision": 2 / 4, "iou": 0.85, "score_change": 0.15})
    nothing = (*of_one([[0.0, 0, 0, 0]], [0.0], [-1])[:3], torch.tensor([0]))
    empty = Matches()
    empty.update(nothing, seen)
    assert empty.metrics() == {} and FoundAgain(lambda: nothing, [_Empty()], lambda x: x).nothing


class _Empty:
    inputs = ()


# ------------------------------------------------------------------------------ from end to end


@pytest.fixture(scope="module")
def yolo() -> nn.Module:
    model, x = AnchoredYolo(64, classes=5, width=8).eval(), pictures(64, 8)
    with_power(model.net, x)
    for boxes, scores in zip(model.net.head.cv2, model.net.head.cv3, strict=True):
        boxes[2].weight.data *= 2
        scores[2].weight.data *= 0.1
    return model


class TwoMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU6(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU6())
        self.second = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU6())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x)
        return {"0": first, "1": self.second(first)}


@pytest.fixture(scope="module")
def small_ssd() -> nn.Module:
    """torchvision's SSD with SSDLite's head on a small backbone."""
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead

    anchors = DefaultBoxGenerator([[2], [2]], min_ratio=0.2, max_ratio=0.6)
    head = SSDLiteHead([16, 24], anchors.num_anchors_per_location(), 4, nn.BatchNorm2d)
    model, x = SSD(TwoMaps(), anchors, (64, 64), 4, head=head).eval(), pictures(64, 12)
    with_power(detectors.bare(model, (x,), {}), x)
    return model


INT8 = {"passes": "fold,int8(rounding=nearest,equalise=false)", "measure": False}


@pytest.mark.parametrize("name", [pytest.param("yolo", marks=pytest.mark.nightly), "small_ssd"])
def test_detections_from_end_to_end(name, request, tmp_path):
    model, x = request.getfixturevalue(name), pictures(64, 20)
    words = "nms(iou=0.5,conf=0.5,max=20)" if name == "yolo" else "nms(conf=0.3,max=20)"
    result = compressor.compress(
        model, x[:2], calibration=x, output=tmp_path / "out", postprocess=words, **INT8
    )
    emitted, rows = result.report["emitted"], result.report["rows"]
    session = runtime.session(result.onnx)
    assert [o.name for o in session.get_outputs()] == ["boxes", "scores", "labels", "count"]
    assert len(result.graph.outputs) < 3  # the graph ends in raw heads
    plan = plan_of(result.graph, words, detectors.known(model))
    matches = Matches()
    for batch in (x[:1], x[:3]):  # any batch
        seen = runtime.run(session, [batch.numpy()])
        assert seen[0].shape == (len(batch), 20, 4) and seen[3].shape == (len(batch),)
        reference = plan.of(result.graph.outputs, result.graph.run(batch))
        matches.update(reference, tuple(map(torch.from_numpy, seen)))
    found = matches.metrics()
    assert min(found["recall"], found["precision"]) > 0.85  # integers round differently
    assert rows[0]["metric"]["recall"] == rows[0]["metric"]["precision"] == 1
    assert 0 < emitted["metric"]["recall"] <= 1 and set(emitted["metric"]) == set(rows[-1]["metric"])
    names = {check["output"] for check in emitted["checks"]}
    assert names == {*detections.PLACES, "detections (boxes, scores, labels, count)"}
    types = {n.op_type for n in onnx.load(str(result.onnx)).graph.node}
    assert {"NonMaxSuppression", "QuantizeLinear"} <= types
    signature = json.loads((tmp_path / "out/signature.json").read_text())
    assert signature["postprocess"] == str(plan) and signature["outputs"][0]["shape"] == ["batch", 20, 4]
    assert "the label -1" in (tmp_path / "out/usage.md").read_text()
    if name == "small_ssd":
        options = {"data": x[:8], "example_inputs": x[:2]}
        compared = api.verify(model, result.onnx, postprocess=words, **options)
        assert compared["checks"][-1]["agreement"] > 0.85


def test_a_wrong_suppression_in_the_file_is_found(yolo, tmp_path):
    graph = capture(yolo, pictures(64, 2))
    shipped = plan_of(graph, "nms(conf=0.5,max=30)").applied(graph)
    path = emit(shipped, tmp_path / "m.onnx").path
    samples = [batch.inputs for batch in synthetic(graph.inputs, graph.example, samples=8, seed=0)]
    float_, _, stated = detections.check(shipped, path, shipped.inputs, samples)[-3:]
    assert float_.error < 1e-4 and stated.agreement > 0.95
    model = onnx.load(str(path))
    node = next(n for n in model.graph.node if n.op_type == "NonMaxSuppression")
    for value in (
        *model.graph.initializer,
        *(n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"),
    ):
        if value.name == node.input[3] or node.input[3] in {
            n.output[0] for n in model.graph.node if n.op_type == "Constant" and n.attribute[0].t is value
        }:
            value.CopyFrom(onnx.numpy_helper.from_array(np.array([0.95], np.float32), value.name))
    onnx.save(model, str(path))
    with pytest.raises(ContractError, match="non-maximum suppression is not the operator's"):
        detections.check(shipped, path, shipped.inputs, samples)


def test_wrong_floats_before_the_suppression_are_found(yolo, tmp_path):
    graph = capture(yolo, pictures(64, 2))
    plan = plan_of(graph, "nms(conf=0.5,max=30)")
    path = emit(plan.applied(graph), tmp_path / "m.onnx").path
    node = next(n for n in graph.nodes if n.op == "get_attr" and str(n.target).endswith("cv2.0.2.bias"))
    graph.set_tensor(node, graph.tensor(node) + torch.randn(64))
    samples = [batch.inputs for batch in synthetic(graph.inputs, graph.example, samples=4, seed=0)]
    with pytest.raises(ContractError, match="boxes before nms"):
        detections.check(plan.applied(graph), path, graph.inputs, samples)


class Tiny(nn.Module):
    """A head of the shape of YOLO's on one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x).flatten(2)
        return torch.cat((found[:, :4].exp() * 8, found[:, 4:].sigmoid()), 1)


def test_detections_are_a_metric_without_suppression_in_the_file(tmp_path):
    x = pictures(64, 10)
    options = {"passes": "fp16", "measure": False, "calibration": x, "evaluate": "nms(conf=0.4)"}
    report = compressor.compress(Tiny(), x[:2], output=tmp_path / "out", **options).report
    assert report["rows"][0]["metric"]["recall"] == 1 and 0.9 < report["emitted"]["metric"]["recall"] <= 1
    assert report["outputs"][0]["name"] == "output" and "postprocess" not in report["emitted"]


def test_a_model_that_detects_nothing_says_so(tmp_path):
    options = {"passes": "fold", "measure": False, "output": tmp_path / "out", "emit": "pt2"}
    result = compressor.compress(Tiny(), pictures(64, 2), postprocess="nms(conf=0.99)", **options)
    assert any("detects nothing over conf=0.99" in notice for notice in result.report["notices"])
    assert result.report["emitted"]["metric"] == {}
    again = capture(torch.export.load(tmp_path / "out/model.pt2"))
    assert again.outputs == ("output",)  # the raw head: it is there to train
