"""Stop a build when a compressed model got worse: python examples/verify_in_ci.py digits-compressed

Reads the report that `compress` wrote and fails if a check was not proved, if the task metric fell too far, or if
the model did not get smaller and faster. To compare the files themselves again, on data that the compression never
saw, run `compress verify MODEL OUTPUT/model.onnx --data DATA`: exit code 7 means that they differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from compressor.report import read_report

MAX_DROP = 0.01  # of any metric that --eval measured: one point of accuracy
MIN_SMALLER, MIN_FASTER = 3.0, 1.0  # against the same model as fp32 ONNX


def complaints(report: dict[str, Any]) -> list[str]:
    """Every reason not to ship, empty if there is none."""
    found = [
        f"{row['pass']}: {row['status']}"
        for row in report["rows"]
        if row["status"] in ("not proved", "warned")
    ]
    emitted, before = report["emitted"], report["rows"][0]["metric"]
    for name, value in emitted.get("metric", {}).items():
        if value < before[name] - MAX_DROP:
            found.append(f"{name} fell from {before[name]:.4f} to {value:.4f}")
    if emitted["float_bytes"] / emitted["bytes"] < MIN_SMALLER:
        found.append(f"only {emitted['float_bytes'] / emitted['bytes']:.2f} times smaller")
    if emitted.get("latency", {}).get("ratio", MIN_FASTER) < MIN_FASTER:
        found.append(f"{emitted['latency']['ratio']:.2f} times as fast as the original")
    return found


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "digits-compressed")
    found = complaints(read_report(folder / "report.json"))
    for line in found:
        print(f"{folder}: {line}")
    print(f"{folder}: {'do not ship' if found else 'good to ship'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
