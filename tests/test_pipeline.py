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


def context(dtype=torch.float32):
    torch.manual_seed(1)
    batches = [Batch((torch.randn(4, 5, dtype=dtype),)) for _ in range(2)]
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


class Drawing(nn.Module):
    """Adds next to nothing that is another one in every run; `noise` says how it is drawn."""

    def __init__(self, noise):
        super().__init__()
        self.layers, self.noise = nn.Sequential(nn.Linear(5, 4)), noise

    def forward(self, x):
        return self.layers(x) + 1e-6 * self.noise(x[:, :4])


@torch.library.custom_op("tests::untold", mutates_args=())
def untold(x: torch.Tensor) -> torch.Tensor:
    """Random, and nothing says so."""
    return torch.randn_like(x)


untold.register_fake(torch.empty_like)


def test_random_numbers_are_no_excuse():
    table = {"shift": Offset}
    graph = capture(Drawing(torch.randn_like), (torch.randn(2, 5),))
    with pytest.raises(ContractError, match=r"pass shift: output output differs by .*; first bad operator: "):
        Pipeline([Offset(by=0.1)], table).run(graph.copy(), context())
    row = Pipeline([Offset()], table).run(graph.copy(), context())[-1]
    assert (row.contract, row.status) == ("exact", "proved")

    graph = capture(Drawing(untold), (torch.randn(2, 5),))
    row = Pipeline([Offset(by=0.01)], table).run(graph.copy(), context())[-1]
    assert row.contract == "bounded"  # what cannot be held to more does not claim more


@dataclass(frozen=True)
class Offset(Shift):
    """Shift for `Drawing`."""

    def run(self, graph, ctx):
        bias = next(n for n in graph.nodes if n.target == "layers.0.bias")
        graph.set_tensor(bias, graph.tensor(bias) + self.by)
        return Outcome([Rewrite("0", "shifted")])


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


class Cancel(nn.Module):
    """Adds and takes away 4096: float32 keeps three digits of x."""

    def forward(self, x):
        return (x + 4096.0) - 4096.0


@dataclass(frozen=True)
class Simplify(Pass):
    """x + 4096 - 4096 is x; `off` is what a wrong pass would add."""

    name: ClassVar[str] = "simplify"
    contract = EXACT
    off: float = 0.0

    def run(self, graph, ctx):
        sub = graph.results[0]
        graph.replace_uses(sub, graph.insert(aten.add.Scalar, (graph.placeholders[0], self.off), before=sub))
        return Outcome([Rewrite("", "simplified")])


def test_what_float32_rounds_away_is_judged_in_float64():
    graph = capture(Cancel(), (torch.randn(2, 5),))
    row = Pipeline([Simplify()], {}).run(graph.copy(), context())[-1]
    assert row.status == "proved" and row.checks[0].error < 1e-9
    assert "float64" in row.facts["checked_in"]
    with pytest.raises(ContractError, match="pass simplify: output output differs by .*e-05"):
        Pipeline([Simplify(off=1e-4)], {}).run(graph.copy(), context())


@pytest.mark.parametrize(("inside", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_doubles_that_floats_were_made_into_are_as_exact_as_floats(inside, tolerance):
    class Widened(nn.Module):
        def forward(self, x):
            return (x.to(inside) * 3).double()

    @dataclass(frozen=True)
    class Thirds(Simplify):
        def run(self, graph, ctx):
            product = next(n for n in graph.nodes if n.target == aten.mul.Tensor)
            third = graph.insert(aten.div.Tensor, (product.args[0], 1 / 3 * (1 + self.off)), before=product)
            graph.replace_uses(product, third)
            return Outcome([Rewrite("", "divided")])

    graph = capture(Widened(), (torch.randn(2, 5, dtype=inside),))
    row = Pipeline([Thirds()], {}).run(graph.copy(), context(inside))[-1]
    assert row.status == "proved" and row.checks[0].tolerance == tolerance
    with pytest.raises(ContractError, match="differs by"):
        Pipeline([Thirds(off=3 * tolerance)], {}).run(graph.copy(), context(inside))


def test_an_exact_pass_on_a_dead_value_is_not_proved():
    class Dead(nn.Module):
        def forward(self, x):
            return (x * 0 + 4096.0) - 4096.0

    graph = capture(Dead(), (torch.randn(2, 5),))

    @dataclass(frozen=True)
    class Same(Simplify):
        def run(self, graph, ctx):
            sub = graph.results[0]
            graph.replace_uses(sub, graph.insert(aten.mul.Scalar, (graph.placeholders[0], 0), before=sub))
            return Outcome([Rewrite("", "the same")])

    assert Pipeline([Same()], {}).run(graph, context())[-1].status == "not proved"


def test_the_loss_against_the_original_adds_up(graph):
    rows = run(graph, "noise(size=0.05),noise(size=0.05)")
    assert rows[0].total_db == float("inf")
    assert rows[2].total_db < rows[1].total_db < 60


class Whole(nn.Module):
    """Whole numbers in and out: no float feeds them."""

    def forward(self, x):
        return x + 1, x * 2


@dataclass(frozen=True)
class Twice(Pass):
    """x * 2 is x + x; `wrong` makes it x + x + x."""

    name: ClassVar[str] = "twice"
    contract = EXACT
    wrong: bool = False

    def run(self, graph, ctx):
        x, product = graph.placeholders[0], graph.results[1]
        total = graph.insert(aten.add.Tensor, (x, x), before=product)
        if self.wrong:
            total = graph.insert(aten.add.Tensor, (total, x), before=product)
        graph.replace_uses(product, total)
        return Outcome([Rewrite("", "a sum")])


def test_whole_numbers_that_no_float_feeds_must_be_equal():
    graph = capture(Whole(), (torch.arange(10).reshape(2, 5),))
    batches = [Batch((torch.arange(20).reshape(4, 5),))]
    ctx = Context(Target("cpu", "", ("CPUExecutionProvider",)), Data(lambda: batches, [4], "whole numbers"))
    Pipeline([Twice()], {}).run(graph.copy(), ctx)
    with pytest.raises(ContractError, match="output output_1 differs"):
        Pipeline([Twice(wrong=True)], {}).run(graph.copy(), ctx)
