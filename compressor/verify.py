"""Contracts: what a pass promises about the numbers, and how the promise is checked, with power.

`exact`: the same outputs to float tolerance, and every value that the pass claims to have kept, each at its own scale.
`masked`: the outputs of the original with the removed channels masked at their readers.
`bounded`: a measured loss: the signal-to-quantisation-noise ratio (SQNR) of every output and every slice of it.

Error is max|a - b| / max|reference|, per output and per slice along every axis that a concat built: one scale over
boxes and scores would hide a dead detector. Power is how far a wrong answer would have moved the same number; a check
whose power is under 100 tolerances proves nothing and says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node

from .constants import ancestors, is_uninitialised
from .data import Batch
from .errors import ContractError
from .ir import Graph
from .names import operator_name, site, source_line
from .ops import is_tensor, kind
from .slices import Region, float_feeders, index, regions, text

WARN_DB, FAIL_DB = 20.0, 6.0
POWER = 100.0  # a check counts as proof when a wrong answer would have shown at this many tolerances
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EMITTED = 1e-4  # emitted float model against the graph
SIMULATION_DB = 30.0  # emitted integer model against its simulation
_BLOCK = 1 << 20  # numbers that are compared in float64 at once: 8 MB each
FLIPS = 0.02  # share of whole numbers that may differ where the floats that they were made from agree: ties
ROUNDED_FLIPS = 5  # times as many where these floats went through integers


@dataclass(frozen=True)
class Contract:
    """`exact`, `masked` or `bounded`; see the module."""

    name: str


EXACT = Contract("exact")
MASKED = Contract("masked")
BOUNDED = Contract("bounded")

HALF = (torch.float16, torch.bfloat16)
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Check:
    """The numbers of one output, or of one slice of it (`[:, 0:4]`), over all samples seen.

    error and power are relative to max|reference|; sqnr_db is infinite where nothing differs; agreement is the share
    of equal top-1 indices along the last axis (of equal elements for integers), None where that means nothing.
    discrete: whole numbers or truth values; their error is the share that differs.
    """

    output: str
    slice: str
    error: float
    tolerance: float
    power: float
    sqnr_db: float
    cosine: float
    agreement: float | None
    finite: bool
    discrete: bool = False

    @property
    def proves(self) -> bool:
        """Another sample's answer would have shown: any other whole number, a float that is so many tolerances off."""
        return self.power > 0 if self.discrete else self.power >= POWER * self.tolerance

    def flips_within(self, rounded: bool) -> bool:
        """Whether no more whole numbers differ than may. rounded: their floats were rounded to integers on the way."""
        return self.error <= (ROUNDED_FLIPS if rounded else 1) * self.tolerance

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Check:
        """The check that `to_dict` made this of."""
        numbers = ("error", "tolerance", "power", "sqnr_db", "cosine")
        values: dict[str, Any] = {
            name: float("nan" if value is None else value) if name in numbers else value
            for name, value in plain.items()
        }
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return {k: json_number(v) for k, v in asdict(self).items()}


class Comparison:
    """Streams pairs of outputs and sums up what differs, per output and slice, in float64."""

    def __init__(
        self, names: Sequence[str], regions: Sequence[Sequence[Region]], flips: Sequence[float] = ()
    ) -> None:
        self._sums: dict[tuple[int, int], _Sums] = {}
        self._names = list(names)
        self._regions = [[{}, *r] for r in regions]
        self._before: Outputs = ()
        self._flips = [*flips, *[0.0] * len(self._names)]

    def update(self, reference: Outputs, seen: Outputs, wrong: Outputs | None = None) -> None:
        """wrong: what an answer that must fail would have been; the reference of another sample if None."""
        before, self._before = self._before, reference
        for i, (ref, got) in enumerate(zip(reference, seen, strict=True)):
            if tuple(ref.shape) != tuple(got.shape):
                raise ContractError(
                    f"output {self._names[i]} has shape {list(got.shape)}, expected {list(ref.shape)}"
                )
            other = wrong[i] if wrong is not None else _another_sample(ref, before[i] if before else None)
            for j, region in enumerate(self._regions[i]):
                part = index(region, ref.dim())
                self._sums.setdefault((i, j), _Sums()).update(
                    ref[part], got[part], other[part] if other is not None else None
                )

    def checks(self, tolerance: float | None = None) -> list[Check]:
        """One Check an output and slice, worst error first. tolerance None: by the output's dtype."""
        found = [
            sums.check(self._names[i], text(self._regions[i][j]), tolerance, self._flips[i])
            for (i, j), sums in self._sums.items()
        ]
        return sorted(found, key=lambda c: (c.finite, -c.error, c.sqnr_db))


def _another_sample(value: Tensor, before: Tensor | None) -> Tensor | None:
    """The value with its samples in another order; where it has only one, the value of the batch before."""
    if value.dim() and value.shape[0] > 1:
        return value.roll(1, 0)
    return before if before is not None and before.shape == value.shape else None


class _Sums:
    def __init__(self) -> None:
        self.diff = self.scale = self.moved = self.noise = self.signal = self.dot = self.other = 0.0
        self.equal = self.count = 0
        self.finite, self.ranked = True, False
        self.dtype = torch.float32

    def update(self, ref: Tensor, got: Tensor, wrong: Tensor | None) -> None:
        self.dtype = ref.dtype
        self._rank(ref, got)
        flat = [None if t is None else t.reshape(-1) for t in (ref, got, wrong)]
        for start in range(0, ref.numel(), _BLOCK):
            a, b, c = (None if t is None else t[start : start + _BLOCK].double() for t in flat)
            self._add(a, b, c)  # type: ignore[arg-type]

    def _add(self, a: Tensor, b: Tensor, wrong: Tensor | None) -> None:
        if not _same_infinities(a, b):
            self.finite = False
        a, b = (torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in (a, b))
        delta = a - b
        self.diff = max(self.diff, float(delta.abs().max()))
        self.scale = max(self.scale, float(a.abs().max()))
        self.noise += float(delta.square().sum())
        self.signal += float(a.square().sum())
        self.dot += float((a * b).sum())
        self.other += float(b.square().sum())
        if wrong is not None:
            self.moved = max(self.moved, float(torch.nan_to_num(a - wrong, 0.0, 0.0, 0.0).abs().max()))

    def _rank(self, ref: Tensor, got: Tensor) -> None:
        if not ref.dtype.is_floating_point:
            self.ranked = True
            self.equal += int((ref == got).sum())
            self.count += ref.numel()
        elif ref.dim() == 2 and ref.shape[1] > 1:
            self.ranked = True
            self.equal += int((ref.argmax(1) == got.argmax(1)).sum())
            self.count += ref.shape[0]

    def check(self, name: str, region: str, tolerance: float | None, flips: float) -> Check:
        scale = self.scale or 1.0
        norm = math.sqrt(self.signal * self.other)
        discrete = not self.dtype.is_floating_point
        if discrete:
            tolerance = flips
        elif tolerance is None:
            tolerance = max(TOLERANCE.get(self.dtype, 0.0), flips)
        return Check(
            output=name,
            slice=region,
            error=1 - self.equal / max(self.count, 1) if discrete else self.diff / scale,
            tolerance=tolerance,
            power=self.moved / scale,
            sqnr_db=10 * math.log10(self.signal / self.noise)
            if self.noise and self.signal
            else (math.inf if not self.noise else -math.inf),
            cosine=self.dot / norm if norm else float(self.noise == 0),
            agreement=self.equal / self.count if self.ranked and self.count else None,
            finite=self.finite,
            discrete=discrete,
        )


def _same_infinities(a: Tensor, b: Tensor) -> bool:
    """NaN, inf and -inf stand in the same places; one is not as good as another."""
    return all(torch.equal(f(a), f(b)) for f in (torch.isnan, torch.isposinf, torch.isneginf))


# -------------------------------------------------------------------- what is compared


class Observer:
    """Outputs of a graph, plus the floats that feed each output that a discretising operator made (argmax, >).

    flips: of whole numbers, the share that may differ; of floats that were computed with less precision than they are
    handed over with, what that precision rounds.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = list(graph.results)
        self.names = list(graph.outputs)
        self.flips = [0.0] * len(self.names)
        for i, (name, node) in enumerate(zip(graph.outputs, graph.results, strict=True)):
            if is_tensor(node) and not node.meta["val"].dtype.is_floating_point:
                feeders = float_feeders(node)
                self.flips[i] = FLIPS if feeders else 0.0
                self.nodes += feeders
                self.names += [f"{name} (from {site(f)})" for f in feeders]
            elif is_tensor(node) and node.meta["val"].dtype == torch.float64:
                rounded = any(_is_coarse(n) for n in ancestors(node))
                self.flips[i] = TOLERANCE[torch.float32] if rounded else 0.0
        self.regions = [regions(n) for n in self.nodes]

    def run(self, inputs: Sequence[Tensor]) -> Outputs:
        wanted = set(self.nodes)
        found = {node: value for node, value in self.graph.values(*inputs) if node in wanted}
        return tuple(found[n] for n in self.nodes)

    def comparison(self, width: int) -> Comparison:
        """Of the first `width` of what it sees."""
        return Comparison(self.names[:width], self.regions[:width], self.flips)


def _is_coarse(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def observe(graph: Graph, batches: Iterable[Batch]) -> list[Outputs]:
    """Everything that a check compares, batch by batch; only outputs are kept."""
    observer = Observer(graph)
    return [tuple(map(graph.keep, observer.run(batch.inputs))) for batch in batches]


def observe_precisely(graph: Graph, batches: Iterable[Batch]) -> list[Outputs] | None:
    """What a graph that computes in half precision would give in float32; None for a graph that does not."""
    if not any(map(_half, graph.nodes)):
        return None
    return observe(widened(graph, torch.float32), batches)


def is_single(graph: Graph) -> bool:
    """True where float outputs are float32, and nothing on the way is rounded, to integers or to half precision.

    Half precision on the way to float32 outputs is their own business; where outputs are no floats, all of it counts.
    """
    if any(kind(node) == "quantize" for node in graph.nodes):
        return False
    dtypes = {n.meta["val"].dtype for n in graph.results if is_tensor(n)}
    floats = {d for d in dtypes if d.is_floating_point}
    return floats == {torch.float32} or not (floats or any(_half(n) for n in graph.nodes))


def _half(node: Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype in HALF


def widened(graph: Graph, dtype: torch.dtype) -> Graph:
    """A copy that computes in `dtype` wherever `graph` computes in a narrower float. For running only.

    A weight is widened in front of each of its readers, so that only those in use take the room.
    """
    narrow = {d for d in (*HALF, torch.float32) if torch.finfo(d).eps > torch.finfo(dtype).eps}

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.dtype in narrow else value
        return dtype if isinstance(value, torch.dtype) and value in narrow else value

    twin = graph.copy()
    twin.inputs = tuple(replace(i, dtype=wide(i.dtype)) for i in twin.inputs)
    born = set(graph.journal.born)
    for node in twin.nodes:
        if node.op == "get_attr" and twin.tensor(node).dtype in narrow:
            born |= {_cast(twin, node, user, dtype) for user in list(node.users)}
        elif node.op == "call_function":
            args, kwargs = pytree.tree_map(wide, (node.args, node.kwargs))
            if kind(node) == "create" and node.meta["val"].dtype in narrow:  # by default, where none is given
                kwargs = {**kwargs, "dtype": dtype}
            twin.set_args(node, tuple(args), dict(kwargs))
    twin.journal = replace(graph.journal, born=born)
    return twin


def _cast(graph: Graph, node: Node, user: Node, dtype: torch.dtype) -> str:
    """Puts a cast between a tensor and one of its readers; answers its name."""
    with graph.graph.inserting_before(user):
        target, name = torch.ops.aten._to_copy.default, f"{node.name}_widened"
        cast = graph.graph.create_node("call_function", target, (node,), {"dtype": dtype}, name=name)
    cast.meta = dict(node.meta)
    user.replace_input_with(node, cast)
    return cast.name


def half_tolerance(graph: Graph, precise: Sequence[Outputs], before: Sequence[Outputs]) -> float:
    """2 x the error that the half-precision graph had before the step, plus one rounding."""
    dtypes = {n.meta["val"].dtype for n in graph.results if is_tensor(n)}
    rounding = max((TOLERANCE[d] for d in dtypes if d.is_floating_point), default=0.0)
    half = max((float(torch.finfo(d).eps) for d in dtypes if d in HALF), default=rounding)
    return 2 * max(c.error for c in compare(graph, precise, before)) + half


def compare(
    graph: Graph,
    reference: Sequence[Outputs],
    seen: Sequence[Outputs],
    wrong: Sequence[Outputs] | None = None,
    tolerance: float | None = None,
) -> list[Check]:
    """Checks of outputs that `observe` kept; names and slices come from `graph`."""
    observer = Observer(graph)
    width = min(len(observer.names), *(len(r) for r in (*reference, *seen)))
    comparison = observer.comparison(width)
    for i, (ref, got) in enumerate(zip(reference, seen, strict=True)):
        comparison.update(ref[:width], got[:width], wrong[i][:width] if wrong is not None else None)
    return comparison.checks(tolerance)


def compare_each(
    graph: Graph, others: Mapping[str, Graph], batches: Iterable[Batch]
) -> dict[str, list[Check]]:
    """Checks of several graphs against one, by name; no outputs are kept."""
    observer = Observer(graph)
    observers = {name: Observer(other) for name, other in others.items()}
    width = min(len(one.names) for one in (observer, *observers.values()))
    comparisons = {name: observer.comparison(width) for name in others}
    for batch in batches:
        reference = observer.run(batch.inputs)[:width]
        for name, other in observers.items():
            comparisons[name].update(reference, other.run(batch.inputs)[:width])
    return {name: comparison.checks() for name, comparison in comparisons.items()}


def judge(contract: Contract, checks: Sequence[Check], where: str, floor: float = FAIL_DB) -> str:
    """`proved`, `not proved` or `warned`; ContractError where the promise is broken.

    `where` opens the message, as in `pass fold`. floor: SQNR in dB under which `bounded` fails.
    """
    for check in checks:
        place = f"{where}: output {check.output}{check.slice}"
        if not check.finite:
            raise ContractError(f"{place} has NaN or inf where the reference has none")
        if contract is BOUNDED:
            if check.sqnr_db < floor and not check.discrete:
                raise ContractError(
                    f"{place} is at {check.sqnr_db:.1f} dB SQNR of the original, under the floor of {floor:.3g} dB"
                )
        elif not check.error <= check.tolerance:
            raise ContractError(
                f"{place} differs by {check.error:.2e} of its scale, {check.tolerance:.0e} is allowed"
            )
    if contract is BOUNDED:
        if any(c.sqnr_db < WARN_DB for c in checks if not c.discrete):
            return "warned"
        moved = all(
            c.power >= POWER * TOLERANCE[torch.float32] for c in checks if not c.slice and not c.discrete
        )
        return "proved" if moved else "not proved"
    return "proved" if all(c.proves for c in checks if not c.slice and not c.discrete) else "not proved"


# -------------------------------------------------------------------- values inside


@dataclass(frozen=True, eq=False)
class ValueCheck:
    """One value inside the graph against the value it claims to be, relative to that value's own scale.

    power: how far the value of another sample would have been from it.
    """

    where: Node
    error: float
    power: float
    reference: Tensor
    value: Tensor

    @property
    def node(self) -> str:
        return self.where.name

    @property
    def site(self) -> str:
        return site(self.where)

    @property
    def operator(self) -> str:
        return operator_name(self.where)

    def __str__(self) -> str:
        line = source_line(self.where)
        return (
            f"{self.operator} at {self.site}{f', {line}' if line else ''}: "
            f"expected {summary(self.reference)}; seen {summary(self.value)} (error {self.error:.1e})"
        )


def compare_values(before: Graph, after: Graph, inputs: Sequence[Tensor]) -> Iterator[ValueCheck]:
    """Every value that `after` claims to share with `before`, in the order of `after`.

    Pairs come from the journal, and from names that both graphs have and no verb made; sliced axes are followed
    through `journal.kept`.
    """
    journal = after.journal
    there = {n.name for n in before.graph.nodes if is_tensor(n)}
    floats = {
        n.name
        for n in after.graph.nodes
        if is_tensor(n) and n.meta["val"].dtype.is_floating_point and not is_uninitialised(n)
    }
    pairs = {new: old for old, new in journal.equal.items() if new in floats and old in there}
    for node in before.graph.nodes:
        if node.name in floats and node.name not in journal.born and node.op == "call_function":
            pairs.setdefault(node.name, node.name)
    for node, reference, value in side_by_side(before, after, pairs, journal.kept, inputs):
        yield _value_check(node, reference, value)


def side_by_side(
    before: Graph,
    after: Graph,
    pairs: Mapping[str, str],
    kept: Mapping[str, Mapping[int, Tensor]],
    inputs: Sequence[Tensor],
) -> Iterator[tuple[Node, Tensor, Tensor]]:
    """Node, its value in `before` and in `after`, in the order of `after`, for the same inputs.

    pairs: name in `after` -> name in `before`. kept: name in `after` -> axis -> indices of it that are left there.
    Both graphs run at once: a value is held until it is compared, no longer.
    """
    wanted = Counter(pairs.values())
    running, stash = before.values(*inputs), dict[str, Tensor]()
    for node, value in after.values(*inputs):
        old = pairs.get(node.name)
        if old is None:
            continue
        if old not in stash:
            stash |= _until(old, running, wanted)
        wanted[old] -= 1
        reference = stash[old] if wanted[old] else stash.pop(old)
        for axis, indices in kept.get(node.name, {}).items():
            reference = reference.index_select(axis, indices)
        yield node, reference, value


def _until(name: str, running: Iterator[tuple[Node, Any]], wanted: Mapping[str, int]) -> dict[str, Tensor]:
    """Values by name, of those wanted, up to the one called `name`."""
    found: dict[str, Tensor] = {}
    for node, value in running:
        if wanted.get(node.name):
            found[node.name] = value
        if node.name == name:
            break
    return found


@dataclass(frozen=True)
class Inside:
    """wrong: the first value that is not what it claims to be. proves: a value that was replaced had power."""

    wrong: ValueCheck | None = None
    proves: bool = False


def look_inside(before: Graph, after: Graph, inputs: Sequence[Tensor], tolerance: float) -> Inside:
    """Compares every value that `after` claims to share with `before`, up to the first that is wrong."""
    claimed = set(after.journal.equal.values())
    proves = False
    for check in compare_values(before, after, inputs):
        if not check.error <= tolerance:
            return Inside(check)
        proves |= check.power >= POWER * tolerance and (check.node in claimed or not claimed)
    return Inside(None, proves)


def _value_check(node: Node, reference: Tensor, value: Tensor) -> ValueCheck:
    error, power = _apart(reference, value), 0.0
    if reference.dim() and reference.shape[0] > 1 and math.isfinite(error):
        power = _apart(reference, reference.roll(1, 0))
    return ValueCheck(node, error, power, reference, value)


def _apart(expected: Tensor, seen: Tensor) -> float:
    """The largest difference, relative to the largest value expected; inf where shapes or infinities are others."""
    if expected.shape != seen.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    a, b = (t if t.dtype in (torch.float32, torch.float64) else t.double() for t in (expected, seen))
    delta, scale = float((a - b).abs().max()), float(a.abs().max())
    if not (math.isfinite(delta) and math.isfinite(scale)):
        a, b = a.double(), b.double()
        if not _same_infinities(a, b):
            return math.inf
        delta, scale = (float(torch.nan_to_num(t, 0.0, 0.0, 0.0).abs().max()) for t in (a - b, a))
    return delta / scale if scale else delta


def summary(t: Tensor) -> str:
    if not t.numel():
        return f"shape {list(t.shape)}"
    t = t.double()
    return f"shape {list(t.shape)}, mean {float(t.mean()):.4g}, max {float(t.abs().max()):.4g}"


def json_number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
