"""int8 and fp16 of a zoo of architectures: what ONNX Runtime gives, and how fast.

    python benchmarks/quant_zoo.py                       all of torchvision, timm's families, transformers
    python benchmarks/quant_zoo.py resnet18 'timm/*'     those that a name or pattern picks

Random weights with power (`tests/zoo.py`), dynamic batch; calibrated on 16 made-up samples, scored on 4 others. *int8*:
`fold,int8(rounding=nearest)`, as the stopwatch decides; *kept*: whether the model became integer, is left float because
it measures no faster, or has nothing to quantise. *speed*: how many times faster than the float file, batch 1, one
thread, in turns. *dB*: signal over noise of the worst output. *fp16*: largest error of an output relative to its scale,
its dB, and the size of the file against the float one; *weights*: the same error where weights alone were rounded to
float16 and all else is float32, which is what a network makes of one rounding. Exit code 1 where an int8 file is slower
by over 5 %, where fp16 gives NaN or is over 2e-3 and over three times *weights*, or where something fails.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from compressor import data, delivery, measure, runtime  # noqa: E402
from compressor.emit import Emitted  # noqa: E402
from compressor.errors import CompressorError  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.measure import parameters  # noqa: E402
from compressor.ops import is_constant, kind  # noqa: E402
from compressor.pipeline import Context, Outcome, Pass  # noqa: E402
from passes.fold import Fold  # noqa: E402
from passes.fp16 import Fp16  # noqa: E402
from passes.int8 import Int8  # noqa: E402
from targets.cpu import CPU  # noqa: E402

CALIBRATION, SCORED, SECONDS = 16, 4, 2.0
SLOWER, HALF, ROUNDINGS = 1.05, 2e-3, 3.0
LARGE = 150e6  # parameters over which a model is not measured
COLUMNS = {
    "model": "model", "kept": "int8", "speed": "speed", "db": "dB", "half": "fp16 error", "half_db": "dB",
    "weights": "weights", "size": "file", "verdict": "verdict",
}  # fmt: skip
GOOD, SLOW, WRONG, UNCAPTURED = "fine", "slower", "WRONG", "does not capture"


def measured(make: Any) -> Iterator[Row]:
    _, inputs, graph = harness.captured(make, with_power)
    if not isinstance(graph, Graph):
        yield {"verdict": UNCAPTURED, "why": graph}
        return
    if parameters(graph) > LARGE:
        yield {"verdict": GOOD, "kept": "too large to measure here"}
        return
    samples = data.synthetic(graph.inputs, graph.example, samples=CALIBRATION)
    few = [t[:2] for t in inputs]
    tests = [t.numpy() for t in few]
    applied(Fold(), graph, samples)
    with tempfile.TemporaryDirectory() as folder:
        base = delivered(graph, Path(folder, "float"))
        expected = outputs(base.path, tests)

        def clock(*graphs: Graph) -> list[float]:
            files = [
                base if g is graph else delivered(g, Path(folder, f"trial{i}")) for i, g in enumerate(graphs)
            ]
            times = timed([file.path for file in files], inputs)
            return [time.median_ms for time in times]

        integer = graph.copy()
        clocked = Context(CPU, samples, samples, measure=lambda *graphs: clock(*graphs[:-1], graph))
        steps = applied(Int8(rounding="nearest"), integer, samples, clocked)
        row: Row = {"verdict": GOOD}
        if any(kind(n) == "quantize" for n in integer.nodes):
            made = delivered(integer, Path(folder, "int8"))
            ratio = measure.ratio(*timed([base.path, made.path], inputs))
            row |= {
                "kept": "integer",
                "speed": str(ratio),
                "db": f"{noise(expected, outputs(made.path, tests)):.1f}",
            }
            if ratio.high < 1 / SLOWER:
                row["verdict"] = SLOW
        else:
            facts = steps[-1].facts
            row["kept"] = (
                f"float: {facts['float_ms']:.2f} ms to {facts['int8_ms']:.2f}"
                if "float_ms" in facts
                else "float"
            )
        yield row
        alone = largest(*([t.numpy() for t in floats(g.run(*few))] for g in (graph, rounded(graph))))
        applied(Fp16(), graph, samples)
        half = delivered(graph, Path(folder, "fp16"))
        seen = outputs(half.path, tests)
        error, db = largest(expected, seen), noise(expected, seen)
        row |= {"half": f"{error:.1e}", "half_db": f"{db:.1f}", "weights": f"{alone:.1e}"}
        row |= {"size": f"{half.bytes / base.bytes:.2f}"}
        if not error <= max(HALF, ROUNDINGS * alone):
            row["verdict"] = WRONG
        yield row


def applied(one: Pass, graph: Graph, samples: data.Data, ctx: Context | None = None) -> list[Outcome]:
    made = one.run(graph, ctx or Context(CPU, samples, samples))
    steps = []
    for step in [made] if isinstance(made, Outcome) else made:
        graph.clean()
        graph.check()
        steps.append(step)
    return steps


def rounded(graph: Graph) -> Graph:
    """A copy whose weights have the digits of float16."""
    copy = graph.copy()
    for node in copy.nodes:
        if is_constant(node) and node.meta["val"].dtype == torch.float32:
            copy.set_tensor(node, copy.tensor(node).half().float())
    return copy


def floats(values: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in values if t.is_floating_point()]


def delivered(graph: Graph, folder: Path) -> Emitted:
    folder.mkdir(exist_ok=True)
    return delivery.deliver(graph, CPU, folder, {}, {})


def outputs(path: Path, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [o for o in runtime.run(runtime.session(path, threads=1), list(feeds)) if o.dtype.kind == "f"]


def timed(files: Sequence[Path], inputs: Sequence[Tensor]) -> list[measure.Latency]:
    try:
        return measure.bench(files, feeds=[t[:1].numpy() for t in inputs], seconds=SECONDS)
    except Exception:  # a batch of 1 does not fit where the axis is fixed
        return measure.bench(files, feeds=[t[:2].numpy() for t in inputs], seconds=SECONDS)


def noise(expected: Sequence[np.ndarray], seen: Sequence[np.ndarray]) -> float:
    """dB of the worst output."""
    worst = math.inf
    for a, b in zip(expected, seen, strict=True):
        signal, lost = (
            float(np.square(a, dtype=np.float64).sum()),
            float(np.square(a.astype(np.float64) - b).sum()),
        )
        worst = min(
            worst,
            -10 * math.log10(max(lost, 1e-30) / max(signal, 1e-30)) if math.isfinite(lost) else -math.inf,
        )
    return worst


def largest(expected: Sequence[np.ndarray], seen: Sequence[np.ndarray]) -> float:
    errors = (
        np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)
        for a, b in zip(expected, seen, strict=True)
        if a.size
    )
    return float(max(errors, default=0.0))


def summary(rows: Mapping[str, Row]) -> Iterator[str]:
    verdicts = Counter(row.get("verdict", FAILED) for row in rows.values())
    integer = [float(row["speed"].split("x")[0]) for row in rows.values() if "speed" in row]
    yield ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    if integer:
        mean = math.exp(statistics.fmean(map(math.log, integer)))
        yield f"{len(integer)} integer: geometric mean {mean:.2f}x, least {min(integer):.2f}x."
    for verdict in (WRONG, SLOW, FAILED, UNCAPTURED):
        yield from (
            f"- {name}: {verdict} {row.get('why', '')}".rstrip()
            for name, row in rows.items()
            if row.get("verdict") == verdict
        )


def one(make: Any) -> Iterator[Row]:
    try:
        yield from measured(make)
    except CompressorError as error:
        yield {"verdict": FAILED, "why": first_line(error)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="names or patterns")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{harness.conditions()}; int8 and fp16, target {CPU.name}\n")
    rows = harness.table(COLUMNS, options.models, one)
    print("", *summary(rows), f"\n{harness.minutes()}", sep="\n")
    return int(any(row.get("verdict") in (WRONG, SLOW, FAILED) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
