"""What Qualcomm's own compiler takes of models for targets `qnn` and `qnn-a16`, against what `--partitions qnn` says.

    pip install --no-deps --target DIR onnxruntime-qnn==2.7.0
    PYTHONPATH=$PWD:$PWD/tests/shim python benchmarks/qnn.py DIR     writes benchmarks/results/qnn.md

The wheel for x86-64 Linux holds the HTP's compiler and an emulator of it: no phone is needed, and no time is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
INT8 = "int8(rounding=nearest,equalise=false,measure=false)"
MODELS = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1")
SIZE = 64


def compiled(folder: Path) -> list[dict[str, Any]]:
    """One row a model and target, with what we say of it."""
    import torch
    import torchvision

    import compressor
    from compressor import delivery

    rows = []
    for name in MODELS:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None).eval()
        for target in ("qnn", "qnn-a16"):
            out = folder / f"{name}-{target}"
            compressor.compress(
                model, torch.randn(2, 3, SIZE, SIZE), passes=INT8, target=target, output=out, measure=False,
                calibration=[torch.randn(16, 3, SIZE, SIZE)],
            )  # fmt: skip
            (said,) = delivery.on_accelerators(out / "model.onnx", "qnn")
            rows.append({"model": name, "target": target, "folder": str(out), "said": said})
    return rows


def taken(folder: Path) -> dict[str, Any]:
    """What the provider takes of a model, in how many pieces, and what its emulator computes. In a process with it."""
    import onnx
    import onnxruntime as ort
    import onnxruntime_qnn
    from onnx import numpy_helper

    ort.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == "QNNExecutionProvider"]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_provider_for_devices(devices[:1], {"backend_path": onnxruntime_qnn.get_qnn_htp_path()})
    session = ort.InferenceSession(folder / "model.onnx", options)
    pieces = session.get_provider_graph_assignment_info()
    left = Counter(n.op_type for p in pieces if p.ep_name != "QNNExecutionProvider" for n in p.get_nodes())

    def arrays(kind: str) -> dict[str, np.ndarray]:
        files = sorted((folder / "test_data_set_0").glob(f"{kind}_*.pb"))
        protos = [onnx.TensorProto.FromString(f.read_bytes()) for f in files]
        return {p.name: numpy_helper.to_array(p).astype(np.float64) for p in protos}

    inputs = {name: value.astype(np.float32) for name, value in arrays("input").items()}
    (expected,) = arrays("output").values()
    error = np.square(session.run(None, inputs)[0] - expected).sum()
    return {
        "pieces": sum(p.ep_name == "QNNExecutionProvider" for p in pieces),
        "left": dict(left),
        "db": float(10 * np.log10(np.square(expected).sum() / error)) if error else float("inf"),
        "versions": {"onnxruntime": ort.__version__, "onnxruntime-qnn": onnxruntime_qnn.__version__},
    }


def main(wheel: str) -> None:
    from compressor import measure

    with tempfile.TemporaryDirectory() as place:
        rows = compiled(Path(place))
        for row in rows:
            path = os.pathsep.join((wheel, os.environ.get("PYTHONPATH", "")))
            done = subprocess.run(
                [sys.executable, __file__, "--taken", row["folder"]], env=os.environ | {"PYTHONPATH": path},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            row |= json.loads(done.stdout.splitlines()[-1])
            print(row["model"], row["target"], row["pieces"], row["left"], row["db"], flush=True)
    machine, versions = measure.machine(), measure.versions() | rows[0]["versions"]
    lines = [
        "# qnn",
        "",
        "- command: `PYTHONPATH=$PWD:$PWD/tests/shim python benchmarks/qnn.py DIR`",
        f"- date: {date.today()}",
        f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['isa']}; no Qualcomm hardware",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        "",
        "`said` is what `compress inspect --partitions qnn` says, `compiled` what the HTP's compiler took. Decibels:",
        "the HTP's emulator against ONNX Runtime on x86, for one sample; random weights, inputs of",
        f"{SIZE} x {SIZE}. No time was measured, and no phone was used.",
        "",
        "| model | target | operators | said: taken, pieces | compiled: pieces | falls back: said | compiled | dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        said = row["said"]
        ours = {r["operator"]: r["count"] for r in said["fallback"]}
        shown = [", ".join(f"{op} {n}" for op, n in sorted(some.items())) for some in (ours, row["left"])]
        lines.append(
            f"| {row['model']} | {row['target']} | {said['operators']} | {said['taken']}, {said['partitions']} | "
            f"{row['pieces']} | {shown[0]} | {shown[1]} | {row['db']:.1f} |"
        )
    (HERE / "results" / "qnn.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--taken":
        print(json.dumps(taken(Path(sys.argv[2]))))
    else:
        main(sys.argv[1])
