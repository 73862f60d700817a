"""Files on disk -> a model, inertly: what a file holds is data, whatever its name and whoever made it.

    .pt2                              an exported program, through the gate (gate.py)
    .safetensors                      weights; the architecture comes from --model (architecture.py)
    .pt .pth .ckpt .bin .tar          any checkpoint, read without running its pickle (pickles.py), and --model
    a folder with config.json         a Hugging Face model (huggingface.py)
    a folder with modules.json        a sentence-transformers pipeline (sentence.py)
    a folder with adapter_config.json an adapter alone; its base model is looked for on this disk (folders.py)

On any but the first, --adapter puts PEFT adapters (adapters.py). The kind is told by the first bytes, not by the name.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from . import (
    adapters,
    architecture,
    archive,
    decoding,
    detectors,
    folders,
    gate,
    huggingface,
    pickles,
    sentence,
    seq2seq,
    tasks,
    weights,
)
from . import receipt as receipts
from .blend import Combination, combination
from .checkpoint import Contents, Weights, contents
from .errors import FileError, UsageError
from .folders import Adapter
from .ir import Input
from .receipt import Continued

_MODULES = ("ema", "model_ema", "model", "module", "net")  # where checkpoints keep whole modules


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, and where it came from.

    sha256: of the file's bytes, or of the folder's config and weights. example: (args, kwargs) found in the file.
    inputs: what the model takes, where its library says so. labels: class names found in the file. notes: what the
    user should know, a few words each. tokenizer: the folder that holds the tokenizer's files, of text models.
    continued: the receipt of earlier runs that came with it.
    """

    model: nn.Module | ExportedProgram
    path: Path
    sha256: str
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    inputs: tuple[Input, ...] = ()
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tokenizer: Path | None = None
    continued: Continued | None = None


Words = str | os.PathLike[str]


def load(
    path: Words,
    *,
    model: str | None = None,
    adapter: Words | Sequence[Words] = (),
    combine: str | Combination | None = None,
    task: str | None = None,
    trust_pickle: bool = False,
    allow_missing: Sequence[str] = (),
) -> Loaded:
    """The model in `path`: an exported program, a folder's model, or the architecture `model` with the file's weights.

    `model` is a --model specification (architecture.py); `adapter` one or several PEFT folders, each with a weight
    after a colon; `combine` how several become one (blend.py), side by side if None; `task` what a folder's model is
    for (tasks.py); `trust_pickle` the consent to run code of the file; `allow_missing` patterns of weights that it may
    lack or hold in vain. Raises FileError for the files, UsageError for the other arguments.
    """
    path = Path(path).expanduser()
    tasks.check(task)
    how = combine if isinstance(combine, Combination) else combination(combine)
    try:
        _check_exists(path)
        kind = "folder" if path.is_dir() else sniff(path)
        if kind == "pt2":
            unfit = {"--model": model, "--adapter": adapter, "--combine": combine, "--task": task}
            return _load_program(path, unfit, trust_pickle)
        stack = [folders.adapter(words) for words in words_of(adapter)]
        if kind == "folder":
            return _finish(_load_folder(path, model, stack, how, task, allow_missing))
        if task is not None:
            raise UsageError(f"--task {task} is for the model of a folder, and {path.name} is a file.")
        loaded = _load_weights(path, kind, model, trust_pickle, allow_missing)
        return _finish(_adapted(loaded, stack, how))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from error


def words_of(adapter: Words | Sequence[Words]) -> Sequence[Words]:
    """One adapter or several, as a sequence."""
    return [adapter] if isinstance(adapter, (str, os.PathLike)) else adapter


def adapters_of(path: Words, adapter: Words | Sequence[Words] = ()) -> list[dict[str, Any]]:
    """What adapters a model would run with, one row each, told before anything is built or run."""
    path = Path(path).expanduser()
    _check_exists(path)
    inside: list[dict[str, Any]] = []
    if path.is_dir():
        root = sentence.transformer(path) if folders.kind(path) == "sentence" else path
        if folders.transformer_kind(root) == "adapter":
            inside = [adapters.describe(folders.adapter(root))]
        else:
            inside = adapters.found_in(folders.read_weights(root))
    elif sniff(path) != "pt2":
        inside = [row for place in peek(path).places[:1] for row in adapters.found_in(place.tensors)]
    return inside + [adapters.describe(folders.adapter(words)) for words in words_of(adapter)]


def peek(path: Words) -> Contents:
    """What a file of weights holds, without a model: for messages and for `compress inspect`."""
    path = Path(path).expanduser()
    _check_exists(path)
    kind = "folder" if path.is_dir() else sniff(path)
    if kind == "safetensors":
        return Contents("a safetensors file", (Weights("", folders.read_safetensors(path)),))
    if kind != "pickle":
        raise UsageError(f"{path.name} holds its architecture; it needs no --model.")
    return contents(pickles.read(path), path.name)


def sniff(path: Path) -> str:
    """`pt2`, `safetensors` or `pickle` (any torch checkpoint), by content. FileError for anything else."""
    if path.suffix.lower() in (".onnx", ".ort"):
        raise FileError(
            f"{path.name} is ONNX already. To see what is in it: compress inspect {shlex.quote(str(path))}; "
            f"to compress it, give the PyTorch model that it was exported from."
        )
    with path.open("rb") as file:
        head = file.read(512)
        if head.startswith(archive.MAGIC):
            return "pt2" if gate.is_program(archive.names(file, path.name)) else "pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    raise FileError(f"{path.name} is no model: {_what(head)}.")


def _what(head: bytes) -> str:
    signatures = {
        b"": "it is empty",
        b"version https://git-lfs": "it is a Git LFS pointer; run `git lfs pull` to fetch the file itself",
        b"\x1f\x8b": "it is gzip-compressed; unpack it first",
        b"\x89HDF": "it is an HDF5 (Keras) file",
        b"GGUF": "it is a GGUF file, whose weights are quantised already; give the PyTorch model",
    }
    found = [text for start, text in signatures.items() if head.startswith(start) and (start or not head)]
    if found:
        return found[0]
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it and give the checkpoint inside"
    text = head.decode("utf-8", "replace")
    if text.lstrip().lower().startswith(("<!doctype", "<html")):
        return "it is a web page; the download led to a page, not to the file"
    if all((char.isprintable() or char.isspace()) and char != "\ufffd" for char in text[:-4]):
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        return f"it is a text file that begins with {first[:40]!r}"
    return "it begins with the bytes of no format that torch or safetensors writes"


def _check_exists(path: Path) -> None:
    if path.is_file() or (path.is_dir() and folders.kind(path)):
        return
    if path.is_dir():
        raise FileError(
            f"{path} is a folder without config.json: give a model file, a Hugging Face folder or an adapter's folder."
        )
    raise FileError(f"There is no file {path}.{folders.did_you_mean(path)}")


def _load_folder(
    path: Path,
    model: str | None,
    stack: list[Adapter],
    how: Combination | None,
    task: str | None,
    allow: Sequence[str],
) -> Loaded:
    root, pipeline = path, None
    if folders.kind(path) == "sentence":
        root = sentence.transformer(path)
        pipeline = sentence.read(path) if task is None else None
    if folders.transformer_kind(root) == "adapter":
        stack = [folders.adapter(root), *stack]
        if model is not None:
            return _adapted(_load_factory(path, model), stack, how)
        root = folders.base(stack[0])
        root = sentence.transformer(root) if folders.kind(root) == "sentence" else root
    elif model is not None:
        raise UsageError(f"{path} names its architecture in config.json: leave --model out.")
    if pipeline is not None:
        task = "feature-extraction"
    built, notes = huggingface.load(root, task=task, adapters=stack, allow=allow)
    files = {file for folder in (path, root) for file in folders.files(folder)}
    loaded = Loaded(
        built,
        path,
        folders.digest(files),
        inputs=huggingface.inputs(built),
        labels=huggingface.labels(built),
        notes=notes,
        tokenizer=folders.tokenizer([*(one.folder for one in stack), path, root]),
    )
    loaded = _adapted(loaded, stack, how)
    if task in tasks.IN_STEPS and isinstance(loaded.model, nn.Module):
        whole = loaded.model.eval()
        inputs, example = seq2seq.parted(whole, task) if "seq2seq" in task else decoding.stepping(whole)
        return replace(loaded, inputs=inputs, example=((), example))
    if pipeline is None or not isinstance(loaded.model, nn.Module):
        return loaded
    whole = sentence.SentenceEmbedding(loaded.model, pipeline.stages)
    return replace(loaded, model=whole, labels=(), notes=(*loaded.notes, *pipeline.notes))


def _load_factory(path: Path, model: str) -> Loaded:
    """The base of an adapter as the user's own code makes it, its weights included."""
    if model.partition(":")[0] in ("hf", "timm", "torchvision"):
        raise UsageError(
            f"--model {model} has no trained weights: give the file that holds them as MODEL, and --adapter {path}."
        )
    note = f"the base model's weights are those that {model} makes"
    return Loaded(architecture.build(model), path, folders.digest(folders.files(path)), notes=(note,))


def _adapted(loaded: Loaded, stack: Sequence[Adapter], how: Combination | None) -> Loaded:
    """The same with its adapters attached; they are part of what the checksum is of."""
    if not stack:
        if how is not None:
            raise UsageError(f"--combine {how.kind} takes several adapters: give them by --adapter.")
        return loaded
    if not isinstance(loaded.model, nn.Module):
        raise UsageError(f"{loaded.path.name} is an exported program: no adapter can be attached to it.")
    model, notes = adapters.attach(loaded.model, stack, how)
    parts = [
        loaded.sha256,
        str(how),
        *(f"{folders.digest(folders.files(one.folder))} {one.weight}" for one in stack),
    ]
    sha256 = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    return replace(loaded, model=model, sha256=sha256, notes=(*loaded.notes, *notes))


def _load_program(path: Path, unfit: Mapping[str, Any], trust: bool) -> Loaded:
    for option, value in unfit.items():
        if value:
            raise UsageError(f"{path.name} is an exported program, complete as it is: leave {option} out.")
    data = path.read_bytes()
    program = gate.open_program(data, path.name, trust=trust)
    tensors = {**program.constants, **program.state_dict}
    weights.check_finite(tensors, set(program.graph_signature.parameters), path.name)
    example = program.example_inputs
    valid = isinstance(example, tuple) and len(example) == 2 and isinstance(example[1], dict)
    loaded = Loaded(program, path, hashlib.sha256(data).hexdigest(), example if valid else None)
    return _with_receipt(loaded, program, data)


def _with_receipt(loaded: Loaded, program: ExportedProgram, data: bytes) -> Loaded:
    """The same with the receipt in its extra file; one that cannot be read is left out, and a note says so."""
    name = loaded.path.name
    text = archive.find(data, f"/extra/{receipts.MEMBER}", receipts.MAX_BYTES + 1, name)
    if text is None:
        return loaded
    try:
        found = receipts.continued(receipts.read(text), program.state_dict)
    except receipts.Unreadable as reason:
        note = f"the receipt in {name} is left out, so the report begins anew: {reason}"
        return replace(loaded, notes=(*loaded.notes, note))
    return replace(loaded, continued=found)


def _load_weights(path: Path, kind: str, model: str | None, trust: bool, allow: Sequence[str]) -> Loaded:
    sha256 = folders.digest([path])
    if kind == "pickle" and trust and model is None:
        module = _find_module(_unpickle(path))
        if isinstance(module, torch.jit.ScriptModule):
            raise pickles.torchscript(path.name)
        if module is not None:
            return Loaded(module, path, sha256, notes=("its pickle was run, by consent",))
    found = peek(path)
    if model is None:
        raise FileError(_advice(path, found))
    if model.startswith("hf:"):
        built = huggingface.architecture(Path(model.removeprefix("hf:")).expanduser())
    else:
        built = architecture.build(model)
    notes = weights.fill(built, found, path.name, allow)
    return Loaded(
        built,
        path,
        sha256,
        inputs=detectors.inputs(built),
        labels=found.labels or huggingface.labels(built),
        notes=notes,
    )


def _advice(path: Path, found: Contents) -> str:
    guess = found.architecture or "path/to/your/model.py:FACTORY"
    trust = " (or run its pickle, if you trust it: --trust-pickle)" if found.places[0].class_path else ""
    return (
        f"{path.name} holds {found.summary()}; but the code that builds the model is not in it. "
        f"Name it, and what the model takes: compressor {shlex.quote(str(path))} --model {shlex.quote(guess)} "
        f"--input 'x:f32[?,3,224,224]'{trust}"
    )


def _unpickle(path: Path) -> Any:
    """The real thing, by consent: classes that the file names are imported, and its code is run."""
    architecture.append_folder(os.getcwd())
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs anything, which raises anything
        raise FileError(f"{path.name} could not be unpickled: {architecture.explain(error)}") from error


def _find_module(value: Any) -> nn.Module | None:
    """The module in an unpickled checkpoint, out of its wrappers for several devices or for the compiler."""
    places = [value.get(key) for key in _MODULES] if isinstance(value, dict) else []
    module = next((item for item in (value, *places) if isinstance(item, nn.Module)), None)
    while isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def _finish(loaded: Loaded) -> Loaded:
    """Eval mode, all weights there and finite; float32 where half precision would not run here."""
    name, notes, model = loaded.path.name, list(loaded.notes), loaded.model
    if not isinstance(model, nn.Module):
        return loaded
    empty = [key for key, item in (*model.named_parameters(), *model.named_buffers()) if item.is_meta]
    if empty:
        raise FileError(f"{name} leaves {len(empty)} tensors of the model without values: {empty[0]}, ...")
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    weights.check_finite(model.state_dict(keep_vars=True), parameters, name)
    halves = {item.dtype for item in model.parameters()} & {torch.float16, torch.bfloat16}
    if halves:
        model = model.float()
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves))
        notes.append(f"{kinds} weights were widened to float32")
    return replace(loaded, model=model.eval(), notes=tuple(notes))
