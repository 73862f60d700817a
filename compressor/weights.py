"""The weights of a file into a model, strictly.

A randomly initialised layer that no file filled is a wrong answer that every later check would pass. So every
parameter and every persistent buffer comes from the file, and every tensor of the file is used, or the user consents
by name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .checkpoint import Contents, Weights, printable
from .errors import FileError

_COUNTER = "num_batches_tracked"  # of batch norm: no output depends on it
_AVERAGED = "ema"
_DOT = re.compile(r"\.")
_DEPTH, _PREFIXES = 3, 16  # prefixes tried: how many names deep, how many of the commonest


def fill(model: nn.Module, found: Contents, name: str, allow: Sequence[str] = ()) -> tuple[str, ...]:
    """Copy the weights into the model, in place; answer notes for the report. FileError unless all fit.

    Prefixes (`module.`, `model.`, `_orig_mod.`, ...) are stripped only as far as the model's names need it.
    `name` is the file's, for messages; `allow` are patterns of names that may be missing, unused or different.
    """
    wanted = model.state_dict(keep_vars=True)
    fits = [(place, rename(place.tensors, wanted)) for place in found.places]
    # the first place that fits by name; where none does, the nearest, so that the error speaks of that one
    place, renamed = min(fits, key=lambda fit: _distance(fit[1], wanted))
    tensors = {new: place.tensors[old] for new, old in renamed.items()}
    different = _different(tensors, wanted)
    for key in _consented(list(different), renamed, allow):
        del tensors[key], different[key]
    if different:
        missing, unused = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    else:
        missing, unused = _copy(model, tensors, name)
    missing = [key for key in missing if not _excused(key, wanted, missing)]
    used = {_identity(tensor) for key, tensor in tensors.items() if key not in unused}
    unused = [key for key in unused if _identity(tensors[key]) not in used]
    notes = []
    for keys, what in (
        (missing, "left as the model's code made them"),
        (unused, "in the file, but not used"),
    ):
        if named := _consented(keys, renamed, allow):
            notes.append(f"{len(named)} tensors {what}, by consent: {printable(named)}")
            keys[:] = [key for key in keys if key not in named]
    if missing or unused or different:
        raise FileError(_misfit(name, model, missing, [renamed[key] for key in unused], different))
    _check_tied(name, tensors, wanted)
    return (*notes, *_about(place, found), *_casts(tensors, wanted))


def check_finite(tensors: Mapping[str, Any], parameters: Collection[str], name: str) -> None:
    """Raise FileError for a weight that is NaN or infinite; -inf is allowed in buffers, where masks hold it."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.numel():
            continue
        low, high = _extremes(tensor.detach())
        nan = math.isnan(low) or math.isnan(high)
        if nan or high == math.inf or (low == -math.inf and key in parameters):
            raise FileError(
                f"{name} has {'NaN' if nan else 'infinite'} values in {key!r}: "
                f"the training that wrote it diverged. Use an earlier checkpoint."
            )


def rename(tensors: Mapping[str, Any], wanted: Collection[str]) -> dict[str, str]:
    """New name -> name in the file, with the shortest common prefix dropped that makes most names the model's.

    No tensor is lost: one whose name is taken comes under a marked name that no model has.
    """
    best: dict[str, str] = {}
    most = -1
    for inside in ("", "_orig_mod."):  # torch.compile of a part leaves it in the middle of names
        names = _distinct((key.replace(inside, "") if inside else key, key) for key in tensors)
        counts = Counter(key[: dot.end()] for key in names for dot in islice(_DOT.finditer(key), _DEPTH))
        prefixes = ["", *(prefix for prefix, _ in counts.most_common(_PREFIXES))]
        for prefix in sorted(prefixes, key=lambda item: (len(item), item)):
            hits = sum(key.startswith(prefix) and key[len(prefix) :] in wanted for key in names)
            if hits > most:
                most = hits
                # those with the prefix first: they own the short name
                ordered = sorted(names.items(), key=lambda item: not item[0].startswith(prefix))
                best = _distinct((key.removeprefix(prefix), old) for key, old in ordered)
    return best


def _distinct(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    names: dict[str, str] = {}
    for new, old in pairs:
        names[f"\0{old}" if new in names else new] = old
    return names


def _distance(renamed: Mapping[str, str], wanted: Mapping[str, Any]) -> int:
    return sum(not key.endswith(_COUNTER) for key in renamed.keys() ^ wanted.keys())


def _copy(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> tuple[list[str], list[str]]:
    """Missing and unused keys, after torch copied the others (its hooks translate names of older layers)."""
    assign = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    try:
        answer = model.load_state_dict(dict(tensors), strict=False, assign=assign)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise FileError(
            f"{name} does not fit the model {type(model).__name__}: {' '.join(lines[:2])}"
        ) from None
    return list(answer.missing_keys), list(answer.unexpected_keys)


def _different(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, str]:
    """Names whose tensor cannot be copied into the model's, and why."""
    found = {}
    for key in sorted(tensors.keys() & wanted.keys()):
        ours, theirs = wanted[key], tensors[key]
        if not isinstance(ours, Tensor) or is_lazy(ours):
            continue
        if ours.shape != theirs.shape and not ours.numel() == theirs.numel() == 1:
            found[key] = f"{list(theirs.shape)} in the file, {list(ours.shape)} in the model"
        elif theirs.is_floating_point() and not (ours.is_floating_point() or ours.is_complex()):
            found[key] = f"{_short(theirs.dtype)} in the file, {_short(ours.dtype)} in the model"
    return found


def _consented(keys: Sequence[str], renamed: Mapping[str, str], allow: Sequence[str]) -> list[str]:
    """The keys that the user named, by the model's name or by the file's."""
    names = {key: (key, renamed.get(key, key)) for key in keys}
    return [key for key in keys if any(fnmatchcase(text, item) for text in names[key] for item in allow)]


def _excused(key: str, wanted: Mapping[str, Any], missing: Sequence[str]) -> bool:
    """A missing key that no file needs to hold: a step counter, or another name of a tensor that was filled."""
    ours = wanted.get(key)
    if key.endswith(_COUNTER):
        return True
    if not isinstance(ours, Tensor):
        return False
    filled = (other for name, other in wanted.items() if name not in missing and isinstance(other, Tensor))
    return any(_identity(other) == _identity(ours) for other in filled)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor."""
    if is_lazy(tensor) or tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _check_tied(name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> None:
    """Two names of one tensor must bring the same values, or the later would silently overwrite the earlier."""
    first: dict[tuple[Any, ...], str] = {}
    for key, ours in wanted.items():
        if key not in tensors or not isinstance(ours, Tensor):
            continue
        other = first.setdefault(_identity(ours), key)
        if other != key and not torch.equal(tensors[other], tensors[key]):
            raise FileError(
                f"{name} does not fit: {other!r} and {key!r} are one tensor in the model, and differ in the file."
            )


def _about(place: Weights, found: Contents) -> list[str]:
    if place is not found.places[0]:
        first = found.places[0].where or "the top"
        return [f"weights from {place.where or 'the top'!r}; those under {first!r} do not fit the model"]
    return [f"averaged weights ({place.where}) were taken"] if _AVERAGED in place.where else []


def _casts(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> list[str]:
    casts = Counter(
        f"{_short(tensors[key].dtype)} weights were read as {_short(ours.dtype)}"
        for key, ours in wanted.items()
        if key in tensors and isinstance(ours, Tensor) and ours.dtype != tensors[key].dtype
        if tensors[key].is_floating_point()
    )
    return [f"{count} {text}" for text, count in sorted(casts.items())]


def _misfit(
    name: str, model: nn.Module, missing: Sequence[str], unused: Sequence[str], different: Mapping[str, str]
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({printable(missing)})")
    if unused:
        parts.append(f"{len(unused)} not used ({printable(unused)})")
    if different:
        shown = [f"{key}: {why}" for key, why in different.items()]
        parts.append(f"{len(different)} different ({printable(shown)})")
    classes = {match[1] for why in different.values() if (match := re.match(r"\[(\d+)", why))}
    hint = ""
    if len(classes) == 1 and len(different) <= 2 and not (missing or unused):
        count = classes.pop()
        hint = f"If it has {count} classes, say so: --model 'NAME(num_classes={count})'. "
    return (
        f"{name} does not fit the model {type(model).__name__}: tensors {'; '.join(parts)}. {hint}"
        f"Give the --model that it was saved from, or consent by name: --allow-missing PATTERN."
    )


def _extremes(tensor: Tensor) -> tuple[float, float]:
    """Least and greatest value, NaN if there is one; without a temporary of the tensor's size where torch can."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        return 0.0, 0.0
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return float(low), float(high)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
