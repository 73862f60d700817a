"""Where the values inside an ONNX file part from those of the model: the first layer that is wrong, and the loudest.

Both run on the same samples, and `counterparts` tells which values are to be the same. From outputs that are wrong the
file is walked upwards to the last values that are right. What lies between is where the fault is: the first value
there that has a counterpart is named, with the operators before it that have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import Node

from . import runtime, sessions
from .counterparts import File, Model, compared, described, module_of, pair
from .emit import feeds
from .ir import Graph, Input
from .ops import kind
from .verify import EMITTED, json_number

SAMPLES = 4  # that the values inside are compared on
AT_ONCE = 100.0  # times the error before it that a fault has at least
FINEST = 1e-5  # rounding alone moves values inside by this much of their scale
# Kinds of the model's operators that compute nothing: none is at fault where it has no counterpart.
_MOVING = {
    *(
        "cast",
        "chunk",
        "expand",
        "flatten",
        "getitem",
        "identity",
        "narrow",
        "permute",
        "select",
        "slice",
        "split",
    ),
    *("squeeze", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
}


@dataclass(frozen=True)
class Layer:
    """One value of the file beside its counterpart in the model.

    node, operator: what made it in the file; module: its path in the model. counterpart: operator and path there.
    error: max|a - b| / max|a|; before: the largest of the values that it is computed from; sqnr_db, before_db: their
    signal over noise. expected, seen: shape, mean and max in words. through: nodes between the last right values and
    this one that have no counterpart: the fault may be in one of them, too. lacks: operators of the model there that
    nothing in the file stands for: folded into others, or missing.
    """

    node: str
    module: str
    operator: str
    counterpart: str
    error: float
    before: float
    sqnr_db: float
    before_db: float
    expected: str
    seen: str
    through: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {key: json_number(value) for key, value in asdict(self).items()}

    @property
    def noise(self) -> float:
        """How much noise, as a share of the signal, this layer adds to what it reads."""
        return _noise(self.sqnr_db) - _noise(self.before_db)


@dataclass(frozen=True)
class Inside:
    """What was found.

    layers: in the order of the file, those that compute something. first: the first value that is wrong; None where
    none is, or the file rounds them all. shown: whether an output is wrong. loudest: the layer that adds most noise.
    tolerance: the error that was still right. values, paired: floats in the file that depend on its inputs, and how
    many have a counterpart.
    """

    layers: tuple[Layer, ...]
    first: Layer | None
    shown: bool
    loudest: Layer | None
    tolerance: float
    values: int
    paired: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "first": self.first.to_dict() if self.first else None,
            "shown": self.shown,
            "loudest": self.loudest.to_dict() if self.loudest else None,
            "layers": [one.to_dict() for one in self.layers],
            "tolerance": self.tolerance,
            "values": self.values,
            "paired": self.paired,
        }


def look_inside(
    graph: Graph,
    path: Path,
    inputs: Sequence[Input],
    samples: Iterable[Sequence[Tensor]],
    tolerance: float | None = None,
) -> Inside:
    """Compares the values inside a file with those of the graph that it was made from.

    inputs: the file's, in the order of the graph's. samples: those that outputs were compared on; the first few that
    differ are taken, or the first of all. Runs on the CPU, operator by operator as they stand in the file.
    """
    file = File(path)
    part, errors = _telling(graph, file, inputs, samples, tolerance or EMITTED)
    allowed = min(tolerance or EMITTED, max(max(errors.values(), default=0.0) / 10, FINEST))
    wrong = [name for name, error in errors.items() if not error <= (tolerance or EMITTED)]
    model = Model(graph, part)
    pair(model, file, feeds(inputs, part), allowed)
    file.forget()
    first = None
    if not file.rounds:
        region = _region(file, wrong, allowed) if wrong else _unshown(file, tolerance or EMITTED)
        for name in set(file.pairs) - set(region):
            if not file.right(name, allowed):  # what reads it is right: the file says it in other words
                del file.pairs[name]
        first = _first(file, region, model)
    shown = tuple(_layer(file, name) for name in file.pairs if not file.moves(file.maker[name]))
    loudest = max((one for one in shown if one.noise > 0), key=lambda one: one.noise, default=None)
    return Inside(shown, first, bool(wrong), loudest, allowed, len(file.values), len(file.pairs))


def _telling(
    graph: Graph, file: File, inputs: Sequence[Input], samples: Iterable[Sequence[Tensor]], tolerance: float
) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """The first few samples on which an output is wrong, else those where outputs differ most; and their errors."""
    found: tuple[tuple[Tensor, ...], dict[str, float]] | None = None
    with sessions.opened(file.path) as session:
        names = [o.name for o in session.get_outputs()]
        for whole in samples:
            for part in sessions.pieces(graph.inputs, inputs, whole):
                for few in _few(inputs, part):
                    seen = dict(zip(names, runtime.run(session, feeds(inputs, few)), strict=True))
                    reference = dict(zip(graph.outputs, graph.run(*few), strict=True))
                    errors = {
                        name: compared(reference[name], sessions.to_tensors([value])[0])[0]
                        for name, value in seen.items()
                        if name in reference and name not in file.suppressed
                    }
                    worst = max(errors.values(), default=0.0)
                    if found is None or worst > max(found[1].values(), default=0.0):
                        found = few, errors
                    if worst > tolerance:
                        return found
    assert found is not None, "the outputs were compared on these samples before"
    return found


def _few(inputs: Sequence[Input], part: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """A batch in pieces of a few samples where all inputs share a free leading axis."""
    leading = {spec.shape[0] if spec.shape else None for spec in inputs}
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in part}
    if len(leading) > 1 or len(sizes) > 1 or not isinstance(next(iter(leading), None), str):
        yield part
        return
    yield from zip(*(tensor.split(SAMPLES) for tensor in part), strict=True)


def _region(file: File, wrong: Sequence[str], tolerance: float) -> list[str]:
    """Values between wrong outputs and the last that are right, in the order of the file."""
    found: set[str] = set()
    stack = list(wrong)
    while stack:
        name = stack.pop()
        if name in found or name not in file.maker or name not in file.moving or file.right(name, tolerance):
            continue
        found.add(name)
        stack += file.reads[id(file.maker[name])]
    return [name for name in file.maker if name in found]


def _unshown(file: File, tolerance: float) -> list[str]:
    """Values that are wrong at once and make others wrong, of which no output shows anything any more.

    One that is wrong alone, or stands in no module, is said in other words by the file; what grows from value to value
    is rounding.
    """
    wrong = [name for name in file.values if name in file.pairs and not file.right(name, tolerance)]
    heard = {source for name in wrong for source in file.before(name)}
    for name in wrong:
        before = max((file.pairs[source].error for source in file.before(name)), default=0.0)
        placed = module_of(file.maker[name].name)
        if placed and name in heard and file.pairs[name].error > AT_ONCE * before:
            found = {name}
            for later in wrong:
                found |= {later} if found & set(file.before(later)) else set()
            return [one for one in wrong if one in found]
    return []


def _first(file: File, region: Sequence[str], model: Model) -> Layer | None:
    """The first value in the region that has a counterpart, and what else may be at fault."""
    first = next((name for name in region if name in file.pairs), None)
    if first is None:
        return None
    above, stack = set(), [first]
    while stack:
        for source in file.reads[id(file.maker[stack.pop()])]:
            if source in region and source not in above:
                above.add(source)
                stack.append(source)
    nodes = [file.maker[name].name for name in region if name in above and not file.moves(file.maker[name])]
    return replace(
        _layer(file, first), through=tuple(dict.fromkeys(nodes)), lacks=_lacking(file, first, model)
    )


def _lacking(file: File, name: str, model: Model) -> tuple[str, ...]:
    """Operators of the model between a value's counterpart and the last that have one: one of them may be missing."""
    stands = {pair.number for pair in file.pairs.values()}
    places = {node: number for number, node in enumerate(model.nodes)}
    found: dict[Node, None] = {}
    last = model.nodes[file.pairs[name].number]
    while kind(last) == "batch_norm":  # with the layer that it was folded into
        last = last.all_input_nodes[0]
    stack = [last]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source.op != "call_function" or places.get(source) in stands or source in found:
                continue
            found[source] = None
            stack.append(source)
    return tuple(described(node) for node in reversed(found) if node in places and kind(node) not in _MOVING)


def _layer(file: File, name: str) -> Layer:
    node = file.maker[name]
    own, came = file.pairs[name], [file.pairs[one] for one in file.before(name)]
    return Layer(
        node=node.name,
        module=module_of(node.name),
        operator=node.op_type,
        counterpart=own.counterpart,
        error=own.error,
        before=max((one.error for one in came), default=0.0),
        sqnr_db=own.sqnr_db,
        before_db=min((one.sqnr_db for one in came), default=math.inf),
        expected=own.expected,
        seen=own.seen,
    )


def _noise(decibels: float) -> float:
    return 10 ** (-decibels / 10) if decibels > -300 else math.inf
