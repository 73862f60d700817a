"""Folds a zoo of architectures, and holds what is emitted against torch.onnx.export with onnxslim.

    pip install --no-deps onnxslim
    python benchmarks/fold_zoo.py                       all of torchvision, timm's families, transformers
    python benchmarks/fold_zoo.py resnet18 'timm/*'     those that a name or pattern picks

Random weights with power (`tests/zoo.py`), dynamic batch. *error*: largest change of an output, relative to its
scale, by `fold`, of the model in float32 and in float64. *left*: batch norms that stay, and why. *nodes*: of
model.onnx, against torch.onnx.export of the module itself (its optimiser on) and that file after onnxslim. *speed*: how
many times faster than onnxslim's file, batch 1, one thread, in turns; a process for each model. Exit code 1 where an
error is over 1e-10 in float64 (1e-5 where the model knows float32 alone), a file has more nodes than onnxslim's, or is
slower than it by over 5 %.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from zoo import with_power  # noqa: E402, I001  defines what torchvision needs, before it is imported

from model_zoo import harness  # noqa: E402
from model_zoo.harness import FAILED, Row, first_line  # noqa: E402
from compressor import data, delivery, measure, runtime  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.errors import CompressorError  # noqa: E402
from compressor.export import quiet, reexport  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.measure import parameters  # noqa: E402
from compressor.ops import kind  # noqa: E402
from compressor.pipeline import Context, Outcome  # noqa: E402
from passes.fold import Fold  # noqa: E402
from targets.cpu import CPU  # noqa: E402

TOLERANCE, DOUBLE, SLOWER = 1e-5, 1e-10, 1.05
SECONDS = 3.0  # of timing, for both files
LARGE = 150e6  # parameters over which a model is not emitted
COLUMNS = {
    "model": "model", "before": "operators", "after": "folded", "norms": "batch norms", "left": "left",
    "single": "error float32", "double": "error float64", "theirs": "exporter's nodes", "slim": "onnxslim",
    "ours": "ours", "speed": "speed", "verdict": "verdict",
}  # fmt: skip
GOOD, WRONG, MORE, SLOW, UNCAPTURED = "folded", "WRONG", "more nodes", "slower", "does not capture"


def measured(make: Any, emits: bool) -> Iterator[Row]:
    """Everything that is known about one model, step by step, so that a crash leaves what came before it."""
    model, inputs, graph = harness.captured(make, with_power)
    if not isinstance(graph, Graph):
        yield {"verdict": UNCAPTURED, "why": graph}
        return
    after = graph.copy()
    outcome = folded(after)
    norms = [sum(kind(n) == "batch_norm" for n in g.nodes) for g in (graph, after)]
    single = changed(graph, after, inputs)
    double = in_double(model, inputs)
    # a deep network amplifies the rounding of float32 itself: what fold did to it shows in float64
    good = single <= TOLERANCE if double is None else double <= DOUBLE
    yield {
        "before": operators(graph),
        "after": operators(after),
        "norms": norms[0],
        "left": f"{norms[1]}{reasons(outcome)}" if norms[1] else "0",
        "single": f"{single:.1e}",
        "double": "n/a" if double is None else f"{double:.1e}",
        "verdict": GOOD if good else WRONG,
    }
    if good and emits and parameters(graph) <= LARGE:
        yield against_onnxslim(model, graph, after, inputs)


def in_double(model: nn.Module, inputs: Sequence[Tensor]) -> float | None:
    """What fold changes in the same model in float64; None where the model computes in float32 come what may."""
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    try:
        graph = capture(copy.deepcopy(model).double(), tuple(t[:2] for t in wide))
        after = graph.copy()
        folded(after)
        return changed(graph, after, wide)
    except (CompressorError, RuntimeError, TypeError):
        return None


def folded(graph: Graph) -> Outcome:
    held_out = data.synthetic(graph.inputs, graph.example, samples=8)
    outcome = Fold().run(graph, Context(target=CPU, held_out=held_out))
    graph.clean()
    graph.check()
    return outcome


def operators(graph: Graph) -> int:
    return sum(n.op == "call_function" and kind(n) not in ("size", "getitem") for n in graph.nodes)


def reasons(outcome: Outcome) -> str:
    counts = Counter(d.reason.split(" (")[0] for d in outcome.declines if "batch_norm" in d.site)
    return "".join(f"; {count} x {reason}" for reason, count in counts.most_common(2))


def changed(before: Graph, after: Graph, inputs: Sequence[Tensor]) -> float:
    """Largest change of an output relative to its scale, at two batch sizes where the batch is dynamic."""
    static = any(not isinstance(spec.shape[0], str) for spec in before.inputs if spec.shape)
    worst = 0.0
    for size in (2,) if static else (2, 3):
        batch = [t[:size] for t in inputs]
        for a, b in zip(before.run(*batch), after.run(*batch), strict=True):
            if a.is_floating_point():
                worst = max(worst, float((a - b).abs().max() / (a.abs().max() or 1.0)))
            else:
                worst = max(worst, float((a != b).float().mean()))
    return worst


def against_onnxslim(model: nn.Module, before: Graph, after: Graph, inputs: Sequence[Tensor]) -> Row:
    """Nodes and speed of three files: the exporter's, that one after onnxslim, and ours."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        try:
            ours = delivery.deliver(after, CPU, here, {}, {})
        except CompressorError as error:
            return {"ours": "does not emit", "why": first_line(error)}
        row: Row = {"ours": nodes(ours.path)}
        try:
            theirs = exported(model, [t[:2] for t in inputs], before, here / "theirs.onnx")
            row["theirs"] = nodes(theirs)
            slim = slimmed(theirs, here / "slim.onnx")
            row["slim"] = nodes(slim)
            runtime.session(slim, providers=["CPUExecutionProvider"])
        except Exception as error:
            return row | {"slim": f"fails: {type(error).__name__}: {first_line(error)[:80]}"}
        ratio = speed(slim, ours.path, inputs)
        row["speed"] = str(ratio)
        if row["ours"] > row["slim"]:
            row["verdict"] = MORE
        elif ratio.high < 1 / SLOWER:
            row["verdict"] = SLOW
        return row


def nodes(path: Path) -> int:
    """Operators of a file, in subgraphs too; constants are data, however they are written."""
    count, graphs = 0, [onnx.load(path, load_external_data=False).graph]
    while graphs:
        for node in graphs.pop().node:
            count += node.op_type != "Constant"
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return count


def exported(model: nn.Module, inputs: Sequence[Tensor], graph: Graph, path: Path) -> Path:
    """The module as torch.onnx.export writes it by itself, with the dynamic axes that we found.

    Where it fails to call a module of keyword inputs, from the program that we captured.
    """
    axes = tuple(
        {i: torch.export.Dim.DYNAMIC for i, s in enumerate(spec.shape) if isinstance(s, str)}
        for spec in graph.inputs
    )
    options: dict[str, Any] = {"dynamo": True, "opset_version": CPU.opset, "verbose": False}
    with torch.no_grad(), quiet():
        try:
            program = torch.onnx.export(model, tuple(inputs), dynamic_shapes=axes, **options)
        except Exception:
            program = torch.onnx.export(reexport(graph), **options)
        program.save(path)
    return path


def slimmed(path: Path, to: Path) -> Path:
    import onnxslim

    with quiet():
        onnx.save(onnxslim.slim(str(path)), to)
    return to


def speed(theirs: Path, ours: Path, inputs: Sequence[Tensor]) -> measure.Ratio:
    feeds = [t[:1].numpy() for t in inputs]
    try:
        base, mine = measure.bench([theirs, ours], feeds=feeds, seconds=SECONDS)
    except Exception:  # a batch of 1 does not fit where the axis is fixed
        base, mine = measure.bench([theirs, ours], feeds=[t[:2].numpy() for t in inputs], seconds=SECONDS)
    return measure.ratio(base, mine)


def summary(rows: Mapping[str, Row]) -> Iterator[str]:
    verdicts = Counter(row.get("verdict", FAILED) for row in rows.values())
    both = [r for r in rows.values() if isinstance(r.get("slim"), int)]
    yield (
        f"{len(rows)} models, {len(rows) - verdicts[UNCAPTURED]} capture, {verdicts[WRONG]} wrong, "
        f"{verdicts[FAILED]} failed."
    )
    if both:
        total = {key: sum(r[key] for r in both) for key in ("theirs", "slim", "ours")}
        fewer = sum(r["ours"] < r["slim"] for r in both)
        more = sum(r["ours"] > r["slim"] for r in both)
        ratios = [float(r["speed"].split("x")[0]) for r in both]
        geometric = math.exp(statistics.fmean(map(math.log, ratios)))
        yield (
            f"{len(both)} emit both ways: {total['theirs']:,} nodes by the exporter, {total['slim']:,} after onnxslim, "
            f"{total['ours']:,} of ours; fewer than onnxslim's in {fewer}, more in {more}. Speed against onnxslim's "
            f"file: geometric mean {geometric:.3f}x, worst {min(ratios):.2f}x."
        )
    for verdict in (WRONG, FAILED, MORE, SLOW, UNCAPTURED):
        for name, row in rows.items():
            if row.get("verdict") == verdict:
                yield f"- {name}: {verdict} {row.get('why', '')}".rstrip()


def main() -> int:
    options = harness.asked(__doc__)
    warnings.simplefilter("ignore")
    print(f"{harness.conditions()}; fold, target {CPU.name}\n")

    def one(make: Any) -> Iterator[Row]:
        return measured(make, not options.no_onnx)

    rows = harness.table(COLUMNS, options.models, one)
    print("", *summary(rows), f"\n{harness.minutes()}", sep="\n")
    return int(any(row.get("verdict") in (WRONG, MORE, SLOW, FAILED) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
