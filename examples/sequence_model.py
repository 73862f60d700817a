"""A sequence model of your own: sequences of any length stay possible, and padding enters no statistic.

Batches have two inputs here, tokens and an `attention_mask` (1 for real tokens); a mask of that name is how padding is
known. Batches may have different lengths; within one of them sequences are padded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import compressor

WORDS, LONGEST = 200, 64


class Tagger(nn.Module):
    """Tokens [N, T] and their mask to a tag for every token, [N, T, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 64), nn.Embedding(LONGEST, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.tags = nn.Linear(64, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.words(input_ids) + self.places(places)
        return self.tags(self.layers(x, src_key_padding_mask=attention_mask == 0))


def batches() -> Iterator[dict[str, Tensor]]:
    """Put your own sentences here."""
    for length in (12, 24, 48):
        mask = torch.arange(length) < torch.randint(length // 2, length + 1, (32, 1))
        yield {"input_ids": torch.randint(1, WORDS, (32, length)) * mask, "attention_mask": mask.long()}


def main() -> None:
    torch.manual_seed(0)
    model = Tagger().eval()  # never trained: put your own here
    axes = "input_ids:i64[batch,sequence]", "attention_mask:i64[batch,sequence]"
    result = compressor.compress(
        model, inputs=axes, passes="int8", calibration=batches(), output="tagger-int8", measure=False
    )
    session = onnxruntime.InferenceSession(result.onnx)
    for length in (5, 50):
        ids = np.ones((1, length), np.int64)
        (tags,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        print(f"{length} tokens: {tags.shape[1]} tags")
    print(f"wrote {result.onnx}, {result.report['rows'][-1]['total_db']:.1f} dB")


if __name__ == "__main__":
    main()
