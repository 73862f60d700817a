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
from .errors import DataError, UsageError
from .ir import Graph
from .precision import are_boxes
from .texts import Reading

Run = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Evaluator:
    """A task metric: over data with labels, or a function of the user's that is given the model to run."""

    name: str
    data: Data | None = None
    function: Callable[[Run], Any] | None = None

    def of(self, run: Run) -> dict[str, float]:
        """Metric by name, for whatever runs the model. Over data: the mean over all samples."""
        if self.function is not None:
            result = self.function(run)
            if isinstance(result, Mapping):
                return {str(name): float(value) for name, value in result.items()}
            return {self.name: float(result)}
        total = count = 0.0
        for batch in self.data or ():
            rows = len(batch.labels) if batch.labels is not None else 1
            total += metric(run(*batch.inputs), batch, self.name) * rows
            count += rows
        return {self.name: total / max(count, 1)}

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
    return Evaluator(
        "cosine" if labels is not None and labels.is_floating_point() and labels.dim() > 1 else "top1", data
    )


def metric(outputs: Sequence[Tensor], batch: Batch, name: str) -> float:
    """Mean of the first output's `top1` (its largest class is the label) or `cosine` with the label."""
    first, labels = outputs[0].detach().cpu(), batch.labels
    if labels is None:
        raise DataError(f"{name} needs labels, and the data have none")
    if name == "top1":
        if first.dim() < 2 or first.argmax(1).shape != labels.shape:
            raise DataError(
                f"top1 needs outputs [n, classes] and labels [n], not {_show(first)}, {_show(labels)}"
            )
        unknown = labels[(labels < 0) | (labels >= first.shape[1])] if labels.dim() == 1 else labels[:0]
        if len(unknown):
            raise DataError(
                f"the evaluation data hold the label {int(unknown[0])}, and the model's classes are 0 to "
                f"{first.shape[1] - 1}: give data with its own labels"
            )
        return float((first.argmax(1) == labels).float().mean())
    if name == "cosine":
        if first.shape != labels.shape:
            raise DataError(f"cosine needs labels like the output, {_show(first)}, not {_show(labels)}")
        both = first.flatten(1).double(), labels.flatten(1).double()
        return float(torch.nn.functional.cosine_similarity(*both).mean())
    raise UsageError(f"no metric '{name}'; there are top1 and cosine")


def _show(tensor: Tensor) -> str:
    return str(list(tensor.shape))
