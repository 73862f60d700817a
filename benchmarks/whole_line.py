"""The command as a user types it, in a process of its own: accuracy, size, speed, wall time and peak memory.

The digits demo, ResNet-20 and ResNet-56 with their trained weights (read from ../shared), and the time to start.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from compressor import runtime

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "models"


def timed(words: list[str], cwd: Path) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of one process; its output is shown if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = process.stdout.read()  # type: ignore[union-attr]
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(output)
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def compress(words: list[str], cwd: Path) -> dict:
    seconds, peak = timed(["-m", "compressor", *words, "--output", "out"], cwd)
    report = json.loads((cwd / "out" / "report.json").read_text())
    emitted, last = report["emitted"], report["rows"][-1]
    return {
        "before": report["rows"][0]["metric"]["top1"],
        "after": emitted["metric"]["top1"],
        "sqnr": min(c["sqnr_db"] for c in last["checks"] if isinstance(c["sqnr_db"], float)),
        "emitted": min(c["sqnr_db"] for c in emitted["checks"] if isinstance(c["sqnr_db"], float)),
        "smaller": emitted["float_bytes"] / emitted["bytes"],
        "faster": emitted["latency"]["ratio"],
        "spread": emitted["latency"]["spread"],
        "contracts": ", ".join(f"{r['pass']} {r['status']}" for r in report["rows"][1:]),
        "floats": len(runtime.float_operators_inside(cwd / "out" / "model.onnx")),
        "seconds": seconds,
        "peak": peak,
    }


def cifar(name: str, folder: Path) -> dict:
    sys.path.append(str(SHARED))
    import cifar_resnet

    model, x, y = cifar_resnet.load(name)
    torch.save(model.state_dict(), folder / f"{name}.pth")
    np.savez(folder / "test.npz", x=x.numpy(), y=y.numpy())
    x, y = cifar_resnet.calibration(256)
    np.savez(folder / "calib.npz", x=x.numpy(), y=y.numpy())
    source = f"{SHARED / 'cifar_resnet.py'}:CifarResNet({name.removeprefix('resnet')})"
    data = ["--calib", "calib.npz", "--eval", "test.npz"]
    return compress(
        [f"{name}.pth", "--model", source, "--input", "x:f32[?,3,32,32]", "--passes", "int8", *data], folder
    )


def digits(folder: Path) -> dict:
    training, _ = timed([str(ROOT / "examples" / "digits.py")], folder)
    words = [
        "digits.pt2",
        "--passes",
        "merge,prune,int8",
        "--calib",
        "digits.npz",
        "--eval",
        "digits-test.npz",
    ]
    return compress(words, folder) | {"training": training}


def starts(words: list[str]) -> float:
    return statistics.median(timed(words, ROOT)[0] for _ in range(7))


def main() -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {"digits: merge,prune,int8": digits}
        if SHARED.is_dir():
            jobs |= {f"{n}: int8": lambda folder, n=n: cifar(n, folder) for n in ("resnet20", "resnet56")}
        for name, job in jobs.items():
            folder = Path(scratch) / name.split(":")[0]
            folder.mkdir()
            rows[name] = job(folder)
    print(
        "| model: passes | top-1 before -> after | output SQNR | file vs fp32 ONNX | latency vs fp32 ONNX |"
    )
    print("|---|---|---|---|---|")
    for name, r in rows.items():
        low, high = r["spread"]
        print(
            f"| {name} | {r['before']:.2%} -> {r['after']:.2%} | {r['sqnr']:.1f} dB | {r['smaller']:.2f}x smaller "
            f"| {r['faster']:.2f}x faster ({low:.2f}-{high:.2f}) |"
        )
    print("\n| model: passes | contracts | file vs graph | float operators inside | wall | peak memory |")
    print("|---|---|---|---|---|---|")
    for name, r in rows.items():
        print(
            f"| {name} | {r['contracts']} | {r['emitted']:.1f} dB | {r['floats']} | {r['seconds']:.1f} s "
            f"| {r['peak']:.0f} MB |"
        )
    print(f"\nTraining the digits network took {rows['digits: merge,prune,int8']['training']:.0f} s.")
    print(
        f"`compress --help` starts in {starts(['-m', 'compressor', '--help']) * 1e3:.0f} ms, "
        f"`import compressor` in {starts(['-c', 'import compressor']) * 1e3:.0f} ms "
        f"(of which Python itself {starts(['-c', 'pass']) * 1e3:.0f} ms)."
    )
    print("\nLatency: one thread, batch 1, interleaved, median ratio with quartiles. 256 calibration images.")


if __name__ == "__main__":
    main()
