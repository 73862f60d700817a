"""Affine regions: find what lies between x and y, read it off by probing, and put one operator in its place.

Whatever is affine in x is known by what it does to 0 and to a basis: the region's own operators are run on them, in
float64, and bias and weight are read off. Two forms: *features* (one linear, token by token) and *kernels* (one
convolution). `features.py` and `kernels.py` decide which operators belong to a region; nothing here knows an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from . import features, kernels, layout
from .constants import DataFree, shape_only
from .errors import ContractError
from .features import Foreign, NotAffine
from .ir import Graph
from .ops import arguments, example_sizes, extents, is_tensor, kind, node_macs, sizes

_ROWS_BYTES = 1 << 26  # of one probed value: bounds how many rows of the identity go in at once
_CHECK = 1e-8  # relative difference between region and replacement in float64 that is still rounding

_CONVOLUTIONS = {
    3: torch.ops.aten.conv1d.default,
    4: torch.ops.aten.conv2d.default,
    5: torch.ops.aten.conv3d.default,
}


@dataclass(frozen=True)
class Form:
    """How a region may be affine: its rules, and the operator that takes its place.

    start(entry) is the state of the entry, None where no region starts; follow(node, known, free) the state of what
    an operator computes; is_exit(state, entry, node) says whether one operator could compute that value.
    axis: where the features, or the channels, lie.
    """

    name: str
    axis: int
    start: Callable[[Node], Any]
    follow: Callable[[Node, Mapping[Node, Any], DataFree], Any]
    is_exit: Callable[[Any, Node, Node], bool]


FEATURES = Form("linear", -1, layout.start, features.follow, layout.is_exit)
KERNELS = Form("convolution", 1, kernels.start, kernels.follow, kernels.is_exit)


@dataclass(frozen=True)
class Reach:
    """Everything that is affine in one entry, with its layout or window, and what stops it, with the reason."""

    form: Form
    entry: Node
    known: Mapping[Node, Any]
    blocked: Mapping[Node, str]

    def exits(self) -> Iterator[Node]:
        """The values that one operator could compute from the entry, in order."""
        for node, state in self.known.items():
            if node is self.entry or isinstance(state, list) or not is_tensor(node):
                continue
            same = node.meta["val"].dtype == self.entry.meta["val"].dtype
            if same and self.form.is_exit(state, self.entry, node):
                yield node


@dataclass(frozen=True)
class Region:
    """All operators between an entry and an exit. `dead` are those that only this exit needs."""

    form: Form
    entry: Node
    exit: Node
    state: Any
    nodes: tuple[Node, ...]
    dead: frozenset[Node]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one operator in its place, for one sample."""
        ins = self.entry.meta["val"].shape[self.form.axis]
        work: int = math.prod(sizes(self.exit)) * ins
        if self.form is FEATURES:
            return work
        return work // self.state.blocks * math.prod(self.state.size)

    @property
    def dead_macs(self) -> int:
        return sum(node_macs(n) for n in self.dead)


@dataclass(frozen=True)
class Operator:
    """One linear or convolution that equals a region: weight and bias in the model's dtype, None for no bias."""

    weight: Tensor
    bias: Tensor | None


def reach(form: Form, entry: Node, free: DataFree, order: Mapping[Node, int]) -> Reach | None:
    """Follows everything that is affine in `entry` alone; None where no region can start.

    order: position of every node of the graph.
    """
    first = form.start(entry) if _is_float(entry) else None
    if first is None:
        return None
    known: dict[Node, Any] = {entry: first}
    blocked: dict[Node, str] = {}
    waiting = {u for u in entry.users if u.op == "call_function"}
    while waiting:
        node = min(waiting, key=order.__getitem__)
        waiting.remove(node)
        if node in free:
            continue
        try:
            known[node] = form.follow(node, known, free)
        except Foreign:
            continue
        except NotAffine as stop:
            blocked[node] = str(stop)
            continue
        if free_unbacked_symbols(node.meta["val"]):
            del known[node]
            blocked[node] = str(NotAffine(node, "has a size that depends on data"))
            continue
        waiting |= {u for u in node.users if u.op == "call_function"}
    return Reach(form, entry, known, blocked)


def region(found: Reach, exit: Node, free: DataFree, order: Mapping[Node, int]) -> Region:
    """The region of `found` that ends at `exit`: values of the entry, and the constants made on the way."""
    inside: set[Node] = set()
    stack = [exit]
    while stack:
        node = stack.pop()
        if node is found.entry or node in inside or node.op != "call_function" or kind(node) == "size":
            continue
        inside.add(node)
        stack.extend(
            n for n in node.all_input_nodes if n in free or (n in found.known and node in found.known)
        )
    nodes = tuple(sorted(inside, key=order.__getitem__))
    dead = {exit}
    for node in reversed(nodes):
        if node.users and all(user in dead for user in node.users):
            dead.add(node)
    return Region(found.form, found.entry, exit, found.known[exit], nodes, frozenset(dead))


# -------------------------------------------------------------------- probing


def probe(graph: Graph, where: Region) -> Operator | str:
    """The operator that equals the region, proved on random inputs; a string says why there is none."""
    run = Evaluation(graph, where)
    dtype = where.exit.meta["val"].dtype
    if where.form is FEATURES:
        weight, bias = _probe_features(run)
    else:
        weight, bias = kernels.probe(
            lambda value, basis: run(value, basis=basis), where.entry.meta["val"].shape[1], where.state
        )
    if not _fits(graph, where, weight):
        return f"one {where.form.name} in its place would have another output size"
    wrong = _disagreement(run, weight, bias)
    if not wrong <= _CHECK:
        return f"what was probed differs from the operators by {wrong:.0e} on random inputs"
    weight, bias = weight.to(dtype), bias.to(dtype)
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        return f"one operator's weights would not be finite in {dtype}"
    return Operator(weight, bias if bool(bias.any()) else None)


def replace(graph: Graph, where: Region, weight: Node, bias: Node | None, *, before: Node) -> Node:
    """Puts the operator that was probed in the region's place.

    before: the operator of the region whose place and provenance the new one takes.
    """
    target, geometry = _operator(where)
    args = (where.entry, weight, bias, *geometry)
    new = graph.insert(target, args if geometry or bias is not None else args[:2], before=before)
    graph.replace_uses(where.exit, new)
    return new


def _operator(where: Region) -> tuple[Any, list[Any]]:
    """The ATen operator of a region's form, and the arguments that follow entry, weight and bias."""
    if where.form is FEATURES:
        return torch.ops.aten.linear.default, []
    window, dims = where.state, where.entry.meta["val"].dim()
    return _CONVOLUTIONS[dims], [*map(list, (window.stride, window.padding, window.dilation)), window.blocks]


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
        """The exit's value for a float64 value of the entry.

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
                if self._last[source] is node:
                    env.pop(source, None)
        result: Tensor = env[self.region.exit]
        return result

    def concrete(self, node: Node, symbols: Mapping[Any, int]) -> list[int]:
        return [_number(s, symbols) for s in extents(node.meta["val"])]

    def symbols(self) -> dict[Any, int]:
        """Every dynamic size of the graph, as it was in the example."""
        return example_sizes(self.graph.graph)

    def _execute(self, node: Node, env: Mapping[Node, Any], symbols: Mapping[Any, int]) -> Any:
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


def _on_tokens(rows: Tensor, shape: list[int]) -> Tensor:
    """Rows put on the first tokens of a value of this shape, the other tokens zero."""
    flat = torch.zeros(math.prod(shape[:-1]), shape[-1], dtype=torch.float64)
    flat[: len(rows)] = rows
    return flat.view(shape)


def _probe_features(run: Evaluation) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of a region of features, in float64: rows of the identity, put on tokens."""
    width, out = (n.meta["val"].shape[-1] for n in (run.region.entry, run.region.exit))
    symbols = _room(run, width)
    shape = run.concrete(run.region.entry, symbols)
    tokens = math.prod(shape[:-1])
    bias = run(torch.zeros(shape, dtype=torch.float64), symbols).reshape(-1, out)[0].clone()
    weight = torch.empty(out, width, dtype=torch.float64)
    for first in range(0, width, tokens):
        last = min(first + tokens, width)
        rows = torch.zeros(tokens, width, dtype=torch.float64)
        rows[range(last - first), range(first, last)] = 1
        seen = run(rows.view(shape), symbols, Rows(width, first, last)).reshape(-1, out)
        weight[:, first:last] = (seen[: last - first] - bias).T
    return weight, bias


def _room(run: Evaluation, width: int) -> dict[Any, int]:
    """Dynamic sizes that hold as many rows of the identity at once as memory allows."""
    symbols = run.symbols()
    entry = extents(run.region.entry.meta["val"])[:-1]
    axis = next((s for s in entry if isinstance(s, sympy.Symbol)), None)
    sizes_seen = [s for n in run.region.nodes if is_tensor(n) for s in extents(n.meta["val"])]
    if axis is None or not all(sympy.sympify(s).is_polynomial() for s in (*entry, *sizes_seen)):
        return symbols
    tokens = math.prod(_number(s, symbols) for s in entry)
    widest = max(math.prod(run.concrete(n, symbols)) for n in run.region.nodes if is_tensor(n)) // tokens
    rows = min(width, max(1, _ROWS_BYTES // (8 * max(widest, width))))
    return symbols | {axis: max(2, -(-rows * symbols[axis] // tokens))}


def _disagreement(run: Evaluation, weight: Tensor, bias: Tensor) -> float:
    """Largest difference between the region and its replacement on random inputs, relative to the largest value."""
    shape = run.concrete(run.region.entry, run.symbols())
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target, geometry = _operator(run.region)
    theirs, ours = run(value), target(value, weight, bias, *geometry)
    scale = float(theirs.abs().max()) or 1.0
    return float((ours - theirs).abs().max()) / scale


def _fits(graph: Graph, where: Region, weight: Tensor) -> bool:
    """True when the operator's output has the sizes of the exit, whatever the dynamic sizes are."""
    target, geometry = _operator(where)
    entry = where.entry.meta["val"]
    with graph.fake_mode, torch.no_grad():
        made = target(entry, torch.empty(weight.shape, dtype=entry.dtype), None, *geometry)
    return extents(made) == extents(where.exit.meta["val"])


def _is_float(node: Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype.is_floating_point


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
