"""Depth pruning: residual branches that matter least go as a whole, and the sums that added them go with them.

Which addends can go is read from the graph (`compressor/branches.py`); what each is worth is what the outputs lose
without it, on calibration data, once the layers behind have made up for it. The result must equal the original with
those branches times zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from compressor.branches import Branch, branches, bypass, imitate, masked
from compressor.budgets import Amounts, Budget
from compressor.errors import UsageError
from compressor.ir import Graph
from compressor.measure import bytes_of, parameters
from compressor.ops import macs
from compressor.pipeline import BOUNDED, MASKED, Context, Contract, Decline, Outcome, Pass, Rewrite, Size
from compressor.rebuild import Rebuilt, refit
from compressor.verify import Outputs, compare, observe

WORK = 1e12  # multiply-accumulates that ranking may take: half a minute or so
JUDGED = 3  # times that a branch is judged, about
STEP = 0.05  # share of the model that goes at once, or little more, where the budget is still to be found
LARGE = 0.2  # share of the model in one branch
LEAST_SAMPLES, MOST_SAMPLES = 8, 64
WORST = 1e6  # noise, relative to the outputs, of those that are not finite


@dataclass(frozen=True)
class Removal:
    """A branch, what is left of the model once it and all before it are gone, and how noisy the outputs are then.

    Where layers are to make up for them, about as noisy as the outputs will be.
    """

    branch: Branch
    left: Amounts
    noise: float


class Judged(NamedTuple):
    """A branch, what its going adds to the noise of the outputs and what it saves, when `gone` others are gone."""

    branch: Branch
    added: float
    saved: Amounts
    gone: int


@dataclass(frozen=True)
class Shorten(Pass):
    """Whole residual branches go, those that matter least first: blocks of a ResNet, attention or feed-forward of a
    transformer. Fewer operators are faster on any hardware, also where narrower ones are not.

    macs, params: share of the model's multiply-accumulates and of its numbers to keep; bare `shorten` is `macs=0.7`, or
    as near to it as the model allows. size_mb: megabytes (1e6 bytes) of all tensors. latency, latency_ms: share of the
    original's, or milliseconds, measured on shortened copies. sqnr: as few MACs as leave the outputs so many dB above
    their noise, on held-out samples. max_drop: how far the metric of --eval may fall. reach: a budget out of reach is
    an error that says what can be had; `best` goes as far as it gets.

    A branch is worth what the outputs lose without it, on calibration samples, for what it costs; as branches go, the
    others are judged anew. repair: the layers behind are solved anew, to give what they gave before: a step of its own,
    which states the loss. Branches are then judged with what those layers can make up for, about: an affine map of the
    stream that a branch joins stands in its place. ignore: module paths to leave alone, as in `ignore=layer4.*`.

    `distill` behind it wins back much of what is lost.
    """

    name: ClassVar[str] = "shorten"
    contract: ClassVar[Contract] = MASKED
    after: ClassVar[tuple[str, ...]] = ("merge",)

    macs: float | None = None
    params: float | None = None
    size_mb: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    sqnr: float | None = None
    max_drop: float | None = None
    reach: Literal["exact", "best"] = "exact"
    repair: bool = True
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """UsageError where it is none."""
        return Budget(
            self.macs, self.params, self.size_mb, self.latency, self.latency_ms, self.max_drop, self.sqnr,
            best=self.reach == "best", owner="shorten", hint="every branch gone that can go",
        )  # fmt: skip

    def plan(self, size: Size, graph: Graph, data: bool) -> tuple[Size, str]:
        self._check(data)
        return self.budget.plan(size)

    def run(self, graph: Graph, ctx: Context) -> Iterator[Outcome]:
        """Two outcomes: `surgery`, where weights stay as they are, and `repair`, where nothing else changes."""
        self._check(ctx.calibration is not None)
        before = _amounts(graph)
        least = self._least(graph)
        goal = self.budget.goal(before, {name: least[name] / max(before[name], 1) for name in before})
        order = self._order(graph, ctx, goal.amounts)
        heard = self.sqnr is not None or self.max_drop is not None

        def trial(amounts: Amounts) -> Graph:
            copy, chosen = graph.copy(), _chosen(order, amounts)
            tensors = self._repaired(copy, chosen, ctx).tensors if heard else {}
            _take_out(copy, chosen, tensors)
            return copy

        self.budget.search(goal, graph, ctx, before, least["macs"] / max(before["macs"], 1), trial)
        chosen = _chosen(order, goal.amounts)[: ctx.limit]
        original = graph.copy()
        rebuilt = self._repaired(graph, chosen, ctx)
        outcome = _surgery(graph, chosen, before, goal.facts)
        outcome.declines += [Decline(place, why) for place, why in goal.short]
        stays = "the budget is met at less loss elsewhere" if chosen else "no branch can go within the budget"
        outcome.declines += [Decline(one.site, self._ignored(one) or stays) for one in branches(graph)]
        yield outcome
        if rebuilt.tensors:
            _take_out(graph, [], rebuilt.tensors)
            yield Outcome(
                step="repair",
                contract=BOUNDED,
                reference=original,
                rewrites=[
                    Rewrite(place, "solved anew for what is in front of it") for place in rebuilt.repaired
                ],
                facts={"repaired": len(rebuilt.repaired)},
            )

    def _check(self, data: bool) -> None:
        if not data:
            raise UsageError(
                "shorten judges by what the outputs lose, on data, and none was given: pass --calib"
            )

    def _open(self, graph: Graph) -> list[Branch]:
        return [branch for branch in branches(graph) if not self._ignored(branch)]

    def _ignored(self, branch: Branch) -> str:
        pattern = next((p for p in self.ignore if fnmatchcase(branch.site, p)), None)
        return f"ignored by '{pattern}'" if pattern is not None else ""

    def _least(self, graph: Graph) -> Amounts:
        """What is left when all is gone that can go."""
        copy = graph.copy()
        while found := self._open(copy):
            bypass(copy, max(found, key=lambda branch: branch.macs))
        return _amounts(copy)

    def _order(self, graph: Graph, ctx: Context, goal: Amounts) -> list[Removal]:
        """Branches in the order in which they go, until the goal is met; all of them where it is still to be found.

        As branches go, the others are judged anew, lazily (Minoux, 1978): what one adds to the noise grows, so that
        the best by its old judgement, if it is still the best by its new one, is the best of all. Where layers are to
        make up for them, they are judged with what can be made up for in their place.
        """
        assert ctx.calibration is not None
        now, likely, found, judged = graph.copy(), graph.copy(), list[Removal](), dict[Branch, Judged]()
        all_of_it = _amounts(graph)
        large = {name: LARGE * amount for name, amount in all_of_it.items()}
        runs = 1.5 if self.repair else 1.0  # what is to be imitated is seen first, in half a run or so
        cost = runs * max(all_of_it["macs"], 1)  # of one sample
        samples = int(WORK / (cost * JUDGED * max(len(self._open(now)), 1)))
        batches = list(ctx.calibration.limited(min(max(samples, LEAST_SAMPLES), MOST_SAMPLES)))
        cost *= sum(batch.samples for batch in batches)
        expected, spent, noise, left = observe(graph, batches), 0.0, 0.0, all_of_it
        replace = partial(imitate, batches=batches) if self.repair else bypass
        with ctx.progress("shorten: judging branches", None):
            while not (goal and _met(left, goal)):
                there = self._open(now)
                for branch in there:
                    if branch not in judged:
                        twin = _with(likely, branch, replace)
                        louder = _noise(graph, expected, observe(twin, batches))
                        less = _amounts(_with(now, branch, bypass))
                        saved = {name: left[name] - less[name] for name in left}
                        judged[branch] = Judged(branch, max(louder - noise, 0.0), saved, len(found))
                        spent += cost
                wanted = {name: left[name] - goal[name] for name in goal if left[name] > goal[name]}
                wanted, most = (wanted, 1.0) if goal else ({"macs": STEP * all_of_it["macs"]}, math.inf)
                best = _best([judged[branch] for branch in there], wanted, most, large)
                if best is None:
                    break
                if best.gone < len(found) and spent < WORK:
                    del judged[best.branch]
                    continue
                bypass(now, best.branch)
                replace(likely, best.branch)
                noise, left = noise + best.added, _amounts(now)
                found.append(Removal(best.branch, left, noise))
        return found

    def _repaired(self, graph: Graph, chosen: Sequence[Removal], ctx: Context) -> Rebuilt:
        """New weights for the layers behind what goes; `graph` still has it, and stays as it is."""
        if not self.repair or not chosen or ctx.calibration is None:
            return Rebuilt([], {})
        gone = [graph.node(one.branch.total).args[one.branch.position] for one in chosen]
        return refit(graph, {}, ctx.calibration, ctx, dict.fromkeys(gone, torch.zeros_like))  # type: ignore[arg-type]


def _with(graph: Graph, branch: Branch, change: Callable[[Graph, Branch], None]) -> Graph:
    """A copy, changed at this branch."""
    copy = graph.copy()
    change(copy, branch)
    return copy


def _best(open_: Sequence[Judged], wanted: Amounts, most: float, large: Amounts) -> Judged | None:
    """The one that adds the least noise for what it saves: shares of all that is wanted, each counted up to `most`.

    What saves more than `large` of something, and than twice what is wanted of it, stays while there are others: the
    branch round a whole network, of super-resolution for one, is no way to save a tenth of it.
    """
    aims = {name: amount for name, amount in wanted.items() if any(one.saved[name] > 0 for one in open_)}
    if not aims:  # calls of shared weights: the last one saves them
        aims = {"macs": max((one.saved["macs"] for one in open_), default=0.0)}

    def fits(one: Judged, name: str) -> bool:
        least = min((other.saved[name] for other in open_ if other.saved[name] > 0), default=0.0)
        return 0 < one.saved[name] <= max(2 * aims[name], large[name], 1.5 * least)

    def price(one: Judged) -> tuple[float, float]:
        share = sum(min(one.saved[name] / amount, most) for name, amount in aims.items())
        return one.added / share, -share

    fitting = (one for one in open_ if any(fits(one, name) for name in aims))
    return min(fitting, key=price, default=None)


def _amounts(graph: Graph) -> dict[str, float]:
    return {"macs": macs(graph), "params": parameters(graph), "bytes": bytes_of(graph)}


def _met(left: Amounts, goal: Amounts) -> bool:
    return all(left[name] <= amount for name, amount in goal.items())


def _chosen(order: Sequence[Removal], amounts: Amounts) -> list[Removal]:
    """As few as meet the amounts, or all."""
    if not amounts:
        return []
    count = next((i for i, one in enumerate(order, 1) if _met(one.left, amounts)), len(order))
    return list(order[:count])


def _noise(graph: Graph, expected: Sequence[Outputs], seen: Sequence[Outputs]) -> float:
    """Mean over the outputs of noise over signal; what of whole numbers is another counts as it is."""
    found = [
        c.error if c.discrete else 10 ** (-c.sqnr_db / 10) if c.finite else WORST
        for c in compare(graph, expected, seen)
        if not c.slice
    ]
    return sum(min(one, WORST) for one in found) / max(len(found), 1)


def _take_out(graph: Graph, chosen: Sequence[Removal], tensors: Mapping[str, Any]) -> None:
    for one in chosen:
        bypass(graph, one.branch)
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in tensors:
            graph.set_tensor(node, tensors[str(node.target)])


def _surgery(graph: Graph, chosen: Sequence[Removal], before: Amounts, facts: Mapping[str, Any]) -> Outcome:
    """Takes the branches out; the reference is the graph as it was, with these branches times zero."""
    reference = masked(graph, [one.branch for one in chosen])
    _take_out(graph, chosen, {})
    after = _amounts(graph)
    left = {name: after[name] / before[name] if before[name] else 1.0 for name in ("macs", "params")}
    gone = [
        {"site": one.branch.site, "macs": one.branch.macs, "noise_db": _decibels(one.noise)} for one in chosen
    ]
    return Outcome(
        step="surgery",
        reference=reference,
        rewrites=[Rewrite(one.branch.site, _words(one.branch)) for one in chosen],
        facts={**facts, **left, "branches": gone},
    )


def _words(branch: Branch) -> str:
    layers = f"{len(branch.sites)} layer{'s' * (len(branch.sites) > 1)}"
    return f"the branch goes: {layers}, {branch.macs / 1e6:.3g}M MACs"


def _decibels(noise: float) -> float:
    return round(-10 * math.log10(max(noise, 1e-30)), 2)
