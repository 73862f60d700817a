"""Small models and data to try the commands of the documentation on: python examples/playground.py vision

Writes into the working directory, in seconds, without network:

    vision      net.pt2 (a network trained on scikit-learn's handwritten digits, as pictures of 32x32 in colour),
                weights.pt (its state dict), images.npz (256 training pictures), test.npz (others, with labels),
                photos/ (48 PNG files)
    text        reviews/ (a BERT of one layer that tells good reviews from bad, with its tokenizer), reviews.csv,
                story/ (a Llama of one layer, never trained)
    adapters    polite/ and short/ (LoRAs for reviews/, never trained)
    detector    detector.pt2 (boxes and scores, never trained), scenes.npz
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Net(nn.Module):
    """Pictures [N, 3, 32, 32], normalised as for ImageNet, to logits [N, classes]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 1)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Detector(nn.Module):
    """Pictures [N, 3, 64, 64] to boxes [N, 64, 4] (corners, in pixels) and scores [N, 64, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU()),
        )
        self.head = nn.Conv2d(32, 7, 1)
        y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        self.register_buffer("centres", torch.stack([x, y], -1).reshape(64, 2) * 8 + 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.head(self.body(x)).flatten(2).transpose(1, 2)
        half = found[..., :2].exp() * 6
        boxes = torch.cat([self.centres - half, self.centres + half], -1)
        return {"boxes": boxes, "scores": found[..., 4:].sigmoid()}


def export(model: nn.Module, example: Tensor, path: str) -> None:
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(model.eval(), (example,), dynamic_shapes=({0: batch},)), path)


def fit(model: nn.Module, inputs: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    chosen = [some for _ in range(epochs) for some in torch.randperm(len(inputs)).split(64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=len(chosen))
    model.train()
    for some in chosen:
        optimizer.zero_grad()
        found = model(inputs[some])
        F.cross_entropy(getattr(found, "logits", found), labels[some]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def vision() -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    colour = F.interpolate(grey, size=32, mode="bilinear").repeat(1, 3, 1, 1)
    pictures = (colour - MEAN[:, None, None]) / STD[:, None, None]
    labels = torch.tensor(digits.target)
    model = Net()
    fit(model, pictures[:1400], labels[:1400], epochs=6)
    export(model, pictures[:2], "net.pt2")
    torch.save(model.state_dict(), "weights.pt")
    np.savez_compressed("images.npz", x=pictures[:256].numpy())
    np.savez_compressed("test.npz", x=pictures[1400:].numpy(), y=labels[1400:].numpy())
    Path("photos").mkdir(exist_ok=True)
    for i, pixels in enumerate((colour[:48] * 255).byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(f"photos/{i:02}.png")
    right = (model(pictures[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    print(f"wrote net.pt2 ({right:.1%} of the test digits), weights.pt, images.npz, test.npz, photos/")


def text() -> None:
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    words = {
        1: ["good", "great", "lovely", "funny", "clever"],
        0: ["bad", "dull", "long", "poor", "silly"],
    }
    rest = ["the", "film", "book", "was", "and", "very", "a", "play"]
    folder = Path("reviews")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *rest, *words[0], *words[1]]
    rows = [
        (f"the {thing} was {more}{one} and {other}", label)
        for label, some in words.items()
        for thing in ("film", "book", "play")
        for more in ("", "very ")
        for one, other in itertools.permutations(some, 2)
    ]
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    ids = torch.full((len(rows), 10), 0)
    for i, (line, _) in enumerate(rows):
        found = [2, *(vocabulary.index(word) for word in line.split()), 3]
        ids[i, : len(found)] = torch.tensor(found)
    fit(model, ids, torch.tensor([label for _, label in rows]), epochs=4)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    facts = {"tokenizer_class": "BertTokenizer", "model_max_length": 32, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    with open("reviews.csv", "w", newline="") as file:
        csv.writer(file).writerows([("sentence", "label"), *rows])
    story = LlamaConfig(
        vocab_size=96, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(story).save_pretrained("story")
    print(f"wrote reviews/, reviews.csv ({len(rows)} sentences) and story/")


def adapters() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    for name, rank in (("polite", 4), ("short", 8)):
        base = BertForSequenceClassification.from_pretrained("reviews")
        config = LoraConfig(r=rank, target_modules=["query", "value"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(name)
    print("wrote polite/ and short/")


def detector() -> None:
    scenes = torch.rand(64, 3, 64, 64)
    for i in range(64):
        scenes[i, i % 3, i // 2 : i // 2 + 20, 10:40] = 1.0
    export(Detector(), scenes[:2], "detector.pt2")
    np.savez_compressed("scenes.npz", x=scenes.numpy())
    print("wrote detector.pt2 and scenes.npz")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    known = {"vision": vision, "text": text, "adapters": adapters, "detector": detector}
    names = sys.argv[1:]
    if not names or set(names) - set(known):
        sys.exit(__doc__)
    for name in names:
        known[name]()


if __name__ == "__main__":
    main()
