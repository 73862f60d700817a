"""What a model answers on the machine that this runs on.

    python answers.py MODEL INPUTS.npz ANSWERS.npz [COUNT]

Runs here and under qemu, so it needs NumPy and ONNX Runtime alone. INPUTS has arrays by the names of the inputs; COUNT
samples are taken, all without it. `sample.npz` beside the model, of the same form, is answered as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

BATCH = 16  # where the model leaves it free


def run(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray], count: int | None) -> np.ndarray:
    """The first output for each sample, in pieces of the size that the model takes."""
    named = {one.name: inputs[one.name][:count] for one in session.get_inputs()}
    fixed = session.get_inputs()[0].shape[0]
    size = fixed if isinstance(fixed, int) else BATCH
    starts = range(0, len(next(iter(named.values()))), size)
    return np.concatenate(
        [session.run(None, {name: a[i : i + size] for name, a in named.items()})[0] for i in starts]
    )


def main(model: str, inputs: str, answers: str, count: str = "") -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found = run(session, np.load(inputs), int(count) if count else None)
    sample = run(session, np.load(Path(model).with_name("sample.npz")), None)
    part = Path(f"{answers}.part")
    with part.open("wb") as file:
        np.savez(file, answers=found, sample=sample, release=ort.__version__)
    os.replace(part, answers)  # so that an interrupted run leaves nothing that looks whole


if __name__ == "__main__":
    main(*sys.argv[1:])
