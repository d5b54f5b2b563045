"""The arrays of an HDF5 file, read by a process of its own: a damaged file can crash or hang the HDF5 library.

Run by `keras_weights` as a script, `h5_arrays.py IN OUT`. It writes an .npz file, and imports nothing of jaxnets, which
would take longer than the reading. If it refuses a file, it says why on standard error and exits with status 3.
"""

import contextlib
import io
import re
import resource
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

LIMIT = 1 << 27  # bytes of weights; the largest of the nets read here has 30 MB
MAX_ARRAYS = 10_000
MEMORY, SECONDS = 1 << 30, 5  # bytes of memory and processor time of this process
REFUSED = 3  # exit status
NO_WEIGHTS = re.compile("^optimizer|seed_generator")  # state of training and of dropout


class RefusedError(Exception):
    """The file is whole, but refused."""


def bound_this_process() -> None:
    """Limit memory and processor time, where the system knows such limits."""
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (limit, limit))


def open_file(path: Path) -> BinaryIO:
    """An `.h5` file, or the one in a `.keras` archive."""
    if path.suffix.lower() != ".keras":
        return path.open("rb")
    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as file:
        content = file.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise RefusedError(f"its weights take more than {LIMIT >> 20} MiB")
    return io.BytesIO(content)


def read_arrays(content: BinaryIO) -> dict:
    """All arrays by path; RefusedError if one is stored outside the file, or if they exceed `LIMIT` bytes."""
    import h5py

    found = {}

    def add(name, item):
        if len(found) > MAX_ARRAYS:
            raise RefusedError(f"it has more than {MAX_ARRAYS} arrays")
        if isinstance(item, h5py.Dataset) and not NO_WEIGHTS.search(name):
            if item.external or item.is_virtual:
                raise RefusedError(f"{name} lies outside the file")
            if item.dtype.kind not in "fiu":
                raise RefusedError(f"{name} is of type {item.dtype}, where weights are floats")
            found[name] = item

    with h5py.File(content, "r") as file:
        file.visititems(add)  # does not follow links to other files
        if sum(item.nbytes for item in found.values()) > LIMIT:
            raise RefusedError(f"its weights take more than {LIMIT >> 20} MiB")
        return {name: item[()] for name, item in found.items()}


def main(source: str, target: str) -> None:
    """Copy the arrays of one file into the other."""
    bound_this_process()
    try:
        import numpy as np

        with open_file(Path(source)) as content:
            arrays = read_arrays(content)
        with open(target, "wb") as file:
            np.savez(file, names=list(arrays), **{f"array{i}": array for i, array in enumerate(arrays.values())})
    except RefusedError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    except Exception as error:  # HDF5 and zip report a damaged file in many ways
        print((str(error).strip().splitlines() or [type(error).__name__])[0], file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
