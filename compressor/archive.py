"""Zip archives as torch writes them (.pt2, .pt, .pth): every member's bytes, verified, not copied.

torch has a zip reader of its own, which verifies no checksum and takes two members of one name without a word.
So a file is accepted only in the one form that torch writes, in which every reader sees the same: names that
differ in more than case, nothing compressed, nothing encrypted, each member whole and inside the file.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import BinaryIO

from .errors import FileError

MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_END = 22  # bytes of the record that closes the directory, without a comment
_CHUNK = 1 << 24


def names(file: BinaryIO, name: str) -> list[str]:
    """Names of the members. Raises FileError where `file` is no whole archive; `name` is for messages."""
    return [info.filename for info in _directory(file, name)]


def members(file: BinaryIO, data: memoryview, name: str) -> dict[str, memoryview]:
    """Member name -> its bytes (views into `data`, which holds the same bytes as `file`), checksums verified.

    Raises FileError for anything damaged or not in torch's form.
    """
    found: dict[str, memoryview] = {}
    folded: set[str] = set()
    for info in _directory(file, name):
        if info.filename.lower() in folded:
            raise FileError(f"{name} is refused: it holds two members named {info.filename!r}.")
        folded.add(info.filename.lower())
        found[info.filename] = _member(info, data, name)
    if not found:
        raise FileError(f"{name} is an empty archive.")
    return found


def find(data: bytes, ending: str, limit: int, name: str) -> bytes | None:
    """The member whose name ends so, of an archive that `members` has verified; its first `limit` bytes.

    None where there is no such member.
    """
    with io.BytesIO(data) as file:
        info = next((one for one in _directory(file, name) if one.filename.endswith(ending)), None)
        return None if info is None else bytes(_member(info, memoryview(data), name)[:limit])


def below_root(found: dict[str, memoryview], name: str) -> dict[str, memoryview]:
    """The members by their names below the one folder that torch puts them all in."""
    top = next(iter(found)).split("/", 1)[0] + "/"
    if not all(key.startswith(top) for key in found):
        raise FileError(f"{name} is no model that torch wrote: its members lie in several folders.")
    return {key.removeprefix(top): view for key, view in found.items()}


def _directory(file: BinaryIO, name: str) -> list[zipfile.ZipInfo]:
    """The directory of an archive that is the whole file: a cut one may end in the directory of one inside it."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
        file.seek(-_END, io.SEEK_END)
        if file.read(4) != b"PK\x05\x06" or (infos and min(info.header_offset for info in infos)):
            raise zipfile.BadZipFile("its directory is not that of the whole file")
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OverflowError,
        struct.error,
        OSError,
    ) as error:
        what = str(error).rstrip(".").lower() or type(error).__name__
        raise FileError(f"{name} is damaged ({what}): it may have been cut short. Fetch it again.") from None
    return infos


def _member(info: zipfile.ZipInfo, data: memoryview, name: str) -> memoryview:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise FileError(
            f"{name} is refused: its member {info.filename!r} is compressed or encrypted, "
            f"which torch never writes. Save the model again with torch."
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
