"""Operators of ONNX Runtime's own, with kernels for PyTorch, so that a graph that holds them runs and is checked.

`dynamic_quantise` rounds a tensor to 8 bits on a scale that it brings itself; emitted, it is a DynamicQuantizeLinear
and a DequantizeLinear. `matmul_blocks` multiplies with weights of few bits (`blockwise.py`); emitted, it is a
MatMulNBits, whose kernels round what they read to 8 bits, block by block, as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .blockwise import dequantise_blocks, round_blocks

NAMESPACE, DOMAIN = "compressor", "com.microsoft"


@torch.library.custom_op(f"{NAMESPACE}::dynamic_quantise", mutates_args=())
def dynamic_quantise(x: Tensor) -> Tensor:
    """What is left of x after a round trip through unsigned bytes on the range of x itself, widened to hold 0.

    Source: ONNX's DynamicQuantizeLinear, whose arithmetic this is.
    """
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round().clamp(0, 255)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


@dynamic_quantise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::matmul_blocks", mutates_args=())
def matmul_blocks(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    bits: int,
    block: int,
    ins: int,
) -> Tensor:
    """x [..., ins], rounded to 8 bits block by block, times the weight that these blocks are, and a bias [outs].

    Source: MatMulNBits with accuracy_level 4, whose rounding of x this is.
    """
    weight = dequantise_blocks(packed, scales, zeros, bits, block, ins)
    return torch.nn.functional.linear(round_blocks(x, block), weight.to(x.dtype), bias)


@matmul_blocks.register_fake
def _(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def since(bits: int, half: bool) -> str:
    """The release of ONNX Runtime that MatMulNBits of so many bits came with; half: whether it reads float16.

    Those before 1.23 compute it from float16 as well, but with other numbers (14 dB).
    """
    return "1.23" if half else "1.22" if bits > 4 else "1.17"


def _declare() -> None:
    """Tells onnx of MatMulNBits, which onnxscript writes only with a schema."""
    from onnx import defs

    if defs.has("MatMulNBits", 1, DOMAIN):
        return
    schema, optional = defs.OpSchema, defs.OpSchema.FormalParameterOption.Optional
    bytes_, whole = "tensor(uint8)", defs.OpSchema.AttrType.INT
    names = {"A": "T", "B": bytes_, "scales": "T"}
    defs.register_schema(
        schema(
            "MatMulNBits",
            DOMAIN,
            1,
            inputs=[
                *(schema.FormalParameter(name, kind) for name, kind in names.items()),
                schema.FormalParameter("zero_points", bytes_, param_option=optional),
            ],
            outputs=[schema.FormalParameter("Y", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
            attributes=[
                schema.Attribute(name, whole, required=False)
                for name in ("K", "N", "bits", "block_size", "accuracy_level")
            ],
        )
    )


def translations() -> dict[Any, Callable[..., Any]]:
    """What torch.onnx writes for them."""
    from onnxscript import opset18 as op
    from onnxscript.values import Opset

    def dynamic(x: Any) -> Any:
        integers, scale, zero = op.DynamicQuantizeLinear(x)
        return op.DequantizeLinear(integers, scale, zero)

    _declare()
    contrib = Opset(DOMAIN, 1)

    def blocks(
        x: Any, packed: Any, scales: Any, zeros: Any, bias: Any, bits: int, block: int, ins: int
    ) -> Any:
        outs = packed.shape[0]
        sizes = {"K": ins, "N": outs, "bits": bits, "block_size": block, "accuracy_level": 4}
        product = contrib.MatMulNBits(x, packed, scales, zeros, **sizes)
        return product if bias is None else op.Add(product, bias)

    return {
        torch.ops.compressor.dynamic_quantise.default: dynamic,
        torch.ops.compressor.matmul_blocks.default: blocks,
    }
