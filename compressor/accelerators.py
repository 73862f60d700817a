"""Which operators the accelerators of phones take from ONNX Runtime, and on what conditions: plain data.

Read off ONNX Runtime's sources, release 1.31 where its repository has it (github.com/microsoft/onnxruntime, below
onnxruntime/core/providers: nnapi/nnapi_builtin/builders/impl, coreml/builders/impl, xnnpack), its lists of operators
in the wheel (onnxruntime/tools/mobile_helpers/*.md; a test holds the tables against them), and the pages of the QNN
provider (github.com/onnxruntime/onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md, 2.3) and of
XNNPACK's (docs/execution-providers/Xnnpack-ExecutionProvider.md). Where a source leaves room, the operator falls back.
What QNN takes was tried with its own validation on x86 (benchmarks/results/qnn.md); the others were not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .conditions import (
    Check,
    absent,
    any_of,
    attribute,
    batched,
    clips_to,
    constant,
    dtypes,
    even_split,
    grouped_dilation,
    grows,
    image,
    inside_file,
    last_axis,
    matrices,
    no_longer_than,
    not_pointwise,
    numbers,
    one_result,
    per_channel,
    per_tensor,
    plain_product,
    present,
    rank,
    resize,
    results,
    same_scales,
    scale_is,
    spatial,
    static,
    types_are,
    up_to,
    vector_bias,
    whole_factors,
    within,
)
from .errors import UsageError
from .units import Unit

Checks = tuple[Check, ...]


@dataclass(frozen=True)
class Row:
    """Conditions of one operator as it is (`plain`) and between quantisers; None where it is not taken so."""

    plain: Checks | None = ()
    quantised: Checks | None = None


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    always, plain, quantised: conditions of every unit, of those that are not quantised, of those that are.
    rows: operators. unjudged: those that it takes under conditions that no row says. unlisted: why others fall back.
    alone: operators that are no partition of their own. folded: activations that vanish into these operators in front.
    note: what to know about the count of partitions.
    """

    name: str
    title: str
    rows: Mapping[str, Row]
    always: Checks = ()
    plain: Checks = ()
    quantised: Checks = ()
    unjudged: frozenset[str] = frozenset()
    unlisted: str = "not in its list of operators"
    alone: frozenset[str] = frozenset()
    folded: Mapping[str, frozenset[str]] = field(default_factory=dict)
    note: str = ""

    def refuses(self, unit: Unit) -> str:
        """Why a unit falls back, by itself; empty where the provider takes it."""
        if unit.inside:
            return "inside the body of If or Loop"
        row = self.rows.get(unit.op)
        if row is None:
            return "compressor knows no conditions for it" if unit.op in self.unjudged else self.unlisted
        own = row.quantised if unit.quantised else row.plain
        if own is None:
            return "not taken in integers" if unit.quantised else "not taken in floats"
        shared = (*self.always, *(self.quantised if unit.quantised else self.plain))
        return next((reason for check in (*shared, *own) if (reason := check(unit))), "")


def _rows(names: Iterable[str], *plain: Check, quantised: Checks | None = None) -> dict[str, Row]:
    return dict.fromkeys(names, Row(plain, quantised))


def _floats(names: Iterable[str], *plain: Check, quantised: Checks | None = None) -> dict[str, Row]:
    return _rows(names, dtypes("float"), *plain, quantised=quantised)


_FLOATS = ("float", "float16")
_POOL = (
    spatial(2),
    attribute("ceil_mode", 0),
    attribute("dilations", [1, 1]),
    attribute("storage_order", 0),
    one_result,
)
_NO_PADDING_COUNTED = attribute("count_include_pad", 0)
_AXES = constant(1)
_FLAT = attribute("mode", "constant")
_NOT_NEGATIVE = numbers(
    1, lambda pads: bool((pads >= 0).all()), "it cuts edges off, or its pads are no constants"
)

# -------------------------------------------------------------------- Android: NNAPI (API level 30)

_U8 = (per_tensor(), dtypes("uint8"), results("uint8"))
_U8_PAIR = (per_tensor(of=(0, 1)), dtypes("uint8", of=(0, 1)), results("uint8"))
_U8_WEIGHTED = (dtypes("uint8"), dtypes("uint8", "int8", of=(1,)), results("uint8"), constant(1, 2))
_NNAPI_RESIZE = (
    resize(
        ("linear", "half_pixel"),
        ("linear", "align_corners"),
        ("linear", "asymmetric"),
        ("nearest", "asymmetric", "floor"),
    ),
    whole_factors,
)

NNAPI = Provider(
    "nnapi",
    "NNAPI (Android 11 or newer)",
    rows={
        **_floats(("Abs", "Elu", "Exp", "Flatten", "Floor", "Identity", "LeakyRelu", "Log", "Neg", "Relu", "Sin",
                   "Sqrt", "Tanh")),
        **_floats(("Sigmoid",), up_to(4, least=1)),
        **_floats(("Div", "Pow", "Sub"), dtypes("float", of=(0, 1))),
        **_floats(("Add", "Mul"), dtypes("float", of=(0, 1)), quantised=_U8_PAIR),
        **_floats(("PRelu",), constant(1)),
        **_floats(("Max", "Min"), dtypes("float", of=(0, 1)), present(1), absent(2)),
        **_floats(("AveragePool",), rank(4), *_POOL, _NO_PADDING_COUNTED,
                quantised=(rank(4), *_POOL, _NO_PADDING_COUNTED, *_U8, same_scales)),
        **_floats(("MaxPool",), rank(4), *_POOL),
        **_floats(("GlobalAveragePool", "GlobalMaxPool", "LRN"), rank(4)),
        **_floats(("BatchNormalization",), rank(4), constant(1, 2, 3, 4), attribute("training_mode", 0)),
        **_floats(("Cast",), attribute("to", 1, 6)),
        **_floats(("Clip",), clips_to((0, 6), (-1, 1))),
        **_floats(("Concat",), up_to(4, least=1), quantised=(up_to(4, least=1), per_tensor(), results("uint8"))),
        **_floats(("Conv",), rank(4), constant(1, 2), rank(4, of=(1,)), grouped_dilation,
                quantised=(rank(4), rank(4, of=(1,)), grouped_dilation, *_U8_WEIGHTED, per_tensor(), per_channel())),
        **_floats(("DepthToSpace",), rank(4), attribute("mode", "DCR")),
        **_floats(("Gather",), constant(1)),
        **_floats(("Gemm",), plain_product, rank(2, of=(0, 1)), constant(1), vector_bias,
                quantised=(plain_product, rank(2, of=(0, 1)), vector_bias, *_U8_WEIGHTED, per_tensor(of=(0, 1)),
                           per_channel(1))),
        **_floats(("MatMul",), any_of(batched, matrices),
                quantised=(matrices, *_U8_WEIGHTED, per_tensor(of=(0, 1)), per_channel(1))),
        **_floats(("Pad",), _FLAT, _NOT_NEGATIVE, constant(2), absent(3)),
        **_floats(("ReduceMean",), up_to(4, least=1), _AXES),
        **_floats(("Reshape",), constant(1), up_to(4, least=1), quantised=(constant(1), up_to(4, least=1), *_U8)),
        **_floats(("Resize",), *_NNAPI_RESIZE, quantised=(*_NNAPI_RESIZE, *_U8)),
        **_floats(("Slice",), constant(1, 2, 3, 4)),
        **_floats(("Softmax",), rank(2, 4), quantised=(rank(2, 4), *_U8, scale_is(1 / 256, 0))),
        **_floats(("Split",), _AXES, even_split),
        **_floats(("Squeeze", "Unsqueeze"), _AXES),
        **_floats(("Transpose",), up_to(4, least=1), quantised=(up_to(4, least=1), *_U8)),
        **_floats(("QuantizeLinear",), constant(1, 2), rank(0, of=(1,)), results("uint8")),
        **_rows(("DequantizeLinear",), dtypes("uint8"), constant(1, 2), rank(0, of=(1,))),
    },
    always=(static, up_to(4), inside_file),
    unjudged=frozenset({"QLinearConv", "QLinearMatMul", "com.microsoft::QLinearAdd",
                        "com.microsoft::QLinearAveragePool", "com.microsoft::QLinearSigmoid"}),
    alone=frozenset({"Reshape", "Flatten", "Identity"}),
    note="what a phone's driver makes of NNAPI's operators is its own affair: measure there",
)  # fmt: skip

# -------------------------------------------------------------------- Apple: Core ML

_SQUARE_EDGES = numbers(
    1, lambda pads: not pads.reshape(2, -1)[:, :-2].any(), "it pads other axes than the last two"
)
_SLOPE = numbers(
    1,
    lambda slope: slope.size == 1 or (slope.ndim == 3 and slope.size == slope.shape[0]),
    "its slopes are no constants, one a channel",
)
_GROWTH = (resize(("linear", "asymmetric"), ("nearest", "asymmetric", "floor")), whole_factors, grows)
_BOTH = {
    **_rows(("Add", "Div", "Mul", "Sub"), dtypes(*_FLOATS, of=(0, 1))),
    **_rows(("Concat", "LeakyRelu", "Relu", "Sigmoid", "Softmax", "Sqrt", "Tanh", "Transpose", "Reciprocal")),
    **_rows(("Pow",), dtypes("float", of=(0, 1))),
    **_rows(("PRelu",), _SLOPE),
    **_rows(("AveragePool", "MaxPool"), rank(4), *_POOL),
    **_rows(("GlobalAveragePool", "GlobalMaxPool"), rank(4)),
    **_rows(("Clip",), constant(1, 2)),
    **_rows(("Conv",), rank(3, 4), constant(1, 2)),
    **_rows(("Gemm",), plain_product, constant(1, 2), vector_bias),
    **_rows(("Reshape",), constant(1), up_to(5, least=1)),
    **_rows(("Resize",), *_GROWTH),
    **_rows(("Slice",), constant(1, 2, 3, 4)),
    **_rows(("Split", "Squeeze"), _AXES),
}  # fmt: skip
_COREML: Checks = (static, up_to(5), no_longer_than(16384), inside_file)

COREML_NEURALNETWORK = Provider(
    "coreml-neuralnetwork",
    "Core ML, ModelFormat NeuralNetwork",
    rows={
        **_BOTH,
        **_rows(("BatchNormalization",), rank(4), constant(1, 2, 3, 4), attribute("training_mode", 0)),
        **_rows(("DepthToSpace",), rank(4), attribute("mode", "DCR")),
        **_rows(("Flatten",)),
        **_rows(("Gather",), rank(1, 2, 3, 4, 5, of=(1,))),
        **_rows(("LRN",), rank(4)),
        **_rows(("MatMul",), matrices),
        **_rows(("Pad",), _FLAT, constant(2), absent(3), _SQUARE_EDGES),
    },
    always=_COREML,
    plain=(dtypes("float"),),
    unjudged=frozenset({"ArgMax", "Cast", "Shape"}),
)

COREML_MLPROGRAM = Provider(
    "coreml-mlprogram",
    "Core ML, ModelFormat MLProgram",
    rows={
        **_BOTH,
        **_rows(("Ceil", "Cos", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "Identity", "Round", "Sin", "Softplus")),
        **_rows(("ConvTranspose",), rank(3, 4), constant(1, 2), attribute("auto_pad", "NOTSET", "VALID"),
                attribute("output_padding", [0, 0], [0]),
                lambda unit: "" if len(set(unit.attribute("pads", ()))) < 2 else "its pads are not equal",
                lambda unit: "" if unit.attribute("output_shape") is None else "it names the size of its result"),
        **_rows(("DepthToSpace",), rank(4)),
        **_rows(("InstanceNormalization", "LayerNormalization", "GroupNormalization"), constant(1, 2), one_result,
                attribute("stash_type", 1)),
        **_rows(("MatMul",)),
        **_rows(("Max",), present(1)),
        **_rows(("ReduceMax", "ReduceMean", "ReduceSum"), _AXES),
        **_rows(("Tile",), constant(1)),
        **_rows(("Unsqueeze",), _AXES),
    },
    always=_COREML,
    plain=(dtypes(*_FLOATS),),
    unjudged=frozenset({"And", "ArgMax", "Cast", "GatherND", "GridSample", "Shape", "Where",
                        "com.microsoft::FusedConv", "com.microsoft::QuickGelu"}),
)  # fmt: skip

# -------------------------------------------------------------------- Arm processors: XNNPACK

_XNN_PAD = attribute("auto_pad", "NOTSET", "VALID", "SAME_UPPER")
_XNN_POOL = (image, attribute("ceil_mode", 0), _XNN_PAD, spatial(2), not_pointwise)
_S8S8S8, _U8U8U8 = ("int8", "int8", "int8"), ("uint8", "uint8", "uint8")

XNNPACK = Provider(
    "xnnpack",
    "XNNPACK (Arm processors)",
    rows={
        **_floats(("Conv",), image, constant(1, 2), rank(4, of=(1,)), _XNN_PAD,
                quantised=(image, constant(1, 2), rank(4, of=(1,)), _XNN_PAD, types_are(_S8S8S8, _U8U8U8),
                           per_tensor(), per_channel())),
        **_floats(("ConvTranspose",), image, constant(1, 2), rank(4, of=(1,)), _XNN_PAD,
                quantised=(image, constant(1, 2), rank(4, of=(1,)), _XNN_PAD, types_are(_S8S8S8, _U8U8U8),
                           per_tensor(of=(0, 1)), per_channel())),
        **_floats(("MaxPool",), *_XNN_POOL, one_result,
                quantised=(*_XNN_POOL, one_result, per_tensor(), dtypes("uint8", "int8"))),
        **_floats(("AveragePool",), *_XNN_POOL, _NO_PADDING_COUNTED,
                quantised=(*_XNN_POOL, *_U8, attribute("count_include_pad", 1))),
        **_floats(("Softmax",), last_axis, quantised=(last_axis, *_U8, scale_is(1 / 256, 0))),
        **_floats(("Gemm",), plain_product, rank(2, of=(0, 1)), constant(1, 2), present(2), rank(1, of=(2,))),
        **_floats(("MatMul",), constant(1), rank(2, of=(1,)), rank(2, 3)),
        **_floats(("Resize",), image, resize(
            ("linear", "half_pixel"), ("linear", "pytorch_half_pixel"), ("linear", "align_corners"),
            ("linear", "asymmetric")), whole_factors),
    },
    folded=dict.fromkeys(("Relu", "Clip"), frozenset({"Conv", "MaxPool", "AveragePool"})),
    note="XNNPACK takes operators one by one in the processor's memory: partitions cost changes of layout, no copies",
)  # fmt: skip

# -------------------------------------------------------------------- Qualcomm: QNN on the HTP (Hexagon)

_HTP_TYPES = ("uint8", "uint16")
_HTP = (dtypes(*_HTP_TYPES), results(*_HTP_TYPES), per_tensor())
_HTP_RESIZE = resize(
    ("linear", "half_pixel"), ("linear", "pytorch_half_pixel"), ("linear", "align_corners"), ("linear", "asymmetric"),
    ("nearest", "asymmetric", "floor"), ("nearest", "half_pixel", "round_prefer_floor"),
)  # fmt: skip


def _in_integers(names: Iterable[str], *checks: Check) -> dict[str, Row]:
    return dict.fromkeys(names, Row(None, (*_HTP, *checks)))


QNN = Provider(
    "qnn",
    "QNN (Qualcomm's HTP, in integers)",
    rows={
        **_in_integers(("Abs", "AveragePool", "Ceil", "Concat", "Cos", "DepthToSpace", "Elu", "Exp", "Flatten", "Floor",
                        "Gelu", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "LeakyRelu", "Log",
                        "LogSoftmax", "Neg", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softmax", "SpaceToDepth",
                        "Sqrt", "Tanh", "Transpose")),
        **_in_integers(("Add", "Div", "Mul", "Pow", "Sub", "Max", "Min", "PRelu"), per_tensor(of=(0, 1))),
        **_in_integers(("MaxPool",), one_result),
        **_in_integers(("Clip",), constant(1, 2)),
        **_in_integers(("Expand", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Reshape", "Split", "Squeeze",
                        "Tile", "Unsqueeze"), constant(1)),
        **_in_integers(("Gather",), numbers(1, lambda at: bool((at >= 0).all()), "its indices may be negative")),
        **_in_integers(("Slice",), constant(1, 2, 3, 4)),
        **_in_integers(("Resize",), _HTP_RESIZE),
        **_in_integers(("Conv",), rank(3, 4, 5), constant(1, 2), per_channel()),
        **_in_integers(("ConvTranspose",), rank(3, 4, 5), constant(1, 2), per_channel(1)),
        **_in_integers(("Gemm",), plain_product, rank(2, of=(0, 1)), constant(2), per_channel(1), vector_bias),
        **_in_integers(("MatMul",), per_channel(1)),
        **_in_integers(("LayerNormalization",), last_axis, constant(1, 2), per_tensor(of=(0, 1)), one_result),
        "QuantizeLinear": Row((within, dtypes("float"), constant(1, 2), rank(0, of=(1,)), results(*_HTP_TYPES))),
        "DequantizeLinear": Row((within, dtypes(*_HTP_TYPES), constant(1, 2), rank(0, of=(1,)))),
    },
    always=(static, up_to(5)),
    unlisted="compressor knows no way in which QNN computes it in integers",
    alone=frozenset({"QuantizeLinear", "DequantizeLinear"}),
    note="floats fall back here; newer HTPs compute them in half precision (enable_htp_fp16_precision)",
)  # fmt: skip

PROVIDERS = {p.name: p for p in (NNAPI, COREML_NEURALNETWORK, COREML_MLPROGRAM, XNNPACK, QNN)}


def named(words: str) -> list[Provider]:
    """The providers of `nnapi,coreml`: names, `coreml` for both formats, or `all`; UsageError for another word."""
    found: dict[str, Provider] = {}
    for word in (part.strip().lower() for part in words.split(",")):
        matches = {n: p for n, p in PROVIDERS.items() if word in ("all", n) or n.startswith(f"{word}-")}
        if not matches:
            raise UsageError(f"no accelerator '{word}'; there are {', '.join(PROVIDERS)}, coreml and all")
        found |= matches
    return list(found.values())
