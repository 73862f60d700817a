"""What ONNX says shorter than PyTorch: a slice along several axes, known sizes, one copy of equal weights."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict

import numpy as np
import onnx_ir
import onnxscript.optimizer
from onnx_ir.passes.common import ShapeInferencePass

_SAMPLE = 64  # entries that tell most different weights apart


def keep_lost_constants(model: onnx_ir.Model) -> None:
    """Constants that the exporter's optimiser gave a name which another had, and so took out of the model, come back.

    It names the bounds of a fused Clip after what is clipped, which several may read (onnxscript 0.7.2).
    """
    held = model.graph.initializers
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None:
                continue
            if value.graph is None:
                names = itertools.chain(
                    [value.name or "constant"], (f"{value.name}.{n}" for n in itertools.count(1))
                )
                value.name = next(name for name in names if name not in held)
                held[value.name] = value


def merge_slices(model: onnx_ir.Model) -> None:
    """A slice of a slice along other axes, both with constant bounds, becomes one."""
    outputs = set(model.graph.outputs)
    for node in list(model.graph.all_nodes()):
        inner = node.inputs[0].producer() if node.op_type == "Slice" and node.inputs[0] is not None else None
        if inner is None or inner.op_type != "Slice" or node.inputs[0] in outputs:
            continue
        first, second = _bounds(inner), _bounds(node)
        if first is None or second is None or len(inner.outputs[0].uses()) != 1:
            continue
        if set(first[2].tolist()) & set(second[2].tolist()) or inner.graph is not node.graph:
            continue
        node.replace_input_with(0, inner.inputs[0])
        for position, pair in enumerate(zip(first, second, strict=True), 1):
            name = ("starts", "ends", "axes", "steps")[position - 1]
            node.replace_input_with(position, _constant(model, node, name, np.concatenate(pair)))
        inner.graph.remove(inner, safe=True)  # type: ignore[union-attr]


def fold_sizes(model: onnx_ir.Model) -> None:
    """Axes of a known size need not be asked for while the model runs, nor what is computed from them."""
    asked = [
        node for node in model.graph.all_nodes() if node.op_type == "Gather" and _shape_of(node) is not None
    ]
    if not asked:
        return
    ShapeInferencePass()(model)
    known = False
    for node in asked:
        source, index = _shape_of(node), onnx_ir.convenience.get_const_tensor(node.inputs[1])  # type: ignore[arg-type]
        if source is None or source.shape is None or index is None:
            continue
        sizes = [source.shape[int(i)] for i in index.numpy().reshape(-1)]
        if not all(isinstance(size, int) for size in sizes):
            continue
        value = np.array(sizes, dtype=np.int64).reshape(index.numpy().shape)
        node.outputs[0].replace_all_uses_with(_constant(model, node, "size", value))
        known = True
    if known:
        onnxscript.optimizer.optimize(model)


def _shape_of(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """What a node asks the whole shape of, through its first input."""
    shape = node.inputs[0].producer() if node.inputs[0] is not None else None
    if shape is None or shape.op_type != "Shape" or "end" in shape.attributes:
        return None
    start = shape.attributes.get("start")
    return shape.inputs[0] if start is None or start.as_int() == 0 else None


def _bounds(node: onnx_ir.Node) -> tuple[np.ndarray, ...] | None:
    """Starts, ends, axes and steps, where all are constant and axes count from the front."""
    values = [
        None if value is None else onnx_ir.convenience.get_const_tensor(value) for value in node.inputs[1:]
    ]
    if len(values) < 3 or any(value is None for value in values):
        return None
    found = [value.numpy().reshape(-1).astype(np.int64) for value in values if value is not None]
    found += [np.ones_like(found[0])] if len(found) == 3 else []
    return None if (found[2] < 0).any() else tuple(found)


def _constant(model: onnx_ir.Model, node: onnx_ir.Node, what: str, value: np.ndarray) -> onnx_ir.Value:
    graph = node.graph if isinstance(node.graph, onnx_ir.Graph) else model.graph
    name = f"{node.outputs[0].name}.{what}"
    made = onnx_ir.val(name, const_value=onnx_ir.tensor(value, name=name))
    graph.initializers[name] = made
    return made


def share_weights(model: onnx_ir.Model) -> None:
    """Equal tensors are stored once, under the name of the first."""
    alike: dict[tuple, list[onnx_ir.Value]] = defaultdict(list)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if (
            tensor is not None
            and not value.is_graph_input()
            and not value.is_graph_output()
            and tensor.dtype.bitwidth >= 8
        ):
            few = tensor.numpy().reshape(-1)[:_SAMPLE]
            alike[tensor.dtype, tuple(tensor.shape.numpy()), few.tobytes()].append(value)
    for values in alike.values():
        seen: dict[bytes, onnx_ir.Value] = {}
        for value in values if len(values) > 1 else ():
            digest = hashlib.sha256(value.const_value.tobytes()).digest()  # type: ignore[union-attr]
            first = seen.setdefault(digest, value)
            if first is not value:
                value.replace_all_uses_with(first)
                model.graph.initializers.pop(value.name)  # type: ignore[arg-type]


def own_zero_points(model: onnx_ir.Model) -> None:
    """Every weight of 8 bits gets a zero point that no other has.

    With the option that keeps sums from saturating (`runtime.EXACT`), ONNX Runtime makes other tensors of both,
    named after them, and loads no file in which two nodes share one (1.31).
    """
    for zero in _bytes_of(model):
        if not zero.const_value.numpy().any():  # type: ignore[union-attr]
            _give_own(model, zero)


def own_weights(model: onnx_ir.Model) -> None:
    """Every node that reads a weight of 8 bits gets one that no other has: for a session, files hold it once."""
    held = set(_bytes_of(model))
    for node in list(model.graph.all_nodes()):
        if node.op_type != "DequantizeLinear" or node.inputs[0] not in held:
            continue
        for reader, index in list(node.outputs[0].uses())[1:]:
            twin = onnx_ir.Node(node.domain, node.op_type, node.inputs, node.attributes.values())
            model.graph.insert_before(reader, twin)
            reader.replace_input_with(index, twin.outputs[0])
    for value in held:
        _give_own(model, value)


def _bytes_of(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    """Constants of signed bytes."""
    return [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype == onnx_ir.DataType.INT8
    ]


def _give_own(model: onnx_ir.Model, value: onnx_ir.Value) -> None:
    """A copy of a constant to each of its readers but the first."""
    free = (name for n in itertools.count(1) if (name := f"{value.name}.{n}") not in model.graph.initializers)
    for node, index in list(value.uses())[1:]:
        copy = onnx_ir.Value(
            name=next(free), shape=value.shape, type=value.type, const_value=value.const_value
        )
        model.graph.register_initializer(copy)
        node.replace_input_with(index, copy)


# The least that is not zero, to a unit of its dtype; of float32 one that is not taken for zero where such are.
_LEAST = {onnx_ir.DataType.FLOAT: 1.2e-38, onnx_ir.DataType.FLOAT16: 6e-8}


def keep_pads_of_maxima(model: onnx_ir.Model) -> None:
    """A frame of zeros around what a maximum is taken of stays: its zeros become the next number that there is.

    ONNX Runtime (1.31) makes it the frame of MaxPool itself, which counts for nothing: where all else in a
    window is negative, the answer is another.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Pad" or not any(use.node.op_type == "MaxPool" for use in node.outputs[0].uses()):
            continue
        value = node.inputs[2] if len(node.inputs) > 2 else None
        known = onnx_ir.convenience.get_const_tensor(value) if value is not None else None
        dtype = node.inputs[0].dtype
        if (value is not None and (known is None or known.numpy().any())) or dtype not in _LEAST:
            continue
        least = onnx_ir.tensor(_LEAST[dtype], dtype=dtype)
        frame = onnx_ir.Value(
            name=f"{node.outputs[0].name}.frame", shape=onnx_ir.Shape([]), const_value=least
        )
        frame.type = onnx_ir.TensorType(dtype)
        model.graph.register_initializer(frame)
        node.resize_inputs(max(len(node.inputs), 3))
        node.replace_input_with(2, frame)


def keep_windows_of_means(model: onnx_ir.Model) -> None:
    """Windows of AveragePool that hang over an edge divide by as many numbers as the model says.

    ONNX Runtime (1.31) makes a frame of zeros the pool's own, and then counts both; and its integer kernel divides
    windows that hang over a frame which counts (ceil_mode) otherwise. A sum of one operand keeps it from either.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "AveragePool" or not isinstance(node.graph, onnx_ir.Graph):
            continue
        sizes = node.attributes["kernel_shape"].as_ints()
        own = node.attributes["pads"].as_ints() if "pads" in node.attributes else [0] * 2 * len(sizes)
        over, counts = (
            name in node.attributes and bool(node.attributes[name].as_int())
            for name in ("ceil_mode", "count_include_pad")
        )
        if counts and not any(own):  # without a frame it says nothing
            node.attributes["count_include_pad"] = onnx_ir.AttrInt64("count_include_pad", 0)
            counts = False
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        maker = source.op_type if source is not None else ""
        framed = source is not None and maker == "Pad"
        framed = framed and (over or (any(own) and not counts) or max(own) + _widest(source) >= min(sizes))
        if framed or (maker == "DequantizeLinear" and over and counts):
            kept = onnx_ir.node("Sum", [node.inputs[0]], metadata_props=dict(node.metadata_props))
            node.graph.insert_before(node, kept)
            node.replace_input_with(0, kept.outputs[0])


def _widest(pad: onnx_ir.Node | None) -> float:
    """How far a pad reaches at most, where that is known."""
    known = onnx_ir.convenience.get_const_tensor(pad.inputs[1]) if pad is not None and pad.inputs[1] else None
    return math.inf if known is None else float(known.numpy().max(initial=0))
