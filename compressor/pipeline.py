"""Passes, the spec string that names them, and the pipeline that holds each of them to its contract."""

from __future__ import annotations

import dataclasses
import math
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Node

from . import jitter, verify
from .constants import is_random
from .data import Data
from .errors import ContractError, DataError, UsageError
from .ir import Graph
from .measure import bytes_of, parameters, peak_memory_mb
from .names import operator_name, site
from .ops import macs
from .spec import arrange, parse
from .target import Target
from .verify import BOUNDED, EXACT, MASKED, Contract

__all__ = [
    "BOUNDED",
    "EXACT",
    "MASKED",
    "Context",
    "Contract",
    "Decline",
    "Outcome",
    "Pass",
    "Pipeline",
    "Rewrite",
    "Row",
    "Size",
    "arrange",
    "parse",
]


@dataclass(frozen=True)
class Rewrite:
    """One change that a pass made: where (module path) and what (`batch_norm into conv2d`)."""

    site: str
    what: str


@dataclass(frozen=True)
class Decline:
    """One change that a pass considered and left: where, and the reason that a user reads."""

    site: str
    reason: str

    @classmethod
    def at(cls, node: Node, reason: str) -> Decline:
        return cls(f"{site(node)} ({operator_name(node)})", reason)


@dataclass
class Outcome:
    """What one step of a pass did.

    rewrites: what changed; empty means that the graph is as it was, which is checked. declines: what stayed, and why.
    step: its name in errors, where a pass has several. contract: how this step's numbers are judged, the pass's own if
    None. reference: the graph to compare with where
    that is not the graph before the step: the original with masks at its readers (`masked`), or the graph before an
    earlier step, whose loss this one is to mend (`bounded`). facts: small plain data for the report.
    """

    rewrites: list[Rewrite] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    contract: Contract | None = None
    reference: Graph | None = None
    step: str = ""


@dataclass(frozen=True)
class Context:
    """Everything a pass may know besides the graph. Nothing ambient: no globals, no environment.

    calibration: stream of batches for statistics, None if the user gave none. lessons: all that may be learned from,
    which can be many times more; the same where it is None. held_out: batches that neither may see. limit: apply at
    most so many rewrites. progress: called with a title and a total, a context manager that yields `advance(n)`.
    measure: called with graphs, median milliseconds of one run of each, in turns; None where measuring is switched off,
    or the target is elsewhere and nobody said how to measure there.
    latency: the same for a budget that the user gave in time, which is taken here if it must be. timed_on: where.
    evaluate: the user's metric of a graph, higher is better; None where the user named none.
    original: the graph before the first pass, to run and not to edit; for passes that say `learns`, else None.
    """

    target: Target
    held_out: Data
    calibration: Data | None = None
    seed: int = 0
    limit: int | None = None
    measure: Callable[..., list[float]] | None = None
    original: Graph | None = None
    latency: Callable[..., list[float]] | None = None
    timed_on: str = "this host"
    evaluate: Callable[[Graph], float] | None = None
    progress: Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]] = (
        lambda title, total: nullcontext(lambda n: None)
    )
    lessons: Data | None = None


@dataclass(frozen=True)
class Size:
    """What a model is made of: numbers in its tensors, multiply-accumulates of one sample, bytes of its tensors."""

    params: float
    macs: float
    bytes: float

    def times(self, share: float) -> Size:
        return Size(self.params * share, self.macs * share, self.bytes * share)


class Pass:
    """Base of all passes: a frozen dataclass whose fields are its whole configuration.

    after: passes that must stand before it in a spec when both are there. requires: passes that are inserted before
    it when they are missing. learns: it reads `Context.original`.

    run edits `graph` through its verbs and returns an Outcome, or yields several steps.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    after: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()
    learns: ClassVar[bool] = False

    def run(self, graph: Graph, ctx: Context) -> Outcome | Iterator[Outcome]:
        raise NotImplementedError

    def plan(self, size: Size, graph: Graph, data: bool) -> tuple[Size, str]:
        """For --dry-run: what would be left of `size`, an estimate, and in words the rule behind it.

        graph: the model as it comes, before any pass. data: whether there would be calibration data. UsageError where
        the pass would refuse to run.
        """
        return size, "what it saves cannot be told before it runs"

    def __str__(self) -> str:
        changed = [
            f"{f.name}={_show(getattr(self, f.name))}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"({','.join(changed)})" if changed else "")


# -------------------------------------------------------------------- running


@dataclass
class Row:
    """What one pass did, as the report shows it. bytes: of all tensors; macs: of one sample.

    total_db: worst output SQNR against the model as it came, after this and all earlier passes; infinite where
    nothing differs. total_cosine, total_agreement: the same of cosines and of equal top-1 indices. They are stated, not
    judged: each pass answers for its own step.
    """

    name: str
    config: str
    contract: str
    status: str
    params: int
    macs: int
    bytes: int
    checks: list[verify.Check] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    metric: dict[str, float] = field(default_factory=dict)
    total_db: float = math.inf
    total_cosine: float = 1.0
    total_agreement: float = 1.0
    seconds: float = 0.0
    peak_mb: float = 0.0

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Row:
        """The row that `to_dict` made this of."""
        own = {f.name: plain[f.name] for f in dataclasses.fields(cls) if f.name in plain}
        own["checks"] = [verify.Check.of(one) for one in own["checks"]]
        own["rewrites"] = [Rewrite(**one) for one in own["rewrites"]]
        own["declines"] = [Decline(**one) for one in own["declines"]]
        return cls(name=plain["pass"], **own)

    def to_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["pass"] = plain.pop("name")
        plain["checks"] = [c.to_dict() for c in self.checks]
        for key in ("rewrites", "declines"):
            plain[key] = [dataclasses.asdict(entry) for entry in plain[key]]
        return plain


class Memory:
    """Where graphs between passes are kept, so that a run with the same first passes begins behind them.

    This one keeps nothing.
    """

    def recall(self, passes: Sequence[Pass], graph: Graph) -> tuple[Graph, list[Row]] | None:
        """The graph behind the longest kept beginning of `passes`, and its rows, the input's among them."""
        return None

    def keep(self, passes: Sequence[Pass], rows: Sequence[Row], graph: Graph) -> None:
        """Called after every pass but the last, with the passes so far."""


class Pipeline:
    """Runs passes in order over one graph, and checks the contract of each on held-out samples.

    tolerance overrides the one of `exact` and `masked`. limits: pass name -> apply only its first N rewrites.
    stop_after: name of the last pass to run. after(row, graph) is called after every pass.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        registry: Mapping[str, type[Pass]],
        *,
        tolerance: float | None = None,
        limits: Mapping[str, int] = types.MappingProxyType({}),
        stop_after: str | None = None,
        after: Callable[[Row, Graph], None] = lambda row, graph: None,
    ) -> None:
        self.passes, self.inserted = arrange(passes, registry)
        for name in [*limits, *([stop_after] if stop_after else [])]:
            if not any(p.name == name for p in self.passes):
                raise UsageError(
                    f"'{name}' is not among the passes of this run: {','.join(map(str, self.passes))}"
                )
        self.tolerance, self.limits, self.stop_after, self.after = tolerance, limits, stop_after, after
        self.seen: list[verify.Outputs] = []  # what the graph of the last run makes of each held-out batch

    def run(self, graph: Graph, ctx: Context, memory: Memory | None = None) -> list[Row]:
        """Edits `graph` in place; a row for the input and one for every pass. ContractError names pass and operator."""
        rows = [_row("input", "", "", "", graph)]
        self.after(rows[0], graph)
        try:
            judge = _Judge(graph, ctx.held_out, self.tolerance)
        except (IndexError, RuntimeError) as error:
            first = str(error).strip().split("\n")[0]
            raise DataError(f"{ctx.held_out.description}: the model does not run on it: {first}") from error
        if any(one.learns for one in self.passes):  # only then: it keeps tensors that passes have replaced
            ctx = dataclasses.replace(ctx, original=graph.copy())
        graph.lineage, graph.ancestors = {}, {}
        if memory is not None and (known := memory.recall(self.passes, graph)) is not None:
            before, rows = known
            graph.become(before)
            judge.resume(graph)
        for done, one in enumerate(self.passes[len(rows) - 1 :], len(rows)):
            start = time.perf_counter()
            with ctx.progress(str(one), None):
                row = self._apply(
                    one, graph, dataclasses.replace(ctx, limit=self.limits.get(one.name)), judge
                )
            row.seconds, row.peak_mb = time.perf_counter() - start, peak_memory_mb()
            rows.append(row)
            self.after(row, graph)
            if one.name == self.stop_after:
                break
            if memory is not None and done < len(self.passes):
                memory.keep(self.passes[:done], rows, graph)
                graph.become(graph.copy())  # names that come later are those after a recall
        self.seen = judge.last
        return rows

    def _apply(self, one: Pass, graph: Graph, ctx: Context, judge: _Judge) -> Row:
        row = _row(one.name, str(one), one.contract.name, "unchanged", graph)
        contracts: list[str] = []  # of its steps
        judge.begin(graph)
        result = one.run(graph, ctx)
        row.total_db, row.total_cosine, row.total_agreement = judge.total
        for outcome in [result] if isinstance(result, Outcome) else result:
            row.rewrites += outcome.rewrites
            row.declines += outcome.declines
            graph.clean()
            graph.check()
            contract = judge.holdable(outcome.contract or one.contract)
            where = f"pass {one.name}" + (f" ({outcome.step})" if outcome.step else "")
            status, checks = judge.step(graph, contract, outcome, where)
            row.facts |= outcome.facts
            if status != "unchanged":
                contracts.append(contract.name)
                row.contract = ", ".join(dict.fromkeys(contracts))
                row.status = _worse(row.status, status)
                row.checks = sorted([*row.checks, *checks], key=lambda c: (c.finite, -c.error))
                row.total_db, row.total_cosine, row.total_agreement = judge.total
        row.params, row.macs, row.bytes = parameters(graph), macs(graph), bytes_of(graph)
        return row


class _Judge:
    """Holds the reference of every check: outputs of the model as it came, and of the graph before the step."""

    def __init__(self, graph: Graph, held_out: Data, tolerance: float | None) -> None:
        self.batches = list(held_out)
        self.tolerance = tolerance
        self.original = self.last = verify.observe(graph, self.batches)
        self.precise = verify.observe_precisely(graph, self.batches)
        again = verify.observe(graph, self.batches[:1])
        # Draws are the same in every run of a graph, but not in half precision and in single.
        self.deterministic = not (self.precise is not None and any(map(is_random, graph.nodes))) and all(
            c.error == 0 and c.finite for c in verify.compare(graph, self.original[:1], again)
        )
        self.before = graph
        self.total = math.inf, 1.0, 1.0  # see Row

    def resume(self, graph: Graph) -> None:
        """Goes on behind passes that were judged in another run."""
        self.last = verify.observe(graph, self.batches)
        self._sum_up(graph, self.last)

    def begin(self, graph: Graph) -> None:
        self.before = graph.copy()
        graph.turn_page()

    def holdable(self, contract: Contract) -> Contract:
        """The contract, or `bounded` where the model gives other outputs from run to run."""
        return contract if self.deterministic else BOUNDED

    def step(
        self, graph: Graph, contract: Contract, outcome: Outcome, where: str
    ) -> tuple[str, list[verify.Check]]:
        if not outcome.rewrites:
            if graph.text() != self.before.text() or graph.journal.changed:
                raise ContractError(f"{where} changed the graph and did not say so")
            self.begin(graph)
            return "unchanged", []
        base = self.before if outcome.reference is None or contract is EXACT else outcome.reference
        seen = verify.observe(graph, self.batches)
        try:
            status, checks = self._judge(base, graph, contract, seen, where)
        except ContractError:
            if contract is BOUNDED or not verify.is_single(graph):
                raise
            status, checks, words = self._judge_in_double(base, graph, contract, where)
            outcome.facts["checked_in"] = f"float64: {words}"
        self.last = seen
        self._sum_up(graph, seen)
        self.begin(graph)
        return status, checks

    def _sum_up(self, graph: Graph, seen: list[verify.Outputs]) -> None:
        whole = verify.compare(graph, self.original, seen)
        floats = [c for c in whole if not c.discrete]
        self.total = (
            min((c.sqnr_db for c in floats), default=math.inf),
            min((c.cosine for c in floats), default=1.0),
            min((c.agreement for c in whole if c.agreement is not None), default=1.0),
        )

    def _judge(
        self, base: Graph, graph: Graph, contract: Contract, seen: list[verify.Outputs], where: str
    ) -> tuple[str, list[verify.Check]]:
        reference, wrong, tolerance, floor = self.last, None, self.tolerance, verify.FAIL_DB
        if base is not self.before:
            reference, wrong = verify.observe(base, self.batches), self.last
            # What an earlier step lost is not this one's to answer for, unless it makes it worse.
            lost = [c.sqnr_db for c in verify.compare(base, reference, wrong) if not c.discrete]
            floor = min([floor, *lost])
        if contract is EXACT and self.precise is not None:
            reference, tolerance = self.precise, verify.half_tolerance(graph, self.precise, self.last)
        checks = verify.compare(base, reference, seen, wrong, tolerance)
        return self._conclude(base, graph, contract, checks, where, floor)

    def _judge_in_double(
        self, base: Graph, graph: Graph, contract: Contract, where: str
    ) -> tuple[str, list[verify.Check], str]:
        """The same promise, both graphs computed in float64; and words for why.

        A deep network amplifies the rounding of its own float32 arithmetic; what a pass did to it shows here alone.
        Where it amplifies that of its weights, too, it is held to what one more rounding of them does (`jitter`).
        """
        before = base
        base, after = verify.widened(base, torch.float64), verify.widened(graph, torch.float64)
        wrong = [tuple(t.double() if t.is_floating_point() else t for t in one) for one in self.last]
        checks = verify.compare(
            base,
            verify.observe(base, self.batches),
            verify.observe(after, self.batches),
            wrong if contract is MASKED else None,
            self.tolerance or verify.TOLERANCE[torch.float32],
        )
        try:
            words = "float32 rounds more than the tolerance"
            return *self._conclude(base, after, contract, checks, where), words
        except ContractError:
            if contract is not EXACT or self.tolerance is not None:
                raise
            errors = jitter.errors(before, [batch.inputs for batch in self.batches])
            checks = jitter.allowed(checks, errors, jitter.ONCE)
            words = f"rounding its weights once moves this network by {max(errors.values()):.0e} of its scale"
            return *self._conclude(base, after, contract, checks, where), words

    def _conclude(
        self, base: Graph, graph: Graph, contract: Contract, checks: list[verify.Check], where: str,
        floor: float = verify.FAIL_DB,
    ) -> tuple[str, list[verify.Check]]:  # fmt: skip
        """Status and checks; ContractError names the first operator whose value went wrong."""
        inside = verify.Inside()
        if contract is not BOUNDED:
            sample = [
                t[:4] if t.dim() and isinstance(s.shape[0], str) else t
                for t, s in zip(self.batches[0].inputs, graph.inputs, strict=True)
            ]
            tolerances = [c.tolerance for c in checks if not c.discrete]
            loosest = max(tolerances, default=verify.TOLERANCE[torch.float32])
            inside = verify.look_inside(base, graph, sample, 10 * loosest)
        try:
            status = verify.judge(contract, checks, where, floor)
        except ContractError as error:
            raise ContractError(f"{error}{_culprit(inside.wrong)}") from None
        if inside.wrong is not None and self.precise is None:
            raise ContractError(f"{where}: a value inside is wrong{_culprit(inside.wrong)}")
        if contract is EXACT and inside.proves:
            status = "proved"
        return status, checks


def _culprit(found: verify.ValueCheck | None) -> str:
    return "" if found is None else f"; first bad operator: {found}"


def _row(name: str, config: str, contract: str, status: str, graph: Graph) -> Row:
    return Row(name, config, contract, status, parameters(graph), macs(graph), bytes_of(graph))


def _worse(a: str, b: str) -> str:
    order = ("unchanged", "proved", "warned", "not proved")
    return max(a, b, key=order.index)


def _show(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
