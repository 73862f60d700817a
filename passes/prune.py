"""Structured pruning: channels that matter least are removed from every tensor that they run through.

Which channels go together is read from the graph (`compressor/channels.py`); how wide every layer becomes is chosen
under a budget (`compressor/widths.py`); the result must equal the original with those channels masked at their
readers (`compressor/oracle.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from compressor.channels import Algebra, Key, analyse
from compressor.errors import UsageError
from compressor.ir import Graph
from compressor.measure import parameters
from compressor.ops import arguments, contractions, is_constant, kind, macs
from compressor.oracle import masked, power
from compressor.pipeline import MASKED, Context, Contract, Decline, Outcome, Pass, Rewrite
from compressor.surgery import remove
from compressor.verify import POWER, TOLERANCE
from compressor.widths import ROUNDING, Costs, Family, families, shrink_globally, shrink_locally

MACS = 0.7  # of bare `prune`
POWER_SAMPLES = 8

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Prune(Pass):
    """Removes whole channels, so that the model needs fewer multiplications on any hardware.

    macs, params: share of the model's multiply-accumulates and of its numbers to keep; bare `prune` is `macs=0.7`.
    criterion: what makes a channel important: `l2` or `l1` norm of its weights (batch norm counted in), `bn`
    (scale of its batch norm), `random`. scope: `global` lets layers compete, `local` narrows all alike.
    minimum: no layer gets narrower. ignore: module paths to leave alone, as in `ignore=head*+layer4.*`. norms: channels
    may go from under layer, RMS and group norms too (residual streams of transformers): the reference is then the
    original with those channels masked and with norms taken over the channels that are left.

    Widths of at least twice the target's channel multiple stay multiples of it. A channel that a softmax, a mean,
    a layer norm or an output of the model depends on stays, and the report says why.
    """

    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = MASKED
    after: ClassVar[tuple[str, ...]] = ("merge",)

    macs: float | None = None
    params: float | None = None
    criterion: Literal["l1", "l2", "bn", "random"] = "l2"
    scope: Literal["global", "local"] = "global"
    minimum: int = 4
    ignore: tuple[str, ...] = ()
    norms: bool = False

    def __post_init__(self) -> None:
        for name, share in self.budget.items():
            if not 0 < share <= 1:
                raise UsageError(f"prune({name}={share}): the share to keep is over 0 and at most 1")
        if self.minimum < 1:
            raise UsageError(f"prune(minimum={self.minimum}): a layer keeps at least one channel")

    @property
    def budget(self) -> dict[str, float]:
        shares = {"macs": self.macs, "params": self.params}
        return {name: share for name, share in shares.items() if share is not None} or {"macs": MACS}

    def run(self, graph: Graph, ctx: Context) -> Iterator[Outcome]:
        """One step, `surgery`: channels go, weights stay as they are."""
        algebra = analyse(graph, norms=self.norms)
        costs = Costs(algebra, {"macs": algebra.macs_terms, "params": algebra.parameter_terms})
        importance = _importance(graph, algebra, self.criterion, ctx.seed)
        found = families(algebra, costs, importance, ctx.target.channel_multiple, self.minimum)
        shrink = shrink_globally if self.scope == "global" else shrink_locally
        shrink([family for family in found if not self._ignored(family)], costs, self.budget)
        declines = [
            *(_out_of_reach(name, share, costs.share(name)) for name, share in self.budget.items()),
            *(_ignored(family, self._ignored(family)) for family in found),
            *(Decline(site, f"{count} channels stay: {why}") for site, why, count in algebra.frozen()),
        ]
        outcome = _surgery(graph, ctx, algebra, [family for family in found if family.removed][: ctx.limit])
        outcome.declines += [decline for decline in declines if decline]
        yield outcome

    def _ignored(self, family: Family) -> str:
        """The pattern that keeps a family as it is; empty if none does."""
        sites = family.groups[0].sites
        return next((p for p in self.ignore if any(fnmatchcase(site, p) for site in sites)), "")


def _surgery(graph: Graph, ctx: Context, algebra: Algebra, narrowed: Sequence[Family]) -> Outcome:
    """Removes what these families lost; the reference is the graph as it was, with the same channels masked."""
    groups = [group for family in narrowed for group in family.removed]
    inputs = next(iter(ctx.held_out.limited(POWER_SAMPLES))).inputs
    reference, powers = masked(graph, groups), power(graph, groups, inputs)
    tolerance = TOLERANCE.get(graph.results[0].meta["val"].dtype, TOLERANCE[torch.float32])
    before = {"macs": macs(graph), "params": parameters(graph)}
    remove(graph, groups)
    return Outcome(
        step="surgery",
        contract=MASKED,
        reference=reference,
        rewrites=[_rewrite(family) for family in narrowed],
        facts={
            "groups": len(algebra.groups),
            "pruned": len(groups),
            "proved_with_power": sum(p >= POWER * tolerance for p in powers),
            "macs": macs(graph) / before["macs"] if before["macs"] else 1.0,
            "params": parameters(graph) / before["params"] if before["params"] else 1.0,
            "frozen": _reasons(algebra),
        },
    )


def _rewrite(family: Family) -> Rewrite:
    first, *others = family.groups[0].sites
    where = f"{first} and {len(others)} more" if others else first
    return Rewrite(where, f"{family.width(len(family.groups))} -> {family.width(family.left)} channels")


def _out_of_reach(name: str, wanted: float, reached: float) -> Decline | None:
    if reached <= wanted + ROUNDING:
        return None
    return Decline(
        f"{name}={wanted:g}",
        f"out of reach: {reached:.3f} is left when every layer is at its minimum width; the other channels must stay",
    )


def _ignored(family: Family, pattern: str) -> Decline | None:
    return Decline(family.groups[0].sites[0], f"ignored by '{pattern}'") if pattern else None


def _reasons(algebra: Algebra) -> dict[str, int]:
    """How many groups cannot be removed, by reason."""
    counts: Counter[str] = Counter()
    for _, reason, number in algebra.frozen():
        counts[reason.split(" (")[0]] += number
    return dict(counts.most_common())


# -------------------------------------------------------------------- importance


def _importance(graph: Graph, algebra: Algebra, criterion: str, seed: int) -> Floats:
    """Importance of every class: the geometric mean of its shares of what writes it and of what reads it.

    A share is relative to the whole weight, so layers compare; shares are summed over all weights, so a channel that
    many layers read weighs as much as in all of them.
    """
    size = 1 + max((int(classes.max()) for classes in algebra.axes.values()), default=-1)
    if criterion == "random":
        return np.random.default_rng(seed).random(size)
    norms = list(_weights(graph, 1 if criterion == "l1" else 2))
    writes, written = _shares(algebra, size, [(key, values) for key, values in norms if key[1] == 0])
    reads, read = _shares(algebra, size, [(key, values) for key, values in norms if key[1] == 1])
    importance = np.where(written & read, np.sqrt(writes * reads), writes + reads)
    if criterion != "bn":
        return importance
    scales, scaled = _shares(algebra, size, _scales(graph))
    return np.where(scaled, scales, importance)  # channels without batch norm count by their weights


def _shares(
    algebra: Algebra, size: int, parts: Iterable[tuple[Key, Floats]]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Shares of each class in these slices, summed, and which classes have any."""
    total, seen = np.zeros(size), np.zeros(size, dtype=bool)
    for key, values in parts:
        if key in algebra.axes:
            seen[algebra.axes[key]] = True
            total += np.bincount(algebra.axes[key], values / (values.sum() or 1.0), minlength=size)
    return total, seen


def _weights(graph: Graph, exponent: int) -> Iterator[tuple[Key, Floats]]:
    """Norms of every slice of every weight of a contraction, as inference sees it: with the batch norm behind it."""
    for reader in contractions(graph):
        weight = arguments(reader).get("weight")
        if weight is None or not is_constant(weight):
            continue
        powers = graph.tensor(weight).double().abs() ** exponent
        scale = _batch_norm_scale(graph, reader)
        if scale is not None and kind(reader) == "conv":
            powers = powers * (scale**exponent).reshape(-1, *[1] * (powers.dim() - 1))
        for axis in (0, 1):
            yield (weight.name, axis), powers.transpose(0, axis).flatten(1).sum(1).numpy()


def _batch_norm_scale(graph: Graph, conv: Node) -> Tensor | None:
    """|gain| / deviation of the batch norm that alone reads a convolution."""
    user = next(iter(conv.users), None)
    if user is None or len(conv.users) != 1 or kind(user) != "batch_norm":
        return None
    a = arguments(user)
    if not (is_constant(a["weight"]) and is_constant(a["running_var"])):
        return None
    deviation = (graph.tensor(a["running_var"]).double() + a["eps"]).sqrt()
    return graph.tensor(a["weight"]).double().abs() / deviation


def _scales(graph: Graph) -> Iterator[tuple[Key, Floats]]:
    """Absolute gains of every batch norm."""
    for node in graph.nodes:
        if kind(node) == "batch_norm" and is_constant(gain := arguments(node)["weight"]):
            yield (gain.name, 0), graph.tensor(gain).double().abs().numpy()
