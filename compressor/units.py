"""An ONNX graph as execution providers are offered it: operators with the quantisers round them, shapes, constants.

ONNX Runtime's providers judge node units. A unit is one node, or an operator whose operands all come from
DequantizeLinear and whose results all go to QuantizeLinear, with these nodes and a clipping activation that the
quantiser behind it makes redundant. Which operators form such groups, and what these demand, is ONNX Runtime's:
onnxruntime/core/optimizer/qdq_transformer/selectors_actions, shared/utils.cc and qdq_selectors.cc (1.31).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

_EVERY = 0
_GROUPS = {
    **dict.fromkeys(("Gather", "Reshape", "Expand", "Flatten", "Transpose", "MaxPool", "Resize"), 1),
    **dict.fromkeys(("Squeeze", "Unsqueeze", "Tile", "Split", "AveragePool", "GlobalAveragePool"), 1),
    **dict.fromkeys(("GlobalMaxPool", "LeakyRelu", "ReduceMean", "ReduceMin", "ReduceMax", "ReduceProd"), 1),
    **dict.fromkeys(("ReduceSum", "Relu", "Gelu", "Elu", "HardSwish", "Sigmoid", "Slice", "LogSoftmax"), 1),
    **dict.fromkeys(
        ("Softmax", "Sqrt", "Atan", "Asin", "Sin", "Cos", "Sign", "Tanh", "Exp", "Log", "LRN"), 1
    ),
    **dict.fromkeys(("Ceil", "Floor", "Round", "Abs", "Neg", "DepthToSpace", "SpaceToDepth", "Clip"), 1),
    "HardSigmoid": 1,
    **dict.fromkeys(("Add", "Div", "Mul", "Pow", "Sub", "PRelu", "GridSample", "MatMul"), 2),
    **dict.fromkeys(("Concat", "Max", "Min", "Conv", "ConvTranspose", "Gemm"), _EVERY),
    **dict.fromkeys(("InstanceNormalization", "LayerNormalization"), _EVERY),
}
"""Operator -> how many of its operands must come from dequantisers, _EVERY for all of them."""
_SAME_SCALE = frozenset(
    {
        "Gather",
        "Reshape",
        "Expand",
        "Flatten",
        "Transpose",
        "MaxPool",
        "Resize",
        "Squeeze",
        "Unsqueeze",
        "Tile",
    }
)
_FLOAT_RESULT = frozenset({"MatMul", "Gemm"})  # a group without a quantiser behind it
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})  # whose weight may have another type

Q, DQ = "QuantizeLinear", "DequantizeLinear"
_BODIES = onnx.AttributeProto.GRAPH

# Operators that multiply, and whose MACs no formula here counts.
_UNCOUNTED = frozenset(
    {
        *("Attention", "Einsum", "GRU", "LSTM", "RNN", "DeformConv"),
        *("com.microsoft::Attention", "com.microsoft::GroupQueryAttention"),
        *("com.microsoft::MultiHeadAttention", "com.microsoft::QMoE", "com.microsoft::MoE"),
    }
)


@dataclass(frozen=True)
class Value:
    """One operand or result of a unit.

    dtype: ONNX's name (`float`, `uint8`), of the integers where it is quantised; empty where unknown. shape: None for a
    size that is not fixed, None altogether where not even the rank is known. constant: the tensor; the numbers
    of a large one may be left out. scale, zero: of quantised values, None where they are computed.
    """

    name: str
    dtype: str = ""
    shape: tuple[int | None, ...] | None = None
    constant: TensorProto | None = None
    quantised: bool = False
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def fixed(self) -> bool:
        return self.shape is not None and None not in self.shape

    @property
    def numbers(self) -> np.ndarray | None:
        """Those of a constant, None where it is none, or they are left out."""
        held = self.constant
        if held is None or held.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(held)


@dataclass
class Unit:
    """One operator as a provider judges it.

    op: `Conv`, `com.microsoft::QGemm`. nodes: how many nodes it stands for. inputs: None where one is left out.
    quantised: between dequantisers and quantisers. at_ends: it reads an input of the model or makes an output.
    inside: a body of If or Loop. sources: units that it reads. readers: how many read it.
    """

    op: str
    name: str
    node: NodeProto
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    nodes: int = 1
    quantised: bool = False
    at_ends: bool = False
    inside: bool = False
    sources: list[Unit] = field(default_factory=list)
    readers: int = 0

    def attribute(self, name: str, default: Any = None) -> Any:
        found = next((a for a in self.node.attribute if a.name == name), None)
        if found is None:
            return default
        value = onnx.helper.get_attribute_value(found)
        return value.decode() if isinstance(value, bytes) else value

    def input(self, position: int) -> Value | None:
        return self.inputs[position] if position < len(self.inputs) else None

    @property
    def module(self) -> str:
        """Path of the module that it came from, as `emit` names nodes; else its own name, or that of its result."""
        if self.name.startswith("/"):  # the older exporter of PyTorch
            return self.name.rpartition("/")[0].strip("/").replace("/", ".") or self.name
        return self.name.partition("/")[0] or next(iter(self.node.output), "")

    @property
    def macs(self) -> int:
        """Multiplications; sizes that are not fixed count as 1."""
        rule = _MACS.get(self.op)
        return rule(self) if rule is not None else 0

    @property
    def uncounted(self) -> bool:
        """Whether it multiplies, and nobody knows how often."""
        return self.op in _UNCOUNTED or (self.op in _MACS and not self.macs)


def units_of(model: onnx.ModelProto) -> list[Unit]:
    """The units of a model in an order in which they can run; those of bodies behind the operator that holds them."""
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return list(_Graph(model.graph, {}).units())


class _Graph:
    """One graph: who makes and who reads its values."""

    def __init__(self, graph: GraphProto, outer: dict[str, Value], inside: bool = False) -> None:
        self.graph, self.inside = graph, inside
        self.nodes = list(graph.node)
        self.values = dict(outer)
        for info in (*graph.input, *graph.value_info, *graph.output):
            self.values[info.name] = _described(info)
        for tensor in graph.initializer:
            self.values[tensor.name] = Value(
                tensor.name, _dtype(tensor.data_type), tuple(tensor.dims), tensor
            )
        self.ends = {v.name for v in (*graph.input, *graph.output)} - {t.name for t in graph.initializer}
        self.outputs = {v.name for v in graph.output}
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                if name:
                    self.readers.setdefault(name, []).append(node)

    def units(self) -> Iterator[Unit]:
        groups = {id(node): found for node in self.nodes if (found := self.group(node)) is not None}
        absorbed = {id(member) for members, _ in groups.values() for member in members}
        made: dict[str, Unit] = {}
        for node in self.nodes:
            if id(node) in absorbed and id(node) not in groups:
                continue
            members, unit = groups.get(id(node)) or ([node], self.single(node))
            read = [name for member in members for name in member.input if name in made]
            unit.sources = list({id(made[name]): made[name] for name in read}.values())
            for source in unit.sources:
                source.readers += 1
            ends = {name for member in members for name in (*member.input, *member.output)} & self.ends
            unit.at_ends, unit.inside = bool(ends), self.inside
            made |= {name: unit for member in members for name in member.output if name}
            yield unit
            for attribute in node.attribute:
                if attribute.type == _BODIES:
                    yield from _Graph(attribute.g, self.values, True).units()

    def value(self, name: str) -> Value:
        return self.values.get(name, Value(name))

    def single(self, node: NodeProto) -> Unit:
        inputs = tuple(self.value(name) if name else None for name in node.input)
        return Unit(_op(node), node.name, node, inputs, tuple(self.value(n) for n in node.output if n))

    def group(self, node: NodeProto) -> tuple[list[NodeProto], Unit] | None:
        """The nodes of the quantised unit round an operator, and the unit; None where it is none."""
        wanted = _GROUPS.get(node.op_type)
        if wanted is None or node.domain not in ("", "ai.onnx"):
            return None
        before = [self.dequantiser(name, node) for name in node.input if name]
        found = [one for one in before if one is not None]
        if len(found) != (wanted or len(before)) or before[: len(found)] != found:
            return None
        behind = self.quantisers(node)
        if behind is None or not (behind or node.op_type in _FLOAT_RESULT):
            return None
        made = {one.output[0]: self.dequantised(one) for one in found}
        operands = [made.get(name) or self.value(name) if name else None for name in node.input]
        results = [self.quantised(one) for one in behind if one.op_type == Q]
        if not self.fits(node, list(made.values()), results):
            return None
        results = results or [self.value(node.output[0])]
        unit = Unit(node.op_type, node.name, node, tuple(operands), tuple(results), quantised=True)
        unit.nodes = 1 + len(found) + len(behind)
        return [*found, node, *behind], unit

    @staticmethod
    def fits(node: NodeProto, inputs: Sequence[Value], results: Sequence[Value]) -> bool:
        """Whether types and scales are those that a group must have."""
        weighted = node.op_type in _WEIGHTED
        if len({value.dtype for value in (*(inputs[:1] if weighted else inputs), *results)}) > 1:
            return False
        if weighted and inputs[0].dtype == "int8" and inputs[1].dtype != "int8":
            return False
        if weighted and len(inputs) == 3 and inputs[2].dtype != "int32":
            return False
        return node.op_type not in _SAME_SCALE or all(same_scale(inputs[0], r) for r in results)

    def dequantiser(self, name: str, reader: NodeProto) -> NodeProto | None:
        """The dequantiser that makes a value for this reader alone."""
        made = self.maker.get(name)
        if made is None or made.op_type != DQ or name in self.outputs or len(self.readers[name]) != 1:
            return None
        return made if self.readers[name][0] is reader else None

    def quantisers(self, node: NodeProto) -> list[NodeProto] | None:
        """What stands between an operator and its quantisers, these included; None where floats get out."""
        found: list[NodeProto] = []
        for name in node.output:
            readers = self.readers.get(name, [])
            if not name or (not readers and name not in self.outputs):
                continue
            if name in self.outputs or len(readers) != 1:
                return None if found or any(r.op_type == Q for r in readers) else []
            reader = readers[0]
            if reader.op_type in ("Relu", "Clip") and reader.output[0] not in self.outputs:
                behind = self.readers.get(reader.output[0], [])
                if len(behind) == 1 and behind[0].op_type == Q and self.redundant(reader, behind[0]):
                    found += [reader, behind[0]]
                    continue
            if reader.op_type != Q:
                return None if found else []
            found.append(reader)
        return found

    def redundant(self, clip: NodeProto, quantiser: NodeProto) -> bool:
        """Whether a quantiser cuts off all that a clip in front of it would."""
        behind = self.quantised(quantiser)
        if (
            behind.scale is None
            or behind.scale.size != 1
            or behind.dtype not in ("uint8", "int8", "uint16", "int16")
        ):
            return False
        zero = int(behind.zero.reshape(-1)[0]) if behind.zero is not None else 0
        least, most = ((b - zero) * float(behind.scale.reshape(-1)[0]) for b in _LIMITS[behind.dtype])
        low, high = 0.0, math.inf
        if clip.op_type == "Clip":
            ends = [self.value(n).numbers if n else None for n in clip.input[1:3]]
            if any(n and e is None for n, e in zip(clip.input[1:3], ends, strict=True)):
                return False
            low, high = (
                float(e) if e is not None else d
                for e, d in zip((*ends, None, None), (-math.inf, math.inf), strict=False)
            )
        return low <= least and high >= most

    def dequantised(self, node: NodeProto) -> Value:
        return self._with_scale(node, self.value(node.input[0]))

    def quantised(self, node: NodeProto) -> Value:
        return self._with_scale(node, self.value(node.output[0]))

    def _with_scale(self, node: NodeProto, value: Value) -> Value:
        scale = self.value(node.input[1]).numbers
        named = node.input[2] if len(node.input) > 2 else ""
        zero = self.value(named).numbers if named else np.zeros((), np.int32)
        return Value(value.name, value.dtype, value.shape, value.constant, True, scale, zero)


def same_scale(one: Value, other: Value) -> bool:
    """Whether two quantised values share constant integers: dtype, one scale, one zero point."""
    pairs = ((one.scale, other.scale), (one.zero, other.zero))
    return one.dtype == other.dtype and all(
        a is not None and b is not None and a.size == b.size == 1 and a.item() == b.item() for a, b in pairs
    )


_LIMITS = {t: (np.iinfo(t).min, np.iinfo(t).max) for t in ("uint8", "int8", "uint16", "int16")}


def _op(node: NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _dtype(code: int) -> str:
    return str(TensorProto.DataType.Name(code)).lower() if code else ""


def _described(info: onnx.ValueInfoProto) -> Value:
    kind = info.type.tensor_type
    if not kind.HasField("shape"):
        return Value(info.name, _dtype(kind.elem_type))
    sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    return Value(info.name, _dtype(kind.elem_type), sizes)


# -------------------------------------------------------------------- multiplications


def _size(value: Value | None) -> int:
    return 0 if value is None or value.shape is None else math.prod(s or 1 for s in value.shape)


def _conv(unit: Unit) -> int:
    weight = unit.input(3 if unit.op == "QLinearConv" else 1)
    moved = unit.input(0) if unit.op == "ConvTranspose" else unit.outputs[0]
    shape = weight.shape if weight is not None else None
    return _size(moved) * math.prod(s or 1 for s in shape[1:]) if shape else 0


def _product(unit: Unit) -> int:
    left = unit.input(0)
    shape = left.shape if left is not None else None
    turned = unit.attribute("transA", 0) and shape is not None and len(shape) > 1
    return _size(unit.outputs[0]) * (shape[-2 if turned else -1] or 1) if shape else 0


_MACS = {
    **dict.fromkeys(
        ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "com.microsoft::FusedConv"), _conv
    ),
    **dict.fromkeys(
        ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "com.microsoft::FusedMatMul"), _product
    ),
    **dict.fromkeys(
        ("com.microsoft::FusedGemm", "com.microsoft::QGemm", "com.microsoft::MatMulNBits"), _product
    ),
    "com.microsoft::MatMulIntegerToFloat": _product,
    "com.microsoft::DynamicQuantizeMatMul": _product,
}
