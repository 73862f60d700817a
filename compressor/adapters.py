"""PEFT adapters on a model: attached by peft, every tensor accounted for, each with its weight.

peft warns once, or not at all, of tensors that do not fit; here each is used or named. What peft computes un-merged
is the reference, also for several adapters at once; blend.py gives them weights and combines them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn

from . import blend
from .blend import Combination
from .checkpoint import printable
from .errors import FileError, UsageError
from .export import quiet
from .folders import Adapter, attempt

_CACHED = ("PREFIX_TUNING", "CARTRIDGE")  # act through the cache of keys and values
_REFUSED = {
    "XLORA": "it loads further adapters by path",
    "POLY": "it takes a task's number with every input",
    "MULTITASK_PROMPT_TUNING": "it takes a task's number with every input",
}
# ways of starting an adapter that change the base weights on the way
_MUTATING = ("pissa", "corda", "olora", "lora_ga", "loftq")
# how the tensors of a method begin, where they are not called `<method>_...`
_TRACES = {
    **dict.fromkeys(
        ("lora_A", "lora_B", "lora_E", "lora_embedding_", "lora_down", "lora_up", "lora_mid", "lora_magnitude"), "LORA"
    ),
    **{"hada_w": "LOHA", "hada_t": "LOHA", "lokr_w": "LOKR", "lokr_t": "LOKR", "ia3_l": "IA3", "hra_u": "HRA"},
    **{"oft_r": "OFT", "oft_R": "OFT", "vera_lambda_": "VERA", "pvera_lambda_": "PVERA", "miss_block": "MISS"},
    **{"ln_tuning_layers": "LN_TUNING", "trainable_tokens_delta": "TRAINABLE_TOKENS", "road_theta": "ROAD"},
    **{"adaption_prompt": "ADAPTION_PROMPT", "prompt_embeddings": "PROMPT_TUNING", "road_alpha": "ROAD"},
    **{
        f"{name}_": name.upper()
        for name in ("boft", "vblora", "fourierft", "waveft", "bone", "c3a", "shira", "randlora", "hira", "delora",
                     "gralora", "tinylora", "psoft", "unilora")
    },
}  # fmt: skip


def attach(
    model: nn.Module, adapters: Sequence[Adapter], combination: Combination | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """`model`, changed in place, with the adapters active, and notes.

    FileError for an adapter that does not fit the model; UsageError for adapters or weights that do not go together.
    """
    peft = attempt(_peft, adapters[0].where, "import peft")
    configs = [_settings(peft, one) for one in adapters]
    _compatible(adapters, model, combination)
    weights = ["" if one.weight == 1 else f", weight {one.weight:g}" for one in adapters]
    notes = [
        f"adapter {one.folder.name} ({one.type}): {len(one.tensors)} tensors{weight}"
        for one, weight in zip(adapters, weights, strict=True)
    ]
    names = ["default", *(f"default_{index}" for index in range(2, len(adapters) + 1))]
    mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what peft draws before it loads depends on nothing but the adapter
        wrapped: Any = model
        for name, one, config in zip(names, adapters, configs, strict=True):
            adding = partial(_add, peft, wrapped, name, one, config, mapping)
            wrapped = attempt(adding, one.where, "attach it")
            _account(peft, wrapped, name, one, mapping)
        if combination is not None:
            blend.combine(wrapped, names, adapters, combination)
        else:
            blend.weigh(wrapped, names, adapters)
    notes += [note for one in adapters for note in _taken_whole(one)]
    made = Uncached(wrapped) if adapters[0].type in _CACHED else _unwrapped(wrapped)
    return made.eval(), tuple(notes)


class Uncached(nn.Module):
    """A text model without the cache among its outputs, which is no tensor: learned prefixes enter through one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return {name: value for name, value in outputs.items() if name != "past_key_values"}


def describe(one: Adapter) -> dict[str, Any]:
    """What an adapter is, from its folder alone: the row that `compress inspect` shows."""
    settings = one.settings
    flags = sorted(key[4:] for key, value in settings.items() if key.startswith("use_") and value is True)
    targets = settings.get("target_modules") or settings.get("target_parameters") or []
    pattern = settings.get("rank_pattern")
    ranks = [settings.get(key) for key in ("r", "rank", "init_r")] + [
        *(pattern if isinstance(pattern, dict) else {}).values()
    ]
    return {
        "adapter": str(one.folder),
        "type": one.type + (f" ({', '.join(flags)})" if flags else ""),
        "rank": sorted({rank for rank in ranks if isinstance(rank, int)}),
        "targets": sorted(map(str, targets)) if isinstance(targets, list) else [str(targets)],
        "tensors": len(one.tensors),
        "params": sum(tensor.numel() for tensor in one.tensors.values()),
        "weight": one.weight,
        "task": settings.get("task_type"),
        "base": settings.get("base_model_name_or_path"),
    }


def found_in(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The same of adapters whose tensors lie among others, in a checkpoint for example: one row an adapter."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        traced = [
            (i, method)
            for i, part in enumerate(parts)
            for trace, method in _TRACES.items()
            if part.startswith(trace)
        ]
        if not traced:
            continue
        place, method = traced[0]
        name = next((part for part in parts[place + 1 :] if part not in ("weight", "bias")), "")
        empty = {"adapter": name, "type": method, "rank": set(), "targets": set(), "tensors": 0, "params": 0}
        row = rows.setdefault((method, name), empty)
        row["targets"].add(parts[place - 1] if place else key)
        row["tensors"] += 1
        row["params"] += tensor.numel()
        if parts[place] in ("lora_A", "lora_down", "lora_embedding_A") and tensor.dim():
            row["rank"].add(int(tensor.shape[0]))
        if parts[place].startswith("lora_magnitude"):
            row["type"] = f"{method} (dora)"
    return [row | {key: sorted(row[key]) for key in ("rank", "targets")} for row in rows.values()]


# ---------------------------------------------------------------------------- checking


def _peft() -> Any:
    import peft

    return peft


def _settings(peft: Any, one: Adapter) -> Any:
    """peft's configuration. FileError for what imports or reads other files, and for switches of a newer peft."""
    if one.settings.get("megatron_config") is not None:
        raise FileError(
            f"{one.where}: its adapter_config.json names a module to import (megatron_core): refused."
        )
    if one.type in _REFUSED:
        raise FileError(
            f"{one.where}: an adapter of type {one.type} cannot be compiled: {_REFUSED[one.type]}."
        )
    if one.type not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise FileError(f"{one.where}: peft {peft.__version__} knows no adapter of type {one.type[:40]!r}.")
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[one.type]
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(key for key, value in one.settings.items() if value is True and key not in known):
        raise FileError(
            f"{one.where}: peft {peft.__version__} does not know {printable(unknown)} of its adapter_config.json: "
            f"install the peft that wrote it ({one.settings.get('peft_version', 'a newer one')})."
        )
    with quiet():
        return attempt(
            lambda: kind.from_pretrained(str(one.folder)), one.where, "read its adapter_config.json"
        )


def _compatible(adapters: Sequence[Adapter], model: nn.Module, combination: Combination | None) -> None:
    for one in adapters:
        if one.weight != 1 and (one.settings.get("bias") or "none") != "none":
            raise UsageError(
                f"{one.where}: it replaces biases of the model, which no weight can scale: leave it out."
            )
        if one.weight != 1 and _changes_base(one):
            raise UsageError(
                f"{one.where}: {_changes_base(one)} changes the base weights, so its change has no weight."
            )
    if len(adapters) == 1:
        if combination is not None:
            raise UsageError(f"--combine {combination.kind} takes several adapters: give --adapter again.")
        return
    types = {one.type for one in adapters}
    if len(types) > 1:
        raise UsageError(
            f"{adapters[0].where}: peft runs several adapters of one type only, and these are "
            f"{' and '.join(sorted(types))}."
        )
    for one in adapters:
        if _changes_base(one):
            raise UsageError(
                f"{one.where}: {_changes_base(one)} changes the base weights under the other adapters."
            )
    names = model.state_dict().keys()
    for first, second in combinations(adapters, 2):
        if both := sorted(first.tensors_of_base.keys() & second.tensors_of_base.keys() & names):
            raise UsageError(
                f"{first.where} and {second.where} both bring {printable(both)}: use one of them."
            )


def _changes_base(one: Adapter) -> str | None:
    start = str(one.settings.get("init_lora_weights")).lower()
    return next((name for name in _MUTATING if start.startswith(name)), None)


def _account(peft: Any, model: Any, name: str, one: Adapter, mapping: Mapping[str, str]) -> None:
    """FileError unless every tensor of the file is in the model, and every tensor of the adapter came from the file."""
    ours: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    theirs = _renamed(model, name, one, mapping)
    if left := theirs.keys() - ours.keys():  # a base tensor that was replaced keeps its own name
        state = model.state_dict()
        ours |= {key: state[key] for key in left if key in state}
    wrong = [key for key in ours.keys() & theirs.keys() if not _equal(ours[key], theirs[key])]
    problems = [
        f"{len(keys)} {what} ({printable(sorted(keys))})"
        for keys, what in (
            (ours.keys() - theirs.keys(), "missing"),
            (theirs.keys() - ours.keys(), "not used"),
            (wrong, "not taken over"),
        )
        if keys
    ]
    if problems:
        raise FileError(
            f"{one.where} does not fit {type(model.get_base_model()).__name__}: weights {'; '.join(problems)}. "
            f"Was it trained on another model, or for another task (--task)?"
        )


def _renamed(model: Any, name: str, one: Adapter, mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """The file's tensors under the names of this version's architecture, as peft itself renames them on loading."""
    from peft.utils.save_and_load import load_peft_weights

    found: dict[str, Tensor] = load_peft_weights(
        str(one.folder), device="cpu", key_mapping=dict(mapping) or None
    )
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a peft or transformers that renames nothing
        return found
    convert = conversion.convert_peft_adapter_state_dict_for_transformers
    converted: dict[str, Tensor] = convert(model, model.peft_config[name], found, name)
    return converted


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.cpu(), theirs.to(ours.dtype))


def _taken_whole(one: Adapter) -> list[str]:
    """A note where a weight does not reach everything that an adapter brings."""
    saved = one.settings.get("modules_to_save")
    if one.weight == 1 or not isinstance(saved, list) or not saved:
        return []
    return [
        f"{', '.join(map(str, saved))} of adapter {one.folder.name} were taken over whole, whatever its weight"
    ]


# --------------------------------------------------------------------------- attaching


def _add(peft: Any, model: Any, name: str, one: Adapter, config: Any, mapping: Mapping[str, str]) -> Any:
    options: dict[str, Any] = {"torch_device": "cpu", "key_mapping": dict(mapping) or None}
    try:
        if not isinstance(model, peft.PeftModel):
            return peft.PeftModel.from_pretrained(
                model, str(one.folder), adapter_name=name, config=config, **options
            )
        model.load_adapter(str(one.folder), name, **options)
        return model
    except KeyError as error:  # how peft says that a module trained with the adapter was not saved with it
        raise FileError(
            f"{one.where} lacks {error.args[0]}: what was trained beside it (modules_to_save) is not in its file."
        ) from error


def _unwrapped(model: Any) -> nn.Module:
    """The model itself, its layers adapted, where peft's wrapper round it does nothing more."""
    from peft.tuners.tuners_utils import BaseTuner

    tuner = model.base_model
    names = [key for key, _ in chain(model.base_model.named_parameters(), model.base_model.named_buffers())]
    plain = isinstance(tuner, BaseTuner) and type(tuner).forward is BaseTuner.forward
    shared = not all(name.startswith("model.") for name in names)  # tensors that several layers read
    hooked = any(getattr(config, "alora_invocation_tokens", None) for config in model.peft_config.values())
    inner: nn.Module = model if hooked or shared or not plain else model.get_base_model()
    return inner
