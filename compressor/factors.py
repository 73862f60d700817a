"""Thinner operators in the place of one: the forms that a split can take, what each costs and loses, and its weights.

    outputs   k x k to r channels, then 1 x 1            W [O, I k k] = L [O, r] R [r, I k k]    also for linear
    inputs    1 x 1 to r channels, then k x k            W [O k k, I] = L [O k k, r] R [r, I]
    tucker    1 x 1 to r, k x k to q, then 1 x 1         both at once
    spatial   k x 1 to r channels, then 1 x k            W [O k, I k] = L [O k, r] R [r, I k]

`outputs` is the best split for the data, exactly: the covariance of the layer's outputs is all that it takes. `inputs`
and `spatial` weigh every tap of the kernel by one covariance of the channels. Of other forms, depthwise with 1 x 1 and
SqueezeNet's did worse than `spatial` (benchmarks/results/squeeze.md). Sources: Zhang, Zou, He, Sun 2016
(arXiv:1505.06798); Kim et al. 2016 (arXiv:1511.06530) for Tucker-2; Jaderberg, Vedaldi, Zisserman 2014
(arXiv:1405.3866) for `spatial`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from .elimination import ridged
from .names import operator_name, site
from .ops import arguments
from .reconstruct import LowRank, Moments, low_rank, numerical_rank

Basis = Literal["outputs", "inputs", "spatial"]
Form = Literal["outputs", "inputs", "tucker", "spatial"]
Step = tuple[
    Any, Tensor, tuple[Any, ...]
]  # an operator, its weight, and where it stands: stride, padding, dilation
Shape = tuple[Any, tuple[int, ...], tuple[Any, ...]]  # the same with the size of the weight

# Two operators pay up to this share of one's MACs. ONNX Runtime on AVX-512, 3 x 3 over 64 to 512 channels:
# pairs with 0.83 of the MACs took 0.82 to 0.92 of the time, pairs with 0.97 took 0.96 to 1.11.
PAYS = 0.9
_RANKS, _TUCKER_RANKS = 64, 16  # at most so many are looked at


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution (`kernel` holds its sizes) or a linear (`kernel` is empty) that can be split.

    reads, writes: positions of its input and of its output, for one sample; between: of what its first axis alone,
    strided, leaves, 0 where it has no two axes. scale [outs]: what an error of each output
    makes of the layer's anchor (`readers.py`).
    """

    node: Node
    source: Node
    weight: Node
    outs: int
    ins: int
    kernel: tuple[int, ...]
    reads: int
    writes: int
    between: int
    scale: Tensor

    @property
    def area(self) -> int:
        return math.prod(self.kernel)

    @property
    def axis(self) -> int:
        """Where the channels are, in its input and in its output."""
        return -1 - len(self.kernel)

    @property
    def forms(self) -> tuple[Basis, ...]:
        if self.area == 1:
            return ("outputs",)
        return ("outputs", "inputs", "spatial") if self.between else ("outputs", "inputs")

    @property
    def whole(self) -> dict[str, int]:
        """MACs and parameters as it is."""
        params = self.outs * self.ins * self.area
        return {"macs": params * self.writes, "params": params}

    @property
    def pointwise(self) -> bool:
        """Whether its output is one matrix times its input, position by position."""
        return self.area == 1 and self.reads == self.writes

    @property
    def step(self) -> Shape:
        """The operator as it is."""
        return self.node.target, (self.outs, self.ins, *self.kernel), _place(self.node)

    def cost(self, form: Form, ranks: tuple[int, ...]) -> dict[str, int]:
        """MACs and parameters of the operators that it becomes."""
        first, last = ranks[0], ranks[-1]
        if form == "spatial":
            down, along = first * self.ins * self.kernel[0], first * self.outs * self.kernel[1]
            return {"macs": down * self.between + along * self.writes, "params": down + along}
        squeeze = 0 if form == "outputs" else first * self.ins
        middle = {"outputs": last * self.ins, "inputs": first * self.outs, "tucker": first * last}[form]
        expand = 0 if form == "inputs" else last * self.outs
        behind = middle * self.area + expand
        return {"macs": squeeze * self.reads + behind * self.writes, "params": squeeze + behind}

    def full(self, form: Form) -> tuple[int, ...]:
        """The largest ranks that a weight of this shape can have."""
        outputs = min(self.outs, self.ins * self.area)
        inputs = min(self.outs * self.area, self.ins)
        if form == "spatial":
            return (min(self.outs * self.kernel[1], self.ins * self.kernel[0]),)
        return {"outputs": (outputs,), "inputs": (inputs,), "tucker": (inputs, outputs)}[form]

    def matrix(self, form: Basis, weight: Tensor) -> Tensor:
        """The weight [O, I, *kernel] unfolded as L R: [O, I k k], [O k k, I] or [O k, I k]."""
        if form == "spatial":
            return weight.permute(0, 3, 1, 2).reshape(self.outs * self.kernel[1], -1)
        return weight.flatten(1) if form == "outputs" else weight.movedim(1, -1).reshape(-1, self.ins)


@dataclass(frozen=True, eq=False)
class Option:
    """One way to split one layer. error: the share of its output's energy that it loses; loss: what that costs.

    bases: of the forms that it is made of, by which its weights follow where nothing is solved anew.
    """

    layer: Layer
    form: Form
    ranks: tuple[int, ...]
    error: float
    loss: float
    bases: dict[str, LowRank] = field(repr=False)

    @property
    def share(self) -> float:
        """MACs of the operators, of the one's."""
        return self.layer.cost(self.form, self.ranks)["macs"] / max(self.layer.whole["macs"], 1)

    @property
    def shift(self) -> Tensor | None:
        """What the mean output [outs] loses; added to the bias, it comes back."""
        lost = [self.bases[form].shift(rank) for form, rank in self.rank_of.items()]
        parts = [shift.reshape(self.layer.outs, -1).sum(1) for shift in lost if shift is not None]
        return torch.stack(parts).sum(0) if parts else None

    @property
    def rank_of(self) -> dict[str, int]:
        """The rank by which every basis is cut off."""
        if self.form != "tucker":
            return {self.form: self.ranks[0]}
        return {"inputs": self.ranks[0], "outputs": self.ranks[1]}

    @property
    def saved(self) -> dict[str, int]:
        new = self.layer.cost(self.form, self.ranks)
        if self.shift is not None and arguments(self.layer.node)["bias"] is None:
            new["params"] += self.layer.outs  # the bias that the mean makes
        return {name: self.layer.whole[name] - new[name] for name in new}

    @property
    def shapes(self) -> Iterator[Shape]:
        """The operators in order."""
        layer, ranks = self.layer, self.rank_of
        first, last = ranks.get("inputs"), ranks.get("outputs")
        ones = (1,) * len(layer.kernel)
        if "spatial" in ranks:
            rank, (down, along) = ranks["spatial"], layer.kernel
            stride, padding, dilation = (_pair(value) for value in _place(layer.node))
            first_place = ([stride[0], 1], [padding[0], 0], [dilation[0], 1])
            yield layer.node.target, (rank, layer.ins, down, 1), first_place
            yield (
                layer.node.target,
                (layer.outs, rank, 1, along),
                ([1, stride[1]], [0, padding[1]], [1, dilation[1]]),
            )
            return
        if first is not None:
            yield _thin(layer), (first, layer.ins, *ones), ()
        yield layer.node.target, (last or layer.outs, first or layer.ins, *layer.kernel), _place(layer.node)
        if last is not None:
            yield _thin(layer), (layer.outs, last, *ones), ()

    @property
    def key(self) -> tuple[Any, ...]:
        """What its speed depends on."""
        layer, place = self.layer, _place(self.layer.node)
        return layer.outs, layer.ins, layer.kernel, layer.reads, str(place), self.form, self.ranks

    def __str__(self) -> str:
        layer, operator = self.layer, operator_name(self.layer.node).split(".")[1]
        wide, thin = ("x".join(map(str, k)) for k in (layer.kernel, [1] * len(layer.kernel)))
        sizes = {"outputs": (wide, thin), "inputs": (thin, wide), "tucker": (thin, wide, thin)}.get(
            self.form,
            ("x".join(map(str, (*layer.kernel[:1], 1))), "x".join(map(str, (1, *layer.kernel[1:])))),
        )
        steps = ", ".join(
            f"{k} to {n}".strip() for k, n in zip(sizes, (*self.ranks, layer.outs), strict=True)
        )
        return f"{operator} {layer.ins} to {layer.outs}: {steps}"

    def facts(self) -> dict[str, Any]:
        return {
            "site": site(self.layer.node),
            "form": self.form,
            "rank": self.ranks[0] if len(self.ranks) == 1 else list(self.ranks),
            "full": self.layer.full(self.form)[0]
            if len(self.ranks) == 1
            else list(self.layer.full(self.form)),
            "energy": round(1 - self.error, 6),
            "error": round(math.sqrt(self.error), 6),
            "macs": round(self.share, 4),
        }


# -------------------------------------------------------------------- what there is to choose from


def options(
    layer: Layer,
    weight: Tensor,
    moments: Mapping[Basis, Moments | None],
    energy: float | None,
    multiple: int,
) -> Iterator[Option]:
    """Every split worth a look: ranks in multiples, up to the rank that the weight has: there nothing is lost.

    energy: variance of the layer's anchor. A loss is -log of the share that the layer keeps of its own output; with
    data it is the geometric mean of that and of what is lost of the anchor. (ResNet-56, half of the MACs, held-back
    images: 14.3 dB; by the first alone 11.9, by the second alone 12.4.)
    """

    def made(
        form: Form, ranks: tuple[int, ...], error: float, lost: float, bases: dict[str, LowRank]
    ) -> Option:
        loss = -math.log(max(1 - error, 1e-12))
        if energy is not None:
            loss = math.sqrt(loss * lost / max(energy, 1e-30))
        return Option(layer, form, ranks, error, loss, bases)

    bases: dict[str, LowRank] = {}
    for form in layer.forms:
        matrix = layer.matrix(form, weight)
        exact = numerical_rank(matrix)
        widest = int(
            PAYS * layer.whole["macs"] / max(layer.cost(form, (1,))["macs"], 1)
        )  # no wider rank pays
        held = torch.float64 if weight.dtype == torch.float64 else torch.float32
        rows = layer.scale.repeat_interleave(len(matrix) // layer.outs) if energy is not None else None
        basis = low_rank(matrix, moments[form], rows).truncated(max(widest, 1), held)
        plain = basis if exact > widest else low_rank(matrix).truncated(exact, held)
        bases[form] = basis
        for rank in _spread(range(multiple, exact, multiple), _RANKS):
            yield made(form, (rank,), basis.error(rank), basis.lost(rank), {form: basis})
        yield made(form, (exact,), 0.0, 0.0, {form: plain})
    if "inputs" not in bases:
        return
    for first in _spread(range(multiple, layer.ins, multiple), _TUCKER_RANKS):
        for last in _spread(range(multiple, layer.outs, multiple), _TUCKER_RANKS):
            errors = [(bases["inputs"], first), (bases["outputs"], last)]
            if layer.cost("tucker", (first, last))["macs"] <= PAYS * layer.whole["macs"] and all(
                rank <= basis.left.shape[1] for basis, rank in errors
            ):
                error = min(1.0, sum(basis.error(rank) for basis, rank in errors))
                both = {form: bases[form] for form in ("inputs", "outputs")}
                yield made("tucker", (first, last), error, sum(b.lost(r) for b, r in errors), both)


def _spread(ranks: range, most: int) -> list[int]:
    """At most so many of them, each by the same factor above the last."""
    if len(ranks) <= most:
        return list(ranks)
    return sorted({ranks[round(len(ranks) ** (i / (most - 1))) - 1] for i in range(most)})


# -------------------------------------------------------------------- weights


class Fit:
    """The best weights of a split for what a layer reads and should give; `rebuild.refit` asks for them.

    Until then they are those that the survey found.
    """

    def __init__(self, option: Option, weight: Tensor) -> None:
        self.option, self.whole = option, weight.double()
        layer, kernel = option.layer, self.whole
        bases = {form: (option.bases[form], rank) for form, rank in option.rank_of.items()}
        first: Tensor | None = None
        last: Tensor | None = None
        if "spatial" in bases:
            basis, rank = bases["spatial"]
            self._set_pair(*basis.factors(layer.matrix("spatial", kernel), rank))
            return
        if "inputs" in bases:
            basis, rank = bases["inputs"]
            left, first = basis.factors(layer.matrix("inputs", kernel), rank)
            kernel = left.reshape(layer.outs, *layer.kernel, rank).movedim(-1, 1)
        if "outputs" in bases:
            basis, rank = bases["outputs"]
            last, right = basis.factors(kernel.flatten(1), rank)
            kernel = right.reshape(rank, *kernel.shape[1:])
        self._set(first, kernel, last)

    def matrix(self, gram: Tensor, wanted: Tensor, block: int = 0) -> Tensor:
        """The matrix [O, F] of this form nearest to `wanted` on rows of this Gram matrix [F, F].

        Reduced-rank regression: of all matrices of rank r, the one whose outputs differ least. The channels that
        `inputs` keeps, and the columns that `spatial` does, are those of the wanted matrix; what is behind them is
        solved for.
        """
        layer, ranks = self.option.layer, self.option.rank_of
        taps, scale = layer.area, layer.scale.double()
        first: Tensor | None = None
        last: Tensor | None = None
        if "spatial" in ranks:
            down, along = layer.kernel
            first = _leading(layer, "spatial", wanted, _seen(gram, along), ranks["spatial"])
            eye = torch.eye(along, dtype=torch.float64)
            lift = torch.einsum("rih,wv->rwihv", first.reshape(-1, layer.ins, down), eye).reshape(
                -1, len(gram)
            )
            kernel, _ = _solved(gram, wanted, lift)
            self._set_pair(kernel.reshape(layer.outs, -1, along).movedim(1, 2).flatten(0, 1), first)
            return self.whole.flatten(1)
        kernel = wanted
        if "inputs" in ranks:
            first = _leading(layer, "inputs", wanted, _seen(gram, taps), ranks["inputs"])
            kernel, gram = _solved(gram, wanted, torch.kron(first, torch.eye(taps, dtype=torch.float64)))
        if "outputs" in ranks:
            scaled = kernel * scale[:, None]
            basis = torch.linalg.eigh(scaled @ gram @ scaled.T)[1].flip(1)[:, : ranks["outputs"]]
            last, kernel = basis / scale[:, None], basis.T @ scaled
        width = layer.ins if first is None else len(first)
        self._set(first, kernel.reshape(len(kernel), width, *layer.kernel), last)
        return self.whole.flatten(1)

    def _set(self, first: Tensor | None, kernel: Tensor, last: Tensor | None) -> None:
        """first [r, I], kernel [q, r, *kernel], last [O, q]."""
        self._weights = [w for w in (first, kernel, last) if w is not None]
        behind = kernel.flatten(1) if last is None else last @ kernel.flatten(1)
        self.whole = behind.reshape(len(behind), *kernel.shape[1:])
        if first is not None:
            self.whole = torch.einsum("or...,ri->oi...", self.whole, first)

    def _set_pair(self, left: Tensor, right: Tensor) -> None:
        """left [O k, r], right [r, I k]."""
        (down, along), rank = self.option.layer.kernel, len(right)
        last = left.reshape(-1, along, rank).movedim(1, 2)
        self._weights = [right, last]
        self.whole = torch.einsum("orw,rih->oihw", last, right.reshape(rank, -1, down))

    def steps(self) -> Iterator[Step]:
        """The operators in order, with their weights in float64."""
        for (target, size, place), weight in zip(self.option.shapes, self._weights, strict=True):
            yield target, weight.reshape(size), place


def _seen(gram: Tensor, taps: int) -> Tensor:
    """The Gram matrix of what one of the last `taps` of a row's columns reads, on average."""
    wide = len(gram) // taps
    return gram.reshape(wide, taps, wide, taps).diagonal(dim1=1, dim2=3).mean(-1)


def _leading(layer: Layer, form: Basis, wanted: Tensor, seen: Tensor, rank: int) -> Tensor:
    """What the first operator of a split computes [r, columns]: an orthonormal basis of the best rows.

    seen [columns, columns]: the Gram matrix of what it reads.
    """
    matrix = layer.matrix(form, wanted.reshape(layer.outs, layer.ins, *layer.kernel))
    scale = layer.scale.double().repeat_interleave(len(matrix) // layer.outs)
    moments = Moments(matrix.new_zeros(len(seen)), seen, 1 << 30, False)
    rows = low_rank(matrix, moments, scale).left[:, :rank].double().T @ (matrix * scale[:, None])
    return torch.linalg.qr(rows.T).Q.T.contiguous()


def _solved(gram: Tensor, wanted: Tensor, lift: Tensor) -> tuple[Tensor, Tensor]:
    """L [O, m] of the matrix L lift nearest to `wanted`, and the Gram matrix [m, m] of what it reads."""
    inner = lift @ gram @ lift.T
    return torch.linalg.solve(ridged(inner, 1e-9), lift @ gram @ wanted.T).T, inner


def _thin(layer: Layer) -> Any:
    """The operator that mixes channels, position by position."""
    rank = len(layer.kernel)
    return getattr(torch.ops.aten, f"conv{rank}d").default if rank else torch.ops.aten.linear.default


def _pair(value: Any) -> list[int]:
    """One number for each of two axes."""
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    return found * 2 if len(found) == 1 else found


def _place(node: Node) -> tuple[Any, ...]:
    bound = arguments(node)
    return tuple(bound[name] for name in ("stride", "padding", "dilation") if name in bound)
