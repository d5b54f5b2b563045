"""Small, untrusted text files, read within bounds of length and depth; and files written as a whole or not at all."""

import contextlib
import fcntl
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from jaxnets.errors import UserError

Found = TypeVar("Found")


def open_at_once(path: str | Path, flags: int) -> int:
    """An `opener` for `open`: UserError for a pipe or a device, which might block, or never end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError("not a regular file")
    return descriptor


def read_text(path: Path, limit: int) -> str:
    """The text of a file of at most `limit` bytes.

    Raises FileNotFoundError, and UserError if it cannot be read, is longer, or is not text.
    """
    try:
        with open(path, "rb", opener=open_at_once) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"it is longer than {limit} bytes")
        return content.decode()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError for any other text, and for one that nests too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def read_own(files: Sequence[Path], what: str, read: Callable[[Any], Found], limit: int) -> Found | None:
    """What `read` finds in the JSON of `files[0]`, of at most `limit` bytes; None if none of `files` exists yet.

    `files` are what a command writes in --out. UserError if one exists and the first is not a `what`: the command would
    overwrite somebody else's file.
    """
    present = [file for file in files if file.exists()]
    if not present:
        return None
    try:
        return read(parse_json(read_text(files[0], limit)))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        raise UserError(f"{present[0]} exists, but {files[0].name} holds no {what}; choose another --out") from None


def make_folder(out: Path) -> None:
    """Make the folder --out unless it exists; UserError if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made a folder: {error.strerror}") from None


def set_aside(files: Sequence[Path]) -> list[Path]:
    """Rename the files that exist, `NAME.json` to `NAME.1.json` or the next free number; returns their new paths."""
    there = [file for file in files if file.exists()]
    for number in itertools.count(1):
        moved = [file.with_suffix(f".{number}{file.suffix}") for file in there]
        if not any(file.exists() for file in moved):
            break
    for file, kept in reversed(list(zip(there, moved))):  # the first last: `read_own` knows them by it
        file.rename(kept)
    return moved


@contextlib.contextmanager
def locked(path: Path, place: str, holder: str) -> Iterator[BinaryIO]:
    """Lock the file at `path`, which is made if missing, against other processes.

    UserError, which begins with `place`, if another `holder` has the lock, or it cannot be had at all.
    """
    try:
        # Unbuffered, since the rest of a buffer would be written, and fail, once more when the file is closed.
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{place} is in use by another {holder}; choose another or wait") from None
        except OSError as error:  # a network file system may have no locks
            raise UserError(f"{place} cannot be locked: {error.strerror}; choose another") from None
        yield file


def user_path(text: str | Path) -> Path:
    """A path as it is typed: in `--workdir=~/runs`, the shell leaves it to us to expand `~` to the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # nobody's home: the shell takes that for a name like any other
        return Path(text)


def scratch_of(path: Path, tag: str = "") -> Path:
    """The file that `replacing` writes."""
    return path.with_name(f"{path.name}{tag}.tmp")


def _sync(path: Path) -> None:
    """Flush what was written to a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, tag: str = "") -> Iterator[Path]:
    """The file to write instead of `path`, which it replaces after the block: as a whole or not at all, at any time.

    It is on disk after the block, so that even a power cut leaves either the old or the new one. `tag` distinguishes
    its name from that of another process that may be writing the same file.
    """
    scratch = scratch_of(path, tag)
    try:
        yield scratch
        _sync(scratch)
        os.replace(scratch, path)
        with contextlib.suppress(OSError):  # some file systems cannot do this; the file is there
            _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
