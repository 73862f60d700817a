"""Adapters disappear into the layers that they adapt: whatever is affine between x and y becomes one operator.

LoRA, DoRA, IA3, OFT, VeRA, parallel convolution branches and adapters that nobody has written yet merge by one rule:

    y = f(x) affine in x, token by token   ->   y = W x + b,   b = f(0),   W = f(identity) - b

It is done where it pays: the operators that fall away cost more multiply-accumulates than the one that stands in for
them, or as many and there are more of them. So a low-rank pair standing alone stays a pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from dataclasses import replace as copy_with
from fractions import Fraction
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from compressor.affine import FEATURES, KERNELS, TABLE, Form, Reach, Region, forks, operator_of, reach, region
from compressor.constants import DataFree, fold_constants, is_random
from compressor.ir import Graph, operator_name, site
from compressor.ops import CONTRACTIONS, NORMS, arguments, is_constant, is_tensor, kind, shape
from compressor.pipeline import EXACT, Context, Contract, Decline, Outcome, Pass, Rewrite
from compressor.probe import probe, replace
from compressor.sharing import share_equal
from compressor.uniform import fold_uniform

# Multiply-accumulates and operators that go, norms that stay, operators that cost nothing and go; compared in order.
Saving = tuple[int, Fraction, int, int]

_NOTHING: Saving = (0, Fraction(0), 0, 0)
_SHARE = Fraction(1, 100)  # of an operator: what absorbing a norm's gain is worth while others still read it
_NORM_CHAIN = frozenset({"activation", "add", "cast", "identity", "expand", "unsqueeze", "binary"})
_JOINS = frozenset({"add", "sub", "cat", "slice_scatter"})
_NARROWING = frozenset({"linear", "addmm", "matmul", "einsum", "conv"})
_MAYBE_IDLE = frozenset({"identity", "cast", "view", "flatten", "slice", "expand", "squeeze", "unsqueeze"})
_LINEAR_IN_IMAGES = frozenset({"conv", "batch_norm", "add", "sub", "mul", "identity", "cast"})
_MOVING = frozenset(
    {
        "reduce",
        "pad",
        "roll",
        "flip",
        "view",
        "flatten",
        "transpose",
        "permute",
        "slice",
        "select",
        "index",
        "linear",
        "addmm",
        "einsum",
    }
)  # operators that mix positions, where they block
_REPEATED = frozenset({"pad", "cast"})  # what layer and adapter each do for themselves before they start
_FAR = 32  # operators between what blocks a branch and where the branch joins again


@dataclass(frozen=True)
class Merge(Pass):
    """Adapters (LoRA, DoRA, IA3, OFT ... and parallel convolution branches) merge into the layers they adapt.

    max_bytes: how much larger than its sources a folded constant may be. absorb_norms: also merge the gain and bias
    of a normalisation into the linears behind it, where nothing else reads it; exact, but it changes the ranges of
    their weights.
    """

    name: ClassVar[str] = "merge"
    contract: ClassVar[Contract] = EXACT

    max_bytes: int = 1 << 28
    absorb_norms: bool = False

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        folding = fold_constants(graph, self.max_bytes, ctx.limit)
        outcome.rewrites += [Rewrite(*made) for made in folding.made]
        outcome.declines += [Decline.at(node, reason) for node, reason in folding.left]
        outcome.rewrites += [Rewrite(*made) for made in fold_uniform(graph, self.max_bytes)]
        for node in share_equal(
            graph, lambda n: kind(n) == "pad"
        ):  # base and branch each pad what they both read
            outcome.rewrites.append(Rewrite(site(node), "one padding for all that read it"))
        if self.absorb_norms:
            outcome.declines += _write_out_gains(graph)
        refused: dict[str, Decline] = {}
        while True:
            writer = _Writer(graph)
            plan = _Plan(graph, self.absorb_norms, frozenset(refused))
            chosen = plan.choose()
            room = len(chosen) if ctx.limit is None else max(0, ctx.limit - len(outcome.rewrites))
            with ctx.progress("merge: probing", min(room, len(chosen))) as advance:
                for one in chosen[:room]:
                    done = writer.write(one)
                    if isinstance(done, Rewrite):
                        outcome.rewrites.append(done)
                    else:
                        refused[one.exit.name] = done
                    advance(1)
            graph.clean()
            outcome.rewrites = writer.untied(outcome.rewrites)
            if not chosen:
                outcome.declines += plan.declines()
            if not chosen or room < len(chosen):
                break
        outcome.declines += refused.values()
        if outcome.rewrites:
            _drop_idle_casts(graph)
        return outcome


def _drop_idle_casts(graph: Graph) -> None:
    """Adapters cast to their own precision; where that is the layer's, the cast does nothing."""
    for node in graph.nodes:
        if kind(node) == "cast" and _is_idle(node):
            graph.replace_uses(node, node.all_input_nodes[0])
            graph.erase(node)


def _write_out_gains(graph: Graph) -> Iterator[Decline]:
    """Gain and bias of every norm that linears alone read become operators of their own, for the linears to absorb."""
    aten = torch.ops.aten
    for norm in graph.nodes:
        bound = arguments(norm) if kind(norm) in ("layer_norm", "rms_norm") else {}
        gain, bias = bound.get("weight"), bound.get("bias")
        if not is_constant(gain) or not (bias is None or is_constant(bias)):
            continue
        reader = next((u for u in norm.users if kind(u) != "linear" or u.args[0] is not norm), None)
        if reader is not None:
            yield Decline.at(norm, f"its gain stays: {_at(reader)} also reads what it scales")
            continue
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        args = tuple(None if n in ("weight", "bias") else bound[n] for n in names if n in bound)
        value = graph.insert(norm.target, args, before=norm)  # type: ignore[arg-type]
        value = graph.insert(aten.mul.Tensor, (value, gain), before=norm)
        if bias is not None:
            value = graph.insert(aten.add.Tensor, (value, bias), before=norm)
        graph.replace_uses(norm, value)
        graph.erase(norm)


# -------------------------------------------------------------------- what pays


@dataclass(frozen=True)
class _Best:
    """The best way to compute a value: what is saved on the way to it, and the last region of that way."""

    saving: Saving = _NOTHING
    last: Region | None = None
    before: _Best | None = None

    def regions(self) -> Iterator[Region]:
        if self.last is not None:
            yield self.last
        if self.before is not None:
            yield from self.before.regions()


class _Plan:
    """All regions of a graph as it stands, and which of them to replace.

    The values that everything to y goes through form a chain x, c1, c2 ... y. `_best` finds the cut of that chain into
    regions and untouched operators that saves most.
    """

    def __init__(self, graph: Graph, absorb_norms: bool, refused: frozenset[str]) -> None:
        self.graph, self.absorb_norms, self.refused = graph, absorb_norms, refused
        self.free = DataFree(graph)
        self.order = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.entries: dict[tuple[Form, Node], list[Reach]] = {}
        self.reaches: list[Reach] = []
        self.chosen: list[Region] = []
        self._best_of: dict[tuple[Form, Node], _Best] = {}
        kinds = {kind(n) for n in graph.nodes}
        for form in [form for form in (FEATURES, KERNELS, TABLE) if form is FEATURES or kinds & form.core]:
            for node in graph.nodes:
                found = reach(form, node, self.free, self.order)
                if found is not None:
                    self.reaches.append(found)
                    for end in found.exits():
                        self.entries.setdefault((form, end), []).append(found)

    def choose(self) -> list[Region]:
        """Regions worth replacing, in the graph's order; none holds an operator of another."""
        for form, end in sorted(self.entries, key=lambda key: self.order[key[1]], reverse=True):
            for one in self._best(form, end).regions():
                if not self._rivals(one):
                    self.chosen.append(one)
        for found in self.reaches:
            for exits in forks(found):
                one = region(found, exits, self.free, self.order)
                rivals = self._rivals(one)
                lost = _sum(self._saving(rival) for rival in rivals)
                if (
                    one.exit.name not in self.refused
                    and one.dead_macs > one.macs
                    and self._saving(one) > lost
                ):
                    self.chosen = [*(c for c in self.chosen if c not in rivals), one]
        self.chosen.sort(key=lambda one: self.order[one.exit])
        return self.chosen

    def _rivals(self, one: Region) -> list[Region]:
        """The chosen regions that share an operator with this one."""
        return [other for other in self.chosen if not set(other.nodes).isdisjoint(one.nodes)]

    def _best(self, form: Form, end: Node) -> _Best:
        key = (form, end)
        if key not in self._best_of:
            found = self.entries.get(key, [])
            best = self._best(form, found[-1].entry) if found else _Best()
            for one in (
                reversed(found) if end.name not in self.refused else ()
            ):  # of equal savings the nearest
                where = region(one, [end], self.free, self.order)
                if not self._pays(where):
                    continue
                before = self._best(form, one.entry)
                saving = _plus(before.saving, self._saving(where))
                if saving > best.saving:
                    best = _Best(saving, where, before)
            self._best_of[key] = best
        return self._best_of[key]

    def _pays(self, where: Region) -> bool:
        macs, operators, *_ = self._saving(where)
        if not any(kind(n) in where.form.core for n in where.dead) or _grows(where):
            return False
        if not _branches(where) and sum(kind(n) in where.form.core for n in where.dead) == 1:
            free_of_norms = not any(
                kind(n) == "batch_norm" for n in where.dead
            )  # which fold takes, after pruning
            return not _tied(where) and (macs > 0 or (macs == 0 and operators > 0 and free_of_norms))
        return macs > 0 or (macs == 0 and operators > 0 and not _tied(where))

    def _saving(self, where: Region) -> Saving:
        standing = [n for n in where.dead if _is_operator(n)]
        norms = [n for n in where.nodes if self._is_gain(n)]
        gone = [n for n in norms if n in where.dead]
        idle = [n for n in standing if _is_idle(n)]
        made = 1 + len(where.exits) * (len(where.exits) > 1)
        operators = Fraction(len(standing) - len(idle) - len(gone) - made)
        if self.absorb_norms:
            operators += len(gone) + _SHARE * (len(norms) - len(gone))
        return where.dead_macs - where.macs, operators, -len(gone), len(idle)

    def _is_gain(self, node: Node) -> bool:
        """True for batch norm, and for the gain or bias written out behind a normalisation without its own."""
        if kind(node) == "batch_norm":
            return True
        if kind(node) not in ("mul", "add"):
            return False
        values = [n for n in node.all_input_nodes if n not in self.free]
        if len(values) != 1 or len(node.all_input_nodes) != 2:
            return False
        source = _through_casts(values[0])
        return self._is_gain(source) if kind(node) == "add" else _is_normalised(source)

    # ---------------------------------------------------------------- what does not

    def declines(self) -> Iterator[Decline]:
        """Regions that stay, and branches that something on them keeps from merging, each with the reason."""
        yield from self._prompts()
        seen: set[Node] = set()
        for found in self.reaches:
            for join, reason in _blocked_joins(found, self.order):
                if join not in seen:
                    seen.add(join)
                    yield Decline.at(join, reason)
        covered = {n for one in self.chosen for n in one.nodes}
        for form, end in sorted(self.entries, key=lambda key: self.order[key[1]], reverse=True):
            if end in covered or end.name in self.refused:
                continue
            regions = [
                region(found, [end], self.free, self.order) for found in reversed(self.entries[form, end])
            ]
            expected = [one for one in regions if self._is_expected(one)]
            if expected:  # the nearest entry among those with the most contractions
                where = max(expected, key=lambda one: _contractions(one.nodes))
                covered |= set(where.nodes)
                yield Decline.at(end, self._why_not(where))

    def _prompts(self) -> Iterator[Decline]:
        """Learned positions beside those of the input: prompts, prefixes, P-tuning."""
        for node in self.graph.nodes:
            if kind(node) != "cat":
                continue
            bound = arguments(node)
            rank = node.meta["val"].dim()
            if bound["dim"] % rank == rank - 1 or (rank > 3 and bound["dim"] % rank == 1):
                continue  # features or channels
            learned = [n for n in bound["tensors"] if n in self.free and self._is_learned(n)]
            count = sum(int(shape(n)[bound["dim"]]) for n in learned)
            if learned and count > 1 and len(learned) < len(bound["tensors"]):
                yield Decline.at(
                    node,
                    f"{count} learned positions beside those of the input: no operator on one position is that",
                )

    def _is_learned(self, node: Node) -> bool:
        axes = range(node.meta["val"].dim())
        return _has_floats(node) and any(self.free.varies(node, axis) for axis in axes)

    def _is_expected(self, where: Region) -> bool:
        """True where a reader of the report may have expected a merge."""
        macs, operators, *_ = self._saving(where)
        if macs == 0 and operators > 0 and _tied(where):
            return True
        if _contractions(where.nodes) < 2:
            return False
        pair = where.form is FEATURES and _contractions(where.dead) > 1
        return pair or kind(where.exit) in _JOINS

    def _why_not(self, where: Region) -> str:
        for node in where.nodes:
            outside = [u for u in node.users if u not in where.nodes]
            if node is not where.exit and outside:
                reader = "the output" if outside[0].op == "output" else f"{site(outside[0])}"
                return f"{_at(node)} inside it is also read by {reader}, so that merging would save nothing"
        if _grows(where):
            return "one table of this width would be larger than those that it is made of: they stay"
        cost, now = where.macs, where.dead_macs
        if cost == now and (tied := _tied(where)):
            return f"merging would untie {tied[0].target}, which is read elsewhere, and save no multiply-accumulate"
        count = _contractions(where.nodes)
        return (
            f"one {where.form.name} would cost {cost:,} multiply-accumulates a sample, "
            f"these {count} cost {now:,}: they stay"
        )


def _branches(where: Region) -> bool:
    """True where an operator joins two values of the region."""
    inside = {where.entry, *where.nodes}
    return any(sum(n in inside for n in node.all_input_nodes) > 1 for node in where.nodes)


def _grows(where: Region) -> bool:
    """True where one table would be larger than every table it is made of, or they differ in length."""
    if where.form is not TABLE:
        return False
    rows, widths = zip(*where.tables, strict=True)
    return len(set(rows)) > 1 or where.width > max(widths)


def _contractions(nodes: Iterable[Node]) -> int:
    return sum(kind(n) in CONTRACTIONS for n in nodes)


def _plus(a: Saving, b: Saving) -> Saving:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


def _sum(savings: Iterable[Saving]) -> Saving:
    return reduce(_plus, savings, _NOTHING)


def _at(node: Node) -> str:
    return f"{operator_name(node).removesuffix('.default')} at {site(node)}"


def _has_floats(node: Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype.is_floating_point


def _is_operator(node: Node) -> bool:
    return node.op == "call_function" and kind(node) not in ("size", "getitem")


def _is_idle(node: Node) -> bool:
    """True for an operator that hands its first operand through: an identity, a cast or a reshape to the same."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None or not is_tensor(source) or not is_tensor(node):
        return False
    same = source.meta["val"].dtype == node.meta["val"].dtype and str(shape(source)) == str(shape(node))
    return same and kind(node) in _MAYBE_IDLE


def _tied(where: Region) -> list[Node]:
    """Weights of the region's contractions, or its tables, that something outside also reads."""
    weights = (
        n
        for c in where.nodes
        if c in where.dead and kind(c) in where.form.core
        for n in c.all_input_nodes
        if n.op == "get_attr" and n.meta["val"].dim() > 1
    )
    return [w for w in dict.fromkeys(weights) if any(u not in where.dead for u in w.users)]


def _through_casts(node: Node) -> Node:
    while kind(node) in ("cast", "identity"):
        node = node.all_input_nodes[0]
    return node


def _is_normalised(node: Node) -> bool:
    """True for x * rsqrt(mean(x^2) + eps) however it is written, and for a norm without gain."""
    if kind(node) in NORMS:
        return arguments(node).get("weight") is None
    if kind(node) not in ("mul", "div"):
        return False
    return any(_leads_to_reduction(n) for n in node.all_input_nodes)


def _leads_to_reduction(node: Node) -> bool:
    for _ in range(8):
        if kind(node) == "reduce":
            return True
        if kind(node) not in _NORM_CHAIN or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def _blocked_joins(found: Reach, order: dict[Node, int]) -> Iterator[tuple[Node, str]]:
    """(join, reason) for branches that leave the region through an operator that is not affine, and come back."""
    for blocker, reason in found.blocked.items():
        if found.form is KERNELS and kind(blocker) != "conv":
            continue  # every residual block has an activation; only convolutions that just miss are worth a word
        after = {blocker}
        waiting = {u for u in blocker.users if u.op == "call_function"}
        while waiting and len(after) < _FAR:
            node = min(waiting, key=order.__getitem__)
            waiting.remove(node)
            others = [n for n in node.all_input_nodes if n in found.known]
            if kind(node) in _JOINS and others:
                if _looks_like_a_branch(found, blocker, after, others):
                    yield node, reason
                break
            after.add(node)
            waiting |= {u for u in node.users if u.op == "call_function"}


def _looks_like_a_branch(found: Reach, blocker: Node, after: set[Node], others: list[Node]) -> bool:
    """True for a convolution beside another, and for what goes through fewer features than it came from."""
    if found.form is KERNELS:
        return all(kind(n) in _LINEAR_IN_IMAGES for n in after)
    axis = found.form.axis
    width = found.entry.meta["val"].shape[axis]
    sources = (n for one in after for n in one.all_input_nodes)
    before = _below(sources, found) - _below(others, found)
    moved = is_random(blocker) or kind(blocker) in _MOVING
    return any(_narrows(n, axis, width) for n in (*before, *(after if moved else ())))


def _below(nodes: Iterable[Node], found: Reach) -> set[Node]:
    """The values of a region that these nodes are computed from, themselves included, the entry not."""
    seen: set[Node] = set()
    stack = [n for n in nodes if n in found.known]
    while stack:
        node = stack.pop()
        if node is not found.entry and node not in seen:
            seen.add(node)
            stack.extend(n for n in node.all_input_nodes if n in found.known)
    return seen


def _narrows(node: Node, axis: int, width: int) -> bool:
    """True for a contraction with a constant that has fewer outputs than the region's entry has features."""
    if kind(node) not in _NARROWING or not any(n.op == "get_attr" for n in node.all_input_nodes):
        return False
    size = shape(node)[axis] if is_tensor(node) else width
    return isinstance(size, int) and size < width


# -------------------------------------------------------------------- doing it


class _Writer:
    """Replaces regions, and shares tensors between those that come out the same."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.now: dict[Node, Node] = {}  # exit of a replaced region -> what computes it now
        self.made: dict[tuple[Any, ...], list[Node]] = {}
        self._ties: dict[Rewrite, tuple[Node, str]] = {}

    def write(self, where: Region) -> Rewrite | Decline:
        where = copy_with(where, entry=self.now.get(where.entry, where.entry))
        operator = probe(self.graph, where)
        if isinstance(operator, str):
            return Decline.at(where.exit, operator)
        tied, named = _tied(where), _named(where)
        weight = self._tensor(where, f"{site(named)}.weight", operator.weight)
        bias = None if operator.bias is None else self._tensor(where, f"{site(named)}.bias", operator.bias)
        made = replace(self.graph, where, weight, bias, before=named)
        self.now |= dict(zip(where.exits, made, strict=True))
        gone = Counter(operator_name(n).split(".")[-2] for n in where.dead if _is_operator(n))
        names = ", ".join(f"{count} {name}" if count > 1 else name for name, count in sorted(gone.items()))
        sizes = "x".join(map(str, operator.weight.shape))
        if any(n not in where.dead and _is_operator(n) for n in where.nodes):
            names += " (and what others read, too)"
        what = f"{names} into one {_word(where)} {sizes}"
        made_here = Rewrite(site(named), what)
        for old in [w for w in tied if w is not weight][:1]:
            reader = next(site(user) for user in old.users if user not in where.dead)
            self._ties[made_here] = (
                old,
                f"; {old.target} is shared with {reader}, this site now has its own",
            )
        return made_here

    def untied(self, rewrites: list[Rewrite]) -> list[Rewrite]:
        """The same rewrites, saying which took a site out of sharing a tensor that others still read."""
        apart = {one: words for one, (old, words) in self._ties.items() if old.users}
        return [copy_with(one, what=one.what + apart.pop(one, "")) for one in rewrites]

    def _tensor(self, where: Region, name: str, value: Tensor) -> Node:
        """The node of an equal tensor of the region, or of an earlier replacement; a new one where there is none."""
        key = (tuple(value.shape), value.dtype, tuple(value.flatten()[:8].tolist()))
        inside = dict.fromkeys(n for node in where.nodes for n in node.all_input_nodes if n.op == "get_attr")
        for node in (*inside, *self.made.get(key, ())):
            if _equal(self.graph.tensor(node), value):
                return node
        found = next((n for n in inside if n.target == name and n.users.keys() <= where.dead), None)
        if found is not None:  # the layer goes, its name stays
            self.graph.set_tensor(found, value)
        else:
            tensors = (self.graph.tensor(n) for n in inside)
            turned = next(
                (t.t() for t in tensors if t.dim() == value.dim() == 2 and _equal(t.t(), value)), value
            )
            found = self.graph.add_tensor(name, turned)
        if any(str(n.target) in self.graph.parameters for n in inside):
            self.graph.parameters |= {str(found.target)}
        self.made.setdefault(key, []).append(found)
        return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _named(where: Region) -> Node:
    """The operator that gives a region its name: the last one that does something, of several exits the first core."""
    if len(where.exits) > 1:
        return next(n for n in where.nodes if n in where.dead and kind(n) in where.form.core)
    end = where.exit
    while _is_idle(end):
        end = end.all_input_nodes[0]
    return end


def _word(where: Region) -> str:
    return operator_of(where)[0].name().split("::")[1].split(".")[0]
