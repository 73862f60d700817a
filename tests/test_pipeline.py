"""The spec string, the order rules, and a pipeline that holds every pass to its contract."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from torch import nn

from compressor.capture import capture
from compressor.data import Batch, Data
from compressor.errors import ContractError, UsageError
from compressor.pipeline import (
    BOUNDED,
    EXACT,
    MASKED,
    Context,
    Decline,
    Outcome,
    Pass,
    Pipeline,
    Rewrite,
    arrange,
    parse,
)
from compressor.target import Target

aten = torch.ops.aten


@dataclass(frozen=True)
class Shift(Pass):
    """Adds `by` to the first bias: exact only for 0."""

    name: ClassVar[str] = "shift"
    contract = EXACT
    by: float = 0.0
    mode: Literal["first", "last"] = "first"
    ignore: tuple[str, ...] = ()
    steps: int | None = None

    def run(self, graph, ctx):
        bias = next(n for n in graph.nodes if n.target == "0.bias")
        graph.set_tensor(bias, graph.tensor(bias) + self.by)
        return Outcome([Rewrite("0", "shifted")], [Decline.at(bias, "only once")])


@dataclass(frozen=True)
class Cut(Pass):
    """Removes output 0 of layer 0 and input 0 of layer 2; `wrong` removes another input."""

    name: ClassVar[str] = "cut"
    contract = MASKED
    after: ClassVar[tuple[str, ...]] = ("shift",)
    requires: ClassVar[tuple[str, ...]] = ("shift",)
    wrong: bool = False

    def run(self, graph, ctx):
        reference = graph.copy()
        reader = [n for n in reference.nodes if n.target is aten.linear.default][1]
        mask = reference.add_tensor("mask", torch.tensor([0.0, 1, 1, 1]))
        with reference.graph.inserting_before(reader):
            masked = reference.insert(aten.mul.Tensor, (reader.args[0], mask), before=reader)
        reference.set_args(reader, (masked, *reader.args[1:]))
        kept = torch.tensor([1, 2, 3])
        find = {n.target: n for n in graph.nodes if n.op == "get_attr"}
        graph.set_tensor(find["0.weight"], graph.tensor(find["0.weight"])[kept])
        graph.set_tensor(find["0.bias"], graph.tensor(find["0.bias"])[kept])
        column = torch.tensor([0, 2, 3]) if self.wrong else kept
        graph.set_tensor(find["2.weight"], graph.tensor(find["2.weight"])[:, column])
        graph.reinfer()
        for node in graph.nodes:
            if node.op == "call_function" and node.meta["val"].shape[-1] == 3:
                graph.journal.kept[node.name] = {1: kept}
        return Outcome([Rewrite("0", "one channel")], reference=reference)


@dataclass(frozen=True)
class Noise(Pass):
    """Adds noise to the weights."""

    name: ClassVar[str] = "noise"
    contract = BOUNDED
    size: float = 0.01

    def run(self, graph, ctx):
        weight = next(n for n in graph.nodes if n.target == "0.weight")
        noise = torch.randn(weight.meta["val"].shape, generator=torch.Generator().manual_seed(ctx.seed))
        graph.set_tensor(weight, graph.tensor(weight) + self.size * noise)
        return Outcome([Rewrite("0", "noise")])


TABLE = {p.name: p for p in (Shift, Cut, Noise)}


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.randn(2, 5),))


def context():
    torch.manual_seed(1)
    batches = [Batch((torch.randn(4, 5),)) for _ in range(2)]
    return Context(Target("cpu", "", ("CPUExecutionProvider",)), Data(lambda: batches, [4, 4], "random"))


def run(graph, spec, **options):
    return Pipeline(parse(spec, TABLE), TABLE, **options).run(graph, context())


def test_spec_reads_options_by_type_and_prints_back():
    (one,) = parse("shift(by=1e-3, mode=last, ignore=a.*+b, steps=none)", TABLE)
    assert one == Shift(by=1e-3, mode="last", ignore=("a.*", "b"), steps=None)
    assert str(one) == "shift(by=0.001,mode=last,ignore=a.*+b)"
    assert parse(str(one), TABLE) == [one]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("shfit", "unknown pass 'shfit', did you mean 'shift'"),
        ("shift(bye=1)", "no option 'bye', did you mean 'by'"),
        ("shift(by=much)", r"shift\(by=much\): expected float"),
        ("shift(mode=middle)", "expected first|last"),
        ("shift(by=1", "no closing parenthesis"),
        ("shift(by)", "no option"),
        ("", "no pass named"),
    ],
)
def test_a_wrong_spec_says_what_is_right(spec, words):
    with pytest.raises(UsageError, match=words):
        parse(spec, TABLE)


def test_missing_prerequisites_are_inserted_and_named():
    passes, inserted = arrange(parse("cut", TABLE), TABLE)
    assert [p.name for p in passes] == ["shift", "cut"] and inserted == ["shift"]


def test_an_order_that_breaks_a_rule_prints_the_right_one():
    with pytest.raises(UsageError, match="--passes 'shift,cut'"):
        arrange(parse("cut,shift", TABLE), TABLE)


def test_an_exact_pass_is_proved(graph):
    rows = run(graph, "shift")
    assert [r.name for r in rows] == ["input", "shift"]
    assert rows[1].status == "proved" and rows[1].declines[0].reason == "only once"


def test_a_broken_exact_pass_names_pass_and_operator(graph):
    with pytest.raises(ContractError, match=r"pass shift: .*first bad operator: aten.linear.default at 0"):
        run(graph, "shift(by=0.1)")


def test_a_masked_pass_equals_its_mask(graph):
    rows = run(graph, "cut")
    assert rows[-1].status == "proved"
    assert all(c.power > 1e-3 for c in rows[-1].checks)


def test_a_wrong_surgery_is_caught(graph):
    with pytest.raises(ContractError, match="pass cut"):
        run(graph, "cut(wrong=true)")


def test_a_bounded_pass_is_measured_warned_and_stopped(graph):
    assert run(graph.copy(), "noise")[-1].status == "proved"
    assert run(graph.copy(), "noise(size=0.15)")[-1].status == "warned"
    with pytest.raises(ContractError, match="SQNR"):
        run(graph.copy(), "noise(size=10)")


def test_stop_after_and_limits_name_passes_of_this_run(graph):
    rows = run(graph, "shift,noise", stop_after="shift")
    assert [r.name for r in rows] == ["input", "shift"]
    with pytest.raises(UsageError, match="not among the passes"):
        run(graph, "shift", stop_after="cut")
    with pytest.raises(UsageError, match="not among the passes"):
        run(graph, "shift", limits={"cut": 1})


def test_a_silent_change_is_caught(graph):
    @dataclass(frozen=True)
    class Silent(Shift):
        name: ClassVar[str] = "silent"

        def run(self, graph, ctx):
            super().run(graph, ctx)
            return Outcome()

    table = {"silent": Silent}
    with pytest.raises(ContractError, match="did not say so"):
        Pipeline([Silent(by=0.1)], table).run(graph, context())


def test_half_precision_is_judged_against_single(graph):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).half()
    half = capture(model, (torch.randn(2, 5).half(),))
    batches = [Batch((torch.randn(4, 5).half(),))]
    ctx = Context(Target("cpu", "", ("CPUExecutionProvider",)), Data(lambda: batches, [4], "random"))
    assert Pipeline([Shift()], TABLE).run(half.copy(), ctx)[-1].checks[0].tolerance < 1e-2
    with pytest.raises(ContractError):
        Pipeline([Shift(by=0.1)], TABLE).run(half.copy(), ctx)
