"""Several adapters on one model, and weights.

Without weights peft's own rule holds: all are active, one after another on each layer. Most methods add a change to
the layer's output, y = base(x) + sum of change_i(x), and then a weight is a factor of the change. Whether changes add
up is measured on the layer and not known by the method's name: rotations, scalings and DoRA's norms compose instead.

Combining (`--combine`) makes one LoRA of several, by peft's `add_weighted_adapter`: linear, cat, svd, TIES
(Yadav et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2023, arXiv:2311.03099), and the svd forms of both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import UsageError
from .folders import Adapter, attempt

_THINNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # keep a part of each adapter only
KINDS = ("linear", "cat", "svd", *_THINNING, *(f"{kind}_svd" for kind in _THINNING))
_NAMES = {"dare": "dare_linear"}
_COMBINED = "combined"
_SAME, _NOISE = 1e-3, 1e-5  # of the changes, and of the base's output: differences that rounding makes


@dataclass(frozen=True)
class Combination:
    """How several adapters become one. density: the part of each adapter that is kept; seed: of the random choice."""

    kind: str
    density: float | None = None
    seed: int = 0


def combination(words: str | None, seed: int = 0) -> Combination | None:
    """`linear`, `cat`, `ties:0.5` ... UsageError for anything else."""
    if words is None:
        return None
    name, colon, tail = words.partition(":")
    kind = _NAMES.get(name, name)
    if kind not in KINDS:
        raise UsageError(f"--combine {words}: there is no such combination; there are {', '.join(KINDS)}.")
    thins = kind.removesuffix("_svd") in _THINNING
    if not thins and not colon:
        return Combination(kind, seed=seed)
    try:
        density = float(tail) if thins else 0.0
    except ValueError:
        density = 0.0
    if not 0 < density <= 1:
        hint = f"say which part of each adapter to keep, for example --combine {name}:0.5"
        raise UsageError(f"--combine {words}: {hint if thins else f'{name} takes no number'}.")
    return Combination(kind, density, seed)


# ------------------------------------------------------------------------------ weights


class Blend(nn.Module):
    """base(x) + sum of weight * (adapted(x) - base(x)): each adapter's own change of one layer, by its weight."""

    def __init__(self, layer: Any, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.adapted = nn.ModuleList(_alone(layer, name) for name in weights)
        self.weights = tuple(weights.values())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        first: Any = self.adapted[0]
        base: Tensor = first.base_layer(*args, **kwargs)
        changes = (
            weight * (one(*args, **kwargs) - base)
            for one, weight in zip(self.adapted, self.weights, strict=True)
        )
        return sum(changes, base)

    def __getattr__(self, name: str) -> Any:
        """What the model asks of the layer besides running it: `weight.dtype`, for example."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            adapted: Any = super().__getattr__("adapted")
            return getattr(adapted[0], name)


def weigh(model: Any, names: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Make all adapters active, in place, each change times its weight. UsageError where that has no meaning."""
    weights = {name: one.weight for name, one in zip(names, adapters, strict=True)}
    where, method = adapters[0].where, adapters[0].type
    layers = list(_layers(model))
    if len(names) > 1:
        if not layers:
            raise UsageError(
                f"{where}: only one {method} adapter can be active: it changes no layer, but the input."
            )
        attempt(lambda: model.base_model.set_adapter(list(names)), where, "use it with the others")
        _check_several(layers, weights, where, method)
    if all(weight == 1 for weight in weights.values()):
        return
    if not layers:
        raise UsageError(f"{where}: a {method} adapter changes no layer whose change a weight could scale.")
    for path, layer in layers:
        own = {name: weight for name, weight in weights.items() if name in layer._get_available_adapters()}
        if _is_plain_lora(layer):
            for name in own:
                layer.scaling[name] *= own[name]
        elif any(weight != 1 for weight in own.values()):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Blend(layer, own))


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def _is_plain_lora(layer: Any) -> bool:
    """Whether the change is proportional to `scaling`, which it is not for DoRA and other variants."""
    from peft.tuners.lora import LoraLayer

    special = getattr(layer, "lora_variant", {}) or any(getattr(layer, "use_dora", {}).values())
    return isinstance(layer, LoraLayer) and not special


def _alone(layer: Any, *names: str) -> Any:
    """The same layer, its tensors shared, with these adapters active."""
    view = copy.copy(layer)
    view._active_adapter = list(names)
    return view


def _check_several(
    layers: Sequence[tuple[str, Any]], weights: Mapping[str, float], where: str, method: str
) -> None:
    """UsageError where peft ignores an adapter, or composes the changes that weights should scale one by one."""
    seen = set()
    for _, layer in layers:
        own = [name for name in weights if name in layer._get_available_adapters()]
        kind = (type(layer), type(layer.get_base_layer()), tuple(own))
        sample = _sample(layer.get_base_layer())
        if len(own) < 2 or kind in seen or (_is_plain_lora(layer) and sample is None):
            continue
        seen.add(kind)
        verdict = "unknown"
        if sample is not None:
            verdict = attempt(partial(_verdict, layer, own, sample), where, "run it beside the others")
        if verdict == "ignored":
            raise UsageError(
                f"{where}: peft runs one of several {method} adapters and ignores the others: give one."
            )
        if verdict != "added" and any(weights[name] != 1 for name in own):
            raise UsageError(
                f"{where}: several {method} adapters on one layer act one after another and do not add up, so a "
                f"weight has no meaning: leave the weights out."
            )


@torch.no_grad()
def _verdict(layer: Any, names: Sequence[str], sample: Tensor) -> str:
    """`added`, `composed`, or `ignored` if the last or first adapter alone gives the same as all of them."""
    base = layer.get_base_layer()(sample)
    changes = [_alone(layer, name)(sample) - base for name in names]
    together = _alone(layer, *names)(sample) - base
    noise = _NOISE * float(base.abs().max()) + _SAME * max(float(change.abs().max()) for change in changes)

    def near(first: Tensor, second: Tensor) -> bool:
        return float((first - second).abs().max()) <= noise

    if near(together, sum(changes[1:], changes[0])):
        return "added"
    return "ignored" if any(near(together, change) for change in changes) else "composed"


def _sample(base: nn.Module) -> Tensor | None:
    """Random input of a layer; None for kinds whose input is unknown."""
    weight: Any = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if isinstance(base, nn.Embedding):
        return torch.arange(min(16, len(weight)))
    sizes: list[int] = []
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sizes = [
            base.in_channels,
            *(2 * k * d + 1 for k, d in zip(base.kernel_size, base.dilation, strict=True)),
        ]
    elif isinstance(base, nn.Linear):
        sizes = [base.in_features]
    elif type(base).__name__ == "Conv1D" or (weight.dim() == 1 and not isinstance(base, _BatchNorm)):
        sizes = [len(weight)]  # the transposed linear of GPT-2; norms over features
    return torch.randn(4, *sizes, generator=torch.Generator().manual_seed(0)) if sizes else None


# -------------------------------------------------------------------------- combination


def combine(model: Any, names: Sequence[str], adapters: Sequence[Adapter], how: Combination) -> None:
    """Make one LoRA adapter of all and the only one, in place. UsageError where the methods do not allow it."""
    for one in adapters:
        if reason := _not_combinable(one):
            raise UsageError(
                f"{one.where}: --combine {how.kind} is defined for plain LoRA only, and it {reason}."
            )
    if any(_layers(model)) and not all(_is_plain_lora(layer) for _, layer in _layers(model)):
        raise UsageError(
            f"--combine {how.kind} is defined for plain LoRA only: leave it out to run them side by side."
        )
    owners = {name for module in _trained_modules(model) for name in names if name in module.modules_to_save}
    if len(owners) > 1:
        raise UsageError(
            f"--combine {how.kind}: several of the adapters trained modules whole, which peft cannot combine."
        )
    # peft takes the first adapter's settings for the combined one, its list of trained modules among them
    order = sorted(zip(names, adapters, strict=True), key=lambda pair: pair[0] not in owners)
    model.peft_config[order[0][0]].init_lora_weights = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        attempt(
            lambda: model.base_model.add_weighted_adapter(
                [name for name, _ in order],
                [one.weight for _, one in order],
                _COMBINED,
                how.kind,
                density=how.density,
            ),
            f"--combine {how.kind}",
            "combine the adapters",
        )
    for path, layer in _layers(model):
        if _COMBINED not in layer.lora_A and _COMBINED not in layer.lora_embedding_A:
            name = path.removeprefix("base_model.model.")
            raise UsageError(
                f"--combine {how.kind}: peft leaves {name} out, which one of the adapters changes; "
                f"without --combine they run side by side."
            )
        layer.scaling[_COMBINED] = 1.0  # peft keeps the first adapter's rule, which rsLoRA has another one of
    for module in _trained_modules(model):
        source = module.modules_to_save[next(iter(owners))]
        module.modules_to_save[_COMBINED].load_state_dict(source.state_dict())
    model.base_model.set_adapter(_COMBINED)
    for name in names:
        model.delete_adapter(name)


def _not_combinable(one: Adapter) -> str | None:
    if one.type != "LORA":
        return f"is {one.type}"
    reasons = {
        "use_dora": "is DoRA",
        "lora_bias": "has biases",
        "trainable_token_indices": "trains single tokens",
        "target_parameters": "changes parameters that are no layer's",
        "layer_replication": "repeats layers",
    }
    return next((reason for key, reason in reasons.items() if one.settings.get(key)), None)


def _trained_modules(model: nn.Module) -> list[Any]:
    """Modules that an adapter trained whole, such as a classifier."""
    from peft.utils.other import ModulesToSaveWrapper

    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
