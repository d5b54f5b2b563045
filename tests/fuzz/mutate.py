"""Damage to bytes, as chance or an enemy does it."""

import gzip
import io
import random
import struct
import zipfile
import zlib

NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**62, 2**63, 2**64 - 1)
WORDS = (
    b"null",
    b"-1",
    b"1e999",
    b"[",
    b"{",
    b'"',
    b"\\u0000",
    b"NaN",
    b"99999999999999999999",
    b"../",
    b"\0",
    b"\xff",
)


def damage(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to eight changes; inside an archive as often as to the archive itself."""
    if rng.random() < 0.6:
        inside = _inside(content, others, rng)
        if inside is not None:
            return inside
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        _change(result, others, rng)
    return bytes(result)


def _change(content: bytearray, others: list[bytes], rng: random.Random) -> None:
    place = rng.randrange(len(content) + 1)
    match rng.randrange(9):
        case 0 if content:
            content[place % len(content)] ^= 1 << rng.randrange(8)
        case 1 if content:
            content[place % len(content)] = rng.randrange(256)
        case 2 | 3:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice("<>")
            number = rng.choice(NUMBERS) % 2 ** (8 * width)
            content[place : place + width] = struct.pack(order + "BHIQ"[width.bit_length() - 1], number)
        case 4:
            del content[place:]
        case 5:
            del content[place : place + rng.choice((1, 4, 64, 1000))]
        case 6:
            length = rng.choice((1, 8, 64, 1000))
            content[place:place] = content[place : place + length] * rng.choice((1, 2, 50))
        case 7:
            content[place:place] = rng.choice(WORDS)
        case 8 if others:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            content[place : place + rng.choice((8, 100, 10_000))] = other[start : start + rng.choice((8, 100, 10_000))]


def _inside(content: bytes, others: list[bytes], rng: random.Random) -> bytes | None:
    """Changes below a layer that has check sums: what is in a zip or gzip file, or in the chunks of a PNG."""
    try:
        if content[:2] == b"PK":
            return _in_zip(content, others, rng)
        if content[:2] == b"\x1f\x8b":
            return gzip.compress(damage(gzip.decompress(content), [], rng), 1)
        if content[:4] == b"\x89PNG":
            return _in_png(content, rng)
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, struct.error, ValueError, NotImplementedError):
        pass  # damaged already
    return None


def _in_zip(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        victim = rng.choice(old.namelist())
        if rng.random() < 0.5:  # a pickle is small, and the most of what can be said
            victim = next((name for name in old.namelist() if name.endswith(".pkl")), victim)
        for name in old.namelist():
            inner = old.read(name)
            if name == victim:
                inner = bytearray(inner)
                for _ in range(rng.choice((1, 1, 2, 4))):
                    _change(inner, others, rng)
            new.writestr(name, bytes(inner))
    return result.getvalue()


def _in_png(content: bytes, rng: random.Random) -> bytes:
    result, place = bytearray(content[:8]), 8
    chunks = []
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append(bytearray(content[place + 4 : place + 8 + length]))
        place += 12 + length
    _change(rng.choice(chunks), [], rng)
    for chunk in chunks:
        result += struct.pack(">I", max(len(chunk) - 4, 0)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return bytes(result)
