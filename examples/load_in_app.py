"""What an app does: read signature.json, prepare a picture as it says, run the model, name the class.

    python examples/playground.py vision
    compress net.pt2 --passes fold,int8 --calib photos/ --preprocess imagenet --image-input uint8,nhwc -o camera
    python examples/load_in_app.py camera photos/00.png

Needs onnxruntime, numpy and Pillow; neither torch nor compressor. `usage.md` in the folder has the same in Kotlin, C++
and JavaScript.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def pixels(path: str, signature: dict) -> np.ndarray:
    """Resized and cropped as the signature says, uint8 [1, height, width, 3]; the normalisation is in the model."""
    how = signature["preprocess"]
    picture = Image.open(path).convert("RGB")
    scale = how["resize"] / min(picture.size)  # of the shorter side
    size = round(picture.width * scale), round(picture.height * scale)
    picture = picture.resize(size, Image.Resampling[how["interpolation"].upper()])
    height, width = how["crop"]
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)), dtype=np.uint8)[None]


def main() -> None:
    folder, picture = Path(sys.argv[1]), sys.argv[2]
    signature = json.loads((folder / "signature.json").read_text())
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact sums on x86 without VNNI, too
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    name = signature["inputs"][0]["name"]
    (logits,) = session.run(None, {name: pixels(picture, signature)})
    best = int(logits[0].argmax())
    labels = signature.get("labels") or []
    print(f"{picture}: {labels[best] if best < len(labels) else f'class {best}'}")


if __name__ == "__main__":
    main()
