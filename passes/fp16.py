"""Half precision: weights and activations become float16 where the numbers allow it.

What the numbers allow is tried on data, operator by operator: every value must end well inside the range of float16,
and the operator, computed in half precision on halved operands, must give what it gave. So a norm, a softmax or a
table of positions stays in single precision where it has to, and only there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node

from compressor import place
from compressor.ir import Graph
from compressor.names import operator_name, site
from compressor.ops import CONTRACTIONS, NORMS, is_constant, is_tensor, kind, shape
from compressor.padding import Padding, Real
from compressor.pipeline import BOUNDED, Context, Contract, Decline, Outcome, Pass, Rewrite, Size
from compressor.quantize import behind, redirect

aten = torch.ops.aten
HALF, SINGLE = torch.float16, torch.float32
LARGEST = 65504.0  # of float16
HEADROOM = 4.0  # for other data than the calibration data
LOWEST, HUGE = -1e8, 1e30  # numbers beyond these stand for infinity: -1e9 or -3.4e38 in an attention mask
MASKED = LARGEST / 2  # what stands for them in half precision: two of them still add up to a finite number
TRIED, RANGED = 2, 64  # samples that operators are tried on, and that ranges are taken from
TOLERANCE = 2.0**-7  # largest change of an operator's output, relative to its scale: 16 roundings of float16
_SIZES = ("size", "getitem", "assertion")  # read no values
_INTEGERS = ("quantize", "dequantize")
# What hands on a number that is nearly zero, or makes one of it that is nearly infinite.
_CARRIES = frozenset(
    {"view", "flatten", "unflatten", "permute", "transpose", "unsqueeze", "squeeze", "expand", "repeat", "identity",
     "cast", "slice", "select"}
)  # fmt: skip
_INVERTS = frozenset({"aten.sqrt.default", "aten.rsqrt.default", "aten.reciprocal.default"})
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Fp16(Pass):
    """Weights and activations become float16; integers stay what they are.

    An operator stays in single precision where its values come near the end of the range of float16, or where half
    precision moves its output by more than 0.8 % of its scale, on the calibration data (made-up inputs if none).
    Padding is left out of both, as long as it stays finite: an infinity would reach real positions as NaN.
    io: inputs and outputs `keep` their dtype, or become `half`. ignore: modules that stay in single precision.
    """

    name: ClassVar[str] = "fp16"
    contract: ClassVar[Contract] = BOUNDED
    after: ClassVar[tuple[str, ...]] = (
        "merge",
        "shorten",
        "prune",
        "squeeze",
        "distill",
        "fold",
        "int8",
        "int4",
    )

    io: Literal["keep", "half"] = "keep"
    ignore: tuple[str, ...] = ()

    def plan(self, size: Size, graph: Graph, data: bool) -> tuple[Size, str]:
        return Size(
            size.params, size.macs, size.bytes / 2
        ), "two bytes a number, if every operator's range allows it"

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        survey = _Survey(graph, self.ignore)
        data = ctx.calibration or ctx.held_out
        with ctx.progress("trying half precision", None):
            samples = 0
            for batch in data:
                if not samples:
                    survey.watch(_first(graph, batch.inputs), trial=True)
                survey.watch(batch.inputs, trial=False)
                samples += batch.samples
                if samples >= RANGED:
                    break
        reasons = survey.verdicts()
        half = [node for node in survey.candidates if node not in reasons][: ctx.limit]
        chosen = _worthwhile(half, kept=self.io == "keep")
        casts = _convert(graph, chosen, survey.sentinels, self.io) if chosen else 0
        declines = [Decline.at(node, reason) for node, reason in reasons.items()]
        facts = {
            "half": len(chosen),
            "single": len(survey.candidates) - len(chosen),
            "casts": casts,
            "why": dict(Counter(kind(node) for node in reasons).most_common(10)),
            "tried_on": f"{samples} samples of {data.description}",
        }
        return Outcome(
            [Rewrite(site(n), f"{operator_name(n)} in half precision") for n in chosen], declines, facts
        )


# -------------------------------------------------------------------- what the numbers allow


class _Survey:
    """Ranges of all values over all batches, and every operator's trial in half precision on one."""

    def __init__(self, graph: Graph, ignore: Sequence[str]) -> None:
        self.graph = graph
        self._padding = Padding(graph)
        self.candidates = [n for n in graph.nodes if _computes_floats(n)]
        ignored = place.ignored(self.candidates, ignore)
        self.peak: dict[Node, float] = {}
        self.sentinels: set[Node] = set()
        self._failed: dict[Node, str] = {}
        for node in self.candidates:
            reason = _fixed(node, ignored)
            if reason:
                self._failed[node] = reason
        for node in self.candidates:
            number = _vanishing(graph, node)
            if number:
                self._keep_from_zero(node, number)
        self._twin = graph.copy()
        twins = {n.name: n for n in self._twin.nodes}
        self._twins = {n: twins[n.name] for n in self.candidates}
        for twin in self._twins.values():
            _halve_literals(self._twin, twin)

    def watch(self, inputs: Sequence[Tensor], trial: bool) -> None:
        """Notes the range of every value; with `trial`, computes every operator in half precision as well."""
        live: dict[Node, Any] = {}
        left: dict[Node, int] = {}
        real = self._padding.of(inputs)
        for node, value in self.graph.values(*inputs):
            live[node], left[node] = value, len(node.users)
            if node.op != "get_attr" or node not in self.peak:
                self._note(node, value, real)
            if trial and node in self._twins and node not in self._failed:
                self._try(node, live, real)
            for source in node.all_input_nodes:
                left[source] -= 1
                if not left[source]:
                    live.pop(source)

    def verdicts(self) -> dict[Node, str]:
        """Operator -> why it stays in single precision."""
        found: dict[Node, str] = {}
        for node in self.candidates:
            widest = max([node, *node.all_input_nodes], key=lambda n: self.peak.get(n, 0.0))
            if node not in self._failed and self.peak.get(widest, 0.0) > LARGEST / HEADROOM:
                where = "its values reach" if widest is node else "it reads values up to"
                found[node] = f"{where} {self.peak[widest]:.3g}, and half precision ends at {LARGEST:g}"
            elif node in self._failed:
                found[node] = self._failed[node]
        return found

    def _note(self, node: Node, value: Any, real: Real) -> None:
        found = [_peak(tensor) for tensor in _floats(value)]
        if any(sentinels for _, sentinels in found):
            self.sentinels.add(node)
        peak, kept = max((peak for peak, _ in found), default=0.0), real.values(node, value)
        if kept is not value and peak <= LARGEST:
            peak = max((_peak(tensor)[0] for tensor in _floats(kept)), default=0.0)
        if found:
            self.peak[node] = max(self.peak.get(node, 0.0), peak)

    def _try(self, node: Node, live: dict[Node, Any], real: Real) -> None:
        """Fails an operator that half precision changes, and what it reads where rounding that is what changes it."""
        if any(isinstance(t, Tensor) and t.dtype in _WHOLE for t in pytree.tree_leaves(live[node])):
            self._failed[node] = "it makes integers of floats, and rounded floats would make others"
            self._demand(node, f"{operator_name(node)} at {site(node)} makes integers of it")
            return
        twin = self._twins[node]
        rounded = {n: pytree.tree_map(_halved, live[n]) for n in node.all_input_nodes}
        operands = dict(zip(twin.all_input_nodes, rounded.values(), strict=True))
        try:
            seen = self._twin.execute(twin, operands)
        except RuntimeError as error:
            self._failed[node] = f"it has no half-precision kernel: {str(error).splitlines()[0][:120]}"
            return
        if any(t.dtype == SINGLE for t in _floats(seen)):
            self._failed[node] = "it gives single precision whatever it reads"
            return
        moved, kept = _moved(live[node], seen), real.values(node, live[node])
        if kept is not live[node] and moved < torch.inf:
            moved = _moved(kept, real.values(node, seen))
        if moved <= TOLERANCE:
            return
        self._failed[node] = (
            f"half precision moves it by {moved:.1%} of its scale, which is {self.peak.get(node, 0.0):.2g}"
        )
        widened = {n: pytree.tree_map(_widened, value) for n, value in rounded.items()}
        if (
            not _moved(live[node], self.graph.execute(node, widened)) <= TOLERANCE
        ):  # by rounding what it reads
            self._demand(node, f"{operator_name(node)} at {site(node)} needs more digits of it")

    def _keep_from_zero(self, node: Node, number: float) -> None:
        """Fails what a tiny number keeps from zero, and who would divide by it; no sample need come near it."""
        self._failed.setdefault(node, f"its number {number:g} is zero in half precision")
        why = f"{number:g}, which is zero in half precision, keeps what it reads from zero"
        edge, seen = [] if kind(node) in NORMS else [node], {node}
        while edge:
            for user in set(filter(_computes_floats, edge.pop().users)) - seen:
                seen.add(user)
                self._failed.setdefault(user, why)
                if kind(user) in _CARRIES or operator_name(user) in _INVERTS:
                    edge.append(user)

    def _demand(self, node: Node, why: str) -> None:
        """Fails what a node reads, and what that was made from, back to the last contractions."""
        edge, seen = list(node.all_input_nodes), set()
        while edge:
            source = edge.pop()
            if source in seen or source.op != "call_function" or kind(source) in CONTRACTIONS:
                continue
            seen.add(source)
            edge += source.all_input_nodes
            if source in self._twins:
                self._failed.setdefault(source, why)


def _first(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The first samples of a batch, where its size is free."""
    axes = [spec.shape[0] if spec.shape else None for spec in graph.inputs]
    batch = next((axis for axis in axes if isinstance(axis, str)), None)
    return [
        t[:TRIED] if axis is not None and axis == batch else t for t, axis in zip(inputs, axes, strict=True)
    ]


def _computes_floats(node: Node) -> bool:
    """An operator that reads or gives float32 tensors."""
    if node.op != "call_function" or kind(node) in (*_SIZES, *_INTEGERS):
        return False
    return any(_gives_float(n) for n in (node, *node.all_input_nodes))


def _gives_float(node: Node) -> bool:
    return any(True for _ in _floats(node.meta.get("val")))


def _floats(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.dtype == SINGLE]


def _vanishing(graph: Graph, node: Node) -> float:
    """The number among an operator's operands that half precision makes zero, such as 1e-8; 0 where there is none."""
    if kind(node) in ("layer_norm", "group_norm"):  # computed in single precision by every runtime
        return 0.0
    numbers = [one for one in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(one, float)]
    constants = [n for n in node.all_input_nodes if is_constant(n) and not shape(n) and _gives_float(n)]
    numbers += [float(graph.tensor(n)) for n in constants]
    return next((one for one in numbers if one and not float(torch.tensor(one).to(HALF))), 0.0)


def _fixed(node: Node, ignored: Collection[Node]) -> str:
    """Why an operator is not even tried."""
    if any(kind(n) == "dequantize" for n in node.all_input_nodes) or any(
        kind(n) == "quantize" for n in node.users
    ):
        return "it belongs to an integer section"
    if kind(node) == "opaque":
        return "no pass knows this operator"
    if kind(node) == "grid_sample":
        return "it reads between pixels, at places that half precision would move"
    if node in ignored:
        return "left in single precision as asked"
    return ""


def _halved(value: Any) -> Any:
    """A float32 tensor in float16, with sentinels that stand for infinity as numbers; everything else as it is."""
    if not isinstance(value, Tensor) or value.dtype != SINGLE:
        return value
    sentinel = _sentinel(value) & value.isfinite()
    return (
        torch.where(sentinel, value.sign() * MASKED, value).to(HALF)
        if bool(sentinel.any())
        else value.to(HALF)
    )


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == HALF else value


def _moved(reference: Any, seen: Any) -> float:
    """max|seen - reference| / max|reference| of the worst tensor; infinite where integers or infinities differ."""
    pairs = zip(pytree.tree_leaves(reference), pytree.tree_leaves(seen), strict=True)
    return max((_change(a, b) for a, b in pairs if isinstance(a, Tensor) and a.numel()), default=0.0)


def _change(reference: Tensor, seen: Tensor) -> float:
    if not reference.is_floating_point():
        return 0.0 if torch.equal(reference, seen) else torch.inf
    seen = seen.to(reference.dtype)
    scale, difference = _largest(reference), _largest(seen - reference)
    if not (scale < -LOWEST and difference < -LOWEST):  # there are sentinels, infinities or NaN
        apart = _sentinel(reference)
        alike = (seen.sign() == reference.sign()) & (seen.abs() >= MASKED / 2)
        alike = torch.where(reference.isnan(), seen.isnan(), alike)
        if not bool(alike[apart].all()) or not bool(seen[~apart].isfinite().all()):
            return torch.inf
        scale, difference = _largest(reference[~apart]), _largest((seen - reference)[~apart])
    if scale == 0:
        return torch.inf if difference else 0.0
    return difference / scale


def _peak(tensor: Tensor) -> tuple[float, bool]:
    """The largest magnitude of what does not stand for infinity, and whether anything does."""
    peak = _largest(tensor)
    if peak < -LOWEST:
        return peak, False
    sentinel = _sentinel(tensor)
    return _largest(tensor[~sentinel]), bool(sentinel.any())


def _sentinel(tensor: Tensor) -> Tensor:
    """Where a value stands for minus infinity, or is infinite or NaN."""
    return ~(tensor > LOWEST) | ~(tensor < HUGE)


def _largest(tensor: Tensor) -> float:
    """max|t|, NaN where one is in it; 0 of nothing."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high)) if low == low else float("nan")


# -------------------------------------------------------------------- writing it into the graph


def _halve_literals(graph: Graph, node: Node) -> None:
    """Dtypes and numbers among an operator's arguments, as half precision wants them."""
    formals = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()
    numbers = {
        a.name for a in formals if str(a.type) in ("number", "Optional[number]")
    }  # not a size or an axis

    def halve(value: Any, number: bool) -> Any:
        if value is SINGLE:
            return HALF
        if isinstance(value, float) or (number and isinstance(value, int)):
            return max(-MASKED, min(MASKED, value)) if LARGEST < abs(value) < float("inf") else value
        return value

    args = tuple(halve(a, f.name in numbers) for a, f in zip(node.args, formals, strict=False))
    kwargs = {name: halve(a, name in numbers) for name, a in node.kwargs.items()}
    if kind(node) == "create":
        kwargs["dtype"] = HALF
    graph.set_args(node, args + node.args[len(args) :], kwargs)


def _worthwhile(half: list[Node], kept: bool) -> list[Node]:
    """Without islands of cheap operators: casts on all sides of them would gain nothing.

    An island counts as cheap without a contraction and without a matrix of weights; kept: inputs and outputs are in
    single precision, so that they are shores too.
    """
    left, chosen = dict.fromkeys(half), set()
    while left:
        island, edge = set(), [next(iter(left))]
        worth = False
        while edge:
            node = edge.pop()
            island.add(node)
            left.pop(node, None)
            neighbours = [_source(n) for n in (*node.all_input_nodes, *_readers(node))]
            worth |= kind(node) in CONTRACTIONS or any(
                is_constant(n) and len(shape(n)) > 1 for n in neighbours
            )
            worth |= not kept and any(n.op in ("placeholder", "output") for n in neighbours)
            edge += [n for n in neighbours if n in left]
        chosen |= island if worth else set()
    return [node for node in half if node in chosen]


def _readers(node: Node) -> list[Node]:
    return [r for user in node.users for r in (_readers(user) if kind(user) == "getitem" else [user])]


def _source(node: Node) -> Node:
    """The operator whose value a node is: through `getitem`."""
    return _source(node.args[0]) if kind(node) == "getitem" else node  # type: ignore[arg-type]


def _convert(graph: Graph, chosen: Sequence[Node], sentinels: set[Node], io: str) -> int:
    """Gives every chosen operator half-precision literals, weights and operands; returns how many casts that took."""
    ends = {*graph.placeholders, graph.output} if io == "half" else set()
    half = {*chosen, *ends}
    values = [n for n in graph.nodes if is_tensor(n) and _gives_float(n)]
    if io == "half":
        _halve_inputs(graph)
    for node in chosen:
        _halve_literals(graph, node)
    casts = 0
    for value in values:
        readers = [u for u in value.users if kind(u) not in _SIZES]
        if value.op == "get_attr":
            _halve_constant(graph, value, [u for u in readers if u in half], len(readers))
            continue
        made_half = _source(value) in half
        wrong = [u for u in readers if (u in half) != made_half]
        if wrong:
            casts += 1
            cast = _cast(graph, value, SINGLE if made_half else HALF, value in sentinels)
            for user in wrong:
                redirect(graph, user, value, cast)
    graph.reinfer()
    return casts


def _halve_inputs(graph: Graph) -> None:
    graph.inputs = tuple(replace(spec, dtype=HALF) if spec.dtype == SINGLE else spec for spec in graph.inputs)
    graph.example = tuple(_halved(tensor) for tensor in graph.example)
    for node in graph.placeholders:
        value = node.meta["val"]
        if value.dtype == SINGLE:
            with graph.fake_mode:
                node.meta["val"] = value.to(HALF)


def _halve_constant(graph: Graph, node: Node, readers: list[Node], count: int) -> None:
    """A constant in float16 for those who want it; in place of the float32 one where that is everybody."""
    if not readers:
        return
    halved = _halved(graph.tensor(node))
    if len(readers) == count:
        graph.set_tensor(node, halved)
        return
    copy = graph.add_tensor(f"{node.target}_half", halved)
    for user in readers:
        redirect(graph, user, node, copy)


def _cast(graph: Graph, value: Node, dtype: torch.dtype, sentinel: bool) -> Node:
    """`value` in another precision, right behind it; numbers that stand for infinity stay numbers."""
    before = behind(value)
    if sentinel and dtype is HALF:
        value = graph.insert(aten.clamp.default, (value, -MASKED, MASKED), before=before)
    return graph.insert(aten.to.dtype, (value, dtype), before=before)
