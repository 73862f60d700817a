"""ONNX Runtime's CPU provider, with and without instructions for 8-bit dot products."""

from __future__ import annotations

from dataclasses import replace

from compressor.target import ONNXRUNTIME, QLINEAR, Target

# Integer convolutions multiply group by group: under 8 channels floats are faster (benchmarks/results/conv_groups.md).
_QUANT = replace(QLINEAR, group_width=8)

# Convolutions of floats run in blocks of 16 channels on AVX-512 and of 8 on AVX2; a width between two blocks costs what
# the next block costs (benchmarks/results/conv_widths.md).
CPU = Target(
    name="cpu",
    summary="ONNX Runtime on x86-64 with VNNI, or ARM64",
    providers=("CPUExecutionProvider",),
    channel_multiple=16,
    dialect=ONNXRUNTIME,
    quant=_QUANT,
)

# AVX2 and older add two 8-bit products in 16 bits, which saturate: 7-bit weights leave room.
CPU_AVX2 = replace(
    CPU,
    name="cpu-avx2",
    summary="ONNX Runtime on any x86-64 and ARM64: int8 weights of 7 bits",
    channel_multiple=8,
    quant=replace(_QUANT, reduce_range=True),
)
