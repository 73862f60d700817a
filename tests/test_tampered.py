"""`verify` beside files that are not the model's: each way in which an output can be wrong, once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import compressor
from compressor.api import verify
from compressor.errors import ContractError, TargetError, UsageError

Run = Callable[..., tuple[int, str, str]]


class Two(nn.Module):
    """Scores, features, and the best class."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.features = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.scores(x)
        return {"scores": scores, "features": self.features(x), "best": scores.argmax(1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two.pt2, and out/ with what was made of it for phones: model.onnx, model.ort and the report."""
    made = tmp_path_factory.mktemp("tampered")
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Two().eval(), (torch.randn(4, 8),), dynamic_shapes=shapes)
    torch.export.save(program, made / "two.pt2")
    compressor.compress(
        made / "two.pt2", passes="fold", target="mobile", dynamic=True, measure=False, output=made / "out"
    )
    return made


def checked(folder: Path, change: Callable[[onnx.ModelProto], Any], **options: Any) -> dict[str, Any]:
    model = onnx.load(folder / "out" / "model.onnx")
    change(model)
    onnx.save(model, folder / "changed.onnx")
    return verify(folder / "two.pt2", folder / "changed.onnx", **options)


def behind(
    model: onnx.ModelProto, output: str, operator: str, *operands: np.ndarray, **attributes: Any
) -> None:
    """Puts an operator between an output and what made it."""
    for node in model.graph.node:
        node.output[:] = [f"{name}.raw" if name == output else name for name in node.output]
        node.input[:] = [f"{name}.raw" if name == output else name for name in node.input]
    names = [f"{output}.operand{i}" for i in range(len(operands))]
    model.graph.initializer.extend(map(numpy_helper.from_array, operands, names))
    model.graph.node.append(helper.make_node(operator, [f"{output}.raw", *names], [output], **attributes))


def errors(result: dict[str, Any]) -> dict[str, float]:
    return {check["output"]: check["error"] for check in result["checks"]}


def test_an_untouched_file_agrees(folder):
    result = checked(folder, lambda model: None)
    assert result["ok"] and result["proved"]


def test_wrong_classes_are_wrong_though_all_floats_are_right(folder):
    result = checked(folder, lambda model: behind(model, "best", "Add", np.array(1)))
    assert not result["ok"] and errors(result)["best"] == 1.0
    assert errors(result)["scores"] < 1e-6


def test_an_output_goes_by_its_name(folder):
    def swapped(model: onnx.ModelProto) -> None:
        names = {"scores": "features", "features": "scores"}
        for node in model.graph.node:
            node.output[:] = [names.get(name, name) for name in node.output]
            node.input[:] = [names.get(name, name) for name in node.input]

    result = checked(folder, swapped)
    assert not result["ok"] and min(errors(result)[name] for name in ("scores", "features")) > 0.1

    def turned(model: onnx.ModelProto) -> None:
        outputs = list(model.graph.output)[::-1]
        del model.graph.output[:]
        model.graph.output.extend(outputs)

    assert checked(folder, turned)["ok"]

    def renamed(model: onnx.ModelProto) -> None:
        behind(model, "features", "Identity")
        model.graph.node[-1].output[0] = model.graph.output[1].name = "other"

    with pytest.raises(
        TargetError, match="returns scores, other, best; the model returns scores, features, best"
    ):
        checked(folder, renamed)


def test_other_names_for_all_of_them_are_another_tool_s(folder):
    def renamed(model: onnx.ModelProto) -> None:
        for node in list(model.graph.node):
            node.output[:] = [f"own_{n}" if n in ("scores", "features", "best") else n for n in node.output]
            node.input[:] = [f"own_{n}" if n in ("scores", "features", "best") else n for n in node.input]
        for output in model.graph.output:
            output.name = f"own_{output.name}"

    result = checked(folder, renamed)
    assert result["ok"]
    assert (
        "its outputs are called own_scores, own_features, own_best, and were compared in order"
        in result["warning"]
    )


def test_whole_numbers_do_not_come_as_floats(folder):
    def cast(model: onnx.ModelProto) -> None:
        behind(model, "best", "Cast", to=onnx.TensorProto.FLOAT)
        model.graph.output[2].type.tensor_type.elem_type = onnx.TensorProto.FLOAT

    with pytest.raises(TargetError, match="returns best as f32; the model returns it as i64"):
        checked(folder, cast)

    def widened(model: onnx.ModelProto) -> None:
        behind(model, "scores", "Cast", to=onnx.TensorProto.DOUBLE)
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE

    assert checked(folder, widened)["ok"]  # a float of another width is still that float


def test_other_sizes_are_run(folder):
    with pytest.raises(TargetError, match=r"with x of \[1, 8\]"):
        checked(folder, lambda model: behind(model, "scores", "Reshape", np.array([8, 5])))

    with pytest.raises(ContractError, match=r"scores has shape \[4, 5\], expected \[8, 5\]"):
        checked(folder, lambda model: behind(model, "scores", "Slice", *map(np.array, ([0], [4], [0]))))


def test_agreement_that_proves_nothing_is_said(folder, run: Run):
    np.savez(folder / "zeros.npz", x=np.zeros((16, 8), np.float32))

    def wrong(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 2:
                tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, 7, np.float32), tensor.name))

    result = checked(folder, wrong, data=folder / "zeros.npz")
    assert result["ok"] and not result["proved"]
    code, shown, _ = run(
        "verify", folder / "two.pt2", folder / "changed.onnx", "--data", folder / "zeros.npz"
    )
    assert code == 0 and "agree, but would whatever the file says" in shown


# -------------------------------------------------------------------- model.ort


def test_what_a_phone_loads_is_verified_too(folder, tmp_path, run: Run):
    out = Path(shutil.copytree(folder / "out", tmp_path / "out"))
    assert verify(folder / "two.pt2", out / "model.ort")["ok"]
    assert verify(None, None, against=out / "report.json")["ok"]
    content = bytearray((out / "model.ort").read_bytes())
    weight = numpy_helper.to_array(onnx.load(out / "model.onnx").graph.initializer[0]).tobytes()
    for start in range(0, len(weight), 4):  # packed or not, the first numbers lie somewhere
        if (at := content.find(weight[start : start + 4])) >= 0:
            content[at : at + 4] = np.float32(9).tobytes()
    (out / "model.ort").write_bytes(content)
    assert not verify(folder / "two.pt2", out / "model.ort")["ok"]
    found = verify(None, None, against=out / "report.json")
    assert [one["what"] for one in found["claims"] if one["state"] == "not held"] == ["sha256 of model.ort"]


def test_nobody_looks_into_a_file_of_onnx_runtime_s_own(folder, run: Run):
    path = folder / "out" / "model.ort"
    with pytest.raises(UsageError, match="--layers wants the model.onnx beside it"):
        verify(folder / "two.pt2", path, layers=True)
    code, _, said = run("bench", path, "--profile")
    assert code == 2 and "--profile wants the model.onnx" in said
    assert "bench" in run("inspect", path)[1]
