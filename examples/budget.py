"""What does each budget cost? Several of them in a row, on one network, with the metric of your own data.

    python examples/playground.py vision
    python examples/budget.py

On the command line each row is one `compress net.pt2 --passes SPEC --calib images.npz --eval test.npz`.
"""

from __future__ import annotations

import numpy as np
import torch

import compressor

BUDGETS = (
    "prune(macs=0.5)",  # half of the multiplications
    "prune(max_drop=0.02)",  # as far as costs at most two points
    "fold,int8(max_drop=0.01)",  # integers, where that costs at most a point
)


def main() -> None:
    pictures = torch.from_numpy(np.load("images.npz")["x"])
    print(f"{'':<26} {'top-1':>8} {'MACs':>10} {'bytes':>8}")
    for i, spec in enumerate(BUDGETS):
        try:
            result = compressor.compress(
                "net.pt2",
                passes=spec,
                calibration=pictures,
                evaluate="test.npz",
                output=f"budget-{i}",
                measure=False,
            )
        except compressor.UsageError as error:  # a budget out of reach says what can be reached
            print(f"{spec:<26} {error}")
            continue
        last, emitted = result.report["rows"][-1], result.report["emitted"]
        print(f"{spec:<26} {emitted['metric']['top1']:>8.2%} {last['macs']:>10,} {emitted['bytes']:>8,}")
    print("wrote budget-0 to budget-2")


if __name__ == "__main__":
    main()
