"""A llama of 3 GB in float32 through `merge,fold,fp16` and `int4`: memory, time, and files that ONNX Runtime ran.

    python benchmarks/large.py [--small]      Markdown on standard output; 10 GB of disk in the temporary folder

Random weights, built here. Each run is a process of its own that has imported torch, transformers, peft and ONNX
Runtime before it is watched; what it and its children take on top of that is counted. Exit code 1 where that is over
1.5 times the model's bytes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import merge_large  # noqa: E402

BOUND = 1.5
CONFIG = {**merge_large.CONFIG, "num_hidden_layers": 14}
SMALL = {**CONFIG, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
SPECS = ("merge,fold,fp16", "int4")


def main() -> int:
    config = SMALL if "--small" in sys.argv[1:] else CONFIG
    over = False
    with tempfile.TemporaryDirectory(prefix="large-") as scratch:
        folder = Path(scratch)
        size = merge_large.build(folder / "model", config)
        mb = size / 2**20
        print(
            f"llama, {config['num_hidden_layers']} layers of {config['hidden_size']}, {config['vocab_size']} words, "
            f"float32: {size / 1e9:.2f} GB in shards.\n"
        )
        print(
            "| passes | peak anonymous | of the model | peak resident | file | beside it | ONNX to graph | seconds |"
        )
        print(f"|{'---|' * 8}", flush=True)
        slowest = []
        for spec in SPECS:
            report, watch = merge_large.run(model=folder / "model", passes=spec, output=folder / "out")
            own = watch.anonymous - watch.start
            over |= own > BOUND * mb
            weights = folder / "out" / "model.onnx.data"
            beside = f"{weights.stat().st_size / 1e9:.2f} GB" if weights.exists() else "nothing"
            check = report["emitted"]["checks"][0]
            print(
                f"| {spec} | {own:.0f} MB | {own / mb:.2f}x | {watch.resident:.0f} MB | "
                f"{report['emitted']['bytes'] / 1e9:.2f} GB | {beside} | {float(check['sqnr_db']):.0f} dB | "
                f"{report['seconds']:.0f} |",
                flush=True,
            )
            name, step = max(report["steps"].items(), key=lambda item: item[1]["peak_anonymous_mb"])
            slowest.append(f"{name}: {(step['peak_anonymous_mb'] - watch.start) / mb:.2f}x ({spec})")
            shutil.rmtree(folder / "out")
    print(f"\nBound: {BOUND} times the model. The peak is in {', '.join(slowest)}.")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
