"""Everything that can go wrong, by who must act. The command line turns each class into its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_OBEYED = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) != "\n"}


def printable(text: str) -> str:
    """Text without what a terminal obeys, and with bytes of paths that are no text spelled out."""
    return text.translate(_OBEYED).encode("utf-8", "backslashreplace").decode()


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """`, did you mean 'fold'?` for a name that is almost one of these, else nothing."""
    close = difflib.get_close_matches(name, list(names), 1, cutoff)
    return f", did you mean '{close[0]}'?" if close else ""


class CompressorError(Exception):
    """Base of all errors that this package raises on purpose: one line that says what, where and what to do."""

    exit_code = 1


class UsageError(CompressorError):
    """The caller must act: an unknown pass or option, an impossible budget, a wrong argument."""

    exit_code = 2


class FileError(UsageError):
    """A model file is missing, damaged, incomplete, or not safe to read without consent."""

    exit_code = 3


class DataError(UsageError):
    """Calibration or evaluation data does not fit the model, is empty, or cannot be read."""

    exit_code = 4


class FunctionError(DataError):
    """A function of the user's raises, or gives something else than was asked for; names its line."""


class OutputError(UsageError):
    """The result cannot be written: folder not writable, disk full."""

    exit_code = 5


class UnsupportedError(CompressorError):
    """The model cannot be captured or emitted; names the operator, its module and source line."""

    exit_code = 6


class ContractError(CompressorError):
    """A pass broke its promise about the numbers; names the pass and the first operator that went wrong."""

    exit_code = 7


class TargetError(CompressorError):
    """The runtime refused the emitted model, or does not give its numbers."""

    exit_code = 8
