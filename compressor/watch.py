"""Layers timed by themselves, whole and in parts, so that a rewrite is taken only where it pays on the target."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .capture import capture
from .factors import Option
from .ir import Graph
from .ops import sizes
from .pipeline import Context

SURE = 0.97  # of its time: what a split must run in, alone, to count as faster


class Watch:
    """Every pair of shapes is timed once. times: key of an option -> milliseconds whole, and in parts."""

    def __init__(self, ctx: Context) -> None:
        assert ctx.measure is not None
        self.measure, self._progress = ctx.measure, ctx.progress
        self.times: dict[tuple[Any, ...], tuple[float, float]] = {}

    def faster(self, option: Option) -> bool:
        if option.key not in self.times:
            with self._progress(f"timing {option}", None):
                whole, parts = self.measure(alone(option, [option.layer.step]), alone(option, option.shapes))
            self.times[option.key] = (whole, parts)
        whole, parts = self.times[option.key]
        return parts <= SURE * whole

    def facts(self) -> list[dict[str, Any]]:
        """One row for every pair, for the report."""
        names = ("outs", "ins", "kernel", "positions", "place", "form", "ranks")
        return [
            dict(zip(names, map(str, key), strict=True)) | {"whole_ms": whole, "parts_ms": parts}
            for key, (whole, parts) in self.times.items()
        ]


class _Chain(nn.Module):
    """Operators with weights, one after the other."""

    def __init__(self, steps: list[tuple[Any, Tensor, tuple[Any, ...]]]) -> None:
        super().__init__()
        self.calls = [(target, place) for target, _, place in steps]
        self.weights = nn.ParameterList(weight for _, weight, _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        for (target, place), weight in zip(self.calls, self.weights, strict=True):
            x = target(x, weight, None, *place)
        return x


def alone(option: Option, shapes: Iterable[tuple[Any, tuple[int, ...], tuple[Any, ...]]]) -> Graph:
    """These operators over what the layer reads, for one sample; its numbers depend on nothing but its shapes."""
    generator = torch.Generator().manual_seed(0)
    steps = [
        (target, torch.randn(size, generator=generator) / math.sqrt(math.prod(size[1:])), place)
        for target, size, place in shapes
    ]
    sample = torch.randn(sizes(option.layer.source), generator=generator)
    return capture(_Chain(steps).eval(), (sample,), dynamic=False)
