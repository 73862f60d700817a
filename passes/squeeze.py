"""Low-rank rewrites: one convolution or linear becomes two thinner ones, with r channels between them.

    outputs   k x k to r channels, then 1 x 1    W [O, I k k] = L [O, r] R [r, I k k]    also for linear
    inputs    1 x 1 to r channels, then k x k    W [O k k, I] = L [O k k, r] R [r, I]

`outputs` is the best split for the data, exactly: the covariance of the layer's outputs is all that it takes.
`inputs` weighs every tap of the kernel by one covariance of the channels. The bias goes to the second
operator, together with the mean of what is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from compressor.errors import UsageError
from compressor.ir import Graph, operator_name, site
from compressor.measure import parameters
from compressor.ops import arguments, is_constant, kind, macs, sizes
from compressor.padding import Padding
from compressor.pipeline import BOUNDED, Context, Contract, Decline, Outcome, Pass, Rewrite
from compressor.reconstruct import LowRank, Moments, allocate, low_rank, numerical_rank
from compressor.statistics import Covariance

Form = Literal["outputs", "inputs"]
Value = tuple[Node, int]  # a value of the graph, and the axis of its channels

# Of bare `squeeze`: ResNet-20 and ResNet-56, split wherever it paid, kept over 20 dB at their outputs.
ENERGY = 0.99
# Two operators pay up to this share of one's MACs. ONNX Runtime on AVX-512, 3 x 3 over 64 to 512 channels:
# pairs with 0.83 of the MACs took 0.82 to 0.92 of the time, pairs with 0.97 took 0.96 to 1.11.
PAYS = 0.9
_STATISTICS = 1 << 28  # bytes of covariances held at once; more layers take more passes over the data
_TRIALS = 3  # plans that are timed before the rewrite is given up
_SLOWER = "the target runs the model no faster with it; squeeze(measure=false) takes it all the same"


@dataclass(frozen=True)
class Squeeze(Pass):
    """Convolutions and linears whose weights are nearly low-rank become two thinner operators each.

    energy: share of its output's variance that each layer keeps (of its squared singular values where there
    is no calibration data); `energy=1` splits only what is exactly low-rank. macs, params: budget for the
    whole model, as a share of what it has now; ranks are then spread so that the product of the shares kept
    is greatest. Bare `squeeze` is `energy=0.99`, and takes nothing from what is exactly low-rank. measure: keep
    only what the target runs faster. Ranks are multiples of the target's channel multiple, or exact. Layers
    that two operators would not make a tenth cheaper stay as they are, and so do shared, computed and grouped
    weights.
    """

    name: ClassVar[str] = "squeeze"
    contract: ClassVar[Contract] = BOUNDED
    after: ClassVar[tuple[str, ...]] = ("merge", "prune")

    energy: float | None = None
    macs: float | None = None
    params: float | None = None
    measure: bool = True

    def __post_init__(self) -> None:
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"squeeze(energy={self.energy}): the share to keep is above 0 and at most 1")
        for name, share in self._budgets.items():
            if not 0 < share < 1:
                raise UsageError(f"squeeze({name}={share}): a share of the model's {name}, between 0 and 1")

    @property
    def _budgets(self) -> dict[str, float]:
        return {n: s for n, s in (("macs", self.macs), ("params", self.params)) if s is not None}

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        layers, declines = _layers(graph)
        before = {"macs": macs(graph), "params": parameters(graph)}
        shelves: list[list[Option]] = []
        for group in _groups(layers):
            seen = _observe(graph, group, ctx)
            with ctx.progress("squeeze: factorising", len(group)) as advance:
                for layer in group:
                    found = self._options(graph, layer, seen, ctx.target.channel_multiple)
                    if isinstance(found, Decline):
                        declines.append(found)
                    else:
                        shelves.append(found)
                    advance(1)
        plan = self._choose(shelves, before)
        spared = {shelf[0].layer for shelf in shelves} - {o.layer for o in plan}
        declines += [
            Decline.at(n.node, "the budget is met at less loss elsewhere") for n in layers if n in spared
        ]
        wanted = plan = plan[: ctx.limit]
        facts: dict[str, Any] = {"weighted": ctx.calibration is not None}
        if plan and self.measure and ctx.measure is not None:
            plan, facts["ms"] = _faster(graph, wanted, ctx.measure)
            declines += [Decline.at(o.layer.node, _SLOWER) for o in wanted if o not in plan]
        for option in plan:
            _apply(graph, option)
        graph.clean()
        after = {"macs": macs(graph), "params": parameters(graph)}
        facts |= self._facts(plan, {name: after[name] / max(before[name], 1) for name in after})
        return Outcome([Rewrite(site(o.layer.node), str(o)) for o in plan], declines, facts)

    def _options(
        self, graph: Graph, layer: Layer, seen: Mapping[Value, Covariance], multiple: int
    ) -> list[Option] | Decline:
        """Every split of a layer that pays and keeps enough energy; the reason why not when there is none."""
        weight = graph.tensor(layer.weight)
        if not bool(torch.isfinite(weight).all()) or not bool(weight.any()):
            return Decline.at(layer.node, "its weight is zero, or not finite")
        scale = _gain(graph, layer.node) if seen else None
        options: list[Option] = []
        for form in layer.forms:
            moments = _moments(graph, layer, form, seen)
            if moments is not None and not bool(torch.isfinite(moments.covariance).all()):
                return Decline.at(layer.node, "the calibration data gives values here that are not finite")
            options += _splits(layer, form, weight, moments, scale, multiple)
        bare = self.energy is None and not self._budgets
        keep = ENERGY if bare else (self.energy or 0.0)
        enough = [o for o in options if o.error <= 1 - keep]  # never empty: the full rank loses nothing
        paying = [o for o in enough if o.share <= PAYS]
        if paying:
            lossless = [o for o in paying if o.error == 0]
            return lossless if bare and lossless else paying
        least = min(enough, key=lambda o: o.share)
        why = f"keeping {keep:g} of the energy takes rank" if keep else "its least rank is"
        cost = f"{least.share:.2f} of its MACs; two operators pay up to {PAYS:g}"
        return Decline.at(layer.node, f"{why} {least.rank} of {layer.full(least.form)}, which costs {cost}")

    def _choose(self, shelves: Sequence[list[Option]], before: Mapping[str, int]) -> list[Option]:
        """At most one option a layer, in the graph's order."""
        if not self._budgets:
            return [min(options, key=lambda o: (o.share, o.error)) for options in shelves]
        points = [
            [(tuple(o.saved[n] / max(before[n], 1) for n in self._budgets), o.loss) for o in options]
            for options in shelves
        ]
        chosen = allocate(points, [1 - share for share in self._budgets.values()])
        return [options[k] for options, k in zip(shelves, chosen, strict=True) if k is not None]

    def _facts(self, plan: Sequence[Option], shares: Mapping[str, float]) -> dict[str, Any]:
        facts: dict[str, Any] = {name: round(share, 4) for name, share in shares.items()}
        missed = [
            f"{shares[n]:.3f} of the {n}, asked for {s:g}" for n, s in self._budgets.items() if shares[n] > s
        ]
        if self._budgets:
            facts["budget"] = f"not reached: {'; '.join(missed)}" if missed else "reached"
        return facts | {"layers": [o.facts() for o in plan]}


# -------------------------------------------------------------------- layers and their splits


@dataclass(frozen=True)
class Layer:
    """A convolution (`kernel` holds its sizes) or a linear (`kernel` is empty) that can be split.

    reads, writes: positions of its input and of its output, for one sample.
    """

    node: Node
    source: Node
    weight: Node
    outs: int
    ins: int
    kernel: tuple[int, ...]
    reads: int
    writes: int

    @property
    def area(self) -> int:
        return math.prod(self.kernel)

    @property
    def axis(self) -> int:
        """Where the channels are, in its input and in its output."""
        return -1 - len(self.kernel)

    @property
    def forms(self) -> tuple[Form, ...]:
        return ("outputs",) if self.area == 1 else ("outputs", "inputs")

    @property
    def whole(self) -> dict[str, int]:
        """MACs and parameters as it is."""
        params = self.outs * self.ins * self.area
        return {"macs": params * self.writes, "params": params}

    def cost(self, form: Form, rank: int) -> dict[str, int]:
        """MACs and parameters of the two operators that it becomes."""
        if form == "outputs":
            params = rank * (self.ins * self.area + self.outs)
            return {"macs": params * self.writes, "params": params}
        first, second = rank * self.ins, rank * self.outs * self.area
        return {"macs": first * self.reads + second * self.writes, "params": first + second}

    def full(self, form: Form) -> int:
        """The largest rank that a weight of this shape can have."""
        return (
            min(self.outs, self.ins * self.area)
            if form == "outputs"
            else min(self.outs * self.area, self.ins)
        )

    def matrix(self, form: Form, weight: Tensor) -> Tensor:
        """The weight [O, I, *kernel] unfolded as L R: [O, I k k] or [O k k, I]."""
        return weight.flatten(1) if form == "outputs" else weight.movedim(1, -1).reshape(-1, self.ins)

    def folded(self, form: Form, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the first and the second operator, from L and R."""
        rank, ones = len(right), (1,) * len(self.kernel)
        if form == "outputs":
            return right.reshape(rank, self.ins, *self.kernel), left.reshape(self.outs, rank, *ones)
        taps = left.reshape(self.outs, *self.kernel, rank)
        return right.reshape(rank, self.ins, *ones), taps.movedim(-1, 1)


@dataclass(frozen=True, eq=False)
class Option:
    """One way to split one layer. error: the share of the energy that it loses."""

    layer: Layer
    form: Form
    rank: int
    error: float
    basis: LowRank

    @property
    def share(self) -> float:
        """MACs of the two operators, of the one's."""
        return self.layer.cost(self.form, self.rank)["macs"] / max(self.layer.whole["macs"], 1)

    @property
    def saved(self) -> dict[str, int]:
        new = self.layer.cost(self.form, self.rank)
        if self.basis.mean is not None and arguments(self.layer.node)["bias"] is None:
            new["params"] += self.layer.outs  # the bias that the mean makes
        return {name: self.layer.whole[name] - new[name] for name in new}

    @property
    def loss(self) -> float:
        """-log of the share kept: summed over layers, it is the product of the shares that counts."""
        return -math.log(max(1 - self.error, 1e-12))

    def __str__(self) -> str:
        layer, operator = self.layer, operator_name(self.layer.node).split(".")[1]
        wide, thin = ("x".join(map(str, k)) for k in (layer.kernel, [1] * len(layer.kernel)))
        sizes = (wide, thin) if self.form == "outputs" else (thin, wide)
        one, two = (f"{k} to {n}".strip() for k, n in zip(sizes, (self.rank, layer.outs), strict=True))
        return f"{operator} {layer.ins} to {layer.outs}: {one}, {two}"

    def facts(self) -> dict[str, Any]:
        return {
            "site": site(self.layer.node),
            "form": self.form,
            "rank": self.rank,
            "full": self.layer.full(self.form),
            "energy": round(1 - self.error, 6),
            "error": round(math.sqrt(self.error), 6),
            "macs": round(self.share, 4),
        }


def _layers(graph: Graph) -> tuple[list[Layer], list[Decline]]:
    layers, declines = [], []
    for node in graph.nodes:
        if kind(node) not in ("conv", "conv_transpose", "linear"):
            continue
        obstacle = _obstacle(graph, node)
        if obstacle:
            declines.append(Decline.at(node, obstacle))
            continue
        bound = arguments(node)
        outs, ins, *kernel = sizes(bound["weight"])
        reads, writes = math.prod(sizes(bound["input"])) // ins, math.prod(sizes(node)) // outs
        layers.append(Layer(node, bound["input"], bound["weight"], outs, ins, tuple(kernel), reads, writes))
    return layers, declines


def _obstacle(graph: Graph, node: Node) -> str:
    bound = arguments(node)
    weight, bias = bound["weight"], bound["bias"]
    if kind(node) == "conv_transpose":
        return "transposed convolutions are not split"
    if bound.get("groups", 1) != 1:
        return f"a convolution of {bound['groups']} groups is not split"
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return "its weight or bias is computed while the model runs"
    if len(weight.users) > 1:
        return f"its weight is shared by {len(weight.users)} readers"
    return "" if graph.tensor(weight).is_floating_point() else "its weight is not floating point"


def _splits(
    layer: Layer, form: Form, weight: Tensor, moments: Moments | None, scale: Tensor | None, multiple: int
) -> list[Option]:
    """One option a rank up to the rank that the weight has: there nothing is lost, on any data."""
    matrix = layer.matrix(form, weight)
    exact = numerical_rank(matrix)
    widest = int(PAYS * layer.whole["macs"] / max(layer.cost(form, 1)["macs"], 1))  # no wider rank pays
    held = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = None if scale is None else scale.repeat_interleave(len(matrix) // layer.outs)
    basis = low_rank(matrix, moments, rows).truncated(widest, held)
    plain = basis if exact > widest else low_rank(matrix).truncated(exact, held)
    options = [
        Option(layer, form, rank, basis.error(rank), basis) for rank in range(multiple, exact, multiple)
    ]
    return [*options, Option(layer, form, exact, 0.0, plain)]


# -------------------------------------------------------------------- what the data says


def _watched(layer: Layer, form: Form) -> tuple[Value, bool]:
    """The value whose covariance a split wants, and whether that is the layer's output.

    Where the output is one matrix times the input, position by position, either will do: the narrower one.
    """
    pointwise = layer.area == 1 and layer.reads == layer.writes
    outputs = form == "outputs" and not (pointwise and layer.ins < layer.outs)
    return (layer.node if outputs else layer.source, layer.axis), outputs


def _bytes(layer: Layer) -> int:
    return sum(8 * (layer.outs if _watched(layer, form)[1] else layer.ins) ** 2 for form in layer.forms)


def _groups(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers whose covariances fit into memory together."""
    group: list[Layer] = []
    for layer in layers:
        if group and sum(map(_bytes, group)) + _bytes(layer) > _STATISTICS:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def _observe(graph: Graph, layers: Sequence[Layer], ctx: Context) -> dict[Value, Covariance]:
    """Means and covariances over the calibration data without padding, in one pass; nothing without data."""
    if ctx.calibration is None:
        return {}
    seen: dict[Value, Covariance] = {}
    for layer in layers:
        for form in layer.forms:
            value, outputs = _watched(layer, form)
            seen.setdefault(value, Covariance(layer.outs if outputs else layer.ins))
    axes: dict[Node, list[int]] = {}
    for node, axis in seen:
        axes.setdefault(node, []).append(axis)
    padding = Padding(graph)
    with ctx.progress("squeeze: reading calibration data", ctx.calibration.samples) as advance:
        for batch in ctx.calibration:
            real = padding.of(batch.inputs)
            for node, tensor in graph.values(*batch.inputs):
                for axis in axes.get(node, ()):
                    seen[node, axis].update(real.rows(node, tensor, axis))
            advance(len(batch.inputs[0]))
    return seen


def _moments(graph: Graph, layer: Layer, form: Form, seen: Mapping[Value, Covariance]) -> Moments | None:
    """None without data, and where the data never moves the value."""
    value, outputs = _watched(layer, form)
    found = seen.get(value)
    if found is None or not found.count or bool((found.variance == 0).all()):
        return None
    bias = arguments(layer.node)["bias"] if outputs else None
    mean = found.mean if bias is None else found.mean - graph.tensor(bias).double()
    return Moments(mean, found.covariance, found.count, outputs)


def _gain(graph: Graph, node: Node) -> Tensor | None:
    """What the batch norm behind a layer multiplies each output by: how much an error there weighs."""
    norm = next(iter(node.users), None)
    if norm is None or len(node.users) > 1 or kind(norm) != "batch_norm":
        return None
    bound = arguments(norm)
    gamma, variance = bound["weight"], bound["running_var"]
    if bound["training"] or not is_constant(variance) or not (gamma is None or is_constant(gamma)):
        return None
    gain = (graph.tensor(variance).double() + bound["eps"]).rsqrt()
    gain = gain if gamma is None else gain * graph.tensor(gamma).double().abs()
    return gain.clamp(min=1e-3 * float(gain.max())) if float(gain.max()) > 0 else None


# -------------------------------------------------------------------- the rewrite


def _faster(
    graph: Graph, plan: list[Option], measure: Callable[..., list[float]]
) -> tuple[list[Option], dict[str, float]]:
    """The plan if the model runs faster with it, else the half that saves the greatest shares, and so on."""
    times: dict[str, float] = {}
    for _ in range(_TRIALS):
        trial = graph.copy()
        for option in plan:
            _apply(trial, option)
        trial.clean()
        times["before"], times["after"] = (round(ms, 4) for ms in measure(graph, trial))
        if times["after"] < times["before"]:
            return plan, times
        best = sorted(plan, key=lambda o: o.share)[: len(plan) // 2]
        plan = [o for o in plan if o in best]
        if not plan:
            break
    return [], times


def _apply(graph: Graph, option: Option) -> None:
    """Puts the two operators in the place of the one."""
    layer, node = option.layer, graph.node(option.layer.node.name)
    bound = arguments(node)
    old, bias = bound["weight"], bound["bias"]
    stored = graph.tensor(old)
    factors = option.basis.factors(layer.matrix(option.form, stored), option.rank)
    first, second = layer.folded(option.form, *factors)
    shift = option.basis.shift(option.rank)
    if shift is not None:
        total = shift.reshape(layer.outs, -1).sum(1)
        total = total if bias is None else total + graph.tensor(bias).double()
        bias = _store(graph, old, "expand.bias", total)
    place = tuple(bound[name] for name in ("stride", "padding", "dilation") if name in bound)
    plain = (
        torch.ops.aten.linear if not layer.kernel else getattr(torch.ops.aten, f"conv{len(layer.kernel)}d")
    )
    calls: list[tuple[Any, tuple]] = [(node.target, place), (plain.default, ())]
    (one, at_one), (two, at_two) = calls if option.form == "outputs" else reversed(calls)
    squeeze = _store(graph, old, "squeeze.weight", first)
    expand = _store(graph, old, "expand.weight", second)
    middle = graph.insert(one, (bound["input"], squeeze, None, *at_one), before=node)
    result = graph.insert(two, (middle, expand, bias, *at_two), before=node)
    graph.replace_uses(node, result)
    graph.erase(node)


def _store(graph: Graph, old: Node, name: str, value: Tensor) -> Node:
    """A new tensor of the old weight's dtype, beside it: `conv.weight` -> `conv.squeeze.weight`."""
    path, dot, _ = str(old.target).rpartition(".")
    new = graph.add_tensor(f"{path}{dot}{name}", value.to(graph.tensor(old).dtype).contiguous())
    if str(old.target) in graph.parameters:
        graph.parameters |= {str(new.target)}
    return new
