"""A captured graph is the model at every size that its axes may have; the module comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, noise
from torch import Tensor, nn

from compressor import runtime
from compressor.api import compress
from compressor.capture import capture
from compressor.data import parse_input
from compressor.errors import UnsupportedError
from compressor.ops import kind


class Model(nn.Module):
    """One linear layer, and what is done with what it gives."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.body, self.calls = nn.Linear(8, 6), body, 0
        turns = torch.polar(torch.ones(3), torch.arange(3.0))
        self.turns, self.back = nn.Buffer(turns), nn.Buffer(turns.conj())
        self.wide = nn.Buffer(torch.arange(6.0, dtype=torch.float64))
        self.sparse = nn.Buffer(torch.eye(6).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.linear(x))


def squeezed(m: Model, y: Tensor) -> Tensor:
    return y.squeeze().softmax(0)


def asks(m: Model, y: Tensor) -> Tensor:
    return (y - y.mean(0)) / y.std(0) if y.shape[0] > 1 else y


def splits(m: Model, y: Tensor) -> Any:
    return (y, y * 2) if y.shape[0] > 1 else (y,)


def test_a_model_of_other_outputs_for_one_sample_has_its_batch_fixed():
    graph = capture(Model(splits).eval(), (torch.randn(3, 8),))
    assert graph.inputs[0].shape == (3, 8) and len(graph.outputs) == 2
    assert any("number of outputs" in notice for notice in graph.notices)


@pytest.mark.parametrize("body", [squeezed, asks])
@pytest.mark.parametrize("samples", [1, 3])
def test_where_one_sample_is_another_model_the_batch_is_fixed(body, samples, tmp_path):
    model, x = Model(body).eval(), torch.randn(samples, 8)
    made = compress(model, (x,), passes="fold", output=tmp_path, measure=False)
    words = f"the batch axis is fixed to {samples}, as in the example: at 1 the model does something else"
    assert any(words in notice for notice in made.report["notices"])
    session = runtime.session(made.onnx)
    (seen,) = runtime.run(session, [x.numpy()])
    torch.testing.assert_close(torch.from_numpy(seen), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_the_batch_need_not_be_an_axis_of_the_first_input(tmp_path: Path):
    class Rows(nn.Module):
        def forward(self, table: Tensor, x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                raise ValueError("no statistics of one sample")
            return (x - x.mean(0)) @ table

    example = torch.randn(8, 5), torch.randn(3, 8)
    graph = capture(Rows().eval(), example, inputs=[parse_input("table:f32[8,5]"), parse_input("x:f32[?,8]")])
    assert [spec.shape for spec in graph.inputs] == [(8, 5), (3, 8)]
    assert any("the model does not take one sample" in notice for notice in graph.notices)


def kernels_of_each(net: Net, x: Tensor) -> Tensor:
    weight = net.kernels(x.mean((2, 3))).view(-1, 2, 3, 3)
    flat = nn.functional.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, groups=x.shape[0])
    return flat.view(x.shape[0], 4, *flat.shape[2:])


def test_as_many_groups_as_samples_fix_the_batch(tmp_path: Path):
    net, x = Net(kernels_of_each, kernels=nn.Linear(2, 72)).eval(), torch.randn(3, 2, 8, 6)
    made = compress(
        net, (x,), passes="fold", inputs=["x:f32[?,2,?,6]"], output=tmp_path / "out", measure=False
    )
    words = "the batch axis is fixed to 3, as in the example: groups of aten.conv2d"
    assert any(notice.startswith(words) for notice in made.report["notices"])
    assert [isinstance(size, str) for size in made.graph.inputs[0].shape] == [False, False, True, False]
    (seen,) = runtime.run(runtime.session(made.onnx), [x.numpy()])
    torch.testing.assert_close(torch.from_numpy(seen), net(x).detach(), rtol=1e-4, atol=1e-5)


def longer(m: Model, y: Tensor) -> Tensor:
    return y * 2 if y.shape[1] > 8 else y * 3


def windowed(m: Model, y: Tensor) -> Tensor:
    scores, steps = y @ y.mT, torch.arange(y.shape[1])
    if y.shape[1] > 16:
        scores = scores.masked_fill((steps[:, None] - steps).abs() > 8, -torch.inf)
    return scores.softmax(-1) @ y


def a_share(m: Model, y: Tensor) -> Tensor:
    return y[:, : int(y.shape[1] * 0.6) + 1].mean(1)


@pytest.mark.parametrize(("body", "size"), [(longer, 8), (windowed, 17), (a_share, 11)])
def test_where_other_lengths_are_another_model_the_length_is_fixed(body, size):
    """The exporter takes the side of a branch that the example takes, and numbers that floats were in the way of."""
    model, x = Model(body).eval(), torch.randn(2, 12, 8)
    graph = capture(model, (x,), inputs=[parse_input("x:f32[?,T,8]")])
    assert graph.inputs[0].shape == ("batch", 12, 8)
    words = f"the T axis is fixed to 12, as in the example: at {size} the model does something else"
    assert any(words in notice for notice in graph.notices)


def test_sizes_in_the_millions_are_not_tried_but_told():
    def middle(m: Model, y: Tensor) -> Tensor:
        return y.quantile(0.5, 1)

    seen: list[int] = []
    model = Model(middle).eval()
    model.linear.register_forward_hook(lambda m, args, y: seen.append(args[0].shape[1]))
    graph = capture(model, (torch.randn(2, 12, 8),), inputs=[parse_input("x:f32[?,T,8]")])
    assert graph.inputs[0].shape == ("batch", "T", 8) and max(map(int, seen)) < 100
    assert any("the T axis was not exported for 16777217 and beyond" in notice for notice in graph.notices)


def test_a_program_says_for_which_sizes_it_was_exported():
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("T", min=4, max=64)},)
    program = torch.export.export(Model(a_plain).eval(), (torch.randn(2, 12, 8),), dynamic_shapes=sizes)
    (notice,) = capture(program).notices
    assert "not exported for 3 or 65 and beyond" in notice


def a_plain(m: Model, y: Tensor) -> Tensor:
    return y * 2


class Ladder(nn.Module):
    """Down and up again, as in a U-Net: sizes must be even, and a pool takes no single pixel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        up = nn.functional.interpolate(self.b(nn.functional.max_pool2d(x, 2)), scale_factor=2.0)
        return self.out(torch.cat([x, up], 1))


@pytest.mark.parametrize("passes", ["fold", "fold,int8(rounding=nearest,measure=false)"])
def test_sizes_that_a_model_does_not_take_are_no_reason_to_refuse_it(passes, tmp_path: Path):
    model = Ladder().eval()
    made = compress(
        model, (torch.randn(2, 3, 16, 16),), passes=passes, inputs=["x:f32[?,3,?,?]"], output=tmp_path / "out",
        calibration=[(torch.randn(32, 3, 16, 16),)], measure=False,
    )  # fmt: skip
    assert [isinstance(size, str) for size in made.graph.inputs[0].shape] == [True, False, True, True]
    x = torch.randn(3, 3, 24, 8)
    (seen,) = runtime.run(runtime.session(made.onnx, threads=1, exact=True), [x.numpy()])
    assert float((torch.from_numpy(seen) - model(x)).detach().abs().max()) < (
        1e-5 if passes == "fold" else 0.1
    )


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d((3, 2)), nn.AdaptiveMaxPool2d((3, 2))])
def test_a_pool_to_a_size_from_any_is_refused_by_name(pool, tmp_path: Path):
    x = torch.randn(2, 3, 12, 12)
    with pytest.raises(UnsupportedError, match=r"adaptive_\w+_pool2d.* at pool .*give its input fixed sizes"):
        net = Net(lambda net, x: net.pool(x.relu()), pool=pool).eval()
        compress(net, (x,), passes="fold", inputs=["x:f32[?,3,?,?]"], output=tmp_path, measure=False)


def test_means_in_double_precision_stay_so_between_integers(tmp_path: Path):
    def body(net: Net, x: Tensor) -> Tensor:
        return net.head(torch.relu(net.stem(x)).double().mean((2, 3)).float())

    torch.manual_seed(0)
    net, x = Net(body, stem=nn.Conv2d(3, 16, 3), head=nn.Linear(16, 4)).eval(), torch.randn(32, 3, 12, 12)
    made = compress(
        net, (x[:2],), passes="int8(rounding=nearest,measure=false)", calibration=[(x,)], output=tmp_path / "out",
        measure=False,
    )  # fmt: skip
    (seen,) = runtime.run(runtime.session(made.onnx, threads=1, exact=True), [x.numpy()])
    assert noise(net(x), torch.from_numpy(seen)) > 25


def test_a_batch_that_is_only_dropped_stays_dynamic_and_is_kept():
    model = Model(lambda m, y: y[:, :, None, None].squeeze().relu()).eval()
    graph = capture(model, (torch.randn(1, 8),))
    assert graph.inputs[0].shape == ("batch", 8) and any("drops that axis" in one for one in graph.notices)
    assert "squeeze.dims" in graph.text() and graph.run(torch.randn(1, 8))[0].shape == (1, 6)


def test_squeezing_an_axis_that_is_dynamic_does_nothing():
    graph = capture(Model(lambda m, y: y.squeeze(0).relu()).eval(), (torch.randn(3, 8),))
    assert not any(kind(n) == "squeeze" for n in graph.nodes) and graph.inputs[0].shape == ("batch", 8)


def test_a_program_that_is_another_one_for_one_sample_is_refused():
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Model(squeezed).eval(), (torch.randn(3, 8),), dynamic_shapes=batch)
    with pytest.raises(UnsupportedError, match="batch axis of the exported program.*export it with the size"):
        capture(program)


@pytest.mark.parametrize("calibrated", [False, True])
def test_models_that_regroup_their_batch_keep_its_size(calibrated, tmp_path):
    model, x = Model(lambda m, y: y.view(-1, 2, 6).sum(1)).eval(), torch.randn(4, 8)
    data = [torch.randn(4, 8) for _ in range(4)] if calibrated else None
    made = compress(model, (x,), passes="fold", calibration=data, output=tmp_path, measure=False)
    (seen,) = runtime.run(runtime.session(made.onnx), [x.numpy()])
    torch.testing.assert_close(torch.from_numpy(seen), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_model_that_counts_its_calls_is_refused():
    def counting(m: Model, y: Tensor) -> Tensor:
        m.calls += 1
        return y * m.calls

    with pytest.raises(UnsupportedError, match="counts its calls"):
        capture(Model(counting).eval(), (torch.randn(3, 8),))


def in_place(m: Model, y: Tensor) -> Tensor:
    y += m.wide
    return m.linear(nn.functional.pad(y, (0, 2)))


def compared(m: Model, y: Tensor) -> Tensor:
    y.gt_(0)
    return y * 2


def conjugated(m: Model, y: Tensor) -> Tensor:
    pairs = torch.view_as_complex(y.view(-1, 3, 2))
    return torch.view_as_real(pairs * m.turns).flatten(1) + 2 * torch.view_as_real(pairs * m.back).flatten(1)


@pytest.mark.parametrize("body", [in_place, compared, conjugated])
def test_types_and_conjugates_are_kept(body):
    model, x = Model(body).eval(), torch.randn(3, 8)
    graph = capture(model, (x,))
    torch.testing.assert_close(graph.run(x)[0], model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model, words",
    [
        (Model(lambda m, y: torch.sparse.mm(m.sparse, y.T).T), "to_dense"),
        (nn.Sequential(nn.Embedding(10, 8, max_norm=1.0), nn.Linear(8, 4)), "max_norm=None"),
    ],
)
def test_what_cannot_be_says_what_to_do(model, words):
    x = torch.arange(6).view(2, 3) if "max" in words else torch.randn(3, 8)
    with pytest.raises(UnsupportedError, match=words):
        capture(model.eval(), (x,))


def test_a_module_has_its_own_tensors_afterwards():
    def rebinding(m: Model, y: Tensor) -> Tensor:
        weight = m.linear.weight
        del m.linear.weight
        m.linear.weight = nn.Parameter(weight * 1)
        return y

    model = Model(rebinding).eval()
    weight = model.linear.weight
    capture(model, (torch.randn(3, 8),))
    assert type(model.linear.weight) is nn.Parameter and torch.equal(model.linear.weight, weight)


@pytest.mark.parametrize("window, padding", [(1, 0), (2, 1), ((2, 3), 1)])
def test_a_pool_that_divides_by_another_number_stays_and_is_emitted(window, padding, tmp_path: Path):
    pool = nn.AvgPool2d(window, padding=padding, divisor_override=5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), pool).eval()
    x = torch.randn(2, 3, 6, 6)
    made = compress(model, (x,), passes="fold", output=tmp_path, measure=False)
    (seen,) = runtime.run(runtime.session(made.onnx), [x.numpy()])
    torch.testing.assert_close(torch.from_numpy(seen), model(x).detach(), rtol=1e-5, atol=1e-5)
