"""Operators that change nothing, and those that say in several words what one can say.

Identities hand a value through. Reshapes of reshapes and permutes of permutes are one. A pool over all of a map is a
mean. A bias of zeros is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from .constants import is_random
from .ir import Graph
from .names import operator_name, short_name, site
from .ops import arguments, extents, is_constant, is_static, is_tensor, kind, set_argument, shape
from .pipeline import Decline, Rewrite
from .readers import each

aten = torch.ops.aten

_RESHAPES = frozenset({"view", "flatten", "unflatten", "squeeze", "unsqueeze"})
_PERMUTES = frozenset({"permute", "transpose"})
_SAME_SIZE = frozenset({"slice", "narrow", "expand", "repeat"})  # are identities where they keep every size
_STRIDED = frozenset({"aten.as_strided.default", "aten.view.dtype", "aten.view_as_complex.default"})
_NOT_NEGATIVE = frozenset(
    {"aten.relu.default", "aten.relu6.default", "aten.sigmoid.default", "aten.hardsigmoid.default"}
)
_RIGID = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}


def identities(graph: Graph, moved: set[Node]) -> Iterator[Rewrite | Decline]:
    """Takes out one operator after the other that hands a value through.

    moved: collects the values that readers now see with other strides.
    """
    strided = _above(graph, _STRIDED)
    for node in graph.nodes:
        if node.op != "call_function" or not is_tensor(node) or not node.users:
            continue
        if "train" in arguments(node) and is_random(node):
            yield Decline.at(node, "is in training mode: it is random, and stays")
            continue
        source = _handed_through(graph, node)
        if source is None or not alike(source, node):
            continue
        restrided = str(source.meta["val"].stride()) != str(node.meta["val"].stride())
        if restrided and node in strided:
            yield Decline.at(node, "an operator behind it reads memory by strides")
            continue
        if node in graph.results and (source.op != "call_function" or source in graph.results):
            yield Decline.at(node, "it keeps an output apart from an input, a tensor or another output")
            continue
        graph.replace_uses(node, source)
        moved |= {source} if restrided else set()
        yield Rewrite(site(node), f"{short_name(node)} that changes nothing")


def _handed_through(graph: Graph, node: Node) -> Node | None:
    """The value that a node hands through unchanged; its dtype and sizes are still to be compared."""
    which, bound = kind(node), arguments(node)
    first: Any = next(iter(bound.values()), None)
    if which in ("add", "sub", "mul", "div"):
        return _neutral(graph, node)
    if which == "cat":
        return first[0] if len(first) == 1 else None
    if not is_tensor(first):
        return None
    if which == "cast":
        return _before(
            node, frozenset({"cast"}), lambda source: alike(source, node) and _only_widened(node, source)
        )
    if which == "identity":
        return None if is_random(node) else first
    if which == "activation":  # a block between the two went
        relus = operator_name(node) == "aten.relu.default" and operator_name(first) in _NOT_NEGATIVE
        return first if relus else None
    if which in ("max_pool", "avg_pool"):
        return first if _is_point(bound) else None
    if which == "adaptive_pool":
        return first
    if which in ("slice_scatter", "copy"):
        return bound["src"]
    if which in _RESHAPES:
        return _before(node, _RESHAPES, lambda source: alike(source, node))
    if which in _PERMUTES:
        return _before(
            node,
            _PERMUTES,
            lambda source: _permutation(node, source) == list(range(source.meta["val"].dim())),
        )
    if which == "pad":
        return first if not any(bound["pad"]) else None
    return first if which in _SAME_SIZE else None


def _before(node: Node, kinds: frozenset[str], matches: Callable[[Node], bool]) -> Node | None:
    """The earliest value above a chain of such operators for which `matches` holds."""
    found, source = None, node
    while kind(source) in kinds:
        source = next(iter(arguments(source).values()))
        found = source if matches(source) else found
    return found


def _only_widened(node: Node, source: Node) -> bool:
    """True for a chain of casts in which every value was representable all the way."""
    while node is not source:
        (node,) = (n for n in node.all_input_nodes[:1])
        narrow, wide = source.meta["val"].dtype, node.meta["val"].dtype
        alike = narrow.is_floating_point == wide.is_floating_point and not wide.is_complex
        if narrow != torch.bool and not (alike and torch.promote_types(narrow, wide) == wide):
            return False
    return True


def _is_point(bound: dict[str, Any]) -> bool:
    """True for a pool whose every window is one value."""
    fields = (bound["kernel_size"], bound["stride"] or [1], bound["padding"])
    plain = all(all(v == want for v in field) for field, want in zip(fields, (1, 1, 0), strict=True))
    return plain and bound.get("divisor_override") in (None, 1)


def _permutation(node: Node, source: Node) -> list[int]:
    """Axes of `source` in the order in which a chain of permutes hands them to `node`."""
    if node is source:
        return list(range(source.meta["val"].dim()))
    bound = arguments(node)
    order = _permutation(next(iter(bound.values())), source)
    if kind(node) == "permute":
        return [order[d] for d in bound["dims"]]
    name, dims = operator_name(node).split(".")[1], list(bound.values())[1:3]
    if name == "numpy_T" or len(order) < 2:
        return order[::-1]
    a, b = dims if len(dims) == 2 else (-2, -1)
    order[a], order[b] = order[b], order[a]
    return order


def _neutral(graph: Graph, node: Node) -> Node | None:
    """x of x + 0, 0 + x, x - 0, x * 1, 1 * x, x / 1."""
    a, b = list(arguments(node).values())[:2]
    which, name = kind(node), operator_name(node)
    neutral = 0 if which in ("add", "sub") else 1
    if name.startswith("aten.rsub"):
        return None
    if is_tensor(a) and _is_all(graph, b, neutral):
        return a
    swaps = which in ("add", "mul") and arguments(node).get("alpha", 1) == 1
    return b if swaps and is_tensor(b) and _is_all(graph, a, neutral) else None


def _is_all(graph: Graph, value: Any, number: int) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == number
    if not is_constant(value) or not value.meta["val"].numel():
        return False
    return bool((graph.tensor(value) == number).all())


def alike(a: Node, b: Node) -> bool:
    """Same dtype, device and sizes: what neither promotion nor broadcasting has touched."""
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and x.device == y.device and extents(x) == extents(y)


def _above(graph: Graph, names: frozenset[str]) -> set[Node]:
    """Every node that an operator of these names depends on."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in found or operator_name(node) in names:
            found.update(node.all_input_nodes)
    return found


def loosen_views(graph: Graph, moved: set[Node]) -> None:
    """A view below a value whose strides are not what they were becomes a reshape, which asks for no strides."""
    below = set(moved)
    for node in graph.nodes:
        if below.isdisjoint(node.all_input_nodes):
            continue
        below.add(node)
        if node.target in _RIGID:
            loose = graph.insert(torch.ops.aten.reshape.default, node.args, node.kwargs, before=node)
            graph.replace_uses(node, loose)
            graph.erase(node)
            below.add(loose)
    graph.reinfer()


# -------------------------------------------------------------------- one for several


def shorter(graph: Graph, moved: set[Node]) -> Iterator[Rewrite]:
    """Says with one operator what several say; moved as for `identities`."""
    for node in graph.nodes:
        if node.op != "call_function" or not is_tensor(node) or not node.users:
            continue
        for rule in _RULES:
            what = rule(graph, node, moved)
            if what:
                yield Rewrite(site(node), what)
                break


_FILLS = {"zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1, "zero": 0}


def _detached(graph: Graph, node: Node, moved: set[Node]) -> str:
    """A tensor like another, of a known size, is a constant: it needs no other."""
    if kind(node) != "create_like" or not all(map(is_static, shape(node))):
        return ""
    fill = _FILLS.get(short_name(node), arguments(node).get("fill_value"))
    if not isinstance(fill, (int, float)):
        return ""
    value = node.meta["val"]
    full = graph.insert(aten.full.default, (list(shape(node)), fill), {"dtype": value.dtype}, before=node)
    graph.replace_uses(node, full)
    return f"{short_name(node)} as a constant"


def _one_dynamic_size(graph: Graph, node: Node, moved: set[Node]) -> str:
    """A computed size that the others leave no choice for needs not be computed."""
    if kind(node) != "view" or operator_name(node).split(".")[1] in ("view_as", "reshape_as"):
        return ""
    sizes = arguments(node)[_size_name(node)]
    dynamic = [i for i, s in enumerate(shape(node)) if not is_static(s)]
    if len(dynamic) != 1 or not isinstance(sizes[dynamic[0]], Node) or 0 in shape(node):
        return ""
    fixed = [-1 if i in dynamic else s for i, s in enumerate(shape(node))]
    set_argument(graph, node, _size_name(node), fixed)
    return f"{short_name(node)} to a size that follows from the others"


def _size_name(node: Node) -> str:
    return list(arguments(node))[1]


def _own_source(graph: Graph, node: Node, kinds: frozenset[str]) -> Node | None:
    """What a node of these kinds reads, if it is of them, too, and nobody else reads it."""
    if kind(node) not in kinds or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    alone = len(source.users) == 1 and source not in graph.results
    return source if alone and kind(source) in kinds else None


def _one_reshape(graph: Graph, node: Node, moved: set[Node]) -> str:
    source = _own_source(graph, node, _RESHAPES)
    if source is None or operator_name(node).split(".")[1] in ("view_as", "reshape_as"):
        return ""
    sizes: Any = [s if is_static(s) else -1 for s in shape(node)]
    if sizes.count(-1) > 1 or 0 in sizes:
        if kind(node) != "view":
            return ""
        sizes = arguments(node)[_size_name(node)]
    first = source.all_input_nodes[0]
    made = graph.insert(aten.reshape.default, (first, sizes), before=node)
    moved.add(made)
    graph.replace_uses(node, made)
    return f"{short_name(source)} and {short_name(node)} into one reshape"


def _one_permute(graph: Graph, node: Node, moved: set[Node]) -> str:
    source = _own_source(graph, node, _PERMUTES)
    if source is None:
        return ""
    first = source.all_input_nodes[0]
    made = graph.insert(aten.permute.default, (first, _permutation(node, first)), before=node)
    moved.add(made)
    graph.replace_uses(node, made)
    return f"{short_name(source)} and {short_name(node)} into one permute"


def _permute_of_ones(graph: Graph, node: Node, moved: set[Node]) -> str:
    """A permute that moves nothing but axes of one entry is a reshape."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if kind(node) not in _PERMUTES or source is None or not is_tensor(source):
        return ""
    order = [axis for axis in _permutation(node, source) if shape(source)[axis] != 1]
    sizes = [size if is_static(size) else -1 for size in shape(node)]
    if order != sorted(order) or sizes.count(-1) > 1 or 0 in sizes:
        return ""
    made = graph.insert(aten.reshape.default, (source, sizes), before=node)
    moved.add(made)
    graph.replace_uses(node, made)
    return f"{short_name(node)} that moves axes of one entry as a reshape"


def _one_cat(graph: Graph, node: Node, moved: set[Node]) -> str:
    if kind(node) != "cat":
        return ""
    parts, dim = list(node.args[0]), _cat_axis(node)  # type: ignore[arg-type]
    inner = [p for p in parts if kind(p) == "cat" and _cat_axis(p) == dim and len(p.users) == 1]
    inner = [p for p in inner if parts.count(p) == 1 and _alike_type(p, node) and p not in graph.results]
    if not inner:
        return ""
    flat = [one for p in parts for one in (p.args[0] if p in inner else [p])]
    graph.replace_uses(node, graph.insert(node.target, (flat, dim), before=node))  # type: ignore[arg-type]
    return f"{len(inner) + 1} cats into one"


def _cat_axis(node: Node) -> int:
    return int(arguments(node)["dim"]) % node.meta["val"].dim()


def _alike_type(a: Node, b: Node) -> bool:
    return a.meta["val"].dtype == b.meta["val"].dtype


def _one_mean(graph: Graph, node: Node, moved: set[Node]) -> str:
    """A pool of one window over all of space is a mean: one form for every runtime to recognise."""
    bound, which = arguments(node), kind(node)
    name = short_name(node)
    if which == "adaptive_pool" and name.startswith("adaptive_avg"):
        spatial = len(bound["output_size"])
        whole = all(size == 1 for size in bound["output_size"])
    elif which == "avg_pool":
        spatial = len(bound["kernel_size"])
        inner = shape(node.all_input_nodes[0])[-spatial:]
        padded = any(bound["padding"]) or bound.get("divisor_override") is not None
        whole = not padded and all(
            is_static(s) and s == k for s, k in zip(inner, bound["kernel_size"], strict=False)
        )
        whole = whole and len(bound["kernel_size"]) == int(name.removeprefix("avg_pool")[0])
    else:
        return ""
    if not whole:
        return ""
    dims = list(range(-spatial, 0))
    graph.replace_uses(node, graph.insert(aten.mean.dim, (node.args[0], dims, True), before=node))
    return f"{name} over all of space as a mean"


def _mean_without_axes(graph: Graph, node: Node, moved: set[Node]) -> str:
    """A mean that keeps axes of one entry, which a reshape then drops, need not keep them."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if kind(node) not in _RESHAPES or source is None or operator_name(source) != "aten.mean.dim":
        return ""
    bound = arguments(source)
    if not bound["keepdim"] or not bound["dim"] or len(source.users) != 1 or source in graph.results:
        return ""
    rank = source.meta["val"].dim()
    over = {d % rank for d in bound["dim"]}
    if extents(node.meta["val"]) != [s for i, s in enumerate(extents(source.meta["val"])) if i not in over]:
        return ""
    args = (source.args[0], bound["dim"], False)
    made = graph.insert(aten.mean.dim, args, {"dtype": bound["dtype"]}, before=node)
    graph.replace_uses(node, made)
    return f"mean and {short_name(node)} into one mean"


def _one_slope(graph: Graph, node: Node, moved: set[Node]) -> str:
    if node.target is not aten.rrelu.default or is_random(node):
        return ""
    bound = arguments(node)
    slope = (bound["lower"] + bound["upper"]) / 2
    graph.replace_uses(node, graph.insert(aten.leaky_relu.default, (node.args[0], slope), before=node))
    return f"{short_name(node)} as a leaky_relu of the slope in the middle"


def _no_bias(graph: Graph, node: Node, moved: set[Node]) -> str:
    if kind(node) not in ("conv", "conv_transpose", "linear"):
        return ""
    bias = arguments(node)["bias"]
    if not is_constant(bias) or bool(graph.tensor(bias).any()):
        return ""
    set_argument(graph, node, "bias", None)
    return f"{short_name(node)} without its bias of zeros"


def _one_padding(graph: Graph, node: Node, moved: set[Node]) -> str:
    """Zeros round what a convolution reads, as many on both sides, are padding of its own."""
    source: Any = node.args[0] if kind(node) == "conv" else None
    if not is_tensor(source) or kind(source) != "pad":
        return ""
    bound, own = arguments(source), arguments(node)["padding"]
    rank = len(shape(arguments(node)["weight"])) - 2
    pads = list(bound["pad"])
    zeros = bound.get("mode", "constant") == "constant" and not bound.get("value")
    if not zeros or isinstance(own, str) or any(pads[2 * rank :]) or len(shape(source)) != rank + 2:
        return ""
    pairs = [*zip(pads[::2], pads[1::2], strict=True), *[(0, 0)] * rank][:rank][::-1]
    if not all(isinstance(a, int) and a == b and a >= 0 for a, b in pairs):
        return ""
    own = each(own, rank)
    graph.set_args(node, (source.args[0], *node.args[1:]), node.kwargs)
    set_argument(graph, node, "padding", [a + before for a, (before, _) in zip(own, pairs, strict=True)])
    return f"zeros in front of {short_name(node)} as its padding"


_RULES = (
    _one_padding,
    _detached,
    _one_dynamic_size,
    _one_reshape,
    _one_permute,
    _permute_of_ones,
    _one_cat,
    _one_mean,
    _mean_without_axes,
    _one_slope,
    _no_bias,
)
