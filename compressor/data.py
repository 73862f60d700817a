"""Calibration and evaluation data: a stream of checked batches that can be read again, in bounded memory."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import sources, texts
from .batches import BATCH, Batch, Reader, Spool, first, rebatch
from .camera import Preprocessing
from .errors import DataError, UsageError
from .ir import Graph, Input
from .names import DTYPE_NAMES
from .ops import arguments, is_constant, is_tensor, kind
from .ops import sizes as sizes_of
from .sources import Source

__all__ = [
    "Batch",
    "Data",
    "open_data",
    "parse_input",
    "split",
    "synthetic",
    "table_sizes",
]

SPOOL_BYTES = 1 << 30  # decoded pictures up to this size are kept in a temporary file, more are decoded anew
BLOCK_BYTES = 1 << 24  # of one value of a batch at most, if there is more than one sample
IN_SAMPLE = 8  # fewer samples than this are not split
_MOVES = ("cast", "identity", "activation", "view", "flatten", "unsqueeze", "squeeze", "expand", "slice", "transpose",
          "permute")  # fmt: skip
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Data:
    """Batches that can be iterated again and again, each time the same.

    sizes: samples of each batch. description: one line for the report. facts: what was done to the data.
    fixed: the model's batch size where its batch axis is static, else None.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        sizes: Sequence[int],
        description: str,
        facts: Mapping[str, Any] | None = None,
        *,
        fixed: int | None = None,
    ) -> None:
        self._batches = batches
        self.sizes = tuple(sizes)
        self.description = description
        self.facts = dict(facts or {})
        self.fixed = fixed

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches())

    def digest(self) -> str:
        """SHA-256 of all numbers, labels apart, and of how they are batched."""
        found = hashlib.sha256()
        for batch in self:
            for one in batch.inputs:
                found.update(f"{one.dtype} {list(one.shape)}".encode())
                found.update(one.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.sizes)

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    def select(self, keep: Callable[[int], bool], what: str) -> Data:
        """The batches whose position `keep` takes; `what` is added to the description."""

        def batches() -> Iterator[Batch]:
            return (batch for i, batch in enumerate(self) if keep(i))

        sizes = [size for i, size in enumerate(self.sizes) if keep(i)]
        return self._like(batches, sizes, f"{self.description}, {what}")

    def limited(self, samples: int) -> Data:
        """The first `samples` samples; a static batch is never cut: a few less then, at least one batch."""
        if samples >= self.samples:
            return self
        if self.fixed is not None:
            count = max(1, samples // self.fixed)
            return self._like(lambda: islice(self, count), self.sizes[:count], self.description)
        sizes: list[int] = []
        for size in self.sizes:
            if samples > sum(sizes):
                sizes.append(min(size, samples - sum(sizes)))
        return self._like(lambda: first(self, samples), sizes, self.description)

    def spread(self, samples: int) -> Data:
        """About so many samples, in whole batches from all over the stream."""
        share = samples / max(self.samples, 1)
        if share >= 1:
            return self
        what = f"{share:.0%} of the batches"
        return self.select(lambda i: i == 0 or int((i + 1) * share) > int(i * share), what)

    def rebatched(self, size: int) -> Data:
        """The same samples in batches of `size` (dynamic batches only)."""

        def batches() -> Iterator[Batch]:
            return rebatch(self, size, drop=False)

        return self._like(batches, [batch.samples for batch in batches()], self.description)

    def _like(self, batches: Callable[[], Iterable[Batch]], sizes: Sequence[int], description: str) -> Data:
        return Data(batches, sizes, description, self.facts, fixed=self.fixed)


# -------------------------------------------------------------------- opening


def open_data(
    source: Any,
    inputs: Sequence[Input],
    *,
    preprocess: Preprocessing | None = None,
    text: texts.Reading | None = None,
    limit: int = 1024,
    batch_size: int = BATCH,
) -> Data:
    """Opens a file, a folder, arrays or any iterable of batches as Data for these inputs, and reads it once.

    That one pass checks every batch, so that whatever does not fit is said now: DataError names the input,
    what was expected and what was seen. What may not read the same twice (an iterator, a shuffling loader, an
    augmenting dataset) is kept in a temporary file, at most `limit` samples of it. preprocess: see
    `images.preprocessing`; needed for folders of images, and for uint8 pixels where the model takes floats. A `Camera`
    makes pixels for a model that takes pixels.
    text: how files of texts become token ids.
    """
    if limit < 1 or batch_size < 1:
        raise UsageError("the limit of samples and the batch size must be at least 1")
    reader = Reader(inputs, preprocess)
    if paths := texts.files(source):
        return _open_texts(paths, reader, text or texts.Reading(), limit)
    parts = _sources(source, reader, limit, batch_size)
    size = reader.fixed or batch_size

    taken = 0

    def batches() -> Iterator[Batch]:
        nonlocal taken
        taken = 0
        for batch in _limited(parts, reader, size, limit):
            taken += batch.samples
            yield batch

    def stream() -> Iterator[Batch]:
        return rebatch(batches(), size, drop=reader.fixed is not None)

    where = str(source) if isinstance(source, (str, Path)) else parts[0].where
    again: Callable[[], Iterable[Batch]] = stream
    if parts[0].pictures and _decoded_bytes(parts[0], batches()) > SPOOL_BYTES:
        taken = parts[0].samples or 0
        sizes = [size] * (taken // size) + [taken % size] * (reader.fixed is None and taken % size > 0)
    else:
        spool = None if all(part.repeatable for part in parts) else Spool()
        sizes = []
        for batch in stream():
            sizes.append(batch.samples)
            if spool is not None:
                spool.add(batch)
        again = stream if spool is None else spool.batches
    if not sizes:
        what = f"has {taken} samples, which do not fill the model's batch of {size}" if taken else "is empty"
        raise DataError(f"{where}: {what}; give it at least {max(size if taken else 1, IN_SAMPLE)}")
    facts = {**reader.facts, **_preprocessing(reader, parts[0]), "batch": size}
    if parts[0].empty_classes:
        facts["empty_classes"] = list(parts[0].empty_classes)
    if taken > sum(sizes):
        facts["dropped_samples"] = taken - sum(sizes)
    shown = parts[0].where if parts[0].pictures else where
    description = f"{shown}, {'first ' if taken == limit else ''}{sum(sizes):,} samples"
    return Data(again, sizes, description, facts, fixed=reader.fixed)


def batch_for(graph: Graph) -> int:
    """Samples that are best run at once: as many as keep every value in blocks that memory hands out again and again.

    Larger blocks are mapped and cleared anew each time.
    """
    values = [node for node in graph.nodes if is_tensor(node) and not is_constant(node)]
    largest = max((math.prod(sizes_of(node)) for node in values), default=1)
    return max(1, min(BATCH, BLOCK_BYTES // (4 * max(1, largest))))


def split(data: Data, *, every: int = 5, seed: int = 0) -> tuple[Data, Data]:
    """(for statistics, held out): one batch in `every` is held out, chosen by seed. They share no sample.

    Few batches are cut smaller first. Under 8 samples, or with a single static batch, both are all of the
    data, and their descriptions say in-sample.
    """
    if len(data) < every and data.fixed is None and data.samples >= IN_SAMPLE:
        data = data.rebatched(max(2, data.samples // (2 * every)))
    parts = min(every, len(data))
    if data.samples < IN_SAMPLE or parts < 2:
        both = data.select(lambda i: True, "in-sample")
        both.facts["held_out"] = "in-sample"
        return both, both
    residue = seed % parts
    facts = f"one batch in {parts}, number {residue}"
    statistics = data.select(lambda i: i % parts != residue, "without what is held out")
    held_out = data.select(lambda i: i % parts == residue, f"held out ({facts})")
    for one in (statistics, held_out):
        one.facts["held_out"] = facts
    return statistics, held_out


def synthetic(
    inputs: Sequence[Input],
    example: Sequence[Tensor],
    *,
    samples: int = 64,
    seed: int = 0,
    table_sizes: Mapping[str, int] | None = None,
) -> Data:
    """Made-up data that look like the example; every axis but the batch keeps the example's size.

    Floats are normal with the example's mean and deviation (1 where it has none), integers are drawn from the
    example's own values, or below the size of the table that they index where `table_sizes` names the input.
    Booleans, integers of zeros and ones, floats of two values, and constant floats of an input whose name has
    `mask` in it, are masks: the example's rows, repeated.
    """
    reader = Reader(inputs)
    size = reader.fixed or min(8, samples)
    sizes = [size] * max(1, -(-samples // size))
    if reader.fixed is None and samples % size:
        sizes[-1] = samples % size

    def batches() -> Iterator[Batch]:
        for number, rows in enumerate(sizes):
            draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
            made = []
            for spec, one, batched in zip(inputs, example, reader.batched, strict=True):
                shape = (rows, *one.shape[1:]) if batched else tuple(one.shape)
                made.append(_imitate(spec, one.detach(), shape, draw, (table_sizes or {}).get(spec.name)))
            yield Batch(tuple(made), None, reader.batched)

    description = f"generated to look like the example input, {sum(sizes):,} samples, seed {seed}"
    return Data(batches, sizes, description, {"generated": True}, fixed=reader.fixed)


def table_sizes(graph: Graph) -> dict[str, int]:
    """Input name -> rows of the smallest table that its own values index."""
    found: dict[str, int] = {}
    names = dict(zip(graph.placeholders, (spec.name for spec in graph.inputs), strict=True))
    for node in graph.nodes:
        if kind(node) != "embedding":
            continue
        bound = arguments(node)
        source = bound["indices"]
        while kind(source) in _MOVES:
            source = source.args[0]
        if source in names:
            rows = int(bound["weight"].meta["val"].shape[0])
            found[names[source]] = min(rows, found.get(names[source], rows))
    return found


def parse_input(text: str) -> Input:
    """`x:f32[?,3,224,224]` -> Input. The name may be left out (`x`); `?` or a name is a dynamic axis."""
    found = re.fullmatch(r"\s*(?:([^:\[\]\s]+)\s*:)?\s*(\w+)\s*\[([^\[\]]*)\]\s*", text)
    example = "write it like x:f32[?,3,224,224] or ids:i64[batch,sequence]"
    if not found:
        raise UsageError(f"--input {text}: not a name, dtype and shape; {example}")
    name, kind, axes = found[1] or "x", found[2], found[3]
    if kind not in _DTYPES:
        raise UsageError(f"--input {text}: no dtype '{kind}' ({', '.join(_DTYPES)}); {example}")
    shape: list[int | str] = []
    for i, axis in enumerate(part.strip() for part in axes.split(",") if axes.strip()):
        if axis == "?":
            shape.append("batch" if i == 0 else f"{name.rpartition('.')[2]}_{i}")
        elif axis.isdecimal() and int(axis) > 0:
            shape.append(int(axis))
        elif axis.isidentifier():
            shape.append(axis)
        else:
            raise UsageError(f"--input {text}: '{axis}' is not a size, a name or ?; {example}")
    return Input(name, _DTYPES[kind], tuple(shape))


# -------------------------------------------------------------------- helpers


def _open_texts(paths: Sequence[Path], reader: Reader, how: texts.Reading, limit: int) -> Data:
    if reader.transform is not None:
        raise UsageError(f"{paths[0]}: holds texts; --preprocess is for images")
    corpus = texts.read(paths, reader.inputs, how, limit, reader.fixed)
    source = Source(corpus.where, batches=corpus.batches)

    def batches() -> Iterator[Batch]:
        return reader.batches(source, 1)

    sizes = [batch.samples for batch in batches()]
    shown = "first " if len(corpus.tokens["input_ids"]) == limit else ""
    description = f"{corpus.where}, {shown}{sum(sizes):,} samples"
    facts = {**reader.facts, **corpus.facts, "batch": max(sizes)}
    return Data(batches, sizes, description, facts, fixed=reader.fixed)


def _sources(source: Any, reader: Reader, limit: int, batch_size: int) -> list[Source]:
    folder = Path(source) if isinstance(source, (str, Path)) else None
    found = sources.pictures(folder) if folder is not None and folder.is_dir() else []
    if folder is None or not found:
        return sources.sources(source, len(reader.inputs), limit=limit, batch_size=batch_size)
    if any(path.suffix.lower() in sources.FILES for path in folder.iterdir()):
        raise DataError(f"{folder}: holds images and batch files; keep them in folders of their own")
    if reader.transform is None:
        raise DataError(
            f"{folder}: images need --preprocess, which is never guessed: imagenet, a "
            "preprocessor_config.json or timm config.json, or module:function"
        )
    return [sources.image_source(folder, found, reader.transform.image, limit)]


def _limited(parts: Sequence[Source], reader: Reader, rows: int, limit: int) -> Iterator[Batch]:
    every = chain.from_iterable(reader.batches(part, rows) for part in parts)
    return first(every, limit)


def _decoded_bytes(source: Source, batches: Iterator[Batch]) -> int:
    """What all pictures take as tensors, from the first of them."""
    sample = next(batches).inputs
    return sum(t.numel() * t.element_size() for t in sample) * (source.samples or 1)


def _preprocessing(reader: Reader, source: Source) -> dict[str, Any]:
    if reader.transform is None:
        return {}
    sized = () if source.pictures else ("resize", "crop")  # arrays have their size
    return {"preprocess": {k: v for k, v in reader.transform.facts().items() if k not in sized}}


def _imitate(
    spec: Input, example: Tensor, shape: Sequence[int], draw: torch.Generator, table: int | None
) -> Tensor:
    """One made-up tensor of a shape that differs from the example's in axis 0 at most; see `synthetic`."""
    flat = example.reshape(-1)
    known = flat.unique() if flat.numel() else flat
    floating = example.is_floating_point()
    if floating:
        mask = len(known) == 2 or (len(known) == 1 and "mask" in spec.name.lower())
        mask = mask or not bool(torch.isfinite(known).all())  # -inf: added to attention scores
    else:
        mask = table is None and bool(((known == 0) | (known == 1)).all())
    if mask or not flat.numel():
        return example[torch.arange(shape[0]) % len(example)] if shape else example.clone()
    if floating:
        values = example.double()
        deviation = float(values.std(correction=0)) or 1.0
        noise = torch.randn(tuple(shape), generator=draw, dtype=torch.float64)
        return (noise * deviation + float(values.mean())).to(example.dtype)
    if table is not None:
        return torch.randint(0, table, tuple(shape), generator=draw).to(example.dtype)
    return flat[torch.randint(0, flat.numel(), tuple(shape), generator=draw)]
