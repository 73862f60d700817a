"""A detector in YOLOv8's shape: C2f blocks, SPPF, a path-aggregation neck, decoupled heads with DFL; raw outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BINS = 16  # of a box side's distribution


class ConvAct(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class C2f(nn.Module):
    """One half goes through bottlenecks; both halves and all that came between are joined."""

    def __init__(self, inputs: int, outputs: int, count: int, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2 = ConvAct(inputs, outputs), ConvAct((2 + count) * half, outputs)
        self.m = nn.ModuleList(
            nn.Sequential(ConvAct(half, half, 3), ConvAct(half, half, 3)) for _ in range(count)
        )
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            y = block(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Three poolings in a row, all joined."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvAct(channels, channels // 2), ConvAct(channels * 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.cv2(torch.cat(parts, 1))


class Head(nn.Module):
    """Per scale: distributions of the four sides and class scores; boxes are the distributions' means."""

    def __init__(self, channels: list[int], classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.cv2 = nn.ModuleList(self._branch(c, 4 * BINS, 4 * BINS) for c in channels)
        self.cv3 = nn.ModuleList(self._branch(c, channels[0], classes) for c in channels)
        self.dfl = nn.Conv2d(BINS, 1, 1, bias=False)
        self.dfl.weight.data.copy_(torch.arange(BINS).view(1, BINS, 1, 1))

    @staticmethod
    def _branch(inputs: int, inner: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            ConvAct(inputs, inner, 3), ConvAct(inner, inner, 3), nn.Conv2d(inner, outputs, 1)
        )

    def parts(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Centres and sizes in cells, as seen from each cell, and scores from 0 to 1."""
        scales = [torch.cat((b(x), c(x)), 1) for x, b, c in zip(maps, self.cv2, self.cv3, strict=True)]
        joined = torch.cat([s.view(s.shape[0], 4 * BINS + self.classes, -1) for s in scales], 2)
        sides, scores = joined.split((4 * BINS, self.classes), 1)
        n, _, anchors = sides.shape
        sides = self.dfl(sides.view(n, 4, BINS, anchors).transpose(2, 1).softmax(1)).view(n, 4, anchors)
        low, high = sides.chunk(2, 1)
        return (high - low) / 2, low + high, scores.sigmoid()

    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat(self.parts(maps), 1)


class Yolo(nn.Module):
    """images [n, 3, h, w], h and w multiples of 32 -> [n, 4 + classes, anchors]"""

    def __init__(self, classes: int = 20, width: int = 16) -> None:
        super().__init__()
        a, b, c, d, e = (width * m for m in (1, 2, 4, 8, 16))
        self.stem = nn.Sequential(ConvAct(3, a, 3, 2), ConvAct(a, b, 3, 2), C2f(b, b, 1, True))
        self.third = nn.Sequential(ConvAct(b, c, 3, 2), C2f(c, c, 2, True))
        self.fourth = nn.Sequential(ConvAct(c, d, 3, 2), C2f(d, d, 2, True))
        self.fifth = nn.Sequential(ConvAct(d, e, 3, 2), C2f(e, e, 1, True), SPPF(e))
        self.up4, self.up3 = C2f(d + e, d, 1, False), C2f(c + d, c, 1, False)
        self.down3, self.down4 = ConvAct(c, c, 3, 2), ConvAct(d, d, 3, 2)
        self.out4, self.out5 = C2f(c + d, d, 1, False), C2f(d + e, e, 1, False)
        self.head = Head([c, d, e], classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        p3 = self.third(self.stem(x))
        p4 = self.fourth(p3)
        p5 = self.fifth(p4)
        n4 = self.up4(torch.cat((F.interpolate(p5, scale_factor=2.0), p4), 1))
        n3 = self.up3(torch.cat((F.interpolate(n4, scale_factor=2.0), p3), 1))
        n4 = self.out4(torch.cat((self.down3(n3), n4), 1))
        n5 = self.out5(torch.cat((self.down4(n4), p5), 1))
        return [n3, n4, n5]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x))


class AnchoredYolo(nn.Module):
    """The same for images of one size, decoded as YOLOv8 decodes: centres and sizes in pixels, then the scores.

    images [n, 3, size, size] -> [n, 4 + classes, anchors]; the anchors are the cells of strides 8, 16 and 32.
    """

    def __init__(self, size: int, classes: int = 20, width: int = 16) -> None:
        super().__init__()
        self.net = Yolo(classes, width)
        cells = [(x, y, s) for s in (8, 16, 32) for y in range(size // s) for x in range(size // s)]
        x, y, stride = torch.tensor(cells, dtype=torch.float32).T
        self.register_buffer("centres", torch.stack((x, y)) + 0.5)
        self.register_buffer("stride", stride)

    def forward(self, x: Tensor) -> Tensor:
        offset, extent, scores = self.net.head.parts(self.net.maps(x))
        return torch.cat(((offset + self.centres) * self.stride, extent * self.stride, scores), 1)
