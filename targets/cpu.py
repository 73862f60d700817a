"""ONNX Runtime on x86 and ARM processors."""

from __future__ import annotations

from dataclasses import replace

from compressor.target import QuantSpec, Target

# What ONNX Runtime's CPU provider fuses into QLinear operators, measured with 1.31 (kernels: QLinearConv, QGemm,
# QLinearAdd, QLinearMul, QLinearConcat, QLinearAveragePool, QLinearGlobalAveragePool, QLinearSigmoid,
# QLinearLeakyRelu, MatMulIntegerToFloat). u8 activations: s8 loses the fusion of ReLU.
CPU_QUANT = QuantSpec(
    weighted=frozenset({"conv", "linear", "addmm", "matmul"}),
    closed=frozenset({"conv"}),
    fuses=frozenset({"add.Tensor", "mul.Tensor", "cat", "avg_pool", "sigmoid.default", "leaky_relu.default"}),
    absorbed=frozenset(
        {"relu.default", "relu6.default", "hardtanh.default", "clamp.default", "clamp_min.default"}
    ),
    transparent=frozenset(
        {"max_pool", "view", "flatten", "unflatten", "permute", "transpose", "unsqueeze", "squeeze", "slice", "select"}
        | {"split", "chunk", "unbind", "expand", "upsample_nearest2d.vec"}
    ),
    rewrites=frozenset({"pool", "selection"}),
)

CPU = Target(
    name="cpu",
    summary="ONNX Runtime on x86-64 with AVX-512 VNNI or AVX-VNNI, and on ARM64",
    providers=("CPUExecutionProvider",),
    recipe="merge,fold",
    quant=CPU_QUANT,
)

CPU_AVX2 = replace(
    CPU,
    name="cpu-avx2",
    summary="ONNX Runtime on x86-64 without VNNI: 7-bit weights, because 16-bit sums saturate there",
    quant=replace(CPU_QUANT, reduce_range=True),
)
