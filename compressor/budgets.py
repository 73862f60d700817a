"""How far to prune: what a model costs, what is least reachable, and the search for budgets that must be measured.

MACs, parameters and bytes follow from widths. A latency and a metric do not: pruned copies are measured, and the
share of MACs that just fits is found by halving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .channels import Algebra, Term
from .errors import UsageError
from .ir import Graph
from .measure import live
from .ops import shape
from .pipeline import Context, Size
from .verify import compare, observe
from .widths import ROUNDING, Costs

MACS = 0.7  # share to keep where the user names no budget
HEARD = 128  # samples on which `sqnr` is measured
TRIES = 6  # copies that are measured between the ends: the share of MACs is known to a 64th of its range
Amounts = Mapping[str, float]  # macs, params, bytes -> how much
Trial = Callable[[Amounts], Graph]  # a copy, pruned to these amounts


@dataclass
class Goal:
    """Where pruning goes: amounts of `macs`, `params`, `bytes` in the end.

    short: (budget, why) of every budget that was missed because the user takes the best that can be had. facts: what
    was measured on the way, for the report.
    """

    amounts: dict[str, float]
    short: list[tuple[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """The budgets of one pass, as the user gave them; see `prune`. best: what cannot be reached is no error.

    owner: the pass. hint: what the least is made of, for an error.
    """

    macs: float | None = None
    params: float | None = None
    size_mb: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    max_drop: float | None = None
    sqnr: float | None = None
    best: bool = False
    owner: str = "prune"
    hint: str = (
        "every prunable layer at its minimum width; 'compress inspect MODEL --groups' says why the rest stays"
    )

    def __post_init__(self) -> None:
        for name, value in self.named.items():
            if name in ("macs", "params", "latency") and not 0 < value <= 1:
                raise UsageError(f"{self.owner}({name}={value}): the share to keep is over 0 and at most 1")
            if name in ("size_mb", "latency_ms") and value <= 0:
                raise UsageError(f"{self.owner}({name}={value}): must be over 0")
        if self.max_drop is not None and self.max_drop < 0:
            raise UsageError(
                f"{self.owner}(max_drop={self.max_drop}): how far the metric may fall is not under 0"
            )
        for name in ("max_drop", "sqnr"):
            if getattr(self, name) is not None and len(self.named) > 1:
                raise UsageError(
                    f"{self.owner}({name}=...) goes as far as that allows: give it without another budget"
                )

    @property
    def named(self) -> dict[str, float]:
        """What the user asked for, by name."""
        names = ("macs", "params", "size_mb", "latency", "latency_ms", "max_drop", "sqnr")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def plan(self, size: Size, unnamed: str = "") -> tuple[Size, str]:
        """What would be left, as `Pass.plan` says it. unnamed: the words where there is no budget; `MACS` if empty."""
        wanted = self.named
        if unnamed and not wanted:
            return size, unnamed
        if "size_mb" in wanted:
            share = min(1.0, wanted["size_mb"] * 1e6 / size.bytes)
            return size.times(share), f"down to {wanted['size_mb']:g} MB; the MACs fall as the bytes do"
        if shares := {name: wanted[name] for name in ("macs", "params") if name in wanted}:
            name, share = min(shares.items(), key=lambda entry: entry[1])
            return size.times(share), f"{name}={share:g}; what else there is falls alike"
        if wanted:
            return (
                size,
                f"{', '.join(wanted)} is measured on copies: how small they are cannot be told before",
            )
        return size.times(MACS), f"macs={MACS:g} where nothing is asked for; what else there is falls alike"

    def goal(self, before: Amounts, least: Amounts) -> Goal:
        """The budgets that follow from widths, given what the model costs and the shares that are least reachable.

        UsageError where one is out of reach, unless `best`, or the user named none: `MACS` is a wish then.
        """
        wanted = {"macs": self.macs, "params": self.params, "size_mb": self.size_mb}
        goal = Goal({})
        for name, value in (wanted if self.named else {"macs": MACS}).items():
            if value is None:
                continue
            cost = "bytes" if name == "size_mb" else name
            unit = before[cost] / 1e6 if name == "size_mb" else 1.0
            goal.amounts[cost] = value * 1e6 if name == "size_mb" else value * before[cost]
            if goal.amounts[cost] < (least[cost] - ROUNDING) * before[cost]:
                self._missed(goal, f"{name}={value:g}", f"{_rounded_up(least[cost] * unit):g} is the least")
        return goal

    def search(
        self, goal: Goal, graph: Graph, ctx: Context, before: Amounts, least: float, trial: Trial
    ) -> None:
        """Adds the share of MACs that keeps to the budgets that are measured. least: of that share."""
        first = min(1.0, goal.amounts.get("macs", math.inf) / before["macs"]) if before["macs"] else 1.0
        share = first

        def pruned(share: float) -> Graph:
            return (
                trial({**goal.amounts, "macs": share * before["macs"]})
                if share < 1 or goal.amounts
                else graph
            )

        with ctx.progress("measuring copies", None):
            if self.latency is not None or self.latency_ms is not None:
                share = self._time(goal, graph, ctx, (least, first), pruned)
            elif self.max_drop is not None or self.sqnr is not None:
                share = self.measured(goal, graph, ctx, least, pruned)
        if share < first:
            goal.amounts["macs"] = share * before["macs"]

    def measured(
        self, goal: Goal, graph: Graph, ctx: Context, least: float, pruned: Callable[[float], Graph]
    ) -> float:
        """The smallest share, from `least` to 1, that keeps to `sqnr` or `max_drop`; at 1 all is as it was."""
        if self.max_drop is not None:
            return self._evaluate(goal, graph, ctx, least, pruned)
        return self._hear(goal, graph, ctx, least, pruned)

    def _time(
        self,
        goal: Goal,
        graph: Graph,
        ctx: Context,
        ends: tuple[float, float],
        pruned: Callable[[float], Graph],
    ) -> float:
        """The largest share of MACs whose latency fits."""
        timed, asked = ctx.latency, {n: v for n, v in self.named.items() if n.startswith("latency")}
        named = ", ".join(f"{name}={value:g}" for name, value in asked.items())
        if timed is None:
            raise UsageError(f"{self.owner}({named}): needs a stopwatch: leave out --no-measure")
        seen: dict[float, tuple[float, float]] = {}

        def fits(share: float) -> bool:
            original, now = timed(graph, pruned(share)) if share < 1 or goal.amounts else timed(graph) * 2
            seen[share] = original, now
            return now <= min(asked.get("latency", math.inf) * original, asked.get("latency_ms", math.inf))

        least, first = ends
        share = first
        if not fits(first):
            share = least
            if least == first or not fits(least):
                original, now = seen[least]
                got = f"latency={_rounded_up(now / original):g} ({now:.3g} of {original:.3g} ms, {ctx.timed_on})"
                self._missed(goal, named, f"{got} is the least")
            else:
                share = closest(fits, least, first, TRIES)
        original, now = seen[share]
        goal.facts["latency"] = {"before_ms": original, "after_ms": now, "timed_on": ctx.timed_on}
        return share

    def _evaluate(
        self, goal: Goal, graph: Graph, ctx: Context, least: float, pruned: Callable[[float], Graph]
    ) -> float:
        """The smallest share of MACs whose metric fits, were it to fall as MACs go."""
        if ctx.evaluate is None:
            raise UsageError(
                f"{self.owner}(max_drop={self.max_drop:g}): needs a metric: --eval DATA (with labels y) or "
                "--eval module:function"
            )
        evaluate, limit = ctx.evaluate, self.max_drop or 0.0
        seen = {1.0: evaluate(graph)}

        def fits(share: float) -> bool:
            if share not in seen:
                seen[share] = evaluate(pruned(share))
            return seen[1.0] - seen[share] <= limit + ROUNDING

        share = least if fits(least) else closest(fits, 1.0, least, TRIES)
        goal.facts["metric"] = {"before": seen[1.0], "after": seen[share]}
        return share

    def _hear(
        self, goal: Goal, graph: Graph, ctx: Context, least: float, pruned: Callable[[float], Graph]
    ) -> float:
        """The smallest share of MACs whose outputs are `sqnr` dB above their noise, on held-out samples."""
        if ctx.calibration is None:
            raise UsageError(f"{self.owner}(sqnr={self.sqnr:g}): needs calibration data: pass --calib")
        batches = list(ctx.held_out.limited(HEARD))  # to those that ranges were fitted to, they are kind
        expected = observe(graph, batches)
        seen = {1.0: math.inf}

        def fits(share: float) -> bool:
            if share not in seen:
                now = compare(graph, expected, observe(pruned(share), batches))
                seen[share] = min((c.sqnr_db for c in now if not c.discrete and c.finite), default=-math.inf)
            return seen[share] >= (self.sqnr or 0.0)

        share = least if fits(least) else closest(fits, 1.0, least, TRIES)
        goal.facts["sqnr"] = {"asked_db": self.sqnr, "held_out_db": seen[share]}
        return share

    def _missed(self, goal: Goal, named: str, least: str) -> None:
        why = f"out of reach, {least} ({self.hint})"
        if self.named and not self.best:
            raise UsageError(f"{self.owner}({named}): {why}")
        goal.short.append((named, why))


def costs_of(graph: Graph, algebra: Algebra) -> Costs:
    """MACs of one sample, numbers in all tensors, and their bytes; a tensor that two names share counts once."""
    numbers: list[Term] = []
    sizes: list[Term] = []
    for node in live(graph):
        tensor = graph.tensor(node)
        axes = tuple(key for i in range(len(shape(node))) if (key := (node.name, i)) in algebra.axes)
        numbers.append(Term(tensor.numel(), axes))
        sizes.append(Term(tensor.numel() * tensor.element_size(), axes))
    return Costs(algebra, {"macs": algebra.macs_terms, "params": numbers, "bytes": sizes})


def on_the_way(before: Amounts, goal: Amounts, steps: int) -> Iterator[dict[str, float]]:
    """The goals of so many steps, each of which keeps the same share of what the one before it left."""
    for step in range(1, steps + 1):
        yield {
            name: before[name] * (amount / before[name]) ** (step / steps) if before[name] else amount
            for name, amount in goal.items()
        }


def shares(goal: Amounts, now: Amounts) -> dict[str, float]:
    """Amounts as shares of what there is now, at most all of it."""
    return {name: min(1.0, amount / now[name]) if now[name] else 1.0 for name, amount in goal.items()}


def closest(fits: Callable[[float], bool], good: float, bad: float, tries: int) -> float:
    """The share nearest to `bad` that was seen to fit, by halving; `good` is known to fit and `bad` not to."""
    for _ in range(tries):
        middle = (good + bad) / 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def _rounded_up(value: float) -> float:
    """Three digits that can be reached: what a message names must be true."""
    return math.ceil((value - ROUNDING) * 1000) / 1000
