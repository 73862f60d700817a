"""`--postprocess nms(...)`: its options, and the suppression that stands at a detector's end, behind all passes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from . import spec
from .errors import UsageError
from .ir import Graph
from .nms import Detections

aten = torch.ops.aten
OUTPUTS = ("boxes", "scores", "labels", "count")
_TURNED = 0.05  # share of boxes that a network which is not trained well may turn round
Call = Callable[..., Any]


@dataclass(frozen=True)
class Nms:
    """Class-wise suppression: at most `max` boxes over `conf` that no better one overlaps by more than `iou`.

    boxes, scores: names of the outputs; the same name twice for a head that holds both. format: of the boxes, corners
    (xyxy) or centre and size (cxcywh). activation: what makes scores of the output that holds them. background: the
    class that is no object, counted from the end where negative, or `none`. Empty: inferred.
    """

    name: ClassVar[str] = "nms"
    iou: float = 0.5
    conf: float = 0.25
    max: int = 100
    boxes: str = ""
    scores: str = ""
    format: Literal["", "xyxy", "cxcywh"] = ""
    activation: Literal["", "none", "sigmoid", "softmax"] = ""
    background: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.iou <= 1 or not 0 <= self.conf < 1:
            raise ValueError("iou is from 0 to 1 and conf from 0 to below 1")
        if self.max < 1:
            raise ValueError("max is at least 1")
        if self.background not in ("", "none") and not self.background.lstrip("-").isdigit():
            raise ValueError(f"background={self.background} is neither the number of a class nor none")


def is_words(text: str) -> bool:
    """Whether a text is `nms`, with options or without."""
    return text.partition("(")[0].strip() == Nms.name


def parse(text: str) -> Nms:
    """`nms(iou=0.5,conf=0.25,max=100)` -> its options."""
    if not is_words(text):
        raise UsageError(f"--postprocess {text}: there is nms(iou=0.5,conf=0.25,max=100)")
    found = spec.parse(text, {Nms.name: Nms})
    if len(found) != 1:
        raise UsageError(f"--postprocess {text}: one nms(...) is all there can be")
    made: Nms = found[0]
    return made


@dataclass(frozen=True)
class Plan:
    """How detections come of a graph's outputs: options with nothing left open.

    boxes, scores: names of outputs [n, candidates, 4 or classes]; with `columns` [n, 4 or classes, candidates]; the
    same name where the head holds four numbers of the box, then the classes. background: None without one.
    """

    options: Nms
    boxes: str
    scores: str
    columns: bool
    format: str
    activation: str
    background: int | None
    classes: int

    def __str__(self) -> str:
        told = {
            "iou": self.options.iou, "conf": self.options.conf, "max": self.options.max, "boxes": self.boxes,
            "scores": self.scores, "format": self.format, "activation": self.activation,
            "background": "none" if self.background is None else self.background,
        }  # fmt: skip
        return f"nms({','.join(f'{key}={value}' for key, value in told.items())})"

    def detect(self, outputs: Mapping[str, Any], call: Call, constant: Call) -> Any:
        """The four values of `compressor::nms`. call(target, *args) runs an operator, or inserts it into a graph.

        constant(tensor): the tensor as an operand. Boxes become corners, scores float32 [n, classes, candidates].
        """
        boxes, scores, axis = outputs[self.boxes], outputs[self.scores], 1 if self.columns else 2
        if self.boxes == self.scores:
            boxes = call(aten.slice.Tensor, boxes, axis, 0, 4)
            scores = call(aten.slice.Tensor, scores, axis, 4, 4 + self.classes)
        boxes, scores = (call(aten.to.dtype, value, torch.float32) for value in (boxes, scores))
        if self.activation == "softmax":
            scores = call(aten.softmax.int, scores, axis)
        elif self.activation == "sigmoid":
            scores = call(aten.sigmoid.default, scores)
        if self.columns:
            boxes = call(aten.transpose.int, boxes, 1, 2)
        else:
            scores = call(aten.transpose.int, scores, 1, 2)
        if self.format == "cxcywh":
            centre = call(aten.slice.Tensor, boxes, 2, 0, 2)
            half = call(aten.mul.Tensor, call(aten.slice.Tensor, boxes, 2, 2, 4), 0.5)
            corners = [call(one, centre, half) for one in (aten.sub.Tensor, aten.add.Tensor)]
            boxes = call(aten.cat.default, corners, 2)
        if self.background is not None:
            keep = torch.ones(self.classes, 1)
            keep[self.background] = 0
            scores = call(aten.mul.Tensor, scores, constant(keep))
        settings = (self.options.iou, self.options.conf, self.options.max)
        return call(torch.ops.compressor.nms.default, boxes, scores, *settings)

    @torch.no_grad()
    def of(self, names: Sequence[str], outputs: Sequence[Tensor]) -> Detections:
        """Detections of what a graph with outputs of these names returned."""
        found: Detections = self.detect(
            dict(zip(names, outputs, strict=True)), lambda target, *args: target(*args), lambda t: t
        )
        return found

    def applied(self, graph: Graph) -> Graph:
        """A copy of the graph that returns detections in the place of boxes and scores, behind its other outputs."""
        made = graph.copy()
        end = made.output

        def call(target: Any, *args: Any) -> Node:
            node = made.insert(target, args, before=end)
            for key in ("nn_module_stack", "stack_trace"):  # it stands in no module of the user's
                node.meta.pop(key, None)
            return node

        outputs = dict(zip(made.outputs, made.results, strict=True))
        found = self.detect(outputs, call, lambda tensor: made.add_tensor("nms_classes", tensor))
        parts = [call(operator.getitem, found, i) for i in range(len(OUTPUTS))]
        rest = {name: node for name, node in outputs.items() if name not in (self.boxes, self.scores)}
        taken = {*rest, *(one.name for one in made.inputs)}
        named = {
            name if name not in taken else f"nms.{name}": node
            for name, node in zip(OUTPUTS, parts, strict=True)
        }
        made.set_args(end, (tuple({**rest, **named}.values()),))
        made.outputs = (*rest, *named)
        made.clean()
        made.check()
        return made

    def doubts(self, graph: Graph) -> list[str]:
        """What the graph's own numbers on its example say against the plan."""
        outputs = dict(zip(graph.outputs, graph.run(*graph.example), strict=True))
        boxes, scores = self._raw(outputs)
        found = []
        turned = float((boxes[..., 2:] < boxes[..., :2]).any(-1).float().mean())
        if self.format == "xyxy" and turned > _TURNED:
            found.append(
                f"{turned:.0%} of the boxes on the example have their second corner before the first: are they "
                "format=cxcywh?"
            )
        if self.activation == "none" and (float(scores.min()) < 0 or float(scores.max()) > 1):
            found.append(
                "scores on the example are not from 0 to 1: do they need activation=sigmoid or softmax?"
            )
        return found

    def _raw(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes and scores as the model returns them, candidates on axis 1."""
        boxes, scores = (
            outputs[name].mT if self.columns else outputs[name] for name in (self.boxes, self.scores)
        )
        return (boxes[..., :4], scores[..., 4:]) if self.boxes == self.scores else (boxes, scores)
