"""A target of your own, in a package of your own: a device that you ship, and the facts about its runtime.

    pip install ./examples/plugin_target
    compress model.pt2 --target kiosk --calib data.npz

A target is plain data. This one is an Arm board that runs ONNX Runtime 1.16 on one picture at a time. `elsewhere` says
that times taken on this machine decide nothing; `--latency-cmd` measures on the board.
"""

from __future__ import annotations

from compressor.target import ONNXRUNTIME, QLINEAR, Target

KIOSK = Target(
    name="kiosk",
    summary="our Arm board: ONNX Runtime 1.16, one picture at a time",
    providers=("CPUExecutionProvider",),
    opset=19,
    ir_version=9,
    fixed_batch=1,
    elsewhere=True,
    recipe="merge,fold,int8",
    dialect=ONNXRUNTIME,
    quant=QLINEAR,
)
