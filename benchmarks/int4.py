"""int4 on a llama of half a billion weights in bfloat16: size, error layer by layer, memory and time.

    python benchmarks/int4.py [--small]       Markdown on standard output; 8 GB of disk in the temporary folder

Random weights, built here. Each run is a process of its own that has imported torch, transformers, peft and ONNX
Runtime before it is watched; what it and its children take on top of that is counted. Bound: 1.5 times the model in
half precision. Errors: each product on what it reads in the float model, from 64 tokens, in PyTorch; weights that are
not random are rounded better or worse, by how far their outliers stand out. Speed: batch 1, one thread, in turns.
Exit code 1 where the memory is over its bound.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import merge_large  # noqa: E402
import zoo  # noqa: E402, F401  defines what torchvision needs, before it is imported

BOUND, TOKENS, SECONDS = 1.5, 64, 8.0
CONFIG = {
    **merge_large.CONFIG, "dtype": "bfloat16", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
SMALL = {**CONFIG, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
SPECS = {
    "int4": "int4",
    "int4, blocks of 128": "int4(block=128)",
    "8 bits, weights alone": "int8(scheme=weight)",
    "int4, then fp16": "int4,fp16",
}


def table(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def layers(folder: Path, bits: int, block: int) -> Iterator[tuple[str, float]]:
    """Site of each product, and how many dB its output stands above what rounding its weight makes of it."""
    import torch

    from compressor.blockwise import dequantise_blocks, quantise_blocks
    from compressor.opening import Options, capture_model, load_model
    from compressor.ops import is_constant, kind

    opt = Options.of({})
    graph = capture_model(load_model(str(folder), opt), None, opt)
    ids = [torch.randint(5, CONFIG["vocab_size"], (1, TOKENS)), torch.ones(1, TOKENS, dtype=torch.int64)]
    live: dict[Any, Any] = {}
    for node, value in graph.values(*ids[: len(graph.inputs)]):
        live[node] = value
        if kind(node) == "linear" and is_constant(node.args[1]):
            weight = graph.tensor(node.args[1])
            blocks = quantise_blocks(weight, bits, block)
            made = dequantise_blocks(blocks.packed, blocks.scales, blocks.zeros, bits, block, weight.shape[1])
            noise = torch.nn.functional.linear(live[node.args[0]], made - weight)
            yield node.args[1].target, 10 * math.log10(float(value.square().sum() / noise.square().sum()))
        for source in node.all_input_nodes:
            if all(user in live for user in source.users):
                live.pop(source, None)


def main() -> int:
    from compressor import measure

    config = SMALL if "--small" in sys.argv else CONFIG
    print(f"{measure.machine()['cpu']}, {measure.machine()['isa']}, {measure.versions()}\n")
    over = False
    with tempfile.TemporaryDirectory(prefix="int4-") as scratch:
        folder = Path(scratch)
        size = merge_large.build(folder / "base", config)
        shape = f"{config['num_hidden_layers']} layers of {config['hidden_size']}"
        print(f"llama of {shape}: {size / 2e6:.0f} million weights")
        table("passes", "file MB", "to half precision", "peak MB", "to half precision", "seconds")
        files = {}
        for name, spec in {"float": "fold", **SPECS}.items():
            report, watch = merge_large.run(
                model=folder / "base", output=folder / name, passes=spec, measure=False
            )
            files[name] = folder / name / "model.onnx"
            own, made = (watch.anonymous - watch.start) * 2**20, report["emitted"]["bytes"]
            over |= name == "int4" and own > BOUND * size
            ratios = f"{made / size:.2f}", f"{own / size:.2f}"
            row(
                name,
                f"{made / 1e6:.0f}",
                ratios[0],
                f"{own / 1e6:.0f}",
                ratios[1],
                f"{report['seconds']:.0f}",
            )
            if name == "int4":
                steps = [
                    (step, part["peak_anonymous_mb"] - watch.start) for step, part in report["steps"].items()
                ]
        print(
            "\nint4, step by step, MB above the imports:", ", ".join(f"{name} {mb:.0f}" for name, mb in steps)
        )
        table("dB of each product", "mean", "least", "where")
        for bits, block in ((4, 32), (4, 128), (8, 32)):
            found = dict(layers(folder / "base", bits, block))
            least = min(found, key=found.__getitem__)
            mean = statistics.fmean(found.values())
            row(f"{bits} bits, blocks of {block}", f"{mean:.1f}", f"{found[least]:.1f}", least)
        table("speed", "1 token", "16 tokens")
        for name, cells in speeds(files).items():
            row(name, *cells)
    return int(over)


def speeds(files: dict[str, Path]) -> dict[str, list[str]]:
    import numpy as np

    from compressor import measure

    found: dict[str, list[str]] = {name: [] for name in files}
    for length in (1, 16):
        feeds = [np.ones((1, length), np.int64)] * 2
        times = measure.bench_alone(list(files.values()), feeds=feeds, seconds=SECONDS)
        for name, one in zip(files, times, strict=True):
            ratio = "" if one is times[0] else f", {measure.ratio(times[0], one)}"
            found[name].append(f"{one.median_ms:.1f} ms{ratio}")
    return found


if __name__ == "__main__":
    sys.exit(main())
