"""How much faster pruned models are in ONNX Runtime, per MACs saved, timed in turns with the model as it came.

    python benchmarks/prune_speed.py [MODEL ...]     Markdown; ResNet-56 needs the shared folder

Run it on a quiet machine.

One thread, batch 1, batch norms folded on both sides. ResNet-50 has random weights: where its channels go does not
change how long what is left takes. Exit code 1 where ResNet-50 at half of its MACs is under 1.7 times as fast,
ResNet-56 under 1.6 times, or any pruned model is slower than the original.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT.parent / "shared" / "models")]

from zoo import torchvision_model  # noqa: E402

from compressor import data, delivery, measure, sessions  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.ops import macs  # noqa: E402
from compressor.pipeline import Context, Pipeline, parse  # noqa: E402
from passes import PASSES  # noqa: E402
from targets.cpu import CPU  # noqa: E402

SPECS = {
    "ResNet-56": ("prune(macs=0.75)", "prune(macs=0.5)", "prune(macs=0.5,align=1)", "prune(macs=0.3846)"),
    "ResNet-50": ("prune(macs=0.75)", "prune(macs=0.5)", "prune(macs=0.5,align=8)", "prune(macs=0.5,align=1)"),
}  # fmt: skip
BARS = {("ResNet-50", "prune(macs=0.5)"): 1.7, ("ResNet-56", "prune(macs=0.5)"): 1.6}
SECONDS = 6.0


def timed(graphs: list[Graph], folder: Path) -> list[float]:
    """Speed of each against the first."""
    files = []
    for i, graph in enumerate(graphs):
        place = folder / str(i)
        place.mkdir(exist_ok=True)
        files.append(delivery.deliver(graph, CPU, place, {}, {}))
    with sessions.opened(files[0].path) as session:
        feeds = measure.random_feeds(session, batch=1)
    found = measure.bench([f.path for f in files], feeds=feeds, threads=1, seconds=SECONDS * len(files))
    return [measure.ratio(found[0], one).median for one in found]


def rows(name: str, graph: Graph, samples: torch.Tensor | None) -> bool:
    calibration, held_out = None, data.synthetic(graph.inputs, graph.example, samples=8)
    if samples is not None:
        calibration, held_out = data.split(data.open_data(samples, graph.inputs))
    folded = graph.copy()
    context = Context(CPU, held_out, calibration)
    Pipeline(parse("fold", PASSES), PASSES).run(folded, context)
    met = True
    for spec in SPECS[name]:
        pruned = graph.copy()
        Pipeline(parse(f"{spec},fold", PASSES), PASSES).run(pruned, context)
        left = macs(pruned) / macs(graph)
        with tempfile.TemporaryDirectory() as folder:
            speed = timed([folded, pruned], Path(folder))[1]
        met &= speed >= BARS.get((name, spec), 1.0)
        bar = BARS.get((name, spec))
        print(
            f"| {name} | `{spec}` | {left:.3f} | {1 / left:.2f}x | {speed:.2f}x | {f'{bar}x' if bar else ''} |",
            flush=True,
        )
    return met


def main(names: list[str]) -> int:
    print("| model | pass | MACs left | fewer MACs | faster | bar |\n|---|---|---|---|---|---|", flush=True)
    met = True
    if "ResNet-56" in names:
        import cifar_resnet

        model, images, _ = cifar_resnet.load("resnet56")
        met &= rows("ResNet-56", capture(model, images[:2]), cifar_resnet.calibration(256)[0])
    if "ResNet-50" in names:
        torch.manual_seed(0)
        large = capture(torchvision_model("resnet50"), torch.randn(2, 3, 224, 224))
        met &= rows("ResNet-50", large, None)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(SPECS)))
