"""Train a small network on handwritten digits and save what `compress` needs: `make demo` runs this first.

A residual network learns 8x8 scans of digits (scikit-learn ships them), enlarged to 32x32. Then its body and head
are frozen, and low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) teach the head to read noisy scans. The
saved model still holds the adapters as layers of their own: merging them is the compiler's work.

Writes digits.pt2 (the model, its batch axis dynamic), digits.npz (256 training images to calibrate with) and
digits-test.npz (images that training never saw, with their labels) into the working directory.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

SEED, EPOCHS, BATCH = 0, 12, 64
WEAK, FADE = 0.5, 0.8  # share of each block's inner channels that fade, and to how much an epoch


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), as in He et al. 2015 (arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    @torch.no_grad()
    def fade(self) -> None:
        """Turn the weakest inner channels down a little."""
        strength = self.conv1.weight.flatten(1).norm(dim=1) * self.bn1.weight.abs()
        weakest = strength.argsort()[: int(WEAK * len(strength))]
        self.bn1.weight[weakest] *= FADE
        self.bn1.bias[weakest] *= FADE


class LoRALinear(nn.Module):
    """base(x) + scale * B A x with a frozen base. B starts at zero, so that nothing changes at first."""

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.b(self.a(x))


class DigitsNet(nn.Module):
    """Images [N, 1, 32, 32] in 0..1 to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(Block(32, 64, 2), Block(64, 128, 2), Block(128, 128, 1), Block(128, 128, 1))
        self.hidden: nn.Module = nn.Linear(128, 256)
        self.classes: nn.Module = nn.Linear(256, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x)).mean((2, 3))

    def head(self, x: Tensor) -> Tensor:
        return self.classes(F.relu(self.hidden(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def add_adapters(self) -> list[nn.Parameter]:
        """Freeze everything and wrap the head's layers; returns the adapters' parameters."""
        self.requires_grad_(False)
        self.hidden, self.classes = LoRALinear(self.hidden), LoRALinear(self.classes)
        return [p for p in self.parameters() if p.requires_grad]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; float32 [N, 1, 32, 32] in 0..1, int64 [N]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=32, mode="bilinear")
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.3, stratify=data.target, random_state=SEED
    )
    return images[train], labels[train], images[test], labels[test]


def batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images))[: len(images) // BATCH * BATCH]
    return [(images[i], labels[i]) for i in order.split(BATCH)]


def train(model: DigitsNet, images: Tensor, labels: Tensor) -> None:
    """Train, and fade the weakest channels after every epoch, so that the network learns to do without them.

    Such a network can be pruned with no fine-tuning. A milder form of soft filter pruning, which zeroes the weakest
    and lets them grow back: He et al. 2018 (arXiv:1808.06866).
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for epoch in range(EPOCHS):
        for x, y in batches(images, labels):
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        for block in model.body:
            block.fade()
        print(f"epoch {epoch + 1:2d} of {EPOCHS}: loss {loss.item():.3f}", flush=True)
    model.eval()


def adapt(model: DigitsNet, images: Tensor, labels: Tensor) -> None:
    """Train the adapters of the head on clean and on noisy scans; the frozen body runs once."""
    optimizer = torch.optim.AdamW(model.add_adapters(), lr=1e-3)
    noisy = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
    with torch.no_grad():
        features = model.features(torch.cat([images, noisy]))
    for _ in range(10):
        for x, y in batches(features, labels.repeat(2)):
            optimizer.zero_grad()
            F.cross_entropy(model.head(x), y, label_smoothing=0.1).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same network whatever the number of cores
    started = time.perf_counter()
    images, labels, test_images, test_labels = digits()
    model = DigitsNet()
    train(model, images, labels)
    adapt(model, images, labels)
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
        batch = torch.export.Dim("batch")
        program = torch.export.export(
            model, (images[:2].clone(),), dynamic_shapes=({0: batch},), strict=False
        )
    torch.export.save(program, "digits.pt2")
    np.savez_compressed("digits.npz", x=images[:256].numpy(), y=labels[:256].numpy())
    np.savez_compressed("digits-test.npz", x=test_images.numpy(), y=test_labels.numpy())
    took = time.perf_counter() - started
    print(f"digits.pt2: accuracy {accuracy:.2%} on {len(test_labels)} test images, trained in {took:.0f} s")


if __name__ == "__main__":
    main()
