"""What a target is: plain data. The runtime's habits are facts in a table, not code in a pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .errors import UsageError


@dataclass(frozen=True)
class QuantSpec:
    """Integer formats that an execution provider computes fast, and the operators that it fuses.

    Sets of operators name kinds of `ops.py` (`conv`) or single ATen operators (`relu.default`).

    activation: `u8`, `u16` (any zero point) or `s8` (zero point 0). Weights are s8, symmetric, one scale an output
    channel.
    reduce_range: 7-bit weights, for instruction sets whose sums of two products saturate at 16 bits.
    bias: `i32`, on the accumulator's scale, or `float`, where the provider wants biases so.
    weighted: operators with a constant weight that the provider computes in integers.
    closed: those of them that need their own output quantised for it; the others may give float.
    group_width: input channels that a group of a convolution has at least, for integers to be faster; depthwise ones
    with one output a channel have a kernel of their own.
    products: how many one output of a convolution sums at least, for integers to be faster, depthwise ones included.
    float_bias_rank: a weighted operator that is not closed keeps a float bias from this input rank on.
    fuses: operators that become integer when every operand and their output are quantised; a hard sigmoid as a sum.
    absorbed: activations that vanish into the quantiser behind them, because its range begins or ends where they clip.
    to_the_end: they do so too where no weighted operator reads their result in integers.
    rescales: the integers of a value may be read on another scale, as those of a hard sigmoid are.
    transparent: operators that pass integers through; their output has the input's scale.
    everywhere: floats that have a quantiser are read through it by everybody, not by integer operators alone.
    rewrites: exact rewrites that let operators fuse: `pool` (a mean over space as an average pool), `selection` (a
    strided slice with padded channels as a 1x1 convolution), `gate` (SiLU and hard swish as a product with a
    sigmoid), `pixels` (a normalised picture as its bytes).
    timed: those of them that add work; where it is not small, they stay only if the model is not slower with them.
    """

    activation: str = "u8"
    reduce_range: bool = False
    bias: str = "i32"
    weighted: frozenset[str] = frozenset()
    closed: frozenset[str] = frozenset()
    group_width: int = 1
    products: int = 1
    float_bias_rank: int = 3
    fuses: frozenset[str] = frozenset()
    to_the_end: bool = False
    rescales: bool = True
    absorbed: frozenset[str] = frozenset()
    transparent: frozenset[str] = frozenset()
    everywhere: bool = False
    rewrites: frozenset[str] = frozenset()
    timed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Target:
    """Where the model will run.

    providers: ONNX Runtime execution providers, best first; where the first is not installed, numbers are verified on
    the next, or on the CPU's. channel_multiple: widths that pruning rounds to. fixed_batch: batch size that dynamic
    batches are fixed to by default, None to leave them dynamic. elsewhere: it runs on another machine than the one
    that compiles, so that times taken here decide nothing. formats: files to write, of `onnx` and `ort`. recipe: the
    passes of `compress MODEL` without `--passes`. dialect: rules of `dialect.py` that its runtime profits from.
    slow: operators that its runtime computes slower than the floats in their place: a notice says so. lacks: operators
    that its runtime has no kernel for (`Conv`, `com.microsoft::QGemm`), and dtypes (`bf16`) that its inputs and outputs
    cannot have: a model with one is refused. accelerators: of the devices, by their names in `accelerators.py`: the
    report says what they take of the model.
    """

    name: str
    summary: str
    providers: tuple[str, ...]
    opset: int = 20
    ir_version: int = 9
    channel_multiple: int = 8
    fixed_batch: int | None = None
    elsewhere: bool = False
    formats: tuple[str, ...] = ("onnx",)
    recipe: str = "merge,fold"
    dialect: frozenset[str] = frozenset()
    slow: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()
    accelerators: tuple[str, ...] = ()
    quant: QuantSpec = field(default_factory=QuantSpec)

    def oldest(self, since: str = "") -> str:
        """The first release of ONNX Runtime that loads its files; since: the one that their operators came with."""
        reads = next(
            name for name, (opset, ir) in RELEASES.items() if opset >= self.opset and ir >= self.ir_version
        )
        return max(reads, since or reads, key=release)

    def speaking(self, opset: int | None = None, min_ort: str | None = None) -> Target:
        """The same target, with files of this opset, or that this release of ONNX Runtime (`1.17`) still loads.

        UsageError where there are no such files.
        """
        newest = _newest_opset(min_ort) if min_ort is not None else max(_IR_VERSIONS)
        wanted = min(self.opset, newest) if opset is None else opset
        if wanted not in _IR_VERSIONS and opset is not None:
            raise UsageError(f"--opset {opset}: files have opset {min(_IR_VERSIONS)} to {max(_IR_VERSIONS)}")
        if wanted > newest:
            raise UsageError(f"--opset {opset}: ONNX Runtime {min_ort} reads opsets up to {newest}")
        return self if wanted == self.opset else replace(self, opset=wanted, ir_version=_IR_VERSIONS[wanted])


# Release of ONNX Runtime -> the newest opset and IR version that it reads and has the kernels for. Source: its page
# "Compatibility", but for the first two: 1.14 crashes on half precision, 1.15 lacks kernels of opset 19.
RELEASES = {
    "1.15": (18, 8),
    "1.16": (19, 9),
    "1.17": (20, 9),
    "1.18": (21, 10),
    "1.21": (22, 10),
    "1.22": (23, 11),
}
_IR_VERSIONS = dict(RELEASES.values())


def _newest_opset(wanted: str) -> int:
    found = [opset for name, (opset, _) in RELEASES.items() if release(name) <= release(wanted)]
    if not found:
        raise UsageError(
            f"--min-ort {wanted}: the oldest that files can be written for is {next(iter(RELEASES))}"
        )
    return found[-1]


def release(name: str) -> tuple[int, int]:
    """`1.17.3` -> (1, 17), which can be compared."""
    parts = name.split(".")[:2]
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise UsageError(f"--min-ort {name}: a release of ONNX Runtime is written 1.17")
    return int(parts[0]), int(parts[1])


# Measured with ONNX Runtime 1.31 (dialect.py).
ONNXRUNTIME = frozenset({"integer_products", "islands", "sums"})

_RESHAPES = ("view", "flatten", "unflatten", "permute", "transpose", "unsqueeze", "squeeze", "expand")
_PARTS = ("slice", "select", "split", "chunk", "unbind")

# Of runtimes that fuse biases, activations and residual sums into the operator in front by themselves, and quantise
# outputs where the next reader wants integers: pairs stand at inputs and weights, nowhere else.
AT_INPUTS = QuantSpec(
    bias="float",
    weighted=frozenset({"conv", "linear", "addmm", "matmul"}),
    transparent=frozenset(
        {"max_pool", "view", "flatten", "permute", "transpose", "unsqueeze", "squeeze", "slice"}
    ),
    everywhere=True,
)

# What ONNX Runtime fuses into its QLinear operators on processors, measured with 1.31: QLinearConv, QLinearAdd,
# QLinearMul, QLinearConcat, QLinearAveragePool, QLinearSigmoid, QLinearLeakyRelu and QGemm compute integers from
# integers; MatMulIntegerToFloat is a linear on more than two axes. With s8 activations ReLU would not fuse.
QLINEAR = QuantSpec(
    weighted=frozenset({"conv", "linear", "addmm", "matmul"}),
    closed=frozenset({"conv"}),
    fuses=frozenset(
        {
            "add.Tensor",
            "mul.Tensor",
            "cat",
            "avg_pool",
            "sigmoid.default",
            "hardsigmoid.default",
            "leaky_relu.default",
        }
    ),
    absorbed=frozenset(
        {"relu.default", "relu6.default", "hardtanh.default", "clamp.default", "clamp_min.default"}
    ),
    transparent=frozenset({"max_pool", "upsample_nearest2d.vec", "identity", *_RESHAPES, *_PARTS}),
    rewrites=frozenset({"pool", "selection", "gate", "pixels"}),
    timed=frozenset({"selection"}),
)
