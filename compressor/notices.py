"""What a user should look at before the model ships, in words: notices of the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from . import TESTED_TORCH, measure, runtime
from . import verify as contracts
from .emit import Emitted
from .ir import Graph
from .pipeline import Row
from .target import Target

SHARED = (
    f"several nodes read one weight of 8 bits, and ONNX Runtime loads no such file with {runtime.EXACT}: for x86 "
    "without VNNI compress with --target cpu-avx2"
)
SLOWER = 0.97  # times as fast as the original: what is no noise


def of_versions() -> Iterator[str]:
    installed = torch.__version__.split("+")[0]
    release = tuple(int(p) for p in installed.split(".")[:2])
    low, high = (tuple(int(p) for p in v.split(".")) for v in TESTED_TORCH)
    if not low <= release <= high:
        yield f"torch {installed} is outside the tested range {TESTED_TORCH[0]} to {TESTED_TORCH[1]}"


def of_default(target: Target) -> Iterator[str]:
    """Of the target that was taken because none was named."""
    if measure.saturation():
        yield (
            f"made for this machine, which has no VNNI: target {target.name}, where int8 has weights of 7 bits; name "
            "--target cpu for processors with VNNI and for Arm"
        )


def of_passes(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.status == "not proved":
            yield f"{row.config}: not proved, the outputs hardly depend on what it changed"
        yield from (f"{row.config}: {row.facts[key]}" for key in ("scheme", "few") if key in row.facts)
        if "latency" in row.facts:
            one = row.facts["latency"]
            yield f"{row.config}: {one['before_ms']:.3g} -> {one['after_ms']:.3g} ms, timed on {one['timed_on']}"
    low = next((row for row in rows if row.total_db < contracts.WARN_DB), None)
    if low is not None:
        yield (
            f"{low.config} leaves the outputs at {low.total_db:.1f} dB of the original, under {contracts.WARN_DB:g} "
            "dB: look at the task metric (--eval) before you ship it"
        )


def of_file(
    graph: Graph, emitted: Emitted, checks: Sequence[contracts.Check], target: Target, saturated: float
) -> Iterator[str]:
    """Where the network amplifies last bits so far that the file was held to less than usual, and slow operators.

    saturated: see `sessions.saturated`.
    """
    if math.isfinite(saturated):
        yield other_numbers(saturated)
    floats = [check for check in checks if not check.discrete]
    level = min((check.sqnr_db for check in floats), default=math.inf)
    far = max((check.error for check in floats), default=0.0)
    if emitted.integer and level < contracts.SIMULATION_DB:
        yield (
            f"the file agrees with its simulation to {level:.1f} dB: in this network any other rounding of the same "
            "integers is about as far away, so a small fault of the runtime would not show"
        )
    elif not emitted.integer and contracts.is_single(graph) and far > contracts.EMITTED:
        yield (
            f"the file agrees with the model to {far:.0e} of its scale: rounding its weights once moves this network "
            "about as far"
        )
    if slow := sorted(target.slow.intersection(operator for operator, _ in emitted.nodes)):
        yield (
            f"the runtime of target {target.name} computes {', '.join(slow)} slower than floats: the file is smaller, "
            "not faster"
        )


def other_numbers(saturated: float) -> str:
    """Of a file whose 8-bit sums saturate on this machine; saturated: see `sessions.saturated`."""
    return f"{measure.saturation()}; a session without the option gives this file {saturated:.1f} dB here"


def of_times(latency: Mapping[str, Any]) -> Iterator[str]:
    """Of a model that was timed where it will run."""
    if latency.get("spread", [1, 1])[1] < 1 and latency["ratio"] < SLOWER:
        yield (
            f"the compiled model is slower than the original here ({latency['ratio']:.2f}x); leave out the pass that "
            "does not pay"
        )
