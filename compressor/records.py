"""Records of text files, one at a time: the lines of a .txt, the objects of a .jsonl, the rows of a table.

Whatever a file is wrong about is a DataError that names the file and the line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from .errors import DataError

FILES = frozenset({".txt", ".jsonl", ".csv", ".tsv", ".parquet"})
Record = Mapping[str, Any]

_LONGEST = 1 << 24  # bytes of one line
_ROWS = 64  # of a parquet file, read at once
_SAFE = 15  # major version of pyarrow: those before 14.0.1 run code that a file holds (CVE-2023-47248)


def records(path: Path) -> Iterator[tuple[str, Record]]:
    """(where it stands, its fields) of every record; the field of a .txt is `text`. Blank lines are none."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path)
    elif suffix in (".csv", ".tsv"):
        yield from _table(path, tabs=suffix == ".tsv")
    else:
        for number, line in _lines(path):
            where = f"{path}, line {number}"
            if line.strip():
                yield where, {"text": line.strip()} if suffix == ".txt" else _object(line, where)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends, counted from 1."""
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(_LONGEST + 1)
            if not line:
                return
            if len(line) > _LONGEST:
                raise DataError(f"{path}, line {number}: is longer than {_LONGEST >> 20} MB; one text a line")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number) from error
            if "\0" in text:  # UTF-16 of plain letters
                raise _not_utf8(path, number)
            yield number, text


def _not_utf8(path: Path, line: int) -> DataError:
    return DataError(f"{path}, line {line}: is not UTF-8 text; save the file as UTF-8")


def _object(line: str, where: str) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(value, dict):
        raise DataError(f'{where}: holds a {type(value).__name__}, not an object like {{"text": ...}}')
    return value


def _table(path: Path, tabs: bool) -> Iterator[tuple[str, Record]]:
    """Rows under a header. Between tabs a quotation mark is a letter, as the usual benchmarks' files have it."""
    lines = (line for _, line in _lines(path))
    rows = (
        csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
    )
    header: list[str] = []
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if header and row and len(row) != len(header):
                raise DataError(f"{where}: has {len(row)} fields, and the header has {len(header)}")
            if header and row:
                yield where, dict(zip(header, row, strict=True))
            elif row:
                header = _header(row, path, tabs)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}") from error


def _header(row: list[str], path: Path, tabs: bool) -> list[str]:
    names = [name.strip() for name in row]
    other = (
        next((mark for mark in ";\t|" if mark in names[0]), None) if len(names) == 1 and not tabs else None
    )
    if other is not None:
        raise DataError(f"{path}: its fields are separated by {other!r}; a .csv has commas, a .tsv tabs")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: its header names '{twice}' twice; the first line names the fields")
    return names


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow: pip install 'compressor[text]'") from error
    if int(pyarrow.__version__.split(".")[0]) < _SAFE:
        raise DataError(
            f"{path}: pyarrow {pyarrow.__version__} is too old to be safe: pip install -U pyarrow"
        )
    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
