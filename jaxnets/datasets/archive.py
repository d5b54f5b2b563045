"""A published archive: found beside the data or downloaded, verified, and read without extracting it."""

import gzip
import hashlib
import http.client
import logging
import os
import sys
import tarfile
import tempfile
import threading
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jaxnets.errors import UserError

logger = logging.getLogger(__name__)

# Including name look-up. TFDS's own downloader retries for minutes; here a user without a network waits this long.
CONNECT_SECONDS = 8.0
_TEXT_LIMIT = 1 << 16
_SLACK = 1 << 24  # bytes of an archive besides the members that are read
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Archive:
    """Where a tar.gz is published, its size in bytes, and its SHA-256."""

    url: str
    size: int
    sha256: str

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def manual_path(archive: Archive, root: Path) -> Path:
    """Where under the data directory `root` a hand-downloaded archive goes."""
    return root / "downloads" / "manual" / archive.filename


def obtain(archive: Archive, root: Path) -> Path:
    """The path of the verified archive: placed by hand under `root`, downloaded before, or downloaded now.

    Raises `UserError` if a file of that name is damaged, or if there is none and no network.
    """
    downloaded = root / "downloads" / archive.filename
    for path in (manual_path(archive, root), root / archive.filename, downloaded):
        if path.is_file():
            verify(path, archive)
            return path
    try:
        download(archive, downloaded)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"no data in data_dir {root}, and {archive.url} could not be downloaded ({error}); download it by "
            f"hand to {manual_path(archive, root)}, or set config.data_dir or TFDS_DATA_DIR to a directory with "
            "prepared data; configs/digits.py trains without any download"
        ) from error
    return downloaded


def verify(path: Path, archive: Archive) -> None:
    """Raise `UserError` unless the file at `path` has the archive's size and SHA-256."""
    try:
        fault = _fault(path, archive)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if fault:
        raise UserError(f"{path} is not the published archive ({fault}); replace it with {archive.url}, or delete it")


def _fault(path: Path, archive: Archive) -> str | None:
    size = path.stat().st_size
    if size != archive.size:
        return f"it has {size:,} bytes instead of {archive.size:,}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == archive.sha256 else f"its SHA-256 is {digest} instead of {archive.sha256}"


def download(archive: Archive, path: Path) -> None:
    """Download the archive to `path`, which exists afterwards only if size and SHA-256 are right.

    Raises `OSError` or `http.client.HTTPException` if the network fails or delivers something else.
    """
    response = _connect(archive.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    partial = Path(name)
    try:
        with response, os.fdopen(descriptor, "wb") as file, _progress_bar(archive) as bar:
            task = bar.add_task(f"Downloading {archive.filename}", total=archive.size)
            received = 0
            while received <= archive.size and (block := response.read(_BLOCK)):
                file.write(block)
                received += len(block)
                bar.advance(task, len(block))
        if received < archive.size:
            raise ConnectionError(f"the connection ended after {received:,} of {archive.size:,} bytes")
        if fault := _fault(partial, archive):
            raise ConnectionError(f"the download is not the published archive: {fault}")
        partial.chmod(0o644)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _connect(url: str):
    """An open response, or an `OSError` after `CONNECT_SECONDS` at most.

    In a thread of its own: the timeout of `urlopen` covers neither name look-up nor a second address.
    """
    outcome = {}

    def connect():
        try:
            outcome["response"] = urllib.request.urlopen(url, timeout=CONNECT_SECONDS)
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if "response" in outcome:
        return outcome["response"]
    raise outcome.get("error") or TimeoutError(f"no answer within {CONNECT_SECONDS:.0f} seconds")


def _progress_bar(archive: Archive) -> Progress:
    """A bar over the archive's bytes on standard error; if that is not a terminal, a log line instead."""
    on_terminal = sys.stderr.isatty()
    if not on_terminal:
        logger.info("Downloading %s (%d MB)", archive.url, archive.size // 1_000_000)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), disable=not on_terminal)


class _Limited:
    """A stream that ends in an error after `limit` bytes: a small archive can inflate endlessly."""

    def __init__(self, stream: BinaryIO, limit: int):
        self._stream, self._left = stream, limit

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        self._left -= len(block)
        if self._left < 0:
            raise tarfile.ReadError("it inflates to more than was published")
        return block


def read_members(path: Path, wanted: Mapping[str, int | None]) -> dict[str, bytes]:
    """The contents of the `wanted` members of a tar.gz: name -> size in bytes, or None for a short text.

    Streams the archive and writes nothing, so that a member's name is never used as a path. Raises
    `UserError` if the archive is damaged or a member is missing, repeated, or of another size.
    """
    contents = {}
    limit = _SLACK + sum(size or _TEXT_LIMIT for size in wanted.values())
    try:
        with gzip.open(path) as inflated, tarfile.open(fileobj=_Limited(inflated, limit), mode="r|") as tar:
            for member in tar:
                if member.name not in wanted:
                    continue
                size = wanted[member.name]
                right_size = member.size == size if size is not None else member.size <= _TEXT_LIMIT
                if not member.isreg() or not right_size or member.name in contents:
                    raise UserError(f"{path} holds a {member.name} that is not the published one; replace the archive")
                contents[member.name] = tar.extractfile(member).read()
    except UserError:
        raise
    except Exception as error:  # tarfile.TarError, zlib.error, EOFError, OSError, and ValueError for odd headers
        raise UserError(f"{path} is damaged ({error}); replace it") from error
    if missing := sorted(set(wanted) - set(contents)):
        raise UserError(f"{path} is incomplete: {', '.join(missing)} missing; replace it")
    return contents
