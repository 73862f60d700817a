"""The whole line on one model: every pass checked, files that say what they are, targets, and broken promises."""

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import compressor
from compressor import api
from compressor.errors import ContractError, DataError, FileError, UsageError


class LoraLinear(nn.Module):
    def __init__(self, inputs, outputs, rank=4):
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.head = LoraLinear(32, 10)

    def forward(self, image):
        x = self.stem(image)
        x = torch.relu(self.body(x) + x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Net().train()
    net(torch.randn(32, 3, 16, 16))
    return net.eval()


@pytest.fixture
def files(model, tmp_path, monkeypatch):
    """net.pt2 and calib.npz in the working directory."""
    monkeypatch.chdir(tmp_path)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        program = torch.export.export(
            model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
        )
        torch.export.save(program, "net.pt2")
        images = torch.randn(80, 3, 16, 16)
        labels = model(images).argmax(1)
    np.savez("calib.npz", image=images.numpy(), y=labels.numpy())
    return tmp_path


def test_the_whole_line(files, run):
    code, out, err = run(
        "net.pt2",
        "--passes",
        "merge,prune(macs=0.8),int8(measure=false)",
        "--calib",
        "calib.npz",
        "--eval",
        "calib.npz",
    )
    assert code == 0, err
    folder = files / "net-compressed"
    assert {p.name for p in folder.iterdir()} == {
        "model.onnx", "report.html", "report.json", "signature.json", "test_data_set_0", "usage.md",
    }  # fmt: skip
    assert run("inspect", folder, "--html", "again.html") == (0, "again.html\n", "")
    assert Path("again.html").read_bytes() == (folder / "report.html").read_bytes()
    report = json.loads((folder / "report.json").read_text())
    assert [r["pass"] for r in report["rows"]] == ["input", "merge", "prune", "fold", "int8"]
    assert report["inserted"] == ["fold"]
    contracts = {r["pass"]: (r["contract"], r["status"]) for r in report["rows"][1:]}
    assert contracts["merge"] == ("exact", "proved") and contracts["fold"] == ("exact", "proved")
    assert contracts["prune"] == ("masked, bounded", "proved")
    assert report["rows"][2]["macs"] <= 0.8 * report["rows"][0]["macs"]
    assert sum(row["macs"] for row in report["layers"]) == report["rows"][-1]["macs"]
    assert report["emitted"]["float_bytes"] / report["emitted"]["bytes"] > 2
    assert report["emitted"]["operators"]["QLinearConv"] == 2
    assert report["rows"][0]["metric"]["top1"] == 1.0
    proto = onnx.load(folder / "model.onnx")
    assert {p.key: p.value for p in proto.metadata_props}[
        "spec"
    ] == "merge,prune(macs=0.8),fold,int8(measure=False)"
    signature = json.loads((folder / "signature.json").read_text())
    assert signature["inputs"][0]["shape"] == ["batch", 3, 16, 16]
    assert out.rstrip().splitlines()[-1].startswith("compress bench ")
    assert run("inspect", folder / "report.json")[0] == 0
    assert (
        run("verify", "net.pt2", folder / "model.onnx", "--data", "calib.npz", "--tolerance", "1e-6")[0] == 7
    )
    assert run("bench", folder / "model.onnx", "--seconds", "0.2")[0] == 0


def test_the_same_input_gives_the_same_bytes_from_any_folder(model, tmp_path):
    images = torch.randn(80, 3, 16, 16)
    made = [
        api.compress(
            model,
            (images[:2],),
            passes="merge,prune(macs=0.8),int8",
            calibration=images,
            output=folder,
            measure=False,
        )
        for folder in (tmp_path / "a", tmp_path / "b" / "c")
    ]
    assert made[0].onnx.read_bytes() == made[1].onnx.read_bytes()
    other = api.compress(
        model,
        (images[:2],),
        passes="merge,prune(macs=0.7),int8",
        calibration=images,
        output=tmp_path / "d",
        measure=False,
    )
    assert other.onnx.read_bytes() != made[0].onnx.read_bytes()


def test_exact_passes_give_the_numbers_of_the_model(model, tmp_path):
    result = compressor.compress(
        model, torch.randn(1, 3, 16, 16), passes="merge,fold", output=tmp_path / "out"
    )
    assert all(r["status"] == "proved" for r in result.report["rows"][1:])
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(result.graph.run(x)[0], model(x), rtol=1e-5, atol=1e-5)
    check = api.verify(model, result.onnx, example_inputs=(x,))
    assert check["ok"] and check["checks"][0]["error"] < 1e-5
    with torch.no_grad():
        model.head.base.bias[0] += 1
    assert not api.verify(model, result.onnx, example_inputs=(x,), tolerance=1e-4)["ok"]


@pytest.mark.parametrize(("passes", "judged"), [("fold", "error"), ("fold,fp16", "sqnr")])
def test_a_file_is_held_to_what_its_passes_promise(model, tmp_path, passes, judged):
    """A loss of half a percent is none that exact passes may make, and nothing beside that of lossy ones."""
    x = torch.randn(8, 3, 32, 32)
    made = compressor.compress(model, x, passes=passes, output=tmp_path / "out", measure=False).onnx
    right = api.verify(model, made, example_inputs=(x,))
    assert right["ok"] and right["judged_by"] == judged
    proto = onnx.load(made)
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and array.ndim > 1:
            tensor.CopyFrom(onnx.numpy_helper.from_array((array * 1.005).astype(array.dtype), tensor.name))
    onnx.save(proto, made)
    wrong = api.verify(model, made, example_inputs=(x,))
    assert 1e-3 < max(check["error"] for check in wrong["checks"]) < 0.1
    assert wrong["ok"] == (judged == "sqnr")


def test_mobile_fixes_the_batch_and_writes_ort(model, tmp_path):
    images = torch.randn(40, 3, 16, 16)
    result = api.compress(
        model, (images[:2],), passes="merge,fold", target="mobile", output=tmp_path / "m", measure=False
    )
    assert (tmp_path / "m" / "model.ort").stat().st_size > 1000
    required = (tmp_path / "m" / "required_operators.config").read_text()
    assert required.startswith("# of model.ort") and "Gemm" in required
    assert "required_operators.config" in (tmp_path / "m" / "usage.md").read_text()
    assert [d.dim_value for d in onnx.load(result.onnx).graph.input[0].type.tensor_type.shape.dim] == [
        1,
        3,
        16,
        16,
    ]
    assert [one["shape"] for one in result.report["inputs"]] == [[1, 3, 16, 16]]
    assert [one["shape"][0] for one in result.report["outputs"]] == [1]
    free = api.compress(
        model,
        (images[:2],),
        passes="fold",
        target="mobile",
        output=tmp_path / "f",
        measure=False,
        dynamic=True,
    )
    assert onnx.load(free.onnx).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [one["shape"] for one in free.report["inputs"]] == [["batch", 3, 16, 16]]


def test_gpu_says_where_it_was_verified(model, tmp_path):
    result = api.compress(
        model,
        (torch.randn(2, 3, 16, 16),),
        passes="fold,fp16",
        target="gpu",
        output=tmp_path / "g",
        measure=False,
    )
    assert "only the structure was checked" in result.report["emitted"]["verified"]
    types = {t.data_type for t in onnx.load(result.onnx).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    assert onnx.load(result.onnx).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_stop_after_writes_nothing(files, run, capsys):
    code, _, _ = run("net.pt2", "--passes", "merge,fold", "--stop-after", "merge", "--print-after", "merge")
    assert code == 0
    assert not (files / "net-compressed").exists()


def test_limit_applies_the_first_rewrites_only(model, tmp_path):
    result = api.compress(
        model,
        (torch.randn(2, 3, 16, 16),),
        passes="fold",
        limit={"fold": 1},
        output=tmp_path / "o",
        measure=False,
    )
    assert len(result.report["rows"][1]["rewrites"]) == 1


def test_nan_weights_are_named(model, tmp_path):
    with torch.no_grad():
        model.head.base.weight[0, 0] = math.nan
    with pytest.raises(FileError, match=r"head\.base\.weight"):
        api.compress(model, (torch.randn(2, 3, 16, 16),), passes="fold", output=tmp_path / "o")


def test_unknown_options_and_models(model):
    with pytest.raises(UsageError, match="did you mean 'calib_limit'"):
        api.compress(model, passes="fold", calb_limit=3)
    with pytest.raises(UsageError, match="a model is"):
        api.compress(3, passes="fold")
    with pytest.raises(UsageError, match="--calib"):
        api.compress(model, (torch.randn(2, 3, 16, 16),), passes="int8", measure=False)


def test_a_broken_promise_writes_nothing(model, tmp_path, monkeypatch):
    from passes.fold import Fold

    honest = Fold.run

    def broken(self, graph, ctx):
        outcome = honest(self, graph, ctx)
        node = next(n for n in graph.nodes if n.op == "call_function" and "conv2d" in str(n.target))
        weight = node.args[1]
        graph.set_tensor(weight, graph.tensor(weight) * 1.01)
        return outcome

    monkeypatch.setattr(Fold, "run", broken)
    with pytest.raises(ContractError, match=r"pass fold: .*first bad operator: aten.conv2d"):
        api.compress(model, (torch.randn(2, 3, 16, 16),), passes="fold", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_one_line(model, tmp_path, monkeypatch):
    import errno

    from compressor import delivery
    from compressor.errors import OutputError

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(delivery, "emit", full)
    with pytest.raises(OutputError, match="No space left"):
        api.compress(model, (torch.randn(2, 3, 16, 16),), passes="fold", output=tmp_path / "o", measure=False)
    assert list(tmp_path.iterdir()) == []


def test_a_latency_table_replays_the_decisions_of_an_earlier_run(model, tmp_path, monkeypatch):
    from compressor import delivery

    images = torch.randn(40, 3, 16, 16)
    calls = []
    honest = delivery.latencies

    def counted(files, *args, **kwargs):
        calls.append(len(files))
        return honest(files, *args, **kwargs)

    monkeypatch.setattr(delivery, "latencies", counted)
    options = {"passes": "squeeze(macs=0.8)", "calibration": images}
    first = api.compress(model, (images[:2],), output=tmp_path / "a", **options)
    assert first.report["latency_table"] and len(calls) >= 2
    calls.clear()
    table = tmp_path / "a" / "report.json"
    again = api.compress(model, (images[:2],), output=tmp_path / "b", latency_table=table, **options)
    assert len(calls) == 1  # the closing comparison alone
    assert again.report["latency_table"] == first.report["latency_table"]
    assert again.onnx.read_bytes() == first.onnx.read_bytes()


class Positions(nn.Module):
    """Words and their places, both looked up: 10 words, so many places."""

    def __init__(self, places: int = 20) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(10, 4), nn.Embedding(places, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.full((16, 4), 10), "has 10 to 10 in ids, which the model looks up in a table of 10"),
        (torch.full((16, 4), -1), "has -1 to -1 in ids"),
        (torch.full((16, 21), 3), "the model does not run on it: index out of range in self"),
    ],
)
def test_data_of_another_model_is_named(tmp_path: Path, ids: torch.Tensor, message: str) -> None:
    inputs = ["ids:i64[batch,sequence]"]
    with pytest.raises(DataError, match=message):
        compressor.compress(
            Positions().eval(), passes="merge", inputs=inputs, calibration=[ids], output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
    fine = compressor.compress(
        Positions().eval(), passes="merge", inputs=inputs, calibration=[torch.full((16, 20), 3)],
        output=tmp_path / "out", measure=False, stop_after="merge",
    )  # fmt: skip
    assert fine.report["data"]["calibration"]["samples"] > 0
    with pytest.raises(
        UsageError, match=r"does not run on its example inputs \(ids \[2, 16\]\): index out of range"
    ):
        compressor.compress(
            Positions(places=15).eval(), passes="merge", inputs=inputs, output=tmp_path / "none"
        )
