"""OpenVINO without ONNX Runtime, and NNCF: for a process of its own, since two OpenVINOs cannot be in one.

So it imports them where they are used.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
LAYERS = ("Convolution", "GroupConvolution", "FullyConnected")


def request(path: Path, counters: bool = False) -> Any:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERF_COUNT": counters,
    }  # fmt: skip
    return openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()


def answers(one: Any, samples: list[Arrays]) -> np.ndarray:
    """The last output of every sample."""
    last = one.model_outputs[-1]
    return np.concatenate([one.infer(feeds)[last].copy() for feeds in samples])


def milliseconds(one: Any, feeds: Arrays, seconds: float) -> list[float]:
    one.infer(feeds)
    found, end = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        one.infer(feeds)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def kernels(path: Path, feeds: Arrays) -> str:
    """Convolutions and linears that OpenVINO computes in integers, of all."""
    one = request(path, counters=True)
    one.infer(feeds)
    ran = [p.exec_type for p in one.get_profiling_info() if p.node_type.startswith(LAYERS)]
    return f"{sum(kind.lower().endswith('i8') for kind in ran)} of {len(ran)}"


def by_nncf(source: Path, samples: list[Arrays], transformer: bool, file: Path, own: Path) -> None:
    """Writes a float model in integers, as ONNX and in OpenVINO's format."""
    import nncf
    import onnx
    import openvino

    options: dict[str, Any] = {"subset_size": len(samples)}
    if transformer:
        options["model_type"] = nncf.ModelType.TRANSFORMER
    given = nncf.Dataset(samples)
    onnx.save(nncf.quantize(onnx.load(source), given, **options), file)
    openvino.save_model(
        nncf.quantize(openvino.Core().read_model(source), given, **options), own, compress_to_fp16=False
    )
