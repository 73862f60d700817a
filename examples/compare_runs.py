"""Which of two runs is better? python examples/compare_runs.py FOLDER FOLDER

Reads both reports and shows side by side what the emitted files weigh, cost and score, and which passes made them so.
For times taken side by side, `compress bench A/model.onnx B/model.onnx`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from compressor.report import read_report


def facts(report: dict[str, Any]) -> dict[str, str]:
    emitted, last = report["emitted"], report["rows"][-1]
    found = {
        "passes": report["spec"],
        "bytes": f"{emitted['bytes']:,}",
        "MACs": f"{last['macs']:,}",
        "SQNR in all": f"{float(last['total_db']):.1f} dB",
        **{name: f"{value:.4g}" for name, value in emitted.get("metric", {}).items()},
    }
    if "latency" in emitted:
        found["against fp32"] = f"{emitted['latency']['ratio']:.2f}x"
    for row in report["rows"][1:]:
        found[row["pass"]] = row["status"]
    return found


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    one, other = (facts(read_report(Path(folder) / "report.json")) for folder in sys.argv[1:])
    width = max(len(words) for words in one.values())
    print(f"{'':<14} {sys.argv[1]:<{width}}   {sys.argv[2]}")
    for name in dict.fromkeys([*one, *other]):
        print(f"{name:<14} {one.get(name, '-'):<{width}}   {other.get(name, '-')}")


if __name__ == "__main__":
    main()
