"""The spec string: `merge,prune(macs=0.5),int8` -> passes, and the rules of their order."""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import UsageError, nearest

Pass = Any  # a frozen dataclass with `name`, `after` and `requires`: pipeline.Pass, which stands further down


def parse(spec: str, registry: Mapping[str, type[Any]]) -> list[Pass]:
    """`merge,prune(macs=0.5),int8` -> passes. UsageError with the nearest name on anything unknown."""
    passes: list[Pass] = []
    for text in split(spec):
        name, _, rest = text.partition("(")
        name = name.strip()
        if name not in registry:
            raise UsageError(
                f"unknown pass '{name}'{nearest(name, registry, 0.5)}; `compress passes` lists them"
            )
        if rest and not rest.rstrip().endswith(")"):
            raise UsageError(f"'{text}' has no closing parenthesis")
        passes.append(_configure(registry[name], rest.rstrip()[:-1] if rest else ""))
    if not passes:
        raise UsageError("no pass named; for example --passes merge,fold,int8")
    return passes


def arrange(passes: Sequence[Pass], registry: Mapping[str, type[Any]]) -> tuple[list[Pass], list[str]]:
    """The user's order, with missing prerequisites inserted (their names: second value).

    UsageError, with the right spec, where the order breaks a rule.
    """
    arranged: list[Pass] = []
    inserted: list[str] = []
    for one in passes:
        for needed in one.requires:
            if not any(p.name == needed for p in arranged):
                if any(p.name == needed for p in passes):
                    _wrong_order(passes, registry, one.name, needed)
                arranged.append(registry[needed]())
                inserted.append(needed)
        arranged.append(one)
    for i, one in enumerate(arranged):
        for later in arranged[i + 1 :]:
            if later.name in one.after:
                _wrong_order(passes, registry, one.name, later.name)
    return arranged, inserted


def _wrong_order(
    passes: Sequence[Pass], registry: Mapping[str, type[Any]], early: str, late: str
) -> typing.NoReturn:
    order = list(registry)
    right = ",".join(str(p) for p in sorted(passes, key=lambda p: order.index(p.name)))
    raise UsageError(f"{early} must come after {late}; write --passes '{right}'")


def split(spec: str) -> list[str]:
    """The parts between commas that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(spec):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(spec[start:i].strip())
            start = i + 1
    return [p for p in [*parts, spec[start:].strip()] if p]


def _configure(cls: type[Any], text: str) -> Pass:
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for part in split(text):
        key, sep, raw = part.partition("=")
        key = key.strip()
        if not sep or key not in fields:
            known = ", ".join(fields) or "none"
            raise UsageError(
                f"{cls.name} has no option '{key}'{nearest(key, fields, 0.5)}; its options: {known}"
            )
        values[key] = _convert(cls.name, key, raw.strip(), fields[key])
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{cls.name}: {error}") from error


def _convert(owner: str, key: str, raw: str, kind: Any) -> Any:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in kinds and raw.lower() == "none":
        return None
    for one in kinds:
        if typing.get_origin(one) is typing.Literal:
            if raw in typing.get_args(one):
                return raw
        elif typing.get_origin(one) is tuple:
            return tuple(p.strip().strip("'\"") for p in raw.strip("[]()").split("+") if p.strip())
        elif one is bool and raw.lower() in ("true", "false"):
            return raw.lower() == "true"
        elif one is str:
            return raw.strip("'\"")
        elif one in (int, float):
            try:
                value = ast.literal_eval(raw)
            except (ValueError, SyntaxError):
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool) and one(value) == value:
                return one(value)
    wanted = " or ".join(
        "|".join(typing.get_args(k))
        if typing.get_origin(k) is typing.Literal
        else getattr(k, "__name__", str(k))
        for k in kinds
        if k is not types.NoneType
    )
    raise UsageError(f"{owner}({key}={raw}): expected {wanted}")
