"""Weights that make up for channels that went, layer by layer, on values that are already pruned.

The model as it was and its pruned twin run side by side. When they reach a layer, it is solved for the weights that
bring its anchor (`readers.py`), mostly the residual stream, back to what it was: what went before it in the twin, its
own lost channels and errors of the shortcut beside it, are all made up for as far as one layer can. Where it alone
reads a family, it first chooses again which channels go, now that it sees what is left of its input.

    min over W, b of the mean of |W u + b - (y + e)|^2 + ridge |W - W0|^2,  e = (anchor - anchor of the twin) / scale

u are the rows that the layer reads in the twin, y = W0 u + b0. In the twin nothing is cut out: lost channels have zero
columns at their readers, which computes the same (`oracle.py`), so that all names and shapes stay.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from .channels import Algebra, Group
from .data import Batch, Data
from .elimination import RIDGE, eliminate, ridged, trust
from .ir import Graph, as_declared, last_uses
from .masked_norms import Removed, mask_norms
from .names import site
from .ops import arguments, is_constant, kind
from .pipeline import Context
from .readers import norm_gain
from .spill import spilling
from .survey import Moments, Readers, Reading, Sampler, Spread, reading_of

Change = Callable[[Any], Any]
NOTHING: Mapping[Any, Any] = MappingProxyType({})
SHRINKAGE = 0.1
HELD = 1 << 28  # bytes of values between two layers that stay in memory; more lie in mapped files


@dataclass(frozen=True)
class Rebuilt:
    """removed: the groups that go. tensors: name of a tensor -> its new value, in its old shape.

    repaired: module paths of the layers that were solved anew; parted: of those whose Gram matrix does not fit into
    memory, with the number of parts that they were solved in.
    """

    removed: list[Group]
    tensors: dict[str, Tensor]
    repaired: list[str] = field(default_factory=list)
    parted: dict[str, int] = field(default_factory=dict)


def rebuild(
    graph: Graph, algebra: Algebra, chosen: Sequence[Sequence[Group]], free: bool, data: Data, ctx: Context
) -> Rebuilt:
    """What goes, and the weights that make up for it. `graph` stays as it is.

    chosen: the groups that should go, family by family. free: where one layer alone reads a family, as many others
    may go instead, if it can do better without them.
    """
    readers = Readers(graph, algebra)
    losses = {int(readers.family[groups[0].index]): groups for groups in chosen}
    open_ = {i for i in losses if free and len(readers.of.get(i, ())) == 1}
    decided = [group for i, groups in losses.items() if i not in open_ for group in groups]
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        store = _Store(folder)
        batches = store.batches(graph, data)
        twin = _Twin(graph, algebra.removed(decided), batches, store)
        work = _Repair(twin, readers, losses, open_, Sampler(graph, data.samples, ctx.seed))
        with ctx.progress("prune: solving layers for what is left", len(graph.nodes)) as advance:
            for node in graph.nodes:
                work.visit(node)
                twin.step(node)
                advance(1)
        removed = [group for i in sorted(work.chosen) for group in work.chosen[i]]
        return Rebuilt(removed, twin.tensors, work.repaired, work.parted)


class Fit(Protocol):
    """A layer that keeps another form than a matrix with columns left out.

    whole: its weight as it is, for layers that are solved in parts; None where each part can have the form by itself.
    """

    @property
    def whole(self) -> Tensor | None: ...

    def matrix(self, gram: Tensor, wanted: Tensor, block: int) -> Tensor:
        """The matrix [O, F] of that form nearest to `wanted` [O, F], on rows of this Gram matrix [F, F]."""


def refit(
    graph: Graph,
    fits: Mapping[Node, Fit],
    data: Data,
    ctx: Context,
    changes: Mapping[Node, Change] = NOTHING,
    heal: bool = True,
) -> Rebuilt:
    """The weights that layers of other forms, and all layers behind them, need to give what the model gave before.

    changes: what else will be another than it was: node -> what becomes of its value. heal: whether layers make up
    for errors of those before them; else each is true to itself, but for the means of its outputs.
    """
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        store = _Store(folder)
        batches = store.batches(graph, data)
        twin = _Twin(graph, {}, batches, store, changes)
        work = _Repair(twin, None, {}, set(), Sampler(graph, data.samples, ctx.seed), fits, heal)
        with ctx.progress("solving layers for their new form", len(graph.nodes)) as advance:
            for node in graph.nodes:
                work.visit(node)
                twin.step(node)
                advance(1)
        return Rebuilt([], twin.tensors, work.repaired, work.parted)


class _Store:
    """Values that many batches hold at once: in memory up to `HELD` bytes, in mapped files beyond."""

    def __init__(self, folder: str) -> None:
        self._spill, self._held = spilling(folder), 0  # type: ignore[arg-type]

    def batches(self, graph: Graph, data: Data) -> list[Batch]:
        """The data, as the graph declares its inputs."""
        return [
            replace(b, inputs=tuple(map(self.put, map(as_declared, b.inputs, graph.inputs)))) for b in data
        ]

    def put(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self._held + value.nbytes > HELD and value.is_contiguous():
            return self._spill(value)
        self._held += value.nbytes
        return value

    def drop(self, value: Any) -> None:
        if isinstance(value, Tensor) and not value.untyped_storage().is_shared():
            self._held -= value.nbytes


class _Twin:
    """A graph and its pruned twin at one point of their run, over all batches.

    whole, cut: values of each batch in the graph and in the twin. tensors: those that the twin has of its own.
    removed: channels that are known to go; normalisations over them take their statistics over the others.
    """

    def __init__(
        self,
        graph: Graph,
        removed: Removed,
        batches: Sequence[Batch],
        store: _Store,
        changes: Mapping[Node, Change] = NOTHING,
    ) -> None:
        self.graph, self.batches, self._store, self._changes = graph, batches, store, changes
        self._masked = graph.copy()
        mask_norms(self._masked, removed)
        back = {node.name: node for node in graph.nodes}
        self._origin = {node: back[node.name] for node in self._masked.nodes if node.name in back}
        self._norms = {
            origin: node
            for node, origin in self._origin.items()
            if node.target is not origin.target or any(n not in self._origin for n in node.all_input_nodes)
        }
        self.tensors: dict[str, Tensor] = {}
        self.whole: list[dict[Node, Any]] = [{} for _ in batches]
        self.cut: list[dict[Node, Any]] = [{} for _ in batches]
        self._last = last_uses(graph.graph)
        self._inputs = {node: i for i, node in enumerate(graph.placeholders)}

    def step(self, node: Node) -> None:
        """Computes a node in both; where nothing that it reads differs, its value is shared."""
        if node.op == "output":
            return
        for whole, cut, batch in zip(self.whole, self.cut, self.batches, strict=True):
            if node in self._inputs:
                whole[node] = cut[node] = batch.inputs[self._inputs[node]]
            elif node.op == "get_attr":
                whole[node], cut[node] = self._constant(node, False), self._constant(node, True)
            else:
                whole[node] = self._store.put(self._execute(node, whole, False))
                other = node in self._norms or node in self._changes
                same = not other and all(whole[n] is cut[n] for n in node.all_input_nodes)
                cut[node] = whole[node] if same else self._store.put(self._execute(node, cut, True))
        for dead in self._last.get(node, ()):
            for whole, cut in zip(self.whole, self.cut, strict=True):
                first, second = whole.pop(dead, None), cut.pop(dead, None)
                if dead.op == "call_function":
                    self._store.drop(first)
                    if second is not first:
                        self._store.drop(second)

    @torch.no_grad()
    def _execute(self, node: Node, values: Mapping[Node, Any], cut: bool) -> Any:
        if cut and node in self._changes:
            return self._changes[node](self.graph.execute(node, values))
        if not cut or node not in self._norms:
            return self.graph.execute(node, values)
        known: dict[Node, Any] = {}

        def value(part: Node) -> Any:
            """Of the masked normalisation, which is made of several operators."""
            origin = self._origin.get(part)
            if part not in known and origin is not None and origin is not node:
                known[part] = values[origin]
            elif part not in known:
                known[part] = self._masked.execute(part, {n: value(n) for n in part.all_input_nodes})
            return known[part]

        return value(self._norms[node])

    def differs(self, nodes: Sequence[Node]) -> bool:
        """Whether any of these values, as far as it is known by now, is another in the twin."""
        return any(
            n in w and w[n] is not c[n] for w, c in zip(self.whole, self.cut, strict=True) for n in nodes
        )

    def ahead(self, number: int, end: Node) -> tuple[Tensor, Tensor]:
        """The value of a later node in both, for one batch."""
        return self._ahead(self.whole[number], end, False), self._ahead(self.cut[number], end, True)

    def _ahead(self, values: Mapping[Node, Any], end: Node, cut: bool) -> Tensor:
        known, todo = dict(values), [end]
        while todo:
            node = todo[-1]
            missing = [n for n in node.all_input_nodes if n not in known]
            todo += missing
            if not missing:
                known[node] = (
                    self._constant(node, cut) if node.op == "get_attr" else self._execute(node, known, cut)
                )
                todo.pop()
        return known[end]

    def _constant(self, node: Node, cut: bool) -> Tensor:
        return self.now(node) if cut else self.graph.tensor(node)

    def now(self, node: Node) -> Tensor:
        """The tensor that the twin has for a constant."""
        return self.tensors.get(str(node.target), self.graph.tensor(node))

    def set_tensor(self, node: Node, value: Tensor) -> None:
        self.tensors[str(node.target)] = value.to(self.graph.tensor(node).dtype).contiguous()
        for cut in self.cut:
            if node in cut:
                cut[node] = self.tensors[str(node.target)]


class _Repair:
    """Solves layer after layer. chosen: family -> which of its groups go; open: those whose reader may still choose."""

    def __init__(
        self,
        twin: _Twin,
        readers: Readers | None,
        losses: Mapping[int, Sequence[Group]],
        open_: set[int],
        sampler: Sampler,
        fits: Mapping[Node, Fit] = NOTHING,
        heal: bool = True,
    ) -> None:
        self.twin, self.readers, self.sampler, self.fits, self.heal = twin, readers, sampler, fits, heal
        self.chosen, self.open = dict(losses), set(open_)
        self.repaired: list[str] = []
        self.parted: dict[str, int] = {}

    def visit(self, node: Node) -> None:
        """Repairs a layer, in front of its turn."""
        reading = reading_of(self.twin.graph, node) if node.op == "call_function" else None
        if reading is None or reading.layer.is_tied:
            return
        layer, steps = reading.layer, reading.anchor.steps
        mine = [i for i in self.readers.families(node) if i in self.chosen] if self.readers else []
        beside = [n for step in steps for n in step.all_input_nodes]
        if not mine and node not in self.fits and not self.twin.differs([layer.source, *beside]):
            return
        moments = self._look(reading)
        matrices = reading.matrices(self.twin.now(layer.weight))
        grams, wanted = [], []
        for i in range(reading.blocks):
            gram, aim = moments.block(i)
            grams.append(gram)
            belief = trust(moments.grams[i].count, reading.columns) if self.heal else 0.0
            learns = aim.shape[1] and belief
            wanted.append(
                matrices[i] + torch.linalg.solve(ridged(gram), belief * aim).T if learns else matrices[i]
            )
        if node in self.fits:
            ridge = RIDGE if self.heal else _ridge(moments.grams[0].count, reading.columns)
            solved = self._formed(reading, self.fits[node], [ridged(gram, ridge) for gram in grams], wanted)
        else:
            for i in sorted(self.open.intersection(mine)):
                self.chosen[i] = self._choose(reading, i, grams, torch.stack(wanted))
                self.open.remove(i)
            gone = [group for i in mine for group in self.chosen[i]]
            solved = self._narrowed(reading, matrices, (grams, wanted), gone)
        self._set(reading, moments, matrices, solved)
        self.repaired.append(site(node))
        if reading.parts > 1:
            self.parted[site(node)] = reading.parts

    def _look(self, reading: Reading) -> Moments:
        """What the layer reads in the twin, and how its outputs should change to bring its anchor back."""
        twin, layer, place = self.twin, reading.layer, reading.anchor
        moments = Moments(reading, aims=True)
        for number, batch in enumerate(twin.batches):
            before, now = twin.ahead(number, place.node)
            self.sampler.begin(number, batch)
            moments.update(
                *self.sampler.rows(layer, twin.cut[number][layer.source], place.pull(before - now))
            )
        return moments

    def _choose(self, reading: Reading, i: int, grams: Sequence[Tensor], wanted: Tensor) -> list[Group]:
        assert self.readers is not None
        family, cost = self.readers.algebra.families[i], reading.anchor.scale.square()
        problems = list(self.readers.problems(reading, family, grams, wanted, cost))
        count = len(self.chosen[i])
        return [family[k] for k in eliminate(problems, len(family), stop=count).order]

    def _narrowed(
        self,
        reading: Reading,
        matrices: Tensor,
        normal: tuple[Sequence[Tensor], Sequence[Tensor]],
        gone: Sequence[Group],
    ) -> Tensor:
        """New matrices, with zeros where channels went."""
        layer, solved = reading.layer, torch.zeros_like(matrices)
        lost = np.zeros(layer.ins, dtype=bool)
        if gone and self.readers is not None:
            lost = self.readers.channels(layer.node, gone)
        for i, keep in enumerate(reading.places(~lost)):
            gram = ridged(normal[0][i])
            aim = gram[keep] @ normal[1][i].T
            solved[i][:, keep] = torch.linalg.solve(gram[keep][:, keep], aim).T
        return solved

    def _formed(
        self, reading: Reading, fit: Fit, grams: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> Tensor:
        """New matrices of another form; where a layer is solved in parts, those of the survey."""
        if reading.blocks > 1 and fit.whole is not None:
            return reading.matrices(fit.whole)
        return torch.stack([fit.matrix(grams[i], wanted[i], i) for i in range(reading.blocks)])

    def _set(self, reading: Reading, moments: Moments, matrices: Tensor, solved: Tensor) -> None:
        """Puts new matrices in, and the shift that goes with them."""
        layer = reading.layer
        shift = torch.zeros(reading.blocks, layer.outs // layer.groups, dtype=torch.float64)
        for i in range(reading.blocks):
            mean, error = moments.mean(i)
            shift[i] = (matrices[i] - solved[i]) @ mean + (error if len(error) else 0.0)
        self.twin.set_tensor(layer.weight, reading.weight(solved))
        if reading.shift is None:
            return
        total = shift.unflatten(0, (-1, reading.parts)).sum(1).flatten()
        if reading.shift is not layer.bias:
            gain = norm_gain(self.twin.graph, reading.anchor.steps[0])
            total = total * gain if gain is not None else total
        self.twin.set_tensor(reading.shift, self.twin.now(reading.shift).double() + total)


def _ridge(rows: int, columns: int) -> float:
    """Ridge of a Gram matrix, of its mean diagonal: few rows know few directions, and nothing of the others."""
    return max(RIDGE, SHRINKAGE * columns / max(rows, 1))


# -------------------------------------------------------------------- batch norms


def restate_norms(graph: Graph, data: Data) -> int:
    """Gives batch norms the statistics that their inputs now have, without changing what they compute; how many.

    gain' = gain sqrt((var' + eps) / (var + eps)), bias' = bias + gain (mean' - mean) / sqrt(var + eps): evaluation
    gives the same numbers, and training, which normalises by what it sees, starts from there.
    """
    norms: dict[Any, Node] = {node.args[0]: node for node in graph.nodes if _is_restatable(node)}
    seen = {node: Spread(1) for node in norms}
    for batch in data if norms else ():
        for node, value in graph.values(*batch.inputs):
            if node in norms:
                seen[node].update(value.movedim(1, -1))
    for node, spread in seen.items():
        a, mean, variance = arguments(norms[node]), spread.mean, spread.variance
        old = {
            name: graph.tensor(a[name]).double() for name in ("weight", "bias", "running_mean", "running_var")
        }
        gain = old["weight"] * (old["running_var"] + a["eps"]).rsqrt()
        new = {
            "weight": gain * (variance + a["eps"]).sqrt(),
            "bias": old["bias"] + gain * (mean - old["running_mean"]),
            "running_mean": mean,
            "running_var": variance,
        }
        for name, value in new.items():
            graph.set_tensor(a[name], value.to(graph.tensor(a[name]).dtype))
    return len(norms)


def _is_restatable(node: Node) -> bool:
    if kind(node) != "batch_norm" or arguments(node)["training"]:
        return False
    a = arguments(node)
    parts = [a[name] for name in ("weight", "bias", "running_mean", "running_var")]
    return all(is_constant(p) and len(p.users) == 1 for p in parts)
