"""Every method of peft as data: a name, and what turns a model into an adapted one."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import config as lora_config
from torch import Tensor, nn

from .models import BLOCK, RANK, Called, GroupedLoRA, PooledLoRA, moved

TARGETS = (
    *("q_proj", "v_proj", "up_proj", "down_proj", "fc1", "fc2"),  # llama and ViT
    *("c_attn", "c_fc", "conv1", "conv2", "conv3"),  # GPT-2 and convolution nets
)  # fmt: skip
EMBEDDINGS, HEADS = ("embed_tokens", "wte"), ("lm_head", "classifier", "head")
NORMS = ("input_layernorm", "norm", "layernorm_before", "layernorm", "ln_1", "ln_f")

Adapt = Callable[[nn.Module, Tensor], nn.Module]  # of a model and an example input; edits the model


# -------------------------------------------------------------------- how


def use(config: str, **options: Any) -> Adapt:
    """A method that its configuration names. also: layers to adapt besides TARGETS."""
    return lambda model, example: peft.get_peft_model(model, configured(config, model, **options))


def configured(config: str, model: nn.Module, also: tuple[str, ...] = (), **options: Any) -> peft.PeftConfig:
    kind = getattr(peft, config)
    if "target_modules" in {field.name for field in dataclasses.fields(kind)}:
        options = {"target_modules": [*TARGETS, *also], **options}
    if hasattr(model, "lm_head"):
        options["task_type"] = "CAUSAL_LM"
    return kind(**options)


def lora(**options: Any) -> Adapt:
    return use("LoraConfig", **{"r": RANK, **options})


def eva(model: nn.Module, example: Tensor) -> nn.Module:
    """Starts from the principal directions of activations."""
    adapted = lora(init_lora_weights="eva", eva_config=lora_config.EvaConfig(rho=1.0))(model, example)
    peft.initialize_lora_eva_weights(
        adapted, [example] * 4, forward_fn=lambda m, x: Called(m)(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda seen, *_: seen[0].flatten(0, -2), show_progress_bar=False,
    )  # fmt: skip
    return adapted


def corda(model: nn.Module, example: Tensor) -> nn.Module:
    """Starts from a decomposition that covariances orient."""
    if "attr" not in sys.modules and importlib.util.find_spec("attr") is None:
        sys.modules["attr"] = types.ModuleType("attr")  # peft wants one name of it, and does not require it
        sys.modules["attr"].dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
    from peft.tuners.lora.corda import preprocess_corda

    start = {"init_lora_weights": "corda", "corda_config": lora_config.CordaConfig()}
    config = configured("LoraConfig", model, r=RANK, **start)
    preprocess_corda(model, config, run_model=lambda: [Called(model)(one) for one in example.split(1)])
    return peft.get_peft_model(model, config)


def lora_ga(model: nn.Module, example: Tensor) -> nn.Module:
    """Starts from gradients."""
    start = {"init_lora_weights": "lora_ga", "lora_ga_config": lora_config.LoraGAConfig()}
    config = configured("LoraConfig", model, r=RANK, **start)
    peft.preprocess_loraga(model, config, lambda: Called(model)(example).square().mean().backward())
    model.zero_grad()
    return peft.get_peft_model(model, config)


def together(
    *methods: tuple[str, dict[str, Any]], mixed: bool = False, scales: tuple[float, ...] = ()
) -> Adapt:
    """Several adapters at once on the same layers; scales: of each, for LoRA."""

    def adapt(model: nn.Module, example: Tensor) -> nn.Module:
        configs = [configured(name, model, **options) for name, options in methods]
        names = [f"adapter{i}" for i in range(len(configs))]
        adapted = peft.get_peft_model(model, configs[0], adapter_name=names[0], mixed=mixed)
        for name, config in zip(names[1:], configs[1:], strict=True):
            adapted.add_adapter(name, config)
        adapted.base_model.set_adapter(names)
        for part in adapted.modules() if scales else ():
            if hasattr(part, "set_scale"):
                for name, scale in zip(names, scales, strict=True):
                    part.set_scale(name, scale)
        return adapted

    return adapt


def combined(kind: str) -> Adapt:
    """Two LoRA that peft adds up into a third, weighted."""

    def adapt(model: nn.Module, example: Tensor) -> nn.Module:
        adapted = moved(together(("LoraConfig", {"r": RANK}), ("LoraConfig", {"r": RANK}))(model, example))
        names = ["adapter0", "adapter1"]
        adapted.add_weighted_adapter(names, [0.7, 0.4], "both", combination_type=kind, density=0.5)
        adapted.set_adapter("both")
        return adapted

    return adapt


def saved(model: nn.Module, folder: str, count: int = 2) -> dict[str, str]:
    """Name and folder of some LoRA for this model, on disk."""
    paths = {str(i): str(Path(folder) / str(i)) for i in range(count)}
    for path in paths.values():
        moved(lora(init_lora_weights=False)(copy.deepcopy(model), torch.empty(0))).save_pretrained(path)
    return paths


def x_lora(model: nn.Module, example: Tensor) -> nn.Module:
    """Experts weighted by a classifier of the hidden states."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": model.config.hidden_size, "xlora_size": BLOCK}
        return use("XLoraConfig", adapters=saved(model, folder), **sizes)(model, example)


def arrow(model: nn.Module, example: Tensor) -> nn.Module:
    """Experts weighted token by token."""
    with tempfile.TemporaryDirectory() as folder:
        paths = list(saved(model, folder).values())
        return peft.create_arrow_model(model, paths, lora_config.ArrowConfig(top_k=1))


def put(adapter: type[nn.Module]) -> Adapt:
    """A plain module in the place of every target."""

    def adapt(model: nn.Module, example: Tensor) -> nn.Module:
        for path, layer in list(model.named_modules()):
            if path.rpartition(".")[2] in TARGETS:
                model.set_submodule(path, adapter(layer))
        return model

    return adapt


def blocks(side: str) -> Adapt:
    """BD-LoRA whose factor `a` or `b` is block-diagonal."""
    targets = {f"target_modules_bd_{side}": list(TARGETS)}
    return lora(use_bdlora=lora_config.BdLoraConfig(nblocks=2, **targets))


# -------------------------------------------------------------------- the tables


LINEAR: Mapping[str, Adapt] = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "LoRA with bias": lora(lora_bias=True),
    "LoRA, all biases": lora(bias="all"),
    "LoRA and a trained head": lora(modules_to_save=list(HEADS)),
    "LoRA on weights": lora(target_modules=[], target_parameters=["q_proj.weight", "fc1.weight"]),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "EVA": eva,
    "CorDA": corda,
    "LoRA-GA": lora_ga,
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "BD-LoRA, blocks in A": blocks("a"),
    "BD-LoRA, blocks in B": blocks("b"),
    "KaSA": lora(kasa_config=lora_config.KasaConfig()),
    "VeLoRA": lora(velora_config=lora_config.VeloraConfig()),
    "MonteCLoRA": lora(monteclora_config=lora_config.MontecloraConfig(buffer_size=1)),
    "AdaLoRA": use("AdaLoraConfig", init_r=RANK, target_r=RANK, total_step=10),
    "AdaMSS": use("AdamssConfig", r=RANK, num_subspaces=2),
    "IA3": use("IA3Config", feedforward_modules=["down_proj", "fc2", "conv2"]),
    "BEFT": use("BeftConfig"),
    "LN tuning": use("LNTuningConfig", target_modules=list(NORMS)),
    "LoHa": use("LoHaConfig", r=RANK),
    "LoKr": use("LoKrConfig", r=RANK),
    "LoKr, both factors decomposed": use("LoKrConfig", r=2, decompose_both=True, decompose_factor=4),
    "OFT": use("OFTConfig", oft_block_size=BLOCK),
    "OFT, exact Cayley": use("OFTConfig", oft_block_size=BLOCK, use_cayley_neumann=False),
    "OFT, shared block": use("OFTConfig", oft_block_size=BLOCK, block_share=True),
    "COFT": use("OFTConfig", oft_block_size=BLOCK, coft=True, eps=1e-2),
    "BOFT": use("BOFTConfig", boft_block_size=BLOCK),
    "BOFT, two butterflies": use("BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=2),
    "HRA": use("HRAConfig", r=RANK),
    "HRA, Gram-Schmidt": use("HRAConfig", r=RANK, apply_GS=True),
    "PSOFT": use("PsoftConfig", r=RANK),
    "GLoRA": use("GloraConfig", r=RANK),
    "Poly, one task": use("PolyConfig", r=RANK, n_tasks=2, n_skills=2),
    "VeRA": use("VeraConfig", r=RANK),
    "PVeRA": use("PveraConfig", r=RANK),
    "FRoD": use("FrodConfig", progressbar=False),
    "VB-LoRA": use("VBLoRAConfig", r=RANK, num_vectors=8, vector_length=BLOCK),
    "Uni-LoRA": use("UniLoraConfig", r=RANK),
    "RandLoRA": use("RandLoraConfig", r=RANK),
    "RandLoRA, sparse": use("RandLoraConfig", r=RANK, sparse=True),
    "TinyLoRA": use("TinyLoraConfig", r=2),
    "FourierFT": use("FourierFTConfig", n_frequency=20),
    "WaveFT": use("WaveFTConfig", n_frequency=20),
    "WaveFT, no inverse": use("WaveFTConfig", n_frequency=20, use_idwt=False),
    "C3A": use("C3AConfig", block_size=BLOCK),
    "MiSS": use("MissConfig", r=RANK),
    "MiSS, mini": use("MissConfig", r=8, mini_r=4, init_weights="mini"),
    "Bone (MiSS, bat)": use("MissConfig", r=BLOCK, init_weights="bat"),
    "RoAd 1": use("RoadConfig", group_size=BLOCK),
    "RoAd 2": use("RoadConfig", group_size=BLOCK, variant="road_2"),
    "RoAd 4": use("RoadConfig", group_size=BLOCK, variant="road_4"),
    "HiRA": use("HiraConfig", r=RANK),
    "SHiRA": use("ShiraConfig", r=RANK),
    "OSF": use("OSFConfig", effective_rank=8),
    "DeLoRA": use("DeloraConfig", r=RANK),
    "GraLoRA": use("GraloraConfig", r=RANK),
    "GraLoRA, hybrid": use("GraloraConfig", r=RANK, hybrid_r=RANK),
    "Peanut": use("PeanutConfig", r=RANK),
    "Peanut, depth 1": use("PeanutConfig", r=RANK, depth=1),
    "Supertuning": use("SupertuningConfig", sparsity=0.9),
    "Supertuning and LoRA": use("SupertuningConfig", sparsity=0.9, r=RANK, lora_alpha=8),
    "DEFT": use("DeftConfig", r=RANK),
    "DEFT, QR": use("DeftConfig", r=RANK, decomposition_method="qr"),
    "DEFT, PaRa": use("DeftConfig", r=RANK, para=True),
    "Lily": use("LilyConfig", r=RANK),
    "QA-LoRA (plain module)": put(PooledLoRA),
    "LoRA + LoRA, scaled": together(("LoraConfig", {"r": 4}), ("LoraConfig", {"r": 8}), scales=(0.7, 0.4)),
    "LoRA + LoRA, added by cat": combined("cat"),
    "LoRA + LoRA, added by ties": combined("ties"),
    "DoRA + DoRA": together(("LoraConfig", {"use_dora": True}), ("LoraConfig", {"use_dora": True})),
    "LoRA + DoRA": together(("LoraConfig", {}), ("LoraConfig", {"use_dora": True})),
    "OFT + OFT": together(("OFTConfig", {"oft_block_size": 8}), ("OFTConfig", {"oft_block_size": 8})),
    "LoRA + LoHa + LoKr": together(("LoraConfig", {}), ("LoHaConfig", {}), ("LoKrConfig", {}), mixed=True),
}

PROMPT = {"num_virtual_tokens": 3}
LANGUAGE: Mapping[str, Adapt] = {
    "LoRA and embeddings": lora(also=EMBEDDINGS),
    "DoRA and embeddings": lora(also=EMBEDDINGS, use_dora=True),
    "LoRA and the head": lora(also=HEADS),
    "LoRA, embeddings and the head": lora(also=(*EMBEDDINGS, *HEADS)),
    "OFT and embeddings": use("OFTConfig", oft_block_size=BLOCK, also=EMBEDDINGS),
    "LoRA and some tokens": lora(trainable_token_indices=[1, 4]),
    "trainable tokens": use("TrainableTokensConfig", token_indices=[1, 4], target_modules=list(EMBEDDINGS)),
    "aLoRA": lora(alora_invocation_tokens=[1]),
    "Arrow": arrow,
    "X-LoRA": x_lora,
    "Shadow": use("ShadowConfig", target_modules=None, shadow_num_hidden_layers=1),
    "prompt tuning": use("PromptTuningConfig", **PROMPT),
    "multitask prompts": use("MultitaskPromptTuningConfig", **PROMPT),
    "P-tuning": use("PromptEncoderConfig", encoder_hidden_size=16, **PROMPT),
    "prefix tuning": use("PrefixTuningConfig", **PROMPT),
    "prefix tuning, projected": use(
        "PrefixTuningConfig", encoder_hidden_size=16, prefix_projection=True, **PROMPT
    ),
    "adaption prompts": use("AdaptionPromptConfig", adapter_len=3, adapter_layers=2, target_modules=None),
    "CPT": use("CPTConfig", cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
    "Cartridge": use("CartridgeConfig", **PROMPT),
}

TIED: Mapping[str, Adapt] = {
    name: LANGUAGE[name]
    for name in (
        *("LoRA and embeddings", "DoRA and embeddings", "LoRA and the head", "LoRA, embeddings and the head"),
        *("LoRA and some tokens", "trainable tokens"),
    )
}

TRANSPOSED: Mapping[str, Adapt] = {
    name: LINEAR[name]
    for name in (
        *("LoRA", "rsLoRA", "DoRA", "LoRA with bias", "AdaLoRA", "IA3", "LN tuning", "HiRA", "VeRA", "PVeRA"),
        *("FourierFT", "WaveFT", "RandLoRA", "Uni-LoRA", "VB-LoRA", "GraLoRA", "TinyLoRA", "DEFT"),
        *("LoRA + LoRA, scaled", "DoRA + DoRA"),
    )
}

CONVOLUTION: Mapping[str, Adapt] = {
    name: LINEAR[name]
    for name in (
        *("LoRA", "rsLoRA", "DoRA", "LoRA with bias", "IA3", "HiRA", "LoHa", "LoKr", "OFT", "HRA"),
        *("LoRA + LoRA, scaled", "DoRA + DoRA"),
    )
} | {
    "grouped LoRA (plain module)": put(GroupedLoRA),
    "LoHa, factored kernel": use("LoHaConfig", r=RANK, use_effective_conv2d=True),
    "LoKr, factored kernel": use("LoKrConfig", r=2, use_effective_conv2d=True, decompose_factor=4),
    "BOFT": use("BOFTConfig", boft_block_size=4),
}
