"""The first layer that is wrong: errors planted one at a time into files, each found where it was planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from compressor import api, counterparts, divergence
from compressor.capture import capture
from compressor.data import synthetic
from compressor.divergence import Inside, Layer
from compressor.emit import emit
from compressor.ir import Graph
from compressor.pipeline import Context, Pipeline, parse
from compressor.registry import passes, targets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = (
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


class Two(nn.Module):
    """Pictures [N, 3, 8, 8] and words [N, T] in; classes and a score for each word out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Block(), Block())
        self.table = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.act, self.fc = nn.GELU(), nn.Linear(8, 8)
        self.classes, self.scores = nn.Linear(8, 5), nn.Linear(8, 1)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(self.stem(x)).flatten(2).transpose(1, 2)
        words = self.table(ids)
        words = words + self.attention(words, x, x, need_weights=False)[0]
        words = words + self.act(self.fc(words))
        return self.classes(words.mean(1)), self.scores(words).squeeze(-1)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Two()
    for norm in (block.norm for block in model.body):
        nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 3)
        nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias)
    return model.eval()


def samples(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count * 5).reshape(count, 5) % 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    """The graph as it came, and a file of it with norms folded and all axes of batch and words free."""
    batch, words = torch.export.Dim("batch"), torch.export.Dim("words")
    axes = {"x": {0: batch}, "ids": {0: batch, 1: words}}
    program = torch.export.export(network(), samples(2), dynamic_shapes=axes)
    graph = capture(program)
    folded = graph.copy()
    folded.turn_page()
    held = synthetic(folded.inputs, folded.example, samples=4, seed=0, table_sizes={"ids": 20})
    Pipeline(parse("fold", passes()), passes()).run(folded, Context(targets()["cpu"], held))
    path = tmp_path_factory.mktemp("made") / "model.onnx"
    emit(folded, path)
    return graph, path


def planted(path: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    """A copy of a file in which something was changed."""
    model = onnx.load(path)
    change(model.graph)
    bad = path.with_name("bad.onnx")
    onnx.save(model, bad)
    return bad


def weight(name: str, at: int | None = None, by: float = 0.25) -> Callable[[onnx.GraphProto], None]:
    """Another weight, or only one of its numbers changed."""

    def change(graph: onnx.GraphProto) -> None:
        tensor = next(t for t in graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        if at is None:
            array += np.random.default_rng(0).normal(size=array.shape).astype(array.dtype) * array.std()
        else:
            array.reshape(-1)[at] += np.abs(array).max() * by
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def operator(name: str, kind: str = "", **attributes: float) -> Callable[[onnx.GraphProto], None]:
    """Another operator at a node, or other attributes."""

    def change(graph: onnx.GraphProto) -> None:
        node = next(n for n in graph.node if n.name == name)
        node.op_type = kind or node.op_type
        kept = [a for a in node.attribute if a.name not in attributes]
        del node.attribute[:]
        node.attribute.extend([*kept, *(onnx.helper.make_attribute(k, v) for k, v in attributes.items())])

    return change


def look(graph: Graph, path: Path, tolerance: float | None = None) -> Inside:
    return divergence.look_inside(graph, path, graph.inputs, [samples()], tolerance)


def test_nothing_is_wrong_in_a_right_file(made: tuple[Graph, Path]) -> None:
    inside = look(*made)
    assert inside.first is None and inside.paired >= 0.6 * inside.values
    modules = {layer.module for layer in inside.layers}
    assert modules >= {"stem", "body.0.conv", "body.1.act", "attention", "fc", "classes", "scores"}
    assert max(layer.error for layer in inside.layers) < 1e-5


@pytest.mark.parametrize(
    "name",
    ["stem.weight", "body.0.conv.weight", "body.1.conv.weight", "table.weight", "fc.weight", "classes.bias",
     "attention.out_proj.weight"],
)  # fmt: skip
@pytest.mark.parametrize("at", [None, 3])
def test_a_wrong_weight_is_found_in_its_layer(made: tuple[Graph, Path], name: str, at: int | None) -> None:
    graph, path = made
    first = look(graph, planted(path, weight(name, at))).first
    assert isinstance(first, Layer) and set(first.through) <= {"fc/MatMul"}, "whose bias is another node"
    assert first.module == name.rpartition(".")[0]
    assert first.before < 1e-5 < 1e-3 < first.error
    assert first.expected.startswith("shape [") and "mean" in first.seen and first.expected != first.seen


@pytest.mark.parametrize(
    ("node", "change"),
    [
        ("body.0.act/Relu", operator("body.0.act/Relu", "LeakyRelu", alpha=0.1)),
        ("body.1/Add", operator("body.1/Add", "Sub")),
        ("attention/Softmax", operator("attention/Softmax", axis=1)),
        ("classes/Gemm", operator("classes/Gemm", alpha=1.01)),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_wrong_operator_is_found(made: tuple[Graph, Path], node: str, change: Callable) -> None:
    graph, path = made
    present = {n.name for n in onnx.load(path).graph.node}
    assert node in present, sorted(present)
    first = look(graph, planted(path, change)).first
    assert first is not None and node in (first.node, *first.through)
    assert first.module == node.rpartition("/")[0]


def test_an_operator_that_does_nothing_any_more_is_named(made: tuple[Graph, Path]) -> None:
    """Its value is right, being the one before it; what is missing is said with the first that is wrong."""
    graph, path = made
    first = look(graph, planted(path, operator("body.0.act/Relu", "Identity"))).first
    assert first is not None and "relu at body.0.act" in first.lacks


def test_only_what_feeds_a_wrong_output_is_searched(made: tuple[Graph, Path]) -> None:
    graph, path = made
    inside = look(graph, planted(path, weight("scores.weight")))
    assert inside.first is not None and inside.first.module == "scores"
    classes = next(layer for layer in inside.layers if layer.module == "classes")
    assert classes.error < 1e-5


def test_what_no_output_shows_is_found_all_the_same(made: tuple[Graph, Path]) -> None:
    graph, path = made
    inside = look(graph, planted(path, weight("body.0.conv.weight", 3, by=1e-3)))
    assert inside.first is not None and inside.first.module == "body.0.conv" and not inside.shown
    assert look(graph, planted(path, weight("body.0.conv.weight"))).shown


def test_memory_in_pieces_gives_the_same(made: tuple[Graph, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    graph, path = made
    bad = planted(path, weight("fc.weight"))
    whole = look(graph, bad)
    monkeypatch.setattr(counterparts, "HELD_BYTES", 10_000)
    monkeypatch.setattr(counterparts, "FIRST_FETCH", 2)
    assert look(graph, bad) == whole


def test_weights_in_a_file_of_their_own_stay_there(made: tuple[Graph, Path], tmp_path: Path) -> None:
    graph, _ = made
    emit(graph, tmp_path / "model.onnx", beside=True)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    place = next(t for t in model.graph.initializer if t.name == "stem.weight").external_data
    offset = next(int(entry.value) for entry in place if entry.key == "offset")
    assert look(graph, tmp_path / "model.onnx").first is None
    with (tmp_path / "model.onnx.data").open("r+b") as file:
        file.seek(offset)
        file.write(np.float32(9).tobytes())
    before = sorted(tmp_path.iterdir())
    first = look(graph, tmp_path / "model.onnx").first
    assert first is not None and first.node == "stem/Conv"
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------ integers, and the command


class Plain(nn.Sequential):
    def __init__(self) -> None:
        parts = [(nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.ReLU()) for i in range(4)]
        super().__init__(*(part for pair in parts for part in pair), nn.Flatten(), nn.Linear(8 * 64, 5))


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plain.pt2, data.npz and the integer file of it in out/."""
    folder = tmp_path_factory.mktemp("integers")
    torch.manual_seed(0)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Plain().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "plain.pt2")
    np.savez(
        folder / "data.npz", input=np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)
    )
    api.compress(
        folder / "plain.pt2", passes="int8(measure=false)", calibration=folder / "data.npz",
        output=folder / "out", measure=False,
    )  # fmt: skip
    return folder


def test_the_loudest_layer_of_an_integer_file(integers: Path) -> None:
    result = api.verify(
        integers / "plain.pt2", integers / "out/model.onnx", data=integers / "data.npz", layers=True
    )
    inside = result["inside"]
    assert result["ok"] and inside["first"] is None
    rows = {row["node"]: row for row in inside["layers"]}
    assert all(20 < rows[f"{i}/Conv"]["sqnr_db"] < 80 for i in (0, 2, 4, 6))
    path = integers / "out/model.onnx"
    scale = next(n for n in onnx.load(path).graph.node if n.name == "4/QuantizeLinear").input[1]
    pair = {n.name for n in onnx.load(path).graph.node if scale in n.input}
    assert pair == {"4/QuantizeLinear", "4/DequantizeLinear"}

    def change(graph: onnx.GraphProto) -> None:
        tensor = next(t for t in graph.initializer if t.name == scale)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(0.2), scale))

    result = api.verify(integers / "plain.pt2", planted(path, change), data=integers / "data.npz")
    loudest = result["inside"]["loudest"]
    assert not result["ok"] and loudest["module"] == "4", loudest


def test_the_command_names_the_layer(integers: Path, run: Callable) -> None:
    folder = integers
    code, out, err = run(folder / "plain.pt2", "--passes", "fold", "--no-measure", "-o", folder / "float")
    assert (code, err) == (0, "")
    bad = planted(folder / "float/model.onnx", weight("6.weight"))
    code, out, err = run("verify", folder / "plain.pt2", bad)
    assert code == 7 and "first wrong  Conv at 6 (conv2d at 6 in the model)" in out
    assert "before it" in out and "expected  shape [4, 8, 8, 8]" in out
    code, out, _ = run("verify", folder / "plain.pt2", folder / "float/model.onnx", "--layers")
    assert code == 0 and "first wrong" not in out and "conv2d at 6" in out
    code, out, _ = run("verify", folder / "plain.pt2", folder / "float/model.onnx", "--json")
    assert "inside" not in json.loads(out), "nothing inside is looked at where nobody asked"
