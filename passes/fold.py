"""Batch normalisation, scales and shifts, constants, identities and dead code disappear into their neighbours.

`scales.py` knows what a per-channel scale and shift is and which layer can take it, `identities.py` what changes
nothing, `constants.py` what no input reaches, `sharing.py` what is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from compressor.absorb import (
    Front,
    behind,
    folded,
    folded_in_front,
    front,
    in_order,
    reversed_inputs,
    tensors_of,
)
from compressor.constants import fold_constants
from compressor.identities import identities, loosen_views, shorter
from compressor.ir import Graph
from compressor.names import short_name, site
from compressor.ops import arguments, attention_scale, is_constant, kind, set_argument
from compressor.pipeline import EXACT, Context, Contract, Decline, Outcome, Pass, Rewrite, Size
from compressor.scales import Map, composed, map_of, standing_chains
from compressor.sharing import share_equal

aten = torch.ops.aten


@dataclass(frozen=True)
class Fold(Pass):
    """Batch norms, scales, constants and identities disappear into their neighbours; nothing else changes.

    A batch norm, or a product or sum with constants, folds into the convolution (1d, 2d, 3d, transposed, grouped,
    depthwise), linear, norm or table above it, or into the layers that read it, through whatever only moves values.
    What several operators say, one says; what is computed twice is computed once. max_bytes: how much larger than
    its sources a folded constant may be.
    """

    name: ClassVar[str] = "fold"
    contract: ClassVar[Contract] = EXACT
    after: ClassVar[tuple[str, ...]] = ("merge", "shorten", "prune", "squeeze")

    max_bytes: int = 1 << 24

    def plan(self, size: Size, graph: Graph, data: bool) -> tuple[Size, str]:
        norms = [n for n in graph.nodes if kind(n) == "batch_norm"]
        gone = sum(
            graph.tensor(source).numel() for n in norms for source in n.all_input_nodes if is_constant(source)
        )
        gone -= sum(graph.tensor(n.all_input_nodes[-1]).numel() for n in norms)  # a bias stays for each
        share = 1 - gone / max(size.params, 1)
        left = Size(size.params * share, size.macs, size.bytes * share)
        return (
            left,
            f"{len(norms)} batch norms go, each but for a bias, where something beside them takes them in",
        )

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        outcome = Outcome()
        room = ctx.limit
        while room != 0:
            outcome.declines.clear()
            made = self._sweep(graph, room, outcome.declines)
            outcome.rewrites += made
            room = None if room is None else room - len(made)
            if not made:
                break
        return outcome

    def _sweep(self, graph: Graph, limit: int | None, declines: list[Decline]) -> list[Rewrite]:
        """One round of everything, at most `limit` rewrites."""
        made: list[Rewrite] = []

        def room() -> int | None:
            return None if limit is None else limit - len(made)

        made += _dead_code(graph)
        folding = fold_constants(graph, self.max_bytes, room())
        made += [Rewrite(*one) for one in folding.made]
        declines += [Decline.at(node, reason) for node, reason in folding.left]
        moved: set[Node] = set()
        for step in (
            identities(graph, moved),
            shorter(graph, moved),
            _maps(graph),
            _flips(graph),
            _attention_scales(graph),
        ):
            while room() != 0 and (found := next(step, None)) is not None:
                if isinstance(found, Rewrite):
                    made.append(found)
                else:
                    declines.append(found)
        if moved:
            loosen_views(graph, moved)
        results = set(graph.results)
        for node in share_equal(graph, lambda n: n not in results and kind(n) != "size", room()):
            made.append(Rewrite(site(node), f"{short_name(node)} that is computed already"))
        graph.clean()
        return made


def _dead_code(graph: Graph) -> list[Rewrite]:
    operators = sum(n.op == "call_function" for n in graph.nodes)
    graph.clean()
    gone = operators - sum(n.op == "call_function" for n in graph.nodes)
    return [Rewrite("graph", f"{gone} operator{'s' * (gone > 1)} that no output needs")] if gone else []


# -------------------------------------------------------------------- scales and shifts


def _maps(graph: Graph) -> Iterator[Rewrite | Decline]:
    writer = _Writer(graph)
    for node in graph.nodes:
        one = map_of(graph, node) if node.users else None
        if isinstance(one, str):
            yield Decline.at(node, one)
        elif one is not None:
            made = writer.above(one)
            made = made if isinstance(made, Rewrite) else writer.below(one, made)
            if isinstance(made, Rewrite) or kind(node) == "batch_norm":
                yield made
    for chain in standing_chains(graph):
        what = _shortened(graph, chain)
        if what:
            yield Rewrite(site(chain[-1].node), what)


def _shortened(graph: Graph, chain: list[Map]) -> str:
    """A run of maps as at most two operators: the shift first where what reads them can take the scale."""
    scale, shift = composed(chain)
    last, shifts = chain[-1], bool((shift != 0).any())
    alone = Map(last.node, chain[0].source, scale.expand_as(scale + shift), torch.zeros_like(scale + shift))
    shift_first = last.shifts and bool((scale != 0).all()) and isinstance(front(graph, alone), Front)
    if not shift_first and len(chain) <= int(alone.scales) + int(shifts):
        return ""
    value = chain[0].source
    steps = [(aten.mul.Tensor, scale)] if alone.scales else []
    if shifts and shift_first:
        steps.insert(0, (aten.add.Tensor, shift / scale))
    elif shifts:
        steps.append((aten.add.Tensor, shift))
    for target, number in steps:
        value = graph.insert(target, (value, _constant(graph, last.node, number)), before=last.node)
    graph.replace_uses(last.node, value)
    names = ", ".join(short_name(one.node) for one in chain)
    return f"{names} into {' and '.join(target.overloadpacket.__name__ for target, _ in steps) or 'nothing'}"


def _constant(graph: Graph, like: Node, number: Tensor) -> Node | float:
    if number.numel() == 1:
        return float(number)
    return graph.add_tensor(f"{site(like)}.{like.name}", number.to(_dtype(like)))


def _flips(graph: Graph) -> Iterator[Rewrite]:
    """Channels in reverse, maybe scaled and shifted: the layers that read them take them as they come (BGR for RGB)."""
    writer = _Writer(graph)
    for node in graph.nodes:
        if kind(node) != "flip" or not node.users or len(arguments(node)["dims"]) != 1:
            continue
        maps, end = [], node
        while len(end.users) == 1 and isinstance(one := map_of(graph, next(iter(end.users))), Map):
            maps.append(one)
            end = one.node
        axis = arguments(node)["dims"][0] % node.meta["val"].dim()
        readers = in_order(graph, end, axis)
        if not readers or any(writer.others(read.user) for read, *_ in readers.readers):
            continue
        value = arguments(node)["self"]
        for one in maps:
            for target, number in ((aten.mul.Tensor, one.scale), (aten.add.Tensor, one.shift)):
                if bool((number != (target is aten.mul.Tensor)).any()):
                    constant = _constant(graph, one.node, number.flip(axis))
                    value = graph.insert(target, (value, constant), before=one.node)
        names = ", ".join(site(read.user) for read, *_ in readers.readers)
        rewrite = Rewrite(site(node), f"channels in reverse into the weight of {names}")
        tensors = [
            writer.stored(read.user, *reversed_inputs(graph, read.user)) for read, *_ in readers.readers
        ]
        replace(readers, one=replace(readers.one, source=value)).apply(graph, tensors)
        yield rewrite


def _attention_scales(graph: Graph) -> Iterator[Rewrite]:
    """The scale of attention goes into the projection of its queries, or else of its keys."""
    writer = _Writer(graph)
    for node in graph.nodes:
        if kind(node) == "attention":
            made = _scale_of_attention(graph, node, writer)
        else:
            made = _scale_of_product(graph, node, writer)
        if isinstance(made, Rewrite):
            yield made


def _scale_of_attention(graph: Graph, node: Node, writer: _Writer) -> Rewrite | Decline | None:
    bound = arguments(node)
    scale = attention_scale(node)
    if scale == 1 or not isinstance(scale, float):
        return None

    def finish(name: str, value: Node) -> None:
        set_argument(graph, node, name, value)
        graph.set_args(node, node.args, {**node.kwargs, "scale": 1.0})

    return _into_operand(graph, node, {n: bound[n] for n in ("query", "key", "value")}, scale, writer, finish)


def _scale_of_product(graph: Graph, node: Node, writer: _Writer) -> Rewrite | Decline | None:
    """The same for attention that is written out: a product of two activations times a number."""
    one = map_of(graph, node) if node.users else None
    if not isinstance(one, Map) or one.shifts or one.scale.numel() != 1 or kind(one.source) != "matmul":
        return None
    product = one.source
    operands = arguments(product)
    if len(product.users) != 1 or product in graph.results or any(map(is_constant, operands.values())):
        return None

    def finish(name: str, value: Node) -> None:
        args = [*product.args]
        args[list(operands).index(name)] = value
        graph.replace_uses(node, graph.insert(product.target, tuple(args), before=product))  # type: ignore[arg-type]
        graph.erase(node)

    return _into_operand(graph, product, operands, float(one.scale), writer, finish)


def _into_operand(
    graph: Graph,
    node: Node,
    operands: dict[str, Node],
    scale: float,
    writer: _Writer,
    finish: Callable[[str, Node], None],
) -> Rewrite | Decline | None:
    made: Rewrite | Decline | None = None
    for name, value in list(operands.items())[:2]:
        if list(operands.values()).count(value) > 1:
            continue
        one = Map(
            node,
            value,
            *(torch.full((1,) * value.meta["val"].dim(), n, dtype=torch.float64) for n in (scale, 0.0)),
        )
        made = writer.above(one, partial(finish, name))
        if isinstance(made, Rewrite):
            return Rewrite(made.site, f"scale of {made.what}")
    return made


@dataclass
class _Writer:
    """Folds maps into layers; sites that share tensors, and are scaled alike, go on sharing.

    made: what was folded from the same tensors by the same numbers before; forgotten once one of these is written anew.
    """

    graph: Graph
    made: dict[tuple[Any, ...], tuple[Node | None, Node | None]] = field(default_factory=dict)

    def above(self, one: Map, finish: Callable[[Node], None] | None = None) -> Rewrite | Decline:
        """Folds a map into the layer whose output it scales. finish: what becomes of its value, see `Behind.apply`."""
        found = behind(self.graph, one)
        if isinstance(found, str):
            return Decline.at(one.node, found)
        carrier = found.carrier
        before, others = tensors_of(carrier), self.others(carrier)
        if others and kind(one.node) != "batch_norm":
            return Decline.at(one.node, f"the weight of {site(carrier)} is shared with {site(others[0])}")
        tensors = self._tensors(carrier, found.scale, found.shift, *folded(self.graph, found))
        if tensors is None:
            return Decline.at(one.node, f"the folded weight would not be finite in {_dtype(carrier)}")
        what = f"{short_name(one.node)} into {short_name(carrier)} in front of it ({site(carrier)})"
        if others and tensors[0] is not before[0]:
            what += f"; {before[0].target} is shared with {site(others[0])}, this site now has its own copy"  # type: ignore[union-attr]
        where = site(one.node)
        found.apply(self.graph, *tensors, finish or partial(self.graph.replace_uses, one.node))
        return Rewrite(where, what)

    def below(self, one: Map, above: Decline) -> Rewrite | Decline:
        """Folds a map into the layers that read it. above: why it did not go into the one above."""
        found = front(self.graph, one)
        if isinstance(found, str):
            if above.reason:
                return above
            source = short_name(one.source) if one.source.op == "call_function" else "an input"
            return Decline.at(one.node, found if "pads" in found else f"it reads {source}, and {found}")
        for read, _, _ in found.readers:
            others = self.others(read.user)
            if others:
                return Decline.at(
                    one.node, f"the weight of {site(read.user)} is shared with {site(others[0])}"
                )
        tensors = []
        for read, scale, shift in found.readers:
            made = folded_in_front(self.graph, read.user, scale, shift)
            if not _finite(made, read.user):
                return Decline.at(one.node, f"the folded weight would not be finite in {_dtype(read.user)}")
            tensors.append(self.stored(read.user, *made))
        readers = ", ".join(dict.fromkeys(site(read.user) for read, _, _ in found.readers))
        reader = short_name(found.readers[0][0].user)
        rewrite = Rewrite(site(one.node), f"{short_name(one.node)} into {reader} behind it ({readers})")
        found.apply(self.graph, tensors)
        return rewrite

    def others(self, layer: Node) -> list[Node]:
        """Who else reads a layer's weight."""
        weight = tensors_of(layer)[0]
        return [] if weight is None else [user for user in weight.users if user is not layer]

    def _tensors(
        self, carrier: Node, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Node | None, Node | None] | None:
        before, numbers = tensors_of(carrier), (scale.numpy().tobytes(), shift.numpy().tobytes())
        key = (kind(carrier), arguments(carrier).get("groups"), *before, *numbers)
        if key in self.made:
            return self.made[key]
        if not _finite((weight, bias), carrier):
            return None
        made = self.stored(carrier, weight, bias)
        if not any(node is not None and node in before for node in made):
            self.made[key] = made
        return made

    def stored(
        self, layer: Node, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Node | None, Node | None]:
        """The nodes of the folded tensors: those that the layer has, if nothing else reads them."""
        old, old_bias = tensors_of(layer)
        path = f"{site(layer)}.weight" if old is None else str(old.target)
        stem, _, leaf = path.rpartition(".")
        beside = f"{stem}.bias" if leaf == "weight" else f"{path}_bias"
        trained = any(n is not None and str(n.target) in self.graph.parameters for n in (old, old_bias))
        nodes: list[Node | None] = []
        for node, name, value in ((old, path, weight), (old_bias, beside, bias)):
            if value is None:
                nodes.append(None)
                continue
            value = value.to(_dtype(layer) if node is None else node.meta["val"].dtype)
            if node is not None and list(node.users) == [layer]:
                self.made = {k: v for k, v in self.made.items() if node not in (*k, *v)}
                self.graph.set_tensor(node, value)
            else:
                node = self.graph.add_tensor(name, value)
                if trained:
                    self.graph.parameters |= {str(node.target)}
            nodes.append(node)
        return nodes[0], nodes[1]


def _dtype(layer: Node) -> torch.dtype:
    return layer.meta["val"].dtype  # type: ignore[no-any-return]


def _finite(tensors: tuple[Tensor | None, Tensor | None], layer: Node) -> bool:
    return all(t is None or bool(t.to(_dtype(layer)).isfinite().all()) for t in tensors)
