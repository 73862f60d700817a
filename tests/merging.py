"""Shared by the tests of merge: merging with every check on, counting operators, errors, and a small transformer."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from zoo import with_power

from compressor.capture import capture
from compressor.data import open_data
from compressor.ir import Graph
from compressor.names import site
from compressor.ops import CONTRACTIONS, kind
from compressor.pipeline import Context, Outcome
from compressor.target import Target
from compressor.verify import compare_values
from passes.merge import Merge

TOLERANCE = 1e-5  # of the output's largest value, as the exact contract has it
WIDTH, HEADS, LENGTH = 16, 2, 5


def context(graph: Graph, limit: int | None = None) -> Context:
    held_out = open_data([graph.example], graph.inputs)
    return Context(Target("cpu", "", ("CPUExecutionProvider",)), held_out, limit=limit)


def merge(graph: Graph, limit: int | None = None, **options: Any) -> tuple[Graph, Outcome]:
    """A merged copy, checked: invariants, every value that it claims to have kept, and a second run that is idle."""
    after, outcome = merge_only(graph, limit, **options)
    after.check()
    assert max((c.error for c in compare_values(graph, after, graph.example)), default=0) < TOLERANCE
    if limit is None:
        again, text = after.copy(), after.text()
        assert Merge(**options).run(again, context(again)).rewrites == []
        assert again.text() == text
    return after, outcome


def merge_only(before: Graph, limit: int | None = None, **options: Any) -> tuple[Graph, Outcome]:
    after = before.copy()
    return after, Merge(**options).run(after, context(after, limit))


def captured(model: nn.Module, *example: Tensor, **options: Any) -> Graph:
    return capture(with_power(model, *example), example, **options)


def operators(graph: Graph, module: str = "") -> Counter[str]:
    """Operators of a module by kind, those that only tell sizes left out."""
    prefix = module and f"{module}."
    found = (n for n in graph.nodes if n.op == "call_function" and f"{site(n)}.".startswith(prefix))
    return Counter(k for n in found if (k := kind(n)) != "size")


def reasons(outcome: Outcome) -> list[str]:
    return [d.reason for d in outcome.declines]


def declined(graph: Graph, **options: Any) -> list[str]:
    """Reasons of a merge that must change nothing."""
    text = graph.text()
    after, outcome = merge(graph, **options)
    assert after.text() == text, outcome.rewrites
    return reasons(outcome)


def error(before: Graph, after: Graph, *inputs: Tensor) -> float:
    """Largest difference over all outputs, each relative to its largest value."""
    pairs = zip(before.run(*inputs), after.run(*inputs), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def excess(model: nn.Module, after: Graph, *inputs: Tensor) -> list[float]:
    """Error of each output against the model in float64, over what is allowed: 2e-6 or twice the model's own."""
    with torch.no_grad():
        wide = (x.double() if x.is_floating_point() else x for x in inputs)
        exact = tree_leaves(copy.deepcopy(model).double()(*wide))
        triples = list(zip(exact, tree_leaves(model(*inputs)), after.run(*inputs), strict=True))
    allowed = [max(2 * float((own - e).abs().max()), 2e-6 * float(e.abs().max())) for e, own, _ in triples]
    return [float((ours - e).abs().max()) / a for (e, _, ours), a in zip(triples, allowed, strict=True)]


def broken(graph: Graph) -> Graph:
    """The wrong answer: every matrix and kernel has lost its last row."""
    wrong = graph.copy()
    for node in wrong.nodes:
        if node.op == "get_attr" and node.meta["val"].dim() > 1:
            weight = wrong.tensor(node).clone()
            weight[-1] = 0
            wrong.set_tensor(node, weight)
    return wrong


class FeedForward(nn.Module):
    """The two linears of a transformer block, with its norm and its shortcut."""

    def __init__(self, linear: Any = nn.Linear) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.GELU()
        self.up, self.down = linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, linear: Any = nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = FeedForward(linear)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        parts = (f(h).view(*x.shape[:-1], HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape)
        return self.mlp(x + self.out(h))


def transformer(linear: Any = nn.Linear, blocks: int = 1) -> Graph:
    example = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    model = with_power(nn.Sequential(*(Block(linear) for _ in range(blocks))), example)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("up.weight"):
                parameter *= 0.3  # of the size of the base: softmax over larger logits magnifies rounding
    return capture(model, (example,))


class Rows(nn.Module):
    """The rows of a table, each a module, all on the same inputs, each with an output of its own."""

    def __init__(self, table: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.paths = {name: re.sub(r"\W", "_", name) for name in table}
        for name, module in table.items():
            self.add_module(self.paths[name], module)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [self.get_submodule(path)(*inputs) for path in self.paths.values()]


class Merged:
    """A table captured and merged at once, to be asked row by row.

    excess: how far a row's numbers are from float64 on `inputs`, see `excess`; broken: the same for the wrong answer.
    """

    def __init__(self, table: Mapping[str, nn.Module], *inputs: tuple[Tensor, ...], **options: Any) -> None:
        self.model = with_power(Rows(table), *inputs[0])
        self.before = capture(self.model, inputs[0], **options)
        self.after, self.outcome = merge(self.before)
        wrong = broken(self.after)
        self.excess, self.broken = ({name: 0.0 for name in table} for _ in range(2))
        for x in inputs:
            for graph, worst in ((self.after, self.excess), (wrong, self.broken)):
                for name, value in zip(table, excess(self.model, graph, *x), strict=True):
                    worst[name] = max(value, worst[name])

    def operators(self, name: str, graph: Graph | None = None) -> Counter[str]:
        return operators(graph or self.after, self.model.paths[name])

    def contractions(self, name: str, graph: Graph) -> dict[str, int]:
        return {k: n for k, n in self.operators(name, graph).items() if k in CONTRACTIONS}

    def reasons(self, name: str) -> list[str]:
        path = self.model.paths[name]
        return [d.reason for d in self.outcome.declines if re.match(rf"{path}\b", d.site)]
