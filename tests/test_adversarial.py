"""Models that a compiler meets once a year: odd names, odd shapes, odd batches. Each with a wrong answer that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor import publishing, runtime, sessions
from compressor.api import compress, verify
from compressor.capture import capture
from compressor.edges import possible
from compressor.errors import TargetError, UnsupportedError, UsageError
from compressor.ir import Input
from compressor.pytrees import distinct
from compressor.verify import BOUNDED, Comparison, judge


class Layer(nn.Module):
    """One linear layer of width 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)


def run_file(path: Path | None, *tensors: Tensor) -> list[np.ndarray]:
    assert path is not None
    return runtime.run(runtime.session(path), [t.numpy() for t in tensors])


def agree(model: nn.Module, path: Path | None, *tensors: Tensor) -> bool:
    with torch.no_grad():
        wanted = model(*tensors)
    wanted = [t.detach() for t in (wanted if isinstance(wanted, tuple) else (wanted,))]
    seen = run_file(path, *tensors)
    return all(w.shape == s.shape and np.allclose(w, s, atol=1e-5) for w, s in zip(wanted, seen, strict=True))


# -------------------------------------------------------------------- names


def test_an_input_called_output_and_an_output_called_like_an_input(tmp_path: Path) -> None:
    class Model(Layer):
        def forward(self, output: Tensor) -> Tensor:
            return self.linear(output)

    model, x = Model(), torch.randn(2, 4)
    result = compress(model, (x,), passes="fold", measure=False, output=tmp_path / "out")
    assert result.graph.outputs == ("output_1",)
    assert agree(model, result.onnx, x)
    model.linear.bias.data += 1
    assert not agree(model, result.onnx, x)


def test_names_are_made_distinct_without_taking_a_later_one() -> None:
    assert distinct(["x", "y", "x", "x_1"], ["y"]) == ["x", "y_1", "x_2", "x_1"]


# -------------------------------------------------------------------- signatures


def test_variadic_arguments_are_inputs_with_a_dynamic_batch() -> None:
    class Model(Layer):
        def forward(self, x: Tensor, *more: Tensor, **rest: Any) -> Tensor:
            return self.linear(x) + more[0] * more[1]

    graph = capture(Model(), tuple(torch.randn(2, 4) for _ in range(3)))
    assert [i.name for i in graph.inputs] == ["x", "more.0", "more.1"]
    assert all(i.shape == ("batch", 4) for i in graph.inputs)
    inputs = [torch.randn(3, 4) for _ in range(3)]
    wanted = Model()(*inputs)
    assert torch.allclose(graph.run(*inputs)[0], wanted, atol=1e-6)
    assert not torch.allclose(graph.run(inputs[1], inputs[0], inputs[2])[0], wanted, atol=1e-6)


def test_tensors_in_keywords_that_no_parameter_names_are_captured() -> None:
    class Model(Layer):
        def forward(self, x: Tensor, **rest: Tensor) -> Tensor:
            return self.linear(x) + rest["extra"]

    x, extra = torch.randn(2, 4), torch.randn(2, 4)
    graph = capture(Model(), (x,), {"extra": extra})
    assert torch.allclose(graph.run(x, extra)[0], Model()(x, extra=extra), atol=1e-6)
    assert not torch.allclose(graph.run(x, -extra)[0], Model()(x, extra=extra), atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Input("x", torch.float32, ("batch", 7)), "the example input is"),
        (Input("x", torch.float64, ("batch", 4)), "the example input is"),
        (Input("z", torch.float32, ("batch", 4)), "the model takes x, y"),
    ],
)
def test_a_description_that_contradicts_the_example_is_refused(spec: Input, words: str) -> None:
    class Model(Layer):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x) + y

    example = (torch.randn(2, 4), torch.randn(2, 4))
    with pytest.raises(UsageError, match=words):
        capture(Model(), example, inputs=[spec])


def test_descriptions_by_position_keep_their_dynamic_axes() -> None:
    model = nn.Sequential(nn.Linear(4, 4))  # calls its input `input`
    graph = capture(model, inputs=[Input("ids", torch.float32, ("batch", "sequence", 4))])
    assert graph.inputs[0].shape == ("batch", "sequence", 4)
    assert graph.run(torch.randn(3, 7, 4))[0].shape == (3, 7, 4)


@pytest.mark.parametrize(
    ("example", "error", "words"),
    [
        ((torch.empty(0, 4),), UsageError, "no sample"),
        ((torch.randn(2, 4).to_sparse(),), UnsupportedError, "dense"),
        ({"y": torch.randn(2, 4)}, UsageError, "do not fit the model's forward"),
    ],
)
def test_an_example_that_cannot_be_one_is_refused(example: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        capture(nn.Linear(4, 4), example)


def test_complex_outputs_are_refused_and_sizes_left_out() -> None:
    class Model(Layer):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return self.linear(x), x.shape[0]

    class Complex(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(self.linear(x))

    assert capture(Model(), torch.randn(2, 4)).outputs == ("output_0",)
    with pytest.raises(UnsupportedError, match="output output is complex"):
        capture(Complex(), torch.randn(2, 4))


# -------------------------------------------------------------------- the batch


def test_a_model_of_one_sample_keeps_its_batch_of_one() -> None:
    class Model(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).view(1, 2, 2)

    graph = capture(Model(), torch.randn(1, 4))
    assert graph.inputs[0].shape == (1, 4)
    assert any("fixed to 1" in notice for notice in graph.notices)


def test_a_scalar_in_front_does_not_fix_the_batch() -> None:
    class Model(Layer):
        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            return self.linear(x) * scale

    graph = capture(Model(), (torch.tensor(2.0), torch.randn(2, 4)))
    assert [i.shape for i in graph.inputs] == [(), ("batch", 4)]


def test_outputs_that_mix_the_batch_are_compared_in_whole_pieces(tmp_path: Path) -> None:
    class Model(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            y = self.linear(x) * scale
            return y.t(), y.sum(0), y.mean(), self.linear.weight

    model, scale = Model(), torch.tensor(2.0)
    result = compress(
        model,
        (torch.randn(2, 4), scale),
        passes="fold",
        target="mobile",
        measure=False,
        output=tmp_path / "o",
    )
    assert result.onnx is not None
    assert agree(model, result.onnx, torch.randn(1, 4), scale)
    assert result.report["emitted"]["checks"][0]["power"] > 0.01
    example = (torch.randn(2, 4), scale)
    assert verify(model, result.onnx, example_inputs=example, tolerance=1e-4)["ok"]
    model.linear.bias.data += 1
    assert not verify(model, result.onnx, example_inputs=example, tolerance=1e-4)["ok"]
    with pytest.raises(TargetError, match="returns"):
        verify(_First(model), result.onnx, example_inputs=example)


class _First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.model(x, scale)[0]


def test_a_sequence_is_cut_where_the_file_fixes_it() -> None:
    specs = [Input("x", torch.float32, ("batch", "sequence")), Input("t", torch.float32, ())]
    fixed = [Input("x", torch.float32, (1, 3)), Input("t", torch.float32, ())]
    x, t = torch.arange(10.0).view(2, 5), torch.tensor(1.0)
    parts = [one for one, _ in sessions.pieces(specs, fixed, (x, t))]
    assert [p.tolist() for p in parts] == [[[0, 1, 2]], [[5, 6, 7]]]
    assert not list(sessions.pieces(specs, fixed, (x[:, :2], t)))


def test_sizes_that_a_program_excludes_are_not_tried() -> None:
    class Model(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.view(-1, 2, 4)).sum(1)

    half = torch.export.Dim("half", min=1, max=8)
    even = torch.export.export(Model(), (torch.randn(4, 4),), dynamic_shapes=({0: 2 * half},))
    graph = capture(even)
    assert [s for s in range(1, 20) if possible(graph, "batch", s)] == [4, 6, 8, 10, 12, 14, 16]
    free = capture(Layer().linear, torch.randn(2, 4))
    assert possible(free, "batch", 1) and possible(free, "batch", 7)


# -------------------------------------------------------------------- what a check proves


def _check(reference: Tensor, seen: Tensor) -> Any:
    comparison = Comparison(["y"], [[]])
    comparison.update((reference,), (seen,))
    return comparison.checks()


def test_minus_infinity_is_not_infinity() -> None:
    scores = torch.tensor([[0.0, float("inf")], [1.0, 2.0]])
    assert _check(scores, scores)[0].finite
    assert not _check(scores, -scores)[0].finite
    assert not _check(scores, scores * torch.tensor([[1.0, float("nan")], [1.0, 1.0]]))[0].finite


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (lambda: torch.ones(8, 3), "not proved"),
        (lambda: torch.full((8, 3), float("nan")), "not proved"),
        (lambda: torch.randn(1, 3), "not proved"),
        (lambda: torch.randn(8, 3), "proved"),
    ],
)
def test_a_bounded_loss_on_outputs_that_never_change_proves_nothing(
    value: Callable[[], Tensor], status: str
) -> None:
    one = value()
    assert judge(BOUNDED, _check(one, one), "pass int8") == status


def test_a_batch_of_one_is_told_from_the_batch_before() -> None:
    comparison = Comparison(["y"], [[]])
    for _ in range(2):
        one = torch.randn(1, 3)
        comparison.update((one,), (one,))
    assert comparison.checks()[0].power > 0.1


# -------------------------------------------------------------------- what is left behind


def test_the_callers_module_and_tensors_are_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    model[0].eval()
    x = torch.randn(2, 4)
    capture(model, x)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert not hasattr(x, "_dynamo_dynamic_indices")


def test_companions_of_an_earlier_run_go_and_other_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("model.ort", "model.onnx.data", "model.onnx", "notes.txt"):
        (folder / name).write_text("old")
    with publishing.staging(folder) as stage:
        (stage / "model.onnx").write_text("new")
        (stage / "model.ort").write_text("new")
    assert {f.name: f.read_text() for f in folder.iterdir()} == {
        "model.onnx": "new",
        "model.ort": "new",
        "notes.txt": "old",
    }
