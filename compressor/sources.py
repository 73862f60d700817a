"""Where data come from: files, folders, arrays and iterables, each read a block at a time.

A source is either a table (columns of equal length, by name or by position, that are sliced here) or a stream
of ready batches (what the user yields: a tensor, a tuple, a dict). batches.py checks names, types and shapes.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import images, records
from .errors import DataError, UsageError

FILES = frozenset({".npz", ".npy", ".pt", ".pth", ".safetensors"})
LABELS = ("y", "label", "labels", "target", "targets")
# A header of numpy's is Python text: it may end too soon, nest too deep, or name no dtype.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, OverflowError, SyntaxError, RuntimeError,
           tokenize.TokenError, zlib.error, zipfile.BadZipFile, SafetensorError)  # fmt: skip
Key = str | int
_PACKED = (
    1 << 28
)  # bytes that a member of a .npz may unpack to at once: a few kilobytes may claim any number of them


@dataclass(frozen=True)
class Column:
    """One tensor of a table: its shape, and a reader that yields its rows in blocks from the start."""

    shape: tuple[int, ...]
    blocks: Callable[[int], Iterator[Tensor]]

    def whole(self) -> Tensor:
        return next(self.blocks(max(self.shape[0], 1) if self.shape else 1))


@dataclass(frozen=True)
class Source:
    """One table, or one stream of batches. where: what messages call it. repeatable: reads the same twice.

    empty_classes: folders beside those of classes that hold no picture.
    """

    where: str
    columns: Mapping[Any, Column] | None = None
    batches: Callable[[], Iterable[Any]] | None = None
    repeatable: bool = True
    samples: int | None = None
    pictures: bool = False
    empty_classes: tuple[str, ...] = ()


def sources(source: Any, arity: int, *, limit: int, batch_size: int) -> list[Source]:
    """One source, or one a file of a folder or list. arity: how many inputs the model takes.

    limit: no more samples than these will be read. DataError names a missing, empty, damaged or foreign file.
    """
    if isinstance(source, (str, Path)):
        return _path(Path(source), arity, limit)
    if isinstance(source, (Tensor, np.ndarray)):
        return [_table({0: source}, "the given array")]
    if isinstance(source, Mapping):
        return [_table(source, "the given arrays")]
    if isinstance(source, (list, tuple)):
        if not len(source):
            raise DataError("the given data are empty")
        if all(isinstance(item, (str, Path)) for item in source):
            return [one for item in source for one in _path(Path(item), arity, limit)]
        return [_sequence(source, arity, "the given data")]
    if isinstance(source, torch.utils.data.Dataset):
        return [_dataset(source, limit, batch_size)]
    if isinstance(source, Iterable):
        return [Source(f"the given {type(source).__name__}", batches=lambda: source, repeatable=False)]
    raise UsageError(f"calibration data cannot be read from a {type(source).__name__}")


def image_source(
    folder: Path, found: Sequence[Path], transform: Callable[[Any], Tensor], limit: int
) -> Source:
    """Pictures of a folder; with a folder a class, labels are the sorted folders' numbers.

    Of more pictures than the limit, so many are taken: of each class in turn, or spread over the names.
    """
    classes = sorted({path.parent for path in found} - {folder})
    beside = {one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")} - {*classes}
    if classes and any(path.parent == folder for path in found):
        raise DataError(
            f"{folder}: has images beside folders of images; keep one class a folder, or no folders"
        )
    if classes:
        members = [iter([path for path in found if path.parent == one]) for one in classes]
        chosen = list(islice(_in_turn(members), limit))
    else:
        count = min(limit, len(found))
        chosen = [found[i * len(found) // count] for i in range(count)]

    def batches() -> Iterator[Any]:
        for path in chosen:
            sample = transform(images.opened(path))[None]
            yield (sample, torch.tensor([classes.index(path.parent)])) if classes else (sample,)

    where = f"{folder} ({len(chosen)} of {len(found)} images" + (
        f", {len(classes)} classes)" if classes else ")"
    )
    empty = tuple(sorted(one.name for one in beside)) if classes else ()
    return Source(
        where,
        batches=batches,
        repeatable=False,
        samples=len(chosen),
        pictures=True,
        empty_classes=empty,
    )


def pictures(folder: Path) -> list[Path]:
    """The images of a folder and of its direct subfolders, sorted."""
    return sorted(
        path
        for path in (*folder.iterdir(), *folder.glob("*/*"))
        if path.suffix.lower() in images.EXTENSIONS and path.is_file()
    )


# -------------------------------------------------------------------- files


def _path(path: Path, arity: int, limit: int) -> list[Source]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in FILES)
        if not files:
            kinds = ", ".join(sorted(FILES))
            raise DataError(f"{path}: holds no images and no batch files ({kinds})")
        return [one for file in files for one in _path(file, arity, limit)]
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix not in FILES:
        raise DataError(
            f"{path}: not a kind of data known here ({', '.join(sorted(FILES))}; texts as "
            f"{', '.join(sorted(records.FILES))}; folders of images)"
        )
    with reading(path):
        if suffix == ".npz":
            return [_npz(path)]
        if suffix == ".npy":
            return [_table({0: np.load(path, mmap_mode="r", allow_pickle=False)}, str(path))]
        if suffix == ".safetensors":
            return [_safetensors(path)]
        return [_torch_file(path, arity)]


@contextmanager
def reading(where: str | Path) -> Iterator[None]:
    """Turns what a damaged file raises into a DataError that names it."""
    try:
        yield
    except _DAMAGE as error:
        raise DataError(f"{where}: damaged, or not what its name says ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _npz(path: Path) -> Source:
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        columns = {name.removesuffix(".npy"): _npz_column(path, archive, name) for name in members}
    return Source(str(path), columns=columns)


def _npz_column(path: Path, archive: zipfile.ZipFile, member: str) -> Column:
    """An array in a zip, decompressed as it is read: a .npz cannot be mapped into memory."""
    with archive.open(member) as stream:
        shape, fortran, dtype = _npy_header(stream)
    name = f"{path}: '{member.removesuffix('.npy')}'"
    if dtype.hasobject:
        raise DataError(f"{name} holds Python objects; save plain arrays")
    at_once = math.prod(shape if fortran else shape[1:]) * dtype.itemsize
    if at_once > _PACKED:
        much = f"{at_once / 1e6:,.0f} MB"
        what = (
            f"is stored by columns, so {much} would be unpacked"
            if fortran
            else f"has samples of {much}, unpacked"
        )
        raise DataError(f"{name} {what} at once, over {_PACKED >> 20} MB: save it as .npy, by rows")

    def blocks(rows: int) -> Iterator[Tensor]:
        with reading(path), zipfile.ZipFile(path) as opened, opened.open(member) as stream:
            _npy_header(stream)
            if fortran or not shape:  # columns first in the file: there is no first row before the end
                whole = np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran else "C")
                yield from _array_blocks(whole, rows)
                return
            row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
            for start in range(0, shape[0], rows):
                size = min(rows, shape[0] - start)
                data = stream.read(size * row)
                yield as_tensor(np.frombuffer(data, dtype).reshape(size, *shape[1:]))

    return Column(shape, blocks)


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _safetensors(path: Path) -> Source:
    def column(name: str, shape: tuple[int, ...]) -> Column:
        def blocks(rows: int) -> Iterator[Tensor]:
            with reading(path), safe_open(path, "pt") as file:
                if not shape:
                    yield file.get_tensor(name)
                    return
                part = file.get_slice(name)
                for start in range(0, shape[0], rows):
                    yield part[start : start + rows]

        return Column(shape, blocks)

    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return Source(str(path), columns={name: column(name, shape) for name, shape in shapes.items()})


def _torch_file(path: Path, arity: int) -> Source:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (
        Exception
    ) as error:  # torch's unpickler trips over foreign bytes in as many ways as there are bytes
        if "GLOBAL" not in str(error):
            raise DataError(f"{path}: damaged, or not what its name says ({_first_line(error)})") from error
        raise DataError(
            f"{path}: holds more than tensors, and data are never unpickled; "
            "save a tensor, or a list, tuple or dict of tensors"
        ) from error
    if isinstance(content, Tensor):
        return _table({0: content}, str(path))
    if isinstance(content, Mapping):
        return _table(content, str(path))
    if isinstance(content, (list, tuple)) and len(content):
        return _sequence(content, arity, str(path))
    raise DataError(f"{path}: holds {'nothing' if content in ([], ()) else 'a ' + type(content).__name__}")


# -------------------------------------------------------------------- Python objects


def _sequence(items: Sequence[Any], arity: int, where: str) -> Source:
    """A tuple or list of tensors is columns (inputs, perhaps the label) or batches; anything else is batches.

    As many as the inputs are columns. With one more, the last is the label, unless they come in a list for a
    model of one input and are alike in rank, dtype and all axes but the first.
    """
    if all(isinstance(item, (Tensor, np.ndarray)) for item in items):
        tensors = [as_tensor(item) for item in items]
        alike = len({(t.dim(), t.dtype, tuple(t.shape[1:])) for t in tensors}) == 1
        same_length = len({t.shape[:1] for t in tensors}) == 1
        pair = (
            len(items) == arity + 1 and same_length and (arity > 1 or not alike or isinstance(items, tuple))
        )
        if len(items) == arity or pair:
            return _table(dict(enumerate(tensors)), where)
    return Source(where, batches=lambda: items)


def _dataset(dataset: Any, limit: int, batch_size: int) -> Source:
    """Samples without a batch axis, collated; spread over the set if it holds more than the limit."""
    where = f"the given {type(dataset).__name__}"
    chosen = dataset
    if not isinstance(dataset, torch.utils.data.IterableDataset):
        count = min(len(dataset), limit)
        if not count:
            raise DataError(f"{where} is empty")
        chosen = torch.utils.data.Subset(dataset, [i * len(dataset) // count for i in range(count)])
    loader = torch.utils.data.DataLoader(chosen, batch_size=batch_size)
    return Source(where, batches=lambda: loader, repeatable=False)


def _table(arrays: Mapping[Any, Any], where: str) -> Source:
    columns: dict[Key, Column] = {}
    for key, value in arrays.items():
        array = value if isinstance(value, np.ndarray) else as_tensor(value, f"{where}: '{key}'")
        name = key if isinstance(key, int) else str(key)
        columns[name] = Column(tuple(array.shape), partial(_array_blocks, array))
    return Source(where, columns=columns)


def _array_blocks(array: np.ndarray | Tensor, rows: int) -> Iterator[Tensor]:
    if not array.shape:
        yield as_tensor(array)
        return
    for start in range(0, array.shape[0], rows):
        yield as_tensor(array[start : start + rows])


def as_tensor(value: Any, where: str = "the data") -> Tensor:
    """A tensor of an array, a number or nested lists of them; DataError on anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    kind = type(value).__name__
    try:
        array = np.asarray(value)
        kind = f"an array of {array.dtype}"
        native = array.astype(array.dtype.newbyteorder("="))  # a copy: torch cannot hold read-only memory
        return torch.from_numpy(native)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} holds {kind} and no numbers") from error


def _in_turn(iterators: Sequence[Iterator[Path]]) -> Iterator[Path]:
    """One of each, then the next of each, until all are spent."""
    left = list(iterators)
    while left:
        for one in list(left):
            item = next(one, None)
            if item is None:
                left.remove(one)
            else:
                yield item
