"""What an app needs beside the model: how to call it, a sample with its results, and the files of its tokenizer.

`usage.md` calls this model, by its names and shapes, from Python, Kotlin, C++ and JavaScript. `test_data_set_0/` is
ONNX's own layout: `input_0.pb`, `output_0.pb` and so on are TensorProtos, so that a test of the app can check on the
device what was checked here. Labels, the tokenizer's files and those of the preprocessor are copied as they are.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from keyword import kwlist
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import onnx.numpy_helper
import torch
from torch.fx import Node

from .camera import Camera
from .emit import Emitted
from .errors import UnsupportedError, printable
from .ir import Graph, terms
from .names import DTYPE_NAMES, size_of

SIGNATURE, USAGE, LABELS, SAMPLE = "signature.json", "usage.md", "labels.txt", "test_data_set_0"

# Files that say how texts and pictures become tensors; names of sentencepiece models end in .model.
COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "image_processor_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# words of the four languages that models take for names, and the names in the examples
_RESERVED = {
    "bool",
    "case",
    "char",
    "default",
    "delete",
    "double",
    "float",
    "function",
    "int",
    "long",
    "new",
    "object",
}
_RESERVED |= {"short", "string", "switch", "template", "this", "val", "var", *kwlist}
_RESERVED |= {"env", "input_names", "inputs", "memory", "np", "ort", "output_names", "results", "session"}
_EXAMPLE = 8  # of a dynamic axis that is not the batch, in the examples


@dataclass(frozen=True)
class Words:
    """How languages say one dtype. kotlin: its buffer, and the OnnxJavaType where that does not tell."""

    numpy: str
    javascript: tuple[str, str]
    kotlin: tuple[str, str]
    cpp: str


WORDS = {
    "f32": Words("float32", ("float32", "Float32Array"), ("FloatBuffer", ""), "float"),
    "f64": Words("float64", ("float64", "Float64Array"), ("DoubleBuffer", ""), "double"),
    "f16": Words("float16", ("float16", "Uint16Array"), ("ShortBuffer", "FLOAT16"), "Ort::Float16_t"),
    "bf16": Words("uint16", ("bfloat16", "Uint16Array"), ("ShortBuffer", "BFLOAT16"), "Ort::BFloat16_t"),
    "i64": Words("int64", ("int64", "BigInt64Array"), ("LongBuffer", ""), "int64_t"),
    "i32": Words("int32", ("int32", "Int32Array"), ("IntBuffer", ""), "int32_t"),
    "i16": Words("int16", ("int16", "Int16Array"), ("ShortBuffer", ""), "int16_t"),
    "i8": Words("int8", ("int8", "Int8Array"), ("ByteBuffer", "INT8"), "int8_t"),
    "u8": Words("uint8", ("uint8", "Uint8Array"), ("ByteBuffer", "UINT8"), "uint8_t"),
    "bool": Words("bool", ("bool", "Uint8Array"), ("ByteBuffer", "BOOL"), "bool"),
}


def dtype_name(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype))


def ends(graph: Graph, fixed: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs as who calls the model sees them. fixed: sizes of dynamic axes by name ({"batch": 1})."""
    axes = {symbol: fixed.get(name, name) for symbol, name in graph.axis_names().items()}

    def described(name: str, node: Node) -> dict[str, Any]:
        value = node.meta["val"]
        return {
            "name": name,
            "dtype": dtype_name(value.dtype),
            "shape": [size_of(s, axes) for s in value.shape],
        }

    inputs = zip((spec.name for spec in graph.inputs), graph.placeholders, strict=True)
    outputs = zip(graph.outputs, graph.results, strict=True)
    return {"inputs": [described(*one) for one in inputs], "outputs": [described(*one) for one in outputs]}


def signature(
    graph: Graph, emitted: Emitted, labels: Sequence[str], preprocess: Any, how: Any
) -> dict[str, Any]:
    """What a program that calls the model must know: signature.json.

    preprocess: what happens to pictures, as the report says it. how: the camera whose pixels the model takes, or any
    other preprocessing.
    """
    camera = how if isinstance(how, Camera) else None
    images = {
        spec.name: {"layout": "NCHW"}
        for spec in emitted.inputs
        if len(spec.shape) == 4 and spec.shape[1] in (1, 3, 4)
    }
    if camera is not None:
        images[camera.name] = camera.signature()
    fixed = {
        name: size
        for spec, old in zip(emitted.inputs, graph.inputs, strict=True)
        for name, size in zip(old.shape, spec.shape, strict=True)
        if isinstance(name, str) and isinstance(size, int)
    }
    described = ends(graph, fixed)
    for one in described["inputs"]:
        one |= images.get(one["name"], {})
    return {
        "model": emitted.path.name,
        **described,
        "preprocess": preprocess if camera is None else camera.facts(),
        "labels": list(labels),
    }


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("compressor", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template("usage.md.j2")


def usage(
    signature: Mapping[str, Any],
    *,
    integer: bool = False,
    exact: str = "",
    ort_file: bool = False,
    data_file: str = "",
) -> str:
    """usage.md for a model with this signature (`signature.json`). integer: it computes on integers. exact: the
    session's option without which some processors compute others.

    ort_file: model.ort stands beside it. data_file: the name of the file that holds a large model's weights.
    """
    taken: set[str] = set()
    inputs = [_described(one, taken) for one in signature["inputs"]]
    outputs = [_described(one, taken) for one in signature["outputs"]]
    named = (size for one in inputs for size in one["shape"] if isinstance(size, str))
    axes = list(dict.fromkeys(size for size in named if len(terms(size)) == 1))
    return _template().render(
        signature,
        inputs=inputs,
        outputs=outputs,
        axes=axes,
        integer=integer,
        exact=exact,
        ort_file=ort_file,
        data_file=data_file,
        sample=SAMPLE,
        files={"labels": LABELS if signature.get("labels") else "", "tokenizer": signature.get("files", ())},
    )


def _described(one: Mapping[str, Any], taken: set[str]) -> dict[str, Any]:
    """An input or output, with a name that is one in every language, its own in quotes, and sizes that it may have."""
    stem = re.sub(r"\W+", "_", one["name"]).strip("_") or "value"
    stem = f"t{stem}" if stem[0].isdigit() or stem in _RESERVED else stem
    variable, count = stem, 1
    while variable in taken:
        variable, count = f"{stem}_{count}", count + 1
    taken.add(variable)
    sizes = [
        s if isinstance(s, int) else 1 if i == 0 else _EXAMPLE * len(terms(s))
        for i, s in enumerate(one["shape"])
    ]
    return {
        **one,
        "variable": variable,
        "quoted": json.dumps(one["name"], ensure_ascii=not one["name"].isprintable()),
        "shown": re.sub(r"[\s`|]", " ", printable(one["name"])),
        "sizes": sizes,
        "count": int(np.prod(sizes, dtype=np.int64)),
        "words": _words(one),
    }


def _words(one: Mapping[str, Any]) -> Words:
    if one["dtype"] not in WORDS:
        raise UnsupportedError(
            f"{one['name']} is {one['dtype']}, which apps cannot pass on: cast it in the model"
        )
    return WORDS[one["dtype"]]


def write_sample(folder: Path, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
    """`test_data_set_0/` in a folder."""
    place = folder / SAMPLE
    place.mkdir()
    for kind, values in (("input", inputs), ("output", outputs)):
        for i, (name, array) in enumerate(values.items()):
            proto = onnx.numpy_helper.from_array(np.require(array, requirements="C"), name)
            (place / f"{kind}_{i}.pb").write_bytes(proto.SerializeToString())


def copy_files(folder: Path, sources: Iterable[Path | None], labels: Sequence[str]) -> list[str]:
    """Copies what stands in the source folders beside the model; the names of the copies."""
    made = []
    for name in COPIED:
        found = next((s / name for s in sources if s is not None and (s / name).is_file()), None)
        if found is not None:
            shutil.copyfile(found, folder / name)
            made.append(name)
    if labels:
        (folder / LABELS).write_text(
            "".join(f"{' '.join(label.split())}\n" for label in labels), encoding="utf-8"
        )
    return made


def copied_to(folder: Path) -> set[str]:
    """What `copy_files` put into a folder, as the signature there says; another's files of these names are not ours."""
    try:
        found = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
        names = set(COPIED).intersection(found["files"])
        return names | ({LABELS} if found["labels"] else set())
    except (OSError, ValueError, LookupError, TypeError):
        return set()
