"""A graph learns from another one what it should have answered, on data without labels.

    loss = mean over outputs |s - t|^2 / var(t)  +  weight * mean over shared values inside |s - t|^2 / var(t)

t is what the teacher computes, s what the student computes from the same, possibly augmented, inputs; var(t) is the
variance from sample to sample, taken once, over those held out. Padding does not count. Sources: Hinton et al. 2015
(arXiv:1503.02531); logits by squared error, Ba and Caruana 2014 (arXiv:1312.6184); values inside, Romero et al. 2015
(arXiv:1412.6550).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from .augment import augmented, is_image
from .batches import rows_of
from .ir import Graph
from .names import operator_name, site
from .ops import extents, is_tensor, kind, sizes
from .padding import Padding, Real, is_mask
from .samples import Inputs, Place, Samples
from .slices import Region, index, regions
from .student import Student

_HELD_OUT = (8, 512)  # one sample in so many judges, so many at most
_STATISTICS = 512  # samples that batch-norm statistics are taken from
_FEATURE_BYTES = 1 << 28  # of values inside that are matched, for one batch
_ACTIVATIONS = 1 << 30  # bytes that a step may keep for its gradients; larger batches are learned in parts
_CACHE = 1 << 26  # bytes of the teacher's answers to held-out samples that are kept
_WORSE = 1.5  # times the error as it came: batch-norm statistics of the data do not suit the model
_VIEWS = ("view", "flatten", "unflatten", "permute", "transpose", "unsqueeze", "squeeze", "expand", "slice", "select",
          "identity", "split", "chunk", "unbind", "getitem")  # fmt: skip
_CONSTANT = 1e-10  # variance below this share of the square is rounding
_LEAST_BATCH = 8  # samples whose statistics a batch norm can learn with; in smaller batches it keeps its own


@dataclass(frozen=True)
class Recipe:
    """How to learn.

    epochs: passes over the data. minutes: the schedule ends by then, whatever is left of it. lr: largest step, as a
    share of the size of each tensor's numbers, None for what suits the batch norms (`learning.RATES`). batch: samples
    a step. features: weight of values inside. patience: share of the schedule that may pass without a better
    held-out error. augment: images are varied.
    """

    epochs: int
    minutes: float | None
    lr: float | None
    batch: int
    features: float
    patience: float
    augment: bool
    seed: int


class Lesson:
    """A teacher, a student, and the samples that both look at.

    batch_statistics: batch norms learn with the statistics of each batch, and take new ones from the samples before
    they are judged; otherwise they keep those that they came with.
    """

    def __init__(self, original: Graph, graph: Graph, samples: Samples, recipe: Recipe) -> None:
        self.samples, self.recipe = samples, recipe
        which = [
            i for i, node in enumerate(graph.results) if _is_float(node) and _is_float(original.results[i])
        ]
        self.outputs = len(which)
        pairs = shared_values(original, graph, recipe.batch) if recipe.features else []
        self.watched = [original.results[i] for i in which] + [a for a, _ in pairs]
        self.kept: list[dict[int, Tensor]] = [{} for _ in which] + [
            graph.lineage.get(b.name, {}) for _, b in pairs
        ]
        masked = any(is_mask(spec) for spec in original.inputs)
        self.regions: list[list[Region]] = [
            [{}] if masked or kept else regions(node) or [{}]
            for node, kept in zip(self.watched, self.kept, strict=True)
        ]
        self.padding = Padding(original)
        self.images = [is_image(spec) for spec in graph.inputs]

        drawn = samples.places()
        order = torch.randperm(len(drawn), generator=generator(recipe.seed, 0)).tolist()
        rows = samples.fixed or 1
        count = max(min(len(drawn) // _HELD_OUT[0], _HELD_OUT[1]) // rows, 1) * rows
        self.held_out = samples.grouped([drawn[i] for i in order[:count]], recipe.batch)
        self.learning = [drawn[i] for i in order[count:]]
        self.layout = _layout((original, graph), samples.gather(self.held_out[0]) if self.held_out else ())
        self.viewer = _viewer(original, self.watched)
        self.student = Student(graph, [graph.results[i] for i in which] + [b for _, b in pairs], self.layout)
        self.graphs = original, graph
        self.room = max(_ACTIVATIONS // max(_activations(graph), 1), _LEAST_BATCH)
        self.batch_statistics = bool(self.student.norms)
        self.answers: list[list[Tensor]] | None = None
        self.scales = self._scales()

    def obstacle(self) -> str:
        """Why there is nothing to learn; empty if there is."""
        if not self.held_out or not self.batches(0):
            return f"too few samples to fill the model's batches of {self.samples.fixed}"
        if not self.outputs:
            return "no output is a float, there is nothing to compare"
        error = self.evaluate()
        if not math.isfinite(error):
            return "outputs hold NaN or infinite values, or so large ones that their squares are infinite"
        if not error:
            return "the model still answers as the original does, there is nothing to learn"
        with torch.enable_grad():
            seen = self.student.module(*self.inputs(self.held_out[0]))[: self.outputs]
        return "" if any(t.requires_grad for t in seen) else "no parameter moves an output"

    def batches(self, epoch: int) -> list[list[Place]]:
        """What is learned from in one epoch, in its order; equally many in all of them."""
        draw = generator(self.recipe.seed, 2 * epoch + 2)
        return self.samples.grouped(self.learning, self.recipe.batch, draw)

    def fingerprint(self) -> str:
        """Equal for the same teacher and the same student as it came."""
        return " ".join(graph.fingerprint() for graph in self.graphs)

    def inputs(self, places: Sequence[Place], step: int | None = None) -> Inputs:
        """One batch, augmented where a step is given."""
        found = list(self.samples.gather(places))
        for i, image in enumerate(self.images):
            if image and step is not None and self.recipe.augment:
                found[i] = augmented(found[i], generator(self.recipe.seed, 2 * step + 1))
            if found[i].dim() == 4:
                found[i] = found[i].contiguous(memory_format=self.layout)
        return tuple(found)

    def teacher(self, inputs: Inputs) -> list[Tensor]:
        """What the teacher computes: its outputs, then values inside, without channels that the student lost."""
        values = list(self.viewer(*inputs))
        for k, axes in enumerate(self.kept):
            for axis, left in axes.items():
                values[k] = values[k].movedim(axis, 0)[left].movedim(0, axis)
        return values

    def losses(self, places: Sequence[Place], step: int) -> Iterator[Tensor]:
        """The loss of one step, differentiable, in parts that add up to it: each of what memory has room for."""
        inputs = self.inputs(places, step)
        for part in self._parts_of(inputs, len(places)):
            share = self._rows(part) / self._rows(inputs)
            yield share * self._loss(part)

    def _parts_of(self, inputs: Inputs, count: int) -> list[Inputs]:
        """Inputs cut into equal parts of at most `room` samples; a static batch stays whole."""
        batched = self.samples.batched
        cuts = 1 if self.samples.fixed or not any(batched) else -(-count // self.room)
        rows = -(-count // cuts)
        return [
            tuple(t[i : i + rows] if one else t for t, one in zip(inputs, batched, strict=True))
            for i in range(0, count, rows)
        ]

    def _rows(self, inputs: Inputs) -> int:
        return rows_of(inputs, self.samples.batched)

    def _loss(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(inputs)
        self.student.module.train(self.batch_statistics and self._rows(inputs) >= _LEAST_BATCH)
        errors = self._errors(wanted, self.student.module(*inputs), self.padding.of(inputs))
        loss = torch.stack(errors[: self.outputs]).mean()
        if len(errors) > self.outputs:
            loss = loss + self.recipe.features * torch.stack(errors[self.outputs :]).mean()
        return loss

    @torch.no_grad()
    def evaluate(self) -> float:
        """Held-out error of the outputs, relative to their variance; batch norms in evaluation mode."""
        self.student.module.eval()
        total, weight = 0.0, 0
        for places, wanted in zip(self.held_out, self._wanted(), strict=True):
            inputs = self.inputs(places)
            seen = self.student.module(*inputs)[: self.outputs]
            errors = self._errors(wanted, seen, self.padding.of(inputs))
            total += float(torch.stack(errors).mean()) * len(places)
            weight += len(places)
        return total / weight

    @torch.no_grad()
    def estimate(self) -> None:
        """Statistics of the batch norms anew, where they learn so: the mean over batches of samples as they are."""
        if not self.batch_statistics:
            return
        norms = self.student.norms.values()
        batches = self.samples.grouped(self.learning[:_STATISTICS], max(self.recipe.batch, 64))
        self.student.module.train()
        for number, places in enumerate(b for b in batches if len(b) >= _LEAST_BATCH):
            for norm in norms:
                norm.momentum = 1 / (number + 1)
            self.student.module(*self.inputs(places))

    def choose_statistics(self, before: float) -> float:
        """Held-out error with statistics taken anew. A model whose own suit it better than those of the data (which
        may be other data than it was trained on) keeps its own. before: the error as it came.
        """
        came = self.student.state()
        self.estimate()
        after = self.evaluate()
        if after > _WORSE * before:
            self.student.load(came)
            self.batch_statistics, after = False, before
        return after

    def _wanted(self) -> Iterator[list[Tensor]]:
        """The teacher's outputs for each held-out batch: kept where they are small, computed anew elsewhere."""
        if self.answers is not None:
            yield from self.answers
            return
        answers: list[list[Tensor]] | None = []
        used = 0
        for places in self.held_out:
            found = self.teacher(self.inputs(places))[: self.outputs]
            used += sum(t.nbytes for t in found)
            if answers is not None:
                answers.append(found)
            if used > _CACHE:
                answers = None
            yield found
        self.answers = answers

    @torch.no_grad()
    def _scales(self) -> list[list[float]]:
        """Variance from sample to sample of every part of every watched value; of one that never varies, its square."""
        sums = [[[0.0, 0.0, 0] for _ in parts] for parts in self.regions]
        for places in self.held_out:
            inputs = self.inputs(places)
            real = self.padding.of(inputs)
            for k, value in enumerate(self.teacher(inputs)):
                for total, part in zip(sums[k], self._parts(k, value, real), strict=True):
                    variance, square = _spread(part)
                    total[0] += variance * part.numel()
                    total[1] += square * part.numel()
                    total[2] += part.numel()
        means = [[(a / max(n, 1), b / max(n, 1)) for a, b, n in parts] for parts in sums]
        return [[(a if a > _CONSTANT * b else b) or 1.0 for a, b in parts] for parts in means]

    def _errors(self, wanted: Sequence[Tensor], seen: Sequence[Tensor], real: Real) -> list[Tensor]:
        """Squared error of every watched value, as a share of its variance."""
        found = []
        for k, (a, b) in enumerate(zip(wanted, seen, strict=True)):
            parts = zip(self._parts(k, a, real), self._parts(k, b, real), self.scales[k], strict=True)
            each = [F.mse_loss(y, x) / s for x, y, s in parts if x.numel()]
            found.append(torch.stack(each).mean() if each else torch.zeros(()))
        return found

    def _parts(self, k: int, value: Tensor, real: Real) -> list[Tensor]:
        value = real.values(self.watched[k], value)
        return [value[index(region, value.dim())] if region else value for region in self.regions[k]]


def _spread(value: Tensor) -> tuple[float, float]:
    """Variance along axis 0 (over everything where it has one row), and mean square."""
    if not value.numel():
        return 0.0, 0.0
    rows = value.detach().double()
    rows = rows if rows.dim() > 1 and len(rows) > 1 else rows.reshape(-1, 1)
    return float(rows.var(0, correction=min(len(rows) - 1, 1)).mean()), float(rows.square().mean())


def shared_values(original: Graph, graph: Graph, batch: int) -> list[tuple[Node, Node]]:
    """Values inside that both graphs compute under one name, at one place of the model, for several readers: where a
    residual stream flows. In one shape but for pruned channels. Thinned where they would take too much memory.
    """
    there = {n.name: n for n in original.nodes if _is_shared(n, original)}
    learned = _learned(graph)
    pairs = [
        (there[n.name], n)
        for n in graph.nodes
        if n in learned and n.name in there and _is_shared(n, graph) and _alike(there[n.name], n, graph)
    ]
    size = sum(math.prod(sizes(n)) * 4 * batch for n, _ in pairs)
    thin = -(-size // _FEATURE_BYTES) or 1
    return pairs[::-1][::thin][::-1]


def _activations(graph: Graph) -> int:
    """Bytes of all floats that one sample makes, views left out."""
    made = [n for n in graph.nodes if n.op == "call_function" and _is_float(n) and kind(n) not in _VIEWS]
    return sum(math.prod(sizes(n)) * n.meta["val"].element_size() for n in made)


def _is_shared(node: Node, graph: Graph) -> bool:
    readers = [u for u in node.users if u.op == "call_function" and is_tensor(u)]
    return node.op == "call_function" and len(readers) > 1 and _is_float(node) and node not in graph.results


def _learned(graph: Graph) -> set[Node]:
    """Values that a parameter moves: a mask that many layers read is none of them."""
    found: set[Node] = set()
    for node in graph.nodes:
        parameter = node.op == "get_attr" and str(node.target) in graph.parameters
        if parameter or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _alike(a: Node, b: Node, graph: Graph) -> bool:
    """Whether b, of `graph`, is a without slices that passes have removed."""
    kept = graph.lineage.get(b.name, {})
    same = operator_name(a) == operator_name(b) and site(a) == site(b)
    wanted = [len(kept[axis]) if axis in kept else size for axis, size in enumerate(extents(a.meta["val"]))]
    return same and wanted == list(extents(b.meta["val"]))


def _is_float(node: Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype.is_floating_point


def _viewer(graph: Graph, nodes: Sequence[Node]) -> Callable[..., tuple[Tensor, ...]]:
    """A module that computes these values of a graph."""
    twin = graph.copy()
    twin.output.args = (tuple(twin.node(node.name) for node in nodes),)
    twin.clean()
    return twin.module


def _layout(graphs: Sequence[Graph], inputs: Inputs) -> torch.memory_format:
    """Channels last where both graphs take it: convolutions learn faster so. A view may ask for other strides."""
    if not any(t.dim() == 4 for t in inputs):
        return torch.contiguous_format
    turned = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs]
    for graph in graphs:
        try:
            pairs = list(zip(graph.run(*inputs), graph.run(*turned), strict=True))
        except RuntimeError:
            return torch.contiguous_format
        if not all(
            torch.allclose(a, b, 1e-3, 1e-3 * float(a.abs().max())) for a, b in pairs if a.is_floating_point()
        ):
            return torch.contiguous_format
    return torch.channels_last


def generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
