"""ONNX Runtime in browsers: its WASM build, which computes as on a CPU, and whose times are others."""

from __future__ import annotations

from dataclasses import replace

from compressor.target import ONNXRUNTIME, QLINEAR, Target

# Measured with onnxruntime-web 1.30 in Chromium (benchmarks/results/web.md). An integer convolution pays for every
# number that it gives, which it rounds one by one: where fewer than about 128 products are summed for it, floats are
# faster. Depthwise ones sum few.
_QUANT = replace(QLINEAR, products=128)

# It has every kernel of the native build but those of the blocked layout, which only models hold that were optimised
# natively; and JavaScript has no word for bfloat16.
_BLOCKED = (
    "AveragePool",
    "Conv",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "MaxPool",
    "ReorderInput",
    "ReorderOutput",
    "Upsample",
)
# of ONNX Runtime 1.31, not of 1.30
_NEWER = (
    "BranchwiseRMSNorm",
    "HyperConnectionPostMix",
    "HyperConnectionPreMix",
    "ScaledSiLU",
    "VarlenNGramHashMapping",
)

WEB = Target(
    name="web",
    summary="ONNX Runtime Web in browsers (WASM): integers where a sum is long enough, no bfloat16 at the ends",
    providers=("CPUExecutionProvider",),
    elsewhere=True,
    dialect=ONNXRUNTIME,
    slow=frozenset({"com.microsoft::MatMulNBits"}),  # three to five times
    lacks=frozenset(
        {
            "bf16",
            *(f"com.microsoft.nchwc::{name}" for name in _BLOCKED),
            *(f"com.microsoft::{name}" for name in _NEWER),
        }
    ),
    quant=_QUANT,
)
