"""TensorRT through ONNX Runtime: fp16, and Q/DQ pairs with zero point 0."""

from __future__ import annotations

from compressor.target import QuantSpec, Target

# TensorRT takes symmetric integers only, fuses biases, activations and residual sums into the operator in front by
# itself, and quantises outputs where the next reader wants integers: pairs stand at inputs and weights, nowhere else.
TENSORRT = QuantSpec(
    activation="s8",
    bias="float",
    weighted=frozenset({"conv", "linear", "addmm", "matmul"}),
    transparent=frozenset(
        {"max_pool", "view", "flatten", "permute", "transpose", "unsqueeze", "squeeze", "slice"}
    ),
    everywhere=True,
)

GPU = Target(
    name="gpu",
    summary="TensorRT through ONNX Runtime: fp16 with float inputs and outputs, symmetric int8",
    providers=("TensorrtExecutionProvider", "CUDAExecutionProvider"),
    elsewhere=True,
    recipe="merge,fold,fp16",
    dialect=frozenset({"islands"}),
    quant=TENSORRT,
)
