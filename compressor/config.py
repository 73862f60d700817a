"""`compress.toml`: the options of `compress MODEL` in a file, under the names of their flags; and back into words.

A file beside you is read without being named, so it may not make us run code: what does (`trust-pickle`, `latency-cmd`,
an architecture, a function) is taken from a file that `--config` names, and from no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from . import toml
from .errors import OutputError, UsageError, nearest

NAME = "compress.toml"
MODEL = "MODEL"  # the argument's name in the file; `model` is the flag --model
_OWN = {"config", "save_config", "dry_run", "help"}  # flags that make no sense in a file
_RUNS_CODE = {"trust_pickle", "latency_cmd", "model_spec"}
_MAY_RUN_CODE = {"evaluate", "preprocess"}  # where they name module:function


def read(path: Path, command: click.Command, *, named: bool) -> dict[str, Any]:
    """Values by the names of the command's parameters, as `click.Context.default_map` wants them.

    named: whether the user named the file. FileError where it cannot be read; UsageError for a key that is no flag,
    with the nearest, and for one that runs code in a file that nobody named.
    """
    found = toml.read(path)
    keys = _keys(command)
    values: dict[str, Any] = {}
    for key, value in found.items():
        if key not in keys:
            raise UsageError(f"{path}: unknown key '{key}'{nearest(key, keys)}")
        param, positive = keys[key]
        name = str(param.name)
        function = name in _MAY_RUN_CODE and ":" in str(value) and not Path(str(value)).exists()
        if not named and (name in _RUNS_CODE or function):
            raise UsageError(f"{path}: '{key}' runs code; if you trust this file, name it: --config {path}")
        values[name] = _checked(path, key, value, param, positive)
    return values


def _keys(command: click.Command) -> dict[str, tuple[click.Parameter, bool]]:
    """Key -> parameter, and whether true means true: `no-measure` is the other side of `measure`."""
    keys: dict[str, tuple[click.Parameter, bool]] = {}
    for param in command.params:
        if isinstance(param, click.Argument):
            keys[MODEL] = (param, True)
        elif param.name not in _OWN:
            keys |= {flag.lstrip("-"): (param, True) for flag in param.opts if flag.startswith("--")}
            keys |= {flag.lstrip("-"): (param, False) for flag in param.secondary_opts}
    return keys


def _checked(path: Path, key: str, value: Any, param: click.Parameter, positive: bool) -> Any:
    """The value as the flag would have given it. UsageError for a value of the wrong kind."""
    if getattr(param, "is_flag", False):
        if not isinstance(value, bool):
            raise UsageError(f"{path}: '{key}' is true or false, not {json.dumps(value)}")
        return value == positive
    many = getattr(param, "multiple", False)
    if many:
        value = [value] if isinstance(value, str) else value
    if isinstance(value, (dict, bool)) or isinstance(value, list) != many:
        raise UsageError(
            f"{path}: '{key}' takes {'a list of words' if many else 'one value'}, not {json.dumps(value)}"
        )
    return [str(one) for one in value] if many else value


# -------------------------------------------------------------------- and back


def given(ctx: click.Context) -> dict[str, Any]:
    """Flag or MODEL -> what was typed, or stood in a file, in the order of the help."""
    found: dict[str, Any] = {}
    for param in ctx.command.params:
        source = ctx.get_parameter_source(str(param.name))
        if param.name in _OWN or source not in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP):
            continue
        value = ctx.params[str(param.name)]
        if isinstance(value, Mapping):  # PASS=N
            value = [f"{key}={one}" for key, one in value.items()]
        key = MODEL if isinstance(param, click.Argument) else max(param.opts, key=len).lstrip("-")
        found[key] = list(value) if isinstance(value, tuple) else value
    return found


def text(values: Mapping[str, Any]) -> str:
    """The values as TOML, whose strings, numbers and lists are written as JSON writes them."""
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    return "".join(lines).replace("\x7f", "\\u007f")


def save(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file that reads back to the same command. OutputError where it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(text(values).encode())
        part.replace(path)
    except UnicodeEncodeError as error:
        raise OutputError(f"{path}: cannot be written: a word of the command is no UTF-8") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def words(values: Mapping[str, Any]) -> list[str]:
    """The values as words of a command line."""
    return [word for key, value in values.items() for word in _words(key, value)]


def _words(key: str, value: Any) -> Iterator[str]:
    if key == MODEL:
        yield str(value)
    elif isinstance(value, bool):
        if value:
            yield f"--{key}"
        else:
            yield {"dynamic": "--static"}.get(key, f"--no-{key}")
    elif isinstance(value, list):
        for one in value:
            yield from (f"--{key}", str(one))
    else:
        yield from (f"--{key}", str(value))
