"""Graph -> a file in ONNX.

What comes out speaks the model's names: inputs and outputs by their path, dynamic axes by theirs, nodes by module
path (`layer3.2.conv1/Conv`). The exporter's local paths and addresses are stripped, so the bytes depend on the graph,
the versions and the metadata alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
from torch import Tensor

from . import dialect as dialect_
from . import tidy
from .contrib import since
from .errors import TargetError
from .ir import Graph, Input, as_declared
from .lowering import prepared
from .names import module_path
from .ops import kind
from .target import release
from .translator import translate

EXTERNAL_DATA_BYTES = 1_000_000_000  # a protobuf of this size is built in memory, twice; it cannot hold 2 GiB
_INLINE_BYTES = 256  # smaller tensors stay in the model: shapes and scalars, from which shapes are inferred
_PIECE_BYTES = 1 << 24
_PAGE = 1 << 12


@dataclass(frozen=True)
class Emitted:
    """What was written: the file, its inputs (axes fixed as asked), and its size with external data in bytes.

    integer: whether it computes on integers. nodes: operator (`Conv`, `com.microsoft::QGemm`) and name of each node.
    since: the release of ONNX Runtime that the newest of its own operators came with; empty where any has them.
    """

    path: Path
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    bytes: int
    integer: bool = False
    nodes: tuple[tuple[str, str], ...] = ()
    since: str = ""


def emit(
    graph: Graph,
    path: Path,
    *,
    opset: int = 20,
    ir_version: int = 9,
    fixed: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
    optimize: bool = True,
    dialect: Collection[str] = (),
    beside: bool = False,
) -> Emitted:
    """Writes `graph` to `path`. fixed: sizes for dynamic axes by name ({"batch": 1}); the others stay dynamic.

    dialect: rules of `dialect.py`, for runtimes that know its words. beside: weights in a file of their own, mapped and
    not read, whatever their size; from 1 GB on they are anyway.
    optimize=False leaves out the exporter's own optimiser, whose bugs show only when a runtime loads the file.
    UnsupportedError where an operator has no word in ONNX, with its module and line; TargetError where what was written
    is not valid.
    """
    ready = prepared(graph, fixed or {})
    model = translate(ready, opset, optimize)
    if optimize:
        tidy.fold_sizes(model)
    tidy.keep_lost_constants(model)
    tidy.merge_slices(model)
    tidy.keep_pads_of_maxima(model)
    tidy.keep_windows_of_means(model)
    dialect_.speak(model, dialect)
    tidy.share_weights(model)
    tidy.own_zero_points(model)
    _rename(model, ready)
    model.ir_version = ir_version
    model.metadata_props.clear()
    model.metadata_props.update(metadata or {})
    model.producer_name, model.producer_version = "compressor", None
    companion = companion_of(path)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    total = 0
    if beside or size >= EXTERNAL_DATA_BYTES:
        total = _write_weights(model, companion)
    onnx_ir.save(model, path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        first = str(error).strip().split("\n")[0]
        raise TargetError(f"{path}: the exporter wrote a model that is not valid: {first}") from error
    nodes = tuple(
        (f"{n.domain}::{n.op_type}".removeprefix("::"), n.name or "") for n in model.graph.all_nodes()
    )
    size = total + path.stat().st_size
    return Emitted(path, ready.inputs, ready.outputs, size, is_integer(graph), nodes, since_of(model))


def since_of(model: onnx_ir.Model) -> str:
    """See `Emitted.since`."""
    found = set()
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            scales = node.inputs[2]
            half = scales is not None and scales.dtype == onnx_ir.DataType.FLOAT16
            found.add(since(node.attributes["bits"].as_int(), half))
    return max(found, default="", key=release)


def companion_of(path: Path) -> Path:
    """The file beside a model that holds the weights of a large one."""
    return path.with_name(f"{path.name}.data")


def is_integer(graph: Graph) -> bool:
    """True where the emitted model computes on integers, which round differently in every runtime."""
    return any(kind(n) in ("quantize", "integer_matmul") for n in graph.nodes)


# -------------------------------------------------------------------- weights


def _write_weights(model: onnx_ir.Model, path: Path) -> int:
    """Moves the weights to a file of their own, piece by piece; answers its size in bytes.

    Each begins on a page, as a runtime that maps the file wants it. Written here and not by onnx_ir, whose layout
    changes with its version, and which copies a transposed tensor element by element.
    """
    with path.open("wb") as file:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES:
                continue
            file.seek(-(-file.tell() // _PAGE) * _PAGE)
            start = file.tell()
            for piece in _pieces(tensor):
                file.write(piece)
            value.const_value = onnx_ir.ExternalTensor(
                path.name,
                start,
                tensor.nbytes,
                tensor.dtype,
                shape=onnx_ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=path.parent,
            )
        return file.tell()


def _pieces(tensor: onnx_ir.TensorProtocol) -> Iterator[bytes]:
    """A tensor's bytes in order. A weight that the exporter transposed is a view, and is put in order row by row."""
    if tensor.dtype.bitwidth < 8:  # packed: rows may end within a byte
        yield tensor.tobytes()
        return
    array = tensor.numpy()
    rows = max(1, _PIECE_BYTES * len(array) // tensor.nbytes)
    for first in range(0, len(array), rows):
        yield array[first : first + rows].tobytes()


# -------------------------------------------------------------------- names


def _rename(model: onnx_ir.Model, graph: Graph) -> None:
    symbols = _symbols(model, graph)
    _rename_values(model, graph)
    _rename_weights(model, graph)
    taken: dict[str, int] = {}
    for node in model.graph.all_nodes():
        stem = f"{_module_path(node)}/{node.op_type}".lstrip("/")
        count = taken.get(stem, 0)
        taken[stem] = count + 1
        node.name = f"{stem}_{count}" if count else stem
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            _rename_axes(value, symbols)
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        _rename_axes(value, symbols)
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "main"
    model.graph.doc_string = None


_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")


def _module_path(node: onnx_ir.Node) -> str:
    weight = node.inputs[1].name if node.op_type in _WEIGHTED and node.inputs[1] is not None else ""
    if weight and weight.endswith(
        ".weight"
    ):  # the exporter gives a convolution the path of the norm folded into it
        return weight.removesuffix(".weight")
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [s for s in re.findall(r"'([^']*)'", scopes)[:-1] if s]
    return module_path(names[-1]) if names else ""


def _symbols(model: onnx_ir.Model, graph: Graph) -> dict[str, str]:
    """Exporter's symbol -> name of the axis, read off the inputs."""
    found: dict[str, str] = {}
    for spec, value in zip(graph.inputs, model.graph.inputs, strict=True):
        for name, dim in zip(spec.shape, value.shape or (), strict=True):
            if isinstance(name, str) and isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None:
                found.setdefault(str(dim.value), name)
    return found


def _rename_axes(value: onnx_ir.Value, symbols: Mapping[str, str]) -> None:
    if value.shape is None or not symbols:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
    value.shape = onnx_ir.Shape(
        [d if isinstance(d, int) else _axis(d, pattern, symbols) for d in value.shape]
    )


def _axis(dim: Any, pattern: re.Pattern[str], symbols: Mapping[str, str]) -> str | None:
    text = getattr(dim, "value", None)
    return None if text is None else pattern.sub(lambda m: symbols[m.group(1)], str(text))


def _rename_values(model: onnx_ir.Model, graph: Graph) -> None:
    """Inputs and outputs get the graph's names; whatever had one of these names before moves aside."""
    ends: Sequence[tuple[onnx_ir.Value, str]] = [
        *zip(model.graph.inputs, (i.name for i in graph.inputs), strict=True),
        *zip(model.graph.outputs, graph.outputs, strict=True),
    ]
    names = {name for _, name in ends}
    values = {id(v) for v, _ in ends}
    for value in list(model.graph.initializers.values()):
        if value.name in names:
            _rename_initializer(model, value.name, f"{value.name}.value")
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in names and id(value) not in values:
                value.name = f"{value.name}.value"
    for i, (value, _) in enumerate(ends):
        value.name = f"__end_{i}"
    for value, name in ends:
        value.name = name


def _rename_weights(model: onnx_ir.Model, graph: Graph) -> None:
    """A tensor of the graph that the exporter transposed, and numbered, has its name again: the memory is the same."""
    names = {t.data_ptr(): name for name, t in graph.tensors.items() if t.numel()}
    for value in list(model.graph.initializers.values()):
        if value.const_value is None or not re.fullmatch(r"val_\d+", value.name or ""):
            continue
        name = names.get(value.const_value.numpy().__array_interface__["data"][0])
        if name is not None and name not in model.graph.initializers:
            _rename_initializer(model, value.name or "", name)


def _rename_initializer(model: onnx_ir.Model, old: str, new: str) -> None:
    value = model.graph.initializers.pop(old)
    value.name = new
    model.graph.initializers[new] = value


def feeds(inputs: Sequence[Input], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Numpy arrays by input name, for a runtime; floats in the precision of the input."""
    cast = {spec.name: as_declared(t, spec) for spec, t in zip(inputs, tensors, strict=True)}
    return {name: t.detach().cpu().numpy() for name, t in cast.items()}
