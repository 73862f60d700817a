"""model.pt2 and the receipt in it: written, proved, read back with suspicion, and continued by the next run."""

from __future__ import annotations

import json
import resource
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor import api, program, receipt
from compressor.capture import capture
from compressor.data import synthetic
from compressor.delivery import sha256
from compressor.errors import ContractError, FileError, OutputError, UnsupportedError, UsageError
from compressor.load import load
from compressor.report import read_report, write_report

Run = Callable[..., tuple[int, str, str]]


class Net(nn.Module):
    """Nested inputs, a dict of outputs, everything that has a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 4)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.conv2(F.relu(self.bn1(self.conv1(batch["image"])))).mean((2, 3))
        return {"logits": self.head(self.drop(F.relu(hidden))), "hidden": hidden}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> compressor.Result:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pruned")
    example = {"batch": {"image": torch.randn(2, 3, 8, 8)}}
    dynamic = {"batch": {"image": {0: torch.export.Dim("batch")}}}
    net = torch.export.export(Net().eval(), (), example, dynamic_shapes=dynamic, strict=False)
    torch.export.save(net, folder / "net.pt2")
    result = compressor.compress(
        folder / "net.pt2", passes="prune(macs=0.6)", emit="pt2", output=folder / "out", measure=False,
        command=f"compress {folder}/net.pt2 --passes 'prune(macs=0.6)' -o {folder}/out",
    )  # fmt: skip
    np.savez(folder / "calib.npz", **{"batch.image": np.random.randn(64, 3, 8, 8).astype("float32")})
    return result


def with_member(path: Path, text: bytes | None, copy: Path) -> Path:
    """A copy of a .pt2 whose receipt is another one, or none."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith(f"extra/{receipt.MEMBER}"):
                new.writestr(info.filename, old.read(info))
        if text is not None:
            root = old.namelist()[0].split("/")[0]
            new.writestr(f"{root}/extra/{receipt.MEMBER}", text)
    return copy


def receipt_of(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(f"/extra/{receipt.MEMBER}"))
        return json.loads(archive.read(name))


# -------------------------------------------------------------------- the file


def test_the_program_is_the_graph_with_the_originals_names(pruned: compressor.Result) -> None:
    path = pruned.output / "model.pt2"
    loaded = torch.export.load(path)
    assert {*loaded.state_dict} == {*Net().state_dict()}
    assert all(
        value.requires_grad == ("bn1.r" not in name and "num" not in name)
        for name, value in loaded.state_dict.items()
    )
    assert loaded.state_dict["conv1.weight"].shape[0] < 32
    module = loaded.module()
    for size in (1, 2, 7):
        images = torch.randn(size, 3, 8, 8)
        seen = module(images)
        assert [*seen] == ["logits", "hidden"]
        assert all(torch.equal(a, b) for a, b in zip(seen.values(), pruned.graph.run(images), strict=True))
    graph = api.capture_model(load(path), None, compressor.Options())
    assert (graph.inputs, graph.outputs) == (pruned.graph.inputs, pruned.graph.outputs)
    assert [str(spec) for spec in graph.inputs] == ["batch.image:f32[batch,3,8,8]"]
    assert "batch_norm" in graph.text()
    said = pruned.report["emitted"]
    assert said["program"]["bytes"] == path.stat().st_size == said["files"]["model.pt2"]
    assert said["program"]["sha256"] == sha256(path)
    assert max(one["error"] for one in said["program"]["checks"]) <= 1e-6


def test_nothing_of_this_machine_is_in_the_file(pruned: compressor.Result) -> None:
    data = (pruned.output / "model.pt2").read_bytes()
    for word in (str(pruned.output.parent), str(Path(__file__).parent), "site-packages", "/home/", "/root/"):
        assert word.encode() not in data, word
    command = receipt_of(pruned.output / "model.pt2")["history"][0]["command"]
    assert command == "compress net.pt2 --passes 'prune(macs=0.6)' -o out"
    assert b'File \\"test_receipt.py\\", line' in data or b'File \\\\\\"test_receipt.py' in data


def test_a_file_that_is_not_the_graph_is_not_delivered(pruned: compressor.Result, tmp_path: Path) -> None:
    path = pruned.output / "model.pt2"
    batches = list(synthetic(pruned.graph.inputs, pruned.graph.example, samples=8, seed=0))
    assert program.check(pruned.graph, path, batches)
    other = pruned.graph.copy()
    other.tensors["head.bias"] = other.tensors["head.bias"] + 1e-3
    with pytest.raises(ContractError, match=r"model.pt2: its output logits is not the graph's: error"):
        program.check(other, path, batches)
    other = pruned.graph.copy()
    other.outputs = ("logits", "last")
    with pytest.raises(ContractError, match="takes and returns"):
        program.check(other, path, batches)
    bare = with_member(path, None, tmp_path / "model.pt2")
    with pytest.raises(ContractError, match="does not hold the receipt"):
        program.check(pruned.graph, bare, batches)


def test_a_file_that_does_not_read_back_says_why(
    pruned: compressor.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise UnsupportedError("capture changed the numbers")

    monkeypatch.setattr(program, "capture_model", refuse)
    with pytest.raises(UnsupportedError, match=r"^model.pt2 is not proved: capture changed the numbers$"):
        program.check(pruned.graph, pruned.output / "model.pt2", [])
    half = pruned.graph.copy()
    half.tensors["head.bias"] = half.tensors["head.bias"].half()
    with pytest.raises(UnsupportedError, match=r"rounds half precision otherwise .*: leave fp16 out"):
        program.check(half, pruned.output / "model.pt2", [])


def test_formats_are_words_or_lists(tmp_path: Path, run: Run) -> None:
    for emit in ("pt2", "onnx,pt2", ("pt2",), ["onnx", "pt2"]):
        assert "pt2" in compressor.Options.of({"emit": emit}).formats
    with pytest.raises(UsageError, match="--emit tflite: no such format; there are onnx, pt2"):
        compressor.Options.of({"emit": "tflite"})
    (tmp_path / "x.pt2").write_bytes(b"")
    code, _, said = run(tmp_path / "x.pt2", "--emit", "onnx,tflite")
    assert (code, said) == (2, "error: --emit tflite: no such format; there are onnx, pt2\n")


# -------------------------------------------------------------------- going on from it


def test_a_run_goes_on_from_the_file(pruned: compressor.Result, tmp_path: Path, run: Run) -> None:
    """Twice; the second time into the folder that it reads from, whose model.pt2 stays."""
    first, folder = pruned.output / "model.pt2", tmp_path / "out"
    code, _, said = run(first, "--passes", "fold", "--emit", "onnx,pt2", "-o", folder, "--no-measure")
    assert (code, said) == (0, "")
    second = sha256(folder / "model.pt2")
    calibration = pruned.output.parent / "calib.npz"
    code, out, said = run(
        folder / "model.pt2", "--passes", "int8", "-o", folder, "--no-measure", "--calib", calibration
    )
    assert (code, said) == (0, "")
    original = sha256(pruned.output.parent / "net.pt2")
    assert "continued from net.pt2" in out
    assert original[:12] in out
    report = read_report(folder / "report.json")
    came = report["continued_from"]
    assert (came["original"]["sha256"], came["original"]["hashed"]) == (original, "file")
    assert (came["spec"], came["runs"], came["changed"]) == ("prune(macs=0.6) -> fold", 2, False)
    names = [[row["pass"] for row in one["rows"]] for one in report["history"]]
    assert names == [["input", "prune"], ["input", "fold"]]
    assert report["history"][1]["model"]["sha256"] == sha256(first)
    assert report["model"]["sha256"] == second == sha256(folder / "model.pt2")
    code, out, said = run("inspect", folder / "report.json")
    assert (code, said) == (0, "")
    assert "prune(macs=0.6)" in out
    assert "compress net.pt2" in out
    code, out, said = run("inspect", first, "--json")
    facts = json.loads(out)
    assert facts["continued_from"]["original"]["sha256"] == original
    assert [row["pass"] for row in facts["passes"]] == ["input", "prune"]
    assert run("inspect", first)[0] == 0


def test_rows_of_the_receipt_are_those_of_the_report(pruned: compressor.Result) -> None:
    report = read_report(pruned.output / "report.json")
    (kept,) = receipt.read((json.dumps(receipt_of(pruned.output / "model.pt2"))).encode())["history"]
    for ours, theirs in zip(kept["rows"], report["rows"], strict=True):
        assert {*theirs} - {*ours} <= {key for key, value in theirs.items() if value is None}
        assert ours["params"] == theirs["params"]
        assert ours["rewrites"] == theirs["rewrites"]
        assert len(ours["checks"]) == len(theirs["checks"])
        assert str(ours["total_db"]) == str(theirs["total_db"])


def test_a_trained_module_goes_on_in_memory_and_from_its_file(
    pruned: compressor.Result, tmp_path: Path
) -> None:
    module = pruned.trainable()
    options: dict[str, Any] = {"passes": "fold", "stop_after": "fold", "measure": False}
    same = compressor.compress(module, **options)
    assert same.report["continued_from"]["changed"] is False
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(8, 3, 8, 8))["logits"].square().sum().backward()
    optimizer.step()
    module.save(tmp_path / "trained.pt2")
    assert module.training
    memory = compressor.compress(module, **options)
    file = compressor.compress(tmp_path / "trained.pt2", **options)
    images = torch.randn(5, 3, 8, 8)
    expected = module.eval()(images)
    for result in (memory, file):
        came = result.report["continued_from"]
        assert came["changed"] is True
        assert came["original"]["sha256"] == sha256(pruned.output.parent / "net.pt2")
        assert [str(spec) for spec in result.graph.inputs] == ["batch.image:f32[batch,3,8,8]"]
        for name, seen in zip(result.graph.outputs, result.graph.run(images), strict=True):
            assert torch.allclose(seen, expected[name], atol=1e-5)
    again = memory.trainable()
    assert [one["changed_before"] for one in again.receipt["history"]] == [False, True]


def test_the_file_trains(pruned: compressor.Result, tmp_path: Path) -> None:
    module = api.trainable(pruned.output / "model.pt2")
    assert [*module.state_dict()] == [*Net().state_dict()]
    assert module.receipt["history"][0]["model"]["sha256"] == sha256(pruned.output.parent / "net.pt2")
    images = torch.randn(6, 3, 8, 8)
    assert torch.equal(module(images)["logits"], pruned.graph.run(images)[0])
    assert not torch.equal(module.train()(images)["logits"], module(images)["logits"])
    assert module.bn1.num_batches_tracked == 2
    module.save(tmp_path / "trained.pt2")
    assert load(tmp_path / "trained.pt2").continued.changed
    bare = api.trainable(pruned.output.parent / "net.pt2")
    assert bare.receipt is None
    bare.save(tmp_path / "bare.pt2")
    assert load(tmp_path / "bare.pt2").continued is None


def test_a_file_that_cannot_be_written_leaves_the_one_that_is_there(
    pruned: compressor.Result, tmp_path: Path
) -> None:
    module = pruned.trainable()
    with pytest.raises(
        OutputError, match=r"cannot write \S*nowhere/\S*: No such file or directory; free space"
    ):
        module.save(tmp_path / "nowhere" / "model.pt2")
    with pytest.raises(OutputError, match="is no file that can be replaced"):
        module.save(tmp_path)
    (tmp_path / "model.pt2").write_text("old")
    full = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, full[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write \S*model.pt2: File too large; free space"):
            module.save(tmp_path / "model.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, full)
        signal.signal(signal.SIGXFSZ, before)
    assert [one.name for one in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "old"


# -------------------------------------------------------------------- suspicion


def edited(good: dict[str, Any], *path: Any, value: Any) -> bytes:
    found: Any = json.loads(json.dumps(good))
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(found).encode()


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "empty": (lambda good: b"", "it is not JSON"),
    "no text": (lambda good: b"\x1b[2J not JSON", "it is not JSON"),
    "nested": (lambda good: b"[" * 200_000, "it is not JSON"),
    "digits": (lambda good: b'{"format": ' + b"9" * 10_000 + b"}", "it is not JSON"),
    "huge": (lambda good: b" " * (receipt.MAX_BYTES + 10), "it is larger than 16 MB"),
    "list": (lambda good: b"[]", "it is not a receipt of compress"),
    "foreign": (lambda good: b'{"format": "other"}', "it is not a receipt of compress"),
    "newer": (lambda good: edited(good, "version", value=2), "it is of another version"),
    "no history": (lambda good: edited(good, "history", value=[]), "its history has 0 runs"),
    "long": (lambda good: edited(good, "history", value=good["history"] * 101), "its history has 101 runs"),
    "run": (lambda good: edited(good, "history", 0, value="x"), r"its history\[0\] is not"),
    "no rows": (lambda good: edited(good, "history", 0, "rows", value=None), r"its history\[0\] is not"),
    "params": (lambda good: edited(good, "history", 0, "rows", 0, "params", value="9"), r"rows\[0\]\.params is not"),
    "truth": (lambda good: edited(good, "history", 0, "rows", 0, "params", value=True), r"rows\[0\]\.params is not"),
    "big": (lambda good: edited(good, "history", 0, "rows", 0, "macs", value=10**400), r"rows\[0\]\.macs is not"),
    "metric": (lambda good: edited(good, "history", 0, "rows", 0, "metric", value={"a": "b"}), r"metric\.a is not"),
    "check": (lambda good: edited(good, "history", 0, "rows", 1, "checks", 0, "error", value=[]), r"\.error is not"),
    "deep": (lambda good: edited(good, "history", 0, "rows", 0, "facts", value={"a": nested(99)}), r"facts\.a is not"),
    "weights": (lambda good: edited(good, "weights_sha256", value=3), "its weights_sha256 is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_receipt_that_is_none_is_left_out_with_a_notice(
    name: str, pruned: compressor.Result, tmp_path: Path
) -> None:
    make, why = HOSTILE[name]
    path = pruned.output / "model.pt2"
    bad = make(receipt_of(path))
    with pytest.raises(receipt.Unreadable, match=why):
        receipt.read(bad)
    loaded = load(with_member(path, bad, tmp_path / "model.pt2"))
    assert loaded.continued is None
    (note,) = loaded.notes
    assert note.startswith("the receipt in model.pt2 is left out, so the report begins anew: it")
    assert "\n" not in note


def test_a_run_says_that_it_left_a_receipt_out(pruned: compressor.Result, tmp_path: Path, run: Run) -> None:
    bad = with_member(pruned.output / "model.pt2", b"{", tmp_path / "bad.pt2")
    code, out, said = run(bad, "--passes", "fold", "--stop-after", "fold", "--no-measure")
    assert (code, said) == (0, "")
    assert "the receipt in bad.pt2 is left out, so the report begins anew: it is not JSON" in " ".join(
        out.split()
    )
    assert "continued from" not in out


def test_what_a_receipt_says_cannot_steer_the_terminal(
    pruned: compressor.Result, tmp_path: Path, run: Run
) -> None:
    path = pruned.output / "model.pt2"
    text = edited(
        receipt_of(path), "history", 0, "command", value="\x1b]0;title\x07[red]x[/nothing]\r\n" + "y" * 9_000
    )
    bad = with_member(path, text, tmp_path / "model.pt2")
    code, out, said = run("inspect", bad)
    assert (code, said) == (0, "")
    result = compressor.compress(bad, passes="fold", stop_after="fold", measure=False)
    code, out, said = run("inspect", write_report(tmp_path / "report.json", result.report))
    assert code == 0
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[red]x[/nothing]" in out
    assert "y" * 5_000 not in out


def test_names_of_a_receipt_are_taken_only_where_they_fit(pruned: compressor.Result) -> None:
    path = pruned.output / "model.pt2"
    good = receipt_of(path)
    raw = capture(load(path).model)
    assert [str(spec) for spec in raw.inputs] == ["batch_image:f32[batch,3,8,8]"]
    for other in (
        {"name": "x", "dtype": "f16", "shape": ["batch", 3, 8, 8]},
        {"name": "x", "dtype": "f32", "shape": ["batch", 3, 8]},
        {"name": "x", "dtype": "f32", "shape": ["batch", 3, 8, 9]},
        {"name": "x", "dtype": "f32", "shape": [2, 3, 8, 8]},
        {"name": "x", "dtype": "f32", "shape": ["a b", 3, 8, 8]},
    ):
        receipt.rename(raw, {**good, "inputs": [other], "outputs": ["logits", "logits"]})
        assert [str(spec) for spec in raw.inputs] == ["batch_image:f32[batch,3,8,8]"]
        assert raw.outputs == ("logits", "hidden")
    receipt.rename(raw, {**good, "inputs": [{"name": "x", "dtype": "f32", "shape": ["n", 3, 8, 8]}]})
    assert [str(spec) for spec in raw.inputs] == ["x:f32[n,3,8,8]"]


def test_a_receipt_is_no_way_round_the_gate(pruned: compressor.Result, tmp_path: Path) -> None:
    data = (pruned.output / "model.pt2").read_bytes()
    broken = bytearray(data)
    broken[data.index(b'"history"') + 2] ^= 1
    (tmp_path / "model.pt2").write_bytes(broken)
    with pytest.raises(FileError, match="does not match its checksum"):
        load(tmp_path / "model.pt2")
    assert receipt.digest({"a": torch.zeros(2)}) != receipt.digest({"a": torch.zeros(2, dtype=torch.float64)})
    assert receipt.digest({"a": torch.zeros(2)}) != receipt.digest({"b": torch.zeros(2)})
