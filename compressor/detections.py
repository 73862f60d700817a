"""The file of a detector that ends in non-maximum suppression, verified part by part.

What suppression keeps turns over at the last bit of a score, so two right models need not detect the same. Three things
are held instead: the floats that the file's suppression reads are the graph's, by the contract of every emitted model;
what the file makes of *these* floats is what the operator makes of them in PyTorch; and how far its detections agree
with the graph's is stated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.fx import Node

from . import delivery, runtime, sessions, verify
from .emit import feeds
from .errors import ContractError
from .ir import Graph, Input
from .matching import Matches
from .names import operator_name
from .nms import Detections
from .postprocess import OUTPUTS
from .verify import Check, Comparison, Observer

SAME = 0.999  # overlap of two boxes that are one but for rounding
PLACES = ("boxes before nms", "scores before nms")


def compare(
    graph: Graph,
    path: Path,
    inputs: Sequence[Input],
    samples: Iterable[Sequence[Tensor]],
    *,
    provider: str = sessions.CPU,
) -> tuple[Comparison, Check]:
    """What the file's suppression reads and its other outputs against the graph's, and a check of its detections.

    graph: ends in `compressor::nms`. ContractError where the file's suppression is not the operator.
    """
    suppression = _suppression(graph)
    settings = suppression.args[2:]
    before = _without(graph, suppression)
    observer = Observer(before)
    width = len(before.outputs)
    comparison = observer.comparison(width)
    same, agreed = Matches(SAME), Matches()
    with _exposed(path, before.outputs[2:], graph.outputs, provider) as session:
        for whole in samples:
            for part in sessions.pieces(graph.inputs, inputs, whole):
                seen = sessions.to_tensors(runtime.run(session, feeds(inputs, part)))
                reference = observer.run(part)[:width]
                read, made = seen[:width], seen[width:]
                comparison.update(reference, sessions.alike(before.outputs, read, reference))
                same.update(_again(read, settings), made)  # type: ignore[arg-type]
                agreed.update(_again(reference, settings), made)  # type: ignore[arg-type]
    _require_same(same, path)
    return comparison, _check(agreed)


def check(
    graph: Graph,
    path: Path,
    inputs: Sequence[Input],
    samples: Iterable[Sequence[Tensor]],
    *,
    provider: str = sessions.CPU,
) -> list[Check]:
    """The same, judged: ContractError where the file's floats are not the graph's either."""
    samples = list(samples)
    comparison, detections = compare(graph, path, inputs, samples, provider=provider)
    return [*delivery.judged(_without(graph, _suppression(graph)), comparison, samples), detections]


def _suppression(graph: Graph) -> Node:
    return next(n for n in graph.nodes if operator_name(n) == "compressor.nms.default")


def _without(graph: Graph, suppression: Node) -> Graph:
    """A copy that returns what suppression reads, then every output that it does not make."""
    made = graph.copy()
    node = made.node(suppression.name)
    rest = {
        name: one
        for name, one in zip(made.outputs, made.results, strict=True)
        if node not in one.all_input_nodes
    }
    made.set_args(made.output, ((*node.args[:2], *rest.values()),))
    made.outputs = (*PLACES, *rest)
    made.clean()
    return made


@contextmanager
def _exposed(path: Path, rest: Sequence[str], outputs: Sequence[str], provider: str) -> Iterator[Any]:
    """A session on the file that also returns what its suppression reads, first; its detections come last."""
    model = onnx.load(str(path), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "NonMaxSuppression")
    known = {value.name: value for value in model.graph.output}
    detections = [name for name in outputs if name not in rest]
    named = [onnx.helper.make_empty_tensor_value_info(name) for name in node.input[:2]]
    for value in named:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del model.graph.output[:]
    model.graph.output.extend([*named, *(known[name] for name in (*rest, *detections))])
    if not sessions.is_large(path):
        yield runtime.session(model.SerializeToString(), providers=[provider], exact=True)
        return
    beside = path.with_name(f".{path.name}.exposed")  # its weights are found beside it
    try:
        onnx.save(model, str(beside))
        yield runtime.session(beside, providers=[provider], exact=True, weights="mapped")
    finally:
        beside.unlink(missing_ok=True)


def _again(values: Sequence[Tensor], settings: Sequence[Any]) -> Detections:
    found: Detections = torch.ops.compressor.nms(values[0].float(), values[1].float(), *settings)
    return found


def _require_same(same: Matches, path: Path) -> None:
    found = same.metrics()
    wrong = bool(same.seen) if not found else min(found["recall"], found["precision"]) < 1 - verify.FLIPS
    if wrong or found.get("score_change", 0.0) > verify.EMITTED:
        raise ContractError(
            f"{path.name}: its non-maximum suppression is not the operator's: of {same.expected} detections that it "
            f"should make of its own boxes and scores it makes {same.matched}, and {same.seen - same.matched} others"
        )


def _check(agreed: Matches) -> Check:
    """Stated, not judged: how many of the detections of graph and file are the same ones."""
    found = agreed.metrics()
    share = min(found["recall"], found["precision"]) if found else float(not agreed.seen)
    return Check(
        output=f"detections ({', '.join(OUTPUTS)})",
        slice="",
        error=1 - share,
        tolerance=1.0,
        power=float(bool(found)),
        sqnr_db=math.inf,
        cosine=found.get("iou", 1.0),
        agreement=share if found else None,
        finite=True,
        discrete=True,
    )
