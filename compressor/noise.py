"""What rounding does to the outputs: squared slopes of values and weights, streamed over samples.

To first order a change d of a value moves the outputs by J d, and for random signs u the square of u'J d is |J d|^2
in expectation: one backward pass from u'y draws it for all values and weights at once. Outputs count by their own
energy, so that a sum of such terms is noise over signal, in one currency for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .batches import Batch
from .data import Data
from .ir import Graph, as_declared
from .ops import sizes
from .padding import Padding, Real

SAMPLES = 64  # slopes are means: more of them change little
ACTIVATIONS = 1 << 27  # numbers that a backward pass may hold at once


@dataclass
class Channels:
    """Of a value, channel by channel along `axis` (one channel if None), per sample; float64 [channels].

    low, high: the extremes. power: sum over positions of the squared slope, where the value is not 0, which
    every quantiser keeps.
    """

    axis: int | None
    low: Tensor = field(default_factory=lambda: torch.tensor(math.inf))
    high: Tensor = field(default_factory=lambda: torch.tensor(-math.inf))
    power: Tensor = field(default_factory=lambda: torch.zeros(()))

    def update(self, rows: Tensor, slopes: Tensor | None) -> None:
        """rows, and slopes by them: [positions..., channels], or of any shape where there is one channel."""
        rows = self._flat(rows)
        if len(rows):
            self.low, self.high = (
                torch.minimum(self.low, rows.amin(0)),
                torch.maximum(self.high, rows.amax(0)),
            )
        if slopes is not None:
            self.power = self.power + (self._flat(slopes).square() * (rows != 0)).sum(0)

    def _flat(self, rows: Tensor) -> Tensor:
        return rows.detach().double().reshape(-1, 1 if self.axis is None else rows.shape[-1])


@dataclass(frozen=True)
class Slopes:
    """values: value -> its channels. weights: weight -> mean squared slope of each number, in its own shape."""

    values: dict[Node, Channels]
    weights: dict[Node, Tensor]


def slopes(
    graph: Graph,
    values: Mapping[Node, int | None],
    weights: Collection[Node],
    data: Data,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Slopes:
    """Slopes of the outputs, each over the root of its energy, by values (with the axis of their channels) and weights.

    Reads `SAMPLES` samples, a few at a time. RuntimeError where an operator has no derivative.
    """
    some = data.limited(SAMPLES)
    if some.fixed is None:
        held = sum(
            math.prod(sizes(n))
            for n in graph.nodes
            if isinstance(n.meta.get("val"), Tensor) and n.op != "get_attr"
        )
        some = some.rebatched(max(1, min(8, ACTIVATIONS // max(held, 1))))
    padding, generator = Padding(graph), torch.Generator().manual_seed(seed)
    seen = {node: Channels(axis) for node, axis in values.items()}
    squares: dict[Node, Tensor] = {}
    energy: dict[Node, float] = {}
    for batch, count in zip(some, some.sizes, strict=True):
        env = _run(graph, batch, set(values), set(weights))
        real = padding.of(batch.inputs)
        loss: Any = 0.0
        for result in dict.fromkeys(graph.results):
            made = env[result]
            if not (isinstance(made, Tensor) and made.is_floating_point() and made.requires_grad):
                continue
            kept = real.values(result, made)
            if result not in energy:
                energy[result] = max(float(kept.detach().double().square().sum()) / count, 1e-30)
            signs = torch.randint(0, 2, kept.shape, generator=generator) * 2 - 1
            loss = loss + (kept * signs).sum() / math.sqrt(energy[result])
        wanted = [n for n in (*values, *weights) if isinstance(env[n], Tensor) and env[n].requires_grad]
        found: dict[Node, Tensor | None] = dict.fromkeys(wanted)
        if isinstance(loss, Tensor) and wanted:
            grads = torch.autograd.grad(loss, [env[n] for n in wanted], allow_unused=True)
            found = dict(zip(wanted, grads, strict=True))
        for node, channels in seen.items():
            value, slope = (
                None if part is None else _rows(real, node, part, channels.axis)
                for part in (env[node], found.get(node))
            )
            assert value is not None
            channels.update(value, slope)
        for node in weights:
            slope = found.get(node)
            if slope is not None:
                squares[node] = squares.get(node, 0.0) + slope.detach().square()
        advance(count)
    for channels in seen.values():
        channels.power = (channels.power / some.samples).expand(channels.low.shape)
    return Slopes(seen, {node: square / some.samples for node, square in squares.items()})


def _rows(real: Real, node: Node, part: Tensor, axis: int | None) -> Tensor:
    return real.values(node, part) if axis is None else real.rows(node, part, axis)  # type: ignore[no-any-return]


@torch.enable_grad()
def _run(graph: Graph, batch: Batch, values: Collection[Node], weights: Collection[Node]) -> dict[Node, Any]:
    """Every value of one run, connected to those that slopes are asked for."""
    feed = iter([as_declared(t, spec) for t, spec in zip(batch.inputs, graph.inputs, strict=True)])
    env: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = next(feed)
        elif node.op == "get_attr":
            env[node] = graph.tensor(node).detach()
        else:
            env[node] = graph.execute(node, env)
        wanted = node in weights or node in values
        if wanted and env[node].is_floating_point() and not env[node].requires_grad:
            env[node] = env[node].detach().requires_grad_(True)
    return env
