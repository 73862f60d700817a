"""Mean average precision of detections against labelled boxes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.data import open_data
from compressor.errors import DataError, UsageError
from compressor.ir import Input
from compressor.precision import AveragePrecision

BOXES = [[4.0, 4.0, 20.0, 24.0], [30.0, 10.0, 50.0, 40.0]]
SPECS = [Input("x", torch.float32, ("batch", 1))]


def precision(labels: list[list[list[float]]], found: list[list[list[float]]]) -> dict[str, float]:
    """Of detections [x1, y1, x2, y2, class, score] in so many pictures, read in batches of one."""
    most = max(map(len, found)) or 1
    detections = torch.zeros(len(found), most, 6)
    for i, one in enumerate(found):
        detections[i, : len(one)] = torch.tensor(one).reshape(-1, 6)
    count = torch.tensor([len(one) for one in found])
    data = open_data(
        {"x": np.arange(len(labels), dtype=np.float32)[:, None], "y": np.array(labels, np.float32)}, SPECS
    )

    def run(x: Tensor) -> list[Tensor]:
        which = x[:, 0].long()
        one = detections[which]
        return [one[..., :4], one[..., 5], one[..., 4].int(), count[which].int()]

    return AveragePrecision(data, lambda outputs: tuple(outputs))(run)


def drawn(*boxes: tuple[int, int]) -> list[list[float]]:
    """Boxes of a picture by their place in BOXES and class; behind the last, none."""
    return [*([*BOXES[i], float(c)] for i, c in boxes), *[[0.0, 0.0, 0.0, 0.0, -1.0]] * (2 - len(boxes))]


def seen(i: int, c: int, score: float, *, wider: float = 0.0) -> list[float]:
    x1, y1, x2, y2 = BOXES[i]
    return [x1, y1, x2 + wider, y2, float(c), score]


def test_what_is_found_exactly_is_perfect():
    labels = [drawn((0, 3), (1, 5)), drawn((1, 3))]
    found = precision(labels, [[seen(0, 3, 0.9), seen(1, 5, 0.4)], [seen(1, 3, 0.5)]])
    assert found == pytest.approx({"map": 1.0, "map50": 1.0})
    upside_down = [[*BOXES[1][2:], *BOXES[1][:2], 5.0, 0.4]]
    assert precision([drawn((1, 5))], [upside_down])["map"] == pytest.approx(1)


def test_half_of_the_objects_is_half_of_the_curve():
    """COCO reads the curve at 101 recalls, of which 0 to 0.50 are reached."""
    labels = [drawn((0, 3)), drawn((1, 3))]
    for found in ([[seen(0, 3, 0.9)], []], [[seen(0, 3, 0.9)], [seen(1, 4, 0.9)]]):
        assert precision(labels, found) == pytest.approx({"map": 51 / 101, "map50": 51 / 101})


def test_a_box_counts_up_to_the_overlap_it_has():
    """20 of 26.5 wide: an overlap of 0.755, which passes six of the ten thresholds, 0.5 to 0.75."""
    assert precision([drawn((1, 3))], [[seen(1, 3, 0.9, wider=6.5)]]) == pytest.approx(
        {"map": 0.6, "map50": 1.0}
    )


def test_a_false_alarm_costs_by_its_rank():
    labels = [drawn((0, 3)), drawn()]
    assert precision(labels, [[seen(0, 3, 0.9)], [seen(1, 3, 0.1)]])["map"] == pytest.approx(1)
    assert precision(labels, [[seen(0, 3, 0.1)], [seen(1, 3, 0.9)]])["map"] == pytest.approx(0.5)


def test_nothing_found_is_zero_and_nothing_drawn_is_an_error():
    assert precision([drawn((0, 3))], [[]]) == {"map": 0.0, "map50": 0.0}
    with pytest.raises(DataError, match="no box"):
        precision([drawn()], [[seen(0, 3, 0.9)]])


def test_without_pycocotools_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UsageError, match=r"compressor\[detect\]"):
        precision([drawn((0, 3))], [[]])


class Finder(nn.Module):
    """Finds the bright rectangle: its score is the picture's mean, its box the picture's first numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv2d(1, 1, 1)
        nn.init.constant_(self.scale.weight, 1.0)
        nn.init.constant_(self.scale.bias, 0.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        boxes = self.scale(x)[:, 0, 0, :4][:, None] * 8
        return boxes, x.mean((1, 2, 3))[:, None, None]


def test_a_run_reports_it_before_and_after(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(6, 1, 8, 8)
    x[:, 0, 0, :4] = torch.tensor([0.5, 1.0, 3.0, 4.0])
    y = torch.tensor([[[4.0, 8.0, 24.0, 32.0, 0.0]]]).repeat(6, 1, 1)
    np.savez(tmp_path / "drawn.npz", x=x.numpy(), y=y.numpy())
    options = {"passes": "fold", "evaluate": str(tmp_path / "drawn.npz"), "measure": False}
    words = "nms(conf=0.1,format=xyxy,boxes=output_0,scores=output_1,activation=none,background=none)"
    report = compressor.compress(
        Finder(), x[:2], calibration=x, postprocess=words, output=tmp_path / "out", **options
    ).report
    for metric in (report["rows"][0]["metric"], report["emitted"]["metric"]):
        assert [metric[name] for name in ("map", "map50", "recall")] == pytest.approx([1, 1, 1])
    with pytest.raises(UsageError, match="add --postprocess"):
        compressor.compress(Finder(), x[:2], calibration=x, output=tmp_path / "raw", **options)
