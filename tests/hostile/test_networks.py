"""Random networks through every pass: what is promised holds, or it is said that it does not.

A few dozen here, the same in every run; `benchmarks/hostile.py N` draws thousands. `judgement.py` judges, in plain
PyTorch and plain ONNX Runtime. A number that is wrong in silence fails; so does any exception that is no error of ours.
"""

from __future__ import annotations

import random

import pytest
import torch
from judgement import SPECS, Wrong, close, examine, masked, noisy
from networks import INPUTS, KINDS, Network, Plan, Step, drawn, in_double, outputs, samples, shrunken

from compressor.errors import UsageError
from compressor.ir import Graph
from compressor.surgery import remove

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

steps = st.builds(
    Step,
    st.sampled_from(KINDS),
    st.sampled_from((0, 0, 0, 1, 2, 3)),
    st.integers(0, 59),
    st.integers(0, 59),
    st.integers(0, 59),
)
plans = st.builds(
    Plan,
    st.lists(st.sampled_from(list(INPUTS)), min_size=1, max_size=2).map(tuple),
    st.lists(steps, min_size=2, max_size=10).map(tuple),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 1 << 30),
)
# Nothing is shrunk here, which may take minutes: `networks.shrunken` does it, with the plan that is printed.
QUIET = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
LOSSY = [spec for spec, promise in SPECS.items() if promise in ("bounded", "half")]
EXACT = [spec for spec, promise in SPECS.items() if promise in ("exact", "masked")]


@given(plans, st.sampled_from(EXACT))
@settings(max_examples=16, **QUIET)
def test_exact_and_masked_passes_give_what_the_module_gives(plan: Plan, spec: str) -> None:
    verdict = examine(plan, spec, emitted=False)
    assert verdict.kind != "caught", verdict.words


@given(plans, st.sampled_from(LOSSY))
@settings(max_examples=8, **QUIET)
def test_lossy_passes_lose_what_they_say(plan: Plan, spec: str) -> None:
    examine(plan, spec, emitted=False)


@given(plans, st.sampled_from(list(SPECS)))
@settings(max_examples=4, **QUIET)
def test_files_give_what_graphs_give(plan: Plan, spec: str) -> None:
    examine(plan, spec)


# -------------------------------------------------------------------- the generator and the judge


def test_every_kind_of_layer_is_made() -> None:
    made = {step.kind for seed in range(300) for step in Network(drawn(random.Random(seed))).made}
    assert made == set(KINDS)


def test_a_copy_in_double_is_the_same_network() -> None:
    """What rounding excuses is told by it."""
    plan = drawn(random.Random(3))
    network, x = Network(plan), samples(plan, 2, 0)
    twin = in_double(network)
    wide = [t.double() if t.is_floating_point() else t for t in x]
    for a, b in zip(outputs(network, x), outputs(twin, wide), strict=True):
        assert b.dtype == torch.float64 and close("copy", b, a, 1e-4) < 1e-4
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert any(bool(t.any()) for t in outputs(network, x))


TWO = Plan(("tokens",), (Step("linear"), Step("activation", a=5), Step("linear", b=1)))
PRUNE = "prune(macs=0.6,reach=best,repair=false,align=1,criterion=l2)"


def test_a_wrong_cut_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of a pruned network is another, and no check of the project's runs: the judge alone must see it."""
    from compressor.pipeline import _Judge
    from passes import prune

    def wrong(graph: Graph, groups: list) -> None:
        remove(graph, groups)
        for node in graph.nodes:
            if node.op == "get_attr" and graph.tensor(node).dim() == 2:
                graph.set_tensor(node, graph.tensor(node).roll(1, 1))

    assert examine(TWO, PRUNE, emitted=False).kind == "kept"
    monkeypatch.setattr(prune, "remove", wrong)
    assert examine(TWO, PRUNE, emitted=False).kind == "caught"  # by the run itself
    monkeypatch.setattr(_Judge, "step", lambda self, graph, *rest: ("proved", []))
    with pytest.raises(Wrong, match="file against module"):
        examine(TWO, PRUNE, emitted=False)


def test_masks_move_the_outputs() -> None:
    network, x = Network(TWO), samples(TWO, 4, 0)
    plain = outputs(network, x)[0]
    with masked(network, {"s2_linear.weight": {1: torch.arange(4)}}):
        cut = outputs(network, x)[0]
    assert torch.equal(outputs(network, x)[0], plain)
    with pytest.raises(Wrong):
        close("masks", plain, cut, 1e-2)
    with pytest.raises(Wrong):
        noisy("noise", plain, plain + 0.5 * torch.randn_like(plain), 20)
    with pytest.raises(Wrong):
        noisy("nothing", plain, plain * float("nan"), 3)


def test_failures_shrink() -> None:
    plan = drawn(random.Random(5))
    wanted = plan.steps[len(plan.steps) // 2].kind
    small = shrunken(plan, lambda p: any(step.kind == wanted for step in p.steps))
    assert len(small.steps) == 1 and small.steps[0].kind == wanted


def test_what_is_no_error_of_ours_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    from passes.fold import Fold

    def raises(error: Exception):
        def run(*_: object) -> None:
            raise error

        return run

    monkeypatch.setattr(Fold, "run", raises(UsageError("no")))
    assert examine(TWO, "fold", emitted=False).kind == "refused"
    monkeypatch.setattr(Fold, "run", raises(KeyError("bug")))
    with pytest.raises(KeyError):
        examine(TWO, "fold", emitted=False)
