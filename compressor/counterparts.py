"""Which value of the model each value inside an ONNX file stands for, and how far it is from it.

Operators keep no common names over folding, merging and quantising; values do: one that is the same but for rounding
*is* the same value, whatever made it. Others are paired by module path and operator. A value may only stand for one
that comes later in the model than those that it is computed from: a ReLU that does nothing any more gives the value
before it, and is wrong all the same.

Memory does not grow with the model: of the model's values a few thousand numbers each are kept to find pairs by, the
file's values are fetched some at a time, and each pair is then compared in full.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor
from torch.fx import Node

from . import apart, runtime, sessions
from .ir import Graph
from .names import short_name, site
from .ops import kind
from .verify import Comparison, summary

HELD_BYTES = 1 << 28  # of values at once, of each graph
SKETCH = 4096  # numbers of a value that pairs are found by
FIRST_FETCH = 16  # values of the file that the first run fetches; later ones by what these weighed
ALIKE_DB = 6.0  # under this, two values have nothing but their size in common
NEARER_DB = 10.0  # a part of a value that is so much nearer to a counterpart shows that the whole has none

# Operators after which a value may still be the one before: they move, copy or round it.
MOVES = {
    *("Cast", "DequantizeLinear", "Dropout", "Expand", "Flatten", "Gather", "Identity", "QuantizeLinear"),
    *("Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
_CONVOLUTIONS = {"conv", "conv_transpose", "batch_norm"}
_PRODUCTS = {"linear", "matmul", "addmm", "einsum", "attention"}
_POOLS = {"adaptive_pool", "avg_pool", "reduce"}
# Kinds of the model's operators that one of the file may stand for, where their names do not tell.
KINDS = {
    "Conv": _CONVOLUTIONS,
    "ConvTranspose": _CONVOLUTIONS,
    "Gemm": _PRODUCTS,
    "MatMul": _PRODUCTS,
    "MatMulIntegerToFloat": _PRODUCTS,
    "MatMulNBits": _PRODUCTS,
    "DynamicQuantizeMatMul": _PRODUCTS,
    "AveragePool": _POOLS,
    "GlobalAveragePool": _POOLS,
    "ReduceMean": _POOLS,
    "Concat": {"cat"},
    "Gather": {"embedding"},
}
_ROUNDING = ("Quantize", "Integer", "QLinear", "NBits")


# -------------------------------------------------------------------- the model's values


class Model:
    """Floats of the graph in order: their nodes, and of each a few numbers that it is recognised by."""

    def __init__(self, graph: Graph, part: Sequence[Tensor]) -> None:
        self.graph, self.part = graph, part
        self.nodes: list[Node] = []
        self.shapes: list[tuple[int, ...]] = []
        self.held: dict[int, Tensor] | None = {}  # all values, while they are few
        sketches: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
        weight = 0
        for number, value in self._running():
            sketches[value.numel()].append((number, _sketch(value.numpy())))
            self.shapes.append(tuple(value.shape))
            weight += value.numel() * value.element_size()
            if self.held is not None:
                self.held[number] = value
            if weight > HELD_BYTES:
                self.held = None
        self.alike = {
            size: (np.array([i for i, _ in found]), np.stack([one for _, one in found]))
            for size, found in sketches.items()
        }

    def values(self) -> Iterator[tuple[int, Tensor]]:
        yield from self.held.items() if self.held is not None else self._running()

    def _running(self) -> Iterator[tuple[int, Tensor]]:
        number = 0
        for node, value in self.graph.values(*self.part):
            if (
                node.op in ("get_attr", "output")
                or not isinstance(value, Tensor)
                or not value.is_floating_point()
            ):
                continue
            if number == len(self.nodes):
                self.nodes.append(node)
            yield number, value.detach().float()
            number += 1

    def folded(self, number: int) -> int:
        """Where norms were folded into what is before them, the value behind them."""
        node = self.nodes[number]
        while len(node.users) == 1 and short_name(user := next(iter(node.users))) == "batch_norm":
            node = user
        return self.nodes.index(node)


# -------------------------------------------------------------------- the file's values


@dataclass(frozen=True)
class Pair:
    """A value of the file and the one of the model, by its number, that it stands for."""

    number: int
    error: float
    sqnr_db: float
    counterpart: str
    expected: str
    seen: str


class File:
    """An ONNX file whose values are fetched some at a time; its weights stay where they lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(str(path), load_external_data=False)
        graph = self.model.graph
        self._described = list(graph.output)
        self.maker = {name: node for node in graph.node for name in node.output if name}
        self.reads = {id(node): _reads(node) for node in graph.node}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in self.reads[id(node)]:
                self.readers[name].append(node)
        constants = {t.name for t in graph.initializer}
        self.inputs = {i.name for i in graph.input} - constants
        self.moving = set(self.inputs)  # values that depend on an input
        for node in graph.node:
            if self.moving & set(self.reads[id(node)]):
                self.moving |= {name for name in node.output if name}
        self.suppressed: set[str] = set()  # behind suppression, which turns over at the last bit of a score
        for node in graph.node:
            if node.op_type == "NonMaxSuppression" or self.suppressed & set(self.reads[id(node)]):
                self.suppressed |= set(node.output)
        self.last = self._last_of_modules()
        kinds = {node.op_type for node in graph.node}
        halves = any(
            t.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16) for t in graph.initializer
        )
        self.norms = "BatchNormalization" in kinds
        self.rounds = halves or any(word in kind for kind in kinds for word in _ROUNDING)
        self.values = self._floats()
        self.pairs: dict[str, Pair] = {}
        self.nearest: dict[int, float] = {}  # value of the model -> dB of the nearest in the file so far
        self.floor: dict[str, int] = dict.fromkeys(self.inputs, -1)

    def _last_of_modules(self) -> set[str]:
        """Values that only other modules read: what a module gives."""
        return {
            name
            for name, node in self.maker.items()
            if module_of(node.name) not in {module_of(reader.name) for reader in self.readers[name]}
        }

    def _floats(self) -> list[str]:
        names = [name for name in self.maker if name in self.moving]
        with self._session(names) as session:
            kinds = {o.name: o.type for o in session.get_outputs()}
        return [name for name in names if kinds[name] in runtime.FLOATS]

    @contextmanager
    def _session(self, names: Sequence[str]) -> Iterator[Any]:
        known = {one.name: one for one in self._described}
        del self.model.graph.output[:]
        self.model.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in names)
        content = self.model.SerializeToString()
        options: dict[str, Any] = {"optimize": False, "weights_in": self.path.parent}
        if not sessions.is_large(self.path):
            yield runtime.session(content, threads=1, **options)
            return
        with apart.Session(content, threads=1, **options) as session:
            yield session

    def fetched(self, inputs: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """All values in order, in runs that fetch as many at once as may be held."""
        start, count = 0, FIRST_FETCH
        while start < len(self.values):
            names = self.values[start : start + count]
            with self._session(names) as session:
                found = dict(zip(names, runtime.run(session, inputs), strict=True))
            start += len(names)
            weight = sum(one.nbytes for one in found.values())
            count = max(1, min(8 * count, int(len(names) * HELD_BYTES / max(weight, 1))))
            yield found

    def moves(self, node: onnx.NodeProto) -> bool:
        """Whether what a node gives may still be what it was given."""
        return node.op_type in MOVES and node.input[0] in self.moving  # which a table is not

    def floor_of(self, name: str) -> int:
        """The latest value of the model that one of the file is computed from."""
        stack = [name]
        while stack:
            node = self.maker[stack[-1]]
            sources = [source for source in self.reads[id(node)] if source in self.moving]
            unknown = [source for source in sources if source not in self.floor]
            if unknown:
                stack += unknown
                continue
            self.floor[stack.pop()] = max(self.floor[source] for source in sources)
        return self.floor[name]

    def before(self, name: str) -> list[str]:
        """The nearest computed values with a counterpart that one is made from: quantisers are part of what reads."""
        found, seen = [], set()
        stack = [name]
        while stack:
            for source in self.reads[id(self.maker[stack.pop()])]:
                if source in seen or source not in self.moving:
                    continue
                seen.add(source)
                if source in self.pairs and not self.moves(self.maker[source]):
                    found.append(source)
                elif source in self.maker:
                    stack.append(source)
        return found

    def forget(self) -> None:
        """Drops the counterpart of a value where what is made of it is far nearer to one.

        That is the same one, where a bias is added on its own; or part of one, where a scale was folded into one of
        three projections: what is wrong is then that part.
        """
        for name in reversed(self.values):
            parts, own = [name], self.pairs.get(name)
            while parts and own is not None:
                for node in self.readers[parts.pop()]:
                    for part in node.output:
                        pair = self.pairs.get(part)
                        if not self.moves(node) and (pair is None or pair.number != own.number):
                            continue
                        parts.append(part)
                        if pair is not None and pair.sqnr_db > own.sqnr_db + NEARER_DB:
                            self.pairs.pop(name, None)
                            parts = []

    def right(self, name: str, tolerance: float) -> bool:
        """Whether a value is its counterpart, but for rounding."""
        return name in self.pairs and self.pairs[name].error <= tolerance


def module_of(name: str) -> str:
    """`layer1.0.conv1` of the node `layer1.0.conv1/Conv`; empty for one of the model itself."""
    return name.rpartition("/")[0]


def _reads(node: onnx.NodeProto) -> list[str]:
    """Values that a node reads, those inside its branches and loops included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            names += [name for one in inner.node for name in _reads(one)]
    return names


# -------------------------------------------------------------------- pairs


def pair(model: Model, file: File, inputs: Mapping[str, np.ndarray], tolerance: float) -> None:
    """Finds for each value of the file the value of the model that it stands for, and compares the two in full."""
    places = {node: number for number, node in enumerate(model.nodes)}
    ends = {
        name: places[node]
        for name, node in zip(model.graph.outputs, model.graph.results, strict=True)
        if node in places
    }
    for arrays in file.fetched(inputs):
        waiting: dict[int, list[str]] = defaultdict(list)
        for name, array in arrays.items():
            floor = file.floor_of(name)
            found = _counterpart(model, file, name, array, floor, tolerance)
            number = ends.get(name, found[0] if found else None)
            if found:
                file.nearest[found[0]] = max(found[1], file.nearest.get(found[0], -math.inf))
            if number is not None:
                file.floor[name] = max(floor, number)
                waiting[number].append(name)
        for number, value in model.values() if waiting else ():
            for name in waiting.get(number, ()):
                node = model.nodes[number]
                seen = sessions.to_tensors([arrays[name]])[0]
                words = described(node), summary(value), summary(seen)
                file.pairs[name] = Pair(number, *compared(value, seen), *words)


def described(node: Node) -> str:
    """`conv2d at layer1.0.conv1`."""
    return short_name(node) if site(node) == node.name else f"{short_name(node)} at {site(node)}"


def _counterpart(
    model: Model, file: File, name: str, array: np.ndarray, floor: int, tolerance: float
) -> tuple[int, float] | None:
    """The value of the model that comes behind `floor` and is the same; else the most like of those that may be it.

    With it how near it is, in dB, by the numbers that were kept.
    """
    if array.size not in model.alike or not array.size:
        return None
    numbers, sketches = model.alike[array.size]
    node = file.maker[name]
    moves = file.moves(node)
    if moves:  # whose work is the shape
        fits = (numbers >= floor) & np.array([model.shapes[i] == array.shape for i in numbers], bool)
    else:
        fits = numbers >= floor
    numbers, sketches = numbers[fits], sketches[fits]
    delta = sketches - _sketch(array)
    noise, signal = ((one.astype(np.float64) ** 2).sum(1) for one in (delta, sketches))
    decibels = 10 * np.log10(np.maximum(signal, 1e-300) / np.maximum(noise, 1e-300))
    if not moves:  # a bias that comes on its own brings a value nearer; what changes nothing does not
        nearer = (numbers > floor) | (decibels > file.nearest.get(floor, math.inf) + NEARER_DB)
        numbers, sketches, delta, decibels = (
            numbers[nearer],
            sketches[nearer],
            delta[nearer],
            decibels[nearer],
        )
    if not len(numbers):
        return None
    same = np.abs(delta).max(1) <= tolerance * np.maximum(np.abs(sketches).max(1), 1e-30)
    if same.any():
        first = int(np.argmax(same))
        return int(numbers[first]), float(decibels[first])
    likely: Sequence[int] = ()
    if file.rounds and decibels.max() >= ALIKE_DB:
        likely = range(len(numbers))
    elif not moves:  # what it moves is wrong already, or is said in other words
        likely = [
            i
            for i, number in enumerate(numbers)
            if model.shapes[number][-1:] == array.shape[-1:]  # in one order, perhaps with other axes made one
            and _may_be(model.nodes[number], node, name in file.last)
        ]
    if not likely:
        return None
    best = max(likely, key=lambda i: decibels[i])
    least = float(decibels[best]) + NEARER_DB if file.rounds else -20 * math.log10(tolerance)
    if _as_multiple(sketches[best], _sketch(array)) > least:
        return None  # a scale was folded in, which another layer takes out
    number = int(numbers[best])
    if decibels[best] < ALIKE_DB and not file.norms:
        number = model.folded(number)
    return number, float(decibels[best])


def _may_be(node: Node, made: onnx.NodeProto, last: bool) -> bool:
    """Whether an operator of the model is what a node of the file was made from, going by their names and places.

    last: the value is what its module gives, whatever operator is last in it.
    """
    name = short_name(node)
    said = kind(node) in KINDS.get(made.op_type, ()) or made.op_type.lower() == name.replace("_", "")
    gives = last and not any(site(user) == site(node) for user in node.users)
    return (said or gives) and module_of(made.name) in _places(node)


def _places(node: Node) -> set[str]:
    """Paths that a node of the file made from this one may have: its own, and that of its weight."""
    found = {"" if site(node) == node.name else site(node)}
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            found.add(str(source.target).rpartition(".")[0])
        elif short_name(node) == "batch_norm":  # which goes by the path of the layer that it was folded into
            found |= _places(source)
    return found


def _as_multiple(reference: np.ndarray, seen: np.ndarray) -> float:
    """How near one value is to the other times a number, in dB."""
    a, b = reference.astype(np.float64), seen.astype(np.float64)
    rest = a - b * (float(a @ b) / max(float(b @ b), 1e-300))
    return (
        10 * math.log10(max(float(a @ a), 1e-300) / max(float(rest @ rest), 1e-300))
        if len(a) > 1
        else -math.inf
    )


def _sketch(value: np.ndarray) -> np.ndarray:
    """Numbers of a value at places that are the same for every value of its size."""
    flat = np.ascontiguousarray(value).reshape(-1)
    if flat.size > SKETCH:
        flat = flat[np.random.default_rng(flat.size).integers(0, flat.size, SKETCH)]
    return np.nan_to_num(flat.astype(np.float32))


def compared(reference: Tensor, seen: Tensor) -> tuple[float, float]:
    """Error and SQNR of one value; infinite and worst where NaN or infinities stand elsewhere."""
    if reference.numel() != seen.numel():
        return math.inf, -math.inf
    if not reference.numel():
        return 0.0, math.inf
    comparison = Comparison(["value"], [[]])
    comparison.update((reference.reshape(-1),), (seen.to(reference.dtype).reshape(-1),))
    check = comparison.checks()[0]
    return (check.error, check.sqnr_db) if check.finite else (math.inf, -math.inf)
