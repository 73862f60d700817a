"""How long residual blocks take in ONNX Runtime by the width between their two 3x3 convolutions, of that of full width.

    python benchmarks/conv_widths.py       Markdown; what `channel_multiple` of a target is chosen by

Four blocks each, one thread, batch 1, timed in turns.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressor import delivery, measure, sessions  # noqa: E402
from compressor.capture import capture  # noqa: E402
from targets.cpu import CPU  # noqa: E402

SHAPES = (
    (16, 32, (4, 6, 8, 12, 16)),
    (32, 16, (8, 12, 16, 20, 24, 32)),
    (64, 8, (16, 20, 24, 32, 40, 48, 56, 64)),
)


class Block(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(*pair, 3, padding=1) for pair in ((channels, width), (width, channels)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.relu(self.a(x))))


def main() -> None:
    print("| channels | image | share of the time, by inner width |\n|---|---|---|", flush=True)
    for channels, size, widths in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for width in widths:
                model = nn.Sequential(*(Block(channels, width) for _ in range(4))).eval()
                place = Path(folder, str(width))
                place.mkdir()
                graph = capture(model, torch.randn(2, channels, size, size))
                files.append(delivery.deliver(graph, CPU, place, {}, {}).path)
            with sessions.opened(files[-1]) as session:
                feeds = measure.random_feeds(session, batch=1)
            found = measure.bench(files, feeds=feeds, seconds=8.0)
        shares = [1 / measure.ratio(found[-1], one).median for one in found]
        cells = ", ".join(f"{width}: {share:.2f}" for width, share in zip(widths, shares, strict=True))
        print(f"| {channels} | {size} x {size} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
