"""Operators of ONNX Runtime's own, with kernels for PyTorch, so that a graph that holds them runs and is checked.

`dynamic_quantise` rounds a tensor to 8 bits on a scale that it brings itself, sample by sample of its run; emitted, it
is a DynamicQuantizeLinear and a DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "compressor"


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


def translations() -> dict[Any, Callable[..., Any]]:
    """What torch.onnx writes for them."""
    from onnxscript import opset18 as op

    def dynamic(x: Any) -> Any:
        integers, scale, zero = op.DynamicQuantizeLinear(x)
        return op.DequantizeLinear(integers, scale, zero)

    return {torch.ops.compressor.dynamic_quantise.default: dynamic}
