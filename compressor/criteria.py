"""What makes a channel important: one number for every class of tied channels, from its weights or from data.

From weights and from batch norm nothing is run. From data: one pass over the calibration stream (`apoz`), one with
gradients (`taylor`), or a few samples once for every family of channels (`sensitivity`). Sums are kept, never
activations, so memory does not grow with the number of samples. Same graph, data and seed: the same numbers.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from .channels import Algebra, Key, contracted
from .data import Batch, Data
from .errors import DataError, UsageError
from .ir import Graph, as_declared
from .names import operator_name
from .ops import arguments, contractions, is_constant, kind, shape
from .oracle import masked

Floats = NDArray[np.float64]
Loss = Callable[[Sequence[Tensor], "Tensor | None"], Tensor]

ROWS = 512  # filters whose distances to all others are computed at a time
SAMPLES = 32  # that every family is masked on for `sensitivity`
MASKED_SHARE = 0.25  # of a family's channels, the least important
LOUDEST = 1e3  # noise over signal of outputs that are no numbers any more
GIVE_ZEROS = frozenset(
    f"aten.{name}.default"
    for name in ("relu", "relu6", "threshold", "clamp", "clamp_min", "hardtanh", "hardswish", "hardsigmoid")
)


@dataclass(frozen=True)
class CriteriaData:
    """What a criterion may look at besides the weights.

    calibration: batches, None if the user gave none. loss(outputs, labels or None) -> scalar, for `taylor`; cross
    entropy of the first output [n, classes] with the labels where None. seed: of `random`.
    progress(title, total): a context manager that yields `advance(n)`.
    """

    calibration: Data | None = None
    seed: int = 0
    loss: Loss | None = None
    progress: Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]] = (
        lambda title, total: nullcontext(lambda n: None)
    )

    def needed(self, criterion: str) -> Data:
        """The calibration data; UsageError where there are none."""
        if self.calibration is None:
            raise UsageError(
                f"prune(criterion={criterion}): needs calibration data, to see what the channels do: pass --calib DATA"
            )
        return self.calibration


def importance(graph: Graph, algebra: Algebra, criterion: str, data: CriteriaData) -> Floats:
    """Importance of every class of `algebra`, the analysis of `graph`: float64 [classes], none negative.

    Values compare across layers. UsageError names what to pass where a criterion needs data that are not there.
    """
    return CRITERIA[criterion](graph, algebra, data)


def _size(algebra: Algebra) -> int:
    return 1 + max((int(classes.max()) for classes in algebra.axes.values()), default=-1)


def _prunable(algebra: Algebra) -> NDArray[np.bool_]:
    """Which classes can be removed at all: nothing is computed for the others alone."""
    found = np.zeros(_size(algebra), dtype=bool)
    found[[group.index for group in algebra.groups if not group.reason]] = True
    return found


def _shares(algebra: Algebra, parts: Iterable[tuple[Key, Floats]]) -> tuple[Floats, NDArray[np.bool_]]:
    """Shares of each class in these slices, summed, and which classes have any."""
    size = _size(algebra)
    total, seen = np.zeros(size), np.zeros(size, dtype=bool)
    for key, values in parts:
        if key in algebra.axes:
            seen[algebra.axes[key]] = True
            total += np.bincount(algebra.axes[key], values / (values.sum() or 1.0), minlength=size)
    return total, seen


# -------------------------------------------------------------------- from weights


def _magnitude(graph: Graph, algebra: Algebra, exponent: int) -> Floats:
    """The geometric mean of a class's shares of what writes it and of what reads it.

    A share is relative to the whole weight, so layers compare; shares are summed over all weights, so a channel that
    many layers read weighs as much as in all of them.
    """
    written: list[tuple[Key, Floats]] = []
    read: list[tuple[Key, Floats]] = []
    for weight, values, reads, writes in _weights(graph):
        powers = values.abs() ** exponent
        for axes, norms in ((writes, written), (reads, read)):
            for axis in axes:
                norms.append(((weight.name, axis), powers.movedim(axis, 0).flatten(1).sum(1).numpy()))
    (writes_share, has_writer), (reads_share, has_reader) = _shares(algebra, written), _shares(algebra, read)
    return np.where(has_writer & has_reader, np.sqrt(writes_share * reads_share), writes_share + reads_share)


def _bn(graph: Graph, algebra: Algebra, data: CriteriaData) -> Floats:
    """Absolute gain of the batch norm, as a share of its layer's; channels without one count by their weights.

    Source: Liu et al. 2017, network slimming (arXiv:1708.06519).
    """
    gains = (
        ((gain.name, 0), graph.tensor(gain).double().abs().numpy())
        for node in graph.nodes
        if kind(node) == "batch_norm" and is_constant(gain := arguments(node)["weight"])
    )
    scales, scaled = _shares(algebra, gains)
    return np.where(scaled, scales, _magnitude(graph, algebra, 2))


def _fpgm(graph: Graph, algebra: Algebra, data: CriteriaData) -> Floats:
    """Sum of a filter's distances to all filters of its layer, as a share: the nearer to the median, the less it adds.

    sum_j ||F_i - F_j||, of filters as inference sees them. Channels that no weight computes count by their weights.
    Source: He et al. 2019, filter pruning via geometric median (arXiv:1811.00250), equation 7.
    """
    prunable = _prunable(algebra)

    def distances() -> Iterator[tuple[Key, Floats]]:
        for weight, values, axis in ((w, v, axis) for w, v, _, writes in _weights(graph) for axis in writes):
            key = (weight.name, axis)
            if key in algebra.axes and prunable[algebra.axes[key]].any():
                filters = values.movedim(axis, 0).flatten(1)
                sums = [torch.cdist(some, filters).sum(1) for some in filters.split(ROWS)]
                yield key, torch.cat(sums).numpy()

    far, written = _shares(algebra, distances())
    return np.where(written, far, _magnitude(graph, algebra, 2))


def _random(graph: Graph, algebra: Algebra, data: CriteriaData) -> Floats:
    return np.random.default_rng(data.seed).random(_size(algebra))


def _weights(graph: Graph) -> Iterator[tuple[Node, Tensor, list[int], list[int]]]:
    """(weight, its float64 values, axes that it reads by, axes that it writes) of every contraction with a weight.

    As inference sees it: a convolution's filters times the scale of the batch norm behind it.
    """
    for reader in contractions(graph):
        pairs = contracted(reader)
        for weight in dict.fromkeys(operand for operand, _ in pairs if is_constant(operand)):
            reads = [axis for operand, axis in pairs if operand is weight]
            values = graph.tensor(weight).double()
            filters = kind(reader) in ("conv", "conv_transpose")
            writes = (
                [1 - reads[0]] if filters else [axis for axis in range(values.dim()) if axis not in reads]
            )
            scale = _batch_norm_scale(graph, reader)
            if scale is not None and kind(reader) == "conv":
                values = values * scale.reshape(-1, *[1] * (values.dim() - 1))
            yield weight, values, reads, writes


def _batch_norm_scale(graph: Graph, conv: Node) -> Tensor | None:
    """|gain| / deviation of the batch norm that alone reads a convolution."""
    user = next(iter(conv.users), None)
    if user is None or len(conv.users) != 1 or kind(user) != "batch_norm":
        return None
    a = arguments(user)
    if not (is_constant(a["weight"]) and is_constant(a["running_var"])):
        return None
    deviation = (graph.tensor(a["running_var"]).double() + a["eps"]).sqrt()
    return graph.tensor(a["weight"]).double().abs() / deviation


# -------------------------------------------------------------------- from activations


def _apoz(graph: Graph, algebra: Algebra, data: CriteriaData) -> Floats:
    """How often a channel is not zero behind its activations, as a share of its layer's: 1 - APoZ.

    Layers whose activations never gave a zero (GELU, SiLU, none) count by their weights.
    Source: Hu et al. 2016, network trimming (arXiv:1607.03250), equation 1.
    """
    stream, prunable = data.needed("apoz"), _prunable(algebra)
    wanted = {
        node: axes
        for node in graph.nodes
        if operator_name(node) in GIVE_ZEROS
        and (axes := [i for i in range(len(shape(node))) if _stands(algebra, (node.name, i), prunable)])
    }
    if not wanted:
        raise UsageError(
            "prune(criterion=apoz): no channel of this model that can go has an activation that gives zeros (relu, "
            "relu6, hardswish ...): use another criterion"
        )
    alive: dict[Key, Tensor] = {}
    positions: dict[Key, int] = {}
    with data.progress("apoz", stream.samples) as advance:
        for batch, samples in zip(stream, stream.sizes, strict=True):
            for node, value in graph.values(*batch.inputs):
                for axis in wanted.get(node, ()):
                    ones = (value != 0).movedim(axis, 0).flatten(1)
                    key = (node.name, axis)
                    alive[key] = alive.get(key, 0) + ones.sum(1)
                    positions[key] = positions.get(key, 0) + ones.shape[1]
            advance(samples)
    rates = [(key, counts.double().numpy() / positions[key]) for key, counts in alive.items()]
    often, seen = _shares(algebra, [(key, rate) for key, rate in rates if (rate < 1).any()])
    return np.where(seen, often, _magnitude(graph, algebra, 2))


def _stands(algebra: Algebra, key: Key, prunable: NDArray[np.bool_]) -> bool:
    return key in algebra.axes and bool(prunable[algebra.axes[key]].any())


def _sensitivity(graph: Graph, algebra: Algebra, data: CriteriaData) -> Floats:
    """Noise over signal that the outputs get when the weakest quarter of a family is masked at its readers.

    Inside a family channels stand in the order of their weights; the quarter together counts as the noise it makes.
    """
    stream = data.needed("sensitivity").limited(SAMPLES)
    batches = list(stream)
    references = [graph.run(*batch.inputs) for batch in batches]
    order = _magnitude(graph, algebra, 2)
    values = np.zeros_like(order)
    with data.progress("sensitivity", len(algebra.families)) as advance:
        for family in algebra.families:
            members = sorted(family, key=lambda g: (order[g.index], g.index))
            weakest = members[: max(1, round(MASKED_SHARE * len(members)))]
            twin = masked(graph, weakest)
            noise = _noise(references, (twin.run(*batch.inputs) for batch in batches))
            classes = [group.index for group in members]
            part = float(order[[group.index for group in weakest]].sum())
            flat = part <= 0  # weights of zero: all alike
            weight = np.ones(len(classes)) if flat else order[classes]
            values[classes] = weight * noise / (len(weakest) if flat else part)
            advance(1)
    return values


def _noise(references: Sequence[Sequence[Tensor]], seen: Iterable[Sequence[Tensor]]) -> float:
    """|y - y'|^2 / |y|^2 over all samples, the mean over the float outputs."""
    noise: dict[int, float] = {}
    signal: dict[int, float] = {}
    for expected, outputs in zip(references, seen, strict=True):
        for i, (y, z) in enumerate(zip(expected, outputs, strict=True)):
            if y.is_floating_point():
                finite = torch.isfinite(y)
                noise[i] = noise.get(i, 0.0) + float((y - z)[finite].double().square().sum())
                signal[i] = signal.get(i, 0.0) + float(y[finite].double().square().sum())
    ratios = [n / signal[i] if signal[i] else 0.0 for i, n in noise.items()]
    mean = float(np.mean(ratios)) if ratios else 0.0
    return min(mean, LOUDEST) if np.isfinite(mean) else LOUDEST


# -------------------------------------------------------------------- from a loss


def _taylor(graph: Graph, algebra: Algebra, data: CriteriaData) -> Floats:
    """(d loss / d gate)^2, mean over the batches, of a gate of 1 at every place where a channel is read.

    The slope of a gate is sum(w * dloss/dw) over the weights that read the channel, equally sum(x * dloss/dx): what
    the loss changes by to first order when the channel is masked there.
    Source: Molchanov et al. 2019, importance estimation (arXiv:1906.10771), equations 8 and 10.
    """
    stream, size = data.needed("taylor"), _size(algebra)
    gates = _gates(graph, algebra)
    total = np.zeros(size)
    with data.progress("taylor", stream.samples) as advance:
        for batch, samples in zip(stream, stream.sizes, strict=True):
            slopes = np.zeros(size)
            for (operand, axis), slope in _slopes(graph, gates, batch, data.loss).items():
                slopes += np.bincount(algebra.axes[operand.name, axis], slope, minlength=size)
            total += slopes**2
            advance(samples)
    return total / len(stream)


def _gates(graph: Graph, algebra: Algebra) -> dict[Node, tuple[Node, int]]:
    """reader -> the operand axis where masking it takes a channel away.

    Not at a depthwise convolution, which hands its channels on to the next reader.
    """
    prunable = _prunable(algebra)
    found: dict[Node, tuple[Node, int]] = {}
    for reader in contractions(graph):
        a, pairs = arguments(reader), contracted(reader)
        if kind(reader) in ("conv", "conv_transpose") and 1 < a["groups"] == shape(a["input"])[1]:
            continue
        operand = next(((n, axis) for n, axis in pairs if not is_constant(n)), None)
        if operand is not None and _stands(algebra, (operand[0].name, operand[1]), prunable):
            found[reader] = operand
    return found


@torch.enable_grad()
def _slopes(
    graph: Graph, gates: Mapping[Node, tuple[Node, int]], batch: Batch, loss: Loss | None
) -> dict[tuple[Node, int], Floats]:
    """d loss / d gate of every gated operand axis, for one batch."""
    feed = iter([as_declared(t, spec) for t, spec in zip(batch.inputs, graph.inputs, strict=True)])
    env: dict[Node, Any] = {}
    made: dict[tuple[Node, int], Tensor] = {}
    outputs: tuple[Tensor, ...] = ()
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = next(feed)
            continue
        view: Any = env
        if node in gates:
            operand, axis = gates[node]
            x: Tensor = env[operand]
            sizes = [x.shape[axis] if i == axis else 1 for i in range(x.dim())]
            gate = made.setdefault(gates[node], torch.ones(sizes, dtype=x.dtype, requires_grad=True))
            view = ChainMap({operand: x * gate}, env)
        env[node] = graph.execute(node, view)
        if node.op == "output":
            outputs = env[node]
    value = _loss(outputs, batch, loss)
    if not value.requires_grad:
        raise UsageError(
            "prune(criterion=taylor): the loss does not depend on any channel that can go: use another criterion"
        )
    found = torch.autograd.grad(value, list(made.values()), allow_unused=True)
    return {
        key: (torch.zeros_like(made[key]) if slope is None else slope).reshape(-1).double().numpy()
        for key, slope in zip(made, found, strict=True)
    }


def _loss(outputs: Sequence[Tensor], batch: Batch, loss: Loss | None) -> Tensor:
    if loss is not None:
        value = loss(outputs, batch.labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError("prune(loss=...): the function must return one number as a tensor, the loss")
        return value.reshape(())
    logits = next((o for o in outputs if o.is_floating_point() and o.dim() == 2), None)
    labels = batch.labels
    whole = labels is not None and not labels.is_floating_point() and labels.dim() == 1
    if logits is None or labels is None or not whole:
        raise UsageError(
            "prune(criterion=taylor): needs labels, as whole numbers in an array y of the calibration data, for an "
            "output [n, classes]; or loss=module:function, which gets (outputs, labels or None) and returns the loss"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"the calibration data hold labels {int(labels.min())} to {int(labels.max())}, and the model's classes "
            f"are 0 to {logits.shape[1] - 1}: give data with its own labels"
        )
    return torch.nn.functional.cross_entropy(logits, labels)


CRITERIA: dict[str, Callable[[Graph, Algebra, CriteriaData], Floats]] = {
    "l1": lambda graph, algebra, data: _magnitude(graph, algebra, 1),
    "l2": lambda graph, algebra, data: _magnitude(graph, algebra, 2),
    "bn": _bn,
    "fpgm": _fpgm,
    "apoz": _apoz,
    "taylor": _taylor,
    "sensitivity": _sensitivity,
    "random": _random,
}
