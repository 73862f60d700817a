"""What an inertly read checkpoint holds: places with weights, class names, and the class it would have built.

Training code keeps its weights in many places: bare, under `state_dict`, `model_state_dict`, `model`, as averaged
weights (`ema`, `state_dict_ema`) beside the raw ones, as a whole pickled module, wrapped for several devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import FileError
from .pickles import BROKEN, TOO_MUCH, to_tensor
from .unpickle import Record

# Where checkpoints keep weights; averaged ones first: they are what the training code itself evaluates.
_PLACES = (
    "state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema", "state_dict", "model_state_dict",
    "model", "model_state", "net", "network", "weights", "params", "module",
)  # fmt: skip
_NOT_WEIGHTS = ("optim", "sched", "scaler", "rng", "random", "callback", "loops", "hyper", "updates")
# modules that only wrap another: class -> where it is kept
_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}
_LABELS = (
    "names", "class_names", "classes", "label_names", "labels", "CLASSES", "id2label", "idx_to_class",
    "class_to_idx", "label2id",
)  # fmt: skip
_SETTINGS = ("hyper_parameters", "hparams", "args", "cfg", "config", "meta", "dataset_meta", "opt")
# classes that nobody can build by name alone: what to type in their place
_LIBRARIES = {
    "torchvision.models.": "torchvision:NAME",
    "timm.models.": "timm:NAME",
    "transformers.": "hf:FOLDER",
    "torch.": "path/to/your/script.py:FUNCTION",
}
_MAX_NAMES = 1_000_000
_MAX_DEPTH = 200
_LOOK = 3  # dicts in dicts in dicts
_SHOWN = 3


@dataclass(frozen=True)
class Weights:
    """Named tensors found at one place of a checkpoint; `where` is empty at its top."""

    where: str
    tensors: Mapping[str, Tensor]
    class_path: str | None = None


@dataclass(frozen=True)
class Contents:
    """What a file holds: places with weights, best first; labels; the --model that it names, as far as it does."""

    kind: str
    places: tuple[Weights, ...]
    labels: tuple[str, ...] = ()
    architecture: str | None = None

    def summary(self) -> str:
        """`a state dict: 138 tensors, 272,474 values; 10 labels (cat, dog, owl, ... 7 more)`."""
        tensors = self.places[0].tensors
        text = (
            f"{self.kind}: {len(tensors)} tensors, {sum(item.numel() for item in tensors.values()):,} values"
        )
        if self.labels:
            text += f"; {len(self.labels)} labels ({printable(self.labels)})"
        return text


def contents(value: Any, name: str) -> Contents:
    """Look through what `pickles.read` gave; `name` is for messages. FileError where no tensor has a name."""
    try:
        places = tuple(_places(value, "", {}, 0))
    except (*BROKEN, *TOO_MUCH) as error:
        raise FileError(
            f"{name} is damaged: what it holds makes no sense ({type(error).__name__})."
        ) from error
    if not places:
        what = value.path if isinstance(value, Record) else type(value).__name__
        raise FileError(f"{name} holds no weights: it is a {printable([what])} without any named tensors.")
    top = _fields(value)
    path = places[0].class_path and printable([places[0].class_path])
    if path:
        kind = (
            f"a whole module, {path}" if isinstance(value, Record) else f"a checkpoint of the module {path}"
        )
    elif "pytorch-lightning_version" in top:
        kind = "a Lightning checkpoint"
    else:
        kind = "a checkpoint" if places[0].where else "a state dict"
    nested = (top.get(place) for place in _PLACES)
    labels = next((found for item in (value, *nested) if (found := _labels(item))), ())
    return Contents(kind, places, labels, _architecture(top, path))


def printable(names: Sequence[str], shown: int = _SHOWN) -> str:
    """The first few of many names, safe to print: what a file calls its parts may hold any character."""
    first = ("".join(char if char.isprintable() else "?" for char in name)[:120] for name in names[:shown])
    return ", ".join(first) + (f", ... {len(names) - shown} more" if len(names) > shown else "")


def module_weights(module: Record) -> dict[str, Tensor]:
    """The state dict that a pickled module would have had: parameters and persistent buffers by dotted name."""
    weights: dict[str, Tensor] = {}
    todo: list[tuple[str, Record, int]] = [("", module, 0)]
    while todo:
        prefix, record, depth = todo.pop()
        fields = _fields(record)
        skipped = fields.get("_non_persistent_buffers_set") or ()
        for group in ("_parameters", "_buffers"):
            for name, item in _fields(fields.get(group)).items():
                tensor = to_tensor(item)
                if tensor is not None and not (group == "_buffers" and name in skipped):
                    weights[f"{prefix}{name}"] = tensor
        for name, child in _fields(fields.get("_modules")).items():
            if isinstance(child, Record):
                todo.append((f"{prefix}{name}.", child, depth + 1))
        if len(weights) + len(todo) > _MAX_NAMES or depth > _MAX_DEPTH:
            raise FileError("The pickled module in the file contains itself: it is refused.")
    return weights


def _fields(value: Any) -> dict[Any, Any]:
    """The entries of a dict, or the attributes and items of an object."""
    if isinstance(value, Record):
        body = value.args[0] if value.state is None and value.args else None  # torch.fx keeps it there
        return {**(body if isinstance(body, dict) else {}), **value.attributes(), **value.entries}
    return value if isinstance(value, dict) else {}


def _places(value: Any, where: str, seen: dict[int, Any], depth: int) -> Iterator[Weights]:
    fields = _fields(value)
    if not fields or id(value) in seen or depth > _LOOK:
        return
    seen[id(value)] = value
    if isinstance(value, Record) and isinstance(fields.get("_modules"), dict):
        module = _unwrap(value)
        if tensors := module_weights(module):
            yield Weights(where, tensors, module.path)
        return
    known = [key for key in _PLACES if key in fields]
    found = [place for key in known for place in _places(fields[key], _join(where, key), seen, depth + 1)]
    yield from found
    cache: dict[int, Tensor | None] = {}
    direct: dict[str, Tensor] = {}
    for key, item in fields.items():
        if id(item) not in cache:
            cache[id(item)] = to_tensor(item)
        tensor = cache[id(item)]
        # what set_extra_state() makes of its tensor is the module's own business, unpickling included
        if isinstance(key, str) and tensor is not None and not key.endswith("_extra_state"):
            direct[key] = tensor
    if direct and not found:
        yield Weights(where, direct)
    for key, item in fields.items():
        text = str(key).lower()
        if key not in known and not any(word in text for word in _NOT_WEIGHTS):
            yield from _places(item, _join(where, str(key)), seen, depth + 1)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _unwrap(module: Record) -> Record:
    for _ in range(len(_WRAPPERS)):
        inner = _fields(_fields(module).get("_modules")).get(_WRAPPERS.get(module.path))
        if not isinstance(inner, Record):
            break
        module = inner
    return module


def _architecture(top: Mapping[Any, Any], path: str | None) -> str | None:
    if path:
        module, _, name = path.rpartition(".")
        for library, hint in _LIBRARIES.items():
            if module.startswith(library):
                return hint
        return f"path/to/your/script.py:{name}" if module == "__main__" else f"{module}:{name}"
    arch = top.get("arch")
    if isinstance(arch, str) and arch.isidentifier():
        return f"timm:{arch}" if "args" in top and "version" in top else f"torchvision:{arch}"
    return None


def _labels(value: Any) -> tuple[str, ...]:
    fields = _fields(value)
    for source in (fields, *(_fields(fields.get(key)) for key in _SETTINGS)):
        for key in _LABELS:
            if found := _as_labels(source.get(key)):
                return found
    return ()


def _as_labels(value: Any) -> tuple[str, ...]:
    """Class names in order, from a list, {0: 'cat'}, {'0': 'cat'} or {'cat': 0}; () for anything else."""
    names = list(value) if isinstance(value, (list, tuple)) else []
    if isinstance(value, dict):
        pairs = [(item, key) if isinstance(item, int) else (key, item) for key, item in value.items()]
        if all(isinstance(key, int) or (isinstance(key, str) and key.isdecimal()) for key, _ in pairs):
            names = [item for _, item in sorted(pairs, key=lambda pair: int(pair[0]))]
    return tuple(names) if len(names) > 1 and all(isinstance(item, str) for item in names) else ()
