"""Operators that torch.onnx has no words for, or other ones than a small exact file wants.

A reshape needs no strides, as a view does, which are others in every trace; and sizes of 0 are sizes. A slope that
training draws is the middle of its range. What stretches a picture stretches a line: torch spells the latter out, with
an index that is none where a line has one point. A number falls into a sorted line behind all that it is above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnx_ir import DataType

FEW = 25  # points on one side, up to which differences are taken; torch multiplies more (ATen, Distance.cpp)


def translations() -> dict[Any, Callable[..., Any]]:
    """What is written for them."""
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops.core import aten_view
    from onnxscript.function_libs.torch_lib.ops.nn import aten_upsample_bilinear2d_vec

    op: Any = opset18

    def rrelu(x: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Any:
        return op.LeakyRelu(x, alpha=(lower + upper) / 2)

    def cdist(a: Any, b: Any, p: float = 2.0, compute_mode: int | None = None) -> Any:
        """Distances [..., P, R] between points [..., P, M] and [..., R, M].

        By a product where there are many on both sides: all differences need M times the room.
        """
        few = any(isinstance(t.shape[-2], int) and t.shape[-2] <= FEW for t in (a, b))
        if p == 2 and compute_mode != 2 and (compute_mode == 1 or not few):
            axes = list(range(len(b.shape)))
            turned = op.Transpose(b, perm=[*axes[:-2], axes[-1], axes[-2]])
            squares = op.Add(
                op.ReduceSumSquare(a, [-1], keepdims=1), op.ReduceSumSquare(turned, [-2], keepdims=1)
            )
            product = op.MatMul(a, turned)
            return op.Sqrt(op.Relu(op.Sub(squares, op.Add(product, product))))
        differences = op.Sub(op.Unsqueeze(a, [-2]), op.Unsqueeze(b, [-3]))
        if p == math.inf:
            return op.ReduceMax(op.Abs(differences), [-1], keepdims=0)
        if p in (1, 2):
            return (op.ReduceL1, op.ReduceL2)[int(p) - 1](differences, [-1], keepdims=0)
        raise ValueError(f"cdist with p={p:g} has no translation: 1, 2 and inf have")

    def searchsorted(
        line: Any,
        x: Any,
        out_int32: bool = False,
        right: bool = False,
        side: str | None = None,
        sorter: Any = None,
    ) -> Any:
        if sorter is not None:
            raise ValueError("searchsorted with a sorter has no translation")
        above = op.Greater if right or side == "right" else op.GreaterOrEqual
        reached = above(line if len(line.shape) == 1 else op.Unsqueeze(line, [-2]), op.Unsqueeze(x, [-1]))
        to = DataType.INT32 if out_int32 else DataType.INT64
        return op.ReduceSum(op.Cast(op.Not(reached), to=to), [-1], keepdims=0)

    def bucketize(x: Any, boundaries: Any, out_int32: bool = False, right: bool = False) -> Any:
        return searchsorted(boundaries, x, out_int32, right)

    aten = torch.ops.aten
    return {
        aten.reshape.default: aten_view,
        aten.rrelu.default: rrelu,
        aten.upsample_linear1d.vec: aten_upsample_bilinear2d_vec,
        aten.cdist.default: cdist,
        aten.searchsorted.Tensor: searchsorted,
        aten.bucketize.Tensor: bucketize,
    }
