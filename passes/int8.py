"""Static quantisation: activations and weights become 8-bit integers where the target computes on them.

Three steps. Exact rewrites bring operators into a form that the target has an integer kernel for. One pass over the
calibration data finds the range of every tensor that gets a quantiser. Then Q/DQ pairs are placed by the target's
table, and weights and biases stored as integers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from compressor.errors import UsageError
from compressor.ir import Graph, operator_name, short_name, site
from compressor.ops import CONTRACTIONS, arguments, is_static, is_tensor, kind, macs, shape
from compressor.pipeline import BOUNDED, EXACT, Context, Contract, Decline, Outcome, Pass, Rewrite
from compressor.place import Placement, listed, place
from compressor.quantize import calibrate, insert_pairs
from compressor.target import QuantSpec

aten = torch.ops.aten
SLOWER = 1.05  # rewrites in doubt go when the model is so many times slower with them: less is noise
FREE = 0.01  # share of the model's multiply-accumulates that a rewrite may add without being timed
_END = 2**31  # an end beyond this slices to the end of the axis


@dataclass(frozen=True)
class Int8(Pass):
    """Weights and activations become 8-bit integers where the target computes on them; the rest stays float.

    Weights are symmetric with one scale an output channel. Activations have one scale a tensor, found on the
    calibration data: the extremes (`minmax`), or what is left when a few outliers are cut off (`percentile`: 99.9995
    cuts 5 values in a million off either end). ignore: modules that stay float (`int8(ignore=head+layer1.*)`).
    reduce_range: 7-bit weights for processors whose 16-bit sums saturate, as the target says if none.
    """

    name: ClassVar[str] = "int8"
    contract: ClassVar[Contract] = BOUNDED
    after: ClassVar[tuple[str, ...]] = ("merge", "prune", "squeeze", "distill", "fold")
    requires: ClassVar[tuple[str, ...]] = ("fold",)

    calibration: Literal["minmax", "percentile"] = "percentile"
    percentile: float = 99.9995
    ignore: tuple[str, ...] = ()
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"a percentile lies above 50 and at most at 100, got {self.percentile:g}")

    def run(self, graph: Graph, ctx: Context) -> Iterator[Outcome]:
        data = ctx.calibration
        if data is None:
            raise UsageError(
                "int8 needs sample inputs to find ranges with: pass some with --calib (100 to 500 are plenty)"
            )
        spec = self._spec(ctx)
        chosen, facts = _worthwhile(graph, ctx, spec, self.ignore)
        prepared = _rewrite(graph, spec, chosen, ctx.limit)
        yield prepared
        left = None if ctx.limit is None else ctx.limit - len(prepared.rewrites)
        candidates = place(graph, spec, None, self.ignore, left)
        with ctx.progress("calibrating int8", data.samples) as advance:
            ranges = calibrate(graph, candidates.owner, data, self._cut, advance)
        plan = place(graph, spec, ranges, self.ignore, left)
        outcome = _outcome(graph, plan)
        insert_pairs(plan, ranges)
        graph.clean()
        outcome.facts |= facts | {"calibration": f"{self._method} of {data.samples} samples"}
        yield outcome

    def _spec(self, ctx: Context) -> QuantSpec:
        spec = ctx.target.quant
        return (
            spec if self.reduce_range is None else dataclasses.replace(spec, reduce_range=self.reduce_range)
        )

    @property
    def _cut(self) -> float:
        return self.percentile if self.calibration == "percentile" else 100.0

    @property
    def _method(self) -> str:
        return "extremes" if self._cut == 100 else f"{self._cut:g} % percentiles"


def _outcome(graph: Graph, plan: Placement) -> Outcome:
    """What the placement does to every operator, in words; before it is written into the graph."""
    outcome = Outcome(declines=[Decline.at(node, reason) for node, reason in plan.declines])
    for node in graph.nodes:
        if node in plan.operators:
            how = "integers in, floats out" if node in plan.floating else "integers in and out"
            outcome.rewrites.append(Rewrite(site(node), f"{short_name(node)}: {how}"))
        elif kind(node) in CONTRACTIONS and not listed(node, plan.spec.weighted):
            outcome.declines.append(Decline.at(node, "the target has no integer kernel for it"))
    reasons = Counter(decline.reason for decline in outcome.declines)
    outcome.facts = {
        "integer": dict(Counter(short_name(node) for node in plan.operators)),
        "float": dict(reasons.most_common(10)),
        "quantisers": len(plan.owner),
    }
    return outcome


# -------------------------------------------------------------------- exact rewrites


@dataclass(frozen=True)
class Match:
    """One place for an exact rewrite: `build` inserts what `node` is equal to and returns its last value."""

    node: Node
    what: str
    build: Callable[[], Node]


def pools(graph: Graph, spec: QuantSpec) -> Iterator[Match | Decline]:
    """Means over space, and adaptive pools, as average pools: integer kernels exist for those.

    Only where the spatial sizes are known, and a multiple of the output's.
    """
    for node in graph.nodes:
        source, sizes = _pooled(node)
        if source is None:
            continue
        inner = shape(source)[2:]
        if not all(is_static(s) for s in inner):
            yield Decline.at(node, "its spatial size is dynamic: an average pool needs to know it")
        elif any(s % o for s, o in zip(inner, sizes, strict=True)):
            yield Decline.at(node, f"{list(inner)} does not divide into {list(sizes)} equal windows")
        else:
            window = [s // o for s, o in zip(inner, sizes, strict=True)]
            yield Match(
                node, f"{short_name(node)} as an average pool", partial(_pool, graph, node, source, window)
            )


def _pooled(node: Node) -> tuple[Node | None, tuple[int, int]]:
    """The 4-D value that a node averages over space, and the size that is left of its two axes."""
    bound = arguments(node) if node.op == "call_function" else {}
    source: Any = node.args[0] if node.args else None
    if not is_tensor(source) or len(shape(source)) != 4 or not is_tensor(node):
        return None, (1, 1)
    if operator_name(node) == "aten.mean.dim":
        over = sorted(d % 4 for d in bound["dim"] or ())
        return (source if over == [2, 3] and bound.get("dtype") is None else None), (1, 1)
    if operator_name(node) == "aten.adaptive_avg_pool2d.default":
        return source, tuple(shape(node)[2:])  # type: ignore[return-value]
    return None, (1, 1)


def _pool(graph: Graph, node: Node, source: Node, window: list[int]) -> Node:
    pooled = source
    if window != [1, 1]:
        pooled = graph.insert(aten.avg_pool2d.default, (source, window), before=node)
    if len(shape(node)) == 4:
        return pooled
    return graph.insert(aten.flatten.using_ints, (pooled, 1), before=node)


def selections(graph: Graph, spec: QuantSpec) -> Iterator[Match | Decline]:
    """Every second pixel, with channels of zeros put round the others, as a 1x1 convolution that copies channels.

    The shortcut of CIFAR ResNets (He et al. 2016, section 4.2, option A).
    """
    for node in graph.nodes:
        pads = _channel_pads(node)
        if pads is None:
            continue
        source, strides = _strided(node.args[0])  # type: ignore[arg-type]
        build = partial(_select, graph, node, source, pads, strides)
        yield Match(node, "strided slice and padded channels as a 1x1 convolution", build)


def _select(graph: Graph, node: Node, source: Node, pads: tuple[int, int], strides: list[int]) -> Node:
    channels = shape(source)[1]
    weight = torch.zeros(channels + sum(pads), channels, 1, 1)
    weight[range(pads[0], pads[0] + channels), range(channels)] = 1
    stored = graph.add_tensor(f"{node.name}_selection", weight)
    return graph.insert(aten.conv2d.default, (source, stored, None, strides), before=node)


def _channel_pads(node: Node) -> tuple[int, int] | None:
    """Zeros before and after the channels of a 4-D float32 value, for a pad that adds nothing else."""
    if kind(node) != "pad" or not is_tensor(node) or len(shape(node)) != 4:
        return None
    bound = arguments(node)
    pads = [*bound["pad"], *([0] * 8)][:8]
    constant = bound.get("mode", "constant") == "constant" and not bound.get("value")
    whole = all(isinstance(p, int) and p >= 0 for p in pads) and not any(pads[:4] + pads[6:])
    if not constant or not whole or node.meta["val"].dtype != torch.float32 or not is_static(shape(node)[1]):
        return None
    return pads[4], pads[5]


def _strided(value: Node) -> tuple[Node, list[int]]:
    """The value behind slices that take every n-th row and column from the first on, and both n."""
    strides = [1, 1]
    while kind(value) == "slice":
        bound = arguments(value)
        dim, end = bound["dim"] % 4, bound["end"]
        source = value.args[0]
        to_end = end is None or (isinstance(end, int) and (end >= _END or end == shape(source)[dim]))  # type: ignore[arg-type]
        if bound["start"] not in (None, 0) or not to_end or (dim < 2 and bound["step"] != 1):
            break
        if dim >= 2:
            strides[dim - 2] *= bound["step"]
        value = source  # type: ignore[assignment]
    return value, strides


def gates(graph: Graph, spec: QuantSpec) -> Iterator[Match | Decline]:
    """SiLU behind a convolution as x * sigmoid(x): integer kernels exist for these two."""
    for node in graph.nodes:
        if operator_name(node) == "aten.silu.default" and listed(node.args[0], spec.closed):  # type: ignore[arg-type]
            yield Match(node, "silu as x * sigmoid(x)", partial(_gate, graph, node))


def _gate(graph: Graph, node: Node) -> Node:
    gate = graph.insert(aten.sigmoid.default, (node.args[0],), before=node)
    return graph.insert(aten.mul.Tensor, (node.args[0], gate), before=node)


REWRITES: dict[str, Callable[[Graph, QuantSpec], Iterator[Match | Decline]]] = {
    "pool": pools,
    "selection": selections,
    "gate": gates,
}


def _rewrite(graph: Graph, spec: QuantSpec, names: Collection[str], limit: int | None) -> Outcome:
    """Makes the named exact rewrites, `limit` of them at most."""
    outcome = Outcome(contract=EXACT, step="exact rewrites")
    for found in list(chain.from_iterable(REWRITES[name](graph, spec) for name in sorted(names))):
        if isinstance(found, Decline):
            outcome.declines.append(found)
        elif limit is None or len(outcome.rewrites) < limit:
            graph.replace_uses(found.node, found.build())
            outcome.rewrites.append(Rewrite(site(found.node), found.what))
    graph.clean()
    return outcome


def _worthwhile(
    graph: Graph, ctx: Context, spec: QuantSpec, ignore: Collection[str]
) -> tuple[set[str], dict[str, Any]]:
    """The rewrites to make, and what the stopwatch said of those in doubt, which all stay or all go.

    In doubt are those that the target wants timed, if they add work worth mentioning. They are timed on quantised
    trials whose ranges come from one batch: speed does not depend on scales.
    """
    wanted = {
        name for name in spec.rewrites if any(isinstance(m, Match) for m in REWRITES[name](graph, spec))
    }
    sure = wanted - spec.timed
    rewritten = graph.copy()
    _rewrite(rewritten, spec, wanted, None)
    if ctx.measure is None or wanted == sure or macs(rewritten) <= (1 + FREE) * macs(graph):
        return wanted, {}

    def trial_with(names: set[str]) -> Graph:
        trial = graph.copy()
        _rewrite(trial, spec, names, None)
        ranges = calibrate(trial, place(trial, spec, None, ignore).owner, islice(ctx.calibration or (), 1))
        insert_pairs(place(trial, spec, ranges, ignore), ranges)
        trial.clean()
        return trial

    with ctx.progress("timing rewrites", None):
        times = ctx.measure(trial_with(wanted), trial_with(sure))
    facts = dict(zip(("rewritten_ms", "as_it_was_ms"), times, strict=True))
    return (wanted if facts["rewritten_ms"] <= SLOWER * facts["as_it_was_ms"] else sure), facts
