"""Takes branches out of a zoo of architectures, and holds what is left against the model with them times zero.

    python benchmarks/shorten_zoo.py                       all of torchvision, timm's families, transformers
    python benchmarks/shorten_zoo.py resnet18 'timm/*'     those that a name or pattern picks

Random weights with power (`tests/zoo.py`). Branches are drawn, not judged, until 0.7 of the MACs are left or none is:
what `shorten` would choose is another question. *error*: of the outputs, relative to their scale, at two batch sizes
where the batch is dynamic (in float64 where float32 rounds more); *power*: how far the branches moved them. *ONNX*: the
file against the graph. A process for each model. Exit code 1 where an error is over 1e-5.
"""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from zoo import with_power  # noqa: E402, I001  defines what torchvision needs, before it is imported

from fold_zoo import changed  # noqa: E402
from model_zoo import harness  # noqa: E402
from model_zoo.harness import FAILED, Row, first_line  # noqa: E402
from compressor import data, delivery, verify  # noqa: E402
from compressor.branches import branches, bypass, masked  # noqa: E402
from compressor.errors import CompressorError  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.measure import parameters  # noqa: E402
from compressor.ops import macs  # noqa: E402
from targets.cpu import CPU  # noqa: E402

SHARE, TOLERANCE, POWER = 0.7, 1e-5, 1e-3
LARGE = 150e6  # parameters over which a model is not emitted
COLUMNS = {
    "model": "model", "branches": "branches", "gone": "gone", "left": "MACs left", "error": "error", "power": "power",
    "onnx": "ONNX", "verdict": "verdict",
}  # fmt: skip
EQUAL, UNPROVED, NONE, WRONG, UNCAPTURED = (
    "equal",
    "equal, no power",
    "no branch",
    "WRONG",
    "does not capture",
)


def measured(make: Any, emits: bool) -> Iterator[Row]:
    _, inputs, graph = harness.captured(make, with_power)
    if not isinstance(graph, Graph):
        yield {"verdict": UNCAPTURED, "why": graph}
        return
    found = list(branches(graph))
    if not found:
        yield {"branches": 0, "verdict": NONE}
        return
    after, gone, draw = graph.copy(), [], random.Random(0)
    while macs(after) > SHARE * macs(graph) and (left := list(branches(after))):
        gone.append(draw.choice(left))
        bypass(after, gone[-1])
    after.check()
    reference = masked(graph, gone)
    error, power = changed(reference, after, inputs), changed(graph, reference, inputs)
    if error > TOLERANCE:
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        error = changed(*(verify.widened(g, torch.float64) for g in (reference, after)), wide)
    yield {
        "branches": len(found),
        "gone": len(gone),
        "left": f"{macs(after) / max(macs(graph), 1):.2f}",
        "error": f"{error:.1e}",
        "power": f"{power:.1e}",
        "verdict": WRONG if not error <= TOLERANCE else EQUAL if power >= POWER else UNPROVED,
    }
    if emits and parameters(after) <= LARGE:
        yield {"onnx": emitted(after, inputs)}


def emitted(graph: Graph, inputs: Sequence[Tensor]) -> str:
    """How far the file is from the graph, as the run would check it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = delivery.deliver(graph, CPU, Path(folder), {}, {})
            samples = list(data.open_data([tuple(t[:2] for t in inputs)], graph.inputs))
            worst = delivery.check_emitted(graph, made, samples)[0]
        except CompressorError as error:
            return first_line(error)[:80]
        return f"{worst.error:.1e}"


def summary(rows: Mapping[str, Row]) -> Iterator[str]:
    verdicts = Counter(row.get("verdict", FAILED) for row in rows.values())
    yield f"{len(rows)} models: " + ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common()) + "."
    for verdict in (WRONG, FAILED, UNPROVED, UNCAPTURED):
        for name, row in rows.items():
            if row.get("verdict", FAILED) == verdict:
                yield f"- {name}: {verdict} {row.get('why', '')}".rstrip()


def main() -> int:
    options = harness.asked(__doc__)
    warnings.simplefilter("ignore")
    print(f"{harness.conditions()}; branches to {SHARE} of the MACs\n")
    rows = harness.table(COLUMNS, options.models, lambda make: measured(make, not options.no_onnx))
    print("", *summary(rows), f"\n{harness.minutes()}", sep="\n")
    return int(any(row.get("verdict", FAILED) in (WRONG, FAILED) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
