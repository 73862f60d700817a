"""`--model`: the code that builds the architecture, named by the user, who thereby consents to run it.

    package.module:factory                       a function or class that returns a module
    path/to/file.py:factory(num_classes=37)      the same in a file, with plain values as arguments
    torchvision:NAME, timm:NAME(num_classes=37)  a model of a library, without its weights

(`hf:FOLDER`, the architecture of a Hugging Face folder, is huggingface.py's.)
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .errors import UsageError

_SPEC = re.compile(
    r"(?P<where>.+?\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.\-]*)(?P<args>\(.*\))?", re.DOTALL
)
_FORMS = "package.module:factory, path/to/file.py:factory(classes=10), torchvision:NAME, timm:NAME, hf:FOLDER"
_EAGER_INIT = ("googlenet", "inception_v3")  # fill their weights with a slow random draw unless told not to


def build(spec: str) -> nn.Module:
    """The module that `spec` describes, weights as its code makes them. UsageError says what failed."""
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise UsageError(f"--model {spec}: not understood; it takes {_FORMS}.")
    args, kwargs = arguments(match["args"] or "()", spec)
    where, name = match["where"], match["name"]
    if where == "torchvision":
        factory = _torchvision(name, spec, kwargs)
    elif where == "timm":
        factory = _timm(name, spec)
    else:
        factory = _attribute(_module(where, spec), name, spec)
    if not callable(factory):
        raise UsageError(f"--model {spec}: {name} is a {type(factory).__name__}, not a function or class.")
    model = (
        factory
        if isinstance(factory, nn.Module)
        else guarded(lambda: factory(*args, **kwargs), spec, "call", _signature(factory))
    )
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model {spec}: it returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def arguments(text: str, spec: str) -> tuple[list[Any], dict[str, Any]]:
    """`(37, width=0.5)` as positional and keyword arguments: literals only."""
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return [ast.literal_eval(arg) for arg in call.args], keywords
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise UsageError(
            f"--model {spec}: the arguments {text} are not plain values (numbers, text, lists, True, None)."
        ) from None


def append_folder(folder: str) -> None:
    """Make `folder` importable, behind everything else, so that nothing in it shadows a library."""
    if folder not in sys.path:
        sys.path.append(folder)


def _module(where: str, spec: str) -> ModuleType:
    append_folder(os.getcwd())
    if not where.endswith(".py"):
        return guarded(lambda: importlib.import_module(where), spec, f"import {where}")
    path = Path(where).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, os.listdir(path.parent) if path.parent.is_dir() else [], 1
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else "."
        raise UsageError(f"--model {spec}: there is no file {path}{hint}")
    path = path.resolve()
    append_folder(str(path.parent))
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    known = importlib.util.find_spec(path.stem) if loaded is None else None
    free = loaded is None and (known is None or known.origin == str(path))
    name = path.stem if free else f"_{path.stem}_of_user"
    return guarded(lambda: _execute(path, name), spec, f"run {path.name}")


def _execute(path: Path, name: str) -> ModuleType:
    description = importlib.util.spec_from_file_location(name, path)
    if description is None or description.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module  # dataclasses and pickles of the file look themselves up there
    try:
        description.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, name: str, spec: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [
                key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
            ]
            near = difflib.get_close_matches(name, names, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"--model {spec}: {module.__name__} has no {name}{hint}")
        found = getattr(found, part)
    return found


def _torchvision(name: str, spec: str, kwargs: dict[str, Any]) -> Callable[..., Any]:
    models = library("torchvision.models", spec)
    if name not in models.list_models():
        raise _unknown(name, models.list_models(), spec)
    builder: Callable[..., Any] = models.get_model_builder(name)
    kwargs.setdefault("weights", None)
    if "weights_backbone" in inspect.signature(builder).parameters:
        kwargs.setdefault("weights_backbone", None)  # or it would be downloaded
    if name in _EAGER_INIT:
        kwargs.setdefault("init_weights", False)
    return builder


def _timm(name: str, spec: str) -> Callable[..., Any]:
    models = library("timm", spec)
    if not models.is_model(name):
        raise _unknown(name, models.list_models(), spec)
    return lambda *args, **kwargs: models.create_model(name, *args, **{"pretrained": False, **kwargs})


def _unknown(name: str, names: list[str], spec: str) -> UsageError:
    near = difflib.get_close_matches(name, names, 3, 0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    return UsageError(f"--model {spec}: there is no model {name}{hint}")


def library(name: str, spec: str) -> Any:
    return guarded(lambda: importlib.import_module(name), spec, f"import {name}")


def _signature(factory: Any) -> str:
    try:
        return f" It is {getattr(factory, '__name__', 'called as')}{inspect.signature(factory)}"
    except (TypeError, ValueError):
        return ""


def guarded(action: Callable[[], Any], spec: str, what: str, hint: str = "") -> Any:
    """Run the user's code; whatever it raises becomes one line that names error, file and line."""
    try:
        return action()
    except (Exception, SystemExit) as error:
        raise UsageError(f"--model {spec}: could not {what}: {explain(error)}{hint}") from error


def explain(error: BaseException) -> str:
    """One line: kind and text of the error, where it happened, and the cause if it is a known one."""
    chain: BaseException | None = error
    while chain is not None:
        if "torchvision::nms" in str(chain):
            return (
                "the installed torchvision is not the one for this torch (its compiled operators are missing): "
                "install the one that is."
            )
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"there is no module {error.name} (is it installed, and the command run in the right folder?)."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if not frame.filename.startswith("<")]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{text} ({Path(own[-1].filename).name}:{own[-1].lineno})." if own else f"{text}."
