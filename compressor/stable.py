"""Functions whose textbook form is wrong where arguments are large, small or at an edge, written so that it is not.

torch.onnx says log(sigmoid(x)), which is -inf at x = -20 where the answer is -20; x - y floor(x / y), which has lost
the digits of a remainder where x / y has many; the quotient of integers in float32; and atan2 that is -pi at (0, -1).
It has no words for others: the hypotenuse, whose squares may be no numbers where it is one; the sign of a zero.
Source: W. Kahan's log1p, identities of tanh and softplus, and C's fmod, atan2, hypot, copysign, fmax and fmin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir
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

    def running(name: str, x: Any, dim: int, joined: Callable[[Any, Any], Any]) -> Any:
        size, step = x.shape[dim] if len(x.shape) else 1, 1
        if not isinstance(size, int):
            raise ValueError(f"{name} along a dynamic axis has no translation")
        while step < size:  # of 2, of 4, of 8
            first = op.Slice(x, [0], [step], [dim])
            later, earlier = op.Slice(x, [step], [size], [dim]), op.Slice(x, [0], [size - step], [dim])
            x, step = op.Concat(first, joined(later, earlier), axis=dim), 2 * step
        return x

    def logcumsumexp(x: Any, dim: int) -> Any:
        return running("logcumsumexp", x, dim, logaddexp)

    def cumprod(x: Any, dim: int, dtype: Any = None) -> Any:  # x is of that type: the exporter has cast it
        return running("cumprod", x, dim, op.Mul)

    def exact(a: Any, b: Any) -> bool:
        """Whether both are integers."""
        integers = [t.dtype.is_integer() if hasattr(t, "dtype") else isinstance(t, int) for t in (a, b)]
        return all(integers)

    def like(number: float, x: Any) -> Any:
        return op.CastLike(op.Constant(value=onnx_ir.tensor(float(number), onnx_ir.DataType.DOUBLE)), x)

    def floats(a: Any, b: Any) -> tuple[Any, Any]:
        """Both as floats of one width."""
        if not hasattr(a, "dtype"):
            return like(a, b), b
        if a.dtype.is_integer():
            a = op.Cast(a, to=b.dtype if hasattr(b, "dtype") else onnx_ir.DataType.FLOAT)
        return a, op.CastLike(b, a) if hasattr(b, "dtype") else like(b, a)

    def apart(rest: Any, divisor: Any) -> Any:
        """Where a truncated remainder is not that of a floor: it is not 0, and its sign is the other one."""
        zero = like(0, rest)
        return op.And(op.Not(op.Equal(rest, zero)), op.Xor(op.Less(rest, zero), op.Less(divisor, zero)))

    def remainder(a: Any, b: Any) -> Any:
        if exact(a, b):
            return op.Mod(a, b)
        a, b = floats(a, b)
        rest = op.Mod(a, b, fmod=1)
        return op.Where(apart(rest, b), op.Add(rest, b), rest)

    def floor_divide(a: Any, b: Any) -> Any:
        if exact(a, b):
            quotient = op.Div(a, b)
            rest = op.Sub(a, op.Mul(quotient, b))
            return op.Sub(quotient, op.CastLike(apart(rest, b), quotient))
        a, b = floats(a, b)
        rest = op.Mod(a, b, fmod=1)
        whole = op.Round(op.Div(op.Sub(a, rest), b))
        made = op.Sub(whole, op.CastLike(apart(rest, b), whole))
        return op.Where(op.Equal(b, like(0, b)), op.Div(a, b), made)

    def divide(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
        if rounding_mode == "floor":
            return floor_divide(a, b)
        if rounding_mode == "trunc" and exact(a, b):
            return op.Div(a, b)
        quotient = op.Div(*floats(a, b))
        if rounding_mode is None:
            return quotient
        return op.Mul(op.Sign(quotient), op.Floor(op.Abs(quotient)))

    def atan2(y: Any, x: Any) -> Any:
        zero = like(0, y)
        angle = op.Where(op.Equal(y, zero), zero, op.Atan(op.Div(op.Abs(y), op.Abs(x))))
        angle = op.Where(negative(x), op.Sub(like(math.pi, y), angle), angle)
        return copysign(angle, y)

    def negative(x: Any) -> Any:
        zero = like(0, x)
        return op.Or(op.Less(x, zero), op.Less(op.Reciprocal(x), zero))  # -0 is, too

    def copysign(size: Any, sign: Any) -> Any:
        """By a product: Where takes a zero for nothing, and has lost its sign (ONNX Runtime 1.31)."""
        return op.Mul(op.Abs(size), op.Where(negative(sign), like(-1, size), like(1, size)))

    def hypot(a: Any, b: Any) -> Any:
        a, b = op.Abs(a), op.Abs(b)
        longer, shorter = op.Max(a, b), op.Min(a, b)
        ratio = op.Where(op.Equal(longer, like(0, longer)), longer, op.Div(shorter, longer))
        length = op.Mul(longer, op.Sqrt(op.Add(op.Mul(ratio, ratio), like(1, ratio))))
        endless = like(math.inf, length)
        return op.Where(op.Or(op.Equal(a, endless), op.Equal(b, endless)), endless, length)

    def numbers(chosen: Any) -> Callable[[Any, Any], Any]:
        """The one that a number wins over none."""

        def made(a: Any, b: Any) -> Any:
            if exact(a, b):
                return chosen(a, b)
            return op.Where(op.IsNaN(a), b, op.Where(op.IsNaN(b), a, chosen(a, b)))

        return made

    aten = torch.ops.aten
    return {
        aten.remainder.Tensor: remainder,
        aten.remainder.Scalar: remainder,
        aten.remainder.Scalar_Tensor: remainder,
        aten.floor_divide.default: floor_divide,
        aten.floor_divide.Scalar: floor_divide,
        aten.div.Tensor_mode: divide,
        aten.div.Scalar_mode: divide,
        aten.atan2.default: atan2,
        aten.log_sigmoid.default: log_sigmoid,
        aten.logaddexp.default: logaddexp,
        aten.logaddexp2.default: logaddexp2,
        aten.expm1.default: expm1,
        aten.log1p.default: log1p,
        aten.logcumsumexp.default: logcumsumexp,
        aten.cumprod.default: cumprod,
        aten.copysign.Tensor: copysign,
        aten.hypot.default: hypot,
        aten.fmax.default: numbers(op.Max),
        aten.fmin.default: numbers(op.Min),
    }
