"""Compress a model that lives in Python, with calibration batches from your own code.

Any iterable of batches does: tensors, tuples of tensors, dicts by input name, a DataLoader. A label may come after
the inputs; calibration ignores it. It is read once and a bounded number of samples is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import compressor


class Classifier(nn.Module):
    """Images [N, 3, 32, 32] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.classes = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.conv(images).mean((2, 3)))


def calibration(batches: int = 8, size: int = 16) -> Iterator[Tensor]:
    """Put your own data here, prepared as for inference; random numbers only show the form."""
    for _ in range(batches):
        yield torch.randn(size, 3, 32, 32)


def main() -> None:
    torch.manual_seed(0)
    model = Classifier().eval()  # never trained: put your own here
    result = compressor.compress(
        model,
        (torch.randn(2, 3, 32, 32),),
        passes="fold,int8",
        calibration=calibration(),
        output="classifier-compressed",
    )
    for row in result.report["rows"]:
        print(
            f"{row['pass']:<6} {row['contract']:<8} {row['status']:<10} {row['bytes']:>9,} bytes of tensors"
        )
    print(f"wrote {result.onnx}")


if __name__ == "__main__":
    main()
