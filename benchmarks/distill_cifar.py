"""What `distill` gives back to a pruned ResNet-56: top-1 on 400 test images, noise, agreement, time and memory.

    python benchmarks/distill_cifar.py [TIMES ...] [--spec SPEC]    a markdown table; needs the shared folder

TIMES: how many times fewer MACs (2.0 2.6 4 if none). SPEC: passes with {share} for the share of MACs to keep. 3,660
unlabelled training images are learned from; 1,000 others were for the choice of options, and are left alone. The test
images are scored once. Exit code 1 where 2.0x loses anything against float, 2.6x over 1.5 points, or a run takes over
20 minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT.parent / "shared" / "models"
sys.path[:0] = [str(ROOT), str(MODELS)]

from compressor import data, measure  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.ops import macs  # noqa: E402
from compressor.pipeline import Context, Pipeline, parse  # noqa: E402
from passes import PASSES  # noqa: E402
from targets.cpu import CPU  # noqa: E402

SPEC = "prune(macs={share},minimum=2),distill(minutes=15)"
HELD_BACK, ALL = 1000, 4660  # of the first, CHECKED are what contracts are checked on
CHECKED = 64
MINUTES = 20
LOSES = {2.0: 0.0, 2.6: 1.5}  # points of top-1 that may be lost
COLUMNS = ("times fewer MACs", "MACs left", "pass", "top-1", "agreement", "SQNR dB", "epochs", "minutes",
           "peak MB")  # fmt: skip


def rows(times: float, spec: str) -> tuple[list[str], bool]:
    """A row for every pass, and whether the last one meets the bars."""
    import cifar_resnet

    model, images, labels = cifar_resnet.load("resnet56")
    graph = capture(model, images[:2])
    samples, _ = cifar_resnet.calibration(ALL)
    statistics = data.open_data([(samples[HELD_BACK:],)], graph.inputs, limit=ALL)
    held_out = data.open_data([(samples[:CHECKED],)], graph.inputs)
    dense, original = macs(graph), graph.copy()
    passes = parse(spec.format(share=round(1 / times, 4)), PASSES)
    target = dataclasses.replace(CPU, channel_multiple=1)  # widths are free
    lines: list[str] = []
    started = time.perf_counter()

    def report(row, now: Graph) -> None:
        if row.name == "input":
            return
        minutes = (time.perf_counter() - started) / 60
        top1, agreement, noise = scores(original, now, images, labels)
        cells = (f"{times:g}", f"{macs(now) / dense:.3f}", row.config, f"{top1:.2f}", f"{agreement:.2f}",
                 f"{noise:.1f}", row.facts.get("epochs", ""), f"{minutes:.1f}", f"{row.peak_mb:.0f}")  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")

    pipeline = Pipeline(passes, PASSES, after=report)
    pipeline.run(graph, Context(target, held_out, statistics))
    minutes = (time.perf_counter() - started) / 60
    before, _, _ = scores(original, original, images, labels)
    lost = before - scores(original, graph, images, labels)[0]
    return lines, lost <= LOSES.get(times, 100.0) + 1e-6 and minutes <= MINUTES


def scores(
    original: Graph, graph: Graph, images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float, float]:
    """Top-1 and agreement with the original in percent, and output SQNR in dB."""
    expected, seen = (torch.cat([g.run(part)[0] for part in images.split(100)]) for g in (original, graph))
    top1 = float((seen.argmax(1) == labels).float().mean()) * 100
    agreement = float((seen.argmax(1) == expected.argmax(1)).float().mean()) * 100
    noise = float((seen - expected).square().sum() / expected.square().sum())
    return top1, agreement, -10 * math.log10(max(noise, 1e-30))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("times", nargs="*", type=float, default=[2.0, 2.6, 4.0])
    parser.add_argument("--spec", default=SPEC)
    options = parser.parse_args(words)
    if not MODELS.is_dir():
        print(f"skipped: the trained models are not in {MODELS}")
        return 0
    machine = measure.machine()
    print(f"ResNet-56, float top-1 92.00; {machine['cpu']}, {torch.get_num_threads()} threads\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    good = True
    for times in options.times:
        lines, met = rows(times, options.spec)
        print("\n".join(lines), flush=True)
        good &= met
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
