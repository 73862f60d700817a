"""Weights that an ONNX file keeps in files beside it."""

from __future__ import annotations

from pathlib import Path

import onnx

from .errors import FileError


def beside(path: Path) -> list[Path]:
    """The files beside an ONNX file that hold some of its weights.

    FileError for a file that is no ONNX, and for weights that lie outside its folder, or not wholly in a file.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's and onnx's own
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise FileError(f"{path}: cannot be read as ONNX: {first}") from error
    folder, found = path.resolve().parent, dict[Path, None]()
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        file = (folder / said.get("location", "")).resolve()
        if not file.is_relative_to(folder):
            raise FileError(f"{path}: its tensor {tensor.name} is said to lie outside its folder")
        numbers = [said.get(key, "0") for key in ("offset", "length")]
        whole = all(number.isdecimal() for number in numbers)
        if not file.is_file() or not whole or sum(map(int, numbers)) > file.stat().st_size:
            raise FileError(f"{path}: its tensor {tensor.name} does not lie in {file.name} beside it")
        found[file] = None
    return list(found)
