"""Where the time of an ONNX file goes: ONNX Runtime's own profiler, its operators led back to modules of the model.

Nodes of a file are named by module path. ONNX Runtime keeps these names where it fuses, with a suffix, or names a fused
node after the value that it gives; what it adds itself (changes of layout) belongs to no module. How much of the time
could be led back is said.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from . import runtime

WARM, LEAST = 3, 5  # runs that are not counted, and that are at least
_FUSED = 3  # operators behind a convolution that it may have taken in
_ADDED = re.compile(r"_token_\d+$")


def profile(
    paths: Sequence[Path],
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int = 1,
    seconds: float = 5.0,
    providers: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One entry a file, measured in turns: {"path", "ms", "runs", "mapped", "nodes", "modules", "operators"}.

    ms: median of a whole run, with the profiler at work. nodes: rows of {"node", "module", "operator", "ms"}, medians
    over the runs, slowest first; module is None for what ONNX Runtime added. modules, operators: sums of these. mapped:
    the share of the operators' time that has a module, the model itself (``""``) included.
    """
    sessions = [
        runtime.session(
            path, threads=threads, profile=True, providers=[providers[i]] if providers else [_CPU]
        )
        for i, path in enumerate(paths)
    ]
    whole: list[list[float]] = [[] for _ in paths]
    inputs = [dict(zip((i.name for i in one.get_inputs()), feeds.values(), strict=True)) for one in sessions]
    deadline = time.perf_counter() + seconds
    try:
        while len(whole[0]) < WARM + LEAST or time.perf_counter() < deadline:
            turn = len(whole[0]) % 2
            for i in reversed(range(len(paths))) if turn else range(len(paths)):
                start = time.perf_counter()
                runtime.run(sessions[i], inputs[i])
                whole[i].append((time.perf_counter() - start) * 1e3)
    finally:
        traces = [runtime.trace(one) for one in sessions]
    return [
        {
            "path": str(path),
            "ms": statistics.median(times[WARM:]),
            "runs": len(times) - WARM,
            **_summed(path, events),
        }
        for path, times, events in zip(paths, whole, traces, strict=True)
    ]


_CPU = "CPUExecutionProvider"


def _summed(path: Path, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event["cat"] == "Node" and "op_name" in event["args"]:
            name = event["name"].removesuffix("_kernel_time")
            times[name, event["args"]["op_name"]].append(event["dur"] / 1e3)
    places = _Places(path)
    nodes: list[dict[str, Any]] = [
        {
            "node": name,
            "module": places.module(name, operator),
            "operator": operator,
            "ms": statistics.median(found[WARM:] or found),
        }
        for (name, operator), found in times.items()
    ]
    nodes.sort(key=lambda row: -row["ms"])
    whole = sum(row["ms"] for row in nodes)
    mapped = sum(row["ms"] for row in nodes if row["module"] is not None)
    return {
        "mapped": mapped / whole if whole else 0.0,
        "nodes": nodes,
        "modules": _by(nodes, "module"),
        "operators": _by(nodes, "operator"),
    }


def _by(nodes: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    sums: dict[Any, float] = defaultdict(float)
    counts: dict[Any, int] = defaultdict(int)
    for row in nodes:
        sums[row[key]] += row["ms"]
        counts[row[key]] += 1
    return [
        {key: name, "ms": ms, "nodes": counts[name]} for name, ms in sorted(sums.items(), key=lambda x: -x[1])
    ]


class _Places:
    """Names of nodes and values in the file, and the modules that they belong to."""

    def __init__(self, path: Path) -> None:
        graph = onnx.load(str(path), load_external_data=False).graph
        self.nodes = {node.name: node for node in graph.node}
        self.makers = {value: node for node in graph.node for value in node.output}

    def module(self, name: str, operator: str) -> str | None:
        """`layer1.0.conv1` for what became of `layer1.0.conv1/Conv`; None for what stands in no module.

        A convolution that took in the activation behind it may go by the activation's name.
        """
        known = self._known(name)
        node = known
        for _ in range(_FUSED):
            if node is None or node.op_type == operator:
                break
            node = self.makers.get(node.input[0]) if node.input else None
        found = node if node is not None and node.op_type == operator else known
        return None if found is None else found.name.rpartition("/")[0]

    def _known(self, name: str) -> onnx.NodeProto | None:
        """The node of the file that one of the optimised graph goes back to, by its name."""
        if name in self.nodes:
            return self.nodes[name]
        plain = _ADDED.sub("", name)
        for suffix in ("", "_nchwc", "_nhwc"):
            maker = self.makers.get(plain.removesuffix(suffix))
            if maker is not None:
                return maker
        if "/" not in plain:
            return None
        while plain:
            if plain in self.nodes:
                return self.nodes[plain]
            plain = plain.rpartition("/")[0]
        return None
