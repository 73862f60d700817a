"""Hugging Face model folders: from disk only, every weight accounted for, none copied.

No code of the folder is run (`trust_remote_code=False`), nothing is downloaded, and weights are read from
safetensors, or inertly from .bin. The library's own loader warns, or says nothing, when a head is missing and filled
at random: here that is an error. It is handed the tensors as they lie in the files, or in temporary ones where they had
to be widened to float32, so that a model takes no memory of its own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import folders, tasks
from .architecture import guarded, library
from .checkpoint import printable
from .errors import FileError, UsageError
from .export import quiet
from .folders import Adapter
from .ir import Input
from .spill import spilling

_DEPTH = re.compile(
    r"(layers?|depths?|blocks?|stages?)$"
)  # settings that count modules, and do not size them
_DEEPEST = 1000


def architecture(folder: Path) -> nn.Module:
    """The model that the folder's config.json describes, its weights as its code makes them."""
    spec, config = f"hf:{folder}", _config(folder)
    kind = tasks.model_class(config, None, (), str(folder))
    with quiet():
        model: nn.Module = guarded(lambda: kind(config), spec, "build it")
    return model


def load(
    folder: Path, *, task: str | None = None, adapters: Sequence[Adapter] = (), allow: Sequence[str] = ()
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model in float32, ready for the adapters, and notes. FileError unless weights and architecture fit.

    A trained head that the folder lacks may come from an adapter, which is not attached yet; the vocabulary is as
    large as the adapters' embeddings.
    """
    where, config = str(folder), _config(folder)
    stored = folders.read_weights(folder)
    dtypes = {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} - {torch.float32}
    stored = _single(stored)
    promised = {name: tensor for one in adapters for name, tensor in one.tensors_of_base.items()}
    with quiet():
        kind = folders.attempt(
            lambda: tasks.model_class(config, task, adapters, where), where, "tell its class"
        )
        folders.attempt(lambda: tasks.set_labels(kind, config, (promised, stored)), where, "build it")
        options = _without_pooler(kind, stored)
        model, info = folders.attempt(lambda: _fill(kind, config, stored, options), where, "load it")
        _resize(model, promised, where)
    notes = _account(folder, model, info, promised, allow)
    names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return model, (*notes, *(f"{name} weights were read as float32" for name in names))


def _single(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All floats in float32. Those that were not lie in temporary files, of which one at a time is written."""
    spill = spilling()
    return {
        name: spill(tensor.float())
        if tensor.is_floating_point() and tensor.dtype != torch.float32
        else tensor
        for name, tensor in stored.items()
    }


def labels(model: nn.Module) -> tuple[str, ...]:
    """Class names in the model's config, unless they are the library's placeholders."""
    table = getattr(getattr(model, "config", None), "id2label", None)
    names = tuple(str(table[key]) for key in sorted(table)) if isinstance(table, dict) else ()
    generic = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return () if generic or len(names) < 2 else names


def inputs(model: nn.Module) -> tuple[Input, ...]:
    """What a text or image model takes, batch and sequence dynamic; nothing where its config does not say."""
    main = getattr(model, "main_input_name", None)
    config: Any = getattr(model, "config", None)
    formals = inspect.signature(model.forward).parameters
    if main == "input_ids" and "decoder_input_ids" not in formals:
        names = [name for name in ("input_ids", "attention_mask") if name in formals]
        text = tuple(Input(name, torch.int64, ("batch", "sequence")) for name in names)
        return text + (_image(getattr(config, "vision_config", None)) if "pixel_values" in formals else ())
    return _image(config) if main == "pixel_values" else ()


def _image(config: Any) -> tuple[Input, ...]:
    size = getattr(config, "image_size", None)
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if not isinstance(height, int) or not isinstance(width, int):
        return ()
    return (
        Input("pixel_values", torch.float32, ("batch", getattr(config, "num_channels", 3), height, width)),
    )


def _config(folder: Path) -> Any:
    spec = f"hf:{folder}"
    if not (folder / "config.json").is_file():
        raise UsageError(f"{spec}: there is no config.json in that folder.")
    settings = folders.read_table(folder / "config.json", spec)
    if "quantization_config" in settings:
        raise FileError(
            f"{folder} holds weights that are quantised already; give the model that they were made from."
        )
    _check_depth(settings, folder)
    auto = library("transformers", spec).AutoConfig
    config = guarded(
        lambda: auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False),
        spec,
        "read its config.json",
    )
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache is no tensor: it cannot be an output of a graph
    _use_plain_attention(config)
    return config


def _check_depth(value: Any, folder: Path, key: str = "") -> None:
    """FileError for more layers than any model has: the library makes them one by one until memory ends."""
    if isinstance(value, dict):
        for inner, item in value.items():
            _check_depth(item, folder, inner)
    elif isinstance(value, list):
        for item in value:
            _check_depth(item, folder, key)
    elif isinstance(value, (int, float)) and value > _DEEPEST and _DEPTH.search(key):
        raise FileError(
            f"{folder}: its config.json has {value} for {printable([key])}, over {_DEEPEST}: it is damaged."
        )


def _use_plain_attention(config: Any) -> None:
    """Attention as torch computes it: a config.json may name a kernel, which the library would fetch and run."""
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        config._attn_implementation = None
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None:
            _use_plain_attention(part)


def _fill(
    kind: Any, config: Any, stored: dict[str, Tensor], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The library's renaming and tying of weights, on tensors that stay where they are."""
    found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
        None, config=config, state_dict=stored, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    return found


def _without_pooler(kind: Any, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """A bare encoder whose folder holds no pooler is built without: else its second output would be random."""
    optional = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    held = any("pooler" in name.split(".") for name in stored)
    return {"add_pooling_layer": False} if optional and not held else {}


def _account(
    folder: Path,
    model: nn.Module,
    info: Mapping[str, Any],
    promised: Mapping[str, Tensor],
    allow: Sequence[str],
) -> list[str]:
    """Notes about weights that are missing, left over or of another size for a reason; FileError for all others."""
    notes, problems = [], []
    for what in ("missing", "mismatched", "unexpected"):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(f"{what}_keys", ()))
        if what != "unexpected":
            keys = [key for key in keys if key not in promised]
        elif keys and (other := _other_head(model)):
            left = [key for key in keys if key in other]
            keys = [key for key in keys if key not in left]
            if left:
                notes.append(f"{len(left)} weights of another head are not used ({printable(left)})")
        named = [key for key in keys if any(fnmatchcase(key, pattern) for pattern in allow)]
        if named:
            notes.append(f"{len(named)} {what} weights, by consent ({printable(named)})")
        if rest := [key for key in keys if key not in named]:
            problems.append(f"{len(rest)} {what} ({printable(rest)})")
    if problems:
        raise FileError(
            f"{folder} does not fit {type(model).__name__}: weights {'; '.join(problems)}. Name what it was trained "
            f"for (--task) or the adapter that holds them (--adapter), or consent by name: --allow-missing PATTERN."
        )
    return notes


def _other_head(model: nn.Module) -> frozenset[str]:
    """Weights of the class that the folder was saved from, where the task asks for another one."""
    config: Any = model.config
    own = tasks.own_class(config)
    if own is None or isinstance(model, own):
        return frozenset()
    with quiet():
        return frozenset(folders.attempt(lambda: tasks.shapes(own, config), str(own), "build it"))


def _resize(model: Any, promised: Mapping[str, Tensor], where: str) -> None:
    """Give the vocabulary the size of the adapters' embeddings, if they hold any: they grow it when tokens are added.

    FileError where rows that the folder does not have would not come from the adapter either.
    """
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # the library's word for a model without one
        return
    if not isinstance(table, nn.Embedding):
        return
    name = next(name for name, module in model.named_modules() if module is table)
    new = promised.get(f"{name}.weight")
    size = table.num_embeddings
    if new is None or len(new) == size:
        return
    before = {key: tensor.shape for key, tensor in model.named_parameters()}
    folders.attempt(
        lambda: model.resize_token_embeddings(len(new), mean_resizing=False), where, "resize its vocabulary"
    )
    changed = [key for key, tensor in model.named_parameters() if before.get(key) != tensor.shape]
    if missing := [key for key in changed if key not in promised]:
        raise FileError(
            f"{where}: the adapter's vocabulary has {len(new)} tokens, the model's {size}, and "
            f"nothing holds the {printable(missing)} that goes with it."
        )
