"""Checkpoints (.pt, .pth, .ckpt, .bin, .tar) read as data, in every layout that torch has written.

The pickle inside goes through the machine of unpickle.py, which runs nothing. Here is what torch keeps beside the
pickle, the storages of the tensors, and the few functions that put tensors, numpy arrays and plain containers
together. Tensors are views into the memory-mapped file: reading costs no memory until they are used.
"""

from __future__ import annotations

import io
import math
import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from . import archive
from .errors import FileError
from .unpickle import Global, Machine, Malformed, Record, Stream, as_key

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ALIGNMENT = 16
# what reading a file of any other shape than the expected raises
BROKEN = (Malformed, ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError)
TOO_MUCH = (RecursionError, MemoryError, RuntimeError)
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(item): item for item in vars(torch).values() if isinstance(item, torch.dtype)}


@dataclass(frozen=True)
class Storage:
    """Bytes of one tensor storage; None while the machine only looks for what is stored."""

    dtype: torch.dtype
    data: torch.UntypedStorage | None


Find = Callable[[str, torch.dtype, int], Storage]  # key, type, number of elements -> storage


def read(path: Path) -> Any:
    """Everything in a checkpoint, as dicts, lists, numbers, text, tensors, `Record`s and `Global`s.

    The file stays mapped for as long as a tensor lives. Raises FileError for a damaged or unknown file.
    """
    with path.open("rb") as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise FileError(f"{path.name} is empty.")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = memoryview(mapped)
        try:
            if bytes(data[:4]) == archive.MAGIC:
                return _read_zip(file, data, path.name)
            return _read_stream(mapped, data, path.name)
        except BROKEN as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise FileError(f"{path.name} is damaged, or no file that torch wrote: {why}.") from error
        except TOO_MUCH as error:
            why = type(error).__name__
            raise FileError(f"{path.name} is refused: it describes no model ({why}).") from error


def _read_zip(file: BinaryIO, data: memoryview, name: str) -> Any:
    """The layout of torch 1.6 and later: a zip archive of data.pkl and one member a storage."""
    if any(key.endswith("/constants.pkl") for key in archive.names(file, name)):
        raise torchscript(name)
    inner = archive.below_root(archive.members(file, data, name), name)
    if "data.pkl" not in inner:
        shown = ", ".join(sorted(inner)[:3])
        raise FileError(f"{name} is a zip archive without a torch checkpoint; it holds {shown}.")
    _check_order(bytes(inner.get("byteorder", b"little")) == b"little", name)
    cache: dict[str, torch.UntypedStorage] = {}

    def find(key: str, dtype: torch.dtype, elements: int) -> Storage:
        if key not in cache:
            cache[key] = _map(inner[f"data/{key}"])
        if cache[key].nbytes() < elements * dtype.itemsize:
            raise Malformed(f"the storage {key} is shorter than it says")
        return Storage(dtype, cache[key])

    return _machine(find, len(data)).run(io.BytesIO(inner["data.pkl"]))


def torchscript(name: str) -> FileError:
    """What to tell whoever gives a TorchScript file."""
    return FileError(
        f"{name} is a TorchScript program (torch.jit), which cannot be captured. Save the model that it was "
        f"made from: torch.export.save(torch.export.export(model.eval(), example_inputs), 'model.pt2')."
    )


def _read_stream(stream: Stream, data: memoryview, name: str) -> Any:
    """One plain pickle, or torch < 1.6: pickles of magic, version, system, object and keys, then the storages."""
    size = len(data)
    first = _machine(_find_none, size).run(stream)
    if first != _LEGACY_MAGIC:
        return first
    _machine(_find_none, size).run(stream)
    system = _machine(_find_none, size).run(stream)
    _check_order(not isinstance(system, dict) or system.get("little_endian", True) is True, name)
    start = stream.tell()
    wanted: dict[str, torch.dtype] = {}

    def note(key: str, dtype: torch.dtype, elements: int) -> Storage:
        wanted[key] = dtype
        return Storage(dtype, None)

    _machine(note, size).run(stream)
    keys = _machine(_find_none, size).run(stream)
    found: dict[str, torch.UntypedStorage] = {}
    offset = stream.tell()
    for key in keys:
        elements = int.from_bytes(data[offset : offset + 8], "little", signed=True)
        end = offset + 8 + elements * wanted[key].itemsize
        if elements < 0 or end > size:
            raise Malformed("it is cut short")
        found[key] = _map(data[offset + 8 : end])
        offset = end
    stream.seek(start)
    return _machine(lambda key, dtype, elements: Storage(dtype, found[key]), size).run(stream)


def _check_order(little: bool, name: str) -> None:
    if little != (sys.byteorder == "little"):
        raise FileError(
            f"{name} was saved on a machine of the other byte order; save it again on one like this."
        )


def _machine(find: Find, size: int) -> Machine:
    def persistent(token: Any) -> Any:
        if not isinstance(token, tuple) or len(token) < 2 or token[0] not in ("storage", "module"):
            raise Malformed("it refers to something outside the file")
        if token[0] == "module":  # (.., class, source file, source): how torch < 1.6 remembered a class
            return token[1]
        kind, key, _, elements, *view = token[1:]
        dtype = _STORAGES.get(kind.path.rpartition(".")[2]) if isinstance(kind, Global) else None
        if dtype is None:
            return Record(str(kind), token[2:])
        if not isinstance(elements, int) or elements < 0 or any(view):
            raise Malformed("a storage in it has no size")
        return find(str(key), dtype, elements)

    return Machine(_CALLS, persistent, size)


def _find_none(key: str, dtype: torch.dtype, elements: int) -> Storage:
    raise Malformed("it has a tensor where none can be")


def _map(view: memoryview) -> torch.UntypedStorage:
    """A storage over the mapped bytes; copied where they are not aligned."""
    if not len(view):
        return torch.UntypedStorage(0)
    tensor = torch.frombuffer(view, dtype=torch.uint8)
    return (tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()).untyped_storage()


def to_tensor(value: Any) -> Tensor | None:
    """`value` as a tensor if it is one, or a pickled numpy array of numbers (copied); else None."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, Record) or value.path != "numpy.ndarray" or not isinstance(value.state, tuple):
        return None
    shape, dtype, fortran, data = value.state[-4:]
    kind = _array_dtype(dtype)
    if kind is None or not isinstance(data, (bytes, str)):
        return None
    array = np.frombuffer(_bytes(data), kind).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C", copy=True))


# ---- what the machine does in place of the functions that torch, numpy and Python name in pickles ----


def _tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> Any:
    """A strided view of a storage, bounds checked; rest = (requires_grad, hooks[, flags])."""
    if not isinstance(storage, Storage):
        return Record("torch.Tensor", (storage, offset, size, stride, *rest))
    if storage.data is None:
        return None
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(not isinstance(number, int) or number < 0 for number in numbers):
        raise Malformed("a tensor in it has an impossible shape")
    if any(rest[2:]):  # conjugated or negated views
        raise Malformed("a tensor in it is a conjugated or negated view")
    empty = torch.empty(0, dtype=storage.dtype)
    if not math.prod(size):
        return empty.reshape(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if (last + 1) * storage.dtype.itemsize > storage.data.nbytes():
        raise Malformed("a tensor in it reaches beyond its storage")
    return empty.set_(storage.data, offset, tuple(size), tuple(stride))  # type: ignore[call-overload]


def _tensor_of_dtype(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """As `_tensor`, for types that have no storage class; rest = (requires_grad, hooks, dtype[, flags])."""
    dtype = _DTYPES.get(rest[2].path) if isinstance(rest[2], Global) else None
    if dtype is None:
        raise Malformed("a tensor in it has an unknown type")
    typed = Storage(dtype, storage.data) if isinstance(storage, Storage) else storage
    return _tensor(typed, offset, size, stride, *rest[:2], *rest[3:])


def _stored_apart(data: bytes) -> Any:
    """A storage that was pickled without torch.save: a whole checkpoint of one storage, as bytes."""
    view, name = memoryview(bytearray(data)), "a tensor in the file"
    if data.startswith(archive.MAGIC):
        return _read_zip(io.BytesIO(data), view, name)
    return _read_stream(io.BytesIO(data), view, name)


def _mapping(items: Any = (), *rest: Any) -> dict[Any, Any]:
    items = _inside(items)
    return {as_key(key): value for key, value in (items.items() if isinstance(items, dict) else items)}


def _encode(text: Any = b"", encoding: str = "latin1") -> bytes:
    """The bytes that protocol 2 spells as text."""
    if isinstance(text, bytes):
        return text
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise Malformed(f"it holds text in {encoding!r}")
    return text.encode(encoding)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    kind = _array_dtype(dtype)
    return (
        Record("numpy.scalar", (dtype, data)) if kind is None else np.frombuffer(_bytes(data), kind)[0].item()
    )


def _bytes(data: bytes | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _array_dtype(value: Any) -> np.dtype[Any] | None:
    """The number type that a pickled numpy.dtype describes; None for records, text and objects."""
    text = value.args[0] if isinstance(value, Record) and value.path == "numpy.dtype" and value.args else None
    if not isinstance(text, str) or text[:1] not in tuple("biufc") or not text[1:].isdigit():
        return None
    big = isinstance(value.state, tuple) and len(value.state) > 1 and value.state[1] == ">"
    return np.dtype(text).newbyteorder(">" if big else "<")


def _set(items: Any = ()) -> set[Any]:
    return {as_key(item) for item in _inside(items)}


def _inside(value: Any) -> Any:
    """What there is to iterate over, in place of an object that is only remembered."""
    return (value.entries or value.items) if isinstance(value, Record) else value


def _first(data: Any, *rest: Any) -> Any:
    return data


_CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch.storage._load_from_bytes": _stored_apart,
    "torch.Size": lambda items=(): tuple(_inside(items)),
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda factory=None, items=(): _mapping(items),
    "collections.Counter": _mapping,
    "builtins.dict": _mapping,
    "builtins.list": lambda items=(): list(_inside(items)),
    "builtins.tuple": lambda items=(): tuple(_inside(items)),
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "copyreg._reconstructor": lambda kind, base, state: Record(kind.path, () if state is None else (state,)),
    "_codecs.encode": _encode,
    "builtins.bytes": _encode,
    "builtins.bytearray": _encode,
    "numpy._core.multiarray._reconstruct": lambda *args: Record("numpy.ndarray"),
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": lambda data, dtype, shape, order="C": Record(
        "numpy.ndarray", (), (1, shape, dtype, order == "F", data)
    ),
}
