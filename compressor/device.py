"""Latency on a device that is not this machine, by a command of the user's that prints milliseconds.

    --latency-cmd 'sh examples/latency_over_adb.sh {onnx}'
    --latency-cmd 'scp -q {onnx} pi:model.onnx && ssh pi python3 bench.py model.onnx'

The command runs in a shell with `{onnx}` replaced by the path of an ONNX file (a large model's weights lie beside it
as `model.onnx.data`). The last number that it prints counts. It is the user's own command line, run as typed.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

from .errors import TargetError, UsageError

TIMEOUT = 600.0  # seconds: pushing a large model over USB takes minutes
PLACE = "{onnx}"
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def checked(command: str | None) -> str | None:
    """The command, or UsageError where it does not say where the file goes."""
    if command is not None and PLACE not in command:
        raise UsageError(f"--latency-cmd '{command}': write {PLACE} where the path of the ONNX file goes")
    return command


def milliseconds(command: str, onnx: Path, timeout: float = TIMEOUT) -> float:
    """What the command says of this file. TargetError, in one line, where it fails, hangs or prints no latency."""
    words = command.replace(PLACE, shlex.quote(str(onnx)))
    named = f"--latency-cmd '{command}'"
    try:
        code, out, err = _run(words, timeout)
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"{named}: no answer within {timeout:g} s") from error
    if code:
        said = _last_line(err) or _last_line(out)
        raise TargetError(f"{named}: exit code {code}" + (f": {said}" if said else ""))
    numbers = _NUMBER.findall(out)
    found = float(numbers[-1]) if numbers else math.nan
    if not (math.isfinite(found) and found > 0):
        said = f"it printed '{_last_line(out)}'" if out.strip() else "it printed nothing"
        raise TargetError(f"{named}: the last number on standard output must be milliseconds; {said}")
    return found


def _run(words: str, timeout: float) -> tuple[int, str, str]:
    """Exit code, standard output and error. Nothing that it started outlives it where it is given up."""
    with subprocess.Popen(
        words, shell=True, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:  # its time is up, or the user's patience: a device must not stay busy
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, out, err


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:200]
