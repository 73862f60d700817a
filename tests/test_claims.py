"""Every claim of a report checked again, and every kind of claim made false once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from compressor import api, claims
from compressor.errors import UsageError
from compressor.options import recorded

Run = Callable[..., tuple[int, str, str]]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.classes = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classes(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small.pt2, data.npz, and out/ with model.onnx, model.pt2 and report.json."""
    folder = tmp_path_factory.mktemp("claims")
    torch.manual_seed(0)
    small = Small()
    small(torch.randn(64, 3, 8, 8))
    batch = torch.export.Dim("batch")
    program = torch.export.export(small.eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "small.pt2")
    x = np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        labels = small(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(folder / "data.npz", x=x, y=labels)
    command = f"compress {folder}/small.pt2 --calib {folder}/data.npz --eval {folder}/data.npz"
    api.compress(
        folder / "small.pt2", passes="fold", calibration=folder / "data.npz", evaluate=folder / "data.npz",
        emit="pt2", output=folder / "out", command=command,
    )  # fmt: skip
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The output folder, to damage."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def told(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The report of a folder, changed."""
    path = folder / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    return path


def states(folder: Path, **options: Any) -> dict[str, str]:
    found = api.verify(None, None, against=folder / "report.json", **options)["claims"]
    return {row["what"]: row["state"] for row in found}


def false(found: Mapping[str, str]) -> set[str]:
    return {what for what, state in found.items() if state == claims.NOT_HELD}


def test_all_holds_and_the_command_says_so(made: Path, run: Run) -> None:
    code, out, err = run("verify", "--against", made / "out")
    assert (code, err) == (0, ""), out
    assert "not held" not in out and "held: " in out
    for words in (
        "sha256 of model.onnx",
        "metric top1 of the model",
        "loss against the model",
        "times faster",
    ):
        assert words in out
    assert "not checkable" not in out, "the recorded command says where the data are"


def test_files_alone(copy: Path) -> None:
    told(copy, lambda report: report["model"].update(path="gone.pt2"))
    found = states(copy)
    assert found["sha256 of model.onnx"] == claims.HELD and not false(found)
    assert found["everything about the model"] == claims.UNKNOWN


def test_a_changed_byte_is_found(copy: Path, run: Run) -> None:
    told(copy, lambda report: report["model"].update(path="gone.pt2"))
    data = bytearray((copy / "model.onnx").read_bytes())
    data[data.index(b"compressor")] ^= 1
    (copy / "model.onnx").write_bytes(data)
    assert false(states(copy)) == {"sha256 of model.onnx"}
    code, _, err = run("verify", copy / "model.onnx", "--against", copy / "report.json")
    assert code == 7 and err == f"error: {copy / 'report.json'}: not all that it says is so\n"
    assert json.loads(run("verify", "--against", copy, "--json")[1])["ok"] is False
    (copy / "model.onnx").write_bytes(b"no model")
    assert {"sha256 of model.onnx", "the file is ONNX"} <= false(states(copy))
    (copy / "model.pt2").unlink()
    assert {"size of model.pt2", "sha256 of model.pt2"} <= false(states(copy))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("opset", lambda r: r["emitted"].update(opset=21)),
        ("IR version", lambda r: r["emitted"].update(ir_version=8)),
        ("oldest ONNX Runtime", lambda r: r["emitted"].update(oldest_runtime="1.15")),
        ("operators that ran", lambda r: r["emitted"]["operators"].update(Conv=7)),
        ("size of usage.md", lambda r: r["emitted"]["files"].update({"usage.md": 1})),
        ("spec, as the file says", lambda r: r.update(spec="merge")),
    ],
)
def test_a_false_claim_about_files_is_found(copy: Path, what: str, change: Callable) -> None:
    told(copy, lambda report: [report["model"].update(path="gone.pt2"), change(report)])
    assert false(states(copy)) == {what}


def test_false_claims_about_numbers_are_found(made: Path, copy: Path) -> None:
    def lie(report: dict[str, Any]) -> None:
        emitted = report["emitted"]
        report["rows"][0]["params"] += 1
        emitted["metric"]["top1"] -= 0.02
        emitted["latency"]["ratio"] *= 50
        emitted["float_bytes"] *= 2
        report["model"]["sha256"] = "0" * 64

    told(copy, lie)
    assert false(states(copy, data=made / "data.npz", evaluate=made / "data.npz")) == {
        *("params of the model", "metric top1", "times faster than the float file", "size of the float file"),
        "sha256 of the model",
    }


@pytest.mark.parametrize(("dtype", "share"), [("whole", 0.08), ("double", 0.05)])
@pytest.mark.parametrize("options", [(), ("--tolerance", "1e-9")])
def test_an_exact_file_is_held_to_the_same_numbers(
    tmp_path: Path, run: Run, dtype: str, share: float, options: tuple[str, ...]
) -> None:
    """Classes that floats make, and floats of 64 bits; a tolerance makes it no laxer."""

    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 10, dtype=torch.float64 if dtype == "double" else torch.float32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if dtype == "double" else self.layer(x).argmax(1)

    torch.manual_seed(0)
    model = Decides().eval()
    x = torch.randn(64, 16, dtype=model.layer.weight.dtype)
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model, (x[:2],), dynamic_shapes=batch), tmp_path / "m.pt2")
    np.savez(tmp_path / "x.npz", x=x.numpy())
    words = (tmp_path / "m.pt2", tmp_path / "out" / "model.onnx", "--data", tmp_path / "x.npz")
    assert run(words[0], "--passes", "fold", "--no-measure", "-o", tmp_path / "out")[0] == 0
    assert run("verify", *words)[0] == 0
    file = onnx.load(words[1])
    for held in file.graph.initializer:
        value = onnx.numpy_helper.to_array(held).copy()
        value *= 1 + share * np.random.default_rng(0).standard_normal(value.shape)
        if value.ndim == 2:
            held.CopyFrom(onnx.numpy_helper.from_array(value, held.name))
    onnx.save(file, words[1])
    assert run("verify", *words, *options)[0] == 7


def test_another_model_does_not_lose_so_little(made: Path, copy: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Small().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "other.pt2")
    result = api.verify(
        tmp_path / "other.pt2", None, against=copy / "report.json", data=made / "data.npz", measure=False
    )
    wrong = {row["what"] for row in result["claims"] if row["state"] == claims.NOT_HELD}
    assert {"sha256 of the model", "loss against the model, dB"} <= wrong
    state = {row["what"]: row["state"] for row in result["claims"]}
    assert state["times faster than the float file"] == state["metric top1"] == claims.UNKNOWN


def test_what_another_runtime_counts_is_not_held_against_it(copy: Path) -> None:
    def older(report: dict[str, Any]) -> None:
        report["versions"]["onnxruntime"] = "1.17.0"
        report["model"]["path"] = "gone.pt2"
        report["emitted"]["operators"]["Conv"] = 7

    told(copy, older)
    assert states(copy)["operators that ran"] == claims.UNKNOWN


def test_data_are_known_by_their_numbers_and_not_by_their_path(
    made: Path, copy: Path, tmp_path: Path
) -> None:
    what = "held-out samples", "loss against the model, dB", "loss where axes have other sizes, dB"
    shutil.copy(made / "data.npz", tmp_path / "renamed.npz")
    found = states(copy, data=tmp_path / "renamed.npz", measure=False)
    assert not false(found) and all(found[name] == claims.HELD for name in what[1:])
    other = dict(np.load(made / "data.npz"))
    other["x"] = other["x"][::-1].copy()
    (made / "elsewhere").mkdir(exist_ok=True)
    np.savez(made / "elsewhere" / "data.npz", **other)
    found = states(copy, data=made / "elsewhere" / "data.npz", measure=False)
    assert false(found) == {what[0]} and what[1] not in found


def test_what_an_app_tests_with_is_held_to_its_hash(copy: Path) -> None:
    told(copy, lambda report: report["model"].update(path="gone.pt2"))
    with (copy / "test_data_set_0" / "output_0.pb").open("ab") as file:
        file.write(b"more")
    assert false(states(copy)) == {"sha256 of test_data_set_0/output_0.pb"}


def test_a_file_may_lie_elsewhere(copy: Path, tmp_path: Path, run: Run) -> None:
    told(copy, lambda report: report["model"].update(path="gone.pt2"))
    (copy / "model.onnx").rename(tmp_path / "loose.onnx")
    code, out, err = run("verify", tmp_path / "loose.onnx", "--against", copy, "--no-measure")
    assert (code, err) == (0, ""), out


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_metric_that_is_no_number_may_be_claimed(
    made: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    (tmp_path / f"lost_{value}.py").write_text(f"def metric(run):\n    return {{'loss': float('{value}')}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    told(
        copy,
        lambda report: [one.update(metric={"loss": value}) for one in (report["emitted"], report["rows"][0])],
    )
    found = states(copy, evaluate=f"lost_{value}:metric", measure=False)
    assert found["metric loss"] == found["metric loss of the model"] == claims.HELD


def test_options_of_the_other_kind_are_refused(made: Path, run: Run) -> None:
    model, file = made / "small.pt2", made / "out" / "model.onnx"
    for words, said in (
        (("--against", made / "out", "--tolerance", "1e-9"), "--tolerance"),
        (("--against", made / "out", "--layers"), "--layers"),
        ((model, file, "--eval", "nowhere.npz"), "--eval goes with --against"),
    ):
        code, _, err = run("verify", *words)
        assert code == 2 and said in err


def test_a_report_reaches_no_other_files(copy: Path) -> None:
    told(copy, lambda report: report["emitted"]["files"].update({"../secret": 1}))
    with pytest.raises(UsageError, match="a damaged report"):
        states(copy)
    told(copy, lambda report: report.update(emitted={"file": "model.onnx"}))
    with pytest.raises(UsageError, match="a damaged report"):
        states(copy)
    told(copy, lambda report: report.update(emitted=None))
    with pytest.raises(UsageError, match="nothing was emitted"):
        states(copy)


def test_a_recorded_command_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.npz").touch()
    command = (
        "compress net.pt --calib c.npz --input 'x:f32[?,3]' --task causal-lm --static --trust-pickle --model evil.py:f "
        "--eval evil:metric --preprocess evil:prepare --latency-cmd 'rm -rf {onnx}' --seed 4"
    )
    assert recorded(command) == {
        **{"calibration": "c.npz", "inputs": ("x:f32[?,3]",), "task": "causal-lm", "dynamic": False},
    }
    for broken in ("compressor.compress(...)", "compress 'x", "compress x --nothing", "compress --help", ""):
        assert recorded(broken) == {}


def test_what_verify_wants(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    for words in ((), (tmp_path / "a.onnx",), ("a", "b", "c")):
        code, _, err = run("verify", *words)
        assert code == 2 and "MODEL and ONNX" in err
