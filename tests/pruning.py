"""What tests of pruning share: a graph with power, channels to remove, and the distance to the masked original."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo import with_power

from compressor.capture import capture
from compressor.channels import Algebra, Group, contracted
from compressor.ir import Graph
from compressor.measure import parameters
from compressor.ops import contractions, is_constant, macs
from compressor.oracle import masked
from compressor.surgery import remove
from compressor.verify import compare_values
from compressor.widths import Costs

TOLERANCE = 1e-5


class Net(nn.Module):
    """A forward function with named parts: `Net(lambda m, x: m.b(m.a(x)), a=..., b=...)`."""

    def __init__(self, body: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def graph_of(model: nn.Module, *shape: int) -> tuple[Graph, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, *shape)
    return capture(with_power(model, x), x[:2]), x


def some_of_each(algebra: Algebra) -> list[Group]:
    """Every second group of every family, never all of one."""
    return [group for family in algebra.families for group in family[1::2]]


def worst(reference: Graph, pruned: Graph, x: Tensor) -> float:
    """The larger of the errors of the outputs, at two batch sizes, and of every value inside."""
    outputs = [
        float((a - b).abs().max() / a.abs().max())
        for batch in (x[:2], x[2:])
        for a, b in zip(reference.run(batch), pruned.run(batch), strict=True)
    ]
    return max(*outputs, *(c.error for c in compare_values(reference, pruned, [x])))


def prune(graph: Graph, groups: list[Group]) -> tuple[Graph, Graph]:
    """(masked reference, pruned copy)"""
    pruned = graph.copy()
    remove(pruned, groups)
    pruned.check()
    return masked(graph, groups), pruned


def shift_a_reader(graph: Graph, pruned: Graph) -> None:
    """Breaks surgery: the last pruned weight keeps the neighbours of the inputs that it should keep."""
    kept = pruned.journal.kept
    for reader in reversed(list(contractions(pruned))):
        weight, axis = (contracted(reader) or [(reader, 0)])[-1]
        if is_constant(weight) and axis in kept.get(weight.name, {}):
            original = graph.tensor(graph.node(weight.name))
            wrong = (kept[weight.name][axis] + 1) % original.shape[axis]
            for other, indices in kept[weight.name].items():
                original = original.index_select(other, wrong if other == axis else indices)
            pruned.set_tensor(weight, original)
            return
    raise AssertionError("no reader was pruned")


def assert_predicted(graph: Graph, pruned: Graph, groups: list[Group], algebra: Algebra) -> None:
    """Costs as the budget sees them are what the pruned graph costs, both factors of a product counted."""
    costs = Costs(algebra, {"macs": algebra.macs_terms, "params": algebra.parameter_terms})
    assert costs.before == {"macs": macs(graph), "params": parameters(graph)}
    removed = algebra.removed(groups)
    costs.apply({key: len(removed.get(key[0], {}).get(key[1], ())) for key in costs.keys})
    assert costs.now == pytest.approx({"macs": macs(pruned), "params": parameters(pruned)})


def line(graph: Graph, name: str) -> str:
    """`view.default(%relu, [batch, -1])`: operator and arguments of a node."""
    return next(t for t in graph.text().splitlines() if t.startswith(f"%{name}:")).split(" = aten.", 1)[1]
