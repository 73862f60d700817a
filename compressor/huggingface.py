"""Hugging Face model folders and PEFT adapter folders: from disk only, every weight accounted for.

No code of the folder is run (`trust_remote_code=False`), nothing is downloaded, and weights are read from
safetensors, or inertly from .bin. The libraries' own loaders warn, or say nothing, when a head is missing and
filled at random: here that is an error.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import pickles
from .architecture import guarded, library
from .capture import quiet
from .checkpoint import printable
from .errors import FileError, UsageError
from .ir import Input

_CHUNK = 1 << 24


def is_folder(path: Path) -> bool:
    """Whether `path` is a model folder in Hugging Face's layout."""
    return (path / "config.json").is_file()


def architecture(folder: Path) -> nn.Module:
    """The model that the folder's config.json describes, its weights as its code makes them."""
    spec, config = f"hf:{folder}", _config(folder)
    kind = _class(config)

    def make() -> Any:
        return kind(config) if kind else _auto(spec).from_config(config, trust_remote_code=False)

    with quiet():
        model: nn.Module = guarded(make, spec, "build it")
    return model


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
    if main == "input_ids" and not getattr(config, "is_encoder_decoder", False):
        names = [
            n for n in ("input_ids", "attention_mask") if n in inspect.signature(model.forward).parameters
        ]
        return tuple(Input(name, torch.int64, ("batch", "sequence")) for name in names)
    size = getattr(config, "image_size", None)
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if main == "pixel_values" and isinstance(height, int) and isinstance(width, int):
        channels = getattr(config, "num_channels", 3)
        return (Input(main, torch.float32, ("batch", channels, height, width)),)
    return ()


def load(folder: Path, allow: Sequence[str] = ()) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, in float32, and notes. Raises FileError unless weights and architecture fit exactly."""
    spec, config = f"hf:{folder}", _config(folder)
    options: dict[str, Any] = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    if any(folder.glob("*.safetensors")):
        options |= {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
        source: str | None = str(folder)
    else:
        options["state_dict"] = _bin_weights(folder)
        source = None
    kind = _class(config) or _auto(spec)
    with quiet():
        model, info = guarded(lambda: kind.from_pretrained(source, **options), spec, "load it")
    notes, problems = [], []
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(f"{what}_keys", ()))
        named = [key for key in keys if any(fnmatchcase(key, pattern) for pattern in allow)]
        if named:
            notes.append(f"{len(named)} {what} weights, by consent ({printable(named)})")
        if rest := [key for key in keys if key not in named]:
            problems.append(f"{len(rest)} {what} ({printable(rest)})")
    if problems:
        raise FileError(
            f"{folder} does not fit its own architecture, {type(model).__name__}: weights {'; '.join(problems)}. "
            f"Consent by name: --allow-missing PATTERN."
        )
    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if stored not in ("None", "float32"):
        notes.append(f"{stored} weights were read as float32")
    return model, tuple(notes)


def adapt(model: nn.Module, folder: Path) -> tuple[nn.Module, str]:
    """`model` with the PEFT adapter in `folder`, and a note. Raises FileError unless every adapter tensor is used."""
    spec = f"--adapter {folder}"
    settings = _json(folder / "adapter_config.json", spec)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise FileError(f"{spec}: there is no adapter_model.safetensors in it.")
    if settings.get("megatron_config") is not None:
        raise FileError(f"{spec}: its adapter_config.json names a module to import (megatron_core): refused.")
    peft = library("peft", spec)
    with quiet():
        adapted = guarded(lambda: peft.PeftModel.from_pretrained(model, str(folder)), spec, "attach it")
    ours: dict[str, Tensor] = peft.get_peft_model_state_dict(adapted)
    theirs = library("safetensors.torch", spec).load_file(weights)
    missing, unused = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    wrong = sorted(key for key in ours.keys() & theirs.keys() if not _equal(ours[key], theirs[key]))
    problems = [
        f"{len(keys)} {what} ({printable(keys)})"
        for keys, what in ((missing, "missing"), (unused, "not used"), (wrong, "not taken over"))
        if keys
    ]
    if problems:
        raise FileError(f"{spec} does not fit {type(model).__name__}: weights {'; '.join(problems)}.")
    return adapted, f"adapter {folder.name} ({settings.get('peft_type')}): {len(ours)} tensors"


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of one file's bytes, or of several files' names and bytes."""
    sha = hashlib.sha256()
    files = sorted(paths)
    for path in files:
        if len(files) > 1:
            sha.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                sha.update(chunk)
    return sha.hexdigest()


def files(folder: Path) -> list[Path]:
    """The files of a folder that decide what the model is."""
    patterns = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "*.bin")
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _auto(spec: str) -> Any:
    return library("transformers", spec).AutoModel


def _config(folder: Path) -> Any:
    spec = f"hf:{folder}"
    if not is_folder(folder):
        raise UsageError(f"{spec}: there is no config.json in that folder.")
    settings = _json(folder / "config.json", spec)
    if "quantization_config" in settings:
        raise FileError(
            f"{folder} holds weights that are quantised already; give the model that they were made from."
        )
    auto = library("transformers", spec).AutoConfig
    config = guarded(
        lambda: auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False),
        spec,
        "read its config.json",
    )
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache is no tensor: it cannot be an output of a graph
    return config


def _class(config: Any) -> Any:
    """The transformers class that the config names first; None where it names none that exists."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


def _bin_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    parts = sorted(folder.glob("pytorch_model*.bin"))
    if not parts:
        raise FileError(
            f"{folder} holds no weights: there is no *.safetensors and no pytorch_model.bin in it."
        )
    for part in parts:
        value = pickles.read(part)
        found = (
            {key: pickles.to_tensor(item) for key, item in value.items()} if isinstance(value, dict) else {}
        )
        weights |= {str(key): tensor for key, tensor in found.items() if tensor is not None}
    return weights


def _json(path: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{where}: there is no {path.name} in it.") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{where}: its {path.name} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise FileError(f"{where}: its {path.name} is not a table of settings.")
    return value


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.cpu(), theirs.to(ours.dtype))
