"""Removes groups of channels from a graph: slices every tensor, and rewrites the literals that mention a size.

One rewrite a kind, in one table. What the operators then compute is inferred anew and must have the expected shape
everywhere, so a literal that was forgotten is an error here and never a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from .atoms import Array
from .channels import Group
from .errors import ContractError
from .ir import Graph
from .names import operator_name, site
from .ops import arguments, is_static, is_tensor, kind, set_argument, shape

Kept = Mapping[str, Mapping[int, Array]]  # node -> axis -> indices that stay
DYNAMIC_SIZES = (1680, 2520)  # where size expressions are compared: windows and patches divide them


def remove(graph: Graph, groups: Iterable[Group]) -> None:
    """Removes groups, found by `analyse` in this graph as it is now, in place.

    `graph.journal.kept` tells which indices of which axis are left. ContractError where a group is frozen, an axis
    would be empty, or a value comes out in another shape than the algebra says.
    """
    kept = _kept(graph, list(groups))
    if not kept:
        return
    expected = {node: _evaluated(node, kept) for node in graph.nodes if is_tensor(node)}
    for node in graph.nodes:
        if kind(node) in REWRITES:  # they read the old shapes, so literals go first
            REWRITES[kind(node)](graph, node, kept)
        if node.target is torch.ops.aten.view.default:  # narrower operands may lie otherwise in memory
            graph.set_args(node, node.args, target=torch.ops.aten.reshape.default)
    for node in graph.nodes:
        if node.op == "get_attr" and node.name in kept:
            graph.set_tensor(node, _sliced(graph.tensor(node), kept[node.name]))
    graph.reinfer()
    for node, sizes in expected.items():
        if (seen := _evaluated(node, {})) != sizes:
            raise ContractError(
                f"surgery: {operator_name(node)} at {site(node)} has shape {list(shape(node))}: {seen} at two "
                f"batch sizes, expected {sizes}"
            )
    for name, axes in kept.items():
        earlier = graph.journal.kept.setdefault(name, {})
        for axis, indices in axes.items():
            left = torch.from_numpy(indices)
            earlier[axis] = earlier[axis][left] if axis in earlier else left


def _kept(graph: Graph, groups: list[Group]) -> dict[str, dict[int, Array]]:
    """The other side of what the groups own."""
    for group in groups:
        if group.reason:
            raise ContractError(
                f"surgery: channels of {', '.join(group.sites)} cannot be removed: {group.reason}"
            )
    algebra = groups[0].algebra if groups else None
    removed = algebra.removed(groups) if algebra else {}
    nodes = {node.name: node for node in graph.nodes}
    kept: dict[str, dict[int, Array]] = {}
    for name, axes in removed.items():
        for axis, gone in axes.items():
            size = len(algebra.axes[name, axis]) if algebra else 0
            if name not in nodes or shape(nodes[name])[axis] != size:
                raise ContractError(
                    f"surgery: {name} has changed since the graph was analysed: analyse it again"
                )
            left = np.setdiff1d(np.arange(size), gone)
            if not len(left):
                raise ContractError(
                    f"surgery: nothing would be left of axis {axis} of {name} ({site(nodes[name])})"
                )
            kept.setdefault(name, {})[axis] = left
    return kept


def _sliced(tensor: Tensor, axes: Mapping[int, Array]) -> Tensor:
    for axis, indices in axes.items():
        tensor = tensor.index_select(axis, torch.from_numpy(indices))
    return tensor


def _evaluated(node: Node, kept: Kept) -> list[list[int]]:
    """The shape of a value after surgery, at two sizes of its dynamic axes."""
    axes = kept.get(node.name, {})
    sizes = [len(axes[i]) if i in axes else size for i, size in enumerate(shape(node))]
    return [[_evaluate(size, dynamic) for size in sizes] for dynamic in DYNAMIC_SIZES]


def _evaluate(size: Any, dynamic: int) -> int:
    """A size where the dynamic axes are 1, 2, 3 ... times `dynamic`, in the order of their symbols' names."""
    if is_static(size):
        return int(size)
    expression = size.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    return int(expression.subs({s: dynamic * (i + 1) for i, s in enumerate(symbols)}))


# -------------------------------------------------------------------- literals


def _axes(kept: Kept, node: Any) -> Mapping[int, Array]:
    return kept.get(node.name, {}) if isinstance(node, Node) else {}


def _position(node: Node, dim: int) -> int:
    return dim % len(shape(node))


def _sizes(graph: Graph, node: Node, kept: Kept) -> None:
    """view, expand, zeros: the sizes of the result; -1 stays."""
    axes = _axes(kept, node)
    name = next((n for n in ("size", "shape", "sizes") if n in arguments(node)), None)
    if not axes or name is None:
        return
    given = list(arguments(node)[name])
    set_argument(graph, node, name, [
        len(axes[i]) if i in axes and not (is_static(size) and size == -1) else size for i, size in enumerate(given)
    ])  # fmt: skip


def _unflatten(graph: Graph, node: Node, kept: Kept) -> None:
    a, axes = arguments(node), _axes(kept, node)
    first = _position(node.args[0], a["dim"])  # type: ignore[arg-type]
    if axes:
        given = list(enumerate(a["sizes"], first))
        set_argument(graph, node, "sizes", [len(axes[i]) if i in axes and s != -1 else s for i, s in given])


def _slice(graph: Graph, node: Node, kept: Kept) -> None:
    """The bounds of the kept slices that lie between the old bounds."""
    a, source = arguments(node), node.args[0]
    dim = _position(source, a["dim"])  # type: ignore[arg-type]
    left = _axes(kept, source).get(dim)
    if left is not None and not any(isinstance(a[bound], Node) for bound in ("start", "end")):
        start, stop, _ = slice(a["start"], a["end"]).indices(shape(source)[dim])  # type: ignore[arg-type]
        low, high = np.searchsorted(left, [start, max(start, stop)]).tolist()
        set_argument(graph, node, "start", low)
        set_argument(graph, node, "end", high)


def _narrow(graph: Graph, node: Node, kept: Kept) -> None:
    a, source = arguments(node), node.args[0]
    dim = _position(source, a["dim"])  # type: ignore[arg-type]
    left = _axes(kept, source).get(dim)
    if left is not None:
        start = a["start"] % shape(source)[dim]  # type: ignore[arg-type]
        low, high = np.searchsorted(left, [start, start + a["length"]]).tolist()
        set_argument(graph, node, "start", low)
        set_argument(graph, node, "length", high - low)


def _select(graph: Graph, node: Node, kept: Kept) -> None:
    a, source = arguments(node), node.args[0]
    dim = _position(source, a["dim"])  # type: ignore[arg-type]
    left = _axes(kept, source).get(dim)
    if left is not None:
        set_argument(graph, node, "index", int(np.searchsorted(left, a["index"] % shape(source)[dim])))  # type: ignore[arg-type]


def _pieces(graph: Graph, node: Node, kept: Kept) -> None:
    """split and chunk say how large each piece is, unless all still have the size that the operator's form implies."""
    a, source = arguments(node), node.args[0]
    dim = _position(source, a["dim"])  # type: ignore[arg-type]
    left = _axes(kept, source).get(dim)
    if left is None:
        return
    ends = list(accumulate(value.shape[dim] for value in node.meta["val"]))
    sizes = np.diff(np.searchsorted(left, [0, *ends])).tolist()
    even = all(size == sizes[0] for size in sizes)
    if kind(node) == "chunk" and even and len(sizes) == a["chunks"]:
        return
    if is_static(a.get("split_size")) and even:
        set_argument(graph, node, "split_size", sizes[0])
        return
    graph.set_args(node, (source, sizes, dim), {}, target=torch.ops.aten.split_with_sizes.default)


def _pad(graph: Graph, node: Node, kept: Kept) -> None:
    """As many constant slices on either side as are left of them."""
    axes, given = _axes(kept, node), list(arguments(node)["pad"])
    rank = len(shape(node))
    for axis, left in axes.items():
        back = 2 * (rank - axis - 1)
        if back < len(given):
            size = shape(node)[axis]
            low, high = np.searchsorted(left, [given[back], size - given[back + 1]]).tolist()
            given[back : back + 2] = [low, len(left) - high]
    set_argument(graph, node, "pad", given)


def _output_size(graph: Graph, node: Node, kept: Kept) -> None:
    """It says in advance how many there will be."""
    if _axes(kept, node) and arguments(node)["output_size"] is not None:
        set_argument(graph, node, "output_size", None)


def _groups(graph: Graph, node: Node, kept: Kept) -> None:
    """A depthwise convolution has as many groups as channels; others keep their groups, which shrink."""
    a = arguments(node)
    left = _axes(kept, a["input"]).get(1)
    if left is not None and a["groups"] > 1 and a["groups"] == shape(a["input"])[1]:
        set_argument(graph, node, "groups", len(left))


def _scale(graph: Graph, node: Node, kept: Kept) -> None:
    """Attention divides by the root of its width: of the width that it was trained with."""
    a = arguments(node)
    width = shape(a["query"])
    if a["scale"] is None and len(width) - 1 in _axes(kept, a["query"]):
        graph.set_args(node, node.args, {**node.kwargs, "scale": width[-1] ** -0.5})


def _normalized_shape(graph: Graph, node: Node, kept: Kept) -> None:
    axes, given = _axes(kept, node), list(arguments(node)["normalized_shape"])
    first = len(shape(node)) - len(given)
    if any(axis >= first for axis in axes):
        sizes = [len(axes[i]) if i in axes else size for i, size in enumerate(given, first)]
        set_argument(graph, node, "normalized_shape", sizes)


def _norm_groups(graph: Graph, node: Node, kept: Kept) -> None:
    """Groups that lost all their channels are no groups any more; the others must be of one size."""
    left, groups = _axes(kept, node).get(1), arguments(node)["num_groups"]
    if left is None:
        return
    sizes = np.bincount(left // (shape(node)[1] // groups), minlength=groups)
    sizes = sizes[sizes > 0]
    if (sizes != sizes[0]).any():
        raise ContractError(
            f"surgery: the groups of {operator_name(node)} at {site(node)} would be of several sizes"
        )
    set_argument(graph, node, "num_groups", len(sizes))


REWRITES: dict[str, Callable[[Graph, Node, Kept], None]] = {
    **dict.fromkeys(("view", "expand", "create", "create_like"), _sizes),
    "unflatten": _unflatten,
    **dict.fromkeys(("slice", "slice_scatter"), _slice),
    "narrow": _narrow,
    **dict.fromkeys(("select", "select_scatter"), _select),
    **dict.fromkeys(("split", "chunk"), _pieces),
    "pad": _pad,
    "repeat_interleave": _output_size,
    **dict.fromkeys(("conv", "conv_transpose"), _groups),
    "attention": _scale,
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized_shape),
    "group_norm": _norm_groups,
}
