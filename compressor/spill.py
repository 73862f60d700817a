"""Large tensors on disk instead of in memory: files that are mapped, and that go with their tensor.

A pass that rewrites the weights of a model of several GB would fill memory with the new ones. Mapped, they are the
system's file cache, which shrinks when something else needs the room.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20  # smaller tensors stay in memory: together they are little, and each would be a file


def spilling(folder: Path | None = None) -> Callable[[Tensor], Tensor]:
    """A function for `Graph.keep`: it answers an equal tensor whose memory is a file in `folder`.

    folder: the system's for temporary files if None. Small tensors, and those that are not one dense block of this
    machine's memory, come back as they are, and so do all on Windows, where a mapped file cannot be removed. OSError
    as the disk raises it (full, read-only).
    """

    def spill(tensor: Tensor) -> Tensor:
        trim()  # of what the tensor was computed from, and of the tensors before it
        if tensor.nbytes < LEAST_BYTES or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return tensor
        if os.name == "nt":
            return tensor
        handle, name = tempfile.mkstemp(dir=folder)
        try:
            with open(handle, "wb") as file:
                file.write(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
            storage: Any = torch.UntypedStorage.from_file(name, True, tensor.nbytes)
        finally:
            os.unlink(name)  # it goes when nothing maps it any more
        return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())

    return spill


def trim() -> None:
    """Gives freed memory back to the system: glibc keeps blocks of up to 32 MB, hundreds of MB of them in a pass."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library, which has no such function
            ctypes.CDLL(None).malloc_trim(0)
