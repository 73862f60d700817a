"""What lies beside the model for an app: usage in four languages, a sample, copied files; and releases that load it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import Net, conv
from torch import nn

import compressor
from compressor import handover, runtime
from compressor.capture import capture
from compressor.emit import emit
from compressor.errors import OutputError, UsageError
from compressor.target import RELEASES
from targets.cpu import CPU


def small() -> nn.Module:
    torch.manual_seed(0)
    return Net(lambda net, x: net.b(net.a(x).relu()).mean((2, 3)), a=conv(3, 8), b=conv(8, 5)).eval()


def arrays(folder: Path, kind: str) -> dict[str, np.ndarray]:
    protos = [onnx.TensorProto.FromString(f.read_bytes()) for f in sorted(folder.glob(f"{kind}_*.pb"))]
    return {proto.name: onnx.numpy_helper.to_array(proto) for proto in protos}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_a_sample_gives_again_what_it_gave(tmp_path):
    compressor.compress(
        small(), torch.randn(4, 3, 8, 8), passes="fold", output=tmp_path / "out", measure=False
    )
    place = tmp_path / "out" / handover.SAMPLE
    inputs, outputs = arrays(place, "input"), arrays(place, "output")
    assert [a.shape for a in inputs.values()] == [(1, 3, 8, 8)]
    seen = runtime.run(runtime.session(tmp_path / "out" / "model.onnx", threads=1), inputs)
    for array, expected in zip(seen, outputs.values(), strict=True):
        assert np.array_equal(array, expected) and np.abs(expected).max() > 0
    assert list(outputs) == [
        o["name"] for o in json.loads((tmp_path / "out/signature.json").read_text())["outputs"]
    ]


def test_a_model_of_a_fixed_batch_gets_samples_of_that_size(tmp_path):
    net = Net(lambda net, x: net.a(x).reshape(4, -1).sum(0, keepdim=True), a=conv(3, 2))
    compressor.compress(
        net.eval(), torch.randn(4, 3, 8, 8), passes="fold", output=tmp_path / "out", measure=False
    )
    (array,) = arrays(tmp_path / "out" / handover.SAMPLE, "input").values()
    assert array.shape == (4, 3, 8, 8)


def test_the_python_of_usage_runs(tmp_path, monkeypatch):
    compressor.compress(
        small(), torch.randn(4, 3, 8, 8), passes="fold", output=tmp_path / "out", measure=False
    )
    (code,) = blocks((tmp_path / "out" / handover.USAGE).read_text(), "python")
    monkeypatch.chdir(tmp_path / "out")
    found: dict[str, object] = {}
    exec(code, found)
    assert found["output"].shape == (1, 5)


@pytest.mark.parametrize("dtype", handover.WORDS)
def test_usage_has_words_for_every_dtype(dtype):
    one = {"name": "a.b", "dtype": dtype, "shape": ["batch", "length", 3]}
    text = handover.usage(
        {"model": "model.onnx", "inputs": [one], "outputs": [one | {"name": "1"}]}, ort_file=True
    )
    (python,), (kotlin,), (cpp,), (script,) = (
        blocks(text, n) for n in ("python", "kotlin", "cpp", "javascript")
    )
    compile(python, "usage", "exec")
    words = handover.WORDS[dtype]
    assert f"np.zeros([1, 8, 3], np.{words.numpy})" in python and words.kotlin[0] in kotlin
    assert (
        f"CreateTensor<{words.cpp}>" in cpp
        and f'"{words.javascript[0]}", new {words.javascript[1]}(24)' in script
    )
    assert 'results["1"]' in script and "model.ort" in kotlin
    assert "{{" not in text and "{%" not in text and "\n\n\n" not in text


def test_browsers_are_told_of_the_second_file(tmp_path):
    one = {"name": "x", "dtype": "f32", "shape": [1]}
    signature = {"model": "model.onnx", "inputs": [one], "outputs": [one]}
    (plain,) = blocks(handover.usage(signature), "javascript")
    assert 'create("model.onnx");' in plain and "externalData" not in plain
    (script,) = blocks(handover.usage(signature, data_file="model.onnx.data"), "javascript")
    assert (
        'externalData: [{ path: "model.onnx.data", data: "model.onnx.data" }]' in script and "});" in script
    )


def test_names_are_names_in_every_language():
    names = ["x", "x", "class", "1", "session", "out.0", "", "out_0"]
    described = [{"name": n, "dtype": "f32", "shape": [2]} for n in names]
    text = handover.usage({"model": "m", "inputs": described[:4], "outputs": described[4:]})
    (python,) = blocks(text, "python")
    compile(python, "usage", "exec")
    assert re.findall(r"^(\w+) = np.zeros", python, re.MULTILINE) == ["x", "x_1", "tclass", "t1"]
    assert "tsession, out_0, value, out_0_1 = session.run(" in python


def test_names_that_are_no_words_stay_inside_their_quotes():
    names = ['a"b\\c', "line\nbreak", "${x}", "a|b`c"]
    described = [{"name": n, "dtype": "f32", "shape": [2]} for n in names]
    text = handover.usage({"model": "m", "inputs": described[:2], "outputs": described[2:]})
    (python,) = blocks(text, "python")
    found = {node.value for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Constant)}
    assert set(names) <= found
    (kotlin,) = blocks(text, "kotlin")
    assert r'results.get("\${x}")' in kotlin
    assert "| output | `a b c` |" in text and "| input | `line break` |" in text


def test_preprocessing_and_labels_are_said():
    image = {"name": "x", "dtype": "f32", "shape": [1, 3, 8, 8], "layout": "NCHW"}
    known = {"source": "imagenet", "resize": 256, "crop": (224, 224), "interpolation": "bicubic"}
    known |= {"scale": 1 / 255, "mean": (0.5,), "std": (0.25,), "reverse": True}
    text = handover.usage(
        {"model": "m", "inputs": [image], "outputs": [image], "preprocess": known, "labels": ["cat"]},
        integer=True,
    )
    for words in (
        "shorter side to 256 pixels, bicubic",
        "224 x 224",
        "mean [0.5], std [0.25]",
        "blue, green, red",
    ):
        assert words in text
    assert "`labels.txt`" in text and "30 dB" in text


def test_files_of_the_tokenizer_are_copied(tmp_path):
    first, second, made = (tmp_path / name for name in ("first", "second", "made"))
    for folder in (first, second, made):
        folder.mkdir()
    (first / "tokenizer.json").write_text("1")
    (second / "tokenizer.json").write_text("2")
    (second / "preprocessor_config.json").write_text("3")
    (second / "weights.bin").write_text("4")
    names = handover.copy_files(made, [None, first, second], ["cat\n", "big dog"])
    assert names == ["preprocessor_config.json", "tokenizer.json"]
    assert sorted(f.name for f in made.iterdir()) == ["labels.txt", *names]
    assert (made / "tokenizer.json").read_text() == "1"
    assert (made / handover.LABELS).read_text() == "cat\nbig dog\n"


@pytest.mark.parametrize("words", ["", "{", "[]", '{"files": 3}', '{"files": [3], "labels": 0}'])
def test_a_signature_that_is_none_claims_no_files(tmp_path, words):
    (tmp_path / handover.SIGNATURE).write_text(words)
    assert handover.copied_to(tmp_path) == set() == handover.copied_to(tmp_path / "none")


def test_another_run_replaces_what_lay_there(tmp_path):
    out = tmp_path / "out"
    compressor.compress(small(), torch.randn(4, 3, 8, 8), passes="fold", output=out, measure=False)
    signature = json.loads((out / handover.SIGNATURE).read_text())
    (out / handover.SIGNATURE).write_text(
        json.dumps(signature | {"files": ["tokenizer.json"], "labels": ["a"]})
    )
    for name in ("tokenizer.json", handover.LABELS, f"{handover.SAMPLE}/input_7.pb"):
        (out / name).write_text("of the earlier run")
    for name in ("notes.txt", "vocab.txt"):
        (out / name).write_text("the user's")
    compressor.compress(small(), torch.randn(4, 3, 8, 8), passes="fold", output=out, measure=False)
    assert not (out / "tokenizer.json").exists() and not (out / handover.LABELS).exists()
    assert (out / "notes.txt").exists() and (out / "vocab.txt").exists()
    assert sorted(f.name for f in (out / handover.SAMPLE).iterdir()) == ["input_0.pb", "output_0.pb"]


@pytest.mark.parametrize("name", ["model.onnx", "usage.md", "model.ort", "report.json", "test_data_set_0"])
def test_files_of_others_are_not_replaced(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}')
    with pytest.raises(OutputError, match=f"holds {name}, which no run of compress wrote"):
        compressor.compress(small(), torch.randn(4, 3, 8, 8), passes="fold", output=out, measure=False)
    assert [one.name for one in out.iterdir()] == [name] and (out / name).read_text() == '{"mine": 1}'


# ---------------------------------------------------------------- releases


@pytest.mark.parametrize(
    ("release", "opset", "version"), [("1.15.1", 18, 8), ("1.16.3", 19, 9), ("1.31", 20, 9)]
)
def test_a_file_for_an_old_release(tmp_path, release, opset, version):
    compressor.compress(
        small(),
        torch.randn(4, 3, 8, 8),
        passes="fold",
        output=tmp_path / "out",
        measure=False,
        min_ort=release,
    )
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert (model.opset_import[0].version, model.ir_version) == (opset, version)
    emitted = json.loads((tmp_path / "out" / "report.json").read_text())["emitted"]
    assert (emitted["opset"], emitted["ir_version"]) == (opset, version)
    assert emitted["oldest_runtime"] == {18: "1.15", 19: "1.16", 20: "1.17"}[opset]


def test_opsets_and_releases_that_do_not_fit_are_refused():
    assert (
        CPU.speaking() is CPU and CPU.speaking(21).ir_version == 10 and CPU.speaking(18, "1.17").opset == 18
    )
    for opset, release, words in (
        (21, "1.17", "reads opsets up to 20"),
        (12, None, "opset 18 to 23"),
        (None, "1.9", "the oldest that files can be written for is 1.15"),
        (None, "new", "is written 1.17"),
    ):
        with pytest.raises(UsageError, match=words):
            CPU.speaking(opset, release)
    assert list(RELEASES.values()) == sorted(RELEASES.values())


@pytest.mark.parametrize(("fixed", "shape"), [({}, ["4*batch", 6]), ({"batch": 2}, [8, 6])])
def test_sizes_that_follow_from_axes_are_said_in_their_names(tmp_path, fixed, shape):
    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.flatten(0, 1)

    graph = capture(Flat(), (torch.randn(2, 4, 6),))
    emitted = emit(graph, tmp_path / "m.onnx", fixed=fixed)
    assert handover.signature(graph, emitted, (), None, None)["outputs"][0]["shape"] == shape
