"""Folders as people have them, read as data: Hugging Face models, PEFT adapters, sentence-transformers pipelines.

Nothing of a folder is imported, run or unpickled, and nothing is fetched: an adapter's base model is looked for on
this disk only. Tensors stay in their files, memory-mapped, until something computes with them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from . import pickles
from .architecture import explain
from .errors import CompressorError, FileError, UsageError

_T = TypeVar("_T")

_CHUNK = 1 << 24
_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
               "tokenizer.model", "tokenizer_config.json")  # fmt: skip
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MEMBER = re.compile(r"(?!\.)[\w.-]+")  # a file beside its index


def kind(folder: Path) -> str:
    """`sentence` (modules.json), `model` (config.json), `adapter` (adapter_config.json), or nothing."""
    return "sentence" if (folder / "modules.json").is_file() else transformer_kind(folder)


def transformer_kind(folder: Path) -> str:
    """`model`, `adapter` or nothing, whether a pipeline lies in the same folder or not.

    FileError for a model and an adapter in one folder: which base the adapter belongs on is then anybody's guess.
    """
    has_model = (folder / "config.json").is_file()
    if not (folder / "adapter_config.json").is_file():
        return "model" if has_model else ""
    if has_model and (_plain(folder) or any(folder.glob("pytorch_model*.bin"))):
        raise FileError(
            f"{folder} holds a model and an adapter: move adapter_config.json and adapter_model.safetensors "
            f"to a folder of their own, and give that as --adapter."
        )
    return "adapter"


# ------------------------------------------------------------------------------ adapters


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: its adapter_config.json, the tensors by their names in the file, the weight of its change."""

    folder: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    weight: float = 1.0

    @property
    def where(self) -> str:
        return f"adapter {self.folder}"

    @property
    def type(self) -> str:
        """PEFT's name of the method, `LORA` for example."""
        return str(self.settings.get("peft_type"))

    @property
    def tensors_of_base(self) -> dict[str, Tensor]:
        """Tensors by the name that they would have in the base model: trained heads and embeddings are among them."""
        found = {}
        for key, tensor in self.tensors.items():
            name = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            for prefix in ("base_model.model.", "base_model."):  # the shorter: of methods that wrap no layer
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = tensor
        return found


def adapter(words: str | os.PathLike[str]) -> Adapter:
    """`DIR` or `DIR:weight`. UsageError for the weight, FileError for the folder."""
    text, weight = os.fspath(words), 1.0
    folder = Path(text).expanduser()
    head, colon, tail = text.rpartition(":")
    if colon and not folder.exists():
        folder = Path(head).expanduser()
        try:
            weight = float(tail)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UsageError(
                f"--adapter {text}: {tail!r} is no weight; write for example --adapter {head}:0.5"
            )
    if not folder.is_dir():
        raise FileError(f"--adapter {folder}: there is no such folder.{did_you_mean(folder)}")
    where = f"adapter {folder}"
    settings = read_table(folder / "adapter_config.json", where)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = " (adapter_model.bin is a pickle: save it as safetensors)" if pickled else ""
        raise FileError(f"{where}: there is no adapter_model.safetensors in it{hint}.")
    if not isinstance(settings.get("peft_type"), str):
        raise FileError(f"{where}: its adapter_config.json names no peft_type.")
    return replace(Adapter(folder, settings, read_safetensors(file)), weight=weight)


def base(one: Adapter) -> Path:
    """The folder of the model that an adapter was trained on: a local path, or the local cache of the hub."""
    name, folder = one.settings.get("base_model_name_or_path"), one.folder
    advice = f"Give the base model's folder as MODEL, and --adapter {folder}."
    if not isinstance(name, str) or not name:
        raise FileError(
            f"{folder} is an adapter whose adapter_config.json does not name its base model. {advice}"
        )
    revision = one.settings.get("revision")
    path = Path(name).expanduser()
    places = [path] if path.is_absolute() else [folder / path, path]
    cached = _cached(name, revision if isinstance(revision, str) else "main")
    for place in [*places, *cached]:
        found = kind(place) if place.is_dir() else ""
        if found == "adapter":
            raise FileError(
                f"{folder} was trained on top of another adapter, {place}: merge that one first. {advice}"
            )
        if found:
            return place
    raise FileError(
        f"{folder} is an adapter for {name}, which is neither a model folder here nor in the hub's cache "
        f"{_hub()}; nothing is downloaded. {advice}"
    )


def _hub() -> Path:
    """Where the hub's own client keeps what it has fetched."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return (Path(os.environ.get("HF_HOME") or default) / "hub").expanduser()


def _cached(name: str, revision: str) -> list[Path]:
    """Snapshots of a repository in the hub's cache: the revision's."""
    if not _REPOSITORY.fullmatch(name) or not _MEMBER.fullmatch(revision):
        return []
    repository = _hub() / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return [repository / "snapshots" / commit] if _MEMBER.fullmatch(commit) else []


# ------------------------------------------------------------------------------- reading


def read_json(path: Path, where: str) -> Any:
    """FileError, which begins with `where`, for a file that is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{where}: there is no {path.name} in it.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(
            f"{where}: its {path.name} cannot be read: {str(error) or 'nested too deep'}."
        ) from None


def read_table(path: Path, where: str) -> dict[str, Any]:
    value = read_json(path, where)
    if not isinstance(value, dict):
        raise FileError(f"{where}: its {path.name} is not a table of settings.")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one file, memory-mapped."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise FileError(f"{path.name} is damaged ({str(error).splitlines()[0]}). Fetch it again.") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder: safetensors, in one file or in parts, or inertly read .bin files."""
    weights: dict[str, Tensor] = {}
    parts = _parts(folder)
    for part in parts or sorted(folder.glob("pytorch_model*.bin")):
        found = read_safetensors(part) if parts else _read_pickle(part)
        if twice := sorted(weights.keys() & found.keys()):
            raise FileError(
                f"{folder} holds {twice[0]!r} in more than one of its files: keep one set of weights."
            )
        weights |= found
    if not weights:
        raise FileError(
            f"{folder} holds no weights: there is no model.safetensors and no pytorch_model.bin in it."
        )
    return weights


def _parts(folder: Path) -> list[Path]:
    """The safetensors files of a model, as its index names them."""
    if not (folder / _INDEX).is_file():
        one = folder / "model.safetensors"
        return [one] if one.is_file() else _plain(folder)
    table = read_table(folder / _INDEX, str(folder)).get("weight_map")
    names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
    for name in names:
        if not _MEMBER.fullmatch(name) or not (folder / name).is_file():
            raise FileError(f"{folder}: {_INDEX} names {name[:80]!r}, which is not there. Fetch it again.")
    return [folder / name for name in names]


def _plain(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))


def _read_pickle(path: Path) -> dict[str, Tensor]:
    value = pickles.read(path)
    found = {key: pickles.to_tensor(item) for key, item in value.items()} if isinstance(value, dict) else {}
    return {str(key): tensor for key, tensor in found.items() if tensor is not None}


def tokenizer(folders: Iterable[Path]) -> Path | None:
    """The first folder that holds a tokenizer's files."""
    places = list(folders)
    for names in (_TOKENIZERS[:-1], _TOKENIZERS[-1:]):  # settings alone do where the tokens are bytes
        for folder in places:
            if any((folder / name).is_file() for name in names):
                return folder
    return None


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of one file's bytes, or of several files' names and bytes, wherever their folders lie."""
    sha = hashlib.sha256()
    files = sorted(paths, key=lambda path: (path.name, path))
    for path in files:
        if len(files) > 1:
            sha.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                sha.update(chunk)
    return sha.hexdigest()


def files(folder: Path) -> list[Path]:
    """The files of a folder that decide what the model is, those of a pipeline's modules included."""
    patterns = ("config.json", "adapter_config.json", "sentence_bert_config.json", "modules.json", "*.safetensors",
                _INDEX, "pytorch_model*.bin")  # fmt: skip
    return [
        path for pattern in patterns for depth in ("", "[0-9]_*/") for path in folder.glob(depth + pattern)
    ]


def attempt(action: Callable[[], _T], where: str, what: str) -> _T:
    """Run a library's code on the files; whatever it raises becomes one line that begins with `where`."""
    try:
        return action()
    except (CompressorError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise FileError(f"{where}: could not {what}: {explain(error)}") from error


def did_you_mean(path: Path) -> str:
    """The path beside a missing one whose name is most like it, as a question; nothing where none is."""
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""
