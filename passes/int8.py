"""Quantisation: activations and weights become 8-bit integers where the target computes on them.

Five steps. Exact rewrites bring operators into a form that the target has an integer kernel for. Channels are scaled
so that rounding them costs the outputs least. One pass over the calibration data finds the range of every tensor that
gets a quantiser. Weights are rounded to what keeps each layer's outputs, on the values that it will then read. Q/DQ
pairs are placed by the target's table, and weights and biases stored as integers.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch.fx import Node

from compressor.budgets import Budget, Goal
from compressor.costs import weights_share
from compressor.data import Data
from compressor.equalise import equalise, release, slopes_of
from compressor.errors import UsageError
from compressor.forms import Match, gates, pools, selections
from compressor.ir import Graph
from compressor.labels import labels_of
from compressor.mixed import KEPT, loudest
from compressor.names import short_name, site
from compressor.noise import Slopes
from compressor.ops import CONTRACTIONS, kind, macs, node_macs
from compressor.pipeline import BOUNDED, EXACT, Context, Contract, Decline, Outcome, Pass, Rewrite, Size
from compressor.pixels import pixels
from compressor.place import Placement, Range, listed, place
from compressor.quantised import Given, take_apart
from compressor.quantize import (
    AVERAGE,
    ENTROPY,
    MINMAX,
    WHOLE,
    Method,
    calibrate,
    calibrate_each,
    held,
    insert_dynamic,
    insert_pairs,
    mse,
    percentile,
)
from compressor.rounding import round_weights
from compressor.tables import has_tables, store_tables
from compressor.target import QuantSpec
from compressor.verify import compare_each
from compressor.weight_only import store_weights

SLOWER = 1.05  # rewrites in doubt go when the model is so many times slower with them: less is noise
FASTER = 1.03  # integers stay when the model is so many times faster with them: less is noise, and they cost accuracy
NO_DATA = "int8 needs sample inputs to find ranges with: pass some with --calib (200 to 500 are plenty)"
FEW = 128  # fewer samples do not know the tails that percentiles and scaled channels need, nor what cutting them costs
SKETCHED = 4  # samples whose ranges do for a stopwatch
FEW_TEXTS = 8  # transformers have their outliers in the same channels everywhere, so that few texts know them
BLOCK = 32  # columns that share a scale where weights alone are integers
FREE = 0.01  # share of the model's multiply-accumulates that a rewrite may add without being timed

REWRITES: dict[str, Callable[[Graph, QuantSpec, Data | None], Iterator[Match | Decline]]] = {
    "pool": pools,
    "selection": selections,
    "gate": gates,
    "pixels": pixels,
}


@dataclass(frozen=True)
class Int8(Pass):
    """Weights and activations become 8-bit integers where the target computes on them; the rest stays float.

    Weights are symmetric with one scale an output channel. Activations have one scale a tensor, found on the
    calibration data.

    calibration: the extremes (`minmax`), their average over the batches (`average`), what is left when a few outliers
    are cut off (`percentile`), or the range that keeps the values best (`mse`) or their distribution (`entropy`);
    `auto` takes percentiles, extremes or `mse`, whichever leaves the outputs the least noise, and extremes where there
    are fewer than 128 samples, which do not know the outliers.
    percentile: what is kept; 99.9995 cuts 5 values in a million off either end.
    scheme: `dynamic` needs no data: matrix products find the scale of what they read in every run, everything else
    stays float. It is what models of matrix products get where there is no calibration data. `weight` needs none
    either: weights of matrix products, block by block, and tables of embeddings are integers, for size.
    equalise: scales channels against each other where that changes no output (through ReLU, pools, sums and norms, and
    by a product in front of matrix products that nothing else can scale), so that rounding them costs least.
    rounding: weights and biases so that each layer's outputs change least (`adaptive`), or to the nearest integers.
    sqnr, max_drop: as many operators stay float as it takes for outputs so many dB above their noise on held-out
    samples, or for a metric (--eval) that falls by no more; the loudest for their work go first.
    ignore: modules that stay float (`int8(ignore=head+layer1.*)`).
    measure: whether a model that runs no faster in integers stays float; it is timed where the target is this machine.
    reduce_range: 7-bit weights for processors whose 16-bit sums saturate, as the target says if none.

    A model that comes quantised (PT2E's Q/DQ pairs, fake quantisers) keeps its scales, and needs no data where it has
    all of them; nothing is then equalised or rounded anew.
    """

    name: ClassVar[str] = "int8"
    contract: ClassVar[Contract] = BOUNDED
    after: ClassVar[tuple[str, ...]] = ("merge", "shorten", "prune", "squeeze", "distill", "fold")
    requires: ClassVar[tuple[str, ...]] = ("fold",)

    scheme: Literal["static", "dynamic", "weight"] = "static"
    calibration: Literal["auto", "minmax", "average", "percentile", "mse", "entropy"] = "auto"
    percentile: float = 99.9995
    equalise: bool = True
    rounding: Literal["nearest", "adaptive"] = "adaptive"
    sqnr: float | None = None
    max_drop: float | None = None
    ignore: tuple[str, ...] = ()
    measure: bool = True
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"a percentile lies above 50 and at most at 100, got {self.percentile:g}")
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """What noise or loss is allowed. UsageError where it is none."""
        return Budget(sqnr=self.sqnr, max_drop=self.max_drop, owner="int8")

    def _require_place(self, data: bool) -> None:
        """UsageError for a budget where nothing is measured that could keep it."""
        if self.budget.named and (self.scheme != "static" or not data):
            why = f"scheme={self.scheme} has none" if self.scheme != "static" else "pass --calib"
            asked = ",".join(f"{name}={value:g}" for name, value in self.budget.named.items())
            raise UsageError(f"int8({asked}): a budget needs calibration data, and static scales: {why}")

    def plan(self, size: Size, graph: Graph, data: bool) -> tuple[Size, str]:
        self._require_place(data)
        if self.scheme == "static" and not data and not _multiplies(graph) and not take_apart(graph.copy()):
            raise UsageError(NO_DATA)
        products = self.scheme != "static" or not (data or take_apart(graph.copy()))
        share = weights_share(graph, {"linear", "addmm", "matmul"} if products else CONTRACTIONS)
        saved = 1 - 0.75 * share
        rule = f"a byte for each of the {share:.0%} of the numbers that are weights of " + (
            "matrix products; what they read is scaled in every run"
            if products
            else "layers; if integers are faster"
        )
        return Size(size.params, size.macs, size.bytes * saved), rule

    def run(self, graph: Graph, ctx: Context) -> Iterator[Outcome]:
        self._require_place(ctx.calibration is not None)
        given = take_apart(graph) if self.scheme == "static" else Given()
        no_ranges = ctx.calibration is None and not given
        if self.scheme == "weight":
            yield store_weights(graph, ctx, 8, BLOCK, self.ignore)
        elif self.scheme == "dynamic" or (no_ranges and _multiplies(graph)):
            yield self._dynamic(graph, self._spec(ctx), ctx)
        elif no_ranges:
            raise UsageError(NO_DATA)
        else:
            yield from self._static(graph, self._spec(ctx), given, ctx)

    def _static(self, graph: Graph, spec: QuantSpec, given: Given, ctx: Context) -> Iterator[Outcome]:
        """Integer weights and activations, whose scales are known when the model is written."""
        data = ctx.calibration
        if given:
            yield given.outcome()
        timed = ctx if self.measure and not given else dataclasses.replace(ctx, measure=None)
        chosen, facts = _worthwhile(graph, timed, spec, self.ignore)
        if chosen is None:
            yield Outcome(declines=[Decline("the model", _slower(facts, ctx.timed_on))], facts=facts)
            return
        prepared = _rewrite(graph, spec, data, chosen, ctx.limit, given)
        yield prepared
        left = None if ctx.limit is None else ctx.limit - len(prepared.rewrites)
        if self.equalise and left != 0 and not given and data is not None:
            scaled = _equalised(graph, spec, self.ignore, data, ctx)
            yield scaled
            left = None if left is None else left - len(scaled.rewrites)
        ranges, words, lost = self._ranges(graph, spec, given, data, left, ctx)
        floats: dict[Node, str] = {}
        tables, released, slower = has_tables(graph, self.ignore), 0, False
        if data is not None and self.budget.named:
            floats, tables, found = self._within(graph, spec, ranges, given, data, ctx)
            facts |= found
            if floats and timed.measure is not None:  # each way in and out of floats costs time
                trial = self._trial(graph, spec, ranges, given, floats=[node.name for node in floats])
                facts["int8_ms"], facts["float_ms"] = timed.measure(trial, graph)
                slower = facts["float_ms"] < FASTER * facts["int8_ms"]
            if slower:
                floats, tables = dict.fromkeys(graph.nodes, KEPT), False
            released = release(graph, floats)
        plan = place(graph, spec, ranges, self.ignore, left, floats)
        outcome = _outcome(graph, plan)
        outcome.declines += [
            Decline.at(n, "its scale is not kept: it shares that of what it is a part of") for n in lost
        ]
        if slower:
            outcome.declines.insert(0, Decline("the model", f"{KEPT}, {_slower(facts, ctx.timed_on)}"))
        if released:
            outcome.rewrites.append(Rewrite("the model", f"{released} products go whose readers are float"))
        scales, known = given.fitting(spec)
        if self.rounding == "adaptive" and plan.operators and not given and data is not None:
            scales, facts["rounded"] = round_weights(plan, ranges, data, ctx)
        insert_pairs(plan, ranges, scales, known)
        if tables:
            store_tables(graph, outcome, self.ignore, left)
        graph.clean()
        outcome.facts |= facts
        if data is not None:
            outcome.facts["calibration"] = words
            if data.samples < FEW:
                outcome.facts["few"] = (
                    f"ranges and rounding know {data.samples} samples; some hundreds are better"
                )
        yield outcome

    def _ranges(
        self, graph: Graph, spec: QuantSpec, given: Given, data: Data | None, left: int | None, ctx: Context
    ) -> tuple[dict[Node, Range], str, list[Node]]:
        """Those that the model came with, and of all other quantised values those of the data; with words for these.

        Third: values that came with a scale of their own, and lose it.
        """
        owner = place(graph, spec, None, self.ignore, left).owner
        lost = given.spread(owner)
        ranges = given.ranges()
        ranges |= {node: ranges[source] for node, source in owner.items() if source in ranges}
        wanted = [node for node in owner if node not in ranges]
        if wanted and data is None:
            raise UsageError(
                f"{NO_DATA}; the model has no range for {len(wanted)} values, {site(wanted[0])} for one"
            )
        if data is None:
            return ranges, "", lost
        methods = self.methods(spec, data.samples)
        with ctx.progress("calibrating int8", data.samples) as advance:
            found = {
                name: held(ranges | some, owner, spec)
                for name, some in calibrate_each(graph, wanted, data, methods, advance).items()
            }
        name = self._quietest(graph, spec, found, given, data, left) if len(found) > 1 else next(iter(found))
        return found[name], f"{name} of {data.samples} samples", lost

    def _quietest(
        self,
        graph: Graph,
        spec: QuantSpec,
        choices: Mapping[str, Mapping[Node, Range]],
        given: Given,
        data: Data,
        left: int | None,
    ) -> str:
        """The ranges that leave the outputs the least noise: trained networks want outliers cut, others may not."""
        copies = {name: self._trial(graph, spec, ranges, given, left) for name, ranges in choices.items()}
        levels = {
            name: min((c.sqnr_db for c in checks if not c.discrete), default=0.0)
            for name, checks in compare_each(graph, copies, data.limited(FEW)).items()
        }
        return max(levels, key=lambda name: levels[name])

    def _trial(
        self,
        graph: Graph,
        spec: QuantSpec,
        ranges: Mapping[Node, Range],
        given: Given,
        left: int | None = None,
        floats: Collection[str] = (),
    ) -> Graph:
        """A copy in integers, rounded to the nearest; `floats` names nodes that stay what they are."""
        copy = graph.copy()
        twins = {node.name: node for node in copy.nodes}
        found = {twins[node.name]: limits for node, limits in ranges.items()}
        kept = place(copy, spec, found, self.ignore, left, {twins[name]: KEPT for name in floats})
        insert_pairs(kept, found, *given.of(twins).fitting(spec))
        copy.clean()
        return copy

    def _within(
        self,
        graph: Graph,
        spec: QuantSpec,
        ranges: Mapping[Node, Range],
        given: Given,
        data: Data,
        ctx: Context,
    ) -> tuple[dict[Node, str], bool, dict[str, Any]]:
        """The operators that stay float so that the budget holds, as few as do, and whether tables become integers."""
        plan, goal = place(graph, spec, ranges, self.ignore), Goal({})
        known = slopes_of(plan, labels_of(graph), data, ctx)
        order = loudest(plan, ranges, Slopes({}, {}) if isinstance(known, str) else known)
        names = [node.name for node in order]

        def floating(share: float) -> list[str]:
            return names[: math.ceil(share * len(names))]

        tables = has_tables(graph, self.ignore)

        def trial(share: float) -> Graph:
            copy = self._trial(graph, spec, ranges, given, floats=floating(share))
            if tables:
                store_tables(copy, Outcome(), self.ignore, None)
                copy.clean()
            return copy

        with ctx.progress("int8: measuring copies", None):
            share = self.budget.measured(goal, graph, ctx, 0.0, trial)
            if tables and share == 1:  # too many for the tables alone
                tables = False
                share = self.budget.measured(goal, graph, ctx, 0.0, trial)
                goal.facts["tables"] = "float, for the budget"
        chosen = set(floating(share))
        kept = [node for node in order if node.name in chosen]
        facts = goal.facts | {"kept_float": [site(node) for node in kept]}
        return dict.fromkeys(kept, KEPT), tables, facts

    def _dynamic(self, graph: Graph, spec: QuantSpec, ctx: Context) -> Outcome:
        """Integer weights, and scales of activations that every run finds for itself."""
        plan = place(graph, dynamic(spec), None, self.ignore, ctx.limit)
        outcome = _outcome(graph, plan)
        why = "as asked" if self.scheme == "dynamic" else "there is no calibration data (--calib)"
        outcome.facts["scheme"] = f"dynamic: scales of activations are found in every run; {why}"
        insert_dynamic(plan)
        store_tables(graph, outcome, self.ignore, ctx.limit)
        graph.clean()
        return outcome

    def _spec(self, ctx: Context) -> QuantSpec:
        spec = ctx.target.quant
        return (
            spec if self.reduce_range is None else dataclasses.replace(spec, reduce_range=self.reduce_range)
        )

    def methods(self, spec: QuantSpec, samples: int) -> dict[str, Method]:
        """How ranges may be found from so many samples, in words: one method, or what `auto` chooses from."""
        cut = f"{self.percentile:g} % percentiles"
        if self.calibration == "auto" and samples >= FEW and self.percentile < 100:
            return {cut: percentile(self.percentile), "extremes": WHOLE, "mse ranges": mse(spec)}
        return {
            "auto": {"extremes": MINMAX},
            "minmax": {"extremes": MINMAX},
            "average": {"moving averages of extremes": AVERAGE},
            "percentile": {cut if self.percentile < 100 else "extremes": percentile(self.percentile)},
            "mse": {"mse ranges": mse(spec)},
            "entropy": {"entropy ranges": ENTROPY},
        }[self.calibration]


def dynamic(spec: QuantSpec) -> QuantSpec:
    """Products of matrices alone take integers, and give floats."""
    nothing: frozenset[str] = frozenset()
    return dataclasses.replace(
        spec,
        weighted=spec.weighted - {"conv", "conv_transpose"},
        closed=nothing,
        float_bias_rank=0,
        fuses=nothing,
        absorbed=nothing,
        transparent=nothing,
    )


def _equalised(graph: Graph, spec: QuantSpec, ignore: Collection[str], data: Data, ctx: Context) -> Outcome:
    """Channels scaled for rounding, where the samples know how far each of them goes."""
    enough = FEW_TEXTS if _multiplies(graph) else FEW
    if data.samples >= enough:
        return equalise(graph, spec, ignore, data, ctx)
    unknown = f"{data.samples} samples do not know how far each channel goes, {enough} do: none was scaled"
    return Outcome(contract=EXACT, step="equalisation", declines=[Decline("the model", unknown)])


def _multiplies(graph: Graph) -> bool:
    """Whether most of a model's work is in products of matrices."""
    work: Counter[str] = Counter()
    for node in graph.nodes:
        work[kind(node)] += node_macs(node) if kind(node) in CONTRACTIONS else 0
    return work["linear"] + work["addmm"] + work["matmul"] > work["conv"] + work["conv_transpose"]


def _slower(facts: Mapping[str, Any], place: str) -> str:
    times = f"{facts['int8_ms']:.3g} ms in integers, {facts['float_ms']:.3g} ms in floats ({place})"
    return f"it is not faster: {times}; int8(measure=false) quantises it anyway"


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


def _rewrite(
    graph: Graph,
    spec: QuantSpec,
    data: Data | None,
    names: Collection[str],
    limit: int | None,
    given: Given | None = None,
) -> Outcome:
    """Makes the named exact rewrites, `limit` of them at most."""
    outcome = Outcome(contract=EXACT, step="exact rewrites")
    for name in sorted(names):
        for found in list(REWRITES[name](graph, spec, data)):
            if isinstance(found, Decline):
                outcome.declines.append(found)
            elif limit is None or len(outcome.rewrites) < limit:
                graph.replace_uses(found.node, made := found.build())
                if given is not None:
                    given.move(found.node, made)
                outcome.rewrites.append(Rewrite(site(found.node), found.what))
    graph.clean()
    return outcome


def _worthwhile(
    graph: Graph, ctx: Context, spec: QuantSpec, ignore: Collection[str]
) -> tuple[set[str] | None, dict[str, Any]]:
    """The rewrites to make, None where nothing in integers is faster than the model is, and what the stopwatch said.

    In doubt are the rewrites that the target wants timed, if they add work worth mentioning; they all stay or all go.
    Timed are quantised trials whose ranges come from a few samples: speed does not depend on scales.
    """
    data = ctx.calibration
    wanted = {
        name for name in spec.rewrites if any(isinstance(m, Match) for m in REWRITES[name](graph, spec, data))
    }
    if ctx.measure is None:
        return wanted, {}
    choices = [wanted]
    sure = wanted - spec.timed
    if wanted != sure:
        rewritten = graph.copy()
        _rewrite(rewritten, spec, data, wanted, None)
        if macs(rewritten) > (1 + FREE) * macs(graph):
            choices.append(sure)

    def trial_with(names: set[str]) -> Graph:
        trial = graph.copy()
        _rewrite(trial, spec, data, names, None)
        few = () if data is None else data.limited(SKETCHED)
        ranges = calibrate(trial, place(trial, spec, None, ignore).owner, few)
        insert_pairs(place(trial, spec, ranges, ignore), ranges)
        trial.clean()
        return trial

    with ctx.progress("timing int8", None):
        *times, before = ctx.measure(*map(trial_with, choices), graph)
    facts = {"float_ms": before} | dict(zip(("int8_ms", "int8_as_it_was_ms"), times, strict=False))
    best = 0 if len(times) == 1 or times[0] <= SLOWER * times[1] else 1
    return (choices[best] if FASTER * times[best] <= before else None), facts
