"""What pruning by magnitude costs ResNet-20 and ResNet-56 without any repair: top-1 on 400 test images, decibels.

python benchmarks/prune_cifar.py      a markdown table on standard output; needs the shared folder
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT.parent / "shared" / "models"))

from compressor import data  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.ops import macs  # noqa: E402
from compressor.pipeline import Context, Pipeline  # noqa: E402
from passes.prune import Prune  # noqa: E402
from targets.cpu import CPU  # noqa: E402


def main() -> None:
    import cifar_resnet

    print("| model | pass | MACs left | top-1 | output SQNR | contract |\n|---|---|---|---|---|---|")
    for name in ("resnet20", "resnet56"):
        model, images, labels = cifar_resnet.load(name)
        graph = capture(model, images[:2])
        held_out = data.open_data([(images[:64],)], graph.inputs)
        dense = macs(graph)
        print(f"| {name} | none | 1.00 | {top1(graph.run(images)[0], labels):.2%} | | |", flush=True)
        for share in (0.9, 0.8, 0.7):
            pruned = graph.copy()
            row = Pipeline([Prune(macs=share)], {}).run(pruned, Context(CPU, held_out))[-1]
            accuracy = top1(pruned.run(images)[0], labels)
            print(
                f"| {name} | {row.config} | {macs(pruned) / dense:.2f} | {accuracy:.2%} | {row.total_db:.1f} dB "
                f"| {row.contract}, {row.status} |",
                flush=True,
            )


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
