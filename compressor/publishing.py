"""The folder of a run: filled beside its place, then put there at once, so that a killed run leaves the old one whole.

A run holds a lock on the folder that it fills. One that nobody holds belonged to a run that was killed, and goes when
the next run to the same output begins.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import handover
from .errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

REQUIRED = "required_operators.config"  # ONNX Runtime's own name
REPORT, PROGRAM = "report.json", "model.pt2"
_MADE = {
    "model.onnx",
    REPORT,
    "report.html",
    handover.SIGNATURE,
    handover.USAGE,
    handover.SAMPLE,
}
COMPANIONS = {"model.onnx.data", "model.ort", REQUIRED}  # files beside model.onnx that not every run writes
_STAGE = ".compressing-"  # in the name of every folder that is being filled
_NAME = 100  # letters of the output's name in that of such a folder
_CARRIED = 64  # files of others that an output may hold to be exchanged as a whole
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_CLOSED = {errno.EACCES, errno.EROFS, errno.EPERM}
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, and RENAME_EXCHANGE, which macOS calls RENAME_SWAP


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A folder beside `output` whose files replace those of `output` at the end; nothing is touched on an error."""
    try:
        place = output.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.is_dir():
            raise OutputError(f"{output} is a file; name a folder with --output")
        if place.exists() and not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(
                f"cannot write into {output}: permission denied; name another folder with --output"
            )
        with _lock(place.parent):
            _remove_abandoned(place)
            folder = Path(tempfile.mkdtemp(prefix=_prefix(place), dir=place.parent))
            owner = hold(folder)
    except OSError as error:
        raise _cannot_write(output, error) from error
    try:
        yield folder
        with _lock(place.parent):
            _publish(folder, place)
    except OSError as error:
        if error.errno in _FULL | _CLOSED:
            raise _cannot_write(output, error) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if owner is not None:
            os.close(owner)


def require_ours(output: Path, program: bool = False) -> None:
    """OutputError where a folder holds what a run would replace, and it has no report of a run that wrote it.

    program: the run writes model.pt2, too, whose name the model that it reads often has.
    """
    report, signature = (_told(output / name) for name in (REPORT, handover.SIGNATURE))
    ours = "inputs" in report or "inputs" in signature
    found = [] if ours else sorted(n for n in _MADE | COMPANIONS if os.path.lexists(output / n))
    if program and os.path.lexists(output / PROGRAM) and not (report.get("emitted") or {}).get("program"):
        found.append(PROGRAM)
    if found:
        raise OutputError(
            f"{output} holds {', '.join(found)}, which no run of compress wrote and this one would replace: name "
            "another folder with --output"
        )


def _told(path: Path) -> dict[str, Any]:
    """What a file of JSON holds; nothing where there is none."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _cannot_write(output: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write to {output}: {error.strerror or error}; free space, or name another --output"
    )


# -------------------------------------------------------------------- who is at work


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Other runs that want to move files in this folder wait; two runs at once leave all files of one of them."""
    handle = hold(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def hold(folder: Path, *, wait: bool = True) -> int | None:
    """A lock on a folder, held until its handle is closed or the process ends; None where there are none.

    OSError where another holds it and `wait` is false.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another, or a file system without locks
        if wait:
            return handle
        os.close(handle)
        raise
    return handle


def _prefix(output: Path) -> str:
    return f".{output.name[:_NAME]}{_STAGE}"


def _remove_abandoned(output: Path) -> None:
    """Folders of killed runs to this output: those whose lock nobody holds."""
    start = _prefix(output)
    for name in os.listdir(output.parent):
        if not name.startswith(start):
            continue
        with suppress(OSError):  # in use, or not ours to remove
            owner = hold(output.parent / name, wait=False)
            if owner is not None:
                shutil.rmtree(output.parent / name, ignore_errors=True)
                os.close(owner)


# -------------------------------------------------------------------- into place


def replace(home: Path, fresh: Path) -> None:
    """Puts a folder, beside `home`, in the place of `home`, whose files all go; in one step where the system can."""
    if not home.exists():
        os.replace(fresh, home)
        return
    if not _exchange(fresh, home):
        old = Path(tempfile.mkdtemp(prefix=_prefix(home), dir=home.parent))
        os.replace(home, old / home.name)
        os.replace(fresh, home)
        fresh = old
    shutil.rmtree(fresh, ignore_errors=True)


def _publish(folder: Path, output: Path) -> None:
    if not output.exists():
        folder.chmod(0o755)
        os.replace(folder, output)
        return
    fresh = sorted(folder.iterdir(), key=lambda f: f.name == REPORT)
    names = {file.name for file in fresh}
    # of an earlier run: they belong to a model that is no longer there
    stale = (COMPANIONS | handover.copied_to(output)) - names
    others = [path for path in output.iterdir() if path.name not in names | stale]
    if _exchanged(folder, output, others):
        return
    retired = folder / ".retired"
    retired.mkdir()
    for file in fresh:
        if (
            file.is_dir() and (output / file.name).exists()
        ):  # a folder does not replace one that holds something
            os.replace(output / file.name, retired / file.name)
        os.replace(file, output / file.name)
    for name in stale:
        (output / name).unlink(missing_ok=True)


def _exchanged(folder: Path, output: Path, others: Sequence[Path]) -> bool:
    """Both folders change places in one step, where the system can; False where nothing was done.

    others: what is not ours in the output, and must be there afterwards. Where that is more than a few files, or we
    stand in the folder, it is no output to be replaced as a whole.
    """
    if len(others) > _CARRIED or not all(path.is_file() for path in others):
        return False
    linked: list[Path] = []
    try:
        if Path.cwd().is_relative_to(output):
            return False
        for path in others:
            os.link(path, folder / path.name, follow_symlinks=False)
            linked.append(folder / path.name)
        mode = folder.stat().st_mode
        shutil.copymode(output, folder)
        if _exchange(folder, output):
            return True
        folder.chmod(mode)
    except OSError:  # no links here, not our files, a mount point
        pass
    for path in linked:
        path.unlink(missing_ok=True)
    return False


def _exchange(one: Path, two: Path) -> bool:
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    paths = os.fsencode(one), os.fsencode(two)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return bool(library.renamex_np(*paths, _EXCHANGE) == 0)
    if hasattr(library, "renameat2"):
        return bool(library.renameat2(_HERE, paths[0], _HERE, paths[1], _EXCHANGE) == 0)
    return False
