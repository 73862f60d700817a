"""OpenVINO through ONNX Runtime, on processors: Q/DQ pairs at the inputs of layers, words that its provider knows."""

from __future__ import annotations

from compressor.target import AT_INPUTS, Target

# Measured with onnxruntime-openvino 1.24.1 (OpenVINO 2025.4.1) on x86-64 with VNNI, kernels by its own counters
# (benchmarks/openvino). Convolutions, depthwise ones too, and linears are integers as soon as input and weight are
# quantised; bias, activation, the sum behind them and the next quantiser are fused into them.
# com.microsoft::MatMulIntegerToFloat and IsNaN run on the CPU's provider, and the model falls into pieces.
OPENVINO = Target(
    name="openvino",
    summary="OpenVINO through ONNX Runtime, on x86-64 with VNNI",
    providers=("OpenVINOExecutionProvider",),
    channel_multiple=16,
    dialect=frozenset({"islands", "nans"}),
    quant=AT_INPUTS,
)
