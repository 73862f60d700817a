"""transformers: architectures from tiny configurations, built without a download."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Tensor, ...]]
VOCABULARY, LENGTH, SAMPLES = 211, 12, 5

# What most configurations of text encoders and decoders call the same.
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
GQA = {**TINY, "num_key_value_heads": 2, "head_dim": 16}
PICTURE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 48, 64, 96]}
RESNET = {"embedding_size": 32, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 2, 1, 1]}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
SPEECH = {
    **TINY,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

# name -> (model class, configuration class, its options): text in.
TEXT: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", TINY),
    "roberta": ("RobertaModel", "RobertaConfig", TINY),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    ),
    "electra": ("ElectraModel", "ElectraConfig", {**TINY, "embedding_size": 32}),
    "deberta": (
        "DebertaModel",
        "DebertaConfig",
        {**TINY, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        {
            **TINY,
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
    ),
    "albert": ("AlbertModel", "AlbertConfig", {**TINY, "embedding_size": 32}),
    "mpnet": ("MPNetModel", "MPNetConfig", TINY),
    "mobilebert": (
        "MobileBertModel",
        "MobileBertConfig",
        {
            **TINY,
            "embedding_size": 32,
            "intra_bottleneck_size": 32,
            "true_hidden_size": 32,
            "num_feedforward_networks": 2,
        },
    ),
    "xlnet": (
        "XLNetModel",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
    ),
    "longformer": ("LongformerModel", "LongformerConfig", {**TINY, "attention_window": 4}),
    "funnel": (
        "FunnelBaseModel",
        "FunnelConfig",
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1],
            "d_model": 64,
            "n_head": 4,
            "d_head": 16,
            "d_inner": 128,
        },
    ),
    "convbert": ("ConvBertModel", "ConvBertConfig", {**TINY, "embedding_size": 64}),
    "squeezebert": ("SqueezeBertModel", "SqueezeBertConfig", {**TINY, "embedding_size": 64}),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {**TINY, "global_attn_every_n_layers": 2}),
    "nystromformer": (
        "NystromformerModel",
        "NystromformerConfig",
        {**TINY, "segment_means_seq_len": 12, "num_landmarks": 4},
    ),
    "fnet": ("FNetModel", "FNetConfig", TINY),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 8,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TINY),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "rotary_dim": 8,
            "n_positions": 64,
        },
    ),
    "llama (GQA)": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "mistral": ("MistralForCausalLM", "MistralConfig", GQA),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GQA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GQA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GQA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GQA),
    "phi": ("PhiForCausalLM", "PhiConfig", TINY),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GQA),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GQA),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", GQA),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**TINY, "new_decoder_architecture": False}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**TINY, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    ),
    "t5 encoder": ("T5EncoderModel", "T5Config", T5),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bart": ("BartModel", "BartConfig", BART),
    "clip text": ("CLIPTextModel", "CLIPTextConfig", TINY),
}

# ... pictures in.
VISION: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", PICTURE),
    "deit": ("DeiTModel", "DeiTConfig", PICTURE),
    "beit": ("BeitModel", "BeitConfig", {**PICTURE, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2Model", "Dinov2Config", PICTURE),
    "swin": (
        "SwinModel",
        "SwinConfig",
        {"image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "swinv2": (
        "Swinv2Model",
        "Swinv2Config",
        {"image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": ("ConvNextModel", "ConvNextConfig", STAGES),
    "convnextv2": ("ConvNextV2Model", "ConvNextV2Config", STAGES),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 32, 48, 64],
            "decoder_hidden_size": 32,
            "num_attention_heads": [1, 2, 3, 4],
            "num_labels": 7,
        },
    ),
    "bit": ("BitModel", "BitConfig", {**RESNET, "num_groups": 8}),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET),
    "regnet": ("RegNetModel", "RegNetConfig", {**RESNET, "groups_width": 16}),
    "mobilevit": ("MobileViTModel", "MobileViTConfig", {"image_size": 64}),
    "clip vision": ("CLIPVisionModel", "CLIPVisionConfig", PICTURE),
    "siglip vision": ("SiglipVisionModel", "SiglipVisionConfig", PICTURE),
    "poolformer": (
        "PoolFormerModel",
        "PoolFormerConfig",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]},
    ),
    "dpt": (
        "DPTForDepthEstimation",
        "DPTConfig",
        {
            **PICTURE,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 32, 48, 64],
            "fusion_hidden_size": 32,
            "is_hybrid": False,
        },
    ),
    "yolos": (
        "YolosForObjectDetection",
        "YolosConfig",
        {**PICTURE, "image_size": [32, 48], "num_detection_tokens": 6, "num_labels": 5},
    ),
}


class Outputs(nn.Module):
    """A model by positional tensors; its output tensors, caches and attentions left out."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.options = model, names, dict(options)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        found = self.model(**dict(zip(self.names, tensors, strict=True)), **self.options, return_dict=True)
        return [v for k, v in found.items() if isinstance(v, Tensor) and k not in ("past_key_values", "loss")]


def _tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


def _build(model: str, config: str, options: Mapping[str, Any]) -> nn.Module:
    return getattr(hf, model)(getattr(hf, config)(**options)).eval()


def _text(name: str) -> Made:
    net = _build(*TEXT[name])
    options = {"use_cache": False} if hasattr(net.config, "use_cache") else {}
    if name == "mixtral":
        net.set_experts_implementation("batched_mm")
    if name in ("t5", "bart"):
        names = ("input_ids", "decoder_input_ids")
        return Outputs(net, names, options), (_tokens(SAMPLES, LENGTH), _tokens(SAMPLES, LENGTH))
    if name in ("bert", "distilbert"):  # with padding
        mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
        mask[1, -4:] = 0
        return Outputs(net, ("input_ids", "attention_mask"), options), (_tokens(SAMPLES, LENGTH), mask)
    return Outputs(net, ("input_ids",), options), (_tokens(SAMPLES, LENGTH),)


def _vision(name: str) -> Made:
    net = _build(*VISION[name])
    size = getattr(net.config, "image_size", 64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if name in ("convnext", "convnextv2", "segformer", "bit", "resnet", "regnet", "poolformer"):
        height = width = 64
    return Outputs(net, ("pixel_values",), {}), (torch.randn(SAMPLES, 3, height, width),)


def _wav2vec2() -> Made:
    return Outputs(_build("Wav2Vec2Model", "Wav2Vec2Config", SPEECH), ("input_values",), {}), (
        torch.randn(SAMPLES, 1600),
    )


def _hubert() -> Made:
    return Outputs(_build("HubertModel", "HubertConfig", SPEECH), ("input_values",), {}), (
        torch.randn(SAMPLES, 1600),
    )


def _whisper() -> Made:
    whole = _build(
        "WhisperModel",
        "WhisperConfig",
        {**BART, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 32},
    )
    return Outputs(whole.encoder, ("input_features",), {}), (torch.randn(SAMPLES, 16, 60),)


def _detr() -> Made:
    backbone = hf.ResNetConfig(**RESNET, out_features=["stage4"])
    config = hf.DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        backbone=None,
        use_pretrained_backbone=False,
        num_queries=6,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_labels=5,
    )
    net = hf.DetrForObjectDetection(config).eval()
    return Outputs(net, ("pixel_values",), {}), (torch.randn(SAMPLES, 3, 64, 96),)


def _clip() -> Made:
    text, vision = hf.CLIPTextConfig(**TINY), hf.CLIPVisionConfig(**PICTURE)
    net = hf.CLIPModel(
        hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    ).eval()
    return Outputs(net, ("input_ids", "pixel_values"), {}), (
        _tokens(SAMPLES, LENGTH),
        torch.randn(SAMPLES, 3, 32, 32),
    )


def models() -> dict[str, Callable[[], Made]]:
    return {f"transformers/{name}": make for name, make in _models()}


def _models() -> Iterator[tuple[str, Callable[[], Made]]]:
    yield from ((name, functools.partial(_text, name)) for name in TEXT)
    yield from ((name, functools.partial(_vision, name)) for name in VISION)
    yield from (
        ("wav2vec2", _wav2vec2),
        ("hubert", _hubert),
        ("whisper encoder", _whisper),
        ("detr", _detr),
        ("clip", _clip),
    )
