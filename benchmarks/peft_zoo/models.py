"""The small models that methods of peft are put on; random weights, nothing downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WORDS, RANK, BLOCK = 50, 4, 8


class Called(nn.Module):
    """A model that is called with one tensor and gives one: logits, of the task 0 where a method knows tasks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        if not hasattr(model, "config") or hasattr(model, "conv1"):
            return model(x)
        configs = getattr(model, "peft_config", {}).values()
        tasks = any(hasattr(config, "num_tasks") or hasattr(config, "n_tasks") for config in configs)
        task = {"task_ids": x.new_zeros(x.shape[:1], dtype=torch.long)} if tasks else {}
        if not x.is_floating_point():
            return model(input_ids=x, use_cache=False, **task).logits
        return (model.base_model if tasks else model)(pixel_values=x, **task).logits


class Convolutions(nn.Module):
    """A convolution with padding, one with stride, a 1x1 one, and a linear. groups: of the first two."""

    def __init__(self, dims: int, groups: int = 1) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv1 = conv(4, 16, 3, padding=1, groups=groups)
        self.conv2 = conv(16, 32, 3, stride=2, padding=1, groups=groups)
        self.conv3 = conv(32, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return self.head(x.flatten(2).mean(-1))


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": WORDS, "use_cache": False, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**small | options))


def vit(**options: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"image_size": 16, "patch_size": 4, "num_labels": 10, "initializer_range": 0.1}
    return ViTForImageClassification(ViTConfig(**small | options))


def gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": WORDS}
    small |= {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(**small | options))


def tokens(samples: int) -> Tensor:
    """Sentences of five words; one of them is the word 1."""
    words = torch.randint(0, WORDS, (samples, 5))
    words[torch.arange(samples), torch.arange(samples) % 5] = 1
    return words


def images(samples: int) -> Tensor:
    return torch.randn(samples, 3, 16, 16)


def moved(model: nn.Module, by: float = 0.05) -> nn.Module:
    """Adds noise to every parameter that is trained: those of the method, or of a model without one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * by)
    return model


# -------------------------------------------------------------------- adapters that peft does not have


class GroupedLoRA(nn.Module):
    """A low-rank pair of convolutions beside a convolution, both in its groups; LoRA of peft mixes them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        conv, ins, outs, size = type(base), base.in_channels, base.out_channels, base.kernel_size
        self.base = base
        shape = {"stride": base.stride, "padding": base.padding, "groups": base.groups, "bias": False}
        self.down = conv(ins, RANK * base.groups, size, **shape)
        self.up = conv(RANK * base.groups, outs, 1, groups=base.groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


class PooledLoRA(nn.Module):
    """LoRA on averages of groups of features. Xu et al. 2023, QA-LoRA (arXiv:2309.14717)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features // BLOCK, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        pooled = rows.view(rows.shape[0], -1, BLOCK).mean(dim=2) * BLOCK
        return self.base(x) + self.up(self.down(pooled)).view(*x.shape[:-1], -1)
