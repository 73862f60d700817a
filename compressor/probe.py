"""Probing: the one operator that a region is, read off what the region does to 0 and to a basis.

The region's own operators are run in float64, whatever dtype the model computes in, a block of the basis at a time;
what was read off must then agree with the region on random inputs. A table is read row by row, index by index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor, fx
from torch.fx import Node

from . import kernels
from .affine import FEATURES, KERNELS, TABLE, Region, operator_of
from .constants import shape_only
from .errors import ContractError
from .ir import Graph
from .ops import arguments, example_sizes, extents, is_constant, is_tensor, kind

_ROWS_BYTES = 1 << 26  # of one probed value: bounds how many rows of the identity go in at once
_BLOCK = 1 << 22  # elements of a weight that are widened to float64 at once: 32 MB
_CHECK = 1e-8  # relative difference between region and replacement in float64 that is still rounding


@dataclass(frozen=True)
class Operator:
    """One linear, convolution or embedding that equals a region, in the model's dtype; bias None where it is zero."""

    weight: Tensor
    bias: Tensor | None


def probe(graph: Graph, where: Region) -> Operator | str:
    """The operator that equals the region, proved on random inputs; a string says why there is none."""
    run = Evaluation(graph, where)
    dtype = where.exit.meta["val"].dtype
    read = {FEATURES: _probe_features, KERNELS: _probe_kernel, TABLE: _probe_table}[where.form]
    weight, bias, wrong = read(run, dtype)
    if not _fits(graph, where, weight):
        return f"one {where.form.name} in its place would have another output size"
    if not wrong <= _CHECK:
        return f"what was probed differs from the operators by {wrong:.0e} on random inputs"
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        return f"one operator's weights would not be finite in {dtype}"
    return Operator(weight, bias if bool(bias.any()) else None)


def replace(
    graph: Graph, where: Region, weight: Node, bias: Node | None, *, before: Node
) -> tuple[Node, ...]:
    """Puts the operator that was probed in the region's place; returns what each exit is now.

    before: the operator of the region whose place and provenance the new one takes.
    """
    target, rest = operator_of(where)
    args: tuple[Any, ...] = (where.entry, weight, bias, *rest) if rest or bias else (where.entry, weight)
    if where.form is TABLE:
        args = (weight, where.entry if where.looks_up else [where.entry])
    new = graph.insert(target, args, before=before)
    widths = [end.meta["val"].shape[where.form.axis] for end in where.exits]
    made = tuple(_pieces(graph, new, where.form.axis % new.meta["val"].dim(), widths, before))
    for end, piece in zip(where.exits, made, strict=True):
        graph.replace_uses(end, piece)
    return made


def _pieces(graph: Graph, whole: Node, axis: int, widths: list[int], before: Node) -> Iterator[Node]:
    if len(widths) == 1:
        yield whole
        return
    first = 0
    for width in widths:
        yield graph.insert(torch.ops.aten.slice.Tensor, (whole, axis, first, first + width), before=before)
        first += width


class Basis(Protocol):
    """What is known of a value that is made of basis vectors; see `Rows` and `kernels.Impulses`."""

    def keeps(self, node: Node) -> bool:
        """True when the operator hands the basis vectors through."""

    def response(self, graph: Graph, node: Node) -> Tensor | None:
        """What an operator makes of the basis vectors, in float64, where its weight tells; else None."""


class Evaluation:
    """Runs the operators of one region in float64, whatever dtype the model computes in."""

    def __init__(self, graph: Graph, where: Region) -> None:
        self.graph, self.region = graph, where
        self._wide: dict[Node, Tensor] = {}
        self._last = {n: user for user in where.nodes for n in user.all_input_nodes}

    def __call__(
        self, value: Tensor, symbols: Mapping[Any, int] | None = None, basis: Basis | None = None
    ) -> Tensor:
        """The exits' values, side by side, for a value of the entry (float64, or indices).

        symbols: a number for every dynamic size, the example's own by default. basis: says that `value` is made of
        basis vectors, so that what an operator makes of them can be read off its weight instead of computed.
        """
        symbols = symbols if symbols is not None else self.symbols()
        env: dict[Node, Any] = {self.region.entry: value}
        pure = {self.region.entry}
        for node in self.region.nodes:
            known = None
            if basis is not None and node.all_input_nodes and node.all_input_nodes[0] in pure:
                known = basis.response(self.graph, node)
                pure |= {node} if basis.keeps(node) else set()
            if known is None:
                known = _widen(self._execute(node, env, symbols))
            elif self.region.form is FEATURES:
                known = _on_tokens(known, self.concrete(node, symbols))
            env[node] = known
            for source in node.all_input_nodes:
                if self._last[source] is node and source not in self.region.exits:
                    env.pop(source, None)
        results = [env[node] for node in self.region.exits]
        return results[0] if len(results) == 1 else torch.cat(results, self.region.form.axis)

    def concrete(self, node: Node, symbols: Mapping[Any, int]) -> list[int]:
        return [_number(s, symbols) for s in extents(node.meta["val"])]

    def symbols(self) -> dict[Any, int]:
        """Every dynamic size of the graph, as it was in the example."""
        return example_sizes(self.graph.graph)

    def _execute(self, node: Node, env: Mapping[Node, Any], symbols: Mapping[Any, int]) -> Any:
        by_parts = self._in_blocks(node, env)
        if by_parts is not None:
            return by_parts

        def fetch(operand: Node) -> Any:
            value = operand.meta.get("val")
            if operand in env:
                return env[operand]
            if operand.op == "get_attr":
                if operand not in self._wide:
                    self._wide[operand] = _widen(self.graph.tensor(operand))
                return self._wide[operand]
            if not is_tensor(operand):
                return _number(value.node.expr if hasattr(value, "node") else value, symbols)
            if shape_only(node, operand):
                return torch.empty((), dtype=torch.float64).expand(self.concrete(operand, symbols))
            raise ContractError(f"{operand.name} was changed while a region around it was probed")

        args = fx.node.map_aggregate(node.args, lambda a: fetch(a) if isinstance(a, Node) else _widen(a))
        kwargs = fx.node.map_aggregate(node.kwargs, lambda a: fetch(a) if isinstance(a, Node) else _widen(a))
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator, misc]

    def _in_blocks(self, node: Node, env: Mapping[Node, Any]) -> Tensor | None:
        """Operators on large tables, which are widened a block at a time or only where they are read."""
        bound = arguments(node)
        table, index = _looked_up(node)
        if is_constant(table) and index in env:
            return self.graph.tensor(table)[env[index]]
        if kind(node) != "linear" or not is_constant(bound["weight"]) or bound["input"] not in env:
            return None
        weight, bias, value = self.graph.tensor(bound["weight"]), bound["bias"], env[bound["input"]]
        if weight.numel() <= _BLOCK or not (bias is None or is_constant(bias)):
            return None
        rows = max(1, _BLOCK // weight.shape[1])
        result = torch.cat([value @ part.double().T for part in weight.split(rows)], -1)
        return result if bias is None else result + self.graph.tensor(bias).double()


# -------------------------------------------------------------------- tables


def _looked_up(node: Node) -> tuple[Any, Any]:
    """(table, index) of a look-up along the first axis; (None, None) for every other operator."""
    bound = arguments(node)
    if kind(node) == "embedding":
        return bound["weight"], bound["indices"]
    if kind(node) == "index" and len(bound["indices"]) == 1:
        return bound["self"], bound["indices"][0]
    return None, None


def _probe_table(run: Evaluation, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Table [rows, features], no bias, and the difference on random indices: every row is looked up."""
    rows, width = run.region.tables[0][0], run.region.width
    symbols = _room(run, rows)
    shape = run.concrete(run.region.entry, symbols)
    tokens = math.prod(shape)
    table = torch.empty(rows, width, dtype=dtype)
    for first in range(0, rows, tokens):
        indices = (torch.arange(tokens) + first).clamp(max=rows - 1)
        seen = run(indices.view(shape), symbols).reshape(tokens, width)
        table[first : first + tokens] = seen[: rows - first]
    trials = [(_indices(value, rows), symbols) for value, symbols in _trials(run)]
    theirs = torch.cat([run(indices, symbols).reshape(-1, width) for indices, symbols in trials])
    ours = torch.cat([table[indices].reshape(-1, width) for indices, _ in trials]).double()
    off = (ours - theirs).abs() - torch.finfo(dtype).eps * theirs.abs()  # the table is rounded already
    return table, torch.zeros(()), _relative(off.clamp(min=0), theirs)


def _indices(noise: Tensor, rows: int) -> Tensor:
    """Random indices below `rows`, one for each number of normal noise."""
    return (torch.special.ndtr(noise) * rows).long().clamp(max=rows - 1)


# -------------------------------------------------------------------- features


@dataclass(frozen=True)
class Rows:
    """Rows `first` to `last` of the identity, one a token: a linear makes columns of its weight of them."""

    width: int
    first: int
    last: int

    def keeps(self, node: Node) -> bool:
        """True for casts and reshapes of the tokens: each row of the identity is still one row."""
        size = node.meta["val"].shape[-1] if is_tensor(node) else 0
        return kind(node) in ("cast", "identity", "view", "flatten") and size == self.width

    def response(self, graph: Graph, node: Node) -> Tensor | None:
        """[rows, out] in float64, for a linear with constant weight; None for everything else."""
        names = {"linear": ("weight", "bias"), "addmm": ("mat2", "self")}.get(kind(node))
        bound = arguments(node)
        if names is None or bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1:
            return None
        weight, bias = bound[names[0]], bound[names[1]]
        if any(n is not None and n.op != "get_attr" for n in (weight, bias)):
            return None
        table, rows = graph.tensor(weight), slice(self.first, self.last)
        columns = (table[:, rows].T if kind(node) == "linear" else table[rows]).double()
        return columns if bias is None else columns + graph.tensor(bias).double()


def _probe_features(run: Evaluation, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Weight [out, in] and bias [out] in `dtype`, and how far float64 was off on random inputs.

    Rows of the identity, put on tokens, give columns of the weight; each block is added to what the operator makes of
    the random inputs before it is rounded, so that no float64 copy of a whole weight ever exists.
    """
    width, out = run.region.entry.meta["val"].shape[-1], run.region.width
    trials = list(_trials(run))
    value = torch.cat([value.reshape(-1, width) for value, _ in trials])
    theirs = torch.cat([run(value, symbols).reshape(-1, out) for value, symbols in trials])
    symbols = _room(run, width)
    shape = run.concrete(run.region.entry, symbols)
    bias = run(torch.zeros(shape, dtype=torch.float64), symbols).reshape(-1, out)[0].clone()
    weight = torch.empty(out, width, dtype=dtype)
    ours = bias.repeat(len(theirs), 1)
    for first, last, columns in _columns(run, symbols, bias):
        ours += value[:, first:last] @ columns
        weight[:, first:last] = columns.T
    return weight, bias.to(dtype), _relative(ours - theirs, theirs)


def _columns(run: Evaluation, symbols: Mapping[Any, int], bias: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, what the region makes of these rows of the identity, without the bias: [last - first, out])."""
    width = run.region.entry.meta["val"].shape[-1]
    shape = run.concrete(run.region.entry, symbols)
    tokens = math.prod(shape[:-1])
    for first in range(0, width, tokens):
        last = min(first + tokens, width)
        rows = torch.zeros(tokens, width, dtype=torch.float64)
        rows[range(last - first), range(first, last)] = 1
        seen = run(rows.view(shape), symbols, Rows(width, first, last)).reshape(-1, len(bias))
        yield first, last, seen[: last - first] - bias


def _on_tokens(rows: Tensor, shape: list[int]) -> Tensor:
    """Rows put on the first tokens of a value of this shape, the other tokens zero."""
    flat = torch.zeros(math.prod(shape[:-1]), shape[-1], dtype=torch.float64)
    flat[: len(rows)] = rows
    return flat.view(shape)


def _room(run: Evaluation, width: int) -> dict[Any, int]:
    """Dynamic sizes that hold as many rows of the identity, or indices, at once as memory allows."""
    symbols = run.symbols()
    axes = extents(run.region.entry.meta["val"])
    entry = axes if run.region.form is TABLE else axes[:-1]
    axis = next((s for s in entry if isinstance(s, sympy.Symbol)), None)
    if axis is None or not _is_polynomial(run):
        return symbols
    tokens = math.prod(_number(s, symbols) for s in entry)
    widest = max(math.prod(run.concrete(n, symbols)) for n in run.region.nodes if is_tensor(n)) // tokens
    if run.region.form is FEATURES:
        widest = max(widest, width)
    rows = min(width, max(1, _ROWS_BYTES // (8 * max(1, widest))))
    return symbols | {axis: max(2, -(-rows * symbols[axis] // tokens))}


# -------------------------------------------------------------------- kernels


def _probe_kernel(run: Evaluation, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Kernel and bias in `dtype`, and how far float64 was off on random images.

    Nothing in the region knows the image's size, so two that are just larger than the window do: all of their borders.
    """
    where = run.region
    weight, bias = kernels.probe(lambda value, basis: run(value, basis=basis), where.entry, where.state)
    target, geometry = operator_of(where)
    generator = torch.Generator().manual_seed(0)
    channels, window, wrong = where.entry.meta["val"].shape[1], where.state, 0.0
    for pixels in (2, 3):
        image = kernels.small_image(window, where.entry, pixels)
        value = torch.randn(2, channels, *image, generator=generator, dtype=torch.float64)
        theirs, ours = run(value), target(value, weight, bias, *geometry)
        wrong = max(wrong, _relative(ours - theirs, theirs) if ours.shape == theirs.shape else math.inf)
    return weight.to(dtype), bias.to(dtype), wrong


# -------------------------------------------------------------------- helpers


def _trials(run: Evaluation) -> Iterator[tuple[Tensor, dict[Any, int]]]:
    """Noise for the entry, and the dynamic sizes it has: the example's, then others, which nothing may depend on."""
    generator = torch.Generator().manual_seed(0)
    example = run.symbols()
    for more in (0, 1) if _is_polynomial(run) else (0,):
        symbols = {symbol: size + more for symbol, size in example.items()}
        shape = run.concrete(run.region.entry, symbols)
        yield torch.randn(shape, generator=generator, dtype=torch.float64), symbols


def _is_polynomial(run: Evaluation) -> bool:
    """True where every size of the region is a whole number whatever the dynamic sizes are."""
    nodes = [n for n in (run.region.entry, *run.region.nodes) if is_tensor(n)]
    return all(sympy.sympify(s).is_polynomial() for n in nodes for s in extents(n.meta["val"]))


def _relative(difference: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the reference's largest value."""
    return float(difference.abs().max()) / (float(reference.abs().max()) or 1.0)


def _fits(graph: Graph, where: Region, weight: Tensor) -> bool:
    """True when the operator's output has the sizes of the exits together, whatever the dynamic sizes are."""
    target, rest = operator_of(where)
    entry = where.entry.meta["val"]
    with graph.fake_mode, torch.no_grad():
        made = torch.empty(weight.shape, dtype=weight.dtype)
        index = entry if where.looks_up else [entry]
        out = target(made, index) if where.form is TABLE else target(entry, made, None, *rest)
    expected = extents(where.exit.meta["val"])
    expected[where.form.axis] = where.width
    return extents(out) == expected


def _number(size: Any, symbols: Mapping[Any, int]) -> Any:
    return size if isinstance(size, (int, float)) else int(size.subs(symbols))


def _widen(value: Any) -> Any:
    """float64 for every float, complex128 for every complex number: tensors, dtypes, lists of tensors."""
    if isinstance(value, (list, tuple)):
        return [_widen(v) for v in value]
    if isinstance(value, Tensor):
        return value.to(_widen(value.dtype))
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value
    return value
