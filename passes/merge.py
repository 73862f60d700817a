"""Adapters disappear into the layers that they adapt: whatever is affine between x and y becomes one operator.

LoRA, DoRA, IA3, OFT, VeRA, parallel convolution branches and adapters that nobody has written yet merge by one rule:

    y = f(x) affine in x, token by token   ->   y = W x + b,   b = f(0),   W = f(identity) - b

`probe.py` reads weight and bias off, `savings.py` says where it pays, `misses.py` why the rest stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as copy_with
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from compressor.affine import Region, operator_of
from compressor.constants import fold_constants
from compressor.ir import Graph
from compressor.misses import at, misses
from compressor.names import operator_name, site
from compressor.ops import arguments, is_constant, kind
from compressor.pipeline import EXACT, Context, Contract, Decline, Outcome, Pass, Rewrite, Size
from compressor.probe import probe, replace
from compressor.savings import Plan, is_idle, is_operator, tied
from compressor.sharing import share_equal
from compressor.uniform import fold_uniform


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

    def plan(self, size: Size, graph: Graph, data: bool) -> tuple[Size, str]:
        return size, "branches that are affine, as adapters are, go; without any the size stays"

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        folding = fold_constants(graph, self.max_bytes, ctx.limit)
        outcome.rewrites += [Rewrite(*made) for made in folding.made]
        outcome.declines += [Decline.at(node, reason) for node, reason in folding.left]
        left = _left(ctx, outcome)
        outcome.rewrites += [Rewrite(*made) for made in fold_uniform(graph, self.max_bytes, left)]
        # base and branch each pad what they both read
        for node in share_equal(graph, lambda n: kind(n) == "pad", _left(ctx, outcome)):
            outcome.rewrites.append(Rewrite(site(node), "one padding for all that read it"))
        if self.absorb_norms:
            outcome.declines += _write_out_gains(graph)
        refused: dict[str, Decline] = {}
        while True:
            writer = _Writer(graph)
            plan = Plan(graph, self.absorb_norms, frozenset(refused))
            chosen = plan.choose()
            left = _left(ctx, outcome)
            room = len(chosen) if left is None else left
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
                outcome.declines += [Decline.at(*missed) for missed in misses(plan)]
            if not chosen or room < len(chosen):
                break
        outcome.declines += refused.values()
        if outcome.rewrites:
            _drop_idle_casts(graph)
        return outcome


def _left(ctx: Context, outcome: Outcome) -> int | None:
    """How many more rewrites the limit allows; None where there is none."""
    return None if ctx.limit is None else max(0, ctx.limit - len(outcome.rewrites))


def _drop_idle_casts(graph: Graph) -> None:
    """Adapters cast to their own precision; where that is the layer's, the cast does nothing."""
    for node in graph.nodes:
        if kind(node) == "cast" and is_idle(node):
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
            yield Decline.at(norm, f"its gain stays: {at(reader)} also reads what it scales")
            continue
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        args = tuple(None if n in ("weight", "bias") else bound[n] for n in names if n in bound)
        value = graph.insert(norm.target, args, before=norm)  # type: ignore[arg-type]
        value = graph.insert(aten.mul.Tensor, (value, gain), before=norm)
        if bias is not None:
            value = graph.insert(aten.add.Tensor, (value, bias), before=norm)
        graph.replace_uses(norm, value)
        graph.erase(norm)


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
        shared, named = tied(where), _named(where)
        weight = self._tensor(where, f"{site(named)}.weight", operator.weight)
        bias = None if operator.bias is None else self._tensor(where, f"{site(named)}.bias", operator.bias)
        made = replace(self.graph, where, weight, bias, before=named)
        self.now |= dict(zip(where.exits, made, strict=True))
        gone = Counter(operator_name(n).split(".")[-2] for n in where.dead if is_operator(n))
        names = ", ".join(f"{count} {name}" if count > 1 else name for name, count in sorted(gone.items()))
        sizes = "x".join(map(str, operator.weight.shape))
        if any(n not in where.dead and is_operator(n) for n in where.nodes):
            names += " (and what others read, too)"
        what = f"{names} into one {_word(where)} {sizes}"
        rewrite = Rewrite(site(named), what)
        old = next((w for w in shared if w is not weight), None)
        if old is not None:
            reader = next(site(user) for user in old.users if user not in where.dead)
            words = f"; {old.target} is shared with {reader}, this site now has its own"
            self._ties[rewrite] = old, words
        return rewrite

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
    while is_idle(end):
        end = end.all_input_nodes[0]
    return end


def _word(where: Region) -> str:
    return operator_of(where)[0].name().split("::")[1].split(".")[0]
