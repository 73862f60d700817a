"""Names for the leaves of nested inputs and outputs: `batch.input_ids`, `boxes.0`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree


def leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return pytree.tree_flatten_with_path(tree)[0]


def path_name(path: tuple[Any, ...], formals: Sequence[str] = ()) -> str:
    """`batch.input_ids` from the exporter's key path ((args | kwargs), then keys)."""
    where, *keys = [key_name(k) for k in path]
    if where == "0" and keys:
        position = int(keys[0])
        keys[0] = formals[position] if position < len(formals) else f"input_{position}"
    return ".".join(keys)


def key_name(key: Any) -> str:
    for attribute in ("idx", "key", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def distinct(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """The names with `_1`, `_2` ... added where one is taken or was there before: ONNX has one space of names."""
    seen = set(taken)
    found = []
    for name in names:
        free, count = name, 0
        while free in seen or (free != name and free in names):
            count += 1
            free = f"{name}_{count}"
        seen.add(free)
        found.append(free)
    return found


def plain(tree: Any) -> Any:
    """Dataclasses as dicts: their pytree path has no field names otherwise."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {
            f.name: getattr(tree, f.name)
            for f in dataclasses.fields(tree)
            if getattr(tree, f.name) is not None
        }
    return tree
