"""What a model misses least: an elimination for every family of channels, in one currency across layers.

Each layer that reads a family is a least-squares problem on its Gram matrix (`readers.py`, `elimination.py`). An error
costs its share of the energy of the layer's anchor, which is the residual stream where there is one: layers then
compare by the noise that they would put into what the rest of the model reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from .channels import Algebra, Group
from .data import Batch, Data
from .elimination import Elimination, Problem, eliminate
from .ir import Graph
from .ops import arguments, contractions, kind
from .padding import Padding
from .pipeline import Context
from .readers import Anchor, Layer, anchor, layer_of
from .statistics import Gram

MEMORY = 1 << 29  # bytes of Gram matrices held at once: more layers take more passes over the data
ROWS = 32  # rows for each feature of a layer. Four times as many move ResNet-56 by 0.1 dB
LEAST_ROWS = 1 << 13


@dataclass(frozen=True, eq=False)
class Reading:
    """One layer as least squares: where its error counts, and the constant that can shift its outputs.

    parts: its columns are solved in so many parts where one Gram matrix of them would not fit into memory. Groups of
    a grouped convolution and parts alike are *blocks*: matrices [outs of a group, columns of a block].
    """

    layer: Layer
    anchor: Anchor
    shift: Node | None
    parts: int

    @property
    def blocks(self) -> int:
        return self.layer.groups * self.parts

    @property
    def columns(self) -> int:
        return self.layer.features // self.parts

    @property
    def bytes(self) -> int:
        return 8 * self.blocks * self.columns**2

    def matrices(self, weight: Tensor) -> Tensor:
        """[blocks, outs / groups, columns] in float64."""
        matrix = self.layer.matrix(weight).double()
        return matrix.unflatten(2, (self.parts, -1)).transpose(1, 2).flatten(0, 1)

    def weight(self, matrices: Tensor) -> Tensor:
        """The weight of such matrices."""
        parted = matrices.unflatten(0, (-1, self.parts)).transpose(1, 2)
        return self.layer.folded(parted.flatten(2))

    def by_block(self, per_output: Tensor) -> Tensor:
        """A number for each output [outs] as [blocks, outs / groups]."""
        return per_output.unflatten(0, (self.layer.groups, -1)).repeat_interleave(self.parts, 0)

    def places(self, channels: NDArray[np.bool_]) -> list[Tensor]:
        """The columns of these input channels [ins] in every block."""
        return [
            torch.from_numpy(np.flatnonzero(np.repeat(c, self.layer.taps)))
            for c in np.split(channels, self.blocks)
        ]


def reading_of(graph: Graph, node: Node) -> Reading | None:
    """A layer as least squares; None for other operators, and for depthwise convolutions, which sum over nothing."""
    layer = layer_of(node)
    if layer is None or not graph.tensor(layer.weight).is_floating_point():
        return None
    place, per = anchor(graph, layer), layer.ins // layer.groups
    fits = (
        n for n in range(1, per + 1) if per % n == 0 and 8 * layer.groups * layer.features**2 <= MEMORY * n
    )
    return Reading(layer, place, _shift(layer, place), next(fits, per))


def _shift(layer: Layer, place: Anchor) -> Node | None:
    """The constant that adds to every output of a layer and to nothing else: its bias, or its batch norm's."""
    bias = layer.bias
    if bias is None and place.steps and kind(place.steps[0]) == "batch_norm":
        bias = arguments(place.steps[0])["bias"]
    return bias if bias is not None and len(bias.users) == 1 else None


class Moments:
    """Gram matrices of what a layer reads, one for every block, and of what its outputs should change by.

    Where deviations from means are asked for, rows are taken from the mean of the first of them: a feature that is all
    but constant would have no digits left.
    """

    def __init__(self, reading: Reading, aims: bool = False) -> None:
        self.reading = reading
        self.aimed = aims and reading.parts == 1
        outs = reading.layer.outs // reading.layer.groups if self.aimed else 0
        self.grams = [Gram(reading.columns, outs) for _ in range(reading.blocks)]
        self.origin: Tensor | None = None

    def update(self, rows: Tensor, aims: Tensor | None = None) -> None:
        """rows [R, groups, features], aims [R, outs]."""
        each = rows.reshape(len(rows), self.reading.blocks, self.reading.columns)
        if self.reading.shift is not None and len(rows):
            if self.origin is None:
                self.origin = each.mean(0, dtype=torch.float64).to(each.dtype)
            each = each - self.origin
        parts = each.unbind(1)
        wanted = (
            aims.unflatten(1, (len(parts), -1)).unbind(1)
            if aims is not None and self.aimed
            else [None] * len(parts)
        )
        for gram, x, y in zip(self.grams, parts, wanted, strict=True):
            gram.update(x, y)

    def block(self, i: int) -> tuple[Tensor, Tensor]:
        """Means of u u' [F, F] and u e' [F, O]: of deviations from their means where a bias can shift the outputs."""
        gram, count = self.grams[i], max(self.grams[i].count, 1)
        xx, xy = gram.xx / count, gram.xy / count
        if self.reading.shift is None:
            return xx, xy
        mean = gram.total / count
        return xx - torch.outer(mean, mean), xy - torch.outer(mean, gram.target_total / count)

    def mean(self, i: int) -> tuple[Tensor, Tensor]:
        """Means of u [F] and of e [O]."""
        gram, count = self.grams[i], max(self.grams[i].count, 1)
        mean = gram.total / count
        return mean if self.origin is None else mean + self.origin[i].double(), gram.target_total / count


class Sampler:
    """Rows of a layer's least-squares problem from one batch: real positions only, and no more than it takes."""

    def __init__(self, graph: Graph, samples: int, seed: int) -> None:
        self._padding, self._samples, self._seed = Padding(graph), samples, seed

    def begin(self, number: int, batch: Batch) -> None:
        self.real = self._padding.of(batch.inputs)
        self._share = batch.samples / self._samples
        self._number = number

    def rows(self, layer: Layer, value: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """What the layer reads [R, groups, features]; values shaped like its output [R, outs], at the same places."""
        if layer.kernel:
            windows, spread = layer.windows(value), [other.movedim(1, -1) for other in others]
        else:
            windows = self.real.rows(layer.source, value, layer.axis)
            spread = [self.real.rows(layer.node, other, layer.axis) for other in others]
        places = windows.shape[: windows.dim() - 1 - len(layer.kernel)]
        total = math.prod(places)
        flat = [other.reshape(total, -1) for other in spread]
        wanted = math.ceil(max(LEAST_ROWS, ROWS * layer.features) * self._share)
        if wanted >= total:
            return windows.reshape(total, layer.groups, layer.features), *flat
        generator = torch.Generator().manual_seed(self._seed + self._number)
        chosen = torch.randperm(total, generator=generator)[:wanted].sort().values
        rows = windows[torch.unravel_index(chosen, places)]
        return rows.reshape(wanted, layer.groups, layer.features), *(other[chosen] for other in flat)


# -------------------------------------------------------------------- families and those who read them


class Readers:
    """Which layers read which family. classes[layer node]: class of each of its input channels, -1 where frozen."""

    def __init__(self, graph: Graph, algebra: Algebra) -> None:
        self.algebra = algebra
        self.of: dict[int, list[Reading]] = {}
        self.classes: dict[Node, NDArray[np.int64]] = {}
        count = 1 + max((int(c.max()) for c in algebra.axes.values()), default=0)
        self.family = np.full(count, -1)
        for i, groups in enumerate(algebra.families):
            self.family[[g.index for g in groups]] = i
        for node in contractions(graph):
            found = reading_of(graph, node)
            if found is None or found.layer.is_depthwise:
                continue
            classes = algebra.axes.get((found.layer.source.name, found.layer.axis))
            if classes is not None:
                self.classes[node] = classes
                for i in sorted(set(self.family[classes].tolist()) - {-1}):
                    self.of.setdefault(i, []).append(found)

    def families(self, node: Node) -> list[int]:
        """The families that a layer reads."""
        return sorted(set(self.family[self.classes[node]].tolist()) - {-1}) if node in self.classes else []

    def channels(self, node: Node, groups: Sequence[Group]) -> NDArray[np.bool_]:
        """Which input channels of a layer belong to these groups."""
        mark = np.zeros(len(self.family), dtype=bool)
        mark[[g.index for g in groups]] = True
        return mark[self.classes[node]]

    def problems(
        self,
        reading: Reading,
        family: Sequence[Group],
        grams: Sequence[Tensor],
        matrices: Tensor,
        cost: Tensor,
    ) -> Iterator[Problem]:
        """One for each block. grams [F, F] each, cost [outs]: of the mean squared error of each output."""
        rank = np.full(len(self.family), -1)
        rank[[g.index for g in family]] = np.arange(len(family))
        here = np.repeat(rank[self.classes[reading.layer.node]], reading.layer.taps)
        weights = reading.by_block(cost)
        for i, mine in enumerate(np.split(here, reading.blocks)):
            order = np.argsort(mine, kind="stable")
            bounds = np.searchsorted(mine[order], np.arange(len(family) + 1))
            blocks = [torch.from_numpy(order[a:b]) for a, b in pairwise(bounds.tolist())]
            yield Problem(grams[i], matrices[i], weights[i], blocks, repair=not reading.layer.is_tied)


def survey(graph: Graph, algebra: Algebra, data: Data, ctx: Context) -> dict[int, Elimination]:
    """An elimination of every family that some layer reads, by the family's position in `algebra.families`.

    Costs are shares of the anchors' energy. Reads the data once, or several times where the Gram matrices of all
    layers together would not fit into memory.
    """
    readers = Readers(graph, algebra)
    found: dict[int, Elimination] = {}
    energy: dict[Node, float] = {}
    for wave in _waves(readers):
        readings = {r.layer.node: r for i in wave for r in readers.of[i]}
        moments = _observe(graph, list(readings.values()), energy, data, ctx)
        with ctx.progress("prune: what each channel is worth", len(wave)) as advance:
            for i in wave:
                family = algebra.families[i]
                problems = [
                    problem
                    for r in readers.of[i]
                    for problem in readers.problems(
                        r,
                        family,
                        [moments[r.layer.node].block(b)[0] for b in range(r.blocks)],
                        r.matrices(graph.tensor(r.layer.weight)),
                        r.anchor.scale.square() / max(energy[r.anchor.node], 1e-30),
                    )
                ]
                found[i] = eliminate(problems, len(family))
                advance(1)
    return found


def _waves(readers: Readers) -> Iterator[list[int]]:
    """Families whose Gram matrices fit into memory together."""
    wave: list[int] = []
    held: dict[Node, int] = {}
    for i, readings in readers.of.items():
        more = held | {r.layer.node: r.bytes for r in readings}
        if wave and sum(more.values()) > MEMORY:
            yield wave
            wave, more = [], {r.layer.node: r.bytes for r in readings}
        wave, held = [*wave, i], more
    if wave:
        yield wave


def _observe(
    graph: Graph, readings: Sequence[Reading], energy: dict[Node, float], data: Data, ctx: Context
) -> Mapping[Node, Moments]:
    """Gram matrices of these layers in one pass over the data; the energy of anchors not known yet is added."""
    found = {r.layer.node: Moments(r) for r in readings}
    sources: dict[Node, list[Layer]] = {}
    for r in readings:
        sources.setdefault(r.layer.source, []).append(r.layer)
    anchors = {r.anchor.node: Spread(r.anchor.axis) for r in readings if r.anchor.node not in energy}
    sampler = Sampler(graph, data.samples, ctx.seed)
    with ctx.progress("prune: reading calibration data", data.samples) as advance:
        for number, batch in enumerate(data):
            sampler.begin(number, batch)
            for node, value in graph.values(*batch.inputs):
                for layer in sources.get(node, ()):
                    found[layer.node].update(sampler.rows(layer, value)[0])
                if node in anchors:
                    anchors[node].update(sampler.real.rows(node, value, anchors[node].axis))
            advance(batch.samples)
    energy |= {node: float(spread.variance.sum()) for node, spread in anchors.items()}
    return found


class Spread:
    """Mean and variance of every channel of a value, which has them on `axis`. Both [channels], float64."""

    def __init__(self, axis: int) -> None:
        self.axis, self._count = axis, 0
        self._sum = self._squares = torch.zeros((), dtype=torch.float64)

    def update(self, value: Tensor) -> None:
        """value [..., channels]: with its channels moved to the end."""
        rows = value.reshape(-1, value.shape[-1]).double()
        self._count += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._squares = self._squares + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self._sum / max(self._count, 1)

    @property
    def variance(self) -> Tensor:
        return (self._squares / max(self._count, 1) - self.mean.square()).clamp(min=0)
