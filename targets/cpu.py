"""ONNX Runtime's CPU provider, with and without instructions for 8-bit dot products."""

from __future__ import annotations

from dataclasses import replace

from compressor.target import ONNXRUNTIME, QLINEAR, Target

# Integer convolutions multiply group by group, floats do not: with 4 channels a group of 32 integers take 2.3 times as
# long between quantisers, with 8 as long, with 16 less (ONNX Runtime 1.31, 28 by 28 and 14 by 14 positions).
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
    summary="ONNX Runtime on x86-64 without VNNI (before 2019): int8 weights of 7 bits",
    channel_multiple=8,
    quant=replace(_QUANT, reduce_range=True),
)
