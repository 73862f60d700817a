"""Pixels as inputs: the same numbers as Preprocess.pixels and the model, from every layout, order and kind of data."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from nets import Net, conv
from torch import Tensor, nn

import compressor
from compressor import api
from compressor.camera import Camera, attach, parse
from compressor.capture import capture
from compressor.data import Data, open_data, parse_input, synthetic
from compressor.errors import DataError, UsageError
from compressor.images import Preprocess, preprocessing
from compressor.ir import Graph
from compressor.pipeline import Context
from passes.fold import Fold
from targets.cpu import CPU

WORDS = [",".join(w) for w in itertools.product(("uint8", "float32"), ("nhwc", "nchw"), ("rgb", "bgr"))]
IMAGENET = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": {"height": 12, "width": 12},
}
CONFIGS = {  # by what they do differently
    "imagenet": IMAGENET,
    "blue first": {**IMAGENET, "do_flip_channel_order": True},
    "offset": {**IMAGENET, "rescale_factor": 1 / 127.5, "rescale_offset": True},
    "scale only": {**IMAGENET, "do_normalize": False},
    "nothing": {**IMAGENET, "do_normalize": False, "do_rescale": False},
}


def cnn(channels: int = 3) -> nn.Sequential:
    """Images [n, channels, height, width] to 5 logits, any size from 4 on."""
    torch.manual_seed(0)
    body = (conv(channels, 16), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16), nn.ReLU())
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).train()
    net(torch.randn(16, channels, 12, 12))
    return net.eval()


def written(folder: Path, name: str) -> str:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(CONFIGS[name]))
    return str(path)


def pixels(count: int = 4, channels: int = 3, seed: int = 0) -> Tensor:
    """Red first, [count, channels, 12, 12]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, 12, 12), dtype=torch.uint8, generator=draw)


def as_asked(rgb: Tensor, words: str) -> Tensor:
    """What a camera of these words gives of a picture."""
    dtype, layout, order = parse(words)
    x = rgb.flip(1) if order == "bgr" else rgb
    x = x.permute(0, 2, 3, 1) if layout == "nhwc" else x
    return x.to(getattr(torch, dtype)).contiguous()


def close(seen: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((seen - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def joined(data: Data) -> Tensor:
    return torch.cat([batch.inputs[0] for batch in data])


def graph_and_camera(words: str, how: str = "imagenet", net: nn.Module | None = None) -> tuple[Graph, Camera]:
    graph = capture(net or cnn(), (torch.randn(2, 3, 12, 12),))
    return graph, attach(graph, words, how)


# ---------------------------------------------------------------- the graph


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("words", WORDS)
def test_every_word_gives_the_numbers_of_preprocess_and_model(
    words: str, config: str, tmp_path: Path
) -> None:
    net, how = cnn(), written(tmp_path, config)
    graph, camera = graph_and_camera(words, how, net)
    known = preprocessing(how, None)
    assert isinstance(known, Preprocess)
    for count in (1, 5):
        rgb = pixels(count)
        (seen,) = graph.run(as_asked(rgb, words))
        with torch.no_grad():
            expected, other = net(known.pixels(rgb)), net(known.pixels(rgb.flip(1)))
        assert close(seen, expected) and not close(seen, other, 1e-3)
    graph.check()
    graph.reinfer()
    (spec,) = graph.inputs
    assert spec.shape == (("batch", 12, 12, 3) if camera.layout == "nhwc" else ("batch", 3, 12, 12))
    assert graph.example[0].dtype == spec.dtype == camera.dtype
    assert graph.axis_names() == {str(graph.placeholders[0].meta["val"].shape[0]): "batch"}
    assert not graph.journal.born, "the passes start from the graph with its front"


def test_only_what_does_something_becomes_an_operator(tmp_path: Path) -> None:
    def front(words: str, config: str) -> list[str]:
        graph, _ = graph_and_camera(words, written(tmp_path, config))
        names = [str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"]
        return names[: names.index("conv2d")]

    assert front("uint8,nhwc,bgr", "imagenet") == ["permute", "to", "flip", "sub", "div"]
    assert front("uint8,nhwc,bgr", "blue first") == ["permute", "to", "sub", "div"]
    assert front("uint8,nchw", "scale only") == ["to", "div"]
    assert front("float32,nchw", "nothing") == []


def folded(graph: Graph) -> list[str]:
    """Operators up to the first convolution, once `fold` has taken what it can."""
    after = graph.copy()
    Fold().run(after, Context(CPU, synthetic(after.inputs, after.example, samples=4)))
    after.check()
    x = as_asked(pixels(3), "uint8,nhwc,bgr")
    assert close(after.run(x)[0], graph.run(x)[0])
    names = [str(node.target).split(".")[1] for node in after.nodes if node.op == "call_function"]
    return names[: names.index("conv2d")]


def test_fold_takes_order_and_normalisation_as_far_as_is_exact() -> None:
    padded, _ = graph_and_camera("uint8,nhwc,bgr")
    assert folded(padded) == ["permute", "to", "add"], (
        "zeros at the border are not what a mean would make of them"
    )
    patches, _ = graph_and_camera("uint8,nhwc,bgr", net=nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2)))
    assert folded(patches) == ["permute", "to"]


def test_integers_read_the_bytes_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
    result = api.compress(
        net, torch.randn(2, 3, 12, 12), passes="fold,int8", preprocess="imagenet", image_input="uint8,nhwc",
        calibration=pixels(16), measure=False, output="bytes",
    )  # fmt: skip
    operators = result.report["emitted"]["operators"]
    assert operators["QLinearConv"] == 1 and not {"Cast", "QuantizeLinear"} & operators.keys()
    assert result.report["rows"][-1]["total_db"] > 30


def test_dynamic_sizes_keep_their_names_where_they_now_stand() -> None:
    net = cnn()
    graph = capture(net, inputs=[parse_input("x:f32[?,3,height,width]")])
    camera = attach(graph, "uint8,nhwc", "imagenet")
    assert graph.inputs[0].shape == ("batch", "height", "width", 3)
    assert list(graph.axis_names().values()) == ["batch", "height", "width"]
    rgb = torch.randint(0, 256, (3, 3, 9, 14), dtype=torch.uint8)
    with torch.no_grad():
        assert close(graph.run(as_asked(rgb, "uint8,nhwc"))[0], net(camera.preprocess.pixels(rgb)))


def test_the_example_is_turned_back_into_pixels() -> None:
    how = preprocessing("imagenet", (12, 12))
    rgb = pixels(2)
    graph = capture(cnn(), (how.pixels(rgb),))
    attach(graph, "uint8,nhwc,bgr", "imagenet")
    assert torch.equal(graph.example[0], as_asked(rgb, "uint8,nhwc,bgr"))
    far = capture(cnn(), (100 * torch.randn(2, 3, 12, 12),))
    attach(far, "float32,nchw", "imagenet")
    assert far.example[0].unique().tolist() == sorted({0.0, 255.0, *far.example[0].unique().tolist()})
    assert torch.equal(far.example[0], far.example[0].round().clamp(0, 255))


def test_views_and_half_precision_and_other_inputs_stay_what_they_were() -> None:
    """A view of the picture needs channels first in memory too; a second input is left alone."""
    net = Net(lambda net, x, mask: net.head(x.view(x.shape[0], -1)) + mask, head=nn.Linear(3 * 144, 5)).half()
    graph = capture(net, (torch.randn(2, 3, 12, 12).half(), torch.randn(2, 5).half()))
    camera = attach(graph, "uint8,nhwc", "imagenet")
    rgb, mask = pixels(3), torch.randn(3, 5).half()
    with torch.no_grad():
        expected = net(camera.preprocess.pixels(rgb).half(), mask)
    assert close(graph.run(as_asked(rgb, "uint8,nhwc"), mask)[0].float(), expected.float(), 2e-3)
    assert [spec.name for spec in graph.inputs] == ["x", "mask"]
    data = open_data({"x": rgb, "mask": mask}, graph.inputs, preprocess=camera)
    assert torch.equal(joined(data), as_asked(rgb, "uint8,nhwc"))


def test_grey_pictures_have_no_order(tmp_path: Path) -> None:
    net = cnn(1)
    graph = capture(net, (torch.randn(2, 1, 12, 12),))
    with pytest.raises(UsageError, match="imagenet normalises 3 channels, and the model takes input:f32"):
        attach(graph, "uint8,nhwc", "imagenet")
    config = {"input_size": [1, 12, 12], "mean": [0.1], "std": [0.3], "crop_pct": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    camera = attach(graph, "uint8,nhwc,bgr", str(tmp_path / "config.json"))
    assert camera.signature() == {"layout": "NHWC", "channels": "GREY"}
    grey = pixels(3, 1)
    with torch.no_grad():
        assert close(graph.run(as_asked(grey, "uint8,nhwc"))[0], net(camera.preprocess.pixels(grey)))
    (tmp_path / "photos").mkdir()
    paint(tmp_path / "photos", 3)
    assert joined(open_data(tmp_path / "photos", graph.inputs, preprocess=camera)).shape == (3, 12, 12, 1)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "words", ["uint8", "nhwc", "uint8,nhwc,gbr", "uint8,float32,nhwc", "uint8,nhwc,nhwc", ""]
)
def test_other_words_are_named(words: str) -> None:
    with pytest.raises(UsageError, match="expected uint8 or float32, then nhwc or nchw, then rgb"):
        compressor.compress(cnn(), image_input=words)


def test_the_normalisation_must_be_known() -> None:
    for how in (None, lambda x: x):
        with pytest.raises(UsageError, match="pass --preprocess imagenet, or a timm or Hugging Face"):
            graph_and_camera("uint8,nhwc", how)


@pytest.mark.parametrize("count", [0, 2])
def test_there_must_be_one_image_input(count: int) -> None:
    if count:
        net = Net(lambda net, x, mask: x + mask)
        graph = capture(net, (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)))
    else:
        graph = capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    with pytest.raises(UsageError, match=r"needs a model with one image input.*this one takes \w+:f32"):
        attach(graph, "uint8,nhwc", "imagenet")


# ---------------------------------------------------------------- data


def paint(folder: Path, count: int) -> Tensor:
    """Pictures of noise; their pixels, red first."""
    pillow = pytest.importorskip("PIL.Image")
    made = pixels(count, seed=1)
    for i, one in enumerate(made):
        pillow.fromarray(one.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{i}.png")
    return made


@pytest.mark.parametrize("words", WORDS)
def test_folders_arrays_and_normalised_floats_become_the_same_pixels(words: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    rgb = paint(tmp_path / "photos", 6)
    for config in ("imagenet", "blue first", "offset"):
        graph, camera = graph_and_camera(words, written(tmp_path, config))
        known, expected = camera.preprocess, as_asked(rgb, words)

        def opened(source: object, graph: Graph = graph, camera: Camera = camera) -> Data:
            return open_data(source, graph.inputs, preprocess=camera)

        ordered = rgb.flip(1) if camera.order == "bgr" else rgb
        photos = opened(tmp_path / "photos")
        assert torch.equal(joined(photos), expected)
        assert set(photos.facts["preprocess"]) == {"source", "resize", "interpolation"}
        for array in (
            ordered,
            ordered.permute(0, 2, 3, 1),
            ordered.long(),
            known.pixels(rgb),
            expected.byte(),
        ):
            data = opened(array)
            assert joined(data).dtype == camera.dtype and torch.equal(joined(data), expected)
            assert set(data.facts["preprocess"]) == {"source", "interpolation"}


def test_what_were_no_pixels_is_refused() -> None:
    graph, camera = graph_and_camera("uint8,nhwc")
    floats = camera.preprocess.pixels(pixels(2))
    step = 1 / (255 * 0.229)  # one level of red

    def opened(value: Tensor) -> Data:
        return open_data({"input": value}, graph.inputs, preprocess=camera)

    opened(floats + 0.02 * step)
    for wrong in (floats + 0.2 * step, floats * 3, floats * float("nan"), torch.full((2, 12, 12, 3), 256)):
        with pytest.raises(
            DataError, match=r"the given arrays: pixels are whole numbers 0 to 255, and these are"
        ):
            opened(wrong)
    with pytest.raises(DataError, match="once the normalisation of imagenet is undone; pass them as uint8"):
        opened(torch.randn(2, 3, 12, 12))
    with pytest.raises(DataError, match=r"must come as \[n, 3, height, width\] or \[n, height, width, 3\]"):
        opened(torch.zeros(2, 1, 12, 12, dtype=torch.uint8))


def test_made_up_data_are_pixels() -> None:
    graph, _ = graph_and_camera("uint8,nhwc")
    (first, *_) = synthetic(graph.inputs, graph.example, samples=8)
    assert first.inputs[0].dtype == torch.uint8 and len(first.inputs[0].unique()) > 50


# ---------------------------------------------------------------- the whole line


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """In the working directory: net.pt2 with a free batch, photos/, and test.npz with labels, normalised."""
    monkeypatch.chdir(tmp_path)
    net = cnn()
    batch = torch.export.Dim("batch")
    torch.export.save(
        torch.export.export(net, (torch.randn(2, 3, 12, 12),), dynamic_shapes=({0: batch},)), "net.pt2"
    )
    Path("photos").mkdir()
    rgb = paint(Path("photos"), 40)
    how = preprocessing("imagenet", (12, 12))
    with torch.no_grad():
        labels = net(how.pixels(rgb)).argmax(1)
    np.savez("test.npz", x=how.pixels(rgb).numpy(), y=labels.numpy())
    return net


def test_the_command_line_end_to_end(made: nn.Module, run) -> None:
    words = ("--preprocess", "imagenet", "--image-input", "uint8,nhwc,bgr")
    code, _, err = run(
        "net.pt2", "--passes", "fold,int8", "--calib", "photos", "--eval", "test.npz", *words, "-o", "out",
        "--no-measure",
    )  # fmt: skip
    assert code == 0, err
    signature = json.loads(Path("out/signature.json").read_text())
    assert signature["inputs"] == [
        {"name": "input_1", "dtype": "u8", "shape": ["batch", 12, 12, 3], "layout": "NHWC", "channels": "BGR"}
    ]
    assert signature["preprocess"] == {
        "source": "imagenet", "resize": 13, "crop": [12, 12], "interpolation": "bilinear"
    }  # fmt: skip
    report = json.loads(Path("out/report.json").read_text())
    assert report["emitted"]["operators"]["QLinearConv"] == 2
    assert report["rows"][0]["metric"]["top1"] == 1.0 and report["rows"][-1]["total_db"] > 25
    assert run("verify", "net.pt2", "out/model.onnx", "--data", "photos", *words)[0] == 0
    code, _, err = run("verify", "net.pt2", "out/model.onnx")
    assert code == 8 and "pass the --image-input and --preprocess that it was compiled with" in err
    assert run("net.pt2", "--image-input", "uint8,nhwc")[0] == 2


def test_the_file_takes_pixels_and_agrees_with_torch(made: nn.Module) -> None:
    how = preprocessing("imagenet", (12, 12))
    for words in ("uint8,nhwc,bgr", "float32,nchw"):
        result = api.compress(
            "net.pt2", passes="fold", preprocess="imagenet", image_input=words, measure=False, output="out"
        )
        assert result.report["rows"][-1]["status"] == "proved", "made-up pixels move the outputs"
        signature = json.loads(Path("out/signature.json").read_text())
        assert signature["preprocess"]["crop"] == [12, 12], "also where no pictures were read"
        session = onnxruntime.InferenceSession(result.onnx)
        for count in (1, 3):
            rgb = pixels(count, seed=2)
            (seen,) = session.run(None, {session.get_inputs()[0].name: as_asked(rgb, words).numpy()})
            with torch.no_grad():
                assert close(torch.from_numpy(seen), made(how.pixels(rgb)))


def test_the_program_beside_it_takes_pixels_too(made: nn.Module) -> None:
    options = {"preprocess": "imagenet", "image_input": "uint8,nhwc"}
    rgb = pixels(40, seed=3)
    api.compress("net.pt2", passes="fold", emit="pt2", measure=False, output="out", **options)
    module = api.trainable("out/model.pt2")
    how = preprocessing("imagenet", (12, 12))
    with torch.no_grad():
        assert close(module(as_asked(rgb, "uint8,nhwc")), made(how.pixels(rgb)))
        assert close(api.trainable("net.pt2", **options)(as_asked(rgb, "uint8,nhwc")), made(how.pixels(rgb)))
    assert api.inspect("net.pt2", **options)["inputs"][0]["shape"] == ["batch", 12, 12, 3]
    again = api.compress(
        "out/model.pt2", passes="fold,int8", calibration=as_asked(rgb, "uint8,nhwc"), measure=False
    )
    assert (
        again.report["inputs"][0]["dtype"] == "u8"
        and again.report["emitted"]["operators"]["QLinearConv"] == 2
    )
