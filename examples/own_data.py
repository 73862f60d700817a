"""Write calibration and evaluation data in the form that `--calib` and `--eval` read.

An .npz holds one array an input, named like the input (`compress inspect MODEL` shows the names) and already
prepared as for inference; `y` holds the labels, which --eval needs and --calib ignores. Then:

    compress MODEL --passes fold,int8 --calib calibration.npz --eval evaluation.npz

A few hundred samples that look like what the model will see are enough. Keep evaluation data out of calibration.
For a folder of images no script is needed: --calib FOLDER --preprocess imagenet.
"""

from __future__ import annotations

import numpy as np

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)[:, None, None]
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)[:, None, None]


def prepare(pixels: np.ndarray) -> np.ndarray:
    """Pixels 0..255, uint8 [N, 3, H, W], to what the model was trained on, float32 of the same shape."""
    return (pixels.astype(np.float32) / 255 - MEAN) / STD


def main() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (320, 3, 32, 32), dtype=np.uint8)  # put your own images here
    labels = rng.integers(0, 10, 320)
    np.savez_compressed("calibration.npz", x=prepare(pixels[:256]))
    np.savez_compressed("evaluation.npz", x=prepare(pixels[256:]), y=labels[256:])
    print("wrote calibration.npz (256 samples) and evaluation.npz (64 samples with labels)")


if __name__ == "__main__":
    main()
