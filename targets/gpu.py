"""TensorRT through ONNX Runtime: fp16, and Q/DQ pairs with zero point 0."""

from __future__ import annotations

from dataclasses import replace

from compressor.target import AT_INPUTS, Target

GPU = Target(
    name="gpu",
    summary="TensorRT through ONNX Runtime: fp16 with float inputs and outputs, symmetric int8",
    providers=("TensorrtExecutionProvider", "CUDAExecutionProvider"),
    elsewhere=True,
    recipe="merge,fold,fp16",
    dialect=frozenset({"islands"}),
    quant=replace(AT_INPUTS, activation="s8"),  # TensorRT takes symmetric integers only
)
