"""Structured pruning: channels that matter least are removed from every tensor that they run through.

Which channels go together is read from the graph (`compressor/channels.py`), what each is worth from its weights or
from data (`compressor/criteria.py`); how wide every layer becomes is chosen under a budget (`compressor/widths.py`,
`budgets.py`); the result must equal the original with those channels masked at their readers (`compressor/oracle.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from compressor.budgets import Amounts, Budget, costs_of, on_the_way, shares
from compressor.channels import Algebra, Group, Key, analyse, carrier_of
from compressor.criteria import CriteriaData, importance
from compressor.elimination import Elimination
from compressor.errors import UsageError
from compressor.images import imported
from compressor.ir import Graph
from compressor.ledger import Ledger
from compressor.measure import parameters
from compressor.ops import macs
from compressor.oracle import masked, power
from compressor.pipeline import BOUNDED, MASKED, Context, Contract, Decline, Outcome, Pass, Rewrite, Size
from compressor.rebuild import Rebuilt, rebuild, restate_norms
from compressor.surgery import remove
from compressor.survey import MEMORY, survey
from compressor.verify import POWER, TOLERANCE
from compressor.widths import (
    MINIMUM,
    Costs,
    Family,
    families,
    least_shares,
    shrink_globally,
    shrink_locally,
)

POWER_SAMPLES = 8


@dataclass(frozen=True)
class Scored:
    """A graph's channels and what each class of them is worth, as it is before a step.

    eliminations: of families, by their position; of `reconstruct` alone.
    """

    algebra: Algebra
    costs: Costs
    importance: NDArray[np.float64]
    eliminations: Mapping[int, Elimination] = field(default_factory=dict)


@dataclass(frozen=True)
class Prune(Pass):
    """Removes whole channels, so that the model needs fewer multiplications on any hardware.

    macs, params: share of the model's multiply-accumulates and of its numbers to keep; bare `prune` is `macs=0.7`, or
    as near to it as the model allows. size_mb: megabytes (1e6 bytes) of all tensors in the dtype that they have here;
    what `int8` saves later is not counted. latency, latency_ms: share of the original's latency to keep, and
    milliseconds, of one sample on one thread: measured on pruned copies, on the target by --latency-cmd, else on this
    host. max_drop: prunes as far as the metric of --eval falls by at most so much (0.01: one point of top-1).
    reach: a budget that cannot be reached is an error that says what can; `best` goes as far as it gets.

    criterion: what makes a channel important: `reconstruct` (what the layers that read it lose once the channels that
    are left have made up for it; it asks for calibration data, not for labels), `l2` or `l1` norm of its weights (batch
    norm counted in), `bn` (scale of its batch norm), `fpgm` (distance to the layer's other filters), `apoz` (how often
    its activation is not zero), `taylor` (what the loss does without it, to first order; of labels in the calibration
    data or of `loss`), `sensitivity` (what the outputs do without the layer's weakest), `random`. `auto`
    is `reconstruct` with calibration data, else `l2`. loss: `module:function` of outputs and labels (or None), for
    `taylor`. repair: with calibration data, the weights and biases that are
    left are solved anew, layer by layer, to give what the model gave before: a step of its own, which states the loss.
    scope: `global` lets layers compete, `local` narrows all alike. steps: so many rounds, each scored anew.

    minimum: no layer gets narrower. align: widths of at least twice this stay multiples of it; the target's channel
    multiple where 0, and 1 leaves them free. ignore: module paths to leave alone, as in `ignore=head*+layer4.*`.
    attention: whole `heads` go, or the same channels of every head (`width`). norms:
    channels may go from under layer, RMS and group norms too (residual streams of transformers): the reference is then
    the original with those channels masked and with norms taken over the channels that are left.

    A channel that a softmax, a mean, a layer norm or an output of the model depends on stays, and the report says why.
    """

    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = MASKED
    after: ClassVar[tuple[str, ...]] = ("merge", "shorten")

    macs: float | None = None
    params: float | None = None
    size_mb: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    max_drop: float | None = None
    reach: Literal["exact", "best"] = "exact"
    criterion: Literal[
        "auto", "reconstruct", "l1", "l2", "bn", "fpgm", "apoz", "taylor", "sensitivity", "random"
    ] = "auto"
    loss: str | None = None
    repair: bool = True
    scope: Literal["global", "local"] = "global"
    steps: int = 1
    minimum: int = MINIMUM
    align: int = 0
    ignore: tuple[str, ...] = ()
    attention: Literal["heads", "width"] = "heads"
    norms: bool = False

    def __post_init__(self) -> None:
        for name, low, why in (
            ("minimum", 1, "a layer keeps at least one channel"),
            ("steps", 1, "there is at least one step"),
            ("align", 0, "widths are multiples of a positive number; 0 asks the target"),
        ):
            if getattr(self, name) < low:
                raise UsageError(f"prune({name}={getattr(self, name)}): {why}")
        if self.loss is not None and self.criterion != "taylor":
            raise UsageError(f"prune(loss={self.loss}): only criterion=taylor asks for a loss")
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """UsageError where it is none."""
        return Budget(
            self.macs, self.params, self.size_mb, self.latency, self.latency_ms, self.max_drop,
            best=self.reach == "best",
        )  # fmt: skip

    def plan(self, size: Size, graph: Graph, data: bool) -> tuple[Size, str]:
        left, rule = self.budget.plan(size)
        return (
            left,
            rule if data else f"{rule}; without data channels go by their weights, and nothing is repaired",
        )

    def run(self, graph: Graph, ctx: Context) -> Iterator[Outcome]:
        """Two outcomes a step: `surgery`, where weights stay as they are, and `repair`, where nothing else changes."""
        self._check(ctx)
        first = self._scored(graph, ctx)
        found = self._families(first, ctx)
        before, least = first.costs.before, least_shares(_open(found), first.costs)
        goal = self.budget.goal(before, least)
        numbers_count = self.max_drop is not None or self.steps > 1  # a stopwatch asks for widths alone

        def trial(amounts: Amounts) -> Graph:
            copy = graph.copy()
            for scored, narrowed in self._steps(copy, ctx, first, amounts):
                cut = self._cut(copy, ctx, scored, narrowed, self.repair and numbers_count)
                remove(copy, cut.removed)
                set_tensors(copy, scored.algebra, cut)
            return copy

        self.budget.search(goal, graph, ctx, before, least["macs"], trial)
        stays = {family.groups[0]: family.stays for family in found if family.stays}
        ledger = Ledger(graph, first.algebra, first.costs, found, {g.index: why for g, why in stays.items()})
        facts = {"criterion": self._criterion(ctx), "least": least, "frozen": _reasons(first.algebra)}
        tally = Tally(graph, ledger, goal.facts | facts)
        declines = [
            *(Decline(site, why) for site, why in goal.short),
            *(Decline(group.sites[0], why) for group, why in stays.items()),
            *(Decline(site, f"{count} channels stay: {why}") for site, why, count in first.algebra.frozen()),
        ]
        left = ctx.limit
        for scored, narrowed in self._steps(graph, ctx, first, goal.amounts):
            chosen = narrowed[:left]
            left = None if left is None else left - len(chosen)
            original = graph.copy()
            cut = self._cut(graph, ctx, scored, chosen, repair=self.repair)
            outcome = _surgery(graph, ctx, scored.algebra, chosen, cut.removed, tally)
            outcome.declines, declines = declines, []
            yield outcome
            if cut.tensors and ctx.calibration is not None:
                set_tensors(graph, scored.algebra, cut)
                yield _repair(graph, original, restate_norms(graph, ctx.calibration), cut)

    def _check(self, ctx: Context) -> None:
        if self.criterion == "reconstruct" and ctx.calibration is None:
            raise UsageError(
                "prune(criterion=reconstruct): needs calibration data: pass --calib, or take criterion=l2"
            )

    def _criterion(self, ctx: Context) -> str:
        """What `auto` stands for."""
        if self.criterion != "auto":
            return self.criterion
        return "l2" if ctx.calibration is None else "reconstruct"

    def _cut(
        self, graph: Graph, ctx: Context, scored: Scored, narrowed: Sequence[Family], repair: bool
    ) -> Rebuilt:
        """The groups that these families lose, and new weights where they are to be repaired."""
        if not repair or ctx.calibration is None or not narrowed:
            return Rebuilt(_removed(narrowed), {})
        losses, free = [family.removed for family in narrowed], bool(scored.eliminations)
        return rebuild(graph, scored.algebra, losses, free, ctx.calibration, ctx)

    def _scored(self, graph: Graph, ctx: Context) -> Scored:
        algebra = analyse(graph, carrier_of(graph, heads=self.attention == "heads"), norms=self.norms)
        if self._criterion(ctx) == "reconstruct" and ctx.calibration is not None:
            eliminations = survey(graph, algebra, ctx.calibration, ctx)
            nothing = np.zeros(1 + max((int(classes.max()) for classes in algebra.axes.values()), default=0))
            return Scored(algebra, costs_of(graph, algebra), nothing, eliminations)
        loss = imported(self.loss, "prune(loss=...)") if self.loss else None
        data = CriteriaData(ctx.calibration, ctx.seed, loss, ctx.progress)
        return Scored(
            algebra, costs_of(graph, algebra), importance(graph, algebra, self._criterion(ctx), data)
        )

    def _families(
        self, scored: Scored, ctx: Context, full: Mapping[tuple[Key, ...], int] = MappingProxyType({})
    ) -> list[Family]:
        multiple = self.align or ctx.target.channel_multiple
        found = families(
            scored.algebra, scored.costs, scored.importance, multiple, self.minimum, full, scored.eliminations
        )
        for family in found:
            family.stays = self._ignored(family)
            if not family.stays and family.curve is None and self._criterion(ctx) == "reconstruct":
                family.stays = (
                    "no layer with weights of its own reads them, by which reconstruct judges: criterion=l2 goes by "
                    "any weights"
                )
        return found

    def _steps(
        self, graph: Graph, ctx: Context, first: Scored, goal: Amounts
    ) -> Iterator[tuple[Scored, list[Family]]]:
        """What every step narrows, and by which analysis. It must be removed before the next step is asked for."""
        shrink = shrink_globally if self.scope == "global" else shrink_locally
        scored, full = first, {family.axes: family.full for family in self._families(first, ctx)}
        for number, amounts in enumerate(on_the_way(first.costs.before, goal, self.steps)):
            scored = self._scored(graph, ctx) if number else first
            found = self._families(scored, ctx, full)
            shrink(_open(found), scored.costs.fresh(), shares(amounts, scored.costs.before))
            yield scored, [family for family in found if family.removed]

    def _ignored(self, family: Family) -> str:
        sites = family.groups[0].sites
        pattern = next((p for p in self.ignore if any(fnmatchcase(site, p) for site in sites)), None)
        return f"ignored by '{pattern}'" if pattern is not None else ""


class Tally:
    """What all steps did together, for the report. facts: what is known before the first."""

    def __init__(self, graph: Graph, ledger: Ledger, facts: Mapping[str, Any]) -> None:
        self._before = {"macs": macs(graph), "params": parameters(graph)}
        self._ledger, self._facts = ledger, facts
        self._pruned = self._proved = 0

    def add(self, graph: Graph, algebra: Algebra, groups: Sequence[Group], proved: int) -> dict[str, Any]:
        """The facts after a step that took `groups` and left `graph`."""
        self._ledger.lose(algebra, groups)
        self._pruned, self._proved = self._pruned + len(groups), self._proved + proved
        entries = self._ledger.entries()
        now = {"macs": macs(graph), "params": parameters(graph)}
        left = {name: now[name] / amount if amount else 1.0 for name, amount in self._before.items()}
        return {
            **self._facts,
            **left,
            "groups": sum(entry.groups for entry in entries),
            "pruned": self._pruned,
            "proved_with_power": self._proved,
            "ledger": [entry.to_dict() for entry in entries],
        }


def _surgery(
    graph: Graph,
    ctx: Context,
    algebra: Algebra,
    narrowed: Sequence[Family],
    groups: Sequence[Group],
    tally: Tally,
) -> Outcome:
    """Removes what these families lost; the reference is the graph as it was, with the same channels masked."""
    inputs = next(iter(ctx.held_out.limited(POWER_SAMPLES))).inputs
    reference, powers = masked(graph, groups), power(graph, groups, inputs)
    tolerance = TOLERANCE.get(graph.results[0].meta["val"].dtype, TOLERANCE[torch.float32])
    remove(graph, groups)
    return Outcome(
        step="surgery",
        contract=MASKED,
        reference=reference,
        rewrites=[_rewrite(family) for family in narrowed],
        facts=tally.add(graph, algebra, groups, sum(p >= POWER * tolerance for p in powers)),
    )


def _repair(graph: Graph, original: Graph, norms: int, cut: Rebuilt) -> Outcome:
    """New weights are in place; the reference is the graph before anything was removed."""
    return Outcome(
        step="repair",
        contract=BOUNDED,
        reference=original,
        rewrites=[Rewrite(site, "solved anew for the channels that are left") for site in cut.repaired],
        declines=[
            Decline(site, f"solved in {parts} parts: its Gram matrix is over {MEMORY >> 20} MB")
            for site, parts in cut.parted.items()
        ],
        facts={"repaired": len(cut.repaired), "norms_restated": norms},
    )


def set_tensors(graph: Graph, algebra: Algebra, cut: Rebuilt) -> None:
    """Puts new weights into a graph that the groups have been removed from."""
    gone = algebra.removed(cut.removed)
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in cut.tensors:
            value = cut.tensors[str(node.target)]
            for axis, indices in gone.get(node.name, {}).items():
                left = np.setdiff1d(np.arange(value.shape[axis]), indices)
                value = value.index_select(axis, torch.from_numpy(left))
            graph.set_tensor(node, value)


def _open(found: Sequence[Family]) -> list[Family]:
    return [family for family in found if not family.stays]


def _removed(narrowed: Sequence[Family]) -> list[Group]:
    return [group for family in narrowed for group in family.removed]


def _rewrite(family: Family) -> Rewrite:
    first, *others = family.groups[0].sites
    where = f"{first} and {len(others)} more" if others else first
    return Rewrite(where, f"{family.width(len(family.groups))} -> {family.width(family.left)} channels")


def _reasons(algebra: Algebra) -> dict[str, int]:
    """How many groups cannot be removed, by reason."""
    counts: Counter[str] = Counter()
    for _, reason, number in algebra.frozen():
        counts[reason.split(" (")[0]] += number
    return dict(counts.most_common())
