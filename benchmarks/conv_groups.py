"""How long grouped convolutions take in ONNX Runtime between integer layers: in integers, and in floats.

    python benchmarks/conv_groups.py       Markdown; what `group_width` of a target is chosen by

A 1x1 convolution, ReLU, the grouped one, ReLU, a 1x1 convolution; one thread, batch 1, timed in turns. *island*: the
grouped one is float, between a dequantiser and a quantiser.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressor import data, measure  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.emit import emit  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.place import place  # noqa: E402
from compressor.quantize import calibrate, insert_pairs  # noqa: E402
from compressor.target import QLINEAR  # noqa: E402
from targets.cpu import CPU  # noqa: E402

# channels in, channels out, groups, kernel, stride, size of the image
SHAPES = (
    (48, 96, 48, 3, 2, 56),
    (96, 192, 96, 7, 2, 28),
    (96, 96, 48, 3, 1, 28),
    (128, 128, 32, 3, 1, 28),
    (256, 256, 32, 3, 1, 14),
    (96, 96, 12, 3, 1, 28),
    (96, 96, 6, 3, 1, 28),
    (256, 256, 16, 3, 1, 14),
    (96, 96, 3, 3, 1, 28),
    (240, 240, 3, 1, 1, 14),
)


def quantised(graph: Graph, samples: data.Data, width: int) -> Graph:
    """Groups of fewer channels stay float."""
    copy, spec = graph.copy(), replace(QLINEAR, group_width=width)
    ranges = calibrate(copy, place(copy, spec).owner, samples)
    insert_pairs(place(copy, spec, ranges), ranges)
    copy.clean()
    return copy


def main() -> None:
    print(
        "| channels | kernel | image | inputs a group | float | integer | island |\n|---|---|---|---|---|---|---|"
    )
    for ins, outs, groups, kernel, stride, size in SHAPES:
        torch.manual_seed(0)
        grouped = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=groups)
        layers = (nn.Conv2d(ins, ins, 1), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(outs, outs, 1))
        x = torch.randn(2, ins, size, size)
        graph = capture(nn.Sequential(*layers).eval(), x)
        samples = data.open_data([(x,)], graph.inputs)
        trials = {
            "float": graph,
            "integer": quantised(graph, samples, 1),
            "island": quantised(graph, samples, ins),
        }
        with tempfile.TemporaryDirectory() as folder:
            files = [
                emit(one, Path(folder, f"{name}.onnx"), dialect=CPU.dialect).path
                for name, one in trials.items()
            ]
            times = measure.bench(files, feeds=[x[:1].numpy()], threads=1, seconds=4.0)
        cells = " | ".join(f"{one.median_ms:.3f} ms" for one in times)
        step = f" / {stride}" if stride > 1 else ""
        print(
            f"| {ins} to {outs} | {kernel} x {kernel}{step} | {size} x {size} | {ins // groups} | {cells} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
