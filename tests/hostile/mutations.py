"""What happens to files on their way: cut, flipped, spliced; and fields of JSON that say what nobody wrote."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 31, 1 << 40, 1 << 63, 10**30, 1e308, float("nan"), "", "../../../escaped", "/tmp/escaped",
    "a\nb", "x" * 5000, "\ud800", [], {}, [[]], "__import__('os')", {"a": {"b": []}},
)  # fmt: skip
DEEP = 3000


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes of a file after one accident or up to three."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice((cut, flip, splice, overwrite, insert))(data, rng)
    return data


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def splice(data: bytes, rng: random.Random) -> bytes:
    """A piece goes, or comes twice."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 4, 64, 1024)))
    return data[:start] + (data[start:end] * 2 if rng.random() < 0.5 else b"") + data[end:]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """Numbers that are as large as they can be, or nothing at all."""
    start = rng.randrange(len(data) + 1)
    size = rng.choice((1, 4, 8, 8))
    value = rng.choice((b"\xff", b"\x00", b"\x7f")) * size
    return (data[:start] + value + data[start + size :])[: max(len(data), 1)]


def insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice((1, 3, 100))) + data[start:]


# -------------------------------------------------------------------- JSON


def rewritten(text: bytes, rng: random.Random) -> bytes:
    """The same JSON with one to three of its values replaced, removed or moved."""
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _edit(value, rng)
    if rng.random() < 0.03:
        return b"[" * DEEP + b"]" * DEEP if rng.random() < 0.5 else b'{"a":' * DEEP + b"1" + b"}" * DEEP
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _edit(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return rng.choice(HOSTILE)
    holder, key = rng.choice(places)
    if rng.random() < 0.15 and isinstance(holder, dict):
        holder[rng.choice(("extra", "../x", "", key + "."))] = holder.pop(key)
    elif rng.random() < 0.15:
        del holder[key]
    elif rng.random() < 0.3:
        other, name = rng.choice(places)
        if name in other if isinstance(other, dict) else name < len(other):
            holder[key] = json.loads(json.dumps(other[name]))
    else:
        holder[key] = rng.choice(HOSTILE)
    return value


def _places(value: Any) -> Any:
    for key, item in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from _places(item)


# -------------------------------------------------------------------- containers, whose checksums are made to fit


def in_zip(
    change: Callable[[bytes, random.Random], bytes], *endings: str
) -> Callable[[bytes, random.Random], bytes]:
    """Changes one member whose name ends so, of an archive as torch writes it."""

    def apply(data: bytes, rng: random.Random) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        fitting = [i for i, (name, content) in enumerate(members) if name.endswith(endings) and content]
        chosen = rng.choice(fitting)
        name, content = members[chosen]
        members[chosen] = name, change(content, rng)
        return zipped(members)

    return apply


def zipped(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def in_header(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """Changes the JSON in front of a safetensors file, and its length with it."""

    def apply(data: bytes, rng: random.Random) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = change(data[8 : 8 + size], rng)
        return struct.pack("<Q", len(header)) + header + data[8 + size :]

    return apply
