"""int8 of ResNet-20 and ResNet-56 trained on CIFAR-10: accuracy, noise, speed, and what ONNX Runtime makes of it.

    python benchmarks/int8_cifar.py [MODEL ...]      a markdown table on standard output; needs the shared folder

256 calibration images, the 400 test images, one thread, batch 1; int8 and float run in turns. Exit code 1 where a
model loses over half a point, is under 27 dB, under twice as fast, or not all-integer.
"""

from __future__ import annotations

import datetime
import math
import platform
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT.parent / "shared" / "models"
sys.path[:0] = [str(ROOT), str(MODELS)]

from compressor import measure, runtime  # noqa: E402
from compressor.capture import capture  # noqa: E402
from compressor.data import open_data  # noqa: E402
from compressor.emit import emit  # noqa: E402
from compressor.pipeline import Context, Outcome, Pass  # noqa: E402
from passes.fold import Fold  # noqa: E402
from passes.int8 import Int8  # noqa: E402
from targets.cpu import CPU  # noqa: E402

CALIBRATION = 256
SETTINGS = (Int8(), Int8(calibration="minmax"))
COLUMNS = ("model", "pass", "top-1 fp32", "top-1 int8", "SQNR dB", "runtime to simulation dB", "times faster",
           "all-integer", "MB fp32", "MB int8")  # fmt: skip


def row(name: str, config: Int8, folder: Path) -> tuple[str, bool]:
    """One row of the table, and whether it meets every bar."""
    import cifar_resnet

    model, images, labels = cifar_resnet.load(name)
    graph = capture(model, images[:2])
    samples = open_data([(cifar_resnet.calibration(CALIBRATION)[0],)], graph.inputs)
    ctx = Context(CPU, samples, samples)
    apply(Fold(), graph, ctx)
    plain = emit(graph, folder / "float.onnx")
    (expected,) = graph.run(images)
    apply(config, graph, ctx)
    small = emit(graph, folder / "int8.onnx")
    (simulated,) = graph.run(images)
    seen = torch.from_numpy(runtime.run(runtime.session(small.path, threads=1), [images.numpy()])[0])
    timed = measure.bench([plain.path, small.path], feeds=[images[:1].numpy()], threads=1, seconds=6)
    faster, floats = measure.ratio(timed[0], timed[1]), runtime.float_operators_inside(small.path)
    before, after = (float((logits.argmax(1) == labels).float().mean()) * 100 for logits in (expected, seen))
    sqnr = noise(expected, seen)
    cells = (
        name, config, f"{before:.2f}", f"{after:.2f}", f"{sqnr:.1f}", f"{noise(simulated, seen):.1f}", faster,
        "yes" if not floats else f"no: {', '.join(floats[:3])}", f"{plain.bytes / 1e6:.2f}", f"{small.bytes / 1e6:.2f}",
    )  # fmt: skip
    met = after >= before - 0.5 and sqnr >= 27 and faster.median >= 2 and not floats
    return f"| {' | '.join(map(str, cells))} |", met


def apply(one: Pass, graph, ctx: Context) -> None:
    result = one.run(graph, ctx)
    for _ in [result] if isinstance(result, Outcome) else result:
        graph.clean()
        graph.check()


def noise(expected: Tensor, seen: Tensor) -> float:
    """Signal over quantisation noise, in dB."""
    return -10 * math.log10(float((expected - seen).square().sum() / expected.square().sum()))


def main(names: list[str]) -> int:
    if not MODELS.is_dir():
        print(f"skipped: the trained models are not in {MODELS}")
        return 0
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}; one thread, target {CPU.name}\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for name in names or ("resnet20", "resnet56"):
            for config in SETTINGS:
                line, met = row(name, config, Path(folder))
                print(line, flush=True)
                good &= met
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
