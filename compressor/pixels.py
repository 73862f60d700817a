"""Inputs that are the bytes of pictures in disguise: x = (byte - offset) * step, channel by channel.

Pictures reach a model divided by 255 and normalised, so that the values of a channel lie on a lattice of 256 points.
A layer that is handed the points themselves, x / step + offset, reads integers: rounding them costs nothing, where
one scale for all channels, at odds with every lattice, is the loudest noise of many a small model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .data import Data
from .forms import Match
from .ir import Graph, as_declared
from .ops import arguments, is_constant, kind, shape
from .pipeline import Decline
from .quantize import BYTES
from .readers import Layer, each, layer_of
from .target import QuantSpec

aten = torch.ops.aten
LEVELS = 256
CONVINCING = 32  # points that a channel must show: fewer lie on a lattice by chance
LOOKED_AT = 128  # samples
OFF = 1e-2  # how far from a point a value may lie, in steps


@dataclass(frozen=True)
class Lattice:
    """step, offset: float64 [channels]; byte = value / step + offset lies in 0..255."""

    step: Tensor
    offset: Tensor


def lattice(points: list[Tensor]) -> Lattice | None:
    """The lattice that the distinct values of each channel, sorted and float64, lie on; None where there is none."""
    steps, offsets = [], []
    for values in points:
        if not CONVINCING <= len(values) <= LEVELS:
            return None
        index = ((values - values[0]) / values.diff().min()).round()
        centred = index - index.mean()
        step = float((centred * values).sum() / centred.square().sum())
        index = ((values - values[0]) / step).round()
        if float(index[-1]) >= LEVELS or float(((values - values[0]) / step - index).abs().max()) > OFF:
            return None
        first = (LEVELS - 1 - int(index[-1])) // 2  # darker and brighter ones may come
        steps.append(step)
        offsets.append(first - float((values / step - index).mean()))
    return Lattice(torch.tensor(steps, dtype=torch.float64), torch.tensor(offsets, dtype=torch.float64))


def pixels(graph: Graph, spec: QuantSpec, data: Data | None) -> Iterator[Match | Decline]:
    """A convolution that reads a normalised picture reads its bytes, as floats, instead."""
    for i, node in enumerate(graph.placeholders):
        layer = _reader(node)
        if layer is None or data is None or spec.activation != "u8":
            continue
        found = lattice(_points(graph, data, i))
        if found is not None:
            yield Match(layer.node, "a normalised picture as its bytes", partial(_bytes, graph, layer, found))


def _reader(node: Node) -> Layer | None:
    """The convolution that alone reads an input of pictures, if it is one that can be handed other values."""
    value: Any = node.meta["val"]
    if (
        len(node.users) != 1
        or not isinstance(value, Tensor)
        or value.dim() != 4
        or value.dtype != torch.float32
    ):
        return None
    layer = layer_of(next(iter(node.users)))
    if layer is None or kind(layer.node) != "conv" or layer.groups != 1 or layer.source is not node:
        return None
    alone = all(c is None or len(c.users) == 1 for c in (layer.weight, layer.bias))
    padding = arguments(layer.node)["padding"]
    return layer if alone and not isinstance(padding, str) and is_constant(layer.weight) else None


def _points(graph: Graph, data: Data, number: int) -> list[Tensor]:
    """The distinct values of every channel of an input; no more than show that there are too many."""
    found: list[Tensor] = []
    for batch in data.limited(LOOKED_AT):
        value = as_declared(batch.inputs[number], graph.inputs[number]).movedim(1, 0).flatten(1)
        found = found or [value.new_empty(0)] * len(value)
        found = [torch.cat([known, some]).unique() for known, some in zip(found, value, strict=True)]
        if any(len(values) > LEVELS for values in found):
            break
    return [values.double() for values in found]


def _bytes(graph: Graph, layer: Layer, found: Lattice) -> Node:
    """The same convolution over x / step + offset; its border is that of the picture, which is 0 there."""
    node, a = layer.node, arguments(layer.node)
    channels = (-1, 1, 1)
    value, pads = layer.source, [p for p in reversed(each(a["padding"], 2)) for _ in range(2)]
    if any(pads):
        value = graph.insert(aten.constant_pad_nd.default, (value, pads, 0.0), before=node)
    constants: Mapping[str, Tensor] = {"step": 1 / found.step, "offset": found.offset}
    for (name, numbers), operator in zip(constants.items(), (aten.mul.Tensor, aten.add.Tensor), strict=True):
        constant = graph.add_tensor(f"{layer.source.name}_{name}", numbers.float().reshape(channels))
        value = graph.insert(operator, (value, constant), before=node)
    value.meta[BYTES] = True
    weight = graph.tensor(layer.weight).double() * found.step.reshape(channels)
    shift = -(weight.flatten(2).sum(2) * found.offset).sum(1)
    bias = shift if layer.bias is None else shift + graph.tensor(layer.bias).double()
    stored = [
        graph.add_tensor(f"{node.name}_{name}", t.float()) for name, t in (("weight", weight), ("bias", bias))
    ]
    rest = [a["stride"], [0] * (len(shape(node)) - 2), a["dilation"], a["groups"]]
    return graph.insert(node.target, (value, *stored, *rest), before=node)  # type: ignore[arg-type]
