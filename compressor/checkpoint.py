"""What a checkpoint holds (weights, class path, labels), and its weights into a model, strictly.

A randomly initialised layer that no file filled is a wrong answer that every later check would pass. So every
parameter and every persistent buffer comes from the file, and every tensor of the file is used, or the user consents
by name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import FileError
from .pickles import Record, to_tensor

# Where checkpoints keep weights, averaged ones first: they are what the training code itself evaluates.
_PLACES = (
    "state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema", "state_dict", "model_state_dict", "model",
    "model_state", "net", "network", "weights", "params", "module",
)  # fmt: skip
_AVERAGED = ("ema",)
_NOT_WEIGHTS = (
    "optim",
    "sched",
    "scaler",
    "rng",
    "random",
    "callback",
    "loops",
    "hyper",
    "updates",
    "best_fitness",
)
_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.optim.swa_utils.AveragedModel": "module",
}
_LABELS = (
    "names", "class_names", "classes", "label_names", "labels", "CLASSES", "id2label", "idx_to_class", "class_to_idx",
    "label2id",
)  # fmt: skip
_SETTINGS = ("hyper_parameters", "hparams", "args", "cfg", "config", "meta", "dataset_meta", "opt")
# classes that nobody can build without arguments: what to type instead
_LIBRARIES = {
    "torchvision.models.": "torchvision:NAME", "timm.models.": "timm:NAME", "transformers.": "hf:FOLDER",
    "torch.": "path/to/your/script.py:FUNCTION",
}  # fmt: skip
_MAX_NAMES = 1_000_000
_SHOWN = 3
_DOT = re.compile(r"\.")
_DEPTH, _PREFIXES = 3, 16  # prefixes tried: how many names deep, how many of the commonest


@dataclass(frozen=True)
class Weights:
    """Named tensors found at one place of a checkpoint (`where` is empty at its top)."""

    where: str
    tensors: Mapping[str, Tensor]
    class_path: str | None = None


@dataclass(frozen=True)
class Contents:
    """What a file holds: places with weights, best first; labels; the architecture as far as the file names it."""

    kind: str
    places: tuple[Weights, ...]
    labels: tuple[str, ...] = ()
    architecture: str | None = None

    def summary(self) -> str:
        """`a state dict: 138 tensors, 272,474 numbers; 10 labels (cat, dog, ...)`"""
        first = self.places[0].tensors
        text = (
            f"{self.kind}: {len(first)} tensors, {sum(tensor.numel() for tensor in first.values()):,} numbers"
        )
        if self.labels:
            shown = ", ".join(self.labels[:_SHOWN])
            text += f"; {len(self.labels)} labels ({shown}{', ...' if len(self.labels) > _SHOWN else ''})"
        return text


def contents(value: Any, name: str) -> Contents:
    """Look through an inertly read checkpoint. Raises FileError where it holds no named tensors."""
    places = tuple(_places(value, "", {}))
    if not places:
        what = f"a {value.path}" if isinstance(value, Record) else f"a {type(value).__name__}"
        raise FileError(f"{name} holds {what} without any named tensors: there are no weights in it.")
    top = _fields(value)
    path = places[0].class_path
    if path:
        kind = (
            f"a whole module {path}"
            if isinstance(value, Record)
            else f"a checkpoint with a whole module {path}"
        )
    elif "pytorch-lightning_version" in top:
        kind = "a Lightning checkpoint"
    elif places[0].where:
        kind = "a checkpoint"
    else:
        kind = "a state dict"
    labels = _labels(value) or next((found for place in _PLACES if (found := _labels(top.get(place)))), ())
    return Contents(kind, places, labels, _architecture(top, path))


def _architecture(top: Mapping[Any, Any], path: str | None) -> str | None:
    if path:
        module, _, name = path.rpartition(".")
        for library, hint in _LIBRARIES.items():
            if module.startswith(library):
                return hint
        return f"path/to/your/script.py:{name}" if module == "__main__" else f"{module}:{name}"
    arch = top.get("arch")
    if isinstance(arch, str) and arch.replace("_", "").isalnum():
        return f"timm:{arch}" if "args" in top and "version" in top else f"torchvision:{arch}"
    return None


def _fields(value: Any) -> dict[Any, Any]:
    """The entries of a dict, or the attributes and items of an object."""
    if isinstance(value, Record):
        body = value.args[0] if value.state is None and value.args and isinstance(value.args[0], dict) else {}
        return {**body, **value.attributes(), **value.entries}
    return value if isinstance(value, dict) else {}


def _places(value: Any, where: str, seen: dict[int, Any], depth: int = 0) -> Iterator[Weights]:
    fields = _fields(value)
    if not fields or id(value) in seen or depth > 3:
        return
    seen[id(value)] = value
    if isinstance(value, Record) and isinstance(fields.get("_modules"), dict):
        module = _unwrap(value)
        tensors = module_weights(module)
        if tensors:
            yield Weights(where, tensors, module.path)
        return
    known = [key for key in _PLACES if key in fields]
    inner = [
        place
        for key in known
        for place in _places(fields[key], f"{where}.{key}".lstrip("."), seen, depth + 1)
    ]
    yield from inner
    cache: dict[int, Tensor | None] = {}
    direct: dict[str, Tensor] = {}
    for key, item in fields.items():
        if id(item) not in cache:
            cache[id(item)] = to_tensor(item)
        tensor = cache[id(item)]
        if isinstance(key, str) and tensor is not None and not key.endswith("_extra_state"):
            direct[key] = tensor
    if direct and not inner:
        yield Weights(where, direct)
    for key, item in fields.items():
        if (
            key not in known
            and isinstance(key, str)
            and not any(word in key.lower() for word in _NOT_WEIGHTS)
        ):
            yield from _places(item, f"{where}.{key}".lstrip("."), seen, depth + 1)


def _unwrap(module: Record) -> Record:
    for _ in range(4):
        inner = _fields(module).get("_modules", {}).get(_WRAPPERS.get(module.path))
        if not isinstance(inner, Record):
            break
        module = inner
    return module


def module_weights(module: Record) -> dict[str, Tensor]:
    """The state dict that the pickled module would have had: parameters and persistent buffers by dotted name."""
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
        children = _fields(fields.get("_modules")).items()
        todo += [
            (f"{prefix}{name}.", child, depth + 1) for name, child in children if isinstance(child, Record)
        ]
        if len(weights) + len(todo) > _MAX_NAMES or depth > 200:
            raise FileError("the pickled module in the file contains itself: it is refused.")
    return weights


def _labels(value: Any) -> tuple[str, ...]:
    fields = _fields(value)
    for source in (fields, *(_fields(fields.get(key)) for key in _SETTINGS)):
        for key in _LABELS:
            if found := _as_labels(source.get(key)):
                return found
    return ()


def _as_labels(value: Any) -> tuple[str, ...]:
    """Class names in order, from a list, {0: 'cat'}, {'0': 'cat'} or {'cat': 0}; () for anything else."""
    if isinstance(value, dict) and value:
        pairs = list(value.items())
        if all(isinstance(item, int) and isinstance(key, str) for key, item in pairs):
            pairs = [(item, key) for key, item in pairs]
        if not all(isinstance(key, int) or (isinstance(key, str) and key.isdecimal()) for key, _ in pairs):
            return ()
        value = [item for _, item in sorted((int(key), item) for key, item in pairs if isinstance(item, str))]
        if len(value) != len(pairs):
            return ()
    names = tuple(value) if isinstance(value, (list, tuple)) else ()
    return names if len(names) > 1 and all(isinstance(item, str) for item in names) else ()


# ---- weights into a model ----


def fill(model: nn.Module, found: Contents, name: str, allow: Sequence[str] = ()) -> tuple[str, ...]:
    """Copy the weights into the model, in place; answer notes for the report. Raises FileError unless all fit.

    Prefixes (`module.`, `model.`, `_orig_mod.`, ...) are stripped only as far as the model's names need it.
    """
    wanted = model.state_dict(keep_vars=True)
    fits = [(place, _rename(place.tensors, wanted)) for place in found.places]
    # the first place that fits by name; where none does, the nearest, so that the error speaks of that one
    place, renamed = min(fits, key=lambda fit: _distance(fit[1], wanted))
    tensors = {new: place.tensors[old] for new, old in renamed.items()}
    notes: list[str] = []
    changed = _changed(tensors, wanted)
    for key in _consent(list(changed), renamed, allow):
        del tensors[key], changed[key]
    if changed:
        missing, unused = (
            [key for key in wanted if key not in tensors],
            [key for key in tensors if key not in wanted],
        )
    else:
        missing, unused = _copy(model, tensors, name)
    used = {_place(tensor) for key, tensor in tensors.items() if key not in unused}
    missing = [key for key in missing if not _excused(key, wanted, missing)]
    unused = [key for key in unused if _place(tensors[key]) not in used]
    for keys, what in (
        (missing, "left as the model's code made them"),
        (unused, "in the file, but not used"),
    ):
        if consented := _consent(keys, renamed, allow):
            notes.append(f"{len(consented)} tensors {what}, by consent: {_some(consented)}")
            keys[:] = [key for key in keys if key not in consented]
    if missing or unused or changed:
        raise FileError(_misfit(name, model, missing, [renamed[key] for key in unused], changed))
    _check_tied(name, tensors, wanted)
    if place is not found.places[0]:
        notes.append(
            f"weights from {place.where!r}; those under {found.places[0].where!r} do not fit the model"
        )
    elif any(word in place.where for word in _AVERAGED):
        notes.append(f"averaged weights ({place.where}) were taken")
    return (*notes, *_casts(tensors, wanted))


def check_finite(tensors: Mapping[str, Any], parameters: Collection[str], name: str) -> None:
    """Raise FileError for a weight that is NaN or infinite; -inf is allowed in buffers, where masks hold it."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.numel():
            continue
        low, high = extremes(tensor.detach())
        nan = math.isnan(low) or math.isnan(high)
        if nan or math.isinf(high) or (math.isinf(low) and key in parameters):
            raise FileError(
                f"{name} has {'NaN' if nan else 'infinite'} values in {key!r}: "
                f"the training that wrote it diverged. Use an earlier checkpoint."
            )


def extremes(tensor: Tensor) -> tuple[float, float]:
    """Least and greatest value, NaN if there is one; without a temporary of the tensor's size where torch can."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        return 0.0, 0.0
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)
    return float(low), float(high)


def _rename(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, str]:
    """New name -> name in the file, with the shortest common prefix dropped that makes most names the model's."""
    best: dict[str, str] = {}
    most = -1
    for clean in ("", "_orig_mod."):
        names = _distinct((key.replace(clean, "") if clean else key, key) for key in tensors)
        counts = Counter(key[: match.end()] for key in names for match in islice(_DOT.finditer(key), _DEPTH))
        prefixes = ["", *(prefix for prefix, _ in counts.most_common(_PREFIXES))]
        for prefix in sorted(prefixes, key=lambda item: (len(item), item)):
            hits = sum(key.startswith(prefix) and key[len(prefix) :] in wanted for key in names)
            if hits > most:
                most = hits
                # those with the prefix first: they are the ones that own the short name
                ordered = sorted(names.items(), key=lambda item: not item[0].startswith(prefix))
                best = _distinct((key.removeprefix(prefix), old) for key, old in ordered)
    return best


def _distinct(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The pairs as a dict, none lost: a name that is taken is marked, so that it is reported as not used."""
    names: dict[str, str] = {}
    for new, old in pairs:
        names[new if new not in names else f"\0{old}"] = old
    return names


def _distance(renamed: Mapping[str, str], wanted: Mapping[str, Any]) -> int:
    return sum(not key.endswith("num_batches_tracked") for key in renamed.keys() ^ wanted.keys())


def _consent(keys: Sequence[str], renamed: Mapping[str, str], allow: Sequence[str]) -> list[str]:
    """The keys that the user named, by the model's name or by the file's."""
    return [
        key
        for key in keys
        if any(fnmatchcase(text, pattern) for text in (key, renamed.get(key, key)) for pattern in allow)
    ]


def _copy(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> tuple[list[str], list[str]]:
    """Missing and unused keys, after torch copied the others (its hooks translate names of older layers)."""
    assign = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    try:
        answer = model.load_state_dict(dict(tensors), strict=False, assign=assign)
    except RuntimeError as error:
        raise FileError(f"{name} does not fit {_kind(model)}: {_first_line(error)}") from None
    return list(answer.missing_keys), list(answer.unexpected_keys)


def _changed(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, str]:
    """Names whose tensor cannot be copied into the model's, with the reason."""
    changed = {}
    for key in tensors.keys() & wanted.keys():
        ours, theirs = wanted[key], tensors[key]
        if not isinstance(ours, Tensor) or is_lazy(ours):
            continue
        if ours.shape != theirs.shape and not (ours.numel() == theirs.numel() == 1):
            changed[key] = f"{list(theirs.shape)} in the file, {list(ours.shape)} in the model"
        elif theirs.is_floating_point() and not (ours.is_floating_point() or ours.is_complex()):
            changed[key] = f"{_short(theirs.dtype)} in the file, {_short(ours.dtype)} in the model"
    return dict(sorted(changed.items()))


def _excused(key: str, wanted: Mapping[str, Any], missing: Sequence[str]) -> bool:
    """A missing key that no file needs to hold: a step counter, or another name of a tensor that was filled."""
    if key.endswith("num_batches_tracked"):
        return True
    filled = (other for name, other in wanted.items() if name not in missing and isinstance(other, Tensor))
    return isinstance(wanted.get(key), Tensor) and any(
        _place(other) == _place(wanted[key]) for other in filled
    )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor."""
    if tensor.is_meta or is_lazy(tensor) or not tensor.numel():
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _check_tied(name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> None:
    """Two names of one tensor must bring the same values, or the later would silently overwrite the earlier."""
    first: dict[tuple[Any, ...], str] = {}
    for key, ours in wanted.items():
        if key not in tensors or not isinstance(ours, Tensor):
            continue
        other = first.setdefault(_place(ours), key)
        if other != key and not torch.equal(tensors[other], tensors[key]):
            raise FileError(
                f"{name} does not fit: {other!r} and {key!r} are one tensor in the model, but differ in the file."
            )


def _casts(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> list[str]:
    casts: dict[str, int] = {}
    for key in tensors.keys() & wanted.keys():
        old, new = tensors[key].dtype, getattr(wanted[key], "dtype", None)
        if new is not None and old != new and old.is_floating_point:
            text = f"{_short(old)} weights were read as {_short(new)}"
            casts[text] = casts.get(text, 0) + 1
    return [f"{count} {text}" for text, count in sorted(casts.items())]


def _misfit(
    name: str, model: nn.Module, missing: list[str], unused: list[str], changed: dict[str, str]
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if unused:
        parts.append(f"{len(unused)} not used ({_some(unused)})")
    if changed:
        shown = [f"{key}: {why}" for key, why in changed.items()]
        parts.append(f"{len(changed)} of another shape or type ({_some(shown)})")
    heads = {
        why.split("[")[1].split("]")[0]
        for key, why in changed.items()
        if "[" in why and not (missing or unused)
    }
    classes = {shape.split(",")[0] for shape in heads}
    hint = (
        f"If the file has {classes.pop()} classes, say so: --model 'NAME(num_classes=...)'. "
        if len(classes) == 1
        else ""
    )
    return (
        f"{name} does not fit {_kind(model)}: {'; '.join(parts)}. {hint}"
        f"Give the --model that it was saved from, or consent by name with --allow-missing PATTERN."
    )


def _kind(model: nn.Module) -> str:
    return f"the model {type(model).__name__}"


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f", ... {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
