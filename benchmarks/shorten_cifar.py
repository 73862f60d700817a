"""shorten beside prune: top-1 and speed at equal MACs, in floats and in integers, without any training.

    python benchmarks/shorten_cifar.py [resnet20] [resnet56]      Markdown

Models and images of the shared folder: 256 training images calibrate, without labels, the 400 test images score (one is
0.25 points). Agreement: how many of 1,500 other training images, which the model knows, still get its answer. Speed:
ONNX Runtime, batch 1, one thread, in turns with the float file of the model as it came. Without VNNI integers have
weights of 7 bits (cpu-avx2).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "models"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks"), str(SHARED)]

import compressor  # noqa: E402
from compressor import measure, runtime  # noqa: E402

CALIBRATION, OTHERS, SECONDS = 256, 1500, 4.0
SHARES = (0.7, 0.6)
SPECS = ("prune(macs={})", "shorten(macs={})")
INT8 = "int8(rounding=nearest,measure=false)"


def row(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def compared(name: str, folder: Path) -> None:
    import cifar_resnet

    model, images, labels = cifar_resnet.load(name)
    seen, others = cifar_resnet.calibration(CALIBRATION + OTHERS, 0)[0].split([CALIBRATION, OTHERS])
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model.eval(), (images[:4],), dynamic_shapes=batch)
    specs = ["", *(spec.format(share) for share in SHARES for spec in SPECS)]
    found: dict[str, tuple[Any, Path, Path]] = {}
    for number, spec in enumerate(specs):
        made = []
        for end in ("", INT8):
            passes = ",".join(filter(None, (spec, "fold", end)))
            out = folder / f"{name}-{number}{'-int8' * bool(end)}"
            made.append(
                compressor.compress(program, passes=passes, calibration=[(seen,)], output=out, measure=False)
            )
        found[spec] = made[0].report, *(one.onnx for one in made)
    first = found[""][1]
    known = answers(first, others)
    for spec, (report, *files) in found.items():
        rows = {one["pass"]: one for one in report["rows"]}
        cells: list[Any] = []
        for file in files:
            top1 = 100 * float((answers(file, images) == labels.numpy()).mean())
            alike = 100 * float((answers(file, others) == known).mean())
            times = measure.bench([first, file], feeds=[images[:1].numpy()], seconds=SECONDS)
            cells += [f"{top1:.2f}", f"{alike:.1f}", str(measure.ratio(*times))]
        cut = rows[spec.partition("(")[0]] if spec else rows["input"]
        macs, params = (rows["fold"][key] / rows["input"][key] for key in ("macs", "params"))
        decibels = f"{rows['fold']['total_db']:.1f}" if spec else ""
        row(
            f"{name}, {spec or 'as it came'}",
            f"{macs:.2f}",
            f"{params:.2f}",
            decibels,
            *cells,
            f"{cut['seconds']:.0f}",
        )


def answers(file: Path, images: torch.Tensor) -> Any:
    """Indices of the largest logits [N]."""
    session = runtime.session(file, threads=1, exact=True)
    return np.concatenate([runtime.run(session, [part.numpy()])[0].argmax(1) for part in images.split(100)])


def main(names: Sequence[str]) -> int:
    print(f"{measure.machine()['cpu']}, {measure.machine()['isa']}, {measure.versions()}\n")
    row(
        "model and pass", "MACs", "params", "SQNR dB", "top-1", "agreement", "speed", "int8 top-1",
        "int8 agreement", "int8 speed", "seconds",
    )  # fmt: skip
    print(f"|{'---|' * 11}")
    for name in names or ("resnet20", "resnet56"):
        with tempfile.TemporaryDirectory() as folder:
            compared(name, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
