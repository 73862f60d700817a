"""Merges every PEFT method that has a linear form into a small llama, and counts the operators that are left.

    python benchmarks/merge_peft.py [METHOD ...]      a markdown table on standard output

Random adapters: every parameter is moved from where its method starts, where many are the identity. A method counts
as merged when the graph has as many linears as the model without it. Exit code 1 where an output moved by over 1e-5.
"""

from __future__ import annotations

import runpy
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
SHIM = runpy.run_path(
    str(ROOT / "tests" / "shim" / "sitecustomize.py")
)  # kept: it holds the operators' definitions

from compressor.capture import capture  # noqa: E402
from compressor.data import synthetic  # noqa: E402
from compressor.errors import CompressorError  # noqa: E402
from compressor.ir import Graph  # noqa: E402
from compressor.ops import kind  # noqa: E402
from compressor.pipeline import Context, Pipeline, Row  # noqa: E402
from passes.merge import Merge  # noqa: E402
from targets.cpu import CPU  # noqa: E402

TARGETS = ["q_proj", "v_proj", "down_proj", "up_proj"]
METHODS: dict[str, tuple[str, dict]] = {
    "LoRA": ("LoraConfig", {"r": 4}),
    "rsLoRA": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "LoRA with bias": ("LoraConfig", {"r": 4, "lora_bias": True}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "target_r": 4, "total_step": 10}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "LoHa": ("LoHaConfig", {"r": 4}),
    "LoKr": ("LoKrConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"oft_block_size": 8}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8}),
    "VeRA": ("VeraConfig", {"r": 4}),
    "PVeRA": ("PveraConfig", {"r": 4}),
    "VBLoRA": ("VBLoRAConfig", {"r": 4, "num_vectors": 8, "vector_length": 8}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 20}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 20}),
    "HRA": ("HRAConfig", {"r": 4}),
    "MiSS": ("MissConfig", {"r": 4}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "RoAd": ("RoadConfig", {"group_size": 8}),
    "HiRA": ("HiraConfig", {"r": 4}),
    "DeLoRA": ("DeloraConfig", {"r": 4}),
    "GraLoRA": ("GraloraConfig", {"r": 4}),
    "RandLoRA": ("RandLoraConfig", {"r": 4}),
    "TinyLoRA": ("TinyLoraConfig", {"r": 2}),
    "PSOFT": ("PsoftConfig", {"r": 4}),
    "OSF": ("OSFConfig", {}),
    "GLoRA": ("GloraConfig", {"r": 4}),
    "UniLoRA": ("UniLoraConfig", {"r": 4}),
    "BEFT": ("BeftConfig", {}),
    "Peanut": ("PeanutConfig", {"r": 4}),
    "DEFT": ("DeftConfig", {"r": 4}),
    "Lily": ("LilyConfig", {"r": 4}),
    "SHiRA": ("ShiraConfig", {"r": 4}),
}


class Logits(nn.Module):
    """[batch, tokens] to [batch, tokens, words]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(name: str) -> nn.Module:
    import peft

    cls, options = METHODS[name]
    try:
        config = getattr(peft, cls)(target_modules=TARGETS, **options)
    except TypeError:  # methods that have no rank
        config = getattr(peft, cls)(target_modules=TARGETS)
    model = peft.get_peft_model(llama(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def merge(model: nn.Module) -> tuple[Graph, Graph, Row]:
    before = capture(Logits(model), (torch.randint(0, 50, (2, 5)),))
    after = before.copy()
    held_out = synthetic(before.inputs, before.example, samples=4, table_sizes={before.inputs[0].name: 50})
    return before, after, Pipeline([Merge()], {}).run(after, Context(CPU, held_out))[-1]


def linears(graph: Graph) -> int:
    return sum(kind(n) in ("linear", "matmul", "addmm", "einsum") for n in graph.nodes)


def rows(names: list[str]) -> Iterator[tuple[str, float]]:
    _, plain, _ = merge(llama())
    base, operators = linears(plain), len(plain.nodes)
    yield f"| the model without adapters | {operators} | {base} | | | |", 0.0
    for name in names:
        start = time.perf_counter()
        try:
            before, after, row = merge(adapted(name))
        except CompressorError as error:
            yield f"| {name} | | | | | {str(error)[:150]} |", 0.0
            continue
        error = max((c.error for c in row.checks), default=0.0)
        said = "; ".join(sorted({d.reason for d in row.declines})[:2]) if linears(after) != base else ""
        cells = (
            name, f"{len(before.nodes)} -> {len(after.nodes)}", f"{linears(before)} -> {linears(after)}",
            f"{error:.1e}, {row.status}", f"{time.perf_counter() - start:.1f} s", said,
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |", error


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    print(
        "| method | nodes | linears and products | outputs moved by | capture and merge | left alone because |"
    )
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for text, error in rows(names or list(METHODS)):
        print(text, flush=True)
        worst = max(worst, error)
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
