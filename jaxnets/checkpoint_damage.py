"""Telling a damaged checkpoint from one that merely cannot be read now, and setting it aside."""

import errno
import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxnets.errors import UserError, writing

# Error numbers by which the system says that a file cannot be read now.
PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# Those of a network file system whose server is away. Not EIO, which a bad sector gives too, for good.
PASSING += (errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH)
PASSING += (errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED)


class DamagedError(UserError):
    """A checkpoint that exists but is not what was written."""


def digest(tree) -> str:
    """SHA-256 over the names, types and bytes of all arrays of a tree."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_as_written(record: dict[str, Any], name: str, value: Any) -> bool:
    """Whether a record has the digest of a JSON value, or none at all, as in earlier versions."""
    digests = record["digests"]
    return name not in digests or digests[name] == json_digest(value)


def tensorstore_errno(error: BaseException) -> int | None:
    """The system's error number in what TensorStore raises, a ValueError, if it has one."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return int(number[1]) if number else None


def passing(error: BaseException | None) -> str | None:
    """The system's message if it is to blame rather than the file (no permission, too many open files), else None."""
    while error is not None:
        number = tensorstore_errno(error) or getattr(error, "errno", None)
        if isinstance(error, MemoryError) or number in PASSING:
            return os.strerror(number or errno.ENOMEM)
        error = error.__cause__ or error.__context__
    return None


def set_aside(directory: Path, name: str) -> Path:
    """Move a checkpoint, or a part of one, to `damaged/`, next to the checkpoints' folder; returns its new path."""
    folder = directory.parent / "damaged"
    names = (f"{name.replace('/', '.')}.{number}" for number in itertools.count(1))
    target = next(folder / name for name in names if not (folder / name).exists())
    with writing(directory):
        folder.mkdir(exist_ok=True)
        (directory / name).rename(target)
    return target
