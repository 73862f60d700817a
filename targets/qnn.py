"""Qualcomm's HTP through ONNX Runtime's QNN provider: fixed shapes, integers from the first quantiser to the last."""

from __future__ import annotations

from dataclasses import replace

from compressor.target import QLINEAR, QuantSpec, Target

# The HTP is made for integers: floats between two layers leave it, or are computed in half precision. A layer is one of
# integers only if it gives some. Tried on the HTP's emulator with onnxruntime-qnn 2.7 (benchmarks/results/qnn.md).
HTP = QuantSpec(
    weighted=QLINEAR.weighted,
    closed=QLINEAR.weighted,
    fuses=QLINEAR.fuses
    | {
        *("sub.Tensor", "div.Tensor", "maximum.default", "minimum.default"),
        *("tanh.default", "gelu.default", "elu.default", "relu.default", "hardswish.default", "softmax"),
    },
    to_the_end=True,
    rescales=False,  # a tensor has one scale there: on another, the emulator gave other numbers
    absorbed=QLINEAR.absorbed,
    transparent=QLINEAR.transparent,
    everywhere=True,
    rewrites=frozenset({"pool", "selection", "gate"}),
)

QNN = Target(
    name="qnn",
    summary="QNN on Qualcomm's HTP: batch 1, static shapes, u8 activations, integers throughout",
    providers=("QNNExecutionProvider",),
    fixed_batch=1,
    elsewhere=True,
    dialect=frozenset({"islands"}),
    accelerators=("qnn",),
    quant=HTP,
)

# Opset 21 is the first whose quantisers give 16 bits.
QNN_A16 = replace(
    QNN,
    name="qnn-a16",
    summary="the same with u16 activations, which lose less",
    opset=21,
    ir_version=10,
    quant=replace(HTP, activation="u16"),
)
