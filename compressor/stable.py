"""Functions whose textbook form loses every digit where their argument is large or small, written so that it does not.

torch.onnx says log(sigmoid(x)), which is -inf at x = -20 where the answer is -20. Source: W. Kahan's log1p, and
identities of tanh and softplus.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Any, Callable[..., Any]]:
    """What is written for them."""
    from onnxscript import opset18

    op: Any = opset18

    def log_sigmoid(x: Any) -> Any:
        return op.Neg(op.Softplus(op.Neg(x)))

    def logaddexp(a: Any, b: Any) -> Any:
        apart = op.Add(op.Max(a, b), op.Softplus(op.Neg(op.Abs(op.Sub(a, b)))))
        return op.Where(op.Equal(a, b), op.Add(a, math.log(2)), apart)  # two infinities have no difference

    def logaddexp2(a: Any, b: Any) -> Any:
        return op.Div(logaddexp(op.Mul(a, math.log(2)), op.Mul(b, math.log(2))), math.log(2))

    def expm1(x: Any) -> Any:
        return op.Mul(op.Tanh(op.Div(x, 2.0)), op.Add(op.Exp(x), 1.0))

    def log1p(x: Any) -> Any:
        sum_ = op.Add(x, 1.0)
        kept = op.Sub(
            sum_, 1.0
        )  # what of x is in the sum: all of it where it is large, nothing where it is tiny
        made = op.Where(op.Equal(kept, x), op.Log(sum_), op.Mul(op.Log(sum_), op.Div(x, kept)))
        return op.Where(op.Equal(kept, 0.0), x, made)

    def logcumsumexp(x: Any, dim: int) -> Any:
        size, step = x.shape[dim], 1
        if not isinstance(size, int):
            raise ValueError("logcumsumexp along a dynamic axis has no translation")
        while step < size:  # sums of 2, of 4, of 8
            first = op.Slice(x, [0], [step], [dim])
            later, earlier = op.Slice(x, [step], [size], [dim]), op.Slice(x, [0], [size - step], [dim])
            x, step = op.Concat(first, logaddexp(later, earlier), axis=dim), 2 * step
        return x

    aten = torch.ops.aten
    return {
        aten.log_sigmoid.default: log_sigmoid,
        aten.logaddexp.default: logaddexp,
        aten.logaddexp2.default: logaddexp2,
        aten.expm1.default: expm1,
        aten.log1p.default: log1p,
        aten.logcumsumexp.default: logcumsumexp,
    }
