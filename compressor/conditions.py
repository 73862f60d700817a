"""What an execution provider demands of an operator: conditions that say why not, for the tables of `accelerators`.

A condition takes a unit and answers the reason why it falls back; an empty string where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .units import DQ, Unit, Value, same_scale

Check = Callable[[Unit], str]

_ORDINALS = ("its input", "its weight", "its third input", "its fourth input", "its fifth input")


def _name(unit: Unit, position: int) -> str:
    if position == 2 and unit.op in ("Conv", "ConvTranspose", "Gemm"):
        return "its bias"
    if position == 1 and unit.op not in ("Conv", "ConvTranspose", "Gemm"):
        return "its second input"
    return _ORDINALS[position]


def _bits(value: Value) -> str:
    short = {"uint8": "u8", "int8": "s8", "uint16": "u16", "int16": "s16", "float": "float32"}
    return short.get(value.dtype, value.dtype or "unknown type")


# -------------------------------------------------------------------- shapes


def static(unit: Unit) -> str:
    """Every input has a size for every axis."""
    free = [v for v in unit.inputs if v is not None and not v.fixed]
    if not free:
        return ""
    return "its rank is not known" if free[0].shape is None else "a size of its input is not fixed"


def image(unit: Unit) -> str:
    """Four axes, of which the batch alone may be dynamic."""
    shape = unit.inputs[0].shape if unit.inputs[0] is not None else None
    if shape is None or len(shape) != 4:
        return f"its input has {len(shape)} axes, not 4" if shape is not None else "its rank is not known"
    return "channels, height or width are not fixed" if None in shape[1:] else ""


def rank(*allowed: int, of: Sequence[int] = (0,)) -> Check:
    def check(unit: Unit) -> str:
        for position in of:
            value = unit.input(position)
            if value is not None and value.rank not in allowed:
                shown = "axes that are not known" if value.rank is None else f"{value.rank} axes"
                return f"{_name(unit, position)} has {shown}; {' or '.join(map(str, allowed))} are taken"
        return ""

    return check


def up_to(axes: int, least: int = 0) -> Check:
    """Every input and every result has so many axes at most."""

    def check(unit: Unit) -> str:
        for value in (*unit.inputs, *unit.outputs):
            if value is not None and value.rank is not None and not value.rank <= axes:
                return f"{value.rank} axes; at most {axes} are taken"
        first = unit.input(0)
        return f"{first.rank} axes" if first is not None and (first.rank or 0) < least else ""

    return check


def no_longer_than(limit: int) -> Check:
    def check(unit: Unit) -> str:
        sizes = [s for v in unit.inputs if v is not None for s in v.shape or () if s]
        return f"an axis of {max(sizes)}; at most {limit} are taken" if max(sizes, default=0) > limit else ""

    return check


def within(unit: Unit) -> str:
    return "at an end of the model, where the processor quantises" if unit.at_ends else ""


# -------------------------------------------------------------------- types


def dtypes(*allowed: str, of: Sequence[int] = (0,)) -> Check:
    def check(unit: Unit) -> str:
        for position in of:
            value = unit.input(position)
            if value is not None and value.dtype not in allowed:
                return f"{_name(unit, position)} is {_bits(value)}"
        return ""

    return check


def results(*allowed: str) -> Check:
    def check(unit: Unit) -> str:
        return next((f"its result is {_bits(v)}" for v in unit.outputs if v.dtype not in allowed), "")

    return check


def constant(*positions: int) -> Check:
    def check(unit: Unit) -> str:
        for position in positions:
            value = unit.input(position)
            if value is not None and value.constant is None:
                made = any(s.op == DQ and value.name == s.outputs[0].name for s in unit.sources)
                what = "dequantised beside floats" if made else "no constant"
                return f"{_name(unit, position)} is {what}"
        return ""

    return check


def absent(*positions: int) -> Check:
    def check(unit: Unit) -> str:
        return next((f"{_name(unit, p)} is given" for p in positions if unit.input(p) is not None), "")

    return check


def present(*positions: int) -> Check:
    def check(unit: Unit) -> str:
        return next((f"{_name(unit, p)} is missing" for p in positions if unit.input(p) is None), "")

    return check


def inside_file(unit: Unit) -> str:
    """No constant lies in a file beside the model."""
    held = [v.constant for v in unit.inputs if v is not None and v.constant is not None]
    return "its weights lie in a file of their own" if any(t.external_data for t in held) else ""


# -------------------------------------------------------------------- integers


def per_tensor(*, of: Sequence[int] = (0,), result: bool = True) -> Check:
    """One constant scale and zero point a tensor."""

    def check(unit: Unit) -> str:
        named = [(_name(unit, i), v) for i in of if (v := unit.input(i)) is not None and v.quantised]
        for name, value in [*named, *(("its result", v) for v in unit.outputs if result)]:
            if not value.quantised:
                return f"{name} is not quantised"
            if value.scale is None or value.zero is None:
                return f"the scale of {name} is no constant"
            if value.scale.size != 1:
                return f"{name} has a scale a channel"
        return ""

    return check


def per_channel(axis: int = 0) -> Check:
    """A weight with one scale, or one an output channel along `axis`, and zero point 0 where it is signed."""

    def check(unit: Unit) -> str:
        weight = unit.input(1)
        if weight is None or weight.scale is None or weight.zero is None:
            return "the scale of its weight is no constant"
        along = 0 if unit.op == "Gemm" and unit.attribute("transB", 0) else axis
        if weight.scale.size not in (1, weight.shape[along] if weight.shape else None):
            return "its weight has scales along another axis than that of its outputs"
        if weight.dtype != "int8" and weight.scale.size != 1:
            return f"its weight is {_bits(weight)} with a scale a channel"
        return (
            "its weight has zero points other than 0" if weight.dtype == "int8" and weight.zero.any() else ""
        )

    return check


def same_scales(unit: Unit) -> str:
    source = unit.input(0)
    same = source is not None and all(same_scale(source, v) for v in unit.outputs)
    return "" if same else "its result has another scale than its input"


def scale_is(wanted: float, zero: int) -> Check:
    def check(unit: Unit) -> str:
        value = unit.outputs[0]
        good = value.scale is not None and value.zero is not None and value.scale.size == 1
        if good and np.isclose(value.scale, wanted, rtol=1e-6).all() and (value.zero == zero).all():  # type: ignore[arg-type]
            return ""
        return f"its result must have scale 1/{1 / wanted:.0f} and zero point {zero}"

    return check


def types_are(*combinations: tuple[str, str, str]) -> Check:
    """Input, weight and result have one of these combinations of types."""

    def check(unit: Unit) -> str:
        left, weight = unit.input(0), unit.input(1)
        if left is None or weight is None:
            return "an operand is missing"
        if (left.dtype, weight.dtype, unit.outputs[0].dtype) in combinations:
            return ""
        return f"{_bits(left)} activations with {_bits(weight)} weights"

    return check


# -------------------------------------------------------------------- attributes


def attribute(name: str, default: object, *allowed: object) -> Check:
    """An attribute has its default value, or one of those allowed."""

    def check(unit: Unit) -> str:
        value = unit.attribute(name, default)
        value = list(value) if isinstance(value, (list, tuple)) else value
        return "" if value == default or value in allowed else f"{name}={value}"

    return check


def spatial(axes: int) -> Check:
    """A kernel of so many axes."""

    def check(unit: Unit) -> str:
        found = len(unit.attribute("kernel_shape", ()))
        return "" if found == axes else f"a kernel of {found} axes"

    return check


def not_pointwise(unit: Unit) -> str:
    return "a kernel of 1x1" if set(unit.attribute("kernel_shape", ())) == {1} else ""


def one_result(unit: Unit) -> str:
    return "" if len(unit.outputs) == 1 else "it gives indices too"


def last_axis(unit: Unit) -> str:
    value, axis = unit.input(0), unit.attribute("axis", -1)
    return (
        ""
        if value is not None and axis in (-1, (value.rank or 0) - 1)
        else f"along axis {axis}, not the last"
    )


def clips_to(*ranges: tuple[float, float]) -> Check:
    def check(unit: Unit) -> str:
        ends = [v.numbers for i in (1, 2) if (v := unit.input(i)) is not None]
        found = tuple(float(e) for e in ends if e is not None)
        shown = ", ".join(f"{low:g} to {high:g}" for low, high in ranges)
        return "" if found in ranges else f"it clips to other bounds than {shown}"

    return check


def numbers(position: int, good: Callable[[np.ndarray], bool], words: str) -> Check:
    """A constant input, if there is one, holds numbers that satisfy a condition."""

    def check(unit: Unit) -> str:
        value = unit.input(position)
        if value is None:
            return ""
        held = value.numbers
        return "" if held is not None and good(held) else words

    return check


def even_split(unit: Unit) -> str:
    sizes = {v.shape[unit.attribute("axis", 0)] if v.shape else None for v in unit.outputs}
    return "" if len(sizes) == 1 and None not in sizes else "its parts are not equally large"


def grouped_dilation(unit: Unit) -> str:
    """Dilated convolutions in groups are taken only where a group is one channel."""
    weight = unit.input(1)
    dilated = set(unit.attribute("dilations", ())) - {1}
    depthwise = weight is not None and weight.shape is not None and weight.shape[1] == 1
    return (
        "dilated, in groups of several channels"
        if dilated and unit.attribute("group", 1) != 1 and not depthwise
        else ""
    )


def vector_bias(unit: Unit) -> str:
    """The bias of a product is one number a column."""
    bias, weight = unit.input(2), unit.input(1)
    if bias is None or weight is None:
        return ""
    columns = (weight.shape or (None, None))[0 if unit.attribute("transB", 0) else 1]
    shape = bias.shape or ()
    good = bool(shape) and shape[-1] == columns and all(size == 1 for size in shape[:-1])
    return "" if good else "its bias is no vector of one number a column"


def plain_product(unit: Unit) -> str:
    for name, default in (("transA", 0), ("alpha", 1.0), ("beta", 1.0)):
        if unit.op == "Gemm" and unit.attribute(name, default) != default:
            return f"{name}={unit.attribute(name)}"
    return ""


def matrices(unit: Unit) -> str:
    """A matrix times a constant matrix."""
    return rank(2, of=(0, 1))(unit) or constant(1)(unit)


def any_of(*checks: Check) -> Check:
    """One of several conditions; the reason of the last."""

    def check(unit: Unit) -> str:
        return "" if any(not one(unit) for one in checks[:-1]) else checks[-1](unit)

    return check


def batched(unit: Unit) -> str:
    """Stacks of matrices of one size."""
    left, right = unit.input(0), unit.input(1)
    shapes = [v.shape if v is not None else None for v in (left, right)]
    if None in shapes or len(shapes[0]) < 3 or shapes[0][:-2] != shapes[1][:-2]:  # type: ignore[arg-type, index]
        return "its operands are no stacks of matrices of one size"
    return ""


def resize(*ways: tuple[str, ...]) -> Check:
    """Height and width of four axes, to constant sizes, in one of these ways: mode, coordinates, rounding."""

    def check(unit: Unit) -> str:
        mode = unit.attribute("mode", "nearest")
        way = (mode, unit.attribute("coordinate_transformation_mode", "half_pixel"))
        full = (*way, unit.attribute("nearest_mode", "round_prefer_floor")) if mode == "nearest" else way
        if full not in ways:
            return f"it resizes by {', '.join(full)}"
        for name, default in (
            ("antialias", 0),
            ("exclude_outside", 0),
            ("keep_aspect_ratio_policy", "stretch"),
        ):
            if unit.attribute(name, default) != default:
                return f"{name}={unit.attribute(name)}"
        if unit.attribute("axes"):
            return "it names axes"
        if reason := rank(4)(unit) or constant(2, 3)(unit):
            return reason
        source, made = unit.inputs[0], unit.outputs[0]
        if source is None or source.shape is None or made.shape is None or source.shape[:2] != made.shape[:2]:
            return "it resizes other axes than height and width"
        return ""

    return check


def whole_factors(unit: Unit) -> str:
    """Height and width grow by whole factors, or shrink by them."""
    before = unit.inputs[0].shape if unit.inputs[0] is not None else None
    after = unit.outputs[0].shape
    if before is None or after is None or None in (*before[2:], *after[2:]):
        return "height or width are not fixed"
    whole = all(a % b == 0 or b % a == 0 for a, b in zip(after[2:], before[2:], strict=True))  # type: ignore[operator]
    return "" if whole else "height or width change by no whole factor"


def grows(unit: Unit) -> str:
    before = unit.inputs[0].shape if unit.inputs[0] is not None else None
    after = unit.outputs[0].shape
    if before is None or after is None:
        return "height or width are not fixed"
    return (
        "it makes pictures smaller"
        if any((a or 0) < (b or 0) for a, b in zip(after, before, strict=True))
        else ""
    )
