"""sentence-transformers pipelines (modules.json): a transformer, then pooling, dense layers and normalisation.

Written here as a plain module, so the package itself is not needed and no class that a file names is imported.
Poolings of a sentence's token vectors x_1 ... x_n, padding left out:

    cls x_1 · lasttoken x_n · mean sum x_i / n · mean_sqrt_len_tokens sum x_i / sqrt(n) · max, per feature
    weightedmean  sum p_i x_i / sum p_i  with the position p_i = 1, 2, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import folders
from .errors import FileError, UnsupportedError

_FLAGS = {  # older settings: one switch a pooling, joined in this order
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TINY = 1e-9  # tokens, so that a row of padding divides by something


@dataclass(frozen=True)
class Pipeline:
    """What modules.json describes: the transformer's folder, and what stands behind it, in order."""

    transformer: Path
    stages: tuple[nn.Module, ...]
    notes: tuple[str, ...] = ()


def transformer(folder: Path) -> Path:
    """The folder of the pipeline's transformer alone."""
    return _modules(folder)[0][1]


def read(folder: Path) -> Pipeline:
    """FileError for a damaged folder, UnsupportedError for a module that no plain one stands for."""
    where = str(folder)
    (_, first), *others = _modules(folder)
    _check_transformer(first)
    stages: list[nn.Module] = []
    notes: list[str] = []
    for name, place in others:
        if name == "Dropout":
            continue
        if name not in _STAGES:
            raise UnsupportedError(
                f"{where}: there is no {name} among the modules that can be compiled ({', '.join(_STAGES)}). "
                f"For the transformer without what follows it: --task feature-extraction."
            )
        stages.append(_STAGES[name](place))
        if name == "Pooling" and not folders.read_table(place / "config.json", str(place)).get(
            "include_prompt", True
        ):
            notes.append("prompts are pooled like other text: the pipeline would leave their tokens out")
    if not any(isinstance(stage, Pooling) for stage in stages):
        raise UnsupportedError(
            f"{where}: no Pooling makes a sentence of its tokens; give --task feature-extraction."
        )
    return Pipeline(first, tuple(stages), tuple(notes))


class SentenceEmbedding(nn.Module):
    """Token ids and mask [batch, sequence] -> {"sentence_embedding": [batch, features]}."""

    def __init__(self, transformer: nn.Module, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.transformer = transformer
        self.stages = nn.ModuleList(stages)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x: Tensor = self.transformer(input_ids=input_ids, attention_mask=attention_mask)[0]
        for stage in self.stages:
            x = stage(x, attention_mask) if isinstance(stage, Pooling) else stage(x)
        return {"sentence_embedding": x}


class Pooling(nn.Module):
    """Token vectors [batch, sequence, features] and mask -> [batch, poolings x features]."""

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        pooled = [_POOLINGS[mode](x, attention_mask) for mode in self.modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)


class Dense(nn.Module):
    """activation(x W' + b), plus x, through a projection where the sizes differ, if it is residual."""

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.activation, self.residual = linear, activation, residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.linear(x))
        return y if self.residual is None else y + self.residual(x)


class Normalize(nn.Module):
    """x / |x|."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, p=2.0, dim=1)


# ------------------------------------------------------------------------------ pooling


def _first(x: Tensor, mask: Tensor) -> Tensor:
    return _token(x, mask.to(torch.int32).argmax(1))


def _last(x: Tensor, mask: Tensor) -> Tensor:
    return _token(x, mask.shape[1] - 1 - mask.to(torch.int32).flip(1).argmax(1))


def _token(x: Tensor, index: Tensor) -> Tensor:
    """One token of each sentence: index [batch]."""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]


def _max(x: Tensor, mask: Tensor) -> Tensor:
    # padding takes the least value there is: it never wins, and it widens no range as -inf would
    return torch.where(mask[:, :, None] != 0, x, x.amin(1, keepdim=True)).amax(1)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask[:, :, None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=_TINY)


def _mean_sqrt(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask[:, :, None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=_TINY).sqrt()


def _weighted_mean(x: Tensor, mask: Tensor) -> Tensor:
    position = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    weight = mask[:, :, None].to(x.dtype) * position[None, :, None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=_TINY)


_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


# ------------------------------------------------------------------------------ reading


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Class name and folder of each module in turn, the first of which is a transformer."""
    listed = folders.read_json(folder / "modules.json", str(folder))
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed) or not listed:
        raise FileError(f"{folder}: its modules.json is not a list of modules.")
    names = [str(item.get("type", "")).rpartition(".")[2] for item in listed]
    if names[0] != "Transformer":
        raise UnsupportedError(f"{folder}: its first module is a {names[0]}, not a Transformer.")
    return [
        (name, _inside(folder, str(item.get("path") or ""))) for name, item in zip(names, listed, strict=True)
    ]


def _inside(folder: Path, path: str) -> Path:
    place = folder / path
    if not place.resolve().is_relative_to(folder.resolve()):
        raise FileError(f"{folder}: its modules.json names {path[:80]!r}, which lies outside of the folder.")
    return place


def _check_transformer(place: Path) -> None:
    """UnsupportedError for a transformer that is read by another output than its token vectors."""
    file = place / "sentence_bert_config.json"
    settings = folders.read_table(file, str(place)) if file.is_file() else {}
    task = settings.get("transformer_task") or "feature-extraction"
    table = settings.get("modality_config")
    text = table.get("text") if isinstance(table, dict) else None
    text = text if isinstance(text, dict) else {}
    method, output = text.get("method", "forward"), text.get("method_output_name") or "last_hidden_state"
    if (task, method, output) != ("feature-extraction", "forward", "last_hidden_state"):
        raise UnsupportedError(
            f"{place}: its transformer gives the {output} of {task}, not token vectors; name a --task instead."
        )


def _pooling(place: Path) -> nn.Module:
    settings = folders.read_table(place / "config.json", str(place))
    named = settings.get("pooling_mode")
    modes = [named] if isinstance(named, str) else named
    if modes is None:
        modes = [mode for flag, mode in _FLAGS.items() if settings.get(flag)] or ["mean"]
    if not isinstance(modes, list) or not modes or not all(str(mode) in _POOLINGS for mode in modes):
        raise UnsupportedError(f"{place}: there is no pooling {named!r}; there are {', '.join(_POOLINGS)}.")
    return Pooling([str(mode) for mode in modes])


def _dense(place: Path) -> nn.Module:
    settings = folders.read_table(place / "config.json", str(place))
    names = {
        str(settings.get(key) or "sentence_embedding") for key in ("module_input_name", "module_output_name")
    }
    if names != {"sentence_embedding"}:
        raise UnsupportedError(f"{place}: a Dense on {', '.join(sorted(names))} cannot be compiled.")
    tensors = folders.read_weights(place)
    linear = _linear(tensors, "linear", place)
    residual: nn.Module | None = None
    if settings.get("use_residual"):
        residual = _linear(tensors, "residual", place) if "residual.weight" in tensors else nn.Identity()
    _check_used(tensors, place)
    return Dense(
        linear,
        _activation(settings.get("activation_function", "torch.nn.modules.activation.Tanh"), place),
        residual,
    )


def _activation(name: Any, place: Path) -> nn.Module:
    """A function of torch's by its class path, which is looked up and not imported."""
    known: Mapping[str, type[nn.Module]] = {
        kind.__name__: kind for kind in (*map(_kind, nn.modules.activation.__all__), nn.Identity)
    }
    kind = known.get(str(name).rpartition(".")[2]) if str(name).startswith("torch.nn.") else None
    if kind is None:
        raise UnsupportedError(f"{place}: the activation {str(name)[:80]!r} of its Dense is none of torch's.")
    return folders.attempt(kind, str(place), f"make a {kind.__name__}")


def _kind(name: str) -> type[nn.Module]:
    found: type[nn.Module] = getattr(nn.modules.activation, name)
    return found


def _linear(tensors: dict[str, Tensor], name: str, place: Path) -> nn.Linear:
    """The layer of these tensors, which are taken out of the table."""
    weight, bias = tensors.pop(f"{name}.weight", None), tensors.pop(f"{name}.bias", None)
    if weight is None or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise FileError(
            f"{place} does not fit a linear layer: its {name}.weight is missing or of another shape."
        )
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.float())
    if bias is not None:
        layer.bias = nn.Parameter(bias.float())
    return layer


def _layer_norm(place: Path) -> nn.Module:
    tensors = folders.read_weights(place)
    weight, bias = tensors.pop("norm.weight", None), tensors.pop("norm.bias", None)
    if weight is None or bias is None or weight.dim() != 1 or weight.shape != bias.shape:
        raise FileError(
            f"{place} does not fit a LayerNorm: its norm.weight or norm.bias is missing or of another shape."
        )
    _check_used(tensors, place)
    layer = nn.LayerNorm(len(weight))
    layer.weight, layer.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
    return layer


def _check_used(tensors: Mapping[str, Tensor], place: Path) -> None:
    if tensors:
        raise FileError(f"{place} holds {sorted(tensors)[0]!r}, which its module has no use for.")


_STAGES: dict[str, Callable[[Path], nn.Module]] = {
    "Pooling": _pooling,
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": lambda _: Normalize(),
}
