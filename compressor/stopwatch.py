"""How long graphs take: on this host in turns, or on the device by a command of the user's; each is measured once.

What was measured is a table that a later run can replay, so that it decides the same.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import delivery, device
from .emit import Emitted
from .ir import Graph
from .target import Target

HERE = "this host"
TIMING_SECONDS = 0.5  # for each graph that a pass has timed


class Stopwatch:
    """Median milliseconds of one run: batch 1, one thread.

    command: measures on the device, see `device`. table: what was measured before, and what is from now on, by target
    and fingerprints. folder: where models to be timed are written.
    """

    def __init__(self, target: Target, command: str | None, table: dict[str, list[float]]) -> None:
        self.target, self.command, self.table = target, device.checked(command), table
        self.folder = Path()
        self._emitted: dict[str, Emitted] = {}

    @property
    def elsewhere(self) -> bool:
        """True where the target, or its provider, is not on this machine and nobody said how to measure there."""
        away = self.target.elsewhere or self.provider != self.target.providers[0]
        return away and self.command is None

    @property
    def provider(self) -> str:
        """What this host times with."""
        return delivery.usable_provider(self.target)

    @property
    def place(self) -> str:
        """Where times are taken, in words."""
        if self.command is not None:
            return "the device, by --latency-cmd"
        return f"{HERE}, not on the target" if self.elsewhere else HERE

    def milliseconds(self, graphs: tuple[Graph, ...], fixed: Mapping[str, int]) -> list[float]:
        """Of each graph, timed in turns; a device is asked for one at a time. fixed: sizes of dynamic axes."""
        if self.command is not None and len(graphs) > 1:
            return [self.milliseconds((graph,), fixed)[0] for graph in graphs]
        prints = [graph.fingerprint() for graph in graphs]
        clock = self.target.name if self.command is None else f"{self.target.name}, {self.command}"
        key = f"{clock}:{'+'.join(prints)}"
        if key not in self.table:
            files = {p: self.emitted(graph, fixed) for p, graph in zip(prints, graphs, strict=True)}
            found = self.latencies(files, graphs[0], seconds=len(files) * TIMING_SECONDS)
            self.table[key] = [found[p]["median_ms"] for p in prints]
        return self.table[key]

    def latencies(self, files: Mapping[str, Emitted], graph: Graph, *, seconds: float) -> dict[str, Any]:
        """What `delivery.latencies` says of files of this graph's inputs, or the user's command in fewer words."""
        if self.command is None:
            return delivery.latencies(files, graph.example, provider=self.provider, seconds=seconds)
        found = {name: device.milliseconds(self.command, e.path) for name, e in files.items()}
        ratio = {"ratio": found["float"] / found["model"]} if found.keys() == {"model", "float"} else {}
        return {name: {"median_ms": ms} for name, ms in found.items()} | ratio

    def emitted(self, graph: Graph, fixed: Mapping[str, int]) -> Emitted:
        """The graph as a file of this target, made once."""
        fingerprint = graph.fingerprint()
        if fingerprint not in self._emitted:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            plain = dataclasses.replace(self.target, formats=("onnx",))
            self._emitted[fingerprint] = delivery.deliver(graph, plain, folder, {}, fixed)
        return self._emitted[fingerprint]
