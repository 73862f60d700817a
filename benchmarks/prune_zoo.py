"""Prunes a zoo of architectures to 0.6 of their MACs and holds each against the mask oracle.

    python benchmarks/prune_zoo.py                       all of torchvision, timm's families, transformers
    python benchmarks/prune_zoo.py resnet18 'timm/*'     those that a name or pattern picks
    python benchmarks/prune_zoo.py --no-onnx             without emission (the longer half)

Random weights with power (`tests/zoo.py`), magnitude as the criterion. A model counts as *pruned, equal* when channels
went and the result equals the masked original at 1e-5 of every output's scale, at two batch sizes, and at 1e-4 of the
scale of every value inside, each by itself (in float64 where float32 rounds more), and the ONNX file equals the
pruned graph at 1e-4 in ONNX Runtime. Every model runs in a process of its own with a time limit. Exit code 1 where a
result is wrong.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from zoo import with_power  # noqa: E402, I001  defines what torchvision needs, before it is imported

from model_zoo import harness  # noqa: E402
from model_zoo.harness import FAILED, Row, first_line  # noqa: E402

from compressor import data, delivery, verify  # noqa: E402
from compressor.atoms import MERGE, NORMS  # noqa: E402
from compressor.channels import Algebra, analyse  # noqa: E402
from compressor.errors import CompressorError  # noqa: E402
from compressor.ir import Graph, Journal  # noqa: E402
from compressor.measure import parameters  # noqa: E402
from compressor.ops import macs  # noqa: E402
from compressor.pipeline import Context  # noqa: E402
from passes.merge import Merge  # noqa: E402
from passes.prune import Prune  # noqa: E402
from targets.cpu import CPU  # noqa: E402

SHARE, TOLERANCE, INSIDE, SAMPLES = 0.6, 1e-5, 1e-4, 8
LARGE = (
    150e6  # parameters over which a model is not emitted: gigabytes, and nothing that a smaller variant lacks
)
COLUMNS = {
    "model": "model", "size": "M params / M MACs", "nodes": "nodes", "analysis": "analysis s", "seconds": "pass s",
    "prunable": "prunable params", "left": "MACs left", "pruned": "groups pruned", "outputs": "error at outputs",
    "inside": "worst value inside", "power": "proved / not", "onnx": "ONNX vs pruned graph", "verdict": "verdict",
}  # fmt: skip
BY_OPTION = "pruned, equal by option"
EQUAL, REFUSED, UNCAPTURED, WRONG = "pruned, equal", "refused", "does not capture", "WRONG"


# -------------------------------------------------------------------- one model


def measure(make: Any, emits: bool) -> Iterator[Row]:
    """Everything that is known about one model, step by step, so that a crash leaves what came before it."""
    _, inputs, graph = harness.captured(make, with_power)
    if not isinstance(graph, Graph):
        yield {"verdict": UNCAPTURED, "why": graph}
        return
    start = time.perf_counter()
    algebra = analyse(graph)
    yield {
        "size": f"{parameters(graph) / 1e6:.1f} / {macs(graph) / 1e6:.0f}",
        "nodes": len(graph.nodes),
        "analysis": f"{time.perf_counter() - start:.2f}",
        "prunable": f"{prunable(algebra):.0%}",
    }
    yield attempts(graph, inputs, emits, {group.remedy for group in algebra.groups})


def attempts(graph: Graph, inputs: Sequence[Tensor], emits: bool, remedies: set[str]) -> Row:
    """`prune(macs=0.6)`; where it refuses or does not get there and says what would help, that as well."""
    row = pruned(graph.copy(), inputs, emits, "")
    if row["verdict"] not in (EQUAL, REFUSED) or not row["why"]:
        return row
    for remedy, words in ((MERGE, "merge,prune"), (NORMS, "norms=true")):
        if remedy not in remedies:
            continue
        other = pruned(graph.copy(), inputs, emits, words)
        if other["verdict"] == WRONG:
            return other
        if other["verdict"] == EQUAL and row["verdict"] == REFUSED:
            row = {**other, "verdict": BY_OPTION, "why": f"{words}; alone it is refused: {row['why']}"}
        elif other["verdict"] == EQUAL:
            row["why"] += f"; {words} reaches {other['left']}, equal"
    return row


def pruned(graph: Graph, inputs: Sequence[Tensor], emits: bool, remedy: str) -> Row:
    """remedy: `merge,prune` or `norms=true`, or nothing."""
    held_out = data.synthetic(graph.inputs, graph.example, samples=SAMPLES)
    context = Context(target=CPU, held_out=held_out)
    if remedy == "merge,prune":
        Merge().run(graph, context)
        graph.clean()
    dense, start = graph.copy(), time.perf_counter()
    graph.journal = Journal()
    try:
        (outcome,) = Prune(macs=SHARE, criterion="l2", reach="best", norms=remedy == "norms=true").run(
            graph, context
        )
    except CompressorError as error:
        return {"verdict": FAILED, "why": first_line(error)}
    facts, reference = outcome.facts, outcome.reference
    if not facts["pruned"] or reference is None:
        reasons = ", ".join(f"{count} groups: {reason}" for reason, count in facts["frozen"].items())
        return {"verdict": REFUSED, "why": reasons or "no axis with a channel of its own"}
    graph.clean()
    row = {
        "seconds": f"{time.perf_counter() - start:.1f}",
        "left": f"{facts['macs']:.3f}",
        "pruned": f"{facts['pruned']} / {facts['groups']}",
        "power": f"{facts['proved_with_power']} / {facts['pruned'] - facts['proved_with_power']}",
    }
    outputs, inside, note = compared(reference, graph, inputs)
    if outputs > TOLERANCE and (own := amplified(reference, inputs)) > outputs / 10:
        why = f"the random model itself turns a rounding of 1e-15 into {own:.0e} at its outputs; seen {outputs:.0e}"
        return {**row, "verdict": FAILED, "why": f"undecided: {why}"}
    equal = outputs <= TOLERANCE and inside <= INSIDE
    row |= {
        "outputs": f"{outputs:.1e}{note}",
        "inside": f"{inside:.1e}{note}",
        "verdict": EQUAL if equal else WRONG,
        "why": "" if facts["macs"] <= SHARE + 1e-9 else f"{SHARE} is out of reach",
    }
    return row | (emitted(dense, graph, inputs) if emits and equal else {})


def prunable(algebra: Algebra) -> float:
    """Share of the parameters that lie on a channel which could go, on one axis at least."""
    able = {group.index for group in algebra.groups if not group.reason}
    total = stays = 0.0
    for term in algebra.parameter_terms:
        rest = term.base
        for key in term.axes:
            rest *= float(np.mean([c not in able for c in algebra.axes[key].tolist()]))
        total, stays = total + term.base, stays + rest
    return 1 - stays / total if total else 0.0


def compared(reference: Graph, graph: Graph, inputs: Sequence[Tensor]) -> tuple[float, float, str]:
    """Worst errors of outputs and of values inside, and a note; in float64 where float32 rounds too much."""
    outputs, inside = errors(reference, graph, inputs)
    if outputs <= TOLERANCE and inside <= INSIDE:
        return outputs, inside, ""
    wide = (verify.widened(reference, torch.float64), verify.widened(graph, torch.float64))
    outputs, inside = errors(*wide, inputs)
    return outputs, inside, " (float64)"


def amplified(reference: Graph, inputs: Sequence[Tensor]) -> float:
    """How far the outputs of the reference, in float64, move for inputs that differ by a rounding."""
    wide, batch = verify.widened(reference, torch.float64), [t[:2] for t in inputs]
    moved = [t.double() * (1 + 1e-15) if t.is_floating_point() else t for t in batch]
    return max(relative(a, b) for a, b in zip(wide.run(*batch), wide.run(*moved), strict=True))


def errors(reference: Graph, graph: Graph, inputs: Sequence[Tensor]) -> tuple[float, float]:
    static = any(not isinstance(spec.shape[0], str) for spec in graph.inputs if spec.shape)
    samples = (
        [tuple(t[:2] for t in inputs)]
        if static
        else [tuple(t[:2] for t in inputs), tuple(t[:3] for t in inputs)]
    )
    outputs = 0.0
    for batch in samples:
        for expected, seen in zip(reference.run(*batch), graph.run(*batch), strict=True):
            outputs = max(outputs, relative(expected, seen))
    inside = max((c.error for c in verify.compare_values(reference, graph, samples[0])), default=0.0)
    return outputs, inside


def relative(expected: Tensor, seen: Tensor) -> float:
    if expected.shape != seen.shape:
        return math.inf
    if not expected.is_floating_point():
        return float((expected != seen).float().mean())
    if not (torch.isfinite(expected).all() and torch.isfinite(seen).all()):
        return math.inf if not torch.equal(torch.isfinite(expected), torch.isfinite(seen)) else 0.0
    return float((expected - seen).abs().max() / (expected.abs().max() or 1.0))


def emitted(dense: Graph, graph: Graph, inputs: Sequence[Tensor]) -> Row:
    """Error of the file in ONNX Runtime; where it does not emit, whether the original does."""
    if parameters(dense) > LARGE:
        return {"onnx": "not emitted: large"}
    try:
        return {"onnx": f"{file_error(graph, inputs):.1e}"}
    except (CompressorError, RuntimeError) as error:
        why = first_line(error)
    try:
        file_error(dense, inputs)
    except (CompressorError, RuntimeError):
        return {"onnx": "neither it nor the original emits", "note": why}
    return {"onnx": "differs", "verdict": WRONG, "why": f"emission: {why}"}


def file_error(graph: Graph, inputs: Sequence[Tensor]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        file = delivery.deliver(graph, CPU, Path(folder), {}, {})
        static = any(not isinstance(spec.shape[0], str) for spec in graph.inputs if spec.shape)
        batch = data.Batch(tuple(t[: 2 if static else 3] for t in inputs))
        return max(c.error for c in delivery.check_emitted(graph, file, [batch]))


# -------------------------------------------------------------------- the table


def summary(rows: Mapping[str, Row]) -> Iterator[str]:
    verdicts = Counter(row.get("verdict", FAILED) for row in rows.values())
    captured = len(rows) - verdicts[UNCAPTURED]
    equal, more = verdicts[EQUAL], verdicts[BY_OPTION]
    yield (
        f"{len(rows)} models, {captured} capture; **{equal} pruned and equal ({equal / max(1, captured):.1%} of "
        f"those that capture)**, {more} more by the option that their refusal "
        f"names, {verdicts[REFUSED]} refused, {verdicts[FAILED]} failed loudly, {verdicts[WRONG]} "
        f"wrong."
    )
    proved = [int(part) for row in rows.values() if "power" in row for part in str(row["power"]).split(" / ")]
    yield f"Groups that went: {sum(proved[::2]):,} proved with power, {sum(proved[1::2]):,} not proved."
    for verdict in (WRONG, FAILED, REFUSED, BY_OPTION, UNCAPTURED):
        for name, row in rows.items():
            if row.get("verdict") == verdict:
                yield f"- {name}: {verdict}: {row.get('why', '')}"
    for name, row in rows.items():
        if row.get("verdict") == EQUAL and row.get("why"):
            yield f"- {name}: {EQUAL}, {row['left']} of the MACs are left: {row['why']}"


def main() -> int:
    options = harness.asked(__doc__)
    warnings.simplefilter("ignore")
    print(f"{harness.conditions()}; prune(macs={SHARE},criterion=l2,reach=best), target {CPU.name}\n")
    rows = harness.table(COLUMNS, options.models, partial(measure, emits=not options.no_onnx))
    print("", *summary(rows), f"\n{harness.minutes()}", sep="\n")
    return int(any(row.get("verdict") == WRONG for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
