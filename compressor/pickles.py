"""Checkpoints (.pt, .pth, .ckpt, .bin) read as data: a pickle machine that imports nothing and calls nothing.

A pickle is a program for a small stack machine, with two dangerous instructions: import a name, and call it. Here
an imported name becomes a `Global`, which is only its text; calling one gives a `Record` of name and arguments,
unless it stands in the table `_CALLS` of a dozen harmless ones written below (rebuild a tensor, an ordered dict, a
numpy array). So every tensor, all plain data, and the shape of whole pickled modules come out, and no code of the
file or of any library that it names is run. Tensors are views into the memory-mapped file.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from . import archive
from .errors import FileError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_STEPS = 50_000_000  # instructions of one pickle: minutes
_COPIES = 16  # bytes or items that calls may copy, per byte of the file: a real file copies each once
_MAX_KEY_DEPTH = 16  # of a tuple used as a key: hashing recurses in C
_ALIASES = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy.core": "numpy._core"}
_DTYPES = {
    name: dtype
    for name in dir(torch)
    if isinstance(dtype := getattr(torch, name), torch.dtype) and not str(dtype).startswith("torch.q")
}
_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip
_PUSH = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "FLOAT",
        "BINFLOAT",
    ]
)


class Malformed(Exception):
    """The bytes are no pickle that any writer makes."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle would have imported: `torch.nn.modules.conv.Conv2d`."""

    path: str


@dataclass(eq=False)
class Record:
    """An object that the pickle would have built: what it would have called, with what, and the state it would set."""

    path: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def attributes(self) -> dict[str, Any]:
        """The instance dictionary that the object would have had."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


@dataclass(frozen=True)
class Storage:
    """Bytes of one tensor storage; `None` while the machine only looks for what is stored."""

    dtype: torch.dtype
    data: torch.UntypedStorage | None


Storages = Callable[[str, torch.dtype, int], Storage]


def read(path: Path) -> Any:
    """Everything in a checkpoint, as dicts, lists, numbers, text, tensors, `Record`s and `Global`s.

    The file stays mapped for as long as a tensor lives. Raises FileError for a damaged or unknown file.
    """
    with path.open("rb") as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise FileError(f"{path.name} is empty.")
        file.seek(0)
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        try:
            if bytes(data[:4]) == archive.MAGIC:
                return _read_zip(file, data, path.name)
            return _read_stream(file, data, path.name)
        except (
            Malformed,
            ValueError,
            TypeError,
            IndexError,
            KeyError,
            EOFError,
            OverflowError,
            ArithmeticError,
        ) as error:
            reason = str(error) or type(error).__name__
            raise FileError(f"{path.name} is damaged or not a file that torch wrote: {reason}.") from error
        except (RecursionError, MemoryError, RuntimeError) as error:
            raise FileError(
                f"{path.name} is refused: it does not describe a model ({type(error).__name__})."
            ) from error


def _read_zip(file: BinaryIO, data: memoryview, name: str) -> Any:
    """The zip layout of torch 1.6 and later: data.pkl, and one member a storage."""
    found = archive.members(file, data, name)
    _, inner = archive.root(found, name)
    if "constants.pkl" in inner or any(key.startswith("code/") for key in inner):
        raise FileError(
            f"{name} is a TorchScript program (torch.jit), which cannot be captured. Load the model that it was made "
            f"from and save torch.export.export(model.eval(), example_inputs) with torch.export.save(..., 'model.pt2')."
        )
    if "data.pkl" not in inner:
        raise FileError(
            f"{name} is a zip archive without a torch checkpoint; it holds {', '.join(sorted(inner)[:3])}."
        )
    if bytes(inner.get("byteorder", b"little")) != sys.byteorder.encode():
        raise FileError(
            f"{name} was saved on a machine of the other byte order; save it again on one like this."
        )

    def storage(key: str, dtype: torch.dtype, elements: int) -> Storage:
        if key not in cache:
            cache[key] = _map(inner[f"data/{key}"])
        if cache[key].nbytes() < elements * dtype.itemsize:
            raise Malformed(f"the storage {key} is shorter than it says")
        return Storage(dtype, cache[key])

    cache: dict[str, torch.UntypedStorage] = {}
    return Machine(storage, len(data)).run(io.BytesIO(inner["data.pkl"]))


def _read_stream(file: BinaryIO, data: memoryview, name: str) -> Any:
    """One plain pickle, or the layout before torch 1.6: magic, version, system, object, keys, then the storages."""
    size = len(data)
    first = Machine(_no_storage, size).run(file)
    if first != _LEGACY_MAGIC:
        return first
    Machine(_no_storage, size).run(file)
    system = Machine(_no_storage, size).run(file)
    if isinstance(system, dict) and system.get("little_endian", True) is not (sys.byteorder == "little"):
        raise FileError(
            f"{name} was saved on a machine of the other byte order; save it again on one like this."
        )
    start = file.tell()
    wanted: dict[str, torch.dtype] = {}

    def note(key: str, dtype: torch.dtype, elements: int) -> Storage:
        wanted[key] = dtype
        return Storage(dtype, None)

    Machine(note, size).run(file)
    found: dict[str, torch.UntypedStorage] = {}
    keys = Machine(_no_storage, size).run(file)
    offset = file.tell()
    for key in keys:
        elements = int.from_bytes(data[offset : offset + 8], "little", signed=True)
        end = offset + 8 + elements * wanted[key].itemsize
        if elements < 0 or end > size:
            raise Malformed("it is cut short")
        found[key] = _map(data[offset + 8 : end])
        offset = end
    file.seek(start)
    return Machine(lambda key, dtype, elements: Storage(dtype, found[key]), size).run(file)


def _no_storage(key: str, dtype: torch.dtype, elements: int) -> Storage:
    raise Malformed("a tensor where none can be")


def _map(view: memoryview) -> torch.UntypedStorage:
    """A storage over the mapped bytes; copied where they are not aligned."""
    if not len(view):
        return torch.UntypedStorage(0)
    tensor = torch.frombuffer(view, dtype=torch.uint8)
    return (tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()).untyped_storage()


class Machine:
    """The pickle machine: one method an instruction, nothing imported, nothing called outside `_CALLS`."""

    def __init__(self, storages: Storages, size: int) -> None:
        self.storages = storages
        self.copies = _COPIES * (size + 4096)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Execute one pickle from `stream`, which is left just behind it; answer what it describes."""
        for step, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            if step > _MAX_STEPS:
                raise Malformed("it has too many instructions")
            name = opcode.name
            if name in _PUSH:
                self.stack.append(arg)
            elif name == "STOP":
                return self.stack.pop()
            elif name not in ("PROTO", "FRAME"):
                getattr(self, f"do_{name.lower()}", self._unknown)(arg)
        raise Malformed("it is cut short")

    def _unknown(self, arg: Any) -> None:
        raise Malformed("it uses an instruction that no checkpoint uses")

    def _popmark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def do_mark(self, arg: Any) -> None:
        self.marks.append(len(self.stack))

    def do_pop(self, arg: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def do_pop_mark(self, arg: Any) -> None:
        self._popmark()

    def do_dup(self, arg: Any) -> None:
        self.stack.append(self.stack[-1])

    def do_none(self, arg: Any) -> None:
        self.stack.append(None)

    def do_newtrue(self, arg: Any) -> None:
        self.stack.append(True)

    def do_newfalse(self, arg: Any) -> None:
        self.stack.append(False)

    def do_bytearray8(self, arg: Any) -> None:
        self.stack.append(bytes(arg))

    def do_empty_dict(self, arg: Any) -> None:
        self.stack.append({})

    def do_empty_list(self, arg: Any) -> None:
        self.stack.append([])

    def do_empty_tuple(self, arg: Any) -> None:
        self.stack.append(())

    def do_empty_set(self, arg: Any) -> None:
        self.stack.append(set())

    def do_tuple(self, arg: Any) -> None:
        self.stack.append(tuple(self._popmark()))

    def do_tuple1(self, arg: Any) -> None:
        self._tuple(1)

    def do_tuple2(self, arg: Any) -> None:
        self._tuple(2)

    def do_tuple3(self, arg: Any) -> None:
        self._tuple(3)

    def _tuple(self, size: int) -> None:
        items = tuple(self.stack[-size:])
        if len(items) != size:
            raise Malformed("its stack is empty")
        self.stack[-size:] = [items]

    def do_list(self, arg: Any) -> None:
        self.stack.append(self._popmark())

    def do_frozenset(self, arg: Any) -> None:
        self.stack.append({_key(item) for item in self._popmark()})

    def do_dict(self, arg: Any) -> None:
        target: dict[Any, Any] = {}
        self._set(target, self._popmark())
        self.stack.append(target)

    def do_append(self, arg: Any) -> None:
        item = self.stack.pop()
        self._extend(self.stack[-1], [item])

    def do_appends(self, arg: Any) -> None:
        items = self._popmark()
        self._extend(self.stack[-1], items)

    def do_additems(self, arg: Any) -> None:
        items = self._popmark()
        self._extend(self.stack[-1], items)

    def _extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Record):
            target.items.extend(items)
        elif isinstance(target, set):
            target.update(_key(item) for item in items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise Malformed(f"it appends to a {type(target).__name__}")

    def do_setitem(self, arg: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def do_setitems(self, arg: Any) -> None:
        items = self._popmark()
        self._set(self.stack[-1], items)

    def _set(self, target: Any, items: list[Any]) -> None:
        entries = target.entries if isinstance(target, Record) else target
        if not isinstance(entries, dict) or len(items) % 2:
            raise Malformed(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            entries[_key(key)] = value

    def do_put(self, arg: int) -> None:
        self.memo[arg] = self.stack[-1]

    def do_get(self, arg: int) -> None:
        self.stack.append(self.memo[arg])

    do_binput = do_long_binput = do_put
    do_binget = do_long_binget = do_get

    def do_memoize(self, arg: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_global(self, arg: str) -> None:
        module, name = arg.split(" ", 1)
        self.stack.append(_global(module, name))

    def do_stack_global(self, arg: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_global(module, name))

    def do_reduce(self, arg: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self._invoke(function, args)

    def _invoke(self, function: Any, args: Any) -> None:
        if isinstance(args, tuple):
            self.copies -= sum(len(item) for item in args if isinstance(item, (bytes, str, list, dict, set)))
        if self.copies < 0:
            raise Malformed("it copies the same data over and over")
        self.stack.append(_call(function, args))

    def do_newobj(self, arg: Any) -> None:
        self.do_reduce(arg)

    def do_newobj_ex(self, arg: Any) -> None:
        keywords, args, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(_record(kind, (*args, keywords)))

    def do_inst(self, arg: str) -> None:
        module, name = arg.split(" ", 1)
        self._invoke(_global(module, name), tuple(self._popmark()))

    def do_obj(self, arg: Any) -> None:
        kind, *args = self._popmark()
        self._invoke(kind, tuple(args))

    def do_build(self, arg: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def do_persid(self, arg: Any) -> None:
        self.stack.append(self._persistent(arg))

    def do_binpersid(self, arg: Any) -> None:
        self.stack.append(self._persistent(self.stack.pop()))

    def _persistent(self, token: Any) -> Any:
        if not isinstance(token, tuple) or not token or token[0] not in ("storage", b"storage", "module"):
            raise Malformed("it refers to something outside the file")
        if (
            token[0] == "module"
        ):  # ("module", class, source file, source text): a class remembered by torch < 1.6
            return token[1]
        kind, key, elements = token[1], token[2], token[4]
        dtype = (
            _STORAGES.get(kind.path.rpartition(".")[2].removesuffix("Storage"))
            if isinstance(kind, Global)
            else None
        )
        if dtype is None:
            return _record(kind, token[2:])
        if not isinstance(elements, int) or elements < 0 or (len(token) > 5 and token[5] is not None):
            raise Malformed("a storage in it has no size")
        return self.storages(str(key), dtype, elements)


def _global(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise Malformed("it imports something that is no name")
    for old, new in _ALIASES.items():
        if module == old or module.startswith(old + "."):
            module = new + module[len(old) :]
    return Global(f"{module}.{name}")


def _key(value: Any, depth: int = 0) -> Any:
    """`value` as a key of a dict or member of a set."""
    if isinstance(value, tuple):
        if depth > _MAX_KEY_DEPTH:
            raise Malformed("a key in it is nested too deep")
        return tuple(_key(item, depth + 1) for item in value)
    if isinstance(value, (set, dict, list)):
        raise Malformed(f"a key in it is a {type(value).__name__}")
    return value


def _record(function: Any, args: Any) -> Record:
    path = function.path if isinstance(function, (Global, Record)) else type(function).__name__
    return Record(path, tuple(args))


def _call(function: Any, args: Any) -> Any:
    """What the pickle would have called: done here for the names in `_CALLS`, only remembered for all others."""
    if not isinstance(args, tuple):
        raise Malformed("it calls something with no arguments")
    known = _CALLS.get(function.path) if isinstance(function, Global) else None
    return known(*args) if known else _record(function, args)


def _tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> Any:
    """A strided view of a storage, bounds checked; rest = (requires_grad, hooks[, flags])."""
    if not isinstance(storage, Storage):
        return Record("torch.Tensor", (storage, offset, size, stride, *rest))
    if storage.data is None:
        return None
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or any(not isinstance(number, int) or number < 0 for number in numbers):
        raise Malformed("a tensor in it has an impossible shape")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if math.prod(size) and (last + 1) * storage.dtype.itemsize > storage.data.nbytes():
        raise Malformed("a tensor in it reaches beyond its storage")
    if len(rest) > 2 and rest[2]:
        raise Malformed(f"a tensor in it is flagged {rest[2]!r}")
    tensor = torch.empty(0, dtype=storage.dtype)
    return (
        tensor.set_(storage.data, offset, tuple(size), tuple(stride))
        if math.prod(size)
        else tensor.reshape(size)
    )


def _tensor_v3(
    storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    typed = Storage(_dtype(dtype), storage.data) if isinstance(storage, Storage) else storage
    return _tensor(typed, offset, size, stride, grad, hooks, *rest)


def _dtype(value: Any) -> torch.dtype:
    name = value.path.rpartition(".")[2] if isinstance(value, Global) else ""
    if name not in _DTYPES:
        raise Malformed(f"it holds a tensor of type {value!r}")
    return _DTYPES[name]


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    return _call(function, args)


def _nested(data: bytes) -> Any:
    """A storage that was pickled without torch.save: a whole checkpoint of one storage, as bytes."""
    if not isinstance(data, bytes):
        raise Malformed("a storage in it is no bytes")
    view = memoryview(bytearray(data))
    zipped = bytes(view[:4]) == archive.MAGIC
    return (_read_zip if zipped else _read_stream)(io.BytesIO(data), view, "a tensor in the file")


def _new(kind: Any, *args: Any) -> Any:
    return _call(kind, args)


def _reconstruct(kind: Any, base: Any, state: Any) -> Record:
    return _record(kind, () if state is None else (state,))


def _mapping(items: Any = (), *rest: Any) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items if isinstance(items, (list, tuple)) else ()
    return {_key(key): value for key, value in pairs}


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise Malformed(f"it holds text in {encoding!r}")
    return text.encode(encoding)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    kind = _array_dtype(dtype)
    return (
        np.frombuffer(_bytes(data), kind, count=1)[0].item()
        if kind
        else Record("numpy.scalar", (dtype, data))
    )


def _bytes(data: Any) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _array_dtype(value: Any) -> np.dtype[Any] | None:
    """The dtype of numbers that a pickled numpy.dtype describes; None for records, text and objects."""
    text = value.args[0] if isinstance(value, Record) and value.path == "numpy.dtype" and value.args else None
    if not isinstance(text, str) or text[0] not in "biufc" or not text[1:].isdigit():
        return None
    order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else "|"
    return np.dtype(text).newbyteorder(order if order in ("<", ">") else "=")


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


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> Record:
    return Record("numpy.ndarray", (), (1, shape, dtype, order == "F", data))


_CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda data, *rest: data,
    "torch._utils._rebuild_device_tensor_from_numpy": lambda data, *rest: data,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.storage._load_from_bytes": _nested,
    "torch.Size": lambda items=(): tuple(items),
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda factory=None, items=(): _mapping(items),
    "collections.Counter": _mapping,
    "builtins.dict": _mapping,
    "builtins.list": lambda items=(): list(items),
    "builtins.tuple": lambda items=(): tuple(items),
    "builtins.set": lambda items=(): {_key(item) for item in items},
    "builtins.frozenset": lambda items=(): {_key(item) for item in items},
    "copyreg._reconstructor": _reconstruct,
    "copyreg.__newobj__": _new,
    "_codecs.encode": _encode,
    "numpy._core.multiarray._reconstruct": lambda kind, *rest: Record("numpy.ndarray"),
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _array,
}
