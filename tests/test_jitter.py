"""Deep networks amplify last bits: passes and files are held to what those make of the graph itself, no less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from zoo import with_power

from compressor import delivery, jitter, verify
from compressor.batches import Batch
from compressor.capture import capture
from compressor.data import open_data
from compressor.emit import Emitted
from compressor.errors import ContractError
from compressor.ir import Graph
from compressor.ops import kind
from compressor.pipeline import EXACT, Context, Contract, Outcome, Pass, Pipeline, Rewrite
from passes.fold import Fold
from passes.int8 import Int8
from targets.cpu import CPU

WIDTH = 32


def steps(layers: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(one for _ in range(layers) for one in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    with_power(model, torch.randn(8, WIDTH))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight *= 2  # tanh at its steepest and flattest: small changes grow
    return model


def integer(layers: int) -> Graph:
    graph = capture(steps(layers), torch.randn(8, WIDTH))
    samples = open_data([(torch.randn(64, WIDTH),)], graph.inputs)
    list(Int8(rounding="nearest", equalise=False, measure=False).run(graph, Context(CPU, samples, samples)))
    assert any(kind(node) == "quantize" for node in graph.nodes)
    return graph


def samples() -> list[tuple[torch.Tensor, ...]]:
    return [(torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(1)),)]


def test_a_shallow_network_is_held_to_the_bar():
    assert min(jitter.levels(integer(1), samples()).values()) > verify.SIMULATION_DB


def test_a_deep_network_is_held_to_what_its_last_bits_do():
    graph = integer(12)
    levels = jitter.levels(graph, samples())
    assert max(levels.values()) < verify.SIMULATION_DB
    # another rounding, as a runtime might have it, passes; a wrong weight in one layer does not
    other = jitter.jittered(graph, 3e-7)
    wrong = graph.copy()
    weight = next(n for n in wrong.nodes if n.op == "get_attr" and n.meta["val"].dim() == 2)
    wrong.set_tensor(weight, wrong.tensor(weight).roll(1, 1))
    judged(graph, other, levels)
    with pytest.raises(ContractError, match="is not the graph's"):
        judged(graph, wrong, levels)
    with pytest.raises(ContractError, match="at least 30.0 dB"):
        judged(graph, other, {})


def judged(graph: Graph, runtime: Graph, levels: dict[tuple[str, str], float]) -> None:
    comparison = verify.Comparison(graph.outputs, [()])
    for inputs in samples():
        comparison.update(graph.run(*inputs), runtime.run(*inputs))
    delivery.judge_emitted(graph, comparison.checks(verify.EMITTED), levels)


def test_half_precision_moves_by_its_own_last_bits():
    class Half(nn.Module):
        def forward(self, x):
            return torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.01, 0, -128, 127, torch.int8)

    graph = capture(Half(), torch.zeros(4, 100).half())
    between = torch.full((4, 100), 0.005).half()
    below, above = (jitter.jittered(graph, s * jitter.LAST_BITS).run(between)[0].unique() for s in (-1, 1))
    assert (below.item(), above.item()) == (0, 1)


def test_the_file_of_a_deep_network_is_delivered(tmp_path):
    graph = integer(12)
    emitted: Emitted = delivery.deliver(graph, CPU, tmp_path, {}, {})
    checks = delivery.check_emitted(graph, emitted, [Batch(samples()[0])])
    assert all(check.finite for check in checks)


def test_half_precision_is_held_to_what_its_rounding_does(tmp_path):
    graph = capture(steps(22).half(), torch.randn(8, WIDTH).half())
    batch = Batch((samples()[0][0].half(),))
    (level,) = jitter.levels(graph, [batch.inputs]).values()
    assert verify.FAIL_DB < level < verify.SIMULATION_DB
    emitted = delivery.deliver(graph, CPU, tmp_path, {}, {})
    (check,) = delivery.check_emitted(graph, emitted, [batch])
    assert level < check.sqnr_db < verify.SIMULATION_DB
    weight = next(n for n in graph.nodes if n.op == "get_attr" and n.meta["val"].dim() == 2)
    graph.set_tensor(weight, graph.tensor(weight).roll(1, 1))
    with pytest.raises(ContractError, match="is not the graph's"):
        delivery.check_emitted(graph, emitted, [batch])


# ---------------------------------------------------------------- floats


class Steep(nn.Module):
    """A thousand comes in and goes out again: the last bits of a weight are a thousand times as large as they look."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(1000 + x))


def steep() -> Graph:
    torch.manual_seed(0)
    model = Steep()
    for _ in range(100):  # the running mean arrives
        model(torch.randn(64, WIDTH))
    return capture(model.eval(), torch.randn(8, WIDTH))


def test_a_fold_is_held_to_what_rounding_the_weights_does():
    graph = steep()
    samples = open_data([(torch.randn(64, WIDTH),)], graph.inputs)
    least = jitter.errors(graph, [batch.inputs for batch in samples])
    assert verify.TOLERANCE[torch.float32] < max(least.values()) < 1e-2
    row = Pipeline([Fold()], {}).run(graph.copy(), Context(CPU, samples, samples))[-1]
    assert "rounding its weights once" in row.facts["checked_in"] and row.status == "proved"
    with pytest.raises(ContractError, match="pass wrong"):
        Pipeline([Wrong()], {}).run(graph.copy(), Context(CPU, samples, samples))


@dataclass(frozen=True)
class Wrong(Pass):
    """One weight of the first layer is off by a hundredth."""

    name: ClassVar[str] = "wrong"
    contract: ClassVar[Contract] = EXACT

    def run(self, graph: Graph, ctx: Context) -> Outcome:
        weight = next(n for n in graph.nodes if n.op == "get_attr" and n.meta["val"].dim() == 2)
        tensor = graph.tensor(weight).clone()
        tensor[0, 0] *= 1.01
        graph.set_tensor(weight, tensor)
        return Outcome([Rewrite("", "made wrong")])
