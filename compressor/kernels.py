"""Which operators are one convolution of their entry, and reading that convolution off impulses.

A *window* says which pixels of the entry a pixel of a value reads: its stride, the offsets along every spatial axis,
and how far channels stay apart. Parallel branches join their windows (3x3 + 1x1 + identity), a chain adds them up
(k x k then 1x1). Zero padding is the catch: a padded convolution may follow only what maps zero to zero at every
pixel, or its border would see values that one convolution of the entry never pads with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .constants import DataFree, is_random
from .ir import Graph
from .ops import arguments, extents, is_tensor, kind
from .steps import Foreign, NotAffine

_CHUNK = 1 << 23  # elements of one batch of impulses: 64 MB in float64


@dataclass(frozen=True)
class Window:
    """How one value reads the entry: pixel o reads pixels stride * o + t for every t of `taps`, axis by axis.

    blocks: channels fall into so many equal groups, each reading its own group of the entry. biased: the value is
    not zero everywhere when the entry is.
    """

    stride: tuple[int, ...]
    taps: tuple[frozenset[int], ...]
    blocks: int
    biased: bool = False

    @property
    def is_pointwise(self) -> bool:
        return all(s == 1 for s in self.stride) and all(t == {0} for t in self.taps)

    @property
    def dilation(self) -> tuple[int, ...]:
        return tuple(math.gcd(*(t - min(taps) for t in taps)) or 1 for taps in self.taps)

    @property
    def padding(self) -> tuple[int, ...]:
        return tuple(-min(taps) for taps in self.taps)

    @property
    def size(self) -> tuple[int, ...]:
        """The kernel's size along every spatial axis."""
        return tuple((max(t) - min(t)) // d + 1 for t, d in zip(self.taps, self.dilation, strict=True))


def start(entry: Node) -> Window | None:
    """The window of the entry itself; None where it is no batch of images."""
    value = entry.meta["val"]
    image = value.dtype.is_floating_point and 3 <= value.dim() <= 5
    if not image or not isinstance(value.shape[1], int):
        return None
    axes = value.dim() - 2
    return Window((1,) * axes, (frozenset({0}),) * axes, value.shape[1])


def is_exit(window: Window, entry: Node, node: Node) -> bool:
    """True when one convolution has this window: no negative padding, and channels that its groups divide."""
    channels = (entry.meta["val"].shape[1], node.meta["val"].shape[1])
    return min(window.padding) >= 0 and all(isinstance(c, int) and c % window.blocks == 0 for c in channels)


def follow(node: Node, known: Mapping[Node, Any], free: DataFree) -> Window | list[Window]:
    """The window of what `node` computes (a list for several outputs). Raises NotAffine or Foreign."""
    if any(n not in known and n not in free for n in node.all_input_nodes):
        raise Foreign
    rule = _RULES.get(kind(node))
    if rule is None or is_random(node):
        raise NotAffine(node, "is random" if is_random(node) else "is not affine")
    if not all(is_tensor(n) or n in known for n in node.all_input_nodes):
        raise NotAffine(node, "computes with a dynamic size")
    return rule(node, known)


def small_image(window: Window, entry: Node, pixels: int) -> tuple[int, ...]:
    """Sizes of an image that holds so many output pixels that read no padding, and their neighbours at the border.

    A fixed size of the entry is kept modulo the stride: there branches give the same number of pixels that elsewhere
    would not.
    """
    image = []
    for taps, stride, size in zip(window.taps, window.stride, entry.meta["val"].shape[2:], strict=True):
        first = -(min(taps) // stride)
        least = stride * (first + pixels - 1) + max(taps) + 1
        image.append(least + (size - least) % stride if isinstance(size, int) else least)
    return tuple(image)


def probe(
    run: Callable[[Tensor, Impulses | None], Tensor], entry: Node, window: Window
) -> tuple[Tensor, Tensor]:
    """Kernel [out, in / blocks, size...] and bias [out] of `run`, read off impulses, in float64.

    run: [N, C, spatial...] -> [N, out, spatial...], one convolution of `entry` with this window. The image is just
    large enough to hold one output pixel that reads no padding; an impulse is put under each of its taps in turn.
    """
    channels = entry.meta["val"].shape[1]
    pixel = [-(-p // s) for p, s in zip(window.padding, window.stride, strict=True)]
    image = small_image(window, entry, 1)
    at: Any = (slice(None), slice(None), *pixel)
    bias = run(torch.zeros(1, channels, *image, dtype=torch.float64), None)[at][0]
    grid = [_places(*axis) for axis in zip(window.taps, window.dilation, window.stride, pixel, strict=True)]
    places = tuple(itertools.product(*grid))
    columns = torch.empty(channels, len(places), len(bias), dtype=torch.float64)
    for first, last in _chunks(channels, len(places) * max(channels, len(bias)) * math.prod(image)):
        impulses = Impulses(first, last, places, image)
        seen = run(impulses.value(channels), impulses)[at] - bias
        columns[first:last] = seen.view(last - first, len(places), -1)
    kernel = columns.permute(2, 0, 1).reshape(len(bias), channels, *window.size)
    return _grouped(kernel, window.blocks), bias


@dataclass(frozen=True)
class Impulses:
    """A batch of images [(last - first) * places, C, image...]: one channel of each is 1 at one place."""

    first: int
    last: int
    places: tuple[tuple[int, ...], ...]
    image: tuple[int, ...]

    def value(self, channels: int) -> Tensor:
        batch = torch.zeros(
            self.last - self.first, len(self.places), channels, *self.image, dtype=torch.float64
        )
        for i, place in enumerate(self.places):
            under: Any = (range(len(batch)), i, range(self.first, self.last), *place)
            batch[under] = 1
        return batch.flatten(0, 1)

    def keeps(self, node: Node) -> bool:
        return kind(node) in ("cast", "identity")

    def response(self, graph: Graph, node: Node) -> Tensor | None:
        """What a convolution with constant weight makes of the impulses: its taps, each where it meets the impulse."""
        bound = arguments(node)
        if kind(node) != "conv" or any(
            bound[n] is not None and bound[n].op != "get_attr" for n in ("weight", "bias")
        ):
            return None
        weight = _columns_of(graph.tensor(bound["weight"]), bound["groups"], slice(self.first, self.last))
        kernel, axes = weight.shape[2:], len(self.image)
        stride, dilation = (_per_axis(bound[n], axes) for n in ("stride", "dilation"))
        geometry = list(
            zip(stride, _padding(node, bound["padding"], kernel, dilation), dilation, strict=True)
        )
        shape = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, (s, p, d) in zip(self.image, kernel, geometry, strict=True)
        ]
        result = torch.zeros(
            self.last - self.first, len(self.places), len(weight), *shape, dtype=torch.float64
        )
        for i, place in enumerate(self.places):
            for pixel in itertools.product(*map(range, shape)):
                offsets = [q + p - s * o for q, o, (s, p, _) in zip(place, pixel, geometry, strict=True)]
                taps = [t // d for t, (_, _, d) in zip(offsets, geometry, strict=True)]
                exact = all(t % d == 0 for t, (_, _, d) in zip(offsets, geometry, strict=True))
                if exact and all(0 <= t < k for t, k in zip(taps, kernel, strict=True)):
                    target: Any = (slice(None), i, slice(None), *pixel)
                    source: Any = (slice(None), slice(None), *taps)
                    result[target] = weight[source].T
        if bound["bias"] is not None:
            result += graph.tensor(bound["bias"]).double().view(-1, *[1] * axes)
        return result.flatten(0, 1)


def _columns_of(weight: Tensor, groups: int, channels: slice) -> Tensor:
    """Dense kernel [out, channels, ...] of a grouped one, in float64: zero where a group reads another's channels."""
    if groups == 1:
        return weight[:, channels].double()
    outs, ins = weight.shape[0] // groups, weight.shape[1]
    dense = torch.zeros(
        weight.shape[0], channels.stop - channels.start, *weight.shape[2:], dtype=torch.float64
    )
    for channel in range(channels.start, channels.stop):
        rows = slice(channel // ins * outs, (channel // ins + 1) * outs)
        dense[rows, channel - channels.start] = weight[rows, channel % ins].double()
    return dense


def _places(taps: frozenset[int], dilation: int, stride: int, pixel: int) -> list[int]:
    return [stride * pixel + t for t in range(min(taps), max(taps) + 1, dilation)]


def _chunks(rows: int, elements: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // elements)
    return ((i, min(i + step, rows)) for i in range(0, rows, step))


def _grouped(kernel: Tensor, groups: int) -> Tensor:
    """The diagonal blocks of a dense kernel [out, in, ...]: [out, in / groups, ...]."""
    out, ins = kernel.shape[0] // groups, kernel.shape[1] // groups
    parts = [kernel[g * out : (g + 1) * out, g * ins : (g + 1) * ins] for g in range(groups)]
    return torch.cat(parts)


# -------------------------------------------------------------------- rules


def _conv(node: Node, known: Mapping[Node, Any]) -> Window:
    bound = arguments(node)
    if bound["input"] not in known or any(bound.get(n) in known for n in ("weight", "bias")):
        raise NotAffine(node, "convolves with an activation")
    window, kernel = known[bound["input"]], bound["weight"].meta["val"].shape[2:]
    axes = len(window.stride)
    if len(kernel) != axes or not all(isinstance(k, int) for k in kernel):
        raise NotAffine(node, "has an unbatched input")
    stride, dilation = (_per_axis(bound[n], axes) for n in ("stride", "dilation"))
    padding = _padding(node, bound["padding"], kernel, dilation)
    if any(padding) and not (window.is_pointwise and not window.biased):
        what = "a bias" if window.biased else "a receptive field"
        raise NotAffine(
            node, f"pads with zeros what already has {what}, so that its border is not one convolution"
        )
    taps = tuple(
        frozenset(t + s * (j * d - p) for t in old for j in range(k))
        for old, s, k, d, p in zip(window.taps, window.stride, kernel, dilation, padding, strict=True)
    )
    strides = tuple(a * b for a, b in zip(window.stride, stride, strict=True))
    biased = window.biased or bound["bias"] is not None
    return Window(strides, taps, math.gcd(window.blocks, bound["groups"]), biased)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * axes if len(values) == 1 else values


def _padding(node: Node, padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if any(t % 2 for t in total):
            raise NotAffine(node, "pads unevenly")
        return tuple(t // 2 for t in total)
    return _per_axis(padding, len(kernel))


def _sum(node: Node, known: Mapping[Node, Any]) -> Window:
    region, constants = _operands(node, known)
    _check_constants(node, constants)
    windows = [known[n] for n in region]
    if len({w.stride for w in windows}) > 1 or any(_sizes(n) != _sizes(node) for n in region):
        raise NotAffine(node, "adds values of different sizes")
    taps = tuple(frozenset().union(*axis) for axis in zip(*(w.taps for w in windows), strict=True))
    literal = any(isinstance(a, (int, float)) for a in node.args[:2])
    biased = literal or bool(constants) or any(w.biased for w in windows)
    return Window(windows[0].stride, taps, math.gcd(*(w.blocks for w in windows)), biased)


def _product(node: Node, known: Mapping[Node, Any]) -> Window:
    region, constants = _operands(node, known)
    if len(region) > 1 or (kind(node) == "div" and node.args[0] not in region):
        raise NotAffine(node, "multiplies two activations" if len(region) > 1 else "divides by an activation")
    _check_constants(node, constants)
    if _sizes(region[0]) != _sizes(node):
        raise NotAffine(node, "repeats channels or pixels")
    return known[region[0]]


def _same(node: Node, known: Mapping[Node, Any]) -> Window:
    if not node.meta["val"].dtype.is_floating_point:
        raise NotAffine(node, "gives integers")
    source = node.all_input_nodes[0]
    if source not in known:
        raise NotAffine(node, "reads a dtype and no values")
    return known[source]


def _batch_norm(node: Node, known: Mapping[Node, Any]) -> Window:
    bound = arguments(node)
    if bound["training"] or bound["running_mean"] is None:
        raise NotAffine(node, "uses the statistics of its batch")
    old: Window = known[bound["input"]]
    return Window(old.stride, old.taps, old.blocks, biased=True)


def _operands(node: Node, known: Mapping[Node, Any]) -> tuple[list[Node], list[Node]]:
    values = [v for v in arguments(node).values() if isinstance(v, Node)]
    if not all(is_tensor(v) for v in values):
        raise NotAffine(node, "computes with a dynamic size")
    return [v for v in values if v in known], [v for v in values if v not in known]


def _check_constants(node: Node, constants: list[Node]) -> None:
    """A constant has an axis of channels and no other: spread over an image it would know the image's size."""
    rank = node.meta["val"].dim()
    for constant in constants:
        size = constant.meta["val"].shape
        if any(s != 1 and axis + rank - len(size) != 1 for axis, s in enumerate(size)):
            raise NotAffine(node, "brings in a constant with a value for every pixel")


def _sizes(node: Node) -> list[Any]:
    return extents(node.meta["val"])


def _cat(node: Node, known: Mapping[Node, Any]) -> Window:
    """Channels side by side: every one of them may read all of the entry's."""
    bound = arguments(node)
    values = list(bound["tensors"])
    if bound["dim"] % node.meta["val"].dim() != 1 or not all(v in known for v in values):
        raise NotAffine(node, "joins more than channels of the region")
    windows = [known[v] for v in values]
    if len({w.stride for w in windows}) > 1:
        raise NotAffine(node, "joins values of different sizes")
    taps = tuple(frozenset().union(*axis) for axis in zip(*(w.taps for w in windows), strict=True))
    return Window(windows[0].stride, taps, 1, any(w.biased for w in windows))


def _channels(node: Node, known: Mapping[Node, Any]) -> Window | list[Window]:
    """Some of the channels, or all of them in parts."""
    bound = arguments(node)
    value = node.meta["val"]
    source = next(iter(bound.values()))
    rank = source.meta["val"].dim()
    if is_tensor(node) and _sizes(node) == _sizes(source):
        old: Window = known[source]
        return old
    if bound.get("dim", 0) % rank != 1:
        raise NotAffine(node, "cuts the image")
    part = replace(known[source], blocks=1)
    return [part] * len(value) if isinstance(value, (list, tuple)) else part


def _getitem(node: Node, known: Mapping[Node, Any]) -> Window:
    source, index = arguments(node).values()
    found: Window = known[source][index]
    return found


_RULES: dict[str, Callable[[Node, Mapping[Node, Any]], Window | list[Window]]] = {
    "conv": _conv, "add": _sum, "sub": _sum, "mul": _product, "div": _product, "neg": _same, "cast": _same,
    "identity": _same, "batch_norm": _batch_norm, "cat": _cat, "slice": _channels, "narrow": _channels,
    "split": _channels, "chunk": _channels, "getitem": _getitem,
}  # fmt: skip
