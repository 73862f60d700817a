"""Low-rank rewrites: one convolution or linear becomes two or three thinner ones (`compressor/factors.py`).

Ranks follow from what the layer's outputs lose on data, counted where the model feels it (the residual stream behind
the layer), and are spread over all layers under one budget. What the stopwatch does not confirm is left. With
calibration data, the weights of every split and of all layers behind it are then solved anew, on what the squeezed
model gives them (`compressor/rebuild.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from compressor.budgets import Amounts, Budget, Goal
from compressor.errors import UsageError
from compressor.factors import PAYS, Fit, Layer, Option
from compressor.ir import Graph
from compressor.measure import bytes_of, parameters
from compressor.names import site
from compressor.ops import arguments, macs, set_argument
from compressor.pipeline import BOUNDED, Context, Contract, Decline, Outcome, Pass, Rewrite, Size
from compressor.rebuild import Rebuilt, refit
from compressor.reconstruct import allocate
from compressor.splits import Value, layers_of, observe, options_of, watched, waves
from compressor.statistics import Covariance
from compressor.survey import reading_of
from compressor.watch import Watch

Plan = list[Option]

# Of bare `squeeze`: ResNet-20 and ResNet-56, split wherever it paid, kept over 20 dB at their outputs.
ENERGY = 0.99
_TRIALS = 3  # plans that are timed before the rewrite is given up
_ROUNDS = 3  # times that other ranks are tried for a layer whose split the stopwatch refused
_SLOWER = "the target runs it no faster in parts"


@dataclass(frozen=True)
class Squeeze(Pass):
    """Convolutions and linears whose weights are nearly low-rank become two or three thinner operators each.

    energy: share of its output's variance that each layer keeps (of its squared singular values where there is no
    calibration data); `energy=1` splits only what is exactly low-rank. Bare `squeeze` is `energy=0.99`, and takes
    nothing from what is exactly low-rank.

    Or a budget for the whole model, with ranks spread where they cost least. macs, params: share to keep. size_mb:
    megabytes (1e6 bytes) of all tensors. latency, latency_ms: share of the original's, or milliseconds, measured on
    squeezed copies. sqnr: as few MACs as leave the outputs so many dB above their noise, on held-out samples. max_drop:
    how far the metric of --eval may fall. reach: a budget out of reach is an error that says what can be had; `best`
    goes as far as it gets.

    repair: with calibration data, the weights of the parts and of all layers behind them are solved anew, to give what
    the model gave before. measure: keep only what the target runs faster, layer by layer and as a whole. align: ranks
    are multiples of it, of the target's channel multiple where it is 0, or exact. ignore: module paths to leave alone.

    Layers that parts would not make a tenth cheaper stay, and so do shared, computed and grouped weights.
    """

    name: ClassVar[str] = "squeeze"
    contract: ClassVar[Contract] = BOUNDED
    after: ClassVar[tuple[str, ...]] = ("merge", "shorten", "prune")

    energy: float | None = None
    macs: float | None = None
    params: float | None = None
    size_mb: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    sqnr: float | None = None
    max_drop: float | None = None
    reach: Literal["exact", "best"] = "exact"
    repair: bool = True
    measure: bool = True
    align: int = 0
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"squeeze(energy={self.energy}): the share to keep is above 0 and at most 1")
        if self.align < 0:
            raise UsageError(f"squeeze(align={self.align}): a positive number; 0 asks the target")
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """UsageError where it is none."""
        return Budget(
            self.macs, self.params, self.size_mb, self.latency, self.latency_ms, self.max_drop, self.sqnr,
            best=self.reach == "best", owner="squeeze", hint="every layer that pays at its smallest rank",
        )  # fmt: skip

    def plan(self, size: Size, graph: Graph, data: bool) -> tuple[Size, str]:
        if self.sqnr is not None and not data:
            raise UsageError(f"squeeze(sqnr={self.sqnr:g}): needs calibration data: pass --calib")
        return self.budget.plan(
            size, "splits what is nearly of low rank: how much that is cannot be told before"
        )

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        layers, declines = layers_of(graph, self.ignore)
        before = {"macs": macs(graph), "params": parameters(graph), "bytes": bytes_of(graph)}
        shelves: list[Plan] = []
        energies: dict[Node, float] = {}
        for group in waves(layers):
            seen = observe(graph, group, energies, ctx)
            with ctx.progress("squeeze: factorising", len(group)) as advance:
                for layer in group:
                    found = self._options(graph, layer, seen, energies, ctx)
                    if isinstance(found, Decline):
                        declines.append(found)
                    else:
                        shelves.append(found)
                    advance(1)
        goal = self._goal(graph, shelves, before, ctx)
        watch = Watch(ctx) if self.measure and ctx.measure is not None else None
        plan, slow = self._timed(shelves, goal.amounts, before, watch)
        declines += [Decline.at(layer.node, _SLOWER) for layer in slow]
        taken = {o.layer for o in plan}
        spared = [shelf[0].layer for shelf in shelves if shelf[0].layer not in taken | slow]
        declines += [Decline.at(layer.node, "the budget is met at less loss elsewhere") for layer in spared]
        wanted = plan = plan[: ctx.limit]
        facts: dict[str, Any] = {"weighted": ctx.calibration is not None} | goal.facts
        if plan and watch is not None:
            plan, facts["ms"] = _faster(graph, wanted, watch.measure)
            declines += [
                Decline.at(
                    o.layer.node,
                    f"{_SLOWER}, in the whole model; squeeze(measure=false) takes it all the same",
                )
                for o in wanted
                if o not in plan
            ]
        rebuilt = self._apply(graph, plan, ctx)
        after = {"macs": macs(graph), "params": parameters(graph), "bytes": bytes_of(graph)}
        facts |= self._facts(plan, before, after, goal) | {"repaired": len(rebuilt.repaired)}
        if watch is not None and watch.times:
            facts["timed"] = watch.facts()
        return Outcome([Rewrite(site(o.layer.node), str(o)) for o in plan], declines, facts)

    # ---------------------------------------------------------------- what to split

    def _options(
        self,
        graph: Graph,
        layer: Layer,
        seen: Mapping[Value, Covariance],
        energies: Mapping[Node, float],
        ctx: Context,
    ) -> Plan | Decline:
        """Every split of a layer that pays and keeps enough energy; the reason why not when there is none."""
        weight = graph.tensor(layer.weight)
        if not bool(torch.isfinite(weight).all()) or not bool(weight.any()):
            return Decline.at(layer.node, "its weight is zero, or not finite")
        if any(not bool(seen[v].covariance.isfinite().all()) for v in watched(layer) if v in seen):
            return Decline.at(layer.node, "the calibration data gives values here that are not finite")
        found = options_of(graph, layer, seen, energies, self.align or ctx.target.channel_multiple)
        bare = self.energy is None and not self.budget.named
        keep = ENERGY if bare else (self.energy or 0.0)
        enough = [o for o in found if o.error <= 1 - keep]  # never empty: the full rank loses nothing
        paying = [o for o in enough if o.share <= PAYS]
        if paying:
            lossless = [o for o in paying if o.error == 0]
            return lossless if bare and lossless else paying
        least = min(enough, key=lambda o: o.share)
        why = f"keeping {keep:g} of the energy takes rank" if keep else "its least rank is"
        cost = f"{least.share:.2f} of its MACs; its parts pay up to {PAYS:g}"
        return Decline.at(
            layer.node, f"{why} {least.ranks[0]} of {layer.full(least.form)[0]}, which costs {cost}"
        )

    def _goal(self, graph: Graph, shelves: Sequence[Plan], before: Amounts, ctx: Context) -> Goal:
        """Amounts to reach; none where the user named no budget, and every layer by itself decides."""
        if not self.budget.named:
            return Goal({})
        most = {name: sum(max(_saved(o)[name] for o in shelf) for shelf in shelves) for name in before}
        least = {name: 1 - most[name] / before[name] if before[name] else 1.0 for name in before}
        goal = self.budget.goal(before, least)

        def trial(amounts: Amounts) -> Graph:
            copy = graph.copy()
            counts = self.budget.sqnr is not None or self.budget.max_drop is not None
            self._apply(copy, self._choose(shelves, amounts, before), ctx, repair=counts)
            return copy

        self.budget.search(goal, graph, ctx, before, least["macs"], trial)
        return goal

    def _choose(self, shelves: Sequence[Plan], amounts: Amounts, before: Amounts) -> Plan:
        """At most one option a layer, in the graph's order."""
        if not self.budget.named:
            return [min(shelf, key=lambda o: (o.share, o.error)) for shelf in shelves]
        points = [
            [(tuple(_saved(o)[n] / max(before[n], 1) for n in amounts), o.loss) for o in shelf]
            for shelf in shelves
        ]
        chosen = allocate(points, [1 - amount / max(before[n], 1) for n, amount in amounts.items()])
        return [shelf[k] for shelf, k in zip(shelves, chosen, strict=True) if k is not None]

    def _timed(
        self, shelves: list[Plan], amounts: Amounts, before: Amounts, watch: Watch | None
    ) -> tuple[Plan, set[Layer]]:
        """The plan whose every split runs faster by itself, and the layers that have none left that could."""
        slow: set[Layer] = set()
        turn = 0
        while True:
            plan = self._choose(shelves, amounts, before)
            refused = [] if watch is None else [o for o in plan if not watch.faster(o)]
            if not refused:
                return plan, slow
            drop = _as_slow if turn < _ROUNDS else _alike
            left = [[o for o in shelf if not any(drop(o, r) for r in refused)] for shelf in shelves]
            slow |= {old[0].layer for old, new in zip(shelves, left, strict=True) if not new}
            shelves[:] = [shelf for shelf in left if shelf]
            turn += 1

    def _facts(self, plan: Plan, before: Amounts, after: Amounts, goal: Goal) -> dict[str, Any]:
        facts: dict[str, Any] = {n: round(after[n] / max(before[n], 1), 4) for n in ("macs", "params")}
        missed = [
            f"{after[n] / max(before[n], 1):.3f} of the {n}, asked for {amount / max(before[n], 1):.3f}"
            for n, amount in goal.amounts.items()
            if after[n] > amount * (1 + 1e-9)
        ] + [f"{name}: {why}" for name, why in goal.short]
        if self.budget.named:
            facts["budget"] = f"not reached: {'; '.join(missed)}" if missed else "reached"
        return facts | {"layers": [o.facts() for o in plan]}

    def _apply(self, graph: Graph, plan: Plan, ctx: Context, repair: bool = True) -> Rebuilt:
        """Puts the parts in the place of the layers, with the weights that are best for what they now read."""
        nodes = {node.name: node for node in graph.nodes}
        solved = bool(plan) and repair and self.repair and ctx.calibration is not None
        for option in plan if solved else ():
            _give_bias(graph, nodes[option.layer.node.name])
        fits = {nodes[o.layer.node.name]: Fit(o, graph.tensor(nodes[o.layer.weight.name])) for o in plan}
        rebuilt = Rebuilt([], {})
        if solved and ctx.calibration is not None:
            rebuilt = refit(graph, fits, ctx.calibration, ctx)
            kept = {str(arguments(node)["weight"].target) for node in fits}
            for node in graph.nodes:
                if node.op == "get_attr" and str(node.target) in rebuilt.tensors.keys() - kept:
                    graph.set_tensor(node, rebuilt.tensors[str(node.target)])
        for node, fit in fits.items():
            _replace(graph, node, fit, None if solved else fit.option.shift)
        graph.clean()
        return rebuilt


def _saved(option: Option) -> dict[str, float]:
    saved = option.saved
    return {**saved, "bytes": saved["params"] * option.layer.weight.meta["val"].dtype.itemsize}


def _alike(option: Option, refused: Option) -> bool:
    """True for a split of the same kind of layer."""
    return option.key[:-2] == refused.key[:-2]


def _as_slow(option: Option, refused: Option) -> bool:
    """True for a split of the same kind of layer that cannot be faster than one that was refused."""
    same = option.key[:-1] == refused.key[:-1]
    return same and all(a >= b for a, b in zip(option.ranks, refused.ranks, strict=True))


# -------------------------------------------------------------------- the rewrite


def _faster(graph: Graph, plan: Plan, measure: Callable[..., list[float]]) -> tuple[Plan, dict[str, float]]:
    """The plan if the model runs faster with it, else the half that saves the greatest shares, and so on."""
    times: dict[str, float] = {}
    for _ in range(_TRIALS):
        trial = graph.copy()
        nodes = {node.name: node for node in trial.nodes}
        for option in plan:
            fit = Fit(option, trial.tensor(nodes[option.layer.weight.name]))
            _replace(trial, nodes[option.layer.node.name], fit, option.shift)
        trial.clean()
        times["before"], times["after"] = (round(ms, 4) for ms in measure(graph, trial))
        if times["after"] < times["before"]:
            return plan, times
        best = sorted(plan, key=lambda o: o.share)[: len(plan) // 2]
        plan = [o for o in plan if o in best]
        if not plan:
            break
    return [], times


def _replace(graph: Graph, node: Node, fit: Fit, shift: Tensor | None) -> None:
    """Puts the parts in the place of the one. shift [outs]: to add to the bias."""
    bound = arguments(node)
    old, bias, value = bound["weight"], bound["bias"], bound["input"]
    if shift is not None:
        total = shift if bias is None else shift + graph.tensor(bias).double()
        bias = _store(graph, old, "expand.bias", total)
    steps = list(fit.steps())
    names = (
        ("squeeze.weight", "core.weight", "expand.weight")
        if len(steps) == 3
        else ("squeeze.weight", "expand.weight")
    )
    for position, ((target, weight, place), name) in enumerate(zip(steps, names, strict=True), 1):
        stored = _store(graph, old, name, weight)
        value = graph.insert(
            target, (value, stored, bias if position == len(steps) else None, *place), before=node
        )
    graph.replace_uses(node, value)
    graph.erase(node)


def _give_bias(graph: Graph, node: Node) -> None:
    """A bias of zeros for a layer that nothing else can shift, to take the mean of what is cut off."""
    reading = reading_of(graph, node)
    if reading is None or reading.shift is not None or reading.layer.bias is not None:
        return
    weight = reading.layer.weight
    set_argument(graph, node, "bias", _store(graph, weight, "expand.bias", torch.zeros(reading.layer.outs)))


def _store(graph: Graph, old: Node, name: str, value: Tensor) -> Node:
    """A new tensor of the old weight's dtype, beside it: `conv.weight` -> `conv.squeeze.weight`."""
    path, dot, _ = str(old.target).rpartition(".")
    new = graph.add_tensor(f"{path}{dot}{name}", value.to(graph.tensor(old).dtype).contiguous())
    if str(old.target) in graph.parameters:
        graph.parameters |= {str(new.target)}
    return new
