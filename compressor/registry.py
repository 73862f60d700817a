"""The tables of passes and targets: ours, then what third parties add. The one place that knows passes/ and targets/.

`passes` and `targets` are common names: ours are imported by their place beside this package, so that a folder of
the same name in the user's project neither shadows them nor is taken for them.
"""

from __future__ import annotations

import difflib
import importlib.machinery
import importlib.util
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from .pipeline import Pass
    from .target import Target

HOME = Path(__file__).resolve().parent.parent


def passes() -> dict[str, type[Pass]]:
    """Name -> class, in default order; third parties' (entry points `compressor.passes`) after ours."""
    return _extended(_own("passes").PASSES, "compressor.passes")


def targets() -> dict[str, Target]:
    """Name -> Target; third parties' (entry points `compressor.targets`) after ours."""
    return _extended(_own("targets").TARGETS, "compressor.targets")


def pass_names() -> list[str]:
    """Names of all passes, without importing them: one file each, and the entry points of third parties."""
    own = sorted(path.stem for path in (HOME / "passes").glob("[a-z]*.py"))
    return [*own, *sorted(e.name for e in entry_points(group="compressor.passes") if e.name not in own)]


def target(name: str | None) -> Target:
    """The target of that name, this machine if None; UsageError with the nearest name."""
    known = targets()
    name = name if name is not None else native()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise UsageError(f"unknown target '{name}'{hint}; there are {', '.join(known)}")
    return known[name]


def native() -> str:
    """The target that is this machine: `cpu`, or `cpu-avx2` where 8-bit sums saturate."""
    from .measure import saturation

    return "cpu-avx2" if saturation() else "cpu"


def _own(name: str) -> ModuleType:
    loaded = sys.modules.get(name)
    if loaded is not None:
        if Path(str(loaded.__file__)).resolve().parent.parent != HOME:
            raise UsageError(
                f"{loaded.__file__} is imported as '{name}', a name that compressor needs: rename it"
            )
        return loaded
    spec = importlib.machinery.PathFinder.find_spec(name, [str(HOME)])
    if spec is None or spec.loader is None:
        raise UsageError(
            f"the installation is incomplete: {HOME / name} is missing; install compressor again"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _extended(table: dict[str, Any], group: str) -> dict[str, Any]:
    known = dict(table)
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        if entry.name not in known:
            known[entry.name] = _loaded(entry)
    return known


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:
        package = entry.dist.name if entry.dist is not None else entry.module
        raise UsageError(
            f"{entry.name} ({entry.value}) of the installed package {package} cannot be loaded: {error}; repair the "
            f"package, or pip uninstall {package}"
        ) from error
