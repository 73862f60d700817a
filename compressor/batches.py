"""From what a source yields to batches that fit the model: matched by name, cast, checked, cut to size."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import images
from .camera import Camera, Preprocessing
from .decoding import is_cached
from .errors import DataError
from .ir import Input, batch_axis
from .names import DTYPE_NAMES
from .sources import LABELS, Column, Key, Source, as_tensor

BATCH = 32  # samples in a batch at most


@dataclass(frozen=True)
class Batch:
    """inputs: tensors in the order of the model's inputs. labels: [n, ...] or None. batched: which inputs have a row
    for each sample; all that have axes, if it is not said.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None
    batched: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "batched", self.batched or tuple(t.dim() > 0 for t in self.inputs))

    @property
    def samples(self) -> int:
        """1 where no input has a batch axis."""
        return rows_of(self.inputs, self.batched)

    def cut(self, rows: slice) -> Batch:
        inputs = (t[rows] if one else t for t, one in zip(self.inputs, self.batched, strict=True))
        return replace(self, inputs=tuple(inputs), labels=None if self.labels is None else self.labels[rows])


class Reader:
    """Reads sources as batches that fit the inputs, and notes in `facts` what it did to them.

    batched: which inputs have the batch axis as their first. The others are handed over whole.
    fixed: size of a static batch axis, else None.
    """

    def __init__(self, inputs: Sequence[Input], preprocess: Preprocessing | None = None) -> None:
        self.inputs = tuple(inputs)
        self.facts: dict[str, Any] = {}
        axis = batch_axis(self.inputs)
        self.fixed = axis if isinstance(axis, int) else None
        self.batched = tuple(bool(spec.shape) and spec.shape[0] == axis for spec in self.inputs)
        self.transform: images.Preprocess | images.Custom | Camera | None = None
        if isinstance(preprocess, Camera):
            self._pixels = [spec.name for spec in self.inputs].index(preprocess.name)
            self.transform = preprocess
        elif preprocess is not None:
            floats = (i for i, spec in enumerate(self.inputs) if spec.dtype.is_floating_point)
            self._pixels = next(floats, 0)
            height, width = (*self.inputs[self._pixels].shape[2:], "", "")[:2]
            known = (height, width) if isinstance(height, int) and isinstance(width, int) else None
            self.transform = images.preprocessing(preprocess, known)

    def batches(self, source: Source, rows: int) -> Iterator[Batch]:
        """A source's batches in its own sizes; a table in blocks of `rows`."""
        if source.columns is not None:
            yield from self._table(source.columns, source.where, rows)
            return
        for item in source.batches() if source.batches is not None else ():
            if isinstance(item, Mapping):
                fields: dict[Key, Any] = {str(key): value for key, value in item.items()}
            elif isinstance(item, (tuple, list)):
                fields = dict(enumerate(item))
            else:
                fields = {0: item}
            keys, label = self.match(fields, source.where)
            tensors = [as_tensor(fields[key], f"{source.where}: '{key}'") for key in keys]
            labels = None if label is None else as_tensor(fields[label], f"{source.where}: labels")
            yield self._batch(tensors, labels, source.where, done=source.pictures)

    def match(self, found: Iterable[Key], where: str) -> tuple[list[Key], Key | None]:
        """Which of the found arrays is each input, and which the label."""
        keys = list(found)
        names = [spec.name for spec in self.inputs]
        if all(isinstance(key, int) for key in keys):
            if len(keys) - len(names) not in (0, 1):
                raise DataError(
                    f"{where}: {len(keys)} arrays for a model with {len(names)} inputs ({', '.join(names)}); "
                    "give them in this order, with at most one label after them, or by name"
                )
            return keys[: len(names)], keys[len(names)] if len(keys) > len(names) else None
        chosen: list[Key | None] = [self._named(name, keys) for name in names]
        rest = [key for key in keys if key not in chosen]
        if chosen == [None]:
            others = [key for key in rest if key not in LABELS]
            chosen = ["x" if "x" in others else others[0] if len(others) == 1 else None]
            rest = [key for key in rest if key not in chosen]
            if chosen != [None]:
                self.facts["renamed"] = f"the array '{chosen[0]}' was taken for input '{names[0]}'"
        lost = [name for name, key in zip(names, chosen, strict=True) if key is None]
        if lost:
            raise DataError(
                f"{where}: no array for input '{lost[0]}'; it has {', '.join(map(str, keys)) or 'none'}. "
                f"Name the arrays after the inputs ({', '.join(names)}), and the label y"
            )
        label = next((key for key in LABELS if key in rest), None)
        unused = [str(key) for key in rest if key != label]
        if unused:
            self.facts["unused"] = sorted({*self.facts.get("unused", []), *unused})
        return [key for key in chosen if key is not None], label

    def _named(self, name: str, keys: Sequence[Key]) -> Key | None:
        """The key that is an input's name, or its last part where no other input ends so."""
        last = name.rpartition(".")[2]
        alone = sum(spec.name.rpartition(".")[2] == last for spec in self.inputs) == 1
        return name if name in keys else last if alone and last in keys else None

    def _table(self, columns: Mapping[Key, Column], where: str, rows: int) -> Iterator[Batch]:
        keys, label = self.match(columns, where)
        chosen = [columns[key] for key in keys]
        lengths = {
            str(key): columns[key].shape[:1]
            for key, batched in zip([*keys, label], [*self.batched, True], strict=True)
            if batched and key is not None
        }
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"'{k}' {v[0] if v else 'a single number'}" for k, v in lengths.items())
            raise DataError(f"{where}: the arrays differ in their number of samples: {shown}")
        if (0,) in lengths.values():
            raise DataError(f"{where}: is empty (0 samples)")
        readers = [
            column.blocks(rows) if batched else _forever(column.whole())
            for column, batched in zip(chosen, self.batched, strict=True)
        ]
        if not any(self.batched):  # one sample is all that a table can hold
            readers[:1] = [iter([chosen[0].whole()])] if readers else []
        labels = columns[label].blocks(rows) if label is not None else _forever(None)
        for *tensors, one in zip(*readers, labels, strict=False):
            yield self._batch(tensors, one, where)

    def _batch(
        self, tensors: Sequence[Tensor], labels: Tensor | None, where: str, done: bool = False
    ) -> Batch:
        values = list(tensors)
        if self.transform is not None and not done:
            values[self._pixels] = _preprocessed(self.transform, values[self._pixels], where)
        sizes: dict[str, tuple[int, str]] = {}
        for i, (spec, batched) in enumerate(zip(self.inputs, self.batched, strict=True)):
            value, seen = values[i], f"{where}: input '{spec.name}'"
            values[i] = self._cast(_shaped(value, spec, batched, seen), spec, seen)
            named = ("batch", *spec.shape[1:]) if batched else spec.shape
            for axis, size in zip(named, value.shape, strict=True):
                known, by = (
                    sizes.setdefault(str(axis), (size, spec.name)) if isinstance(axis, str) else (size, "")
                )
                if known != size:
                    raise DataError(f"{seen} has {axis} = {size}, but input '{by}' has {known}")
        if labels is not None:
            labels = labels.long() if not labels.is_floating_point() else labels
            count = rows_of(values, self.batched)
            if len(labels.shape) == 0 or len(labels) != count:
                raise DataError(f"{where}: {count} samples, but labels of shape {list(labels.shape)}")
        return Batch(tuple(values), labels, self.batched)

    def _cast(self, value: Tensor, spec: Input, seen: str) -> Tensor:
        """The value in the input's dtype: floats of another width, integers that fit. No more is guessed."""
        have, want = value.dtype, spec.dtype
        if have != want:
            floats = have.is_floating_point, want.is_floating_point
            if floats == (False, True):
                how = (
                    "pass --preprocess to say how pixels become floats (imagenet, a preprocessing JSON, or "
                    "module:function)"
                    if have == torch.uint8
                    else "store floats, scaled the way the model was trained: x.astype('float32')"
                )
                raise DataError(f"{seen} expects {_name(want)}, the data are {_name(have)}; {how}")
            if floats == (True, False):
                raise DataError(f"{seen} expects {_name(want)}, the data are {_name(have)}; store integers")
            cast = value.to(want)
            if floats == (False, False) and not torch.equal(cast.to(torch.int64), value.to(torch.int64)):
                low, high = int(value.min()), int(value.max())
                raise DataError(f"{seen} expects {_name(want)}, which does not hold values {low}..{high}")
            self.facts.setdefault("cast", {})[spec.name] = f"{_name(have)} to {_name(want)}"
            value = cast
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(f"{seen} holds NaN or infinite values, or some too large for {_name(want)}")
        return value


def _preprocessed(transform: images.Preprocess | images.Custom | Camera, value: Tensor, where: str) -> Tensor:
    if isinstance(transform, images.Preprocess) and value.dtype != torch.uint8:
        raise DataError(
            f"{where}: preprocessing ({transform.source}) takes pixels 0..255 as uint8, these are "
            f"{_name(value.dtype)}; if they are preprocessed already, leave --preprocess away"
        )
    try:
        return transform.pixels(value)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _shaped(value: Tensor, spec: Input, batched: bool, seen: str) -> Tensor:
    """The value, if rank and static axes fit; DataError with a hint for the two usual slips."""
    want, have = list(spec.shape), list(value.shape)
    free = [0] if batched else []
    fits = len(want) == len(have) and all(
        i in free or isinstance(w, str) or w == h for i, (w, h) in enumerate(zip(want, have, strict=True))
    )
    if fits and (0 not in have or is_cached(spec)):
        return value
    hint = ""
    if fits:
        hint = ": it is empty"
    elif len(have) == len(want) - 1:
        hint = "; the batch axis is missing: x[None] adds it"
    elif len(have) == 4 == len(want) and want[1] == have[3] != have[1]:
        hint = "; channels stand last: transpose(0, 3, 1, 2) puts them where the model wants them"
    raise DataError(f"{seen} expects [{', '.join(map(str, want))}], the data are {have}{hint}")


# -------------------------------------------------------------------- streams of batches


def rows_of(values: Sequence[Tensor], batched: Sequence[bool]) -> int:
    """Number of samples; 1 where no input has a batch axis."""
    return next((len(value) for value, one in zip(values, batched, strict=True) if one), 1)


def first(stream: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """The first samples of a stream, which is read no further."""
    left = samples
    for batch in stream:
        yield batch if batch.samples <= left else batch.cut(slice(0, left))
        left -= batch.samples
        if left <= 0:
            return


def rebatch(stream: Iterable[Batch], size: int, *, drop: bool) -> Iterator[Batch]:
    """The same samples in batches of `size`. drop: leave out what does not fill a batch.

    Only what fits together is joined: batches that differ in another axis, in an input without a batch axis,
    or in having labels, start anew.
    """
    held: list[Batch] = []
    count = 0
    for batch in stream:
        if held and not _joins(held[-1], batch):
            if not drop:
                yield _joined(held)
            held, count = [], 0
        held.append(batch)
        count += batch.samples
        if count < size:
            continue
        whole = _joined(held)
        for start in range(0, count - size + 1, size):
            yield whole if count == size else whole.cut(slice(start, start + size))
        count %= size
        held = [whole.cut(slice(-count, None))] if count else []
    if held and not drop:
        yield _joined(held)


_Stored = tuple[int, torch.dtype, torch.Size]  # a tensor, and where it begins


class Spool:
    """Batches in an unnamed temporary file, to be read again and again; it goes when this object does."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="compressor-")  # noqa: SIM115 (lives as long as this object)
        weakref.finalize(self, self._file.close)
        self._index: list[tuple[list[_Stored | None], tuple[bool, ...]]] = []

    def add(self, batch: Batch) -> None:
        """DataError where the temporary folder is full."""
        entry: list[_Stored | None] = []
        try:
            for tensor in (*batch.inputs, batch.labels):
                if tensor is None:
                    entry.append(None)
                    continue
                place = self._file.seek(0, 2)
                self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                entry.append((place, tensor.dtype, tensor.shape))
            self._file.flush()
        except OSError as error:
            folder = tempfile.gettempdir()
            raise DataError(
                f"calibration data do not fit into {folder} ({error.strerror}); point TMPDIR to a larger "
                "disk, or lower --calib-limit"
            ) from error
        self._index.append((entry, batch.batched))

    def batches(self) -> Iterator[Batch]:
        for entry, batched in self._index:
            *inputs, labels = [None if one is None else self._read(*one) for one in entry]
            yield Batch(tuple(one for one in inputs if one is not None), labels, batched)

    def _read(self, place: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        data = bytearray(shape.numel() * dtype.itemsize)
        self._file.seek(place)
        self._file.readinto(data)  # type: ignore[attr-defined]
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def _joins(a: Batch, b: Batch) -> bool:
    if (a.labels is None) != (b.labels is None) or not any(a.batched):
        return False
    return all(
        x.shape[1:] == y.shape[1:] if one else torch.equal(x, y)
        for x, y, one in zip(a.inputs, b.inputs, a.batched, strict=True)
    )


def _joined(parts: Sequence[Batch]) -> Batch:
    one = parts[0]
    if len(parts) == 1:
        return one
    columns = zip(*(part.inputs for part in parts), strict=True)
    inputs = (torch.cat(c) if rows else c[0] for c, rows in zip(columns, one.batched, strict=True))
    labels = [part.labels for part in parts if part.labels is not None]
    return Batch(tuple(inputs), torch.cat(labels) if labels else None, one.batched)


def _forever(value: Any) -> Iterator[Any]:
    while True:
        yield value


def _name(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))
