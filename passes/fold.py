"""Batch normalisation, constants, identities and dead code disappear into their neighbours.

A batch norm behind a convolution or linear scales its output channels, one in front of it its input channels:

    s = gamma / sqrt(var + eps);  t = beta - mean * s
    behind:    W' = W * s[out],  b' = b * s + t
    in front:  W' = W * s[in],   b' = b + sum over in and taps of W * t[in]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from compressor.constants import fold_constants, is_random
from compressor.ir import Graph, operator_name, site
from compressor.ops import arguments, extents, is_constant, is_tensor, kind
from compressor.pipeline import EXACT, Context, Contract, Decline, Outcome, Pass, Rewrite

_CARRIERS = ("conv", "conv_transpose", "linear")
_NORM = ("weight", "bias", "running_mean", "running_var")
_TINY = 1e-10  # var + eps below this scales a channel by more than 1e5: the folded weights would be noise


@dataclass(frozen=True)
class Fold(Pass):
    """Batch normalisation, constants and identities disappear into their neighbours; nothing else changes.

    Batch norm folds into the convolution (1d, 2d, 3d, transposed, grouped, depthwise) or linear in front of it, or
    into the unpadded convolution or linear behind it. max_bytes: how much larger than its sources a folded constant
    may be.
    """

    name: ClassVar[str] = "fold"
    contract: ClassVar[Contract] = EXACT
    after: ClassVar[tuple[str, ...]] = ("merge", "prune", "squeeze")

    max_bytes: int = 1 << 24

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        room = ctx.limit
        while room != 0:
            outcome.declines.clear()
            made = self._sweep(graph, room, outcome.declines)
            outcome.rewrites += made
            room = None if room is None else room - len(made)
            if not made:
                break
        return outcome

    def _sweep(self, graph: Graph, limit: int | None, declines: list[Decline]) -> list[Rewrite]:
        """One round of everything, at most `limit` rewrites."""
        made: list[Rewrite] = []

        def room() -> int | None:
            return None if limit is None else limit - len(made)

        made += _dead_code(graph)
        folding = fold_constants(graph, self.max_bytes, room())
        made += [Rewrite(*one) for one in folding.made]
        declines += [Decline.at(node, reason) for node, reason in folding.left]
        moved: set[Node] = set()
        for step in (_identities(graph, moved), _batch_norms(graph)):
            while room() != 0 and (found := next(step, None)) is not None:
                if isinstance(found, Rewrite):
                    made.append(found)
                else:
                    declines.append(found)
        if moved:
            _loosen_views(graph, moved)
        graph.clean()
        return made


def _dead_code(graph: Graph) -> list[Rewrite]:
    operators = sum(n.op == "call_function" for n in graph.nodes)
    graph.clean()
    gone = operators - sum(n.op == "call_function" for n in graph.nodes)
    return [Rewrite("graph", f"{gone} operator{'s' * (gone > 1)} that no output needs")] if gone else []


# -------------------------------------------------------------------- identities

_RESHAPES = frozenset({"view", "flatten", "unflatten", "squeeze", "unsqueeze"})
_PERMUTES = frozenset({"permute", "transpose"})
_SAME_SIZE = frozenset({"slice", "narrow", "expand", "repeat"})  # are identities where they keep every size
_STRIDED = frozenset({"aten.as_strided.default", "aten.view.dtype", "aten.view_as_complex.default"})
_RIGID = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}


def _identities(graph: Graph, moved: set[Node]) -> Iterator[Rewrite | Decline]:
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
        if source is None or not _alike(source, node):
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
        yield Rewrite(site(node), f"{_short(node)} that changes nothing")


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
    if which in ("identity", "cast"):
        return None if is_random(node) else first
    if which in ("slice_scatter", "copy"):
        return bound["src"]
    if which in _RESHAPES:
        return _before(node, _RESHAPES, lambda source: _alike(source, node))
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


def _alike(a: Node, b: Node) -> bool:
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


def _loosen_views(graph: Graph, moved: set[Node]) -> None:
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


def _short(node: Node) -> str:
    return operator_name(node).removesuffix(".default").removeprefix("aten.").split(".")[0]


# -------------------------------------------------------------------- batch norm


@dataclass(frozen=True)
class _Match:
    """A batch norm and the convolution or linear that it folds into; `behind` it, or else in front of it."""

    norm: Node
    carrier: Node
    behind: bool


def _batch_norms(graph: Graph) -> Iterator[Rewrite | Decline]:
    made: dict[tuple[Any, ...], tuple[Node, Node]] = {}
    for node in graph.nodes:
        if kind(node) != "batch_norm" or not node.users:
            continue
        found = _match(graph, node)
        yield found if isinstance(found, Decline) else _fold(graph, found, made)


def _match(graph: Graph, norm: Node) -> _Match | Decline:
    bound = arguments(norm)
    if bound["training"]:
        return Decline.at(norm, "it is in training mode: its statistics are those of the batch")
    if bound["running_mean"] is None or bound["running_var"] is None:
        return Decline.at(norm, "it has no running statistics")
    if any(bound[n] is not None and not is_constant(bound[n]) for n in _NORM):
        return Decline.at(norm, "its parameters are computed")
    bad = _bad_channel(graph.tensor(bound["running_var"]), bound["eps"])
    if bad:
        return Decline.at(norm, bad)
    carrier = bound["input"]
    if kind(carrier) in _CARRIERS:
        reason = _why_not_behind(norm, carrier)
        found = _Match(norm, carrier, behind=True)
    else:
        reader = next(iter(norm.users))
        reason = _why_not_in_front(graph, norm, reader)
        found = _Match(norm, reader, behind=False)
    return Decline.at(norm, reason) if reason else found


def _bad_channel(var: Tensor, eps: float) -> str:
    """Names the first channel whose running variance cannot be divided by."""
    wide = var.double()
    for index in (
        torch.nonzero(~(torch.isfinite(wide) & (wide >= 0) & (wide + eps >= _TINY))).flatten().tolist()
    ):
        return f"the running variance of channel {index} is {float(wide[index]):g} (eps {eps:g})"
    return ""


def _why_not_behind(norm: Node, carrier: Node) -> str:
    if any(user.op == "output" for user in carrier.users):
        return f"the output of {site(carrier)} is an output of the graph"
    if len(carrier.users) != 1:
        return f"the output of {site(carrier)} is read twice"
    dims = norm.meta["val"].dim()
    if kind(carrier) == "linear":
        return "" if dims == 2 else "it normalises axis 1, which is not the feature axis of the linear"
    return _why_not(carrier, dims)


def _why_not_in_front(graph: Graph, norm: Node, reader: Node) -> str:
    source = (
        _short(arguments(norm)["input"]) if arguments(norm)["input"].op == "call_function" else "an input"
    )
    if len(norm.users) != 1 or kind(reader) not in ("conv", "linear"):
        return f"it reads {source}, and what reads it is not one convolution or linear"
    if arguments(reader)["input"] is not norm:
        return f"{site(reader)} does not read it as its input"
    dims = norm.meta["val"].dim()
    if kind(reader) == "linear":
        return (
            _why_not(reader, dims)
            if dims == 2
            else "it normalises axis 1, which is not the feature axis of the linear"
        )
    padding = arguments(reader)["padding"]
    pads = padding == "same" or (padding != "valid" and any(padding))
    if pads and bool(_scale_shift(graph, norm)[1].any()):
        return f"{site(reader)} pads with zeros, which the batch norm in front of it would have shifted"
    return _why_not(reader, dims)


def _why_not(carrier: Node, dims: int) -> str:
    bound = arguments(carrier)
    if any(bound[n] is not None and not is_constant(bound[n]) for n in ("weight", "bias")):
        return f"the weight of {site(carrier)} is computed"
    if kind(carrier) != "linear" and dims != bound["weight"].meta["val"].dim():
        return f"{site(carrier)} has an unbatched input"
    return ""


def _scale_shift(graph: Graph, norm: Node) -> tuple[Tensor, Tensor]:
    """s and t of the module's formula, in float64; batch norm computes x * s + t."""
    bound = arguments(norm)
    mean, var = (graph.tensor(bound[n]).double() for n in ("running_mean", "running_var"))
    gamma, beta = (
        graph.tensor(bound[n]).double() if bound[n] is not None else None for n in ("weight", "bias")
    )
    scale = torch.rsqrt(var + bound["eps"]) * (1 if gamma is None else gamma)
    return scale, (0 if beta is None else beta) - mean * scale


def fold_behind(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, groups: int | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of one operator equal to this one followed by x * scale + shift.

    W' = W * s[out];  b' = b * s + t. Shapes: scale, shift and bias [out]; weight [out, ...], or [in, out / groups,
    ...] of a transposed convolution, whose `groups` is given (None for all others). Float64 in and out.
    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.2.
    """
    if groups is None:
        wide = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    else:
        ins = weight.shape[0] // groups
        per_row = scale.view(groups, 1, -1).expand(-1, ins, -1).reshape(weight.shape[:2])
        wide = weight * per_row.view(*weight.shape[:2], *[1] * (weight.dim() - 2))
    return wide, (bias * scale if bias is not None else 0) + shift


def fold_in_front(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Weight and bias of one operator equal to x * scale + shift followed by this one.

    W' = W * s[in];  b' = b + sum over in and taps of W * t[in]. Shapes: scale and shift [in], weight [out,
    in / groups, ...], bias [out]; no padding. Float64 in and out.
    """
    rows = weight.view(groups, -1, *weight.shape[1:])
    by_group = [v.view(groups, 1, -1, *[1] * (weight.dim() - 2)) for v in (scale, shift)]
    added = (rows * by_group[1]).flatten(2).sum(2).flatten()
    return (rows * by_group[0]).view_as(weight), added + (bias if bias is not None else 0)


def _fold(graph: Graph, found: _Match, made: dict[tuple[Any, ...], tuple[Node, Node]]) -> Rewrite | Decline:
    """made: what was folded from the same tensors before, so that sites that share them go on sharing."""
    norm, carrier = found.norm, found.carrier
    bound, which = arguments(carrier), kind(carrier)
    old = bound["weight"]
    others = [u for u in old.users if u is not carrier]
    key = (
        found.behind,
        which,
        bound.get("groups"),
        old,
        bound["bias"],
        arguments(norm)["eps"],
        *(arguments(norm)[n] for n in _NORM),
    )
    if key not in made:
        scale, shift = _scale_shift(graph, norm)
        wide = (
            graph.tensor(old).double(),
            graph.tensor(bound["bias"]).double() if bound["bias"] is not None else None,
        )
        if found.behind:
            folded = fold_behind(*wide, scale, shift, bound["groups"] if which == "conv_transpose" else None)
        else:
            folded = fold_in_front(*wide, scale, shift, bound.get("groups", 1))
        weight, bias = (t.to(old.meta["val"].dtype) for t in folded)
        if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            return Decline.at(norm, f"the folded weight would not be finite in {weight.dtype}")
        made[key] = _bind(graph, carrier, weight, bias)
    weight_node, bias_node = made[key]
    _swap(graph, found, weight_node, bias_node)
    what = f"batch_norm into {_short(carrier)} {'in front of' if found.behind else 'behind'} it ({site(carrier)})"
    if others and weight_node is not old:
        what += f"; {old.target} is shared with {site(others[0])}, this site now has its own copy"
    return Rewrite(site(norm), what)


def _bind(graph: Graph, carrier: Node, weight: Tensor, bias: Tensor) -> tuple[Node, Node]:
    """The nodes of the folded tensors: those that the carrier has, if nothing else reads them."""
    bound = arguments(carrier)
    old, old_bias = bound["weight"], bound["bias"]
    stem, _, leaf = str(old.target).rpartition(".")
    name = f"{stem}.bias" if leaf == "weight" else f"{old.target}_bias"
    nodes = []
    for node, path, value in ((old, str(old.target), weight), (old_bias, name, bias)):
        if node is not None and list(node.users) == [carrier]:
            graph.set_tensor(node, value)
        else:
            node = graph.add_tensor(path, value)
            if str(old.target) in graph.parameters:
                graph.parameters |= {str(node.target)}
        nodes.append(node)
    return nodes[0], nodes[1]


def _swap(graph: Graph, found: _Match, weight: Node, bias: Node) -> None:
    """A new operator in the place of the two, so that no name carries another value than it did."""
    norm, carrier = found.norm, found.carrier
    args = list(carrier.args) + [None] * (3 - len(carrier.args))
    args[0] = arguments(carrier if found.behind else norm)["input"]
    args[1:3] = weight, bias
    kwargs = {k: v for k, v in carrier.kwargs.items() if k not in ("input", "weight", "bias")}
    new = graph.insert(carrier.target, tuple(args), kwargs, before=carrier)  # type: ignore[arg-type]
    graph.replace_uses(norm if found.behind else carrier, new)
    for node in (norm, carrier) if found.behind else (carrier, norm):
        graph.erase(node)
