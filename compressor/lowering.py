"""A graph in the words that torch.onnx translates well: attention, variances and parts written out, axes fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from .ir import Graph, Input
from .names import operator_name, unsupported
from .ops import arguments, attention_scale, is_static, is_tensor, kind, shape

aten = torch.ops.aten


def prepared(graph: Graph, fixed: Mapping[str, int]) -> Graph:
    """A copy with the axes fixed as asked and written in what the translator understands."""
    ready = graph.copy()
    if fixed:
        _fix_axes(ready, fixed)
    added: dict[tuple[Node, torch.dtype], Node] = {}
    for node in ready.nodes:
        if kind(node) == "attention" and is_tensor(node):
            if _is_plain(node):
                _write_out(ready, node, added)
            elif node.meta["val"].dim() != 4:
                _four_dimensional(ready, node)
        if kind(node) == "unbind":
            _select(ready, node)
        _require_faithful(node)
        if operator_name(node) in ("aten.view.default", "aten._unsafe_view.default"):
            _reshape(ready, node)
        if operator_name(node) in ("aten.var.dim", "aten.var.correction"):
            _write_out_variance(ready, node)
        if kind(node) == "avg_pool" and arguments(node).get("divisor_override"):
            _mean_of_windows(ready, node)
        if operator_name(node) in ("aten.clamp.default", "aten.hardtanh.default"):
            _bound_alike(ready, node)
    _separate_outputs(ready)
    return ready


def _require_faithful(node: Node) -> None:
    """UnsupportedError where the translator says something else than the operator does."""
    name, bound = operator_name(node), arguments(node)
    if name == "aten.lstm.input":
        hidden, cell = bound["hx"]
        if hidden.meta["val"].shape[-1] != cell.meta["val"].shape[-1]:
            raise unsupported(node, "ONNX has no LSTM whose output is projected (proj_size)")
    if name == "aten.scatter_reduce.two" and bound["reduce"] == "mean":
        raise unsupported(node, "ONNX has no scatter that averages")
    if kind(node) == "adaptive_pool":
        wanted = bound["output_size"]
        inner = shape(bound["self"])[-len(wanted) :]
        if any(not is_static(i) and is_static(o) and o != 1 for i, o in zip(inner, wanted, strict=True)):
            raise unsupported(
                node, "ONNX has no pool to a size from one that is not known: give its input fixed sizes"
            )
    if name == "aten.special_log_ndtr.default":
        raise unsupported(node, "its translation to ONNX is -inf where the argument is far below 0")


def _fix_axes(graph: Graph, fixed: Mapping[str, int]) -> None:
    """Examples and specs with fixed sizes; the example is cut or repeated along the axis."""
    specs, example = [], []
    for spec, tensor in zip(graph.inputs, graph.example, strict=True):
        shape = tuple(fixed.get(s, s) if isinstance(s, str) else s for s in spec.shape)
        for axis, size in enumerate(shape):
            if isinstance(spec.shape[axis], str) and isinstance(size, int):
                tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
        specs.append(Input(spec.name, spec.dtype, shape))
        example.append(tensor)
    graph.inputs, graph.example = tuple(specs), tuple(example)


def _separate_outputs(graph: Graph) -> None:
    """Every output is a value of its own: ONNX forbids one that is an input, a constant, or named twice."""
    seen: set[Node] = set()
    results = []
    for node in graph.results:
        if node in seen or node.op != "call_function":
            node = graph.insert(torch.ops.aten.clone.default, (node,), before=graph.output)
        seen.add(node)
        results.append(node)
    graph.set_args(graph.output, (tuple(results),))


def _is_plain(node: Node) -> bool:
    """True for softmax(q k' s + mask) v, without dropout, causality or shared heads."""
    bound = arguments(node)
    mask = bound["attn_mask"]
    plain = mask is None or (is_tensor(mask) and mask.meta["val"].dtype != torch.bool) or _rank(node) == 4
    return plain and not (bound["dropout_p"] or bound["is_causal"] or bound.get("enable_gqa"))


def _write_out(graph: Graph, node: Node, added: dict[tuple[Node, torch.dtype], Node]) -> None:
    """Attention as five operators; the translator would make twenty, most of them about shapes.

    added: boolean masks as what they add in a precision, which all layers share.
    """
    bound = arguments(node)
    query, key, value = bound["query"], bound["key"], bound["value"]
    scale = attention_scale(node)
    if scale != 1:
        query = graph.insert(aten.mul.Tensor, (query, scale), before=node)
    turned = graph.insert(aten.transpose.int, (key, -2, -1), before=node)
    scores = graph.insert(aten.matmul.default, (query, turned), before=node)
    mask = bound["attn_mask"]
    boolean = mask is not None and mask.meta["val"].dtype == torch.bool
    nothing = boolean or (mask is not None and _has_infinities(graph, mask))  # may be left to attend to
    if boolean:
        dtype = query.meta["val"].dtype
        if (mask, dtype) not in added:
            number = graph.insert(aten.where.Scalar, (mask, 0.0, -math.inf), before=node)
            if dtype != torch.float32:
                number = graph.insert(aten.to.dtype, (number, dtype), before=node)
            added[mask, dtype] = number
        mask = added[mask, dtype]
    if mask is not None:
        scores = graph.insert(aten.add.Tensor, (scores, mask), before=node)
    shares = graph.insert(aten.softmax.int, (scores, -1), before=node)
    if nothing:
        empty = graph.insert(aten.isnan.default, (shares,), before=node)
        shares = graph.insert(aten.masked_fill.Scalar, (shares, empty, 0.0), before=node)
    made = graph.insert(aten.matmul.default, (shares, value), before=node)
    graph.replace_uses(node, made)
    graph.erase(node)


def _mean_of_windows(graph: Graph, node: Node) -> None:
    """A pool that divides by a number of its own as one that divides by its window, times what that leaves.

    The translator does not know the number. Windows that hang over the edge (ceil_mode) divide by what is inside.
    """
    bound = arguments(node)
    if bound["ceil_mode"]:
        raise unsupported(node, "ONNX has no pool with divisor_override and ceil_mode")
    dims = int(operator_name(node).removeprefix("aten.avg_pool")[0])
    window = math.prod(bound["kernel_size"]) ** (dims // len(bound["kernel_size"]))
    plain = (node.args[0], bound["kernel_size"], bound["stride"], bound["padding"], False, True)
    pooled = graph.insert(node.target, plain, before=node)  # type: ignore[arg-type]
    factor = window / bound["divisor_override"]
    graph.replace_uses(node, graph.insert(aten.mul.Tensor, (pooled, factor), before=node))
    graph.erase(node)


def _has_infinities(graph: Graph, mask: Node) -> bool:
    """Whether a mask of floats may hold -inf: it is an input, or -inf or a sum of the least numbers goes into it."""
    edge, seen = [mask], {mask}
    least, sums = 0.0, False
    while edge:
        node = edge.pop()
        if node.op == "placeholder" and node.meta["val"].is_floating_point():
            return True
        constants = [graph.tensor(node)] if node.op == "get_attr" else []
        least = min([least, *(float(t.min()) for t in constants if t.is_floating_point() and t.numel())])
        least = min([least, *(a for a in node.args if isinstance(a, (int, float)))])
        sums |= kind(node) in ("add", "sub")
        edge += [n for n in node.all_input_nodes if n not in seen and is_tensor(n)]
        seen |= set(edge)
    return least == -math.inf or (sums and 2 * least < torch.finfo(torch.float32).min)


def _bound_alike(graph: Graph, node: Node) -> None:
    """Bounds of floats as floats; the translator takes no mixture, such as clamp(0, 0.3)."""
    if node.meta["val"].dtype.is_floating_point:
        floats = [float(a) if isinstance(a, int) else a for a in node.args]
        graph.set_args(
            node, tuple(floats), {k: float(v) if isinstance(v, int) else v for k, v in node.kwargs.items()}
        )


def _write_out_variance(graph: Graph, node: Node) -> None:
    """A variance over axes of known size, which the translator would ask for while the model runs."""
    bound = arguments(node)
    source, dims = bound["self"], bound["dim"]
    if not dims or not all(isinstance(source.meta["val"].shape[d], int) for d in dims):
        return
    count = math.prod(source.meta["val"].shape[d] for d in dims)
    lost = bound.get("correction", int(bound.get("unbiased", True)))
    lost = 1 if lost is None else lost
    if count <= lost:
        return
    mean = graph.insert(aten.mean.dim, (source, dims, True), before=node)
    apart = graph.insert(aten.sub.Tensor, (source, mean), before=node)
    square = graph.insert(aten.mul.Tensor, (apart, apart), before=node)
    made = graph.insert(aten.mean.dim, (square, dims, bound["keepdim"]), before=node)
    if lost:
        made = graph.insert(aten.mul.Tensor, (made, count / (count - lost)), before=node)
    graph.replace_uses(node, made)
    graph.erase(node)


def _reshape(graph: Graph, view: Node) -> None:
    """A view may rely on the strides that an operator had when it was captured, and has not when it is translated."""
    graph.replace_uses(view, graph.insert(aten.reshape.default, view.args, before=view))
    graph.erase(view)


def _select(graph: Graph, unbind: Node) -> None:
    """Parts of an unbind, one by one: an operator each, where the translator would make two of each."""
    bound = arguments(unbind)
    for part in list(unbind.users):
        one = graph.insert(aten.select.int, (bound["self"], bound["dim"], part.args[1]), before=part)
        graph.replace_uses(part, one)
        graph.erase(part)
    graph.erase(unbind)


def _four_dimensional(graph: Graph, node: Node) -> None:
    """Attention on other than 4 dimensions, with the leading ones flattened into one and restored."""
    bound = arguments(node)
    rank = node.meta["val"].dim()

    def fit(value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        if rank == 3:
            return (
                graph.insert(torch.ops.aten.unsqueeze.default, (value, 1), before=node)
                if _rank(value) == 3
                else value
            )
        if _rank(value) != rank:
            raise unsupported(node, "attention with a mask of another rank than its query has no translation")
        return graph.insert(torch.ops.aten.flatten.using_ints, (value, 0, rank - 4), before=node)

    operands = [fit(bound[n]) for n in ("query", "key", "value", "attn_mask")]
    rest = (bound.get("dropout_p", 0.0), bound.get("is_causal", False))
    keywords = {k: bound[k] for k in ("scale", "enable_gqa") if bound.get(k)}
    flat = graph.insert(node.target, (*operands, *rest), keywords, before=node)  # type: ignore[arg-type]
    if rank == 3:
        back = graph.insert(torch.ops.aten.squeeze.dim, (flat, 1), before=node)
    else:
        sizes = [
            graph.insert(torch.ops.aten.sym_size.int, (node.args[0], i), before=node) for i in range(rank - 1)
        ]
        width = node.meta["val"].shape[-1]
        back = graph.insert(torch.ops.aten.reshape.default, (flat, [*sizes, width]), before=node)
    graph.replace_uses(node, back)
    graph.erase(node)


def _rank(node: Node) -> int:
    return node.meta["val"].dim()
