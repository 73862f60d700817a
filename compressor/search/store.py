"""Graphs behind the first passes of a spec, on disk: a trial that begins alike begins where the other one stood.

Entries are named by the hash of everything that made them. Any number of processes may read and write at once, and the
oldest ones go when there are too many bytes. A cache that cannot be written costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..ir import Graph
from .frozen import NotFrozen, freeze, thaw

BYTES = 4 << 30
ABANDONED = 3600.0  # seconds after which what is half written has no writer any more


def key_of(*parts: Any) -> str:
    """SHA-256 over plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Store:
    """A folder of graphs by key; at most `most` bytes of them."""

    def __init__(self, folder: Path, most: int = BYTES) -> None:
        self.folder, self.most = folder, most

    def recall(self, keys: Sequence[str], base: Graph) -> tuple[Graph, Any] | None:
        """The graph and the facts of the first of these keys that is here; see `frozen.thaw` for base."""
        for key in keys:
            path = self._path(key)
            if not path.is_file():
                continue
            try:
                found = thaw(path, base)
            except NotFrozen:  # damaged, or of another version of the libraries: it is made anew
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):
                os.utime(path)
            return found
        return None

    def keep(self, key: str, graph: Graph, base: Graph, facts: Any) -> bool:
        """Whether the graph could be kept."""
        if self._path(key).is_file():
            return True
        fresh = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, fresh = tempfile.mkstemp(dir=self.folder, suffix=".part")
            os.close(handle)
            freeze(graph, base, Path(fresh), facts)
            os.replace(fresh, self._path(key))
        except (NotFrozen, OSError, SafetensorError, TypeError, ValueError):
            if fresh is not None:
                Path(fresh).unlink(missing_ok=True)
            return False
        self._shrink()
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _shrink(self) -> None:
        for path in self.folder.glob("*.part"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
        entries = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # another process was faster
                stat = path.stat()
                entries.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.most:
                return
            path.unlink(missing_ok=True)
            total -= size
