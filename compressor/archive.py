"""Zip archives as torch writes them (.pt2, .pt, .pth): every member's place and checksum, without copying a byte.

Torch has a zip reader of its own, which checks no checksum and does not complain about two members of one name.
So a file is taken only in the one form that torch writes, in which every reader sees the same members: names that
differ in more than case, nothing compressed, nothing encrypted, each member whole and inside the file.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import BinaryIO

from .errors import FileError

MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_CHUNK = 1 << 24


def members(file: BinaryIO, data: memoryview, name: str) -> dict[str, memoryview]:
    """Member name -> its bytes (views into `data`, which holds the same bytes as `file`), checksums verified.

    `name` is the file's name for messages. Raises FileError for anything damaged or not in torch's form.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OverflowError,
        struct.error,
        OSError,
    ) as error:
        raise FileError(
            f"{name} is damaged: {_lower(error)}. It may be a download or copy that was cut short; fetch it again."
        ) from None
    found: dict[str, memoryview] = {}
    folded: set[str] = set()
    for info in infos:
        if info.is_dir():
            continue
        if info.filename.lower() in folded:
            raise FileError(f"{name} is refused: it holds two members named {info.filename!r}.")
        folded.add(info.filename.lower())
        found[info.filename] = _member(info, data, name)
    if not found:
        raise FileError(f"{name} is an empty archive.")
    return found


def root(found: dict[str, memoryview], name: str) -> tuple[str, dict[str, memoryview]]:
    """The one folder that all members lie in, and the members by their names below it."""
    top = next(iter(found)).split("/", 1)[0]
    if any(not key.startswith(top + "/") for key in found):
        raise FileError(f"{name} is not a model that torch wrote: its members lie in several folders.")
    return top, {key[len(top) + 1 :]: view for key, view in found.items()}


def _member(info: zipfile.ZipInfo, data: memoryview, name: str) -> memoryview:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise FileError(
            f"{name} is refused: its member {info.filename!r} is compressed or encrypted, which torch never writes. "
            f"Save the model again with torch."
        )
    damaged = FileError(f"{name} is damaged: the member {info.filename!r} does not match its checksum.")
    start = info.header_offset
    if start < 0 or start + _LOCAL_HEADER.size > len(data):
        raise damaged
    header = _LOCAL_HEADER.unpack_from(data, start)
    start += _LOCAL_HEADER.size + header[-2] + header[-1]
    if header[0] != MAGIC or start + info.file_size > len(data):
        raise damaged
    view = data[start : start + info.file_size]
    checksum = 0
    for offset in range(0, len(view), _CHUNK):
        checksum = zlib.crc32(view[offset : offset + _CHUNK], checksum)
    if checksum != info.CRC:
        raise damaged
    return view


def _lower(error: Exception) -> str:
    text = str(error).strip().rstrip(".") or type(error).__name__
    return text[0].lower() + text[1:]
