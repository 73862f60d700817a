"""ONNX Runtime on phones: shapes fixed, both of its file formats."""

from __future__ import annotations

from compressor.target import ONNXRUNTIME, QLINEAR, Target

MOBILE = Target(
    name="mobile",
    summary="ONNX Runtime on Android and iOS: batch 1, static shapes, .onnx and .ort",
    providers=("CPUExecutionProvider",),
    fixed_batch=1,
    elsewhere=True,
    formats=("onnx", "ort"),
    dialect=ONNXRUNTIME,
    accelerators=("nnapi", "coreml", "xnnpack", "qnn"),
    quant=QLINEAR,
)
