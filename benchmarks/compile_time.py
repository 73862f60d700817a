"""How long a ResNet-50 takes to become a verified int8 file, and how much memory, beside the usual chain of tools.

    python benchmarks/compile_time.py [SPEC ...]     Markdown on standard output; without SPEC those of the table

The chain: torch.onnx.export, quant_pre_process, quantize_static with its fastest settings (min-max; u8 activations,
s8 weights per channel). It neither checks the file nor times it; ours captures, proves every step, emits, verifies in
ONNX Runtime and times the result. 256 pictures of 224, random weights whose batch norms know them, both cores. Each
run is a process of its own; peaks are of anonymous memory of the process and its children, above its imports. Exit
code 1 where the first spec takes longer, or more memory, than the chain.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import int8  # noqa: E402
import zoo  # noqa: E402  defines what torchvision needs, before it is imported
from onnxruntime.quantization import (  # noqa: E402
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: E402

import compressor  # noqa: E402
from compressor.measure import MemoryWatch  # noqa: E402

COUNT = 256
SPECS = ("fold,int8(equalise=false,rounding=nearest)", "fold,int8(rounding=nearest)", "fold,int8")


def model_and_pictures() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model, pictures = zoo.torchvision_model("resnet50"), int8.pictures(COUNT)
    int8.measured(model, pictures[:16])
    return model, pictures


class Reader(CalibrationDataReader):
    def __init__(self, pictures: np.ndarray) -> None:
        self.left: Iterator[np.ndarray] = iter(np.split(pictures, COUNT))

    def get_next(self) -> dict[str, np.ndarray] | None:
        one = next(self.left, None)
        return None if one is None else {"x": one}


def chain(folder: Path, _: str) -> int:
    model, pictures = model_and_pictures()
    start, ready, done = (folder / f"{name}.onnx" for name in ("float", "ready", "int8"))
    torch.onnx.export(
        model, (pictures[:2],), start, dynamo=True, input_names=["x"], verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False,
    )  # fmt: skip
    quant_pre_process(str(start), str(ready))
    quantize_static(
        str(ready), str(done), Reader(pictures.numpy()), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return done.stat().st_size


def ours(folder: Path, spec: str) -> int:
    model, pictures = model_and_pictures()
    batches = list(pictures.split(32))
    made = compressor.compress(model, pictures[:2], passes=spec, calibration=batches, output=folder / "out")
    return int(made.report["emitted"]["bytes"])


def watched(work: Callable[[Path, str], int], spec: str) -> tuple[float, float, int]:
    """Seconds, MB and bytes of one run, without what model and pictures take to make."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        model_and_pictures()
        made = time.perf_counter() - begin
        with MemoryWatch() as watch:
            begin = time.perf_counter()
            size = work(Path(folder), spec)
            seconds = time.perf_counter() - begin - made
    return seconds, (watch.anonymous or 0.0) - (watch.start or 0.0), size


def main() -> int:
    specs = sys.argv[1:] or SPECS
    print("| ResNet-50, 256 pictures | seconds | to the chain | peak MB | to the chain | file MB |")
    print(f"|{'---|' * 6}", flush=True)
    rows: list[tuple[float, float]] = []
    for name in ("torch.onnx.export, quant_pre_process, quantize_static", *specs):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak, size = pool.apply(watched, (ours if rows else chain, name))
        rows.append((seconds, peak))
        first = rows[0]
        print(
            f"| {name} | {seconds:.0f} | {seconds / first[0]:.2f}x | {peak:.0f} | {peak / first[1]:.2f}x | "
            f"{size / 1e6:.1f} |",
            flush=True,
        )
    return int(any(mine > theirs for mine, theirs in zip(rows[1], rows[0], strict=True)))


if __name__ == "__main__":
    sys.exit(main())
