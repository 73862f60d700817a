"""Which outputs of a detector are boxes and scores, and how they are read: inferred where it is certain.

What names, shapes, operators and the model's class tell is taken. What they leave open is asked for: boxes read in the
wrong form would be wrong numbers without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from . import detectors
from .errors import UsageError
from .ir import Graph
from .ops import is_tensor, kind
from .postprocess import Nms, Plan, parse
from .slices import regions

_NAMES = {"boxes": ("boxes", "pred_boxes"), "scores": ("scores", "logits", "pred_logits")}
_KEEPING = ("identity", "cast", "permute", "transpose", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "slice",
            "select", "cat", "mul", "getitem", "split")  # of shares from 0 to 1 they make such  # fmt: skip
_SHARES = ("aten.sigmoid.default", "aten.hardsigmoid.default")


def asked(graph: Graph, words: str | None, model: Any) -> Plan | None:
    """The plan for `nms(iou=0.5)` behind a model that was captured; None where nothing is asked for."""
    return None if words is None else plan(graph, parse(words), detectors.known(model))


def plan(graph: Graph, options: Nms, known: Mapping[str, str]) -> Plan:
    """The options with what they leave open inferred. known: what the model's class tells (`detectors.known`).

    UsageError names what cannot be inferred.
    """
    values = {
        name: node
        for name, node in zip(graph.outputs, graph.results, strict=True)
        if is_tensor(node) and node.meta["val"].dim() == 3 and node.meta["val"].dtype.is_floating_point
    }
    boxes, scores = _outputs(graph, values, options, known)
    if (boxes, scores) != (known.get("boxes"), known.get("scores")):
        known = {}
    columns, classes = _layout(values, boxes, scores)
    inner = _last_part(values[scores], columns) if boxes == scores else values[scores]
    made = _shares(inner) if inner is not None else ""
    head = "cxcywh" if boxes == scores and inner is not None else ""
    named = "cxcywh" if boxes.rpartition(".")[2] == "pred_boxes" else ""
    form = options.format or known.get("format") or head or named
    activation = options.activation or known.get("activation") or ("none" if made else "")
    softmax = "softmax" in (activation, made)
    background = (
        options.background or known.get("background") or ("" if softmax or not activation else "none")
    )
    left = {
        "format=xyxy (corners) or cxcywh (centre and size)": form,
        "activation=sigmoid, softmax or none (scores already)": activation,
        "background=CLASS or none (the class that is no object)": background,
    }
    if open_ := [words for words, value in left.items() if not value]:
        which = boxes if boxes == scores else f"{boxes} and {scores}"
        raise UsageError(
            f"--postprocess nms: the model does not tell how to read {which}: add {'; '.join(open_)}"
        )
    number = None if background == "none" else int(background)
    if number is not None and not -classes <= number < classes:
        raise UsageError(
            f"--postprocess nms(background={number}): the model has the classes 0 to {classes - 1}"
        )
    return Plan(options, boxes, scores, columns, form, activation, number, classes)


def _outputs(
    graph: Graph, values: Mapping[str, Node], options: Nms, known: Mapping[str, str]
) -> tuple[str, str]:
    """Names of the outputs that hold boxes and scores, by what was said, by their names, or by their shapes."""
    found: dict[str, str] = {}
    for which, names in _NAMES.items():
        said = getattr(options, which)
        if said and said not in values:
            raise UsageError(
                f"--postprocess nms({which}={said}): no such output of three axes; there are {_show(graph)}"
            )
        by_name = [name for name in values if name.rpartition(".")[2] in names]
        guess = known.get(which) if known.get(which) in values else None
        found[which] = said or guess or (by_name[0] if len(by_name) == 1 else "")
    if len(values) == 1 and not any(found.values()):
        name, node = next(iter(values.items()))
        if _last_part(node, columns=True) is not None:
            return name, name
    elif len(values) == 2:
        fours = [name for name, node in values.items() if 4 in node.meta["val"].shape[1:]]
        if len(fours) == 1 and found["boxes"] in ("", fours[0]):
            other = next(name for name in values if name != fours[0])
            found = {"boxes": fours[0], "scores": found["scores"] or other}
    if not all(found.values()):
        raise UsageError(
            f"--postprocess nms: which outputs are boxes and scores? There are {_show(graph)}; name them: "
            "nms(boxes=NAME,scores=NAME), the same name twice where one holds both"
        )
    return found["boxes"], found["scores"]


def _layout(values: Mapping[str, Node], boxes: str, scores: str) -> tuple[bool, int]:
    """Whether candidates stand on the last axis, and how many classes there are."""
    box, score = (tuple(values[name].meta["val"].shape) for name in (boxes, scores))
    if boxes == scores:
        columns = not isinstance(box[2], int) or (isinstance(box[1], int) and box[1] < box[2])
        classes = box[1 if columns else 2]
        if isinstance(classes, int) and classes > 4:
            return columns, classes - 4
    else:
        columns = box[2] != 4
        along, across = (2, 1) if columns else (1, 2)
        if box[across] == 4 and str(box[along]) == str(score[along]) and isinstance(score[across], int):
            return columns, score[across]
    shown = " and ".join(dict.fromkeys(f"{n} {[*map(str, s)]}" for n, s in ((boxes, box), (scores, score))))
    raise UsageError(
        f"--postprocess nms: boxes are [n, candidates, 4] and scores [n, candidates, classes], or both with the "
        f"last axes turned round; these are {shown}"
    )


def _last_part(node: Node, columns: bool) -> Node | None:
    """What was joined behind the four numbers of a box, where that is one operand of shares from 0 to 1.

    Keypoints or masks behind the scores would be another operand: such a head is no certain one.
    """
    axis = 1 if columns else 2
    if kind(node) != "cat":
        return None
    spans = [region[axis] for region in regions(node) if axis in region]
    last: Any = list(node.args[0])[-1]  # type: ignore[arg-type]
    ends = spans and spans[-1] == (4, node.meta["val"].shape[axis])
    return last if ends and _shares(last) else None


def _shares(node: Any) -> str:
    """`sigmoid` or `softmax` where these made a value, which then is from 0 to 1; else an empty string."""
    if not is_tensor(node):
        return ""
    if str(node.target) in _SHARES:
        return "sigmoid"
    if kind(node) == "softmax":
        return "softmax" if "log" not in str(node.target) else ""
    if kind(node) not in _KEEPING:
        return ""
    found = {_shares(source) for source in node.all_input_nodes if "val" in source.meta}
    return "" if "" in found or not found else max(found)


def _show(graph: Graph) -> str:
    return ", ".join(
        f"{name} {[str(size) for size in node.meta['val'].shape]}"
        for name, node in zip(graph.outputs, graph.results, strict=True)
        if is_tensor(node)
    )
