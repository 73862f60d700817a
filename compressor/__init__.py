"""A compiler from PyTorch models to small, fast ONNX, which proves what each step did to the numbers.

    import compressor
    result = compressor.compress(model, (images,), passes="merge,fold", output="small")

Importing this package loads neither torch nor onnxruntime; the first use of `compress`, `Options` or
`Result` does. `compressor.api` holds the other verbs: trainable, verify, inspect, bench.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    CompressorError,
    ContractError,
    DataError,
    FileError,
    OutputError,
    TargetError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from .api import Options, Result, compress

__version__ = "0.1.0"

# First and last torch release that the test suite ran with. Others from 2.9 on may work; a notice then names
# this range.
TESTED_TORCH = ("2.13", "2.13")

__all__ = [
    "TESTED_TORCH",
    "CompressorError",
    "ContractError",
    "DataError",
    "FileError",
    "Options",
    "OutputError",
    "Result",
    "TargetError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "compress",
]

_LAZY = frozenset({"Options", "Result", "compress"})


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
