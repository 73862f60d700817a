"""What ONNX Runtime computes faster when it is told in words of its own, or not in the usual ones.

A target's `dialect` names the rules. What they bring with 1.31 on x86-64: benchmarks/results/int8.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

CONTRIB = "com.microsoft"
# ONNX Runtime moves dequantisers behind these
_MOVERS = frozenset({"Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


def speak(model: onnx_ir.Model, dialect: Collection[str]) -> None:
    for name in sorted(dialect):
        RULES[name](model)


def integer_products(model: onnx_ir.Model) -> None:
    """Products of dequantised values with dequantised weights, and their bias, as one MatMulIntegerToFloat.

    ONNX Runtime makes one of the product by itself, but not of the bias; where sizes are fixed it makes a Gemm of both
    first, which it then computes in floats.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type not in ("MatMul", "Gemm") or not isinstance(node.graph, onnx_ir.Graph):
            continue
        left = _dequantiser(node.inputs[0])
        right, turned = _dequantiser(node.inputs[1]), False
        if right is None and (turn := _producer(node.inputs[1], "Transpose")) is not None:
            right, turned = _dequantiser(turn.inputs[0]), True
        if node.op_type == "Gemm":
            if not _is_plain(node):
                continue
            turned = turned != (_number(node, "transB", 0) == 1)
        if left is None or right is None or right.inputs[0].const_value is None:  # type: ignore[union-attr]
            continue
        weight, scale, zero = right.inputs
        assert weight is not None and weight.const_value is not None and scale is not None
        axis = right.attributes["axis"].as_int() if "axis" in right.attributes else 1
        columns = _rank(scale) == 0 or (_rank(scale) == 1 and axis % 2 == (0 if turned else 1))
        if len(weight.const_value.shape) != 2 or not columns or _rank(left.inputs[1]) != 0:
            continue
        stored = _transposed(model, weight) if turned else weight
        last, bias = _with_bias(node) if node.op_type == "MatMul" else (node, [*node.inputs, None][2])
        made = onnx_ir.node(
            "MatMulIntegerToFloat",
            [left.inputs[0], stored, left.inputs[1], scale, left.inputs[2], zero, *([bias] if bias else [])],
            domain=CONTRIB,
            metadata_props=dict(node.metadata_props),
        )
        old = [node] if last is node else [node, last]
        onnx_ir.convenience.replace_nodes_and_values(
            node.graph, last, old, [made], [last.outputs[0]], [made.outputs[0]]
        )
        model.opset_imports[CONTRIB] = 1
    RemoveUnusedNodesPass()(model)


def sums(model: onnx_ir.Model) -> None:
    """The sum in front of a layer norm as Sum: with Add, ONNX Runtime fuses both, and is slower."""
    for node in model.graph.all_nodes():
        added = _producer(node.inputs[0], "Add") if node.op_type == "LayerNormalization" else None
        if added is not None and added.outputs[0].dtype == onnx_ir.DataType.FLOAT:  # no kernel for others
            added.op_type = "Sum"


def nans(model: onnx_ir.Model) -> None:
    """IsNaN as what is not equal to itself: OpenVINO's provider (1.24) leaves IsNaN to the CPU, and with it the model
    falls into pieces, whose linears are floats.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "IsNaN" or not isinstance(node.graph, onnx_ir.Graph):
            continue
        facts = dict(node.metadata_props)
        same = onnx_ir.node("Equal", [node.inputs[0], node.inputs[0]], metadata_props=facts)
        other = onnx_ir.node("Not", same.outputs, metadata_props=facts)
        onnx_ir.convenience.replace_nodes_and_values(
            node.graph, node, [node], [same, other], node.outputs, other.outputs
        )


def islands(model: onnx_ir.Model) -> None:
    """A sum of one operand in front of floats that stand between integers.

    ONNX Runtime (1.21 and newer, `weight_bias_quantization.cc`) makes a float operator that reads a dequantiser and is
    read by a quantiser an integer one on its own, and its weight has one scale for all channels then.
    """
    for node in list(model.graph.all_nodes()):
        weight = node.inputs[1] if node.op_type in ("Conv", "ConvTranspose", "Gemm") else None
        if weight is None or weight.const_value is None or not _is_requantised(node):
            continue
        source = node.inputs[0]
        while (mover := source.producer() if source is not None else None) and mover.op_type in _MOVERS:
            source = mover.inputs[0]
        if _producer(source, "DequantizeLinear") is None:
            continue
        kept = onnx_ir.node("Sum", [node.inputs[0]], metadata_props=dict(node.metadata_props))
        assert isinstance(node.graph, onnx_ir.Graph)
        node.graph.insert_before(node, kept)
        node.replace_input_with(0, kept.outputs[0])


def _is_requantised(node: onnx_ir.Node) -> bool:
    """Whether a quantiser alone reads an operator, right behind it or behind what clips."""
    while True:
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or node.outputs[0].is_graph_output():
            return False
        node = uses[0].node
        if node.op_type not in ("Relu", "Clip"):
            return node.op_type == "QuantizeLinear"


RULES: dict[str, Callable[[onnx_ir.Model], None]] = {
    "integer_products": integer_products,
    "islands": islands,
    "nans": nans,
    "sums": sums,
}


def _is_plain(gemm: onnx_ir.Node) -> bool:
    """A product with a transposed or plain weight and a bias of floats, if any, that scales nothing."""
    bias = [*gemm.inputs, None][2]
    flat = bias is None or (bias.const_value is not None and _is_vector_for(bias, gemm))
    factors = (_number(gemm, name, 1) for name in ("alpha", "beta"))
    return flat and all(f == 1 for f in factors) and _number(gemm, "transA", 0) == 0


def _number(node: onnx_ir.Node, name: str, default: float) -> float:
    return node.attributes[name].value if name in node.attributes else default  # type: ignore[no-any-return]


def _producer(value: onnx_ir.Value | None, op_type: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _dequantiser(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """What made a value out of integers with a scale and a zero point."""
    node = _producer(value, "DequantizeLinear")
    return (
        node if node is not None and len(node.inputs) == 3 and "block_size" not in node.attributes else None
    )


def _rank(value: onnx_ir.Value | None) -> int | None:
    """Of a scale: of a constant, or one that DynamicQuantizeLinear found; None where it is not known."""
    if value is None:
        return None
    if value.const_value is not None:
        return len(value.const_value.shape)
    return 0 if _producer(value, "DynamicQuantizeLinear") is not None else None


def _transposed(model: onnx_ir.Model, weight: onnx_ir.Value) -> onnx_ir.Value:
    """A weight the other way round, stored once; the old one goes with its last reader."""
    name = f"{weight.name}_t"
    if name not in model.graph.initializers:
        assert weight.const_value is not None
        tensor = onnx_ir.tensor(np.ascontiguousarray(weight.const_value.numpy().T), name=name)
        model.graph.initializers[name] = onnx_ir.val(name, const_value=tensor)
    return model.graph.initializers[name]


def _with_bias(node: onnx_ir.Node) -> tuple[onnx_ir.Node, onnx_ir.Value | None]:
    """The node that ends a product, and the vector of constants that it adds."""
    value = node.outputs[0]
    uses = list(value.uses())
    user = uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
    if user is None or user.op_type != "Add":
        return node, None
    bias = user.inputs[1 - uses[0].idx]
    flat = bias is not None and bias.const_value is not None and _is_vector_for(bias, node)
    return (user, bias) if flat else (node, None)


def _is_vector_for(bias: onnx_ir.Value, product: onnx_ir.Node) -> bool:
    """Whether it has one number for each column: ONNX Runtime's product takes no fewer, to broadcast."""
    size, columns = bias.shape, product.outputs[0].shape
    return size is not None and columns is not None and len(size) == 1 and size[0] == columns[-1]
