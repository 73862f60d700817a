"""The grid of threads and batches, and profiles led back to modules, with fused operators."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor import api, profiling, runtime
from compressor.errors import UsageError

Run = Callable[..., tuple[int, str, str]]


def save(path: Path, batch: int | str = "batch", wide: int = 16) -> Path:
    """Convolution, ReLU (which ONNX Runtime takes into it), a large product, and a mean of the model's own."""
    rng = np.random.default_rng(0)
    weights = {"a.conv.weight": (wide, 16, 3, 3), "b.fc.weight": (64, 256)}
    tensors = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([2, 3], np.int64), "axes"))
    nodes = [
        helper.make_node("Conv", ["x", "a.conv.weight"], ["h"], name="a.conv/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"], name="a.act/Relu"),
        helper.make_node("MatMul", ["r", "b.fc.weight"], ["p"], name="b.fc/MatMul"),
        helper.make_node("ReduceMean", ["p", "axes"], ["y"], name="ReduceMean", keepdims=0),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 16, 64, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, wide])
    graph = helper.make_graph(nodes, "one", [x], [y], tensors)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    return save(folder / "a.onnx"), save(folder / "b.onnx", wide=128)


def test_a_grid_has_a_row_for_every_cell(files: tuple[Path, Path], run: Run) -> None:
    code, out, _ = run("bench", *files, "--threads", "1,2", "--batch", "1,3", "--seconds", "0.1", "--json")
    rows = json.loads(out)
    cells = [(row["threads"], row["batch"]) for row in rows]
    assert code == 0 and cells == [(t, b) for t in (1, 2) for b in (1, 3) for _ in files]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["ratio"] == 1 and second["ratio"] < 0.8, "eight times the channels"
        assert second["spread"][0] <= second["ratio"] <= second["spread"][1]
    assert rows[2]["median_ms"] > 1.5 * rows[0]["median_ms"], "three samples take longer than one"
    out = run("bench", *files, "--batch", "1,3", "--seconds", "0.1")[1]
    assert "batch" in out and "threads" not in out


def test_a_batch_that_the_file_does_not_take_is_refused(tmp_path: Path, run: Run) -> None:
    path = save(tmp_path / "one.onnx", batch=1)
    with pytest.raises(UsageError, match="its batch is fixed to 1"):
        api.bench([path], batch=(1, 8), seconds=0.1)
    with pytest.raises(UsageError, match=r"one\.onnx: its batch is fixed to 1"):
        api.bench([save(tmp_path / "any.onnx"), path], batch=4, seconds=0.1)  # whichever of them it is
    wrong = (
        ("--threads", "1,x"), ("--threads", "99999999999"), ("--batch", "0"), ("--batch", "1,"),
        ("--profile", "--batch", "1,2"), ("--seconds", "nan"), ("--seconds", "inf"),
    )  # fmt: skip
    for words in wrong:
        assert run("bench", path, *words)[0] == 2


def test_sessions_that_begin_together_have_traces_of_their_own(files: tuple[Path, Path]) -> None:
    sessions = [runtime.session(files[0], threads=1, profile=True) for _ in range(40)]
    traces = {session.end_profiling() for session in sessions}
    for one in traces:
        Path(one).unlink(missing_ok=True)
    assert len(traces) == len(sessions)


def test_a_profile_leads_back_to_modules(files: tuple[Path, Path], run: Run) -> None:
    (found,) = api.bench([files[1]], profile=True, seconds=0.3)
    modules = {row["module"]: row["ms"] for row in found["modules"]}
    assert "a.act" not in modules, "the ReLU went into the convolution"
    assert modules["a.conv"] > modules[""]
    assert {"a.conv", "b.fc", ""} <= set(modules)
    assert found["mapped"] > 0.9 and found["runs"] >= profiling.LEAST
    total = sum(row["ms"] for row in found["nodes"])
    assert sum(modules.values()) == pytest.approx(total)
    assert sum(row["ms"] for row in found["operators"]) == pytest.approx(total)
    assert 0 < total < 2 * found["ms"]
    code, out, _ = run("bench", *files, "--profile", "--seconds", "0.2")
    assert code == 0 and "ms A" in out and "a.conv" in out and "of the operators' time has a module" in out


@pytest.mark.parametrize(
    ("name", "operator", "module"),
    [
        ("a.conv/Conv", "Conv", "a.conv"),
        ("r_nchwc", "Conv", "a.conv"),
        ("a.conv/Conv_token_8", "QLinearConv", "a.conv"),
        ("b.fc/MatMul/MatmulTransposeFusion/", "FusedMatMul", "b.fc"),
        ("ReduceMean", "ReduceMean", ""),
        ("ReorderOutput", "ReorderOutput", None),
        ("Transpose_token_6", "Transpose", None),
        ("b.fc/MatMulX", "MatMul", None),
    ],
)
def test_names_of_optimised_nodes(
    files: tuple[Path, Path], name: str, operator: str, module: str | None
) -> None:
    assert profiling._Places(files[0]).module(name, operator) == module
