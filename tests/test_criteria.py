"""What every criterion says of networks small enough to be reckoned by hand, and what it asks for without data."""

from __future__ import annotations

from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from nets import Net, conv
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import with_power

from compressor import data
from compressor.capture import capture
from compressor.channels import Algebra, analyse
from compressor.criteria import CRITERIA, CriteriaData, importance
from compressor.errors import DataError, UsageError
from compressor.ir import Graph
from passes.prune import Prune

NEED_DATA = ("apoz", "taylor", "sensitivity")


def two_layers(up: list[list[float]], down: list[list[float]], between=F.relu) -> Graph:
    """x -> up -> activation -> down, without biases; one hidden channel a row of `up`."""
    net = Net(lambda net, x: net.down(between(net.up(x))), up=_linear(up), down=_linear(down))
    return capture(net.eval(), torch.randn(2, len(up[0])))


def _linear(rows: list[list[float]]) -> nn.Linear:
    made = nn.Linear(len(rows[0]), len(rows), bias=False)
    made.weight = nn.Parameter(torch.tensor(rows))
    return made


def hidden(graph: Graph, criterion: str, **options) -> np.ndarray:
    """Importance of the channels between the two layers."""
    algebra = analyse(graph)
    return importance(graph, algebra, criterion, CriteriaData(**options))[algebra.axes["up_weight", 0]]


def stream(graph: Graph, *rows, labels: list[int] | None = None) -> data.Data:
    """Batches of one row of these."""
    batches = [
        (torch.tensor([row]), *([torch.tensor([labels[i]])] if labels else [])) for i, row in enumerate(rows)
    ]
    return data.open_data(batches, graph.inputs, batch_size=1)


UP, DOWN = [[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]], [[1.0, 2.0, 0.0], [1.0, 0.0, 2.0]]


# -------------------------------------------------------------------- from weights


@pytest.mark.parametrize(
    "between",
    [lambda m, x: torch.einsum("nj,ij->ni", x, m.up), lambda m, x: (m.up @ x.unsqueeze(2)).squeeze(2)],
)
@pytest.mark.parametrize("criterion", ["l2", "fpgm"])
def test_weights_count_however_they_are_multiplied(between, criterion):
    net = Net(lambda m, x: m.down(between(m, x).relu()), up=torch.tensor(UP), down=_linear(DOWN))
    graph = capture(net.eval(), torch.randn(2, 2))
    algebra = analyse(graph)
    found = importance(graph, algebra, criterion, CriteriaData())[algebra.axes["up", 0]]
    np.testing.assert_allclose(found, hidden(two_layers(UP, DOWN), criterion))


def test_magnitude_is_the_geometric_mean_of_the_shares_that_write_and_read():
    graph = two_layers(UP, DOWN)
    squares, absolutes = np.array([25.0, 1, 4]) / 30, np.array([7.0, 1, 2]) / 10
    assert hidden(graph, "l2") == pytest.approx(np.sqrt(squares * np.array([2.0, 4, 4]) / 10))
    assert hidden(graph, "l1") == pytest.approx(np.sqrt(absolutes * np.array([2.0, 2, 2]) / 6))


def test_fpgm_keeps_the_filters_that_stand_apart():
    """Distances of (0,0), (3,4), (6,8): 15, 10, 15; by length the first would be the least important."""
    graph = two_layers([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]], DOWN)
    assert hidden(graph, "fpgm") == pytest.approx(np.array([15.0, 10, 15]) / 40)
    assert hidden(graph, "l2").argmin() == 0


def test_fpgm_of_many_filters_is_reckoned_in_pieces(monkeypatch):
    graph = two_layers(torch.randn(7, 3).tolist(), torch.randn(2, 7).tolist())
    whole = hidden(graph, "fpgm")
    monkeypatch.setattr("compressor.criteria.ROWS", 2)
    assert hidden(graph, "fpgm") == pytest.approx(whole, rel=1e-9)


def normed() -> Graph:
    """conv -> batch norm with gains 3, -1 -> relu -> conv."""
    norm = nn.BatchNorm2d(2)
    norm.weight = nn.Parameter(torch.tensor([3.0, -1.0]))
    norm.running_var = torch.tensor([9.0 - norm.eps, 0.25 - norm.eps])
    net = Net(
        lambda net, x: net.down(F.relu(net.norm(net.up(x)))), up=conv(1, 2, 1), norm=norm, down=conv(2, 3, 1)
    )
    net.up.weight = nn.Parameter(torch.tensor([2.0, 4.0]).reshape(2, 1, 1, 1))
    net.down.weight = nn.Parameter(torch.ones(3, 2, 1, 1))
    return capture(net.eval(), torch.randn(2, 1, 4, 4))


def test_bn_is_the_share_of_the_gain_and_the_weights_see_it_too():
    """Filters 2 and 4 behind gains of 3/3 and 1/0.5 are filters of 2 and 8."""
    graph = normed()
    assert hidden(graph, "bn") == pytest.approx([0.75, 0.25])
    assert hidden(graph, "l1") == pytest.approx(np.sqrt(np.array([2.0, 8]) / 10 / 2))


def test_a_transposed_convolution_and_a_product_are_read_by_their_own_axes():
    """The weight of the one is [in, out], of the other [in, out] too: writers are their last axes."""

    def forward(net, x):
        return F.relu(F.relu(net.up(x)).flatten(2).transpose(1, 2) @ net.middle) @ net.last

    torch.manual_seed(0)
    net = Net(
        forward, up=nn.ConvTranspose2d(3, 4, 1, bias=False), middle=torch.randn(4, 6), last=torch.randn(6, 2)
    )
    graph = capture(net.eval(), torch.randn(2, 3, 4, 4))
    algebra = analyse(graph)
    found = importance(graph, algebra, "l2", CriteriaData())
    up, middle, last = (
        graph.tensors[name].double().square().numpy() for name in ("up.weight", "middle", "last")
    )
    shares = np.sqrt(up.sum((0, 2, 3)) / up.sum() * middle.sum(1) / middle.sum())
    assert found[algebra.axes["middle", 0]] == pytest.approx(shares)
    shares = np.sqrt(middle.sum(0) / middle.sum() * last.sum(1) / last.sum())
    assert found[algebra.axes["last", 0]] == pytest.approx(shares)


# -------------------------------------------------------------------- from data


def test_apoz_counts_how_often_a_channel_lives():
    """Rows (1,0), (-1,0), (1,0), (0,-1) through filters (1,0), (-1,0), (0,1), (1,1): alive 2, 1, 0 and 2 of 4 times."""
    graph = two_layers([[1.0, 0], [-1, 0], [0, 1], [1, 1]], [[1.0, 1, 1, 1]] * 2)
    rows = stream(graph, (1.0, 0.0), (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0))
    assert hidden(graph, "apoz", calibration=rows) == pytest.approx(np.array([2.0, 1, 0, 2]) / 5)


def test_apoz_without_zeros_counts_by_weights_and_without_relu_asks_for_another():
    graph = two_layers([[1.0, 0], [2, 0]], [[1.0, 1]] * 2)
    rows = stream(graph, (1.0, 0.0), (2.0, 0.0))
    assert hidden(graph, "apoz", calibration=rows) == pytest.approx(hidden(graph, "l2"))
    smooth = two_layers([[1.0, 0], [2, 0]], [[1.0, 1]] * 2, between=torch.tanh)
    with pytest.raises(UsageError, match=r"prune\(criterion=apoz\): no channel .* gives zeros"):
        hidden(smooth, "apoz", calibration=rows)


def test_taylor_is_the_slope_of_the_users_loss_squared():
    """y = down h, h = relu(up x), loss = sum of y: the slope of channel i's gate is h_i * sum of down's column i.

    x (1,1): h = 7, 1, 2, columns 2, 2, 2 -> slopes 14, 2, 4. x (1,0): h = 3, 0, 2 -> 6, 0, 4.
    """
    graph = two_layers(UP, DOWN)
    rows = stream(graph, (1.0, 1.0), (1.0, 0.0))
    found = hidden(graph, "taylor", calibration=rows, loss=lambda outputs, labels: outputs[0].sum())
    assert found == pytest.approx(np.array([14.0**2 + 6**2, 2.0**2, 4.0**2 + 4**2]) / 2)


def test_taylor_with_labels_is_what_masking_does_to_cross_entropy():
    graph = two_layers(UP, DOWN)
    rows = stream(graph, (0.3, 0.1), (-0.2, 0.4), labels=[0, 1])
    found = hidden(graph, "taylor", calibration=rows)
    step, slopes = 1e-4, []
    for batch in rows:
        each = []
        for channel in range(3):
            ends = []
            for gate in (1 - step, 1 + step):
                h = F.relu(batch.inputs[0].double() @ torch.tensor(UP).double().T)
                h[:, channel] *= gate
                ends.append(F.cross_entropy(h @ torch.tensor(DOWN).double().T, batch.labels))
            each.append(float(ends[1] - ends[0]) / (2 * step))
        slopes.append(each)
    assert found == pytest.approx((np.array(slopes) ** 2).mean(0), rel=1e-3)
    assert found != pytest.approx((np.array(slopes).mean(0)) ** 2, rel=1e-2), "squared before it is averaged"


def test_taylor_adds_up_what_all_readers_of_a_channel_do_and_skips_depthwise():
    """A residual stream is read twice; the depthwise convolution hands its channels on."""

    def forward(net, x):
        h = F.relu(net.up(x))
        return net.first(h).sum((2, 3)), net.second(net.depthwise(h)).sum((2, 3))

    net = Net(
        forward, up=conv(1, 4, 1), first=conv(4, 2, 1), second=conv(4, 2, 1),
        depthwise=nn.Conv2d(4, 4, 1, groups=4, bias=False),
    )  # fmt: skip
    graph = capture(net.eval(), torch.randn(2, 1, 3, 3))
    x = torch.randn(1, 1, 3, 3)
    found = hidden(
        graph,
        "taylor",
        calibration=data.open_data([(x,)], graph.inputs),
        loss=lambda outputs, labels: sum(output.sum() for output in outputs),
    )
    h = F.relu(net.up(x)).sum((0, 2, 3))
    through = (
        net.first.weight.sum((0, 2, 3)) + net.second.weight.sum((0, 2, 3)) * net.depthwise.weight.flatten()
    )
    assert found == pytest.approx((h * through).square().detach().double().numpy(), rel=1e-4)


def test_sensitivity_is_the_noise_that_masking_the_weakest_quarter_makes():
    """Four channels of weights 1, 2, 3, 4, of which the first is masked: its noise is shared out by their weights."""
    graph = two_layers([[1.0], [2.0], [3.0], [4.0]], [[1.0, 1, 1, 1]], between=torch.abs)
    weight = hidden(graph, "l2")
    rows = stream(graph, (1.0,), (2.0,))
    found = hidden(graph, "sensitivity", calibration=rows)
    noise = (1.0**2 + 2.0**2) / (10.0**2 + 20.0**2)
    assert weight.argsort().tolist() == [0, 1, 2, 3]
    assert found == pytest.approx(noise * weight / weight[0])


def test_sensitivity_tells_layers_apart_that_weights_cannot():
    """Two hidden layers with the same weights: what the second makes is multiplied by a thousandth."""
    torch.manual_seed(1)
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    net = Net(
        lambda net, x: net.out(torch.relu(net.up(x))) + 1e-3 * net.faint(torch.relu(net.second(x))),
        up=a, out=b, second=nn.Linear(8, 8, bias=False), faint=nn.Linear(8, 8, bias=False),
    )  # fmt: skip
    net.second.weight, net.faint.weight = nn.Parameter(a.weight.clone()), nn.Parameter(b.weight.clone())
    graph = capture(net.eval(), torch.randn(2, 8))
    rows = data.open_data([(torch.randn(16, 8),)], graph.inputs)
    algebra = analyse(graph)
    loud, quiet = algebra.axes["up_weight", 0], algebra.axes["second_weight", 0]
    found = importance(graph, algebra, "sensitivity", CriteriaData(rows))
    by_weight = importance(graph, algebra, "l2", CriteriaData())
    assert by_weight[loud] == pytest.approx(by_weight[quiet])
    assert found[quiet] == pytest.approx(1e-6 * found[loud], rel=0.1)


# -------------------------------------------------------------------- what they ask for


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_a_criterion_without_its_data_says_what_to_pass(criterion):
    with pytest.raises(
        UsageError, match=rf"prune\(criterion={criterion}\): needs calibration data.*--calib DATA"
    ):
        hidden(two_layers(UP, DOWN), criterion)


def test_taylor_asks_for_labels_or_a_loss():
    graph = two_layers(UP, DOWN)
    words = r"prune\(criterion=taylor\): needs labels.* array y .*loss=module:function"
    with pytest.raises(UsageError, match=words):
        hidden(graph, "taylor", calibration=stream(graph, (1.0, 1.0)))
    floats = data.open_data([(torch.ones(1, 2), torch.ones(1, 2))], graph.inputs)
    with pytest.raises(UsageError, match=words):
        hidden(graph, "taylor", calibration=floats)
    with pytest.raises(DataError, match="labels 5 to 5, and the model's classes are 0 to 1"):
        hidden(graph, "taylor", calibration=stream(graph, (1.0, 1.0), labels=[5]))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, labels: 1.0, "must return one number as a tensor"),
        (lambda outputs, labels: outputs[0], "must return one number as a tensor"),
        (lambda outputs, labels: torch.tensor(1.0), "does not depend on any channel"),
    ],
)
def test_a_loss_that_is_none(loss, message):
    graph = two_layers(UP, DOWN)
    with pytest.raises(UsageError, match=message):
        hidden(graph, "taylor", calibration=stream(graph, (1.0, 1.0)), loss=loss)


# -------------------------------------------------------------------- all of them


class Mixed(nn.Module):
    """Residual stream, depthwise convolution, attention of two heads, a head: something of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.up, self.middle = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.down, self.qkv, self.out = nn.Conv2d(32, 16, 1), nn.Linear(16, 48), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.down(F.relu6(self.middle(F.relu(self.up(x)))))
        q, k, v = (
            part.unflatten(2, (2, 8)).transpose(1, 2)
            for part in self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, 2)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def mixed() -> tuple[Graph, Algebra, CriteriaData]:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 6, 6)
    graph = capture(with_power(Mixed(), x), x[:2])
    batches = [(x[:8], torch.arange(8)), (x[8:], torch.arange(8))]
    return graph, analyse(graph), CriteriaData(data.open_data(batches, graph.inputs))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_says_one_finite_number_a_class_and_the_same_twice(criterion):
    graph, algebra, given = mixed()
    before = graph.fingerprint()
    first, second = (importance(graph, algebra, criterion, given) for _ in range(2))
    assert first.dtype == np.float64 and first.shape == (
        1 + max(int(c.max()) for c in algebra.axes.values()),
    )
    assert np.isfinite(first).all() and (first >= 0).all()
    assert np.array_equal(first, second)
    prunable = [group.index for group in algebra.groups if not group.reason]
    assert (first[prunable] > 0).mean() > 0.9
    assert graph.fingerprint() == before and not any(t.requires_grad for t in graph.tensors.values())


def test_the_options_of_the_pass_are_the_criteria():
    assert {"auto", "reconstruct", *CRITERIA} == set(get_args(get_type_hints(Prune)["criterion"]))
