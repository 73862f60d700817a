"""Facts per ATen operator, in one table: what kind it is, and what it costs. A new operator is one row.

The kinds are what the analyses are written in: `channels.py` has one rule a kind, `features.py` which kinds are
affine in one operand, `quantize.py` which ones fuse. An operator without a row is `opaque`: it stops an analysis,
with its name as the reason, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx import Node

from .ir import Graph
from .names import operator_name

OPAQUE = "opaque"
_BEHIND_DOTS = "αβγδεζηθικλμ"  # label the axes that `...` stands for: no equation can hold them

_ROWS: dict[str, str] = {
    "conv": "conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding",
    "conv_transpose": "conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input",
    "linear": "linear.default",
    "matmul": "matmul.default mm.default bmm.default",
    "addmm": "addmm.default baddbmm.default",
    "einsum": "einsum.default",
    "attention": "scaled_dot_product_attention.default",
    "batch_norm": "batch_norm.default",
    "layer_norm": "layer_norm.default",
    "rms_norm": "rms_norm.default",
    "group_norm": "group_norm.default",
    "instance_norm": "instance_norm.default",
    "activation": """relu.default relu6.default silu.default gelu.default hardswish.default hardsigmoid.default
        hardtanh.default leaky_relu.default elu.default selu.default celu.default mish.default softplus.default
        sigmoid.default tanh.default log_sigmoid.default clamp.default clamp_min.default clamp_max.default
        threshold.default exp.default log.default sqrt.default rsqrt.default abs.default square.default
        sin.default cos.default erf.default reciprocal.default sign.default floor.default round.default
        pow.Tensor_Scalar logical_not.default bitwise_not.default isnan.default log1p.default expm1.default
        rrelu.default""",
    "prelu": "prelu.default",
    "add": "add.Tensor add.Scalar",
    "sub": "sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor",
    "mul": "mul.Tensor mul.Scalar",
    "div": "div.Tensor div.Scalar",
    "neg": "neg.default",
    "binary": """pow.Tensor_Tensor pow.Scalar maximum.default minimum.default eq.Tensor eq.Scalar ne.Tensor ne.Scalar
        lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar logical_and.default
        logical_or.default bitwise_and.Tensor bitwise_or.Tensor __and__.Tensor __or__.Tensor __xor__.Tensor
        where.self where.ScalarSelf where.ScalarOther where.Scalar masked_fill.Scalar masked_fill.Tensor
        addcmul.default addcdiv.default div.Tensor_mode floor_divide.default remainder.Scalar remainder.Tensor
        atan2.default""",
    "cast": "to.dtype to.dtype_layout to.device to.other _to_copy.default type_as.default",
    "identity": """alias.default clone.default contiguous.default detach.default detach_.default dropout.default
        feature_dropout.default alpha_dropout.default
        feature_alpha_dropout.default lift_fresh_copy.default lift_fresh.default""",
    "softmax": "softmax.int log_softmax.int _softmax.default _log_softmax.default",
    "reduce": """mean.dim mean.default sum.dim_IntList sum.default amax.default amin.default max.dim min.dim
        prod.dim_int var.correction std.correction var.dim std.dim linalg_vector_norm.default norm.ScalarOpt_dim
        argmax.default argmin.default logsumexp.default any.dim all.dim""",
    "scan": "cumsum.default cumprod.default sort.default topk.default",
    "max_pool": "max_pool1d.default max_pool2d.default max_pool3d.default",
    "avg_pool": "avg_pool1d.default avg_pool2d.default avg_pool3d.default",
    "adaptive_pool": """adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default
        adaptive_max_pool1d.default adaptive_max_pool2d.default""",
    "upsample": """upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec upsample_bilinear2d.vec
        upsample_bicubic2d.vec upsample_linear1d.vec upsample_trilinear3d.vec upsample_nearest2d.default
        upsample_bilinear2d.default _upsample_nearest_exact2d.vec _upsample_bilinear2d_aa.default
        _upsample_bicubic2d_aa.default""",
    "view": "view.default reshape.default _unsafe_view.default view_as.default reshape_as.default",
    "flatten": "flatten.using_ints",
    "unflatten": "unflatten.int",
    "permute": "permute.default",
    "transpose": "transpose.int t.default swapaxes.default numpy_T.default adjoint.default mT.default",
    "unsqueeze": "unsqueeze.default",
    "squeeze": "squeeze.default squeeze.dim squeeze.dims",
    "expand": "expand.default expand_as.default broadcast_to.default",
    "repeat": "repeat.default tile.default",
    "repeat_interleave": "repeat_interleave.self_int",
    "cat": "cat.default concat.default",
    "stack": "stack.default",
    "split": "split.Tensor split.sizes split_with_sizes.default",
    "chunk": "chunk.default",
    "unbind": "unbind.int",
    "slice": "slice.Tensor",
    "narrow": "narrow.default",
    "select": "select.int",
    "index_select": "index_select.default",
    "index": "index.Tensor",
    "im2col": "im2col.default",
    "col2im": "col2im.default",
    "unfold": "unfold.default",
    "grid_sample": "grid_sampler.default grid_sampler_2d.default grid_sampler_3d.default",
    "glu": "glu.default",
    "gather": "gather.default",
    "roll": "roll.default",
    "flip": "flip.default",
    "pad": "pad.default constant_pad_nd.default",
    "slice_scatter": "slice_scatter.default",
    "index_put": "index_add.default index_copy.default index_put.default",
    "scatter": "scatter.src scatter_add.default",
    "as_complex": "view_as_complex.default",
    "as_real": "view_as_real.default",
    "select_scatter": "select_scatter.default",
    "copy": "copy.default",
    "pixel_shuffle": "pixel_shuffle.default",
    "pixel_unshuffle": "pixel_unshuffle.default",
    "channel_shuffle": "channel_shuffle.default",
    "embedding": "embedding.default",
    "fft": "fft_fft.default fft_ifft.default fft_rfft.default fft_irfft.default fft_fft2.default real.default",
    "create": """arange.default arange.start arange.start_step zeros.default ones.default full.default
        empty.memory_format eye.default eye.m linspace.default scalar_tensor.default tril_indices.default""",
    "create_like": """zeros_like.default ones_like.default full_like.default empty_like.default new_zeros.default
        new_ones.default new_full.default zero.default tril.default triu.default""",
    "size": "sym_size.int sym_numel.default",
    "fake_quantize": """fake_quantize_per_tensor_affine.default fake_quantize_per_tensor_affine.tensor_qparams
        fake_quantize_per_channel_affine.default""",
    "assertion": """_assert_tensor_metadata.default _assert_scalar.default _assert_async.msg
        sym_constrain_range_for_size.default sym_constrain_range.default""",
}

KINDS: dict[str, str] = {f"aten.{name}": kind for kind, names in _ROWS.items() for name in names.split()}
KINDS |= {
    "getitem": "getitem",
    "quantized_decomposed.quantize_per_tensor.default": "quantize",
    "compressor.dynamic_quantise.default": "quantize",
    "compressor.matmul_blocks.default": "integer_matmul",
    "quantized_decomposed.dequantize_per_tensor.default": "dequantize",
    "quantized_decomposed.dequantize_per_channel.default": "dequantize",
}

NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "instance_norm"})
# Opaque operators that multiply every row of what they read by all of their weights.
_BY_ROWS = frozenset(
    f"aten.{name}"
    for name in (
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "lstm_cell",
        "gru_cell",
        "rnn_tanh_cell",
        "rnn_relu_cell",
        "bilinear",
    )
)
CONTRACTIONS = frozenset({"conv", "conv_transpose", "linear", "matmul", "addmm", "einsum", "attention"})


def kind(node: Node) -> str:
    """The row of a node: its kind, `placeholder`, `get_attr`, `output`, or `opaque`."""
    if node.op != "call_function":
        return node.op
    name = operator_name(node)
    known = KINDS.get(name)
    if known is not None:
        return known
    if _is_size_arithmetic(node):
        return "size"
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return "binary"
    return OPAQUE


def arguments(node: Node) -> dict[str, Any]:
    """Arguments by the names of the operator's schema, defaults filled in.

    `arguments(conv)["stride"]` is right whether it was passed by position, by keyword or not at all.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for position, formal in enumerate(schema.arguments):
        if position < len(node.args):
            bound[formal.name] = node.args[position]
        elif formal.name in node.kwargs:
            bound[formal.name] = node.kwargs[formal.name]
        elif formal.has_default_value():
            bound[formal.name] = formal.default_value
    return bound


def attention_scale(node: Node) -> Any:
    """What the products of attention are multiplied by: its `scale`, or one over the root of the queries' width."""
    bound = arguments(node)
    given = bound.get("scale")
    return bound["query"].meta["val"].shape[-1] ** -0.5 if given is None else given


def set_argument(graph: Graph, node: Node, name: str, value: Any) -> None:
    """Rewrites one argument by its schema name, leaving how the others were passed as it is."""
    schema = list(node.target._schema.arguments)  # type: ignore[union-attr]
    position = [a.name for a in schema].index(name)
    if schema[position].kwarg_only or name in node.kwargs or position > len(node.args):
        graph.set_args(node, node.args, {**node.kwargs, name: value})
    else:
        graph.set_args(node, (*node.args[:position], value, *node.args[position + 1 :]))


def shape(node: Node) -> tuple[Any, ...]:
    """Sizes of a tensor-valued node; a symbolic size is a `torch.SymInt`."""
    return tuple(node.meta["val"].shape)


def extents(value: Tensor) -> list[Any]:
    """Sizes of a recorded value as ints and sympy expressions, which compare without adding a guard."""
    return [s if isinstance(s, int) else s.node.expr for s in value.shape]


def is_static(size: Any) -> bool:
    return isinstance(size, int)


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def is_constant(node: Any) -> bool:
    """True for a `get_attr`: a parameter, buffer or lifted constant."""
    return isinstance(node, Node) and node.op == "get_attr"


def sizes(node: Node, tensor: Tensor | None = None) -> tuple[int, ...]:
    """Sizes for one sample: the batch counts 1, every other dynamic axis what it was in the example.

    tensor: the recorded value that is meant, where the node makes several.
    """
    return tuple(_size(s, node) for s in (shape(node) if tensor is None else tensor.shape))


def macs(graph: Graph) -> int:
    """Multiply-accumulates of one sample; FLOPs are twice that. Only contractions count."""
    return sum(node_macs(n) for n in graph.nodes)


def node_macs(node: Node) -> int:
    """Multiply-accumulates of one operator for one sample (dynamic axes other than the batch as in the example)."""
    which = kind(node)
    if which == "integer_matmul":
        return math.prod(sizes(node)) * int(arguments(node)["ins"])
    if which == OPAQUE:
        return _opaque_macs(node)
    if which not in CONTRACTIONS or not is_tensor(node):
        return 0
    bound = arguments(node)
    out = math.prod(sizes(node))
    if which == "conv":
        return out * math.prod(sizes(bound["weight"])[1:])
    if which == "conv_transpose":
        return math.prod(sizes(bound["input"])) * math.prod(sizes(bound["weight"])[1:])
    if which == "linear":
        return out * sizes(bound["weight"])[1]
    if which == "matmul":
        return out * sizes(node.args[0])[-1]  # type: ignore[arg-type]
    if which == "addmm":
        return out * sizes(node.args[1])[-1]  # type: ignore[arg-type]
    if which == "attention":
        query, key, value = (sizes(bound[n]) for n in ("query", "key", "value"))
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return _einsum_macs(node)


def _opaque_macs(node: Node) -> int:
    name = operator_name(node).rpartition(".")[0]
    if name == "aten.cdist":
        return math.prod(sizes(node)) * sizes(node.args[0])[-1]  # type: ignore[arg-type]
    if name not in _BY_ROWS:
        return 0
    bound = arguments(node)
    held = [*(bound.get("params") or ()), *map(bound.get, ("w_ih", "w_hh", "weight"))]
    weights = [w for w in held if is_tensor(w) and len(shape(w)) > 1]
    return math.prod(sizes(node.args[0])[:-1]) * sum(math.prod(sizes(w)) for w in weights)  # type: ignore[arg-type]


def einsum_terms(node: Node) -> list[str]:
    """Labels of every operand and of the result, Greek ones for the axes behind `...`; none without an arrow."""
    text, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    if "->" not in text:
        return []
    terms = [*text.split("->")[0].split(","), text.split("->")[1]]
    ranks = [len(shape(n)) for n in (*operands, node)]
    return [
        term.replace("...", _BEHIND_DOTS[len(_BEHIND_DOTS) - (rank - len(term) + 3) :])
        if "..." in term
        else term
        for term, rank in zip(terms, ranks, strict=True)
    ]


def einsum_steps(node: Node) -> Iterator[dict[str, tuple[Node, int]]]:
    """Operand after operand, as runtimes do it: each axis of a product, by its label, and where it stands.

    What no later operand reads is summed on the way.
    """
    *terms, result = einsum_terms(node) or [""]
    operands = cast("list[Node]", node.args[1])
    have: dict[str, tuple[Node, int]] = {}
    for number, (labels, operand) in enumerate(zip(terms, operands, strict=False), 1):
        sized = {label: (operand, axis) for axis, label in enumerate(labels)}
        have |= {label: at for label, at in sized.items() if label not in have or sizes(at[0])[at[1]] > 1}
        if number > 1 or len(terms) == 1:
            yield dict(have)
        wanted = {*result, *"".join(terms[number:])}
        have = {label: at for label, at in have.items() if label in wanted} if number > 1 else have


def _einsum_macs(node: Node) -> int:
    steps = list(einsum_steps(node))
    if not steps:
        return math.prod(sizes(node))
    return sum(math.prod(sizes(operand)[axis] for operand, axis in step.values()) for step in steps)


def example_sizes(graph: fx.Graph) -> dict[Any, int]:
    """Symbol (sympy) of every dynamic axis of the inputs -> its size in the example."""
    found: dict[Any, int] = {}
    for symbol, size in _example_axes(graph):
        found.setdefault(symbol, size)
    return found


def _example_axes(graph: fx.Graph) -> Iterator[tuple[Any, int]]:
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if not isinstance(size, int) and size.node.expr.is_symbol:
                yield size.node.expr, int(size.node.hint)


def _size(size: Any, node: Node) -> int:
    if isinstance(size, int):
        return size
    graph, expr = node.graph, size.node.expr
    inputs = (n.meta["val"] for n in graph.find_nodes(op="placeholder") if is_tensor(n))
    batch = next((v.shape[0].node.expr for v in inputs if v.dim() and not isinstance(v.shape[0], int)), None)
    if expr == batch and expr.is_symbol:
        return 1
    sample = (
        (s, 1 if s == batch else next((n for axis, n in _example_axes(graph) if axis == s), 1))
        for s in expr.free_symbols
    )
    try:
        return _evaluated(expr, tuple(sample))
    except ZeroDivisionError:  # a model that takes no single sample
        return int(size.node.hint)


@lru_cache  # graphs have few sizes and many nodes, and a substitution takes a tenth of a millisecond
def _evaluated(expr: Any, sample: tuple[tuple[Any, int], ...]) -> int:
    return max(1, int(expr.subs(sample)))


def _is_size_arithmetic(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(
        value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    ) and not isinstance(node.target, torch._ops.OpOverload)


def contractions(graph: Graph) -> Iterator[Node]:
    """Every operator that multiplies and accumulates, in order."""
    return (n for n in graph.nodes if kind(n) in CONTRACTIONS)
