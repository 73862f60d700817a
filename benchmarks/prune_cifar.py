"""Pruning ResNet-56 with unlabelled images and no training: top-1 on 400 test images, noise, agreement, by seed.

    python benchmarks/prune_cifar.py [--seeds 0 1 2 3 4] [--no-rival]      Markdown; needs the shared folder

1,024 training images, drawn by the seed from 3,660, are the calibration data; the pass holds a fifth of them out. The
other 1,000 are for choices, and are left alone here. Torch-Pruning (`pip install torch-pruning`)
prunes the same model one-shot by each of its criteria, for comparison. Exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "shared" / "models")]

from compressor import data, measure  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.ops import macs  # noqa: E402
from compressor.pipeline import Context, Pipeline, parse  # noqa: E402
from passes import PASSES  # noqa: E402
from targets.cpu import CPU  # noqa: E402

HELD_BACK, ALL, CALIBRATION, CHECKED = 1000, 4660, 1024, 64
# times fewer MACs, pass, points of top-1 that may be lost on average
RUNS = (
    (1.33, "prune(macs=0.75,align=1,minimum=2)", 0.25),
    (2.0, "prune(macs=0.5,align=1,minimum=2)", 1.0),
    (2.6, "prune(macs=0.3846,align=1,minimum=2)", 5.0),
    (2.0, "prune(macs=0.5)", 1.5),
)


class Score:
    """Test images, and what the whole model says of them."""

    def __init__(self, graph: Graph, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.whole = graph.run(images)[0]
        self.top1 = self.of(self.whole)[0]

    def of(self, logits: Tensor) -> tuple[float, float, float]:
        """Top-1 and agreement in percent, SQNR in dB."""
        top1 = 100 * float((logits.argmax(1) == self.labels).float().mean())
        agree = 100 * float((logits.argmax(1) == self.whole.argmax(1)).float().mean())
        noise = (logits - self.whole).square().sum()
        return top1, agree, float(10 * torch.log10(self.whole.square().sum() / noise))


def ours(graph: Graph, score: Score, samples: Tensor, seeds: list[int]) -> bool:
    """Prints the table of every seed and the means; whether all bars are met."""
    print(
        "| times fewer MACs | pass | seed | MACs left | top-1 | agreement | SQNR dB | proved with power | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    means, met = [], True
    for times, spec, allowed in RUNS:
        found = []
        for seed in seeds:
            pruned, start = graph.copy(), time.perf_counter()
            chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
            stream, held_out = data.split(data.open_data(samples[chosen], graph.inputs), seed=seed)
            context = Context(CPU, held_out.limited(CHECKED), stream, seed=seed)
            row = Pipeline(parse(spec, PASSES), PASSES).run(pruned, context)[-1]
            seconds = time.perf_counter() - start
            top1, agree, noise = score.of(pruned.run(score.images)[0])
            found.append((top1, agree, noise))
            print(
                f"| {times} | `{spec}` | {seed} | {macs(pruned) / macs(graph):.3f} | {top1:.2f} | {agree:.2f} | "
                f"{noise:.2f} | {row.facts['proved_with_power']} of {row.facts['pruned']} | {seconds:.0f} |",
                flush=True,
            )
        mean, agreement, decibels = (statistics.mean(column) for column in zip(*found, strict=True))
        met &= score.top1 - mean <= allowed
        means.append(
            f"| {times} | `{spec}` | {mean:.2f} | {score.top1 - mean:+.2f} | at most {allowed} | {agreement:.2f} | "
            f"{decibels:.2f} |"
        )
    print(f"\nMeans over {len(seeds)} seeds; float has {score.top1:.2f}.\n")
    print(
        "| times fewer MACs | pass | top-1 | points lost | bar | agreement | SQNR dB |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(means), flush=True)
    print(f"\nPeak memory of the process so far: {measure.peak_memory_mb():.0f} MB.", flush=True)
    return met


# -------------------------------------------------------------------- Torch-Pruning


class Selection(nn.Module):
    """The shortcut of a growing block as a 1x1 convolution, which Torch-Pruning can trace: the same numbers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        outs, ins = block.conv1.out_channels, block.conv1.in_channels
        self.shortcut = nn.Conv2d(ins, outs, 1, stride=2, bias=False)
        with torch.no_grad():
            self.shortcut.weight.zero_()
            for i in range(ins):
                self.shortcut.weight[i + block.grow // 2, i] = 1

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        y = b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def rival(model: nn.Module, score: Score, samples: Tensor, labels: Tensor) -> None:
    """Torch-Pruning, one-shot to half of the MACs by each criterion, also with batch norms measured anew."""
    import torch_pruning as tp

    for layer in (model.layer2, model.layer3):
        layer[0] = Selection(layer[0])
    assert torch.allclose(model(score.images[:8]), score.whole[:8], atol=1e-4)
    importances: dict[str, Callable[[], object]] = {
        "l1": lambda: tp.importance.MagnitudeImportance(p=1),
        "l2": lambda: tp.importance.MagnitudeImportance(p=2),
        "bn scale": lambda: tp.importance.BNScaleImportance(),
        "Taylor, with labels": lambda: tp.importance.TaylorImportance(),
    }
    print("\nTorch-Pruning, global, one-shot to half of the MACs (channels free):\n")
    print(
        "| criterion | MACs left | top-1 | batch norm measured anew on 256 images |\n|---|---|---|---|",
        flush=True,
    )
    for name, importance in importances.items():
        pruned, share = halved(tp, model, importance, samples[:256], labels[:256])
        pruned.eval()
        with torch.no_grad():
            plain = score.of(pruned(score.images))[0]
            again = score.of(renormed(pruned, samples[:256])(score.images))[0]
        print(f"| {name} | {share:.3f} | {plain:.2f} | {again:.2f} |", flush=True)


def halved(tp, model: nn.Module, importance, images: Tensor, labels: Tensor) -> tuple[nn.Module, float]:
    """A pruned copy with about half of the MACs, by bisection of the ratio of channels."""
    low, high, best = 0.0, 0.9, None
    whole, _ = tp.utils.count_ops_and_params(model, images[:1])
    for _ in range(8):
        ratio = (low + high) / 2
        trial = copy.deepcopy(model)
        nn.functional.cross_entropy(trial(images), labels).backward()
        pruner = tp.pruner.BasePruner(
            trial, images[:1], importance=importance(), global_pruning=True, pruning_ratio=ratio,
            ignored_layers=[trial.linear],
        )  # fmt: skip
        pruner.step()
        share = tp.utils.count_ops_and_params(trial, images[:1])[0] / whole
        if best is None or abs(share - 0.5) < abs(best[1] - 0.5):
            best = (trial, share)
        low, high = (ratio, high) if share > 0.5 else (low, ratio)
    return best


def renormed(model: nn.Module, images: Tensor) -> nn.Module:
    twin = copy.deepcopy(model)
    for norm in norms(twin):
        norm.reset_running_stats()
        norm.momentum = None
    twin.train()
    for batch in images.split(64):
        twin(batch)
    return twin.eval()


def norms(model: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def main() -> int:
    import cifar_resnet

    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--no-rival", action="store_true")
    options = parser.parse_args()
    model, images, labels = cifar_resnet.load("resnet56")
    graph = capture(model, images[:2])
    score = Score(graph, images, labels)
    samples, sample_labels = cifar_resnet.calibration(ALL, seed=123)
    met = ours(graph, score, samples[HELD_BACK:], options.seeds)
    if not options.no_rival:
        rival(model, score, samples[HELD_BACK:], sample_labels[HELD_BACK:])
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
