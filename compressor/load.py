"""Files on disk -> a model, inertly: what a file holds is data, whatever its name and whoever made it.

    .pt2                          an exported program, through the gate (gate.py)
    .safetensors                  weights; the architecture comes from --model
    .pt .pth .ckpt .bin .tar      any checkpoint, read by a pickle machine that runs nothing (pickles.py), and --model
    a folder with config.json     a Hugging Face model (huggingface.py), and a PEFT adapter on top

The kind is told from the first bytes, not from the name.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from . import architecture, archive, checkpoint, gate, huggingface, pickles
from .checkpoint import Contents
from .errors import FileError, UsageError

_TRUST = "Nothing in it was run. If you trust whoever made it, add --trust-pickle."


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and where it came from.

    sha256: of the file's bytes, or of the folder's config and weights. example: (args, kwargs) found in the file.
    labels: class names found in the file. notes: what the user should know, one sentence each.
    """

    model: nn.Module | ExportedProgram
    path: Path
    sha256: str
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    adapter: str | None = None,
    trust_pickle: bool = False,
    allow_missing: Sequence[str] = (),
) -> Loaded:
    """The model in `path`: an exported program, or the architecture `model` filled with the weights of the file.

    `model` is a --model specification (architecture.py), `adapter` a PEFT folder, `trust_pickle` the user's consent
    to run code of the file, `allow_missing` name patterns of weights that may be missing in it or stay unused.
    Raises FileError for the file, UsageError for `model`.
    """
    path = Path(path).expanduser()
    _check_exists(path)
    if path.is_dir():
        loaded = _load_folder(path, model, allow_missing)
    elif (kind := sniff(path)) == "pt2":
        loaded = _load_program(path, model, trust_pickle)
    else:
        loaded = _load_weights(path, kind, model, trust_pickle, allow_missing)
    if isinstance(loaded.model, nn.Module):
        return _finish(loaded, adapter)
    if adapter is not None:
        raise UsageError(f"--adapter needs a model with modules; {path.name} is an exported program.")
    program = loaded.model
    constants = {key: value for key, value in program.constants.items() if key not in program.state_dict}
    parameters = set(program.graph_signature.parameters)
    checkpoint.check_finite({**program.state_dict, **constants}, parameters, path.name)
    return loaded


def peek(path: str | os.PathLike[str]) -> Contents:
    """What a file of weights holds, without a model: for messages and for `compress inspect`."""
    path = Path(path).expanduser()
    _check_exists(path)
    kind = sniff(path)
    if kind == "safetensors":
        return Contents("a safetensors file", (checkpoint.Weights("", _safetensors(path)),))
    if kind != "pickle":
        raise UsageError(f"{path.name} is an exported program: it holds its architecture.")
    return checkpoint.contents(pickles.read(path), path.name)


def sniff(path: Path) -> str:
    """`pt2`, `safetensors` or `pickle` (any torch checkpoint), by content. Raises FileError for anything else."""
    with path.open("rb") as file:
        head = file.read(512)
    if path.suffix.lower() in (".onnx", ".ort"):
        raise FileError(
            f"{path.name} is ONNX already. See what is in it with: compress inspect {shlex.quote(str(path))}; "
            f"to compress the model, give the PyTorch model that it was exported from."
        )
    if not head:
        raise FileError(f"{path.name} is empty.")
    if head[:4] == archive.MAGIC:
        with path.open("rb") as file:
            return "pt2" if _is_program(file, path) else "pickle"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    if head[:1] == b"\x80" and path.suffix != ".pt2":
        return "pickle"
    raise FileError(f"{path.name} is not a model: {_what(head)}.")


def _is_program(file: Any, path: Path) -> bool:
    import zipfile

    try:
        names = zipfile.ZipFile(file).namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        if path.suffix == ".pt2":
            return True  # the gate will say what is wrong
        raise FileError(
            f"{path.name} is damaged: {str(error).lower()}. It may have been cut short; fetch it again."
        ) from None
    return any(
        name.endswith(("/archive_format", "serialized_exported_program.json")) or "/models/" in name
        for name in names
    )


def _what(head: bytes) -> str:
    text = head.decode("utf-8", "replace")
    if text.startswith("version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull` to fetch the file itself"
    if text.lstrip().lower().startswith(("<!doctype", "<html")):
        return "it is a web page; the download link led to a page, not to the file"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it and give the checkpoint inside"
    if head[:2] == b"\x1f\x8b":
        return "it is gzip-compressed; unpack it first"
    if head[:4] == b"\x89HDF":
        return "it is an HDF5 (Keras) file"
    if head[:4] == b"GGUF":
        return "it is a GGUF file, whose weights are quantised already; give the PyTorch model"
    if text.isprintable() or all(char.isprintable() or char.isspace() for char in text):
        return f"it is a text file that begins with {text.split(chr(10))[0].strip()[:40]!r}"
    return "its first bytes are those of no format that torch or safetensors writes"


def _check_exists(path: Path) -> None:
    if path.is_dir() and not huggingface.is_folder(path):
        if (path / "adapter_config.json").is_file():
            raise FileError(f"{path} is an adapter. Give the folder of its base model, and --adapter {path}.")
        raise FileError(
            f"{path} is a folder without config.json; give a model file, or a Hugging Face model folder."
        )
    if path.is_dir() or path.is_file():
        return
    folder = path.parent
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    hint = f" Did you mean {folder / near[0]}?" if near else ""
    raise FileError(f"There is no file {path}.{hint}")


def _load_folder(path: Path, model: str | None, allow: Sequence[str]) -> Loaded:
    if model is not None:
        raise UsageError(f"{path} says in its config.json what the architecture is; leave --model out.")
    built, labels, notes = huggingface.load(path, allow)
    return Loaded(built, path, huggingface.digest(huggingface.files(path)), labels=labels, notes=notes)


def _load_program(path: Path, model: str | None, trust: bool) -> Loaded:
    if model is not None:
        raise UsageError(
            f"{path.name} is an exported program, which holds its architecture; leave --model out."
        )
    data = path.read_bytes()
    program = gate.open_program(data, path.name, trust=trust)
    example = program.example_inputs
    valid = isinstance(example, tuple) and len(example) == 2 and isinstance(example[1], dict)
    return Loaded(program, path, hashlib.sha256(data).hexdigest(), example=example if valid else None)


def _load_weights(path: Path, kind: str, model: str | None, trust: bool, allow: Sequence[str]) -> Loaded:
    sha256 = huggingface.digest([path])
    if kind == "pickle" and trust:
        value = _unpickle(path)
        module = _find_module(value)
        if module is not None and model is None:
            return Loaded(module, path, sha256, notes=("its pickle was run, by consent",))
    found = peek(path)
    if model is None:
        raise FileError(_advice(path, found))
    built = (
        huggingface.architecture(Path(model[3:]).expanduser())
        if model.startswith("hf:")
        else architecture.build(model)
    )
    notes = checkpoint.fill(built, found, path.name, allow)
    return Loaded(built, path, sha256, labels=found.labels, notes=notes)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise FileError(f"{path.name} is damaged: {str(error).splitlines()[0]}. Fetch it again.") from None


def _advice(path: Path, found: Contents) -> str:
    command = f"compress {shlex.quote(str(path))} --model {shlex.quote(found.architecture or 'path/to/file.py:FACTORY')}"
    trust = " (or run the pickle, if you trust it: --trust-pickle)" if found.places[0].class_path else ""
    return (
        f"{path.name} holds {found.summary()}, but no architecture that can be run without its code. "
        f"Name the code that builds the model: {command}{trust}"
    )


def _unpickle(path: Path) -> Any:
    """The real thing, by consent: the classes in the file are imported and their code is run."""
    architecture.append_folder(os.getcwd())
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs anything, which raises anything
        raise FileError(f"{path.name} could not be unpickled: {architecture.explain(error)}") from error


def _find_module(value: Any) -> nn.Module | None:
    places = (
        [value.get(key) for key in ("ema", "model_ema", "model", "module", "net")]
        if isinstance(value, dict)
        else []
    )
    module = next((item for item in (value, *places) if isinstance(item, nn.Module)), None)
    while module is not None:
        inner = (
            getattr(module, "module", None)
            if type(module).__module__.startswith("torch.nn.parallel")
            else None
        )
        inner = inner if isinstance(inner, nn.Module) else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner
    return None


def _finish(loaded: Loaded, adapter: str | None) -> Loaded:
    """Eval mode, adapter, whole and finite weights, float32 where half would not run on this machine."""
    model, notes = loaded.model, list(loaded.notes)
    assert isinstance(model, nn.Module)
    if adapter is not None:
        model, note = huggingface.adapt(model, Path(adapter).expanduser())
        notes.append(note)
    tensors = dict(model.state_dict(keep_vars=True))
    unfilled = [key for key, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if unfilled:
        raise FileError(
            f"{loaded.path.name} leaves {len(unfilled)} tensors of the model without values ({unfilled[0]}, ...)."
        )
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    checkpoint.check_finite(tensors, parameters, loaded.path.name)
    halves = {
        str(p.dtype).removeprefix("torch.")
        for p in model.parameters()
        if p.dtype in (torch.float16, torch.bfloat16)
    }
    if halves:
        model = model.float()
        notes.append(f"{' and '.join(sorted(halves))} weights were widened to float32")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Loaded(model.eval(), loaded.path, loaded.sha256, loaded.example, loaded.labels, tuple(notes))
