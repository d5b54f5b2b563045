"""Where prepared data is, and how it gets there."""

import atexit
import contextlib
import io
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxnets.datasets.cifar import Cifar10, Cifar100
from jaxnets.datasets.digits import Digits
from jaxnets.errors import UserError, first_line
from jaxnets.plain_files import parse_json, read_text, user_path
from jaxnets.runtime import cache_directory

logger = logging.getLogger(__name__)

BUILDERS = {"cifar10": Cifar10, "cifar100": Cifar100, "digits": Digits}

_RANDOM_ACCESS = "array_record"
_MAX_DESCRIPTION = 1 << 20  # bytes of one of its JSON files
_NAME = re.compile(r"(\w+(?:/\w[\w.+-]*)?)(?::([\w.]+))?")  # data set, configuration; version


def data_root(data_dir: str | os.PathLike | None = None) -> Path:
    """The directory with the prepared data sets: `data_dir`, else `TFDS_DATA_DIR`, else TFDS's default."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return user_path(chosen).absolute()


def where_it_still_is(data_dir: str | None) -> str | None:
    """A run's data_dir, or None, which leaves the choice to `data_root`, if that is not a folder on this machine."""
    return data_dir if data_dir and Path(data_dir).is_dir() else None


def open_builder(dataset: str, data_dir: str | os.PathLike | None = None) -> tfds.core.DatasetBuilder:
    """A builder whose data is prepared and can be read at random; prepares cifar10, cifar100 and digits.

    Args:
      dataset: a TFDS name, also with configuration and version: `name[/config][:version]`.
      data_dir: see `data_root`.

    Raises:
      UserError: the data set is unknown, not prepared, damaged, or in a format without random access.
    """
    if directory := find_prepared(dataset, data_dir):
        return _open(directory)
    root = data_root(data_dir)
    name, version = _parse(dataset)
    if name not in BUILDERS or version not in ("", str(BUILDERS[name].VERSION)):
        raise UserError(
            f"unknown dataset {dataset!r}: jaxnets prepares {', '.join(BUILDERS)}, and in data_dir {root} "
            f"TFDS has prepared {', '.join(_prepared(root)) or 'nothing'}; a folder of images is folder:PATH"
        )
    if name == "digits":
        root = _writable([root, *_cache_roots()])
    elif not _is_writable(root):
        raise UserError(
            f"{dataset} cannot be prepared: data_dir {root} is not a writable directory; "
            "choose another with config.data_dir or TFDS_DATA_DIR"
        )
    return _open(_prepare(name, root))


def find_prepared(dataset: str, data_dir: str | os.PathLike | None = None) -> Path | None:
    """The directory of a data set named as for `open_builder`; None if it is not prepared."""
    root = data_root(data_dir)
    name, version = _parse(dataset)
    roots = [root, *_cache_roots()] if name == "digits" else [root]
    return next(filter(None, (_find(name, version, place) for place in roots)), None)


def _parse(dataset: str) -> tuple[str, str]:
    """Name with configuration, and version; "" for what is not given or not a name."""
    match = _NAME.fullmatch(dataset)
    return match.groups(default="") if match else ("", "")


def _find(name: str, version: str, root: Path) -> Path | None:
    """The directory of `version`, or of the newest prepared one if that is empty; or None."""
    if not name:
        return None
    parent = root / name
    try:
        versions = [entry.name for entry in parent.iterdir() if tfds.core.Version.is_valid(entry.name)]
    except OSError:  # absent, or not ours to read
        return None
    if version:
        versions = [entry for entry in versions if entry == version]
    return parent / max(versions, key=tfds.core.Version) if versions else None


def _prepared(root: Path) -> list[str]:
    """The names under which data sets lie prepared in `root`."""
    files = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    return sorted({str(file.parent.parent.relative_to(root)) for file in files})


def _open(directory: Path) -> tfds.core.DatasetBuilder:
    """The builder of a prepared directory, set to read array_record files."""
    try:
        _require_harmless(directory)
        builder = tfds.builder_from_directory(directory)
        formats = {file_format.value for file_format in builder.info.available_file_formats()}
        if _RANDOM_ACCESS in formats:
            builder.info.set_file_format(_RANDOM_ACCESS, override=True, override_if_initialized=True)
            return builder
    except _Harmful as error:
        raise UserError(f"the data set in {directory} is refused: {error}") from None
    except Exception as error:  # TFDS raises anything from KeyError to protobuf's ParseError here
        raise UserError(
            f"{directory} does not hold a complete prepared data set ({first_line(error)}); "
            "delete it and have it prepared again"
        ) from error
    own = ", or jaxnets can prepare its own in another config.data_dir" if builder.name in BUILDERS else ""
    raise UserError(
        f"{directory} is prepared as {', '.join(sorted(formats)) or 'an unknown format'}, which does not "
        f"allow random access; where TensorFlow is installed, `tfds convert_format --dataset_version_dir={directory} "
        f"--out_file_format={_RANDOM_ACCESS}` adds files that do{own}"
    )


class _Harmful(UserError):
    """A data set that would run code of its own, though it is whole."""


def _require_harmless(directory: Path) -> None:
    """_Harmful if the description of a data set from elsewhere would run its code; UserError if it is too large.

    TFDS imports the module of every feature's class; only TFDS's own are needed.
    """
    for file in ("dataset_info.json", "features.json", *(path.name for path in directory.glob("*.labels.txt"))):
        text = read_text(directory / file, _MAX_DESCRIPTION)
        if file == "features.json":
            for name in _class_names(parse_json(text)):
                if not name.startswith("tensorflow_datasets."):
                    raise _Harmful(f"its {file} names {name[:80]}, which is not a class of TFDS")


def _class_names(value: Any) -> Iterator[str]:
    """The names of Python classes in a features.json, at any depth, in the old spelling and the new.

    If the value under such a key is not a string, the key is a feature's name. A string may itself be JSON, which
    TFDS reads.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key in ("pythonClassName", "python_class_name", "type") and isinstance(item, str):
            yield item
        elif isinstance(item, str) and item.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(ValueError):  # not JSON after all
                yield from _class_names(parse_json(item))
        yield from _class_names(item)


def _prepare(name: str, root: Path) -> Path:
    """Prepare one of our data sets under `root`; TFDS renames a temporary folder, so it is whole or absent."""
    builder = BUILDERS[name](data_dir=root)
    logger.info("Preparing %s in %s", name, builder.data_path)
    if sys.stderr.isatty():
        tfds.enable_progress_bar()
    else:
        tfds.disable_progress_bar()
    try:
        # Standard output belongs to the result; TFDS prints there that it "downloads".
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError as error:
        # Another process may have been faster: the rename then fails, and its data is as good.
        if _find(name, str(builder.version), root) is None:
            raise UserError(f"{name} could not be written to {root}: {first_line(error)}") from error
    return Path(builder.data_path)


def _cache_roots() -> list[Path]:
    """The user's own cache, if there is one, for the embedded data set where `data_dir` cannot be written."""
    try:
        return [cache_directory() / "tensorflow_datasets"]
    except UserError:  # the user has no home folder
        return []


def _writable(roots: list[Path]) -> Path:
    """The first writable of `roots`, else a directory that is deleted when the process ends."""
    for root in roots:
        if _is_writable(root):
            return root
        logger.warning("data_dir %s is not writable: the embedded digits are prepared elsewhere", root)
    temporary = Path(tempfile.mkdtemp(prefix="jaxnets-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def _is_writable(root: Path) -> bool:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return True
    except OSError:
        return False
