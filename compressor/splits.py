"""Which layers can be split, what calibration data say of them, and the splits that follow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.fx import Node

from .factors import Basis, Layer, Option, options
from .ir import Graph
from .names import site
from .ops import arguments, is_constant, kind, sizes
from .padding import Padding
from .pipeline import Context, Decline
from .readers import Anchor, anchor, layer_of
from .reconstruct import Moments
from .statistics import Covariance
from .survey import Spread

Value = tuple[Node, int]  # a value of the graph, and the axis of its channels

STATISTICS = 1 << 28  # bytes of covariances held at once; more layers take more passes over the data


def layers_of(graph: Graph, ignore: Sequence[str]) -> tuple[list[Layer], list[Decline]]:
    """The layers that can be split, and why the others cannot."""
    layers, declines = [], []
    for node in graph.nodes:
        if kind(node) not in ("conv", "conv_transpose", "linear"):
            continue
        pattern = next((p for p in ignore if fnmatchcase(site(node), p)), None)
        obstacle = f"ignored by '{pattern}'" if pattern is not None else _obstacle(graph, node)
        if obstacle:
            declines.append(Decline.at(node, obstacle))
            continue
        bound = arguments(node)
        outs, ins, *kernel = sizes(bound["weight"])
        reads, writes = math.prod(sizes(bound["input"])) // ins, math.prod(sizes(node)) // outs
        known = layer_of(node)
        scale = torch.ones(outs) if known is None else anchor(graph, known).scale.abs()
        scale = scale.clamp(min=1e-3 * float(scale.max())) if float(scale.max()) > 0 else torch.ones(outs)
        pair = len(kernel) == 2 and min(kernel) > 1 and not isinstance(bound["padding"], str)
        between = sizes(node)[-2] * sizes(bound["input"])[-1] if pair else 0
        layers.append(
            Layer(
                node,
                bound["input"],
                bound["weight"],
                outs,
                ins,
                tuple(kernel),
                reads,
                writes,
                between,
                scale.double(),
            )
        )
    return layers, declines


def _obstacle(graph: Graph, node: Node) -> str:
    bound = arguments(node)
    weight, bias = bound["weight"], bound["bias"]
    if kind(node) == "conv_transpose":
        return "transposed convolutions are not split"
    if bound.get("groups", 1) != 1:
        return f"a convolution of {bound['groups']} groups is not split"
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return "its weight or bias is computed while the model runs"
    if not graph.tensor(weight).numel():
        return "its weight is empty"
    if len(weight.users) > 1:
        return f"its weight is shared by {len(weight.users)} readers"
    if layer_of(node) is None:
        return "what it reads has no batch axis"
    return "" if graph.tensor(weight).is_floating_point() else "its weight is not floating point"


# -------------------------------------------------------------------- what the data says


def _anchor(graph: Graph, layer: Layer) -> Anchor:
    known = layer_of(layer.node)
    assert known is not None
    return anchor(graph, known)


def _watched(layer: Layer, form: Basis) -> tuple[Value, bool]:
    """The value whose covariance a split wants, and whether that is the layer's output.

    Where the output is one matrix times the input, position by position, either will do: the narrower one.
    """
    outputs = form == "outputs" and not (layer.pointwise and layer.ins < layer.outs)
    return (layer.node if outputs else layer.source, layer.axis), outputs


def watched(layer: Layer) -> list[Value]:
    """The values whose covariances its splits follow from."""
    return [_watched(layer, form)[0] for form in layer.forms]


def options_of(
    graph: Graph,
    layer: Layer,
    seen: Mapping[Value, Covariance],
    energies: Mapping[Node, float],
    multiple: int,
) -> list[Option]:
    """Every split of a layer worth a look, by what `observe` saw."""
    moments = {form: _moments(graph, layer, form, seen) for form in layer.forms}
    energy = energies.get(_anchor(graph, layer).node) if seen else None
    return list(options(layer, graph.tensor(layer.weight), moments, energy, multiple))


def _bytes(layer: Layer) -> int:
    return sum(8 * (layer.outs if _watched(layer, form)[1] else layer.ins) ** 2 for form in layer.forms)


def waves(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers whose covariances fit into memory together."""
    group: list[Layer] = []
    for layer in layers:
        if group and sum(map(_bytes, group)) + _bytes(layer) > STATISTICS:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def observe(
    graph: Graph, layers: Sequence[Layer], energies: dict[Node, float], ctx: Context
) -> dict[Value, Covariance]:
    """Means and covariances over the calibration data without padding, in one pass; nothing without data.

    energies: the variance of every anchor that is not known yet is added.
    """
    if ctx.calibration is None:
        return {}
    seen: dict[Value, Covariance] = {}
    anchors: dict[Node, Spread] = {}
    for layer in layers:
        place = _anchor(graph, layer)
        if place.node not in energies:
            anchors[place.node] = Spread(place.axis)
        for form in layer.forms:
            value, outputs = _watched(layer, form)
            seen.setdefault(value, Covariance(layer.outs if outputs else layer.ins))
    axes: dict[Node, list[int]] = {}
    for node, axis in seen:
        axes.setdefault(node, []).append(axis)
    padding = Padding(graph)
    with ctx.progress("squeeze: reading calibration data", ctx.calibration.samples) as advance:
        for batch in ctx.calibration:
            real = padding.of(batch.inputs)
            for node, tensor in graph.values(*batch.inputs):
                for axis in axes.get(node, ()):
                    seen[node, axis].update(real.rows(node, tensor, axis))
                if node in anchors:
                    anchors[node].update(real.rows(node, tensor, anchors[node].axis))
            advance(batch.samples)
    energies |= {node: float(spread.variance.sum()) for node, spread in anchors.items()}
    return seen


def _moments(graph: Graph, layer: Layer, form: Basis, seen: Mapping[Value, Covariance]) -> Moments | None:
    """None without data, and where the data never moves the value."""
    value, outputs = _watched(layer, form)
    found = seen.get(value)
    if found is None or not found.count or bool((found.variance == 0).all()):
        return None
    bias = arguments(layer.node)["bias"] if outputs else None
    mean = found.mean if bias is None else found.mean - graph.tensor(bias).double()
    if form == "spatial":  # the taps down a column, as if each saw other values
        down = layer.kernel[0]
        return Moments(mean.repeat_interleave(down), _spread(found.covariance, down), found.count, outputs)
    return Moments(mean, found.covariance, found.count, outputs)


def _spread(covariance: Tensor, taps: int) -> Tensor:
    return torch.kron(covariance, torch.eye(taps, dtype=covariance.dtype))
