"""Merges LoRA on every linear of a llama of 2 GB, sharded safetensors in, ONNX with external data out: memory and time.

    python benchmarks/merge_large.py          Markdown on standard output; 7 GB of disk in the temporary folder

Random weights, built here. The run is a process of its own that has imported torch, transformers, peft and ONNX
Runtime before it is watched; what it and its children take on top of that is counted. Exit code 1 where that is over
1.3 times the model's bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BOUND = 1.3
RANK, SHARD = 8, 500_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 16,
    "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# ------------------------------------------------------------------------- the model


def shapes(config: dict[str, Any] = CONFIG) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight, in order."""
    width, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    attention = {
        "q_proj": (width, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, width),
    }
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    yield "model.embed_tokens.weight", (words, width)
    for i in range(config["num_hidden_layers"]):
        yield from ((f"model.layers.{i}.self_attn.{name}.weight", shape) for name, shape in attention.items())
        yield from ((f"model.layers.{i}.mlp.{name}.weight", shape) for name, shape in mlp.items())
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{norm}.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (words, width)


def build(folder: Path, config: dict[str, Any] = CONFIG) -> int:
    """A model of random weights, a shard at a time; answers the bytes of its weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    dtype = getattr(torch, config["dtype"])
    shards: list[list[tuple[str, torch.Size]]] = [[]]
    total = held = 0
    for name, shape in shapes(config):
        size = torch.Size(shape)
        taken = dtype.itemsize * size.numel()
        if held and held + taken > SHARD:
            shards.append([])
            held = 0
        shards[-1].append((name, size))
        held, total = held + taken, total + taken
    files: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        drawn = {n: torch.ones(s) if len(s) == 1 else torch.randn(s).mul_(0.02) for n, s in shard}
        drawn = {n: t.to(dtype) for n, t in drawn.items()}
        save_file(drawn, folder / file, metadata={"format": "pt"})
        files |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def adapt(folder: Path) -> int:
    """A LoRA on every linear of every layer; answers how many."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": LINEARS,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    drawn = {}
    for name, shape in shapes():
        if "_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            drawn[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.05
            drawn[f"{stem}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.05
    save_file(drawn, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return len(drawn) // 2


# ------------------------------------------------------------------------- the run


CHILD = """
import json, runpy, sys
shim = runpy.run_path("tests/shim/sitecustomize.py")
import onnxruntime, peft, torch, transformers
import compressor
print("imported", flush=True)
sys.stdin.readline()
words = json.loads(sys.argv[1])
report = compressor.compress(words.pop("model"), **{"passes": "merge"} | words).report
print(json.dumps({k: report[k] for k in ("emitted", "rows", "seconds", "steps")}, default=str))
"""


def run(**words: Any) -> tuple[dict[str, Any], Any]:
    """The report of one run in a process of its own, a merge if no passes are named, and the watch over it."""
    from compressor.measure import MemoryWatch

    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(words, default=str)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
    )
    with child:
        child.stdout.readline()  # type: ignore[union-attr]
        with MemoryWatch(child.pid, interval=0.02) as watch:
            answer, _ = child.communicate("\n")
    if child.returncode:
        raise SystemExit(f"the run ended with code {child.returncode}")
    return json.loads(answer), watch


def main() -> int:
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="merge-large-") as scratch:
        folder = Path(scratch)
        size = build(folder / "base")
        count = adapt(folder / "lora")
        merged, watch = run(model=folder / "base", adapter=str(folder / "lora"), output=folder / "merged")
        run(model=folder / "base", output=folder / "plain", measure=False)
        speed = ratio(folder / "plain" / "model.onnx", folder / "merged" / "model.onnx")
    mb = size / 2**20
    own = watch.anonymous - watch.start
    print(
        f"llama, {CONFIG['num_hidden_layers']} layers of {CONFIG['hidden_size']}, {CONFIG['vocab_size']} words, "
        f"float32: {size / 1e9:.2f} GB in shards of {SHARD / 1e6:.0f} MB; LoRA of rank {RANK} on all {count} linears.\n"
    )
    emitted = merged["emitted"]
    check = emitted["checks"][0]
    last = merged["rows"][-1]
    linears = sum("into one linear" in rewrite["what"] for rewrite in last["rewrites"])
    moved = last["checks"][0]["error"]
    rows = {
        "peak anonymous memory above the imports": f"{own:.0f} MB, {own / mb:.2f} x the model (bound {BOUND})",
        "peak resident memory": f"{watch.resident:.0f} MB, mapped files included",
        "imports (torch, transformers, peft, ONNX Runtime)": f"{watch.start:.0f} MB",
        "linears merged": f"{linears} of {count}, {last['status']}, outputs moved by {moved:.1e}",
        "ONNX against torch": f"error {check['error']:.1e}, {float(check['sqnr_db']):.0f} dB",
        "file": f"{emitted['bytes'] / 1e9:.2f} GB, weights in model.onnx.data",
        "latency, merged against base": f"{speed} of the base model's speed",
        "latency, merged against un-merged": "{:.2f}x ({:.2f}-{:.2f})".format(
            emitted["latency"]["ratio"], *emitted["latency"]["spread"]
        ),
        "time in all": f"{merged['seconds']:.0f} s",
    }
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    print("\n| step | time | peak anonymous memory above the imports |\n|---|---|---|")
    for name, step in merged["steps"].items():
        peak = step["peak_anonymous_mb"] - watch.start
        print(f"| {name} | {step['seconds']:.1f} s | {peak:.0f} MB, {peak / mb:.2f} x |")
    print(
        "\nLatency: 1 thread, one sample of 16 tokens; one model in memory at a time, each visited 4 times, in turns, "
        "no constant folded. ONNX Runtime packs a copy of every weight that a MatMul reads, as it does by default: "
        "that is the peak. Verifying maps the weights and packs none."
    )
    return int(own > BOUND * mb)


def ratio(base: Path, other: Path) -> Any:
    """How many times faster `other` is than `base`, on 16 tokens."""
    import numpy as np

    from compressor import measure

    feeds = [np.ones((1, 16), np.int64)] * 2
    return measure.ratio(*measure.bench_alone([base, other], feeds=feeds, seconds=10))


if __name__ == "__main__":
    sys.exit(main())
