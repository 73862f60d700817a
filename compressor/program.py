"""A compiled graph as `model.pt2`: an exported program with the original's names, its receipt, and the proof of both.

Batch norm and dropout stand in it as they stand in the graph, so it can be trained, and compressed further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import delivery, receipt, verify
from .data import Batch
from .edges import varied
from .errors import CompressorError, ContractError, UnsupportedError
from .export import explain, reexport, save_program
from .ir import Graph
from .load import load
from .opening import Options, capture_model
from .report import dumps
from .trainable import Trainable

NAME = "model.pt2"


def deliver(
    graph: Graph, folder: Path, report: Mapping[str, Any], batches: Sequence[Batch]
) -> dict[str, Any]:
    """Writes model.pt2 with the receipt of `report`, reads it back as a user's file is read, and compares.

    Returns what the report says of it. ContractError where the file's numbers or names are not the graph's.
    """
    path = folder / NAME
    module = Trainable(graph, graph.tensors)
    try:
        program = reexport(graph, module)
    except CompressorError:
        raise
    except Exception as error:  # the exporter raises nearly everything
        raise UnsupportedError(f"{NAME}: {explain(error)}") from error
    text = dumps(receipt.issue(report, graph, module.state_dict()))
    save_program(program, path, {receipt.MEMBER: text})
    checks = check(graph, path, batches)
    samples = sum(batch.samples for batch in batches)
    return {
        "file": NAME,
        "bytes": path.stat().st_size,
        "sha256": delivery.sha256(path),
        "verified": f"read back and run in PyTorch, {samples} samples",
        "checks": [one.to_dict() for one in checks],
    }


def check(graph: Graph, path: Path, batches: Sequence[Batch]) -> list[verify.Check]:
    """Outputs of the file against those of the graph, on every batch and on other sizes of every dynamic axis."""
    loaded = load(path)
    if loaded.continued is None or loaded.continued.changed:
        raise ContractError(f"{path.name} does not hold the receipt and the weights that were written")
    try:
        again = capture_model(loaded, None, Options())
    except UnsupportedError as error:
        half = any(tensor.dtype in verify.HALF for tensor in graph.tensors.values())
        hint = "; PyTorch rounds half precision otherwise than the graph: leave fp16 out of a model.pt2"
        raise UnsupportedError(f"{path.name} is not proved: {error}{hint if half else ''}") from error
    if (again.inputs, again.outputs) != (graph.inputs, graph.outputs):
        now, before = (f"{[*map(str, one.inputs)]} -> {[*one.outputs]}" for one in (again, graph))
        raise ContractError(f"{path.name} takes and returns {now}, and the graph {before}")
    samples = list(varied(graph, batches))
    reference = [graph.run(*one) for one in samples]
    checks = verify.compare(graph, reference, [again.run(*one) for one in samples])
    for one in checks:
        if not one.finite or one.error > one.tolerance:
            raise ContractError(
                f"{path.name}: its output {one.output}{one.slice} is not the graph's: error {one.error:.1e}, "
                f"{one.tolerance:.0e} is allowed"
            )
    return checks
