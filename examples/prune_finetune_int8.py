"""Prune a network, train what is left in your own loop with labels, and finish with int8.

Three steps, and the report of the last one goes back to the first:

    result = compressor.compress(model, example, passes="prune(macs=0.4)")
    module = result.trainable()      # an nn.Module: your names, fewer channels, batch norm and dropout in place
    ...                              # your loop, your optimizer, your labels
    compressor.compress(module, passes="fold,int8", calibration=images)

With files instead of Python: `compress MODEL --passes 'prune(macs=0.4)' --emit pt2` writes model.pt2,
`compressor.api.trainable("model.pt2")` is the module, `module.save("trained.pt2")` keeps what was trained, and
`compress trained.pt2 --passes fold,int8 --calib DATA` goes on from it.

The data are scikit-learn's handwritten digits, enlarged to 16x16. `python prune_finetune_int8.py EPOCHS` trains for
so many epochs (default 10). Writes the folders digits-pruned and digits-int8 into the working directory.
"""

from __future__ import annotations

import sys
import time

import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import compressor

SEED, BATCH, KEEP = 0, 64, 0.4


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Digits(nn.Module):
    """Images [N, 1, 16, 16] in 0..1 to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(1, 32), convolution(32, 64, 2), convolution(64, 64), convolution(64, 96, 2)
        )
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.body(images).mean((2, 3))))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; float32 [N, 1, 16, 16] in 0..1, int64 [N]."""
    found = load_digits()
    images = F.interpolate(
        torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, size=16, mode="bilinear"
    )
    labels = torch.tensor(found.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=0.3, stratify=found.target, random_state=SEED
    )
    return images[train], labels[train], images[test], labels[test]


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """An ordinary loop; it knows nothing of pruning."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def onnx_accuracy(result: compressor.Result, images: Tensor, labels: Tensor) -> float:
    session = onnxruntime.InferenceSession(result.onnx)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return (torch.from_numpy(logits).argmax(1) == labels).float().mean().item()


def main(epochs: int) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    started = time.perf_counter()
    images, labels, *test = data()

    model = Digits()
    fit(model, images, labels, epochs, rate=4e-3)
    pruned = compressor.compress(
        model,
        (images[:2],),
        passes=f"prune(macs={KEEP})",
        calibration=images[:512],
        dynamic=True,
        emit="pt2",
        measure=False,  # no stopwatch: what this is about is accuracy
        output="digits-pruned",
    )
    module = pruned.trainable()
    before = accuracy(module, *test)
    fit(module, images, labels, max(1, epochs // 2), rate=2e-3)
    small = compressor.compress(
        module,
        passes="fold,int8",
        calibration=images[:512],
        dynamic=True,
        measure=False,
        output="digits-int8",
    )

    rows = [
        ("as trained", accuracy(model, *test), pruned.report["rows"][0]),
        ("pruned", before, pruned.report["rows"][-1]),
        ("trained again", accuracy(module, *test), small.report["rows"][0]),
        ("int8, in ONNX Runtime", onnx_accuracy(small, *test), small.report["rows"][-1]),
    ]
    print(f"{'':<22} {'accuracy':>8} {'MACs':>11} {'bytes':>9}")
    for words, share, row in rows:
        print(f"{words:<22} {share:>8.2%} {row['macs']:>11,} {row['bytes']:>9,}")
    came = small.report["continued_from"]
    print(f"the report of {small.onnx} goes back to {came['spec']} on {came['original']['path']}")
    print(f"wrote {pruned.output / 'model.pt2'} and {small.onnx} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
