"""Models for tests and benchmarks whose random weights give every check power: a wrong edit moves the numbers."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Held, because the operators that it defines live as long as it does.
_SHIM = runpy.run_path(str(Path(__file__).parent / "shim" / "sitecustomize.py"))


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """A torchvision classifier with random weights, in eval mode."""
    import torchvision

    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, **options}  # their own initialisation takes half a minute
    return torchvision.models.get_model(name, weights=None, **options).eval()


@torch.no_grad()
def with_power(model: nn.Module, *example: Tensor, seed: int = 0) -> nn.Module:
    """Redraws every float parameter so that nothing is zero or tiny, and measures batch-norm statistics on `example`.

    Weights are normal with variance 2 / fan-in, biases small normals, gains (one long axis) uniform in (0.5, 1.5).
    Fresh models hide wrong surgery: a ViT's head is zero, and behind a layer scale of 1e-6 a missing MLP is rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.copy_(_redrawn(name, parameter, generator))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches, here: this batch
        norm.train()
    model(*example)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def _redrawn(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if "bias" in name.rsplit(".", 1)[-1] and like.dim() == 1:
        return 0.1 * torch.randn(like.shape, generator=generator)
    if sum(size > 1 for size in like.shape) <= 1:
        return 0.5 + torch.rand(like.shape, generator=generator)
    if like.shape[0] == 1:  # a table of positions
        return 0.5 * torch.randn(like.shape, generator=generator)
    inputs = like.numel() / like.shape[0]
    if like.dim() == 3 and not name.endswith("weight"):  # the matrices of several experts
        inputs = like.shape[-1]
    return torch.randn(like.shape, generator=generator) * (2 / inputs) ** 0.5
