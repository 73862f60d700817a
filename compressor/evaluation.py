"""Task metrics over data with labels, or by a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import images
from .camera import Preprocessing
from .data import Batch, Data, open_data
from .errors import DataError, FunctionError, UsageError
from .ir import Graph
from .precision import are_boxes
from .texts import Reading

IGNORED = (-100, 255)  # what stands where a position has no label: of PyTorch's losses, of masks of pictures

Run = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Evaluator:
    """A task metric: over data with labels, or a function of the user's that is given the model to run."""

    name: str
    data: Data | None = None
    function: Callable[[Run], Any] | None = None

    def of(self, run: Run) -> dict[str, float]:
        """Metric by name, for whatever runs the model. Over data: the mean over all labels."""
        if self.function is not None:
            result = images.own(self.function, f"--eval {self.name}", run)
            found = result if isinstance(result, Mapping) else {self.name: result}
            try:
                return {str(name): float(value) for name, value in found.items()}
            except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
                what = type(result).__name__
                raise FunctionError(
                    f"--eval {self.name} returned a {what}; return a number, or a dict of numbers by name"
                ) from None
        total = count = 0.0
        for batch in self.data or ():
            value, rows = metric(run(*batch.inputs), batch, self.name)
            total += value * rows
            count += rows
        if not count:
            raise DataError(f"{self.data.description if self.data else 'the data'}: no label that counts")
        return {self.name: total / count}

    def of_graph(self, graph: Graph) -> dict[str, float]:
        return self.of(graph.run)


def evaluator(
    spec: Any,
    graph: Graph,
    *,
    preprocess: Preprocessing | None = None,
    text: Reading | None = None,
    labelled: bool = True,
) -> Evaluator:
    """`--eval`: data with labels (whole numbers: top1; vectors: cosine), a function, or `module:function`.

    The function gets `run(*inputs) -> outputs` (tensors) and returns a number, or a dict of them. labelled: whether
    data must have labels.
    """
    if isinstance(spec, str) and ":" in spec and not Path(spec).exists():
        function = images.imported(spec, "--eval")
        return Evaluator(spec.rpartition(":")[2], function=function)
    if callable(spec):
        return Evaluator(getattr(spec, "__name__", "metric"), function=spec)
    data = open_data(spec, graph.inputs, preprocess=preprocess, text=text, limit=50_000)
    labels = next(iter(data)).labels
    if labels is None and labelled:
        raise DataError(f"{data.description}: evaluation needs labels; add an array named y")
    if labelled and are_boxes(labels):
        raise UsageError(
            f"{data.description}: boxes are compared with detections: add --postprocess 'nms(...)', which makes them"
        )
    if labelled and (empty := data.facts.get("empty_classes")):
        raise DataError(
            f"{data.description}: {', '.join(empty)} holds no pictures, and nobody knows whether it counts as a class: "
            "take it away, or give it some"
        )
    if labels is None or not labels.is_floating_point():
        return Evaluator("top1", data)
    if labelled and labels[0].numel() == 1 and (labels.dim() > 1 or labels.frac().any()):
        raise DataError(
            f"{data.description}: a label is one number here, neither a class nor a vector: measure it with --eval "
            "module:function"
        )
    return Evaluator("cosine" if labels.dim() > 1 else "top1", data)


def metric(outputs: Sequence[Tensor], batch: Batch, name: str) -> tuple[float, int]:
    """(mean, of so many labels) of the first output: its largest class is the label (`top1`), or `cosine`."""
    first, labels = outputs[0].detach().cpu(), batch.labels
    if labels is None:
        raise DataError(f"{name} needs labels, and the data have none")
    if name == "top1":
        return _top1(first, labels)
    if name == "cosine":
        if first.shape != labels.shape:
            raise DataError(f"cosine needs labels like the output, {_show(first)}, not {_show(labels)}")
        both = first.flatten(1).double(), labels.flatten(1).double()
        return float(torch.nn.functional.cosine_similarity(*both).mean()), len(labels)
    raise UsageError(f"no metric '{name}'; there are top1 and cosine")


def _top1(first: Tensor, labels: Tensor) -> tuple[float, int]:
    """Of labels a position (of a picture, of a text) those do not count that say so."""
    axes = dict.fromkeys((1, first.dim() - 1)) if first.dim() > 1 else ()
    found = [axis for axis in axes if first.argmax(axis).shape == labels.shape]
    if not found:
        raise DataError(
            f"top1 needs outputs [n, classes] and labels [n], not {_show(first)}, {_show(labels)}; or one label a "
            "position"
        )
    if len(found) > 1:
        raise DataError(
            f"outputs {_show(first)}, labels {_show(labels)}: classes may be axis 1 or the last one; say which with "
            "--eval module:function"
        )
    (axis,) = found
    known = (labels >= 0) & (labels < first.shape[axis])
    left_out = torch.isin(labels, torch.tensor(IGNORED)) if labels.dim() > 1 else torch.zeros_like(known)
    unknown = labels[~known & ~left_out]
    if len(unknown):
        raise DataError(
            f"the evaluation data hold the label {int(unknown[0])}, and the model's classes are 0 to "
            f"{first.shape[axis] - 1}: give data with its own labels"
        )
    right = (first.argmax(axis) == labels)[known]
    return (float(right.float().mean()) if len(right) else 0.0), len(right)


def _show(tensor: Tensor) -> str:
    return str(list(tensor.shape))
