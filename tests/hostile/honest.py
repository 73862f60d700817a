"""One small honest file of every kind that compressor reads, and how to have it read."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import torch
from safetensors.torch import save
from sample_report import sample_report
from torch import Tensor, nn

Change = Callable[[bytes, random.Random], bytes]
FACTORY = """from torch import nn


def make():
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    return nn.Sequential(*layers)
"""


@dataclass(frozen=True)
class Kind:
    """files: by name, the first of them is what is changed. commands: words, FILE stands for it, FOLDER for where it
    lies, HOME for where honest models lie. changes: accidents that suit the format."""

    files: dict[str, bytes]
    commands: tuple[tuple[str, ...], ...]
    changes: tuple[Change, ...] = (mutations.damaged,)


def network() -> nn.Module:
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    exec(FACTORY, space)
    return space["make"]().eval()


def rows(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def program() -> bytes:
    buffer = io.BytesIO()
    with torch.no_grad():
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.export.save(
            torch.export.export(network(), (rows(3),), dynamic_shapes=shapes, strict=False), buffer
        )
    return buffer.getvalue()


def torch_bytes(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def numpy_bytes(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def onnx_bytes(external: bool = False) -> dict[str, bytes]:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    net = network()
    weight, bias = net[0].weight.detach().numpy(), net[0].bias.detach().numpy()
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    if external:
        tensors[0].ClearField("raw_data")
        tensors[0].data_location = TensorProto.EXTERNAL
        for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", str(weight.nbytes))):
            tensors[0].external_data.add(key=key, value=value)
    shape, made = ["batch", 3, 8, 8], ["batch", 4, 8, 8]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input_1", "w", "b"], ["h"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["h"], ["output"]),
        ],
        "net",
        [helper.make_tensor_value_info("input_1", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, made)],
        tensors,
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model.SerializeToString()) if not external else None
    return {"model.onnx": model.SerializeToString()} | (
        {"model.onnx.data": weight.tobytes()} if external else {}
    )


def picture(kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((rows(1)[0].permute(1, 2, 0).numpy() * 60 + 128).clip(0, 255).astype(np.uint8)).save(
        buffer, kind
    )
    return buffer.getvalue()


def parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet as reader

    buffer = io.BytesIO()
    reader.write_table(pyarrow.table({"text": ["one two", "three"] * 6, "label": [0, 1] * 6}), buffer)
    return buffer.getvalue()


def bert(folder: Path) -> dict[str, bytes]:
    """A model folder; then its adapter's."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).save_pretrained(folder)
    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "one", "two", "three"))}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    tokens = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def lora(settings: dict[str, Any] | None = None) -> dict[str, bytes]:
    name = "base_model.model.bert.encoder.layer.0.attention.self.query"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 16), f"{name}.lora_B.weight": torch.randn(16, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], "bias": "none"}
    return {
        "adapter_config.json": json.dumps(config | (settings or {})).encode(),
        "adapter_model.safetensors": save(tensors),
    }


PLAIN = ("--passes", "fold", "--no-measure", "-q", "--stop-after", "fold")
WEIGHTS = (
    ("inspect", "FILE"),
    ("FILE", "--model", "HOME/factory.py:make", "--input", "x:f32[?,3,8,8]", *PLAIN),
)
DATA = (("data:FILE",),)
PICTURES = {
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "resample": 2,
}
JSON = (mutations.damaged, mutations.rewritten, mutations.rewritten, mutations.rewritten)


def kinds(home: Path) -> dict[str, Kind]:
    """Writes the honest models that others need to `home`, and gives one file of each kind."""
    home.mkdir(parents=True, exist_ok=True)
    net, x = network(), rows()
    state = net.state_dict()
    (home / "factory.py").write_text(FACTORY)
    (home / "net.pt2").write_bytes(program())
    (home / "relu.onnx").write_bytes(onnx_bytes()["model.onnx"])
    with torch.no_grad():
        half = torch.export.export(
            nn.Sequential(net[0], net[2]),
            (x[:3],),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            strict=False,
        )
    torch.export.save(half, home / "relu.pt2")
    folder = bert(home / "bert")
    texts = {
        "txt": b"one two\nthree\n" * 6,
        "csv": b"text,label\none two,0\nthree,1\n" * 1,
        "tsv": b"text\tlabel\none two\t0\nthree\t1\n",
    }
    texts["jsonl"] = b'{"text": "one two", "label": 0}\n{"text": "three", "label": 1}\n' * 6
    pt2, boxed = mutations.in_zip, mutations.rewritten
    found = {
        "pt2": Kind(
            {"net.pt2": program()},
            (("inspect", "FILE"), ("FILE", *PLAIN)),
            (
                mutations.damaged,
                *[pt2(boxed, "model.json")] * 3,
                pt2(boxed, "_config.json"),
                pt2(mutations.damaged, "model.pt"),
            ),
        ),
        "pt": Kind(
            {"net.pt": torch_bytes({"state_dict": state, "epoch": 3})},
            WEIGHTS,
            (
                mutations.damaged,
                *[pt2(mutations.damaged, "data.pkl")] * 3,
                pt2(mutations.damaged, "version", "byteorder"),
            ),
        ),
        "legacy pt": Kind({"net.pth": torch_bytes(state, _use_new_zipfile_serialization=False)}, WEIGHTS),
        "module pt": Kind(
            {"net.ckpt": torch_bytes(net)}, WEIGHTS, (mutations.damaged, pt2(mutations.damaged, "data.pkl"))
        ),
        "pickle": Kind({"net.bin": pickle.dumps({k: v.numpy() for k, v in state.items()})}, WEIGHTS),
        "safetensors": Kind(
            {"net.safetensors": save(state)}, WEIGHTS, (mutations.damaged, *[mutations.in_header(boxed)] * 3)
        ),
        "hf config": Kind({"config.json": folder["config.json"], **folder}, (("FOLDER", *PLAIN),), JSON),
        "hf weights": Kind(
            {"model.safetensors": folder["model.safetensors"], **folder},
            (("FOLDER", *PLAIN),),
            (mutations.damaged, mutations.in_header(boxed)),
        ),
        "adapter config": Kind(lora(), (("HOME/bert", "--adapter", "FOLDER", *PLAIN),), JSON),
        "adapter weights": Kind(
            dict(reversed(lora().items())),
            (("HOME/bert", "--adapter", "FOLDER", *PLAIN),),
            (mutations.damaged, mutations.in_header(boxed)),
        ),
        "npz": Kind(
            {"data.npz": numpy_bytes(np.savez, x=x.numpy())},
            DATA,
            (mutations.damaged, pt2(mutations.damaged, ".npy"), pt2(header, ".npy")),
        ),
        "packed npz": Kind({"data.npz": numpy_bytes(np.savez_compressed, x=x.numpy())}, DATA),
        "npy": Kind({"data.npy": numpy_bytes(np.save, x.numpy())}, DATA, (mutations.damaged, header, header)),
        "pt data": Kind(
            {"data.pt": torch_bytes({"x": x})}, DATA, (mutations.damaged, pt2(mutations.damaged, "data.pkl"))
        ),
        "safetensors data": Kind(
            {"data.safetensors": save({"x": x})}, DATA, (mutations.damaged, mutations.in_header(boxed))
        ),
        **{
            f"{suffix} texts": Kind({f"texts.{suffix}": text}, (("data:FILE",),))
            for suffix, text in texts.items()
        },
        "tokenizer": Kind(
            {name: folder[name] for name in ("tokenizer.json", "tokenizer_config.json")}
            | {"texts.txt": texts["txt"]},
            (("data:FOLDER/texts.txt",),),
            JSON,
        ),
        "tokenizer settings": Kind(
            {name: folder[name] for name in ("tokenizer_config.json", "tokenizer.json")}
            | {"texts.txt": texts["txt"]},
            (("data:FOLDER/texts.txt",),),
            JSON,
        ),
        "parquet texts": Kind({"texts.parquet": parquet()}, DATA),
        **{
            f"{kind} images": Kind(
                {f"one.{kind}": picture(kind), f"two.{kind}": picture(kind)}, (("data:FOLDER",),)
            )
            for kind in ("png", "jpeg", "bmp", "gif", "webp", "tiff")
        },
        "onnx": Kind(
            onnx_bytes(),
            (
                ("inspect", "FILE"),
                ("verify", "HOME/relu.pt2", "FILE"),
                ("bench", "FILE", "--seconds", "0.02"),
                ("inspect", "FILE", "--partitions", "all"),
            ),
        ),
        "external onnx": Kind(
            onnx_bytes(external=True), (("inspect", "FILE"), ("verify", "HOME/relu.pt2", "FILE"))
        ),
        "report": Kind(
            {"report.json": json.dumps(sample_report()).encode()},
            (
                ("inspect", "FILE"),
                ("inspect", "FILE", "--groups"),
                ("HOME/net.pt2", "--latency-table", "FILE", *PLAIN),
            ),
            JSON,
        ),
        "preprocess": Kind(
            {"preprocessor_config.json": json.dumps(PICTURES).encode()},
            (("HOME/net.pt2", "--preprocess", "FILE", "--calib", "HOME/pictures", *PLAIN),),
            JSON,
        ),
    }
    (home / "pictures").mkdir(exist_ok=True)
    for number in range(10):
        (home / "pictures" / f"{number}.png").write_bytes(picture("png"))
    return found


def header(data: bytes, rng: random.Random) -> bytes:
    """A .npy whose header says something else."""
    start = data.index(b"{")
    end = data.index(b"\n", start)
    lies = (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 3, 8, 8), }",
        b"{'descr': '<f4', 'fortran_order': True, 'shape': (100000, 300, 8, 8), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (12,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3, 8, 8), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (12, 3, 8, 9223372036854775807), }",
        b"{'descr': '<M8[ns]', 'fortran_order': False, 'shape': (12, 3, 8, 8), }",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (12,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 3, 8, 8), }",
        b"__import__('os').mkdir('x')",
        b"{'descr': '<U9999', 'fortran_order': False, 'shape': (12,), }",
        b"(" * 200,
    )
    return data[:start] + rng.choice(lies).ljust(end - start)[: end - start] + data[end:]


def written(kind: Kind, folder: Path, name: str | None = None, content: bytes | None = None) -> Path:
    """The files of a kind in a folder, one of them with other content; the path of that one."""
    first = name or next(iter(kind.files))
    for file, data in kind.files.items():
        (folder / file).write_bytes(content if file == first and content is not None else data)
    return folder / first


def words(command: Sequence[str], file: Path, home: Path) -> list[str]:
    filled = []
    for word in command:
        word = word.replace("FILE", str(file)).replace("FOLDER", str(file.parent)).replace("HOME", str(home))
        filled.append(word)
    return filled
