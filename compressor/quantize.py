"""Integers for floats: scales and zero points, calibration in one streamed pass, and Q/DQ pairs in the graph.

real = (integer - zero_point) * scale. Activations have one scale a tensor, weights one an output channel and zero
point 0, biases the scale of the sums they are added to. Which values are quantised is decided in `place.py`; what an
execution provider computes in integers stands in the target's `QuantSpec`.
Source: Jacob et al. 2018 (arXiv:1712.05877), sections 2.1 to 2.4.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers the quantized_decomposed operators
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from . import contrib  # noqa: F401  registers compressor::dynamic_quantise
from .batches import BATCH, Batch
from .errors import DataError, UnsupportedError
from .ir import Graph
from .names import operator_name, site
from .ops import arguments, is_constant, is_static, kind, shape
from .padding import Padding
from .place import Operands, Placement, Range, operands
from .statistics import Histogram, MinMax, MovingAverage, entropy_range, mse_range
from .target import QuantSpec

LEVELS = {"u8": (0, 255, torch.uint8), "u16": (0, 65535, torch.uint16), "s8": (-128, 127, torch.int8)}
INT32_LIMIT = 2**31 - 1
BIAS_LIMIT = 2**30  # leaves the accumulator as much room for the products
TINIEST = 2.0**-60  # of scales: the product of two is still a normal float32
SAMPLED = 1 << 16  # values of a whole batch that a histogram counts; its extremes are exact
BYTES = "bytes"  # in the meta of a float value: it holds 0..255
STRIDES = (1, 3, 7, 13, 31, 61, 127, 251, 509, 1021)  # primes: no axis of a tensor is sampled at fixed places

_quantised = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Params:
    """Integers of one tensor: real = (integer - zero_point) * scale, integers from low to high."""

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype


# -------------------------------------------------------------------- scales


def tensor_params(low: float, high: float, spec: QuantSpec) -> Params:
    """Params of an activation that lies between low and high; the range is widened to hold 0, which is exact.

    The scale is rounded down to a float32, so that no integer stands for more than `high`: a clipping activation
    (ReLU6) in front of the quantiser then changes nothing, and a runtime may drop it.
    """
    least, most, dtype = LEVELS[spec.activation]
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.activation == "s8":
        return Params(_single(max(-low, high), most), 0, least, most, dtype)
    scale = _single(high - low, most - least)
    return Params(scale, min(most, max(least, round(least - low / scale))), least, most, dtype)


def _single(extent: float, steps: int) -> float:
    """extent / steps as a float32 that, times steps, does not exceed the extent; 1 for an extent of 0."""
    if extent <= 0:
        return 1.0
    extent = min(extent, float(np.finfo(np.float32).max))
    scale = np.float32(extent / steps)
    while float(np.float32(scale * np.float32(steps))) > extent:
        scale = np.nextafter(scale, np.float32(0))
    return max(float(scale), TINIEST)


def weight_scales(weight: Tensor, axis: int, spec: QuantSpec) -> Tensor:
    """float32 scales [channels] of symmetric integers, channels along `axis`; 1 for a channel of zeros.

    127 levels on each side of 0, or 64 with reduce_range: 255 * 64 * 2 stays below 2**15.
    """
    peak = weight.detach().double().movedim(axis, 0).reshape(weight.shape[axis], -1).abs().amax(1)
    scales = (peak / levels(spec)).clamp(min=TINIEST)
    return torch.where(peak > 0, scales, torch.ones_like(scales)).float()


def quantise_weight(weight: Tensor, scales: Tensor, axis: int, spec: QuantSpec) -> Tensor:
    """int8 integers of a weight, with its scales along `axis`."""
    limit = levels(spec)  # one more below 0, which scales that a model came with may use
    factors = scales.double().reshape([-1 if d == axis else 1 for d in range(weight.dim())])
    return torch.round(weight.detach().double() / factors).clamp(-limit - 1, limit).to(torch.int8)


def levels(spec: QuantSpec) -> int:
    """Levels of weights on each side of 0."""
    return 64 if spec.reduce_range else 127


def room_for_bias(scales: Tensor, bias: Tensor, activation: float) -> Tensor:
    """Weight scales, raised where bias / (scale * activation) would take more than 30 bits.

    Only channels whose weights are tiny beside their bias are touched (all zeros after pruning, for one).
    """
    least = bias.detach().double().abs() / (activation * BIAS_LIMIT)
    return torch.maximum(scales.double(), least).float()


def quantise_bias(bias: Tensor, scales: Tensor) -> Tensor:
    """int32 integers of a bias on the scales of the sums that it is added to."""
    integers = torch.round(bias.detach().double() / scales.double())
    return integers.clamp(-INT32_LIMIT, INT32_LIMIT).to(torch.int32)


def fake_quantise(value: Tensor, params: Params) -> Tensor:
    """What is left of a float32 tensor after a round trip through its integers."""
    return _dequantise(_quantise(value, params), params)


def _quantise(value: Tensor, p: Params) -> Tensor:
    return _quantised.quantize_per_tensor.default(value, p.scale, p.zero_point, p.low, p.high, p.dtype)


def _dequantise(value: Tensor, p: Params) -> Tensor:
    return _quantised.dequantize_per_tensor.default(value, p.scale, p.zero_point, p.low, p.high, p.dtype)


# -------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Method:
    """How a range is found: what is read from a statistic of the values, a sampled histogram where none is named."""

    range_of: Callable[[Any], Range]
    statistic: Callable[[], MinMax | MovingAverage] | None = None


def extremes(statistic: MinMax | MovingAverage) -> Range:
    return float(statistic.low), float(statistic.high)


MINMAX = Method(extremes, MinMax)
WHOLE = Method(extremes)  # the same, of a histogram
AVERAGE = Method(extremes, MovingAverage)


def percentile(percent: float) -> Method:
    """What is left when 100 - percent % of the values are cut off either end."""
    return MINMAX if percent == 100 else Method(lambda histogram: histogram.percentile(percent))


def mse(spec: QuantSpec) -> Method:
    """The range whose rounding and clipping changes the values least, in squares.

    All of it with 16 bits, which round finer than a histogram shows.
    """
    if spec.activation == "u16":
        return WHOLE
    return Method(lambda histogram: mse_range(histogram, symmetric=spec.activation == "s8"))


ENTROPY = Method(entropy_range)


def calibrate(
    graph: Graph,
    nodes: Collection[Node],
    batches: Iterable[Batch],
    method: Method = MINMAX,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[Node, Range]:
    """(low, high) of each node's value over all batches, in one pass and constant memory.

    Padding counts nowhere. advance is told of every sample.
    DataError on no data, and on NaN and infinite values, with the first tensor that holds them.
    """
    return calibrate_each(graph, nodes, batches, {"": method}, advance)[""]


def calibrate_each(
    graph: Graph,
    nodes: Collection[Node],
    batches: Iterable[Batch],
    methods: Mapping[str, Method],
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[Node, Range]]:
    """What `calibrate` finds by each of several methods that read the same statistic, in one pass."""
    (made,) = {method.statistic for method in methods.values()}
    names, padding = {node.name: node for node in nodes}, Padding(graph)
    quick: Graph | None = None
    seen: dict[Node, MinMax | MovingAverage | Histogram] = {}
    samples = 0
    for batch in batches:
        real, size = padding.of(batch.inputs), batch.samples
        quick = _channels_last(graph, batch.inputs) if quick is None else quick
        for twin, whole in quick.values(*batch.inputs):
            node = names.get(twin.name)
            if node is None:
                continue
            value = _as_stored(real.values(node, whole))
            if not value.numel():
                continue
            if node not in seen:
                seen[node] = Histogram(stride=_stride(value.numel(), size)) if made is None else made()
            seen[node].update(value)
            if seen[node].dropped:
                raise DataError(
                    f"calibration samples {samples} to {samples + size - 1} give NaN or infinite values at "
                    f"{site(node)} ({operator_name(node)}): no integer stands for them"
                )
        samples += size
        advance(size)
    if not samples:
        raise DataError("the calibration data is empty: ranges need samples")
    # a tensor that never held a value gets (0, 0)
    return {
        name: {
            node: (0.0, 255.0)
            if is_bytes(node)
            else method.range_of(seen[node])
            if node in seen
            else (0.0, 0.0)
            for node in nodes
        }
        for name, method in methods.items()
    }


def held(ranges: Mapping[Node, Range], owner: Mapping[Node, Node], spec: QuantSpec) -> dict[Node, Range]:
    """The ranges, those of a softmax that all give nearly the same made as wide as ONNX Runtime's kernel needs them.

    Its sums of 32 bits overflow, silently, where 1 / scale is over exp(5) times the entries of a row (measured with
    ONNX Runtime 1.31, rows of 2 to 4,096 entries).
    """
    found = dict(ranges)
    for value, own in owner.items():
        if kind(value) != "softmax" or spec.activation == "u16" or own not in found:
            continue
        entries = shape(value)[arguments(value)["dim"]]
        low, high = found[own]
        found[own] = low, max(high, 2 / entries if is_static(entries) else 1.0)
    return found


def _channels_last(graph: Graph, inputs: Sequence[Tensor]) -> Graph:
    """A copy whose convolutions keep channels together, which is faster, or the graph itself.

    Itself where some `view` would not have that; the last digits of values are others.
    """
    weights = [b.weight for n in graph.nodes if kind(n) == "conv" and (b := operands(n)) is not None]
    copy = graph.copy()
    for weight in weights:
        if is_constant(weight) and len(shape(weight)) == 4:
            held = graph.tensor(weight).contiguous(memory_format=torch.channels_last)
            copy.tensors[str(weight.target)] = held
    try:
        copy.run(*inputs)
    except (RuntimeError, IndexError):
        return graph
    return copy


def _as_stored(value: Tensor) -> Tensor:
    """The same numbers in the order of memory."""
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return value.permute(0, 2, 3, 1)
    return value


def _stride(count: int, samples: int) -> int:
    return next((s for s in STRIDES if BATCH * count <= s * samples * SAMPLED), STRIDES[-1])


# -------------------------------------------------------------------- Q/DQ pairs


def tapped(plan: Placement) -> tuple[Graph, dict[Node, Node]]:
    """A copy of the graph with an identity wherever a pair would stand, and which value each identity repeats."""
    copy = plan.graph.copy()
    twins = {node.name: node for node in copy.nodes}
    taps: dict[Node, Node] = {}
    for value in plan.graph.nodes:
        if plan.owner.get(value) is not value:
            continue
        twin = twins[value.name]
        tap = copy.insert(torch.ops.aten.alias.default, (twin,), before=behind(twin))
        taps[tap] = value
        for user in plan.readers(value):
            redirect(copy, twins[user.name], twin, tap)
    return copy, taps


def insert_pairs(
    plan: Placement,
    ranges: Mapping[Node, Range],
    scales: Mapping[Node, Tensor] | None = None,
    known: Mapping[Node, Params] | None = None,
) -> None:
    """Writes a placement into its graph: integer weights and biases, and a Q/DQ pair behind every value.

    scales: weight -> those of its integers, where they are not to be read from its extremes. known: value -> its
    integers, where they are not to be made from its range.
    """
    params = {owner: tensor_params(*ranges[owner], plan.spec) for owner in plan.owner.values()}
    params |= {owner: own for owner, own in (known or {}).items() if owner in params}
    readers = {value: plan.readers(value) for value in plan.owner}
    made: dict[tuple[Node, int], list[tuple[Tensor, Node]]] = {}
    for node in plan.operators:
        bound = operands(node)
        if bound is not None:
            _quantise_operands(plan, node, bound, params[plan.owner[bound.input]].scale, made, scales or {})
    for value, users in readers.items():
        pair = _pair(plan.graph, value, params[plan.owner[value]])
        for user in users:
            redirect(plan.graph, user, value, pair)
    for node in plan.operators:
        if operator_name(node) == "aten.hardsigmoid.default" and plan.spec.rescales:
            _as_sum(plan.graph, node)


def _as_sum(graph: Graph, node: Node) -> None:
    """A hard sigmoid between quantisers as x / 6 + 1/2, of integers, where the quantiser behind it ends at 0 and 1 too.

    The integers of x / 6 are those of x, at a sixth of the scale.
    """
    source: Any = node.args[0]
    integers, scale, *rest = source.args
    for user in list(node.users):
        if kind(user) != "quantize":
            continue
        _, step, zero, low, high, _ = user.args
        if zero != low or (high - zero) * step > 1 + torch.finfo(torch.float32).eps:  # type: ignore[operator]
            continue
        sixth = graph.insert(source.target, (integers, scale / 6, *rest), before=node)
        one = graph.add_tensor(f"{node.name}_half", torch.ones(1, dtype=rest[-1]))
        half = graph.insert(source.target, (one, 0.5, 0, *rest[1:]), before=node)
        redirect(graph, user, node, graph.insert(torch.ops.aten.add.Tensor, (sixth, half), before=node))


def insert_dynamic(plan: Placement) -> None:
    """Integer weights, and a quantiser that finds its own scale, run by run, in front of the layers that read them."""
    made: dict[tuple[Node, int], list[tuple[Tensor, Node]]] = {}
    readers: dict[Node, list[Node]] = {}
    for node in plan.operators:
        bound = operands(node)
        if bound is not None:
            _quantise_operands(plan, node, bound, 1.0, made, {})
            readers.setdefault(bound.input, []).append(node)
    for value, users in readers.items():
        first = next(n for n in plan.graph.nodes if n in users)
        rounded = plan.graph.insert(torch.ops.compressor.dynamic_quantise.default, (value,), before=first)
        for user in users:
            redirect(plan.graph, user, value, rounded)


def _quantise_operands(
    plan: Placement,
    node: Node,
    bound: Operands,
    activation: float,
    made: dict[tuple[Node, int], list[tuple[Tensor, Node]]],
    known: Mapping[Node, Tensor],
) -> None:
    """Weight of one operator, and its bias where the provider adds that to integers.

    made: (weight, axis) -> its scales and dequantisers so far, so that a shared weight is stored once.
    """
    graph, spec = plan.graph, plan.spec
    weight = graph.tensor(bound.weight)
    if not bool(torch.isfinite(weight).all()):
        raise UnsupportedError(
            f"{bound.weight.target} holds NaN or infinite values: no integer stands for them"
        )
    scales = known[bound.weight] if bound.weight in known else weight_scales(weight, bound.axis, spec)
    bias = None if spec.bias == "float" or node in plan.floating else bound.bias
    if bias is not None:
        scales = room_for_bias(scales, graph.tensor(bias), activation)
    twins = made.setdefault((bound.weight, bound.axis), [])
    twin = next((n for s, n in twins if torch.equal(s, scales)), None)
    if twin is None:
        twin = _constant(
            graph, bound.weight, quantise_weight(weight, scales, bound.axis, spec), scales, bound.axis
        )
        twins.append((scales, twin))
    redirect(graph, node, bound.weight, twin)
    if bias is not None:
        sums = scales * activation
        redirect(graph, node, bias, _constant(graph, bias, quantise_bias(graph.tensor(bias), sums), sums, 0))


def _constant(graph: Graph, source: Node, integers: Tensor, scales: Tensor, axis: int) -> Node:
    """A float constant as integers behind a dequantiser; int8 with zero points, which some fusions look for."""
    limits, bits = torch.iinfo(integers.dtype), integers.dtype.itemsize * 8
    stored = graph.add_tensor(f"{source.target}_int{bits}", integers)
    factors = graph.add_tensor(f"{source.target}_scale", scales)
    zeros = None
    if bits == 8:
        zeros = graph.add_tensor(f"{source.target}_zero_point", torch.zeros_like(scales, dtype=torch.int8))
    arguments = (stored, factors, zeros, axis, limits.min, limits.max, integers.dtype)
    return graph.insert(_quantised.dequantize_per_channel.default, arguments, before=behind(source))


def _pair(graph: Graph, value: Node, p: Params) -> Node:
    """A quantiser and a dequantiser behind `value`; the dequantiser."""
    arguments = (p.scale, p.zero_point, p.low, p.high, p.dtype)
    before = behind(value)
    pixels = _cast_bytes(value)
    if pixels is not None and (p.scale, p.zero_point, p.dtype) == (1.0, 0, torch.uint8):
        return graph.insert(_quantised.dequantize_per_tensor.default, (pixels, *arguments), before=before)
    integers = graph.insert(_quantised.quantize_per_tensor.default, (value, *arguments), before=before)
    return graph.insert(_quantised.dequantize_per_tensor.default, (integers, *arguments), before=before)


def is_bytes(value: Node) -> bool:
    """Whether a float value holds bytes: they are their own integers, at scale 1."""
    return BYTES in value.meta or _cast_bytes(value) is not None


def _cast_bytes(value: Node) -> Node | None:
    """The bytes that a value is, as floats."""
    if kind(value) != "cast" or value.meta["val"].dtype != torch.float32:
        return None
    source = value.all_input_nodes[0]
    return source if source.meta["val"].dtype == torch.uint8 else None


def behind(node: Node) -> Node:
    """The node in front of which something that reads `node` can stand; inputs and constants come first in a graph."""
    following = node.next
    while following.op in ("placeholder", "get_attr"):
        following = following.next
    return following


def redirect(graph: Graph, user: Node, old: Node, new: Node) -> None:
    """One reader of `old` reads `new`, which is not the same value: nothing is entered into the journal."""
    args, kwargs = map_arg((user.args, user.kwargs), lambda n: new if n is old else n)
    graph.set_args(user, args, kwargs)
