"""Merge a LoRA of peft into the model that it adapts, and show that nothing else changed.

With files: `compress BASE --adapter FOLDER --passes merge`. Here the model is in memory, and the adapter, which nobody
trained, is drawn at random so that there is something to merge.
"""

from __future__ import annotations

import onnxruntime
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import compressor


def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    inputs = torch.randn(16, 32)
    result = compressor.compress(adapted, (inputs,), passes="merge", output="adapters-merged", measure=False)

    before, after = result.report["rows"]
    print(f"{before['params']:,} parameters became {after['params']:,}")
    for rewrite in after["rewrites"]:
        print(f"  {rewrite['site']}: {rewrite['what']}")
    session = onnxruntime.InferenceSession(result.onnx)
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    with torch.no_grad():
        error = (torch.from_numpy(found) - adapted(inputs)).abs().max() / adapted(inputs).abs().max()
    print(f"wrote {result.onnx}: it differs from the adapted model by {error:.1e} of its largest output")


if __name__ == "__main__":
    main()
