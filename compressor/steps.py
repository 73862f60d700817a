"""One operator seen from the entry of a region: the layouts of what it reads, and what broadcasting makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .constants import DataFree
from .layout import Axis, Layout, Size, run, tokens
from .names import operator_name, site
from .ops import extents, is_tensor


class NotAffine(Exception):
    """An operator on the way is not affine in the features of one token; the message names it."""

    def __init__(self, node: Node, why: str = "is not affine") -> None:
        name = operator_name(node).removesuffix(".default")
        super().__init__(f"{name} at {site(node)} {why}")


class Foreign(Exception):
    """An operator reads another activation, so that it is no function of the entry alone."""


@dataclass(frozen=True)
class Step:
    """One operator, seen from the entry: the layouts of what it reads, and what is known of the rest."""

    node: Node
    known: Mapping[Node, Any]
    free: DataFree
    bound: Mapping[str, Any]

    def fail(self, why: str = "is not affine") -> NotAffine:
        return NotAffine(self.node, why)

    def reads(self, value: Any) -> bool:
        """True for a value of the region."""
        return isinstance(value, Node) and value in self.known

    def layout(self, value: Any) -> Layout:
        if not self.reads(value):
            raise self.fail()
        return self.known[value]

    @property
    def first(self) -> Any:
        """The operator's first argument."""
        return next(iter(self.bound.values()))

    def only(self, name: str, *constants: str) -> Layout:
        """The layout of one operand, when the operands named `constants` are no values of the region."""
        if any(self.reads(self.bound.get(c)) for c in constants):
            raise self.fail("multiplies two activations" if self.reads(self.bound[name]) else "is not affine")
        return self.layout(self.bound[name])

    def features(self, layout: Layout, dim: int) -> int:
        """The axis `dim`, made positive, when it holds features alone."""
        dim %= max(1, len(layout))
        if any(a.token is not None for a in layout[dim]):
            raise self.fail(f"works along axis {dim}, which holds more than the features of one position")
        return dim

    @property
    def sizes(self) -> list[Size]:
        return extents(self.node.meta["val"])


def broadcast(step: Step, axes: list[Axis], constants: list[tuple[Node, int]], size: Size) -> Axis:
    """One axis of a result: the same atoms in every operand of the region, and no constant that tells tokens apart."""
    present = {a for a in axes if a}
    axis = next(iter(present), ())
    if len(present) > 1 or (tokens(axis) and () in axes):  # every value has every token: this one, elsewhere
        raise step.fail("combines different positions")
    for node, dim in constants:
        if node.meta["val"].shape[dim] == 1:
            continue
        if not axis and not isinstance(size, int):
            raise step.fail("repeats features along a dynamic axis")
        if tokens(axis) and step.free.varies(node, dim):
            raise step.fail("brings in a constant that differs from position to position")
    return axis or run(size)


def aligned(step: Step, layouts: list[Layout], constants: list[Node], sizes: list[Size]) -> Layout:
    """Broadcasting over trailing axes, all of them."""
    result = []
    for back in range(len(sizes), 0, -1):
        axes = [layout[-back] if len(layout) >= back else () for layout in layouts]
        consts = [(c, c.meta["val"].dim() - back) for c in constants if c.meta["val"].dim() >= back]
        result.append(broadcast(step, axes, consts, sizes[-back]))
    return tuple(result)


def operands(step: Step, values: Iterable[Any]) -> tuple[list[Layout], list[Node]]:
    """Layouts of the operands in the region, and the constant tensors among `values`."""
    values = [v for v in values if isinstance(v, Node)]
    if not all(is_tensor(v) for v in values):
        raise step.fail("computes with a dynamic size")
    return [step.known[v] for v in values if step.reads(v)], [v for v in values if not step.reads(v)]
