"""A zoo of architectures through the whole line: `merge,fold,int8` and `fold,fp16`, to a file that ONNX Runtime ran.

    python benchmarks/whole_zoo.py                       all of torchvision, timm's families, transformers; hours
    python benchmarks/whole_zoo.py resnet18 'timm/*'     those that a name or pattern picks
    python benchmarks/whole_zoo.py --table               the table of what was measured, no more

Rows are kept in `results/zoo.jsonl` (`--rows`), and what is there is not measured again: stop and go on as you like,
in several processes if each has patterns of its own. Random weights with power (`tests/zoo.py`), dynamic batch, 16
made-up samples calibrate; every pass keeps its contract and the file is verified, or the run fails. The table then
compares the file with PyTorch's own model on four samples that the run has not seen. *int8*:
`merge,fold,int8(equalise=false,rounding=nearest)`, the quick recipe, whose dB are fewer: whether it became integer, or
stays float because it measures no faster; where plain int8 is refused, as too loud for this network, `int8(sqnr=10)`
is what its error tells a user to say. *dB*: signal over noise of the worst output. *speed*: how many times faster than
the float file of the model as it came, batch 1, one thread, in turns. *fp16*: largest error relative to the scale of
the output; *weights*: the same of PyTorch's model with its weights alone rounded to half precision, which is what the
network makes of one rounding. *seconds* of both runs, *MB*: the larger peak of anonymous memory. Exit code 1 where a
run fails, an int8 file is slower by over 5 %, or fp16 gives NaN or is over 2e-3 and over three times *weights*.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from zoo import with_power  # noqa: E402, I001  defines what torchvision needs, before it is imported

import compressor  # noqa: E402
from compressor import data, registry, runtime  # noqa: E402
from compressor.errors import CompressorError, ContractError  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.measure import parameters  # noqa: E402
from model_zoo import harness  # noqa: E402
from model_zoo.harness import FAILED, Row, first_line  # noqa: E402

SAMPLES, SCORED, SECONDS = 16, 4, 900
SETTLED = 32  # pictures that batch norms' statistics are measured on
INTEGERS, REFUSED, HALVES = (
    "merge,fold,int8(equalise=false,rounding=nearest)",
    "merge,fold,int8(equalise=false,rounding=nearest,sqnr=10)",
    "fold,fp16",
)
SLOWER, HALF, ROUNDINGS = 1.05, 2e-3, 3.0
LARGE = 300e6  # parameters over which a model is not measured
COLUMNS = {
    "model": "model", "params": "M", "kept": "int8", "db": "dB", "speed": "speed", "size": "file",
    "half": "fp16", "weights": "weights", "half_size": "file", "seconds": "seconds", "mb": "MB", "verdict": "verdict",
}  # fmt: skip
GOOD, SLOW, WRONG, UNCAPTURED = "fine", "slower", "WRONG", "does not capture"


def measured(make: Any) -> Iterator[Row]:
    start = time.perf_counter()
    model, inputs, graph = harness.captured(make, settled)
    if not isinstance(graph, Graph):
        yield {"verdict": UNCAPTURED, "why": graph}
        return
    yield {
        "params": f"{parameters(graph) / 1e6:.1f}",
        "capture": time.perf_counter() - start,
        "target": registry.native(),
    }
    if parameters(graph) > LARGE:
        yield {"verdict": GOOD, "kept": "too large to measure here"}
        return
    few = tuple(t[:2] for t in inputs)
    samples = data.synthetic(graph.inputs, graph.example, samples=SAMPLES)
    (unseen, *_) = data.synthetic(graph.inputs, graph.example, samples=SCORED, seed=1)
    feeds = [t.numpy() for t in unseen.inputs]
    expected = [t.numpy() for t in floats(graph.run(*unseen.inputs))]
    alone = largest(expected, [t.numpy() for t in floats(rounded(graph).run(*unseen.inputs))])
    del graph
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        made, refused = integers(model, few, samples, Path(folder, "int8"))
        report = made.report
        verdict = GOOD
        row: Row = {"kept": kept(report) + (" (sqnr=10)" if refused else "")}
        row |= {"size": share(report), "db": f"{noise(expected, outputs(made.onnx, feeds)):.1f}"}
        low, high = report["emitted"]["latency"]["spread"]
        row["speed"] = f"{report['emitted']['latency']['ratio']:.2f}x ({low:.2f}-{high:.2f})"
        if row["kept"].startswith("integer") and high < 1 / SLOWER:
            verdict = SLOW
        peaks = [peak(report)]
        yield row | {"seconds": f"{time.perf_counter() - start:.0f}", "mb": f"{max(peaks):.0f}"}
        made = compressor.compress(model, few, passes=HALVES, output=Path(folder, "fp16"))
        error = largest(expected, outputs(made.onnx, feeds))
        peaks.append(peak(made.report))
        if not error <= max(HALF, ROUNDINGS * alone):
            verdict = WRONG
        yield row | {
            "verdict": verdict,
            "half": f"{error:.1e}",
            "weights": f"{alone:.1e}",
            "half_size": share(made.report),
            "seconds": f"{time.perf_counter() - start:.0f}",
            "mb": f"{max(peaks):.0f}",
        }


def settled(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Weights with power, and batch norms whose statistics hold for other pictures too."""
    draw = torch.Generator().manual_seed(1)
    more = [
        torch.randn(SETTLED, *t.shape[1:], generator=draw) if t.dim() == 4 and t.is_floating_point() else t
        for t in inputs
    ]
    alike = all(t is not one for t, one in zip(more, inputs, strict=True))
    return with_power(model, *(more if alike else inputs))


def integers(
    model: nn.Module, example: tuple[Tensor, ...], samples: data.Data, folder: Path
) -> tuple[compressor.Result, bool]:
    """The integer model, and whether plain int8 was refused."""
    batches = [batch.inputs for batch in samples]
    try:
        return compressor.compress(model, example, passes=INTEGERS, calibration=batches, output=folder), False
    except ContractError:
        return compressor.compress(model, example, passes=REFUSED, calibration=batches, output=folder), True


def kept(report: Mapping[str, Any]) -> str:
    quantised = [row for row in report["rows"] if row["pass"] == "int8"]
    if any(row["facts"].get("integer") for row in quantised):
        return "integer"
    facts = quantised[-1]["facts"]
    return f"float: {facts['float_ms']:.2f} ms to {facts['int8_ms']:.2f}" if "float_ms" in facts else "float"


def share(report: Mapping[str, Any]) -> str:
    return f"{report['emitted']['bytes'] / report['emitted']['float_bytes']:.2f}"


def peak(report: Mapping[str, Any]) -> float:
    return float(report["memory"]["peak_anonymous_mb"])


def rounded(graph: Graph) -> Graph:
    """A copy whose weights have the digits of float16."""
    copy = graph.copy()
    for node in copy.nodes:
        if node.op == "get_attr" and node.meta["val"].dtype == torch.float32:
            copy.set_tensor(node, copy.tensor(node).half().float())
    return copy


def floats(values: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in values if t.is_floating_point()]


def outputs(path: Path, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [o for o in runtime.run(runtime.session(path, threads=1), list(feeds)) if o.dtype.kind == "f"]


def noise(expected: Sequence[np.ndarray], seen: Sequence[np.ndarray]) -> float:
    """dB of the worst output."""
    worst = math.inf
    for a, b in zip(expected, seen, strict=True):
        signal = float(np.square(a, dtype=np.float64).sum())
        lost = float(np.square(a.astype(np.float64) - b).sum())
        level = -10 * math.log10(max(lost, 1e-30) / max(signal, 1e-30)) if math.isfinite(lost) else -math.inf
        worst = min(worst, level)
    return worst


def largest(expected: Sequence[np.ndarray], seen: Sequence[np.ndarray]) -> float:
    """The largest difference of any output, relative to that output's scale."""
    errors = (
        np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)
        for a, b in zip(expected, seen, strict=True)
        if a.size
    )
    return float(max(errors, default=0.0))


def summary(rows: Mapping[str, Row]) -> Iterator[str]:
    verdicts = Counter(row.get("verdict", FAILED) for row in rows.values())
    targets = Counter(row["target"] for row in rows.values() if "target" in row)
    integer = [
        float(row["speed"].split("x")[0])
        for row in rows.values()
        if row.get("kept", "").startswith("integer")
    ]
    yield f"{len(rows)} models: " + ", ".join(
        f"{count} {verdict}" for verdict, count in verdicts.most_common()
    )
    yield "made for " + ", ".join(f"{name} ({count})" for name, count in targets.items())
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
    parser.add_argument(
        "--rows", type=Path, default=ROOT / "benchmarks" / "results" / "zoo.jsonl", help="where rows are kept"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{harness.conditions()}; {INTEGERS} and {HALVES}\n")
    rows = harness.table(
        COLUMNS, options.models, one, seconds=SECONDS, kept=options.rows, measures=not options.table
    )
    print("", *summary(rows), f"\n{harness.minutes()}", sep="\n")
    return int(any(row.get("verdict") in (WRONG, SLOW, FAILED) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
