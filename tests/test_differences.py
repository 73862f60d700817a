"""What differs between two files, each kind of difference made once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sample_report import sample_report

from compressor import report
from compressor.differences import between
from compressor.errors import FileError, UsageError

Run = Callable[..., tuple[int, str, str]]


def save(path: Path, change: Callable[[onnx.ModelProto], Any] = lambda model: None) -> Path:
    """y = relu(x w + b), with metadata."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy"]
    weights = [
        numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), "w"),
        numpy_helper.from_array(np.ones(4, np.float32), "b"),
    ]
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    graph = helper.make_graph(nodes, "one", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    helper.set_model_props(model, {"spec": "fold"})
    change(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return save(tmp_path / "a.onnx")


def other(path: Path, change: Callable[[onnx.ModelProto], Any]) -> dict[str, Any]:
    return between(path, save(path.with_name("b.onnx"), change))


def test_the_same_file_has_no_difference(a: Path, run: Run) -> None:
    found = other(a, lambda model: None)
    assert found["same"] and found["equal_initializers"] == 2
    assert "no difference; 2 tensors are equal" in run("inspect", "--diff", a, a)[1]


def test_weights(a: Path, run: Run) -> None:
    def change(model: onnx.ModelProto) -> None:
        w, b = model.graph.initializer
        w.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w) + np.float32(1.5), "w"))
        b.name = "c"
        model.graph.node[0].input[2] = "c"

    found = other(a, change)
    assert not found["same"] and not found["operators"] and found["equal_initializers"] == 0
    rows = {row["name"]: row for row in found["initializers"]}
    assert rows["w"] == {"name": "w", "a": "FLOAT[4,4]", "b": "FLOAT[4,4]", "state": "changed", "error": 0.1}
    assert (rows["b"]["state"], rows["c"]["state"]) == ("only in a", "only in b")
    code, out, _ = run("inspect", "--diff", a, a.with_name("b.onnx"))
    assert (
        code == 0
        and re.search(r"w +FLOAT\[4,4\] +FLOAT\[4,4\] +changed +1\.0e-01", out)
        and "only in b" in out
    )


def test_operators_ends_and_metadata(a: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[1].op_type = "Sigmoid"
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        model.opset_import[0].version = 18
        helper.set_model_props(model, {"spec": "int8"})

    found = other(a, change)
    assert {row["what"]: (row["a"], row["b"]) for row in found["operators"]} == {
        "Relu": (1, None),
        "Sigmoid": (None, 1),
    }
    facts = {row["what"]: (row["a"], row["b"]) for row in found["facts"] if row["what"] != "bytes"}
    assert facts == {
        "opset": (17, 18),
        "input x": ("FLOAT[batch,4]", "FLOAT[1,4]"),
        "metadata spec": ("fold", "int8"),
    }
    assert found["equal_initializers"] == 2


def test_reports(tmp_path: Path, run: Run) -> None:
    first, second = sample_report(), sample_report()
    second["spec"] = "merge"
    second["emitted"]["bytes"] += 5
    second["rows"][-1]["macs"] += 1
    second["seconds"] = 1e9
    paths = [report.write_report(tmp_path / f"{n}.json", one) for n, one in enumerate((first, second))]
    code, out, _ = run("inspect", "--diff", *paths, "--json")
    found = json.loads(out)
    assert code == 0 and {row["what"] for row in found["facts"]} == {"spec", "emitted.bytes"}
    assert [(row["pass"], row["what"]) for row in found["passes"]] == [(first["rows"][-1]["pass"], "macs")]
    assert "emitted.bytes" in run("inspect", "--diff", *paths)[1]
    assert between(paths[0], paths[0])["same"]
    gone = second["rows"].pop()
    report.write_report(paths[1], second)
    row = between(*paths)["passes"][-1]
    assert row["pass"] == gone["pass"] and gone["status"] in row["a"] and row["b"] is None


def test_what_cannot_be_compared(a: Path, run: Run, tmp_path: Path) -> None:
    path = report.write_report(tmp_path / "report.json", sample_report())
    with pytest.raises(UsageError, match="two ONNX files, or two reports"):
        between(a, path)
    (tmp_path / "broken.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(FileError, match=r"broken\.onnx: cannot be read as ONNX"):
        between(a, tmp_path / "broken.onnx")
    assert run("inspect")[0] == run("inspect", a, "--diff", a, a)[0] == 2


# -------------------------------------------------------------------- files that want to be elsewhere


def beside(path: Path, **changes: str) -> Path:
    """A file whose `w` lies in weights.bin, or where it is said to."""
    save(path)
    model = onnx.load(path)
    w = model.graph.initializer[0]
    (path.parent / "weights.bin").write_bytes(w.raw_data)
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "weights.bin", "offset": "0", "length": "64"} | changes).items():
        w.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_beside_a_file_count_by_whatever_name(a: Path, run: Run) -> None:
    b = beside(a.with_name("b.onnx"))
    found = between(a, b)
    assert found["equal_initializers"] == 2
    size = b.stat().st_size + 64
    assert [row["b"] for row in found["facts"] if row["what"] == "bytes"] == [size]
    assert json.loads(run("inspect", b, "--json")[1])["bytes"] == size


@pytest.mark.parametrize("where", ["../secret", "/etc/hostname", "missing.bin", "."])
def test_weights_that_lie_elsewhere_are_not_read(
    a: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a.parent / "inner"
    folder.mkdir()
    (a.parent / "secret").write_bytes(bytes(64))
    beside(folder / "b.onnx", location=where)
    monkeypatch.chdir(folder)
    for name in (Path("b.onnx"), folder / "b.onnx"):
        with pytest.raises(FileError, match="its tensor w (is said to lie outside|does not lie in)"):
            between(a, name)


def test_weights_that_are_cut_short_are_not_read(a: Path) -> None:
    for changes in ({"length": "65"}, {"offset": "1"}, {"offset": "-8"}, {"length": "many"}):
        with pytest.raises(FileError, match="its tensor w does not lie in weights.bin beside it"):
            between(a, beside(a.with_name("b.onnx"), **changes))


def test_a_damaged_report_is_said_to_be_one(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.json" for name in "ab"]
    for path in paths:
        path.write_text(report.dumps(sample_report()))
    damaged = json.loads(paths[1].read_text())
    damaged["rows"][0]["pass"] = [1]
    paths[1].write_text(json.dumps(damaged))
    with pytest.raises(UsageError, match="a damaged report"):
        between(*paths)
