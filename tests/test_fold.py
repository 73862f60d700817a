"""Fold: batch norm, constants, identities and dead code; each near miss stays and says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from nets import Net
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import torchvision_model, with_power

from compressor.absorb import fold_behind, fold_in_front
from compressor.capture import capture
from compressor.data import open_data
from compressor.ir import Graph
from compressor.measure import bytes_of, parameters
from compressor.ops import kind
from compressor.pipeline import Context, Outcome, Size
from compressor.target import Target
from compressor.verify import compare_values
from passes.fold import Fold

TOLERANCE = 1e-5
aten = torch.ops.aten


def context(graph: Graph, limit: int | None = None) -> Context:
    held_out = open_data([graph.example], graph.inputs)
    return Context(Target("cpu", "", ("CPUExecutionProvider",)), held_out, limit=limit)


def fold(graph: Graph, limit: int | None = None, **options: Any) -> tuple[Graph, Outcome]:
    """A folded copy, checked: invariants, numbers, every value that it claims to have kept, an idle second run."""
    after = graph.copy()
    outcome = Fold(**options).run(after, context(after, limit))
    after.check()
    assert max((c.error for c in compare_values(graph, after, graph.example)), default=0) < TOLERANCE
    assert error(graph, after, *graph.example) < TOLERANCE
    if limit is None:
        again, text = after.copy(), after.text()
        assert Fold(**options).run(again, context(again)).rewrites == []
        assert again.text() == text
    return after, outcome


def error(before: Graph, after: Graph, *inputs: Tensor) -> float:
    """Largest difference over all outputs, each relative to its largest value."""
    pairs = zip(before.run(*inputs), after.run(*inputs), strict=True)
    return max(float((a.double() - b.double()).abs().max() / a.double().abs().max()) for a, b in pairs)


def operators(graph: Graph) -> Counter[str]:
    return Counter(kind(n) for n in graph.nodes if n.op == "call_function")


def captured(model: nn.Module, *example: Tensor) -> Graph:
    return capture(with_power(model, *example), example)


class Function(nn.Module):
    """A model of one expression, with parameters `a` and `b` of a shape."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Parameter(torch.rand(shape)), nn.Parameter(torch.rand(shape))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def function(body: Callable[..., Any], *example: Tensor, shape: tuple[int, ...] = (4,)) -> Graph:
    return capture(Function(body, *shape).eval(), example)


# ------------------------------------------------------------------------- batch norm


CARRIERS = [
    (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), (4, 8, 8)),
    (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6, affine=False), (4, 8, 8)),
    (nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8), (4, 9, 9)),
    (nn.Conv2d(4, 8, 3, groups=4, dilation=2), nn.BatchNorm2d(8), (4, 9, 9)),
    (nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), (2, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (4, 6)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), nn.BatchNorm2d(6), (4, 5, 5)),
    (
        nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1, output_padding=1, stride=2),
        nn.BatchNorm2d(6),
        (4, 5, 5),
    ),
    (nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (4, 5, 5)),
    (nn.ConvTranspose3d(4, 4, 2, groups=2), nn.BatchNorm3d(4), (4, 3, 3, 3)),
    (nn.Linear(4, 6), nn.BatchNorm1d(6), (4,)),
    (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (4,)),
]


def name(carrier: nn.Module) -> str:
    return f"{type(carrier).__name__}-{getattr(carrier, 'groups', 1)}"


@pytest.mark.parametrize("carrier, norm, shape", CARRIERS, ids=[name(c[0]) for c in CARRIERS])
def test_batch_norm_folds_into_what_it_reads(
    carrier: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> None:
    before = captured(nn.Sequential(carrier, norm, nn.ReLU()), torch.randn(3, *shape))
    after, outcome = fold(before)
    assert operators(after) == operators(before) - Counter(batch_norm=1)
    assert [r.site for r in outcome.rewrites] == ["1"] and outcome.declines == []
    assert after.tensors.keys() == {"0.weight", "0.bias"} <= after.parameters
    x = torch.randn(5, *shape)
    assert error(before, after, x) < TOLERANCE
    wrong = after.copy()
    node = next(n for n in wrong.nodes if n.target == "0.weight")
    wrong.set_tensor(node, before.tensors["0.weight"])
    assert error(before, wrong, x) > 100 * TOLERANCE


def test_graph_before_and_after() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    before = captured(model, torch.randn(2, 3, 8, 8))
    after, outcome = fold(before)
    assert before.text().splitlines()[5:] == [
        "%input_1: f32[batch, 3, 8, 8] = input",
        "%conv2d: f32[batch, 4, 8, 8] = aten.conv2d.default(%input_1, %_0_weight, None, [1, 1], [1, 1])",
        "%batch_norm: f32[batch, 4, 8, 8] = aten.batch_norm.default(%conv2d, %_1_weight, %_1_bias, %_1_running_mean, "
        "%_1_running_var, False, 0.1, 1e-05, False)",
        "return %batch_norm",
    ]
    assert after.text().splitlines() == [
        "%_0_bias: f32[4] = 0.bias",
        "%_0_weight: f32[4, 3, 3, 3] = 0.weight",
        "%input_1: f32[batch, 3, 8, 8] = input",
        "%conv2d_default: f32[batch, 4, 8, 8] = aten.conv2d.default(%input_1, %_0_weight, %_0_bias, [1, 1], [1, 1])",
        "return %conv2d_default",
    ]
    assert outcome.rewrites[0].what == "batch_norm into conv2d in front of it (0)"
    # the name of the convolution is gone: no value of the new graph has an old name and another meaning
    assert after.journal.equal == {"batch_norm": "conv2d_default"}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_formula_behind(groups: int) -> None:
    weight, bias = torch.randn(8, 4 // groups, 3, 3, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    scale, shift = torch.randn(2, 8, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    expected = F.conv2d(x, weight, bias, groups=groups) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    folded = fold_behind(weight, bias, scale, shift, None)
    torch.testing.assert_close(F.conv2d(x, *folded, groups=groups), expected, rtol=0, atol=1e-12)
    assert (F.conv2d(x, weight, folded[1], groups=groups) - expected).abs().max() > 0.1


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_formula_in_front(groups: int) -> None:
    weight, bias = torch.randn(8, 4 // groups, 3, 3, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    scale, shift = torch.randn(2, 4, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    expected = F.conv2d(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), weight, bias, groups=groups)
    folded = fold_in_front(weight, bias, scale, shift, groups)
    torch.testing.assert_close(F.conv2d(x, *folded, groups=groups), expected, rtol=0, atol=1e-12)
    assert (F.conv2d(x, folded[0], bias, groups=groups) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    "norm, carrier, shape",
    [
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), (4, 8, 8)),
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, padding="valid", bias=False), (4, 8, 8)),
        (nn.BatchNorm1d(4), nn.Linear(4, 6), (4,)),
    ],
)
def test_batch_norm_folds_into_what_reads_it(
    norm: nn.Module, carrier: nn.Module, shape: tuple[int, ...]
) -> None:
    before = captured(nn.Sequential(nn.ReLU(), norm, carrier), torch.randn(3, *shape))
    after, _ = fold(before)
    assert "batch_norm" not in operators(after)
    assert error(before, after, torch.randn(5, *shape)) < TOLERANCE


def test_two_batch_norms_in_a_row() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6))
    after, outcome = fold(captured(model, torch.randn(3, 4, 8, 8)))
    assert operators(after) == {"conv": 1} and len(outcome.rewrites) == 2


def test_shared_weights_get_copies_and_it_is_said() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[1](self.conv(torch.relu(self.norms[0](self.conv(x)))))

    before = captured(Shared(), torch.randn(2, 4, 6, 6))
    after, outcome = fold(before)
    assert operators(after) == {"conv": 2, "activation": 1}
    assert outcome.rewrites[0].what.endswith(
        "conv.weight is shared with conv, this site now has its own copy"
    )
    assert after.tensors.keys() == {"conv.weight", "conv.bias", "conv.weight_1", "conv.bias_1"}
    assert error(before, after, torch.randn(5, 4, 6, 6)) < TOLERANCE


def test_a_module_called_twice_goes_on_sharing() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(torch.relu(self.body(x)))

    after, outcome = fold(captured(Twice(), torch.randn(2, 4, 6, 6)))
    assert len(outcome.rewrites) == 2 and len(after.tensors) == 2


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.norm(m.norm(m.norm(m.conv(x)))),
        lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(3 * x)),
        lambda m, x: (m.norm(m.norm(m.conv(x))), m.norm(m.conv(2 * x))),
        lambda m, x: m.conv(x) * 0.5 * 0.5,
        lambda m, x: m.conv(x) + 1 + 1,
    ],
)
def test_equal_maps_on_one_layer_all_count(body: Callable[[Any, Tensor], Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Any:
            return body(self, x)

    before = captured(Model(), torch.randn(3, 4, 8, 8))
    after, outcome = fold(before)
    assert outcome.rewrites and set(operators(after)) <= {"conv", "mul", "add"}
    assert error(before, after, torch.randn(5, 4, 8, 8)) < TOLERANCE


def test_a_slope_that_only_training_draws_is_one_slope() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.RReLU(), nn.Conv2d(6, 2, 3))
    after, _ = fold(captured(model, torch.randn(3, 4, 8, 8)))
    assert [str(n.target) for n in after.nodes if kind(n) == "activation"] == ["aten.leaky_relu.default"]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, p: torch.sin(p + 3.0),
        lambda m, p: torch.sin(p * m.row),
        lambda m, p: torch.sin(p * 0.5) + torch.cos(p),
        lambda m, p: (torch.sin(p * 0.5), p),
    ],
)
def test_only_a_number_that_a_product_is_read_with_goes_into_what_it_multiplies(body: Any) -> None:
    def attends(m: Net, x: Tensor) -> Any:
        return body(m, m.q(x) @ m.k(x).mT)

    net = Net(attends, q=nn.Linear(8, 8), k=nn.Linear(8, 8), row=torch.randn(5))
    before = captured(net, torch.randn(2, 5, 8))
    after, outcome = fold(before)
    assert operators(after)["matmul"] == 1 and not [r for r in outcome.rewrites if "matmul" in r.what]


def test_a_scale_in_front_of_a_layer_that_is_applied_twice_stays() -> None:
    net = Net(lambda m, x: m.a(m.norm(x)) + m.a(torch.sin(x)), a=nn.Linear(6, 4), norm=nn.BatchNorm1d(6))
    assert declined(captured(net, torch.randn(3, 6))) == "the weight of a is shared with a"


def test_channels_that_a_scale_takes_out_leave_what_is_added_finite() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return m.conv((torch.sin(x) * m.scale + m.shift) * 2.0 + m.shift)

    scale = torch.tensor([2.0, 0.0, 0.5])[:, None, None]
    net = Net(body, conv=nn.Conv2d(3, 4, 3, padding=1), scale=scale, shift=torch.randn(3, 1, 1))
    after, outcome = fold(captured(net, torch.randn(2, 3, 6, 6)))
    assert outcome.rewrites and operators(after)["add"] == 1
    assert all(bool(t.isfinite().all()) for t in after.tensors.values())


def test_a_bias_that_folding_makes_is_called_after_its_weight() -> None:
    net = Net(
        lambda m, x: m.norm(F.conv2d(x, m.kernel)), norm=nn.BatchNorm2d(4), kernel=torch.randn(4, 3, 3, 3)
    )
    after, _ = fold(captured(net, torch.randn(2, 3, 6, 6)))
    assert set(after.tensors) == {"kernel", "kernel_bias"}


def test_what_no_output_needs_is_counted() -> None:
    graph = captured(Net(lambda m, x: x.exp()), torch.randn(2, 3))
    value = graph.placeholders[0]
    for target in (aten.sin.default, aten.cos.default):
        value = graph.insert(target, (value,), before=graph.output)
    _, outcome = fold(graph)
    assert [r.what for r in outcome.rewrites] == ["2 operators that no output needs"]


def test_numbers_that_multiply_one_after_the_other_are_one_number() -> None:
    class Numbers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(torch.sin(x) * 2.0 * 3.0)

    after, _ = fold(captured(Numbers(), torch.randn(3, 4)))
    assert [n.args[1] for n in after.nodes if kind(n) == "mul"] == [6.0] and not after.tensors


def test_attention_scaled_by_nothing_stays_so() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), scale=0.0)

    fold(captured(Attention(), torch.randn(2, 5, 8)))


def test_half_precision_is_folded_in_float64() -> None:
    model = with_power(
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), torch.randn(3, 4, 8, 8)
    ).bfloat16()
    before = capture(model, (torch.randn(3, 4, 8, 8).bfloat16(),))
    after = before.copy()
    Fold().run(after, context(after))
    assert {t.dtype for t in after.tensors.values()} == {torch.bfloat16}
    wide = {n: t.double() for n, t in before.tensors.items()}
    scale = wide["1.weight"] / (wide["1.running_var"] + 1e-5).sqrt()
    exact = wide["0.weight"] * scale.view(-1, 1, 1, 1)
    assert torch.equal(after.tensors["0.weight"], exact.bfloat16())


def test_resnet_is_convolutions_afterwards() -> None:
    before = captured(torchvision_model("resnet18").double(), torch.randn(4, 3, 64, 64, dtype=torch.float64))
    after, outcome = fold(before)
    assert outcome.declines == []
    assert [r.what for r in outcome.rewrites[:2]] == [
        "adaptive_avg_pool2d over all of space as a mean",
        "mean and flatten into one mean",
    ]
    assert all(r.what.startswith("batch_norm into conv2d") for r in outcome.rewrites[2:])
    gone = Counter(batch_norm=20, flatten=1, adaptive_pool=1)
    assert operators(after) == operators(before) - gone + Counter(reduce=1)


# ------------------------------------------------------------------------- batch norm that stays


def batch_norm(read: str = "", **options: Any) -> Graph:
    """Convolution and batch norm; read: `second`, `output` or `linear` changes who reads what."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, **options)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            if read == "second":
                return self.norm(y) + torch.sigmoid(y)
            return (self.norm(y), y) if read == "output" else self.norm(y)

    return captured(Net(), torch.randn(3, 4, 6, 6))


def declined(graph: Graph) -> str:
    """The one reason of a fold that must change nothing."""
    after, outcome = graph.copy(), None
    outcome = Fold().run(after, context(after))
    assert after.text() == graph.text(), outcome.rewrites
    (found,) = outcome.declines
    return found.reason


def test_convolution_read_twice() -> None:
    assert declined(batch_norm("second")) == "the output of conv is read twice"


def test_two_batch_norms_that_read_one_convolution() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norms = nn.Conv2d(4, 4, 3), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norms[0](y).relu() * self.norms[1](y).sigmoid()

    graph = captured(Net(), torch.randn(3, 4, 6, 6))
    outcome = Fold().run(graph.copy(), context(graph))
    assert [d.reason for d in outcome.declines] == ["the output of conv is read twice"] * 2


def test_a_batch_norm_that_is_an_output() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))
    after, _ = fold(captured(model, torch.randn(3, 4, 5, 5)))
    assert operators(after) == {"conv_transpose": 1}


def test_convolution_that_is_an_output() -> None:
    assert declined(batch_norm("output")) == "the output of conv is an output of the graph"


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_impossible_variance_names_the_channel(value: float) -> None:
    graph = batch_norm()
    node = next(n for n in graph.nodes if n.target == "norm.running_var")
    var = graph.tensor(node).clone()
    var[2] = value
    graph.set_tensor(node, var)
    assert declined(graph) == f"the running variance of channel 2 is {value:g} (eps 1e-05)"


def test_variance_of_zero_is_safe_with_an_epsilon_and_not_without() -> None:
    def with_dead_channel(eps: float) -> Graph:
        graph = batch_norm(eps=eps)
        node = next(n for n in graph.nodes if n.target == "norm.running_var")
        var = graph.tensor(node).clone()
        var[1] = 0
        graph.set_tensor(node, var)
        return graph

    assert operators(fold(with_dead_channel(1e-3))[0]) == {"conv": 1}
    assert declined(with_dead_channel(1e-12)) == "the running variance of channel 1 is 0 (eps 1e-12)"


def test_training_mode() -> None:
    graph = batch_norm()
    node = next(n for n in graph.nodes if kind(n) == "batch_norm")
    graph.set_args(node, (*node.args[:5], True, *node.args[6:]))
    assert declined(graph) == "it is in training mode: its statistics are those of the batch"


def test_no_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    graph = capture(model, (torch.randn(3, 4, 6, 6),))
    assert declined(graph) in (
        "it has no running statistics",
        "it is in training mode: its statistics are those of the batch",
    )


def test_padding_behind_a_batch_norm() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))
    reason = declined(captured(model, torch.randn(3, 4, 6, 6)))
    assert reason == "2 pads what it reads with zeros, which nothing shifts"


def test_batch_norm_over_the_tokens_of_a_linear() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5))
    reason = declined(captured(model, torch.randn(3, 5, 8)))
    assert reason == "it differs along more than the feature axis of the linear"


def test_batch_norm_alone_stays() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    reason = declined(captured(model, torch.randn(3, 4, 6, 6)))
    assert reason == "it reads relu, and what reads it is not a convolution or linear"


def test_computed_weights_stay() -> None:
    def body(m: Function, x: Tensor, w: Tensor) -> Tensor:
        mean, var = torch.zeros(4), torch.ones(4)
        return F.batch_norm(F.conv2d(x, w), mean, var, m.a, m.b)

    after, outcome = fold(function(body, torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)))
    assert operators(after) == {"conv": 1, "batch_norm": 1}
    assert [d.reason for d in outcome.declines] == ["the weight of conv2d is computed"]


# ------------------------------------------------------------------------- identities


IDENTITIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dropout": lambda m, x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda m, x: F.dropout(x, 0.0, training=True),
    "x + 0": lambda m, x: x + 0,
    "0 + x": lambda m, x: torch.zeros(4) + x,
    "x - 0": lambda m, x: x - 0.0,
    "x * 1": lambda m, x: x * 1.0,
    "ones * x": lambda m, x: torch.ones(4) * x,
    "x / 1": lambda m, x: x / 1,
    "reshape to the same": lambda m, x: x.reshape(x.shape),
    "reshape and back": lambda m, x: x.reshape(-1, 12).reshape(x.shape),
    "unsqueeze and squeeze": lambda m, x: x.unsqueeze(1).squeeze(1),
    "permute identity": lambda m, x: x.permute(0, 1, 2),
    "transpose twice": lambda m, x: x.transpose(1, 2).transpose(-1, -2),
    "permutes that cancel": lambda m, x: x.permute(1, 2, 0).permute(2, 0, 1),
    "cast to the same": lambda m, x: x.to(torch.float32),
    "clone": lambda m, x: x.clone(),
    "detach": lambda m, x: x.detach(),
    "full slice": lambda m, x: x[:, :3],
    "expand to the same": lambda m, x: x.expand(-1, 3, 4),
    "cat of one": lambda m, x: torch.cat([x]),
    "casts up and down": lambda m, x: x.double().to(torch.float32),
    "max pool of one": lambda m, x: F.max_pool1d(x, 1),
    "average pool of one": lambda m, x: F.avg_pool1d(x, 1),
    "adaptive pool to the same": lambda m, x: F.adaptive_avg_pool1d(x, 4),
    "pad of nothing": lambda m, x: F.pad(x, (0, 0)),
}


@pytest.mark.parametrize("body", IDENTITIES.values(), ids=IDENTITIES)
def test_identities_go(body: Callable[[Any, Tensor], Tensor]) -> None:
    before = function(lambda m, x: torch.tanh(body(m, torch.exp(x))), torch.randn(2, 3, 4))
    after, outcome = fold(before)
    assert [n.target for n in after.nodes if n.op == "call_function"] == [aten.exp.default, aten.tanh.default]
    assert len(outcome.rewrites) >= 1 and outcome.declines == []
    assert torch.equal(before.run(*before.example)[0], after.run(*before.example)[0])


NOT_IDENTITIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a cast that rounds": lambda m, x: x.to(torch.bfloat16).to(torch.float32),
    "a cast to integers": lambda m, x: x.to(torch.int64).to(torch.float32),
    "a pool that strides": lambda m, x: F.max_pool1d(x, 1, 2),
    "a pool of two": lambda m, x: F.avg_pool1d(x, 2, 1),
    "x + 0 that broadcasts": lambda m, x: x.narrow(1, 0, 1) + torch.zeros(3, 4),
    "x + 0 that promotes": lambda m, x: x.half() + torch.zeros(4),
    "x * 1 that promotes": lambda m, x: (x > 1) * 1.0,
    "0 - x": lambda m, x: 0 - x,
    "nearly zero": lambda m, x: x + torch.tensor([0, 0, 0, 1e-3]),
    "transpose once": lambda m, x: x.transpose(1, 2),
    "reshape that regroups": lambda m, x: x.reshape(-1, 4, 3),
    "pad and crop": lambda m, x: F.pad(x, (1, -1)),
    "roll": lambda m, x: x.roll(1, -1),
    "a slice": lambda m, x: x.narrow(1, 1, 2),
}


@pytest.mark.parametrize("body", NOT_IDENTITIES.values(), ids=NOT_IDENTITIES)
def test_what_only_looks_like_an_identity_stays(body: Callable[[Any, Tensor], Tensor]) -> None:
    before = function(lambda m, x: torch.tanh(body(m, torch.exp(x))), torch.randn(2, 3, 4))
    after, _ = fold(before)
    kinds = {"identity", "size", "create"}
    kept = [n.target for n in before.nodes if n.op == "call_function" and kind(n) not in kinds]
    assert [n.target for n in after.nodes if n.op == "call_function"] == kept
    assert torch.equal(before.run(*before.example)[0], after.run(*before.example)[0])


SHORTER: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[Any]]] = {
    "permutes": (lambda m, x: x.permute(1, 2, 0).transpose(0, 1), [aten.permute.default]),
    "reshapes": (lambda m, x: x.reshape(-1, 12).unflatten(1, (2, 6)), [aten.reshape.default]),
    "reshapes of the batch": (lambda m, x: x.flatten(0, 1).reshape(-1, 12), [aten.reshape.default]),
    "a computed batch": (lambda m, x: x.reshape(x.shape[0], 12), [aten.reshape.default]),
    "pool to one": (lambda m, x: F.adaptive_avg_pool1d(x, 1).flatten(1), [aten.mean.dim]),
    "pool over all": (lambda m, x: F.avg_pool1d(x, 4).squeeze(2), [aten.mean.dim]),
    "mean and reshape": (lambda m, x: x.mean((1, 2), keepdim=True).reshape(-1), [aten.mean.dim]),
    "cats of cats": (
        lambda m, x: torch.cat([x, torch.cat([x + 1, x * 2], 1), torch.cat([x, x], -1)[..., :4]], -2),
        [aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.slice.Tensor, aten.cat.default],
    ),
    "twice the same": (lambda m, x: torch.sin(x) * torch.sin(x), [aten.sin.default, aten.mul.Tensor]),
    "three maps": (lambda m, x: (x * 2 + 1) / 4, [aten.mul.Tensor, aten.add.Tensor]),
    "maps that cancel": (
        lambda m, x: (x + 1) * 2 - 2 - x * 0.5,
        [aten.mul.Tensor, aten.mul.Tensor, aten.sub.Tensor],
    ),
}


@pytest.mark.parametrize("body, left", SHORTER.values(), ids=SHORTER)
def test_what_several_say_one_says(body: Callable[[Any, Tensor], Tensor], left: list[Any]) -> None:
    before = function(lambda m, x: torch.tanh(body(m, torch.exp(x))), torch.randn(2, 3, 4))
    after, _ = fold(before)
    targets = [n.target for n in after.nodes if n.op == "call_function"]
    assert targets == [aten.exp.default, *left, aten.tanh.default]
    x = torch.randn(5, 3, 4)
    assert error(before, after, x) < 1e-6


def test_a_bias_of_zeros_is_none() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2))
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    after, _ = fold(capture(model.eval(), (torch.randn(2, 4, 3, 3),)))
    assert after.tensors.keys() == {"0.weight", "2.weight"}


def test_active_dropout_stays() -> None:
    graph = function(lambda m, x: F.dropout(x, 0.5, training=False) + 1, torch.randn(2, 4))
    node = next(n for n in graph.nodes if n.target is aten.dropout.default)
    graph.set_args(node, (*node.args[:2], True))
    assert declined(graph) == "is in training mode: it is random, and stays"


def test_a_view_behind_a_dropped_contiguous_becomes_a_reshape() -> None:
    def body(m: Function, x: Tensor) -> Tensor:
        return torch.relu(torch.exp(x).transpose(1, 2).contiguous()).view(-1, 12)

    before = function(body, torch.randn(2, 3, 4))
    after, _ = fold(before)
    assert operators(after) == {"activation": 2, "transpose": 1, "view": 1}
    assert aten.reshape.default in [n.target for n in after.nodes]
    assert error(before, after, torch.randn(5, 3, 4)) == 0


def test_a_contiguous_that_strides_depend_on_stays() -> None:
    def body(m: Function, x: Tensor) -> Tensor:
        return torch.view_as_complex(torch.exp(x).transpose(1, 2).contiguous()).abs()

    assert declined(function(body, torch.randn(2, 2, 4))) == "an operator behind it reads memory by strides"


def test_an_output_stays_apart_from_an_input() -> None:
    before = function(lambda m, x: (x.clone(), torch.exp(x)), torch.randn(2, 4))
    assert declined(before) == "it keeps an output apart from an input, a tensor or another output"
    twice = function(lambda m, x: (torch.exp(x).clone(), torch.exp(x)), torch.randn(2, 4))
    after, _ = fold(twice)
    assert operators(after) == {"activation": 2}


# ------------------------------------------------------------------------- constants and dead code


def test_constants_are_folded_once() -> None:
    def body(m: Function, x: Tensor) -> Tensor:
        mask = torch.ones(4, 4).tril() * (m.a @ m.b)
        return torch.relu(x @ mask) + torch.arange(4)

    before = function(body, torch.randn(2, 4), shape=(4, 4))
    after, outcome = fold(before)
    assert operators(after) == {"matmul": 1, "activation": 1, "add": 1}
    assert [r.what for r in outcome.rewrites] == [
        "4 operators on constants into one tensor",
        "1 operator on constants into one tensor",
    ]
    assert torch.equal(before.run(*before.example)[0], after.run(*before.example)[0])


def test_random_numbers_are_no_constants() -> None:
    before = function(lambda m, x: x + torch.exp(torch.zeros(4)), torch.randn(2, 4))
    zeros = next(n for n in before.nodes if kind(n) == "create")
    before.replace_uses(zeros, before.insert(aten.rand.default, ([4],), before=zeros))
    before.clean()
    after, outcome = before.copy(), None
    outcome = Fold().run(after, context(after))
    assert after.text() == before.text() and outcome.rewrites == []


def test_dequantize_is_a_barrier() -> None:
    import torch.ao.quantization.fx._decomposed

    before = function(lambda m, x: F.linear(x, torch.exp(m.a)), torch.randn(2, 4), shape=(4, 4))
    exp = next(n for n in before.nodes if n.target is aten.exp.default)
    packed = before.add_tensor("packed", torch.randint(-9, 9, (4, 4), dtype=torch.int8))
    arguments = (packed, 0.1, 0, -128, 127, torch.int8)
    opened = before.insert(
        torch.ops.quantized_decomposed.dequantize_per_tensor.default, arguments, before=exp
    )
    before.set_args(exp, (opened,))
    before.clean()
    after, _ = fold(before)
    assert after.text() == before.text()


def test_large_constants_are_left() -> None:
    before = function(lambda m, x: x * (m.a.unsqueeze(1) * m.b), torch.randn(2, 64, 64), shape=(64,))
    assert operators(fold(before)[0]) == {"mul": 1}
    after, outcome = fold(before, max_bytes=1000)
    assert operators(after) == operators(before) - Counter(unsqueeze=1)
    assert outcome.declines[0].reason == "as a constant it would add 15,872 bytes, more than max_bytes=1,000"


def test_a_constant_output_keeps_its_last_operator() -> None:
    before = function(lambda m, x: (x + 1, (m.a * m.b) + m.b), torch.randn(2, 4))
    after, _ = fold(before)
    assert operators(after) == {"add": 2}
    assert all(r.op == "call_function" for r in after.results)


def test_dead_code_goes() -> None:
    before = function(lambda m, x: torch.tanh(x), torch.randn(2, 4))
    before.insert(aten.exp.default, (before.placeholders[0],), before=before.output)
    after, outcome = fold(before)
    assert operators(after) == {"activation": 1}
    assert [(r.site, r.what) for r in outcome.rewrites] == [("graph", "1 operator that no output needs")]


# ------------------------------------------------------------------------- the pass


def test_limit_applies_the_first_rewrites_only() -> None:
    layers = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()]
    before = captured(nn.Sequential(*layers, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 4, 9, 9))
    _, full = fold(before)
    for limit in range(4):
        after, first = fold(before, limit=limit)
        assert first.rewrites == full.rewrites[:limit]
        assert sum(operators(before).values()) - sum(operators(after).values()) == limit
    assert [r.site for r in full.rewrites] == ["2", "1", "5"]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (lambda net, x: (x * 2 + 1) * 3, "mul, add, mul into mul and add"),
        (lambda net, x: x * 2 * 0.5, "mul, mul into nothing"),
        (lambda net, x: x * 2 * 3, "mul, mul into mul"),
        (lambda net, x: x + 2 - 3, "add, sub into add"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rewrite_says_what_became_of_what(body: Callable[[Any, Tensor], Tensor], what: str) -> None:
    before = function(body, torch.randn(2, 4))
    _, outcome = fold(before)
    last = [node.name for node in before.nodes if node.op == "call_function"][-1]
    assert [(one.site, one.what) for one in outcome.rewrites] == [(last, what)]


def test_the_plan_leaves_a_bias_for_each_norm() -> None:
    """4 x 27 weights and 4 biases; of the norm's 4 x 4 numbers 4 are left."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=True), nn.ReLU(), nn.Linear(6, 2))
    graph = captured(model, torch.randn(2, 3, 8, 8))
    size = Size(parameters(graph), 1000, bytes_of(graph))
    left, _ = Fold().plan(size, graph, False)
    assert size.params == 112 + 16 + 14
    assert (left.params, left.macs, left.bytes) == pytest.approx((112 + 4 + 14, 1000, 4 * (112 + 4 + 14)))


def test_the_plan_of_a_model_without_numbers() -> None:
    graph = captured(nn.Sequential(nn.ReLU()), torch.randn(2, 3))
    assert Fold().plan(Size(0, 0, 0), graph, False)[0] == Size(0, 0, 0)


@pytest.mark.parametrize("body", [lambda x: x.softmax(1), lambda x: x.view(-1, 2, 2), lambda x: x.amax(1)])
def test_what_is_said_twice_is_said_once(body: Callable[[Tensor], Tensor]) -> None:
    before = captured(Net(lambda m, x: body(x).sin() + body(x).cos()), torch.randn(3, 4))
    after, _ = fold(before)
    assert len([n for n in before.nodes if n.op == "call_function"]) == 5
    assert len([n for n in after.nodes if n.op == "call_function"]) == 4


def test_values_do_not_take_the_scale_of_scores() -> None:
    before = captured(
        Net(lambda m, x: F.scaled_dot_product_attention(x.sin(), x.cos(), m.v(x)), v=nn.Linear(8, 8)),
        torch.randn(2, 5, 8),
    )
    assert fold(before)[1].rewrites == []


def test_the_limit_counts_over_rounds() -> None:
    """Two equal layers become one in the first round; what scales it can go into it in the second alone."""

    def body(net: Any, x: Tensor) -> Tensor:
        one, other = F.linear(x, net.a, net.b[0]), F.linear(x, net.a, net.b[0])
        return torch.cat([one, other], 1).relu() * 2

    before = function(body, torch.randn(3, 4), shape=(4, 4))
    full = fold(before)[1].rewrites
    for limit in range(len(full) + 1):
        assert fold(before, limit=limit)[1].rewrites == full[:limit]


def test_the_users_weights_are_not_written_into() -> None:
    model = with_power(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 4, 9, 9))
    saved = {key: t.clone() for key, t in model.state_dict().items()}
    fold(capture(model, (torch.randn(2, 4, 9, 9),)))
    assert all(torch.equal(t, saved[key]) for key, t in model.state_dict().items())


def test_order() -> None:
    assert {"merge", "prune", "squeeze"} <= set(Fold.after)


def padded(pads: tuple[int, ...], value: float = 0.0, **options: Any) -> Graph:
    net = nets.Net(lambda net, x: net.a(F.pad(x, pads, value=value)), a=nn.Conv2d(3, 6, 3, **options))
    return capture(net.eval(), torch.randn(2, 3, 9, 8))


@pytest.mark.parametrize(
    ("pads", "options", "folds"),
    [
        ((1, 1, 2, 2), {}, True),
        ((1, 1), {"padding": 1, "stride": 2}, True),
        ((1, 1, 2, 2), {"groups": 3, "dilation": 2}, True),
        ((0, 1, 0, 1), {}, False),
        ((1, 1, 1, 1, 0, 0), {}, True),
        ((-1, -1, 1, 1), {}, False),
        ((1, 1, 1, 1), {"padding": "same"}, False),
    ],
)
def test_zeros_round_a_convolution_become_its_padding(pads, options, folds):
    after, _ = fold(padded(pads, **options))
    assert (operators(after)["pad"] == 0) == folds
    ones, _ = fold(padded(pads, 1.0, **options))
    assert operators(ones)["pad"] == 1


def test_a_norm_in_front_of_layers_of_two_kinds_names_the_first() -> None:
    def two(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = net.norm(x)
        return net.a(normed), torch.addmm(net.c, normed, net.w)

    net = Net(two, norm=nn.BatchNorm1d(4), a=nn.Linear(4, 6), c=torch.randn(5), w=torch.randn(4, 5))
    graph = capture(with_power(net, x := torch.randn(2, 4)).eval(), (x,))
    (rewrite,) = fold(graph)[1].rewrites
    assert rewrite.what == "batch_norm into linear behind it (a, addmm)"


@pytest.mark.parametrize(("shared", "folds"), [("weight", False), ("bias", True)])
def test_a_weight_that_another_site_reads_takes_no_scale(shared: str, folds: bool) -> None:
    def two(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        others = (net.w, net.c) if shared == "weight" else (net.v, net.b)
        return F.linear(x, net.w, net.b) * net.s, F.linear(x, *others).relu()

    w, v, b, c, s = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4), torch.randn(4), torch.rand(4) + 0.5
    graph = capture(Net(two, w=w, v=v, b=b, c=c, s=s).eval(), (torch.randn(3, 4),))
    after, outcome = fold(graph)
    assert len(outcome.rewrites) == folds and (after.text() != graph.text()) == folds
