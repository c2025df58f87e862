"""Damage to files: blind (flips, cuts, splices, false lengths) and inside containers.

A mutation inside a container keeps the outer form right (lengths, checksums), so that what lies
behind it is reached: the members of a zip, and the header of a safetensors file.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Callable, Sequence

_NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
_TEXTS = (
    b"-1",
    b"1e999",
    b"NaN",
    b"99999999999999999999",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"\\ud800",
    b"[" * 2000,
)
Mutation = Callable[[random.Random, bytearray, Sequence[bytes]], None]


def mutated(data: bytes, others: Sequence[bytes], random: random.Random) -> bytes:
    """`data` with one to four mutations; `others` are files to splice from."""
    inside = _CONTAINERS.get(_kind(data))
    if inside is not None and random.random() < 0.6:
        try:
            return inside(random, data, others)
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError):
            pass
    return _blind(random, data, others)


def _blind(random: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        random.choice(_MUTATIONS)(random, damaged, others)
        if not damaged:
            break
    return bytes(damaged)


def _kind(data: bytes) -> str:
    if data.startswith(b"PK\x03\x04"):
        return "zip"
    return "safetensors" if data[8:9] == b"{" else ""


def _flip(random: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    data[_place(random, data)] ^= 1 << random.randrange(8)


def _set(random: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    data[_place(random, data)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))


def _cut(random: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_place(random, data) :]


def _delete(random: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    start = _place(random, data)
    del data[start : start + random.choice((1, 4, 8, 64, 1000))]


def _repeat(random: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    start = _place(random, data)
    part = data[start : start + random.choice((1, 4, 8, 64, 1000))]
    data[start:start] = part * random.choice((1, 2, 50))


def _splice(random: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    other = random.choice(others)
    start, end = sorted(random.randrange(len(other) + 1) for _ in range(2))
    place = _place(random, data)
    data[place : place + random.choice((0, end - start))] = other[start:end]


def _false_number(random: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    """A length, count or offset: 2, 4 or 8 bytes, small-endian."""
    width = random.choice((2, 4, 8))
    number = random.choice((*_NUMBERS, len(data), len(data) + 1, random.randrange(1 << 16)))
    place = _place(random, data)
    data[place : place + width] = (number % (1 << (8 * width))).to_bytes(width, "little")


def _false_text(random: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    """A number in a text becomes something else."""
    digits = [place for place in range(min(len(data), 4096)) if 0x30 <= data[place] <= 0x39]
    place = random.choice(digits) if digits else _place(random, data)
    data[place : place + 1] = random.choice(_TEXTS)


def _place(random: random.Random, data: bytearray) -> int:
    """Mostly in the first part, where headers are, or in the last, where a zip's directory is."""
    if len(data) < 2:
        return 0
    choice = random.random()
    if choice < 0.4:
        return random.randrange(min(len(data), 256))
    if choice < 0.6:
        return len(data) - 1 - random.randrange(min(len(data), 256))
    return random.randrange(len(data))


_MUTATIONS: tuple[Mutation, ...] = (
    _flip,
    _flip,
    _set,
    _cut,
    _delete,
    _repeat,
    _splice,
    _false_number,
    _false_number,
    _false_text,
)


def _in_zip(random: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = [(info, file.read(info)) for info in file.infolist()]
    chosen = random.randrange(len(members))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for number, (info, held) in enumerate(members):
            content = held
            if number == chosen or random.random() < 0.1:
                content = mutated(held, others, random) if held else b"x"
            if random.random() < 0.02:
                continue
            name = info.filename if random.random() > 0.03 else random.choice(("../x", "a", "/b"))
            file.writestr(zipfile.ZipInfo(name), content, info.compress_type)
    return stream.getvalue()


def _in_safetensors(random: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    header = _blind(random, data[8 : 8 + size], others)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


_CONTAINERS = {"zip": _in_zip, "safetensors": _in_safetensors}
