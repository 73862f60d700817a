"""Texts as data: tokenised by the model's own tokenizer, in batches of nearly one length, so that little is padding.

Token ids are kept in memory, texts are not: every pass over the data makes the same batches from them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import sources
from .architecture import explain
from .decoding import empty, is_cached
from .errors import DataError, FileError, UsageError
from .ir import Input
from .records import FILES, Record, records

ROWS = 8  # texts of a batch: enough for speed, few enough to be of one length
LONGEST = 2048  # tokens of a text, for models that take more
_TOKENS = 4096  # of a batch
_SPREAD = 1.25  # the longest text of a batch, relative to its shortest
_CLASSES = 2**31  # no model has more
_UNKNOWN = 10**6  # lengths beyond this mean that a tokenizer knows no limit
_NAMES = ("text", "sentence")  # of fields that are taken unasked
_CHUNK = 256  # texts tokenised at once
_MASK, _TYPES, _POSITIONS = "attention_mask", "token_type_ids", "position_ids"
_MADE = (_MASK, _POSITIONS)  # from the lengths, and not by the tokenizer


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    tokenizer: the folder of its files. text: the field of the texts, `name`, or `name,name` for pairs; None to take
    the only one. label: the field of labels, None to leave them out; classes: names that labels may have. longest:
    tokens that the model takes for sure, where the tokenizer does not say, or says too much. tables: rows of the table
    that an input indexes. sizes: of dynamic axes that the emitted model fixes.
    """

    tokenizer: Path | None = None
    text: str | None = None
    label: str | None = None
    classes: Sequence[str] = ()
    longest: int | None = None
    tables: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Tokenised texts. tokens: input -> the ids of every text. groups: the texts of each batch.

    pads: input -> what stands in for a token; at the left, or at the right. facts: what was done, for the report.
    """

    where: str
    inputs: Sequence[Input]
    tokens: Mapping[str, Sequence[np.ndarray]]
    labels: Sequence[int]
    groups: Sequence[Sequence[int]]
    pads: Mapping[str, int]
    left: bool
    facts: dict[str, Any]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Tensors by the names of the inputs, and labels as `y`; padded to the longest text of the batch."""
        for group in self.groups:
            width = max(len(self.tokens["input_ids"][i]) for i in group)
            made = {spec.name: self._table(spec, group, width) for spec in self.inputs}
            yield made | ({"y": torch.tensor([self.labels[i] for i in group])} if self.labels else {})

    def _table(self, spec: Input, group: Sequence[int], width: int) -> Tensor:
        if is_cached(spec):
            return empty(spec, len(group))
        name, size = _last(spec), spec.shape[1] if isinstance(spec.shape[1], int) else width
        table = np.full((len(group), size), self.pads.get(name, 0), np.int64)
        for row, i in zip(table, group, strict=True):
            ids = self.tokens["input_ids"][i]
            if name in _MADE:
                ids = np.ones_like(ids) if name == _MASK else np.arange(len(ids))
            elif name != "input_ids":
                ids = self.tokens[name][i]
            start = size - len(ids) if self.left else 0
            row[start : start + len(ids)] = ids
        return torch.from_numpy(table).to(spec.dtype)


def files(source: Any) -> list[Path]:
    """The text files of a path, of a list of paths, or of a folder that holds nothing else that is read; else none."""
    items = source if isinstance(source, (list, tuple)) else [source]
    if not items or not all(isinstance(item, (str, Path)) for item in items):
        return []
    paths = [Path(item) for item in items]
    if len(paths) > 1 or not paths[0].is_dir():
        return paths if all(path.suffix.lower() in FILES for path in paths) else []
    folder, members = paths[0], sorted(paths[0].iterdir())
    if any(path.suffix.lower() in sources.FILES for path in members) or sources.pictures(folder):
        return []
    found = [path for path in members if path.suffix.lower() in FILES]
    kinds = sorted({path.suffix.lower() for path in found})
    if len(kinds) > 1:
        raise DataError(f"{folder}: holds {' and '.join(kinds)} files; name those that are meant")
    return found


def read(
    paths: Sequence[Path], inputs: Sequence[Input], how: Reading, limit: int, fixed: int | None
) -> Corpus:
    """Texts of the files, the first `limit`, in batches of ROWS at most, or of exactly `fixed`.

    DataError names the line that does not fit, or the input that no tokenizer makes; FileError a tokenizer that cannot
    be read.
    """
    where = str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    if how.tokenizer is None:
        raise DataError(
            f"{where}: is text, and the model came without a tokenizer; put its files (tokenizer.json, "
            "tokenizer_config.json) into the model's folder, or give token ids as .npz"
        )
    tokenizer = _tokenizer(how.tokenizer)
    inputs = [
        replace(spec, shape=(*spec.shape[:1], *(how.sizes.get(str(s), s) for s in spec.shape[1:])))
        for spec in inputs
    ]
    facts: dict[str, Any] = {"tokenizer": str(how.tokenizer)}
    texts = [spec for spec in inputs if not is_cached(spec)]
    longest = _longest(tokenizer, texts, how, how.tokenizer)
    tokens: dict[str, list[np.ndarray]] = {
        name: [] for name in ("input_ids", *map(_last, texts)) if name not in _MADE
    }
    labels: list[int] = []
    stream = islice(_texts(paths, how, facts), limit)
    while chunk := list(islice(stream, _CHUNK)):
        made, kept = _encoded(tokenizer, [words for words, _ in chunk], list(tokens), longest)
        for name, rows in made.items():
            tokens[name] += [rows[i] for i in kept]
        labels += [label for label in (chunk[i][1] for i in kept) if label is not None]
    _check(tokens, texts, how, where, _MADE if len(texts) < len(inputs) else (_MASK,))
    lengths = [len(ids) for ids in tokens["input_ids"]]
    groups = _groups(lengths, inputs, fixed, how.seed)
    if not groups:
        few = f"only {len(lengths)}, and the model takes {fixed} at a time" if lengths else "none"
        raise DataError(f"{where}: of texts it has {few}; give it some hundreds")
    left = tokenizer.padding_side == "left"
    pads = {"input_ids": tokenizer.pad_token_id or 0, _TYPES: tokenizer.pad_token_type_id}
    corpus = Corpus(where, inputs, tokens, labels, groups, pads, left, facts)
    facts |= _facts(corpus, lengths, longest)
    if "," in facts.get("text_field", "") and _TYPES in tokenizer.model_input_names and _TYPES not in tokens:
        facts["segments"] = (
            f"the model takes no {_TYPES}, by which its tokenizer tells the texts of a pair apart"
        )
    return corpus


# -------------------------------------------------------------------- the tokenizer


def _tokenizer(folder: Path) -> Any:
    """The folder's own tokenizer, from disk. Code of the folder is not run, nor quietly done without."""
    if "AutoTokenizer" in (_settings(folder, "tokenizer_config.json").get("auto_map") or ()):
        raise FileError(
            f"{folder}: its tokenizer is code of its own, which is not run; tokenise the texts yourself and give the "
            "token ids as .npz"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(f"texts need transformers: pip install 'compressor[hf]' ({error})") from error
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its files make the library raise
        raise FileError(f"{folder}: its tokenizer cannot be read: {explain(error)}") from error


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """A table of settings, empty where there is none."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _longest(tokenizer: Any, inputs: Sequence[Input], how: Reading, folder: Path) -> int:
    """Tokens of the longest text: what the model takes, as far as that is known, but no more than LONGEST.

    A tokenizer may promise more than the model's table of positions has. sentence-transformers has a limit of its own,
    before which it cuts.
    """
    fixed = [spec.shape[1] for spec in inputs if len(spec.shape) == 2]
    told = tokenizer.model_max_length
    if told >= (_UNKNOWN if how.longest is None else how.longest + 2):  # by one the tokenizer knows better
        told = how.longest
    sentence = _settings(folder, "sentence_bert_config.json").get("max_seq_length")
    return min(limit for limit in [*fixed, told, sentence, LONGEST] if isinstance(limit, int))


def _encoded(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], names: Sequence[str], longest: int
) -> tuple[dict[str, list[np.ndarray]], list[int]]:
    """Input -> ids of every text, for those inputs that the tokenizer makes; and which texts have a token at all."""
    made = tokenizer(
        *(list(column) for column in zip(*texts, strict=True)),
        truncation=True,
        max_length=longest,
        return_attention_mask=False,
        return_token_type_ids=_TYPES in names,
    )
    found = {name: [np.asarray(ids, np.int32) for ids in made[name]] for name in names if name in made}
    return found, [i for i, ids in enumerate(found["input_ids"]) if len(ids)]


def _check(
    tokens: Mapping[str, Sequence[np.ndarray]],
    inputs: Sequence[Input],
    how: Reading,
    where: str,
    made: Sequence[str],
) -> None:
    """Every input is one that texts have, or that is made from their lengths; ids are rows of the model's table."""
    for spec in inputs:
        name = _last(spec)
        if len(spec.shape) != 2 or not (tokens.get(name) or name in made or not tokens["input_ids"]):
            raise DataError(
                f"{where}: no tokenizer makes the input {spec}; give its data as .npz (arrays named like the inputs)"
            )
        rows = how.tables.get(spec.name)
        most = max((int(ids.max()) for ids in tokens.get(name, ())), default=0)
        if rows is not None and most >= rows:
            raise DataError(
                f"{where}: the tokenizer in {how.tokenizer} makes token {most} for input '{spec.name}', and the model "
                f"has {rows}; they do not belong together"
            )


# -------------------------------------------------------------------- fields of a record


def _texts(
    paths: Sequence[Path], how: Reading, facts: dict[str, Any]
) -> Iterator[tuple[tuple[str, ...], int | None]]:
    """Texts, or pairs of them, and labels; those that are empty are left out and counted."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file or folder")
        fields: Sequence[str] = ()
        with sources.reading(path):
            for where, record in records(path):
                fields = fields or _fields(path, record, how, facts)
                texts = tuple(_text(record, name, where) for name in fields)
                if all(texts):
                    yield texts, None if how.label is None else _label(record, how.label, how.classes, where)
                else:
                    facts["empty_texts"] = facts.get("empty_texts", 0) + 1


def _fields(path: Path, record: Record, how: Reading, facts: dict[str, Any]) -> Sequence[str]:
    """The field of the text, or the two of a pair. Unasked: one named text or sentence, or the only one of words."""
    if how.text is not None:
        names = [how.text] if how.text in record else [name.strip() for name in how.text.split(",")]
        if len(names) > 2:
            raise UsageError(f"--text-field {how.text}: names one field, or two for pairs of texts")
        facts["text_field"] = ",".join(names)
        return names
    words = [name for name, value in record.items() if isinstance(value, str) and not _is_number(value)]
    words = [name for name in words if name not in (how.label, *sources.LABELS)]
    named = [name for name in words if name in _NAMES] or words
    if len(named) != 1:
        raise DataError(
            f"{path}: which field holds the texts? It has {', '.join(record)}; name it: --text-field NAME, or "
            "NAME,NAME for pairs of texts"
        )
    facts["text_field"] = named[0]
    if len(record) > 1:
        facts["guessed"] = f"the field '{named[0]}' of {path.name} was taken for the text (--text-field)"
    return named


def _text(record: Record, name: str, where: str) -> str:
    if name not in record:
        raise DataError(f"{where}: there is no field '{name}'; it has {', '.join(record) or 'none'}")
    value = record[name]
    if not isinstance(value, str | None):
        raise DataError(f"{where}: the field '{name}' holds a {type(value).__name__}, not a text")
    return (value or "").strip()


def _label(record: Record, name: str, classes: Sequence[str], where: str) -> int:
    """A class by its number, or by its name where the model knows names."""
    if name not in record:
        fields = ", ".join(record)
        raise DataError(f"{where}: there is no label '{name}'; it has {fields}. Name it with --label-field")
    value = record[name]
    if value in classes:
        return classes.index(value)
    number = float(str(value)) if _is_number(str(value)) else -1.0
    if not number.is_integer() or not 0 <= number < _CLASSES:
        known = f", and no class of the model ({', '.join(classes)})" if classes else ""
        raise DataError(
            f"{where}: the label '{name}' is {str(value)[:40]!r}, no whole number from 0 on{known}"
        )
    return int(number)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _last(spec: Input) -> str:
    return spec.name.rpartition(".")[2]


# -------------------------------------------------------------------- batches


def _groups(lengths: Sequence[int], inputs: Sequence[Input], fixed: int | None, seed: int) -> list[list[int]]:
    """The texts of each batch: of nearly one length, of exactly one where the model takes no mask.

    Which texts meet in a batch, and in what order batches come, is drawn: neither the order of the file nor the
    lengths tell what is held out.
    """
    draw = random.Random(seed)
    order = list(range(len(lengths)))
    draw.shuffle(order)
    even = all(isinstance(spec.shape[1], int) for spec in inputs)  # all are padded or cut to one length
    # a mask over cached tokens, too, does not tell which of the new ones are padding
    masked = any(_last(spec) == _MASK for spec in inputs) and not any(map(is_cached, inputs))
    if fixed is not None and (even or masked):
        order = order[: len(order) - len(order) % fixed]  # not the longest, which come last below
    if not even:
        order.sort(key=lambda i: lengths[i])
    groups: list[list[int]] = []
    for i in order:
        group = groups[-1] if groups else []
        least = lengths[group[0]] if group else 0
        alike = lengths[i] <= _SPREAD * least and (len(group) + 1) * lengths[i] <= _TOKENS
        fits = even or (alike or fixed is not None if masked else lengths[i] == least)
        if group and fits and len(group) < (fixed or ROWS):
            group.append(i)
        else:
            groups.append([i])
    groups = [group for group in groups if fixed in (None, len(group))]
    draw.shuffle(groups)
    return groups


def _facts(corpus: Corpus, lengths: Sequence[int], longest: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"tokens": f"{min(lengths)} to {max(lengths)} a text"}
    cut = sum(length >= longest for length in lengths)
    if cut:
        facts["cut"] = f"{cut} of {len(lengths)} texts have {longest} tokens or more, where they are cut"
    texts = [spec for spec in corpus.inputs if not is_cached(spec)]
    sizes = {spec.shape[1] for spec in texts if isinstance(spec.shape[1], int)}
    if sizes:
        facts["sequence"] = (
            f"texts are padded or cut to {max(sizes)} tokens, which is all that the model takes"
        )
        if not any(_last(spec) == _MASK for spec in corpus.inputs):
            facts["unmasked"] = "the model takes no attention_mask: padding counts like any other token"
    width = sum(
        (max(sizes) if sizes else max(lengths[i] for i in group)) * len(group) for group in corpus.groups
    )
    real = sum(lengths[i] for group in corpus.groups for i in group)
    facts["padding"] = f"{1 - real / width:.1%} of positions"
    left = len(lengths) - sum(map(len, corpus.groups))
    return facts | ({"dropped_samples": left} if left else {})
