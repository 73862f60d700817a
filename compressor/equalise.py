"""Channels scaled so that rounding costs the outputs least: cross-layer equalisation and smoothing, as one problem.

Scaling a channel where it is made, and back where it is read (`labels.py`), changes no output, but what rounding
costs. With the squared slopes of `noise.py`,

    noise(s) = sum over quantised values   (range of s x)^2 / (12 * 255^2)  * sum over channels of power / s^2
             + sum over rows of weights    (max of |W| / s)^2 / (12 * 127^2) * sum over columns of power * s^2

is a posynomial in s: convex in log s, so that one descent finds the balance between activations and weights for all
layers together. Where nothing above can be scaled, a product in front of a matrix product can (smoothing). Slopes speak
of small noise: where a tenth of the outputs would be noise even so, channels stay as they are.
Sources: Nagel et al. 2019 (arXiv:1906.04721), section 4.1; Xiao et al. 2022 (arXiv:2211.10438).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .data import Data
from .ir import Graph
from .labels import FIXED, ZERO, Labels, labels_of, spread
from .names import site
from .noise import Slopes, slopes
from .ops import kind, shape
from .pipeline import EXACT, Context, Decline, Outcome, Rewrite
from .place import Placement, operands, place
from .quantize import LEVELS, is_bytes, redirect, tapped
from .target import QuantSpec

aten = torch.ops.aten

STEPS, RATE = 300, 0.05  # of the descent, in log s
WIDEST = math.log(64)  # scales lie between 1/64 and 64
ROWS = 128  # of a weight that stand for all of them
LOUD = 0.1  # share of the outputs' energy: where the slopes foresee more noise, they are no guide
SMOOTHS = "smooths"  # in `meta` of such a product
_PRODUCTS = frozenset({"linear", "matmul", "addmm"})  # read their features along the last axis
GAIN = 0.005  # share of all noise that a product in front of a matrix product must take away


# -------------------------------------------------------------------- the best scales


@dataclass
class Problem:
    """noise(log s) as above.

    spans: (class of each channel, low, high, power). rows: (classes of the columns [R or 1, I], largest weights
    [R, I], powers [R, I]).
    """

    spec: QuantSpec
    count: int
    spans: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def noise(self, logs: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        scale = logs.exp()
        least, most, _ = LEVELS[self.spec.activation]
        steps = most - least
        for classes, low, high, power in self.spans:
            s = scale[classes]
            top, bottom = (high * s).amax().clamp(min=0), (low * s).amin().clamp(max=0)
            extent = 2 * torch.maximum(top, -bottom) if self.spec.activation == "s8" else top - bottom
            total = total + (extent / steps).square() / 12 * (power / s.square()).sum()
        levels = 64 if self.spec.reduce_range else 127
        for classes, largest, power in self.rows:
            s = scale[classes]
            total = total + ((largest / s).amax(1).square() * (power * s.square()).sum(1)).sum() / (
                12 * levels**2
            )
        return total

    def solve(self) -> Tensor:
        """log s [classes] of the least noise found; 0 for class 0."""
        logs = torch.zeros(self.count, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([logs], lr=RATE)
        best, least = logs.detach().clone(), math.inf
        with torch.enable_grad():
            for step in range(STEPS):
                for group in optimiser.param_groups:
                    group["lr"] = RATE * (1 - step / STEPS)
                optimiser.zero_grad()
                noise = self.noise(logs)
                if float(noise.detach()) < least:
                    best, least = logs.detach().clone(), float(noise.detach())
                if not noise.requires_grad or not float(noise.detach()) > 0:
                    break
                noise.log().backward()
                assert logs.grad is not None
                logs.grad[FIXED] = 0
                optimiser.step()
                with torch.no_grad():
                    logs.clamp_(-WIDEST, WIDEST)
        return best


def problem_of(labels: Labels, classes: Tensor, slopes: Slopes, spec: QuantSpec) -> Problem:
    graph, problem = labels.graph, Problem(spec, int(classes.max()) + 1)
    for node, seen in slopes.values.items():
        one = labels.of[node].reshape(-1) if seen.axis is not None else torch.tensor([FIXED])
        found = torch.where(one == ZERO, FIXED, classes[one.clamp(min=0)])
        problem.spans.append((found, seen.low, seen.high, seen.power))
    for made in labels.written:
        layer = made.layer
        if layer is None or layer.weight not in slopes.weights:
            continue
        matrices = [
            layer.matrix(t).flatten(0, 1).double()
            for t in (graph.tensor(layer.weight), slopes.weights[layer.weight])
        ]
        largest = matrices[0].abs().unflatten(1, (-1, layer.taps)).amax(2)
        power = matrices[1].unflatten(1, (-1, layer.taps)).sum(2)
        some = torch.linspace(0, len(largest) - 1, min(ROWS, len(largest))).round().long()
        ins = classes[made.ins.clamp(min=0)]
        ins = ins if len(ins) == 1 else ins[some]
        problem.rows.append((ins, largest[some], power[some] * (len(largest) / len(some))))
    return problem


def rescale(labels: Labels, scales: Tensor) -> list[Node]:
    """Writes scales [labels] into the constants of everything that makes or reads channels; what changed."""
    graph, changed = labels.graph, []
    for node, one in labels.of.items():
        for part in one if isinstance(one, list) else [one]:
            if part is not None and bool(((factor := scales[part.clamp(min=0)]) != 1).any()):
                graph.disclaim(node, factor if part is one else None)
    for made in labels.written:
        outs, ins = scales[made.outs], torch.where(made.ins == ZERO, 1.0, scales[made.ins.clamp(min=0)])
        if bool((outs == 1).all() and (ins == 1).all()):
            continue
        changed.append(made.node)
        if made.layer is None:
            factor = outs / ins
            for constant in made.constants:
                value = graph.tensor(constant)
                wide = [i for i, size in enumerate(value.shape) if size > 1] or [value.dim() - 1]
                graph.set_tensor(
                    constant, (value.double() * spread(factor, wide[0], value.dim())).to(value.dtype)
                )
            continue
        layer = made.layer
        weight = graph.tensor(layer.weight)
        matrix = layer.matrix(weight).double()
        rows = outs.reshape(layer.groups, -1, 1)
        columns = ins.repeat_interleave(layer.taps, 1)
        columns = columns[None] if len(columns) == 1 else columns.unflatten(0, (layer.groups, -1))
        graph.set_tensor(layer.weight, layer.folded(matrix * rows / columns).to(weight.dtype).contiguous())
        if layer.bias is not None:
            bias = graph.tensor(layer.bias)
            graph.set_tensor(layer.bias, (bias.double() * outs).to(bias.dtype))
    return changed


# -------------------------------------------------------------------- products in front of matrix products


def smooth(graph: Graph, plan: Placement) -> list[Node]:
    """Products with ones in front of layers that take integers and give floats, where nothing above can be scaled."""
    labels = labels_of(graph)
    classes = labels.classes()
    made = []
    for value in list(plan.owner):
        readers = [user for user in value.users if user in plan.operators]
        plain = readers and all(user in plan.floating and kind(user) in _PRODUCTS for user in readers)
        one = labels.of.get(value)
        if (
            not plain
            or plan.is_integer(value)
            or not isinstance(one, Tensor)
            or bool((classes[one.clamp(min=0)] != FIXED).any())
        ):
            continue
        ones = graph.add_tensor(f"{value.name}_smoothing", torch.ones(shape(value)[-1]))
        first = next(n for n in graph.nodes if n in readers)
        product = graph.insert(aten.mul.Tensor, (value, ones), before=first)
        for user in readers:
            redirect(graph, user, value, product)
        product.meta[SMOOTHS] = True
        made.append(product)
    labels = labels_of(graph)
    classes = labels.classes()
    stuck = [p for p in made if bool((classes[labels.of[p].reshape(-1).clamp(min=0)] == FIXED).all())]  # type: ignore[union-attr]
    _drop(graph, stuck)  # their readers let no scale through either
    return [product for product in made if product not in stuck]


def release(graph: Graph, floats: Collection[Node]) -> int:
    """Takes out the products whose readers all stay float; what these multiply with takes the factors back.

    Answers how many go.
    """
    products = [n for n in graph.nodes if SMOOTHS in n.meta and all(user in floats for user in n.users)]
    if not products:
        return 0
    labels = labels_of(graph)
    classes = labels.classes()
    scales = torch.ones(int(classes.max()) + 1, dtype=torch.float64)
    for product in products:
        factors: Any = product.args[1]
        scales[classes[labels.of[product].reshape(-1)]] = 1 / graph.tensor(factors).double()
    rescale(labels, scales[classes])
    _drop(graph, products)
    return len(products)


# -------------------------------------------------------------------- the step of a pass


def equalise(graph: Graph, spec: QuantSpec, ignore: Collection[str], data: Data, ctx: Context) -> Outcome:
    """Scales the channels of a graph that is about to be quantised as `place` says. Its outputs stay what they are."""
    outcome = Outcome(contract=EXACT, step="equalisation")
    products = smooth(graph, place(graph, spec, None, ignore))
    plan = place(graph, spec, None, ignore)
    labels = labels_of(graph)
    classes = torch.unique(labels.classes(), return_inverse=True)[1]
    found = slopes_of(plan, labels, data, ctx)
    if isinstance(found, str):
        _drop(graph, products)
        outcome.declines.append(Decline("the model", found))
        return outcome
    problem = problem_of(labels, classes, found, spec)
    before = float(problem.noise(torch.zeros(problem.count, dtype=torch.float64)))
    logs = problem.solve()
    least, useless = float(problem.noise(logs)), []
    if least > LOUD:
        _drop(graph, products)
        foreseen = f"at {_decibels(least):g} dB the outputs are no longer as the slopes foresee"
        outcome.declines.append(Decline("the model", f"{foreseen}: scaling could as well do harm"))
        return outcome
    for product in products:
        alone = logs.clone()
        for one in (product, product.args[0]):  # it may be what scales the layer above, too
            alone[classes[labels.of[one].reshape(-1).clamp(min=0)]] = 0  # type: ignore[index,union-attr]
        if float(problem.noise(alone)) - least < GAIN * least:
            useless.append(product)
            logs = alone
    changed = rescale(labels, logs.exp()[classes])
    _drop(graph, useless)
    kept = [product for product in products if product not in useless]
    if changed:
        what = f"channels of {len(changed)} operators scaled for rounding"
        outcome.rewrites = [Rewrite(site(changed[0]), what)]
    outcome.facts = {"noise_db": _decibels(before), "equalised_db": _decibels(least), "products": len(kept)}
    return outcome


def slopes_of(plan: Placement, labels: Labels, data: Data, ctx: Context) -> Slopes | str:
    """Slopes of the outputs by all that will be rounded, as its integer readers see it; why there are none."""
    copy, taps = tapped(plan)
    twins, origin = {n.name: n for n in copy.nodes}, {n.name: n for n in plan.graph.nodes}
    weights = {twins[bound.weight.name]: None for node in plan.operators if (bound := operands(node))}
    axes = {tap: labels.axis(value) for tap, value in taps.items() if not is_bytes(value)}
    with ctx.progress("int8: what rounding costs", data.samples) as advance:
        try:
            found = slopes(copy, axes, weights, data, ctx.seed, advance)
        except RuntimeError as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            return f"an operator has no derivative: {first[:120]}"
    return Slopes(
        {taps[tap]: channels for tap, channels in found.values.items()},
        {origin[node.name]: square for node, square in found.weights.items()},
    )


def _drop(graph: Graph, products: Iterable[Node]) -> None:
    """Takes out products with ones."""
    for product in products:
        graph.replace_uses(product, product.args[0])  # type: ignore[arg-type]
    graph.clean()


def _decibels(noise: float) -> float:
    return round(-10 * math.log10(noise), 2) if noise > 0 else math.inf
