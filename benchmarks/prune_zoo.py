"""Prunes torchvision classifiers to 0.6 of their MACs and holds each against the mask oracle.

    python benchmarks/prune_zoo.py [MODEL ...]      one model at a time; a markdown table on standard output

Random weights with power (`tests/zoo.py`). Every pruned model must equal the masked original at 1e-5, its outputs at
two batch sizes and every value inside at its own scale; and the ONNX file that it becomes must equal the pruned model
at 1e-4 in ONNX Runtime, at three batch sizes. Exit code 1 where one does not.
"""

from __future__ import annotations

import datetime
import gc
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from zoo import torchvision_model, with_power  # noqa: E402

from compressor import data, delivery, verify  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.channels import analyse  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.pipeline import Context  # noqa: E402
from passes.prune import Prune  # noqa: E402
from targets.cpu import CPU  # noqa: E402

SHARE, TOLERANCE, SAMPLES = 0.6, 1e-5, 8
MODELS = [
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "densenet121",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "googlenet",
    "efficientnet_b0",
    "regnet_x_400mf",
    "convnext_tiny",
    "vit_b_16",
]
COLUMNS = (
    "model", "nodes", "analysis s", "pass s", "MACs left", "pruned / groups", "error at outputs", "worst value inside",
    "ONNX vs torch", "proved with power", "what stays",
)  # fmt: skip


def prune(name: str) -> tuple[str, float]:
    """One row of the table, and the larger of its two errors."""
    torch.manual_seed(0)
    images = torch.randn(SAMPLES, 3, 224, 224)
    graph = capture(with_power(torchvision_model(name), images), images[:2])
    start = time.perf_counter()
    analyse(graph)
    analysis = time.perf_counter() - start
    held_out = data.synthetic(graph.inputs, graph.example, samples=SAMPLES)
    nodes, start = len(graph.nodes), time.perf_counter()
    (outcome,) = Prune(macs=SHARE).run(graph, Context(target=CPU, held_out=held_out))
    seconds = time.perf_counter() - start
    reference, facts = outcome.reference, outcome.facts
    assert reference is not None
    outputs = max(errors(reference, graph, images))
    inside = max(c.error for c in verify.compare_values(reference, graph, [images[:2]]))
    emitted = emission(graph, images)
    stays = ", ".join(f"{count} {reason}" for reason, count in list(facts["frozen"].items())[:3])
    cells = (
        name, nodes, f"{analysis:.2f}", f"{seconds:.1f}", f"{facts['macs']:.3f}",
        f"{facts['pruned']} / {facts['groups']}", f"{outputs:.1e}", f"{inside:.1e}",
        f"{emitted:.1e}", f"{facts['proved_with_power'] / max(1, facts['pruned']):.1%}", stays,
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |", max(outputs, inside)


def errors(reference: Graph, graph: Graph, images: torch.Tensor) -> Iterator[float]:
    """Relative errors of the outputs at two batch sizes."""
    for batch in (images[:2], images[2:7]):
        for expected, seen in zip(reference.run(batch), graph.run(batch), strict=True):
            yield float((expected - seen).abs().max() / expected.abs().max())


def emission(graph: Graph, images: torch.Tensor) -> float:
    """Worst relative error of the ONNX file; ContractError over 1e-4."""
    with tempfile.TemporaryDirectory() as folder:
        emitted = delivery.deliver(graph, CPU, Path(folder), {}, {})
        return max(c.error for c in delivery.check_emitted(graph, emitted, [data.Batch((images[:3],))]))


def main(names: list[str]) -> int:
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}; prune(macs={SHARE}), target {CPU.name}\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    failed = False
    for name in names or MODELS:
        row, error = prune(name)
        failed |= not error <= TOLERANCE
        print(row, flush=True)
        gc.collect()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
