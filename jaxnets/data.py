"""Data sets as uint8 arrays: opening and decoding their splits.

A split is either decoded whole (`decode`) and indexed as `sampling` says or, if it does not fit, streamed: `streaming`
yields the batches of the same indices.
"""

import contextlib
import hashlib
import io
import itertools
import logging
import os
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from tensorflow_datasets.proto import tf_example_pb2

from jaxnets import cores, image_files
from jaxnets.datasets import BUILDERS, ImageFiles, ImageFolder, is_folder, open_builder, read_folder
from jaxnets.errors import UserError, first_line

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
Fit = Callable[[Image.Image, int], Image.Image]  # an image and its index -> the pixels of it that are used

MAX_CLASSES = 1 << 20
_CHUNK = 512  # records read at once while decoding


@dataclass(frozen=True)
class Split:
    """The records of one split, still encoded; picklable, for the processes that stream it."""

    name: str  # data set
    split: str  # in TFDS's split syntax
    directory: str  # of the prepared files
    source: ArrayRecordDataSource | ImageFiles  # index -> serialized tf.train.Example, or path and label
    class_names: tuple[str, ...]
    ranges: tuple[tuple[str, int, int], ...]  # file, first record, last record + 1; none for a folder of images
    image_size: int  # pixels a side, after resizing
    crop: bool = False  # to the centre of the image; else all of it is squeezed to a square

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def identity(self) -> str:
        """What identifies them: a folder's digest of names and labels, wherever it is; else the data set's version."""
        if not isinstance(self.source, ImageFiles):
            return os.path.basename(self.directory)
        sha = hashlib.sha256()
        for path, label in self.source:
            sha.update(os.fsencode(path.removeprefix(self.directory)) + f"\0{label}\0".encode())
        return sha.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded uint8 images."""
        return len(self) * self.image_size**2 * 3


def open_split(
    dataset: str, split: str, data_dir: str | os.PathLike | None = None, *, image_size: int, crop: bool = False
) -> Split:
    """A single split, as `open_splits` opens it."""
    return open_splits(dataset, (split,), data_dir, image_size=image_size, crop=crop)[0]


def open_splits(
    dataset: str,
    splits: Sequence[str],
    data_dir: str | os.PathLike | None = None,
    *,
    image_size: int,
    crop: bool = False,
) -> list[Split]:
    """Splits of a prepared data set; cifar10, cifar100 and digits are prepared if they are not yet.

    Args:
      dataset: a TFDS name of an image classification data set, `name[/config][:version]`, or `folder:PATH`.
      splits: in TFDS's split syntax: `train`, `train[:45000]`, `train[90%:]`, `train+test`.
      data_dir: None means `TFDS_DATA_DIR`, else TFDS's default.
      image_size: side in pixels to which images are squeezed or, with `crop`, resized and cropped.

    Raises:
      UserError: the data set or a split is unknown or empty, or its files are damaged or missing.
    """
    if image_size < 1:
        raise UserError(f"config.image_size must be at least 1 pixel, not {image_size}")
    if is_folder(dataset):
        folder = read_folder(dataset)
        selected = [_select(folder, dataset, split, image_size, crop) for split in splits]
        if len(splits) > 1:  # for a run; an evaluation needs just one
            folder.say_unused(splits)
        return selected
    builder = open_builder(dataset, data_dir)
    return [_open(builder, dataset, split, image_size, crop) for split in splits]


def _open(builder: tfds.core.DatasetBuilder, dataset: str, split: str, image_size: int, crop: bool) -> Split:
    known = ", ".join(f"{name} ({info.num_examples} examples)" for name, info in builder.info.splits.items())
    try:
        instructions = builder.info.splits[split].file_instructions
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    except Exception as error:  # ValueError, KeyError or AssertionError, depending on the mistake
        raise UserError(f"split {split!r} of {dataset} does not exist ({first_line(error)}); it has {known}") from error
    # TFDS reads all the rest of a shard for a part that ends just before it begins.
    backwards = any(part.from_ is not None and part.to is not None and part.from_ >= part.to for part in parts)
    if backwards or min((instruction.take for instruction in instructions), default=0) < 1:
        raise UserError(f"split {split!r} of {dataset} is empty; it has {known}")
    names = class_names(builder)
    _allow_many_files()
    _check_shards(instructions, dataset, builder.data_path)
    source = ArrayRecordDataSource(instructions)
    ranges = tuple((str(each.filename), each.skip, each.skip + each.take) for each in instructions)
    return Split(dataset, split, str(builder.data_path), source, names, ranges, image_size, crop)


def _select(folder: ImageFolder, dataset: str, split: str, image_size: int, crop: bool) -> Split:
    try:
        source = folder.select(split)
    except UserError:
        raise
    except Exception as error:  # ValueError or NotImplementedError, depending on the mistake
        raise UserError(
            f"split {split!r} of {dataset} does not exist ({first_line(error)}); it has {folder.describe()}, and "
            "parts of these such as 'train[:90%]' and 'train[90%:]'"
        ) from error
    if not len(source):
        raise UserError(f"split {split!r} of {dataset} is empty; it has {folder.describe()}")
    return Split(dataset, split, str(folder.directory), source, folder.class_names, (), image_size, crop)


def count_shared(one: Split, other: Split) -> int:
    """How many examples two splits of a data set have in common."""
    if isinstance(one.source, ImageFiles):
        return len(set(one.source.paths) & set(other.source.paths))
    pairs = itertools.product(one.ranges, other.ranges)
    return sum(max(min(a[2], b[2]) - max(a[1], b[1]), 0) for a, b in pairs if a[0] == b[0])


def class_names(builder: tfds.core.DatasetBuilder) -> tuple[str, ...]:
    """The class names by label; UserError unless this is a classification data set of uint8 images."""
    features = dict(builder.info.features.items())
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"{builder.info.full_name} is not an image classification data set: "
            f"it needs features 'image' and 'label' and has {', '.join(features)}"
        )
    if image.np_dtype != np.uint8:
        raise UserError(f"{builder.info.full_name} has {image.np_dtype} images; only uint8 ones can be read")
    if not label.num_classes:
        raise UserError(f"{builder.info.full_name} does not say how many classes it has")
    if label.num_classes > MAX_CLASSES:
        raise UserError(f"{builder.info.full_name} claims {label.num_classes} classes; at most {MAX_CLASSES} are read")
    return tuple(label.int2str(index) for index in range(label.num_classes))


def _allow_many_files() -> None:
    """Let this process, and those it starts, open as many files as the system allows: each shard stays open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _check_shards(instructions: Sequence[Any], dataset: str, directory: os.PathLike) -> None:
    """Raise `UserError` unless each file can be read and holds as many records as dataset_info.json says."""

    def fault(path_and_count: tuple[str, int]) -> str | None:
        path, count = path_and_count
        if not os.path.isfile(path):
            return f"{path} is missing"
        try:
            with open(path, "rb"):
                reader = ArrayRecordReader(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except RuntimeError as error:
            return f"{path} cannot be read ({first_line(error)})"
        if not reader.ok():
            return f"{path} is truncated or damaged"
        found = reader.num_records()
        reader.close()
        if found > os.path.getsize(path):
            return f"{path} claims {found} records, more than it has bytes"
        return None if found == count else f"{path} holds {found} records instead of {count}"

    files = {(str(instruction.filename), instruction.examples_in_shard) for instruction in instructions}
    with ThreadPoolExecutor(16) as pool:
        faults = sorted(filter(None, pool.map(fault, files)))
    if faults:
        more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}; {_remedy(dataset, directory)}")


def _remedy(dataset: str, directory: str | os.PathLike) -> str:
    """What to do about damaged files."""
    if dataset.split(":")[0] in BUILDERS:
        return f"delete {directory} to have it prepared again"
    return f"replace the damaged files in {directory}, or have it prepared again"


def decode(split: Split, progress: bool = True) -> Batch:
    """All of a split as `{'image': uint8 (N, S, S, 3), 'label': int32 (N,)}`, in the order of its records.

    Grey images become RGB; images of another size are squeezed to S x S with PIL's antialiased bilinear filter or, for
    a split with `crop`, resized and cropped. With `progress`, shows a bar on standard error if that is a terminal,
    else logs a line. Raises `UserError` naming a record that cannot be read.
    """
    batch = _empty_batch(split, len(split))
    title = f"Decoding {split.name} {split.split}"
    on_terminal = progress and sys.stderr.isatty()
    if progress and not on_terminal:
        logger.info("%s: %d images", title, len(split))
    # For small images, PIL holds the interpreter's lock most of the time, and threads only slow the decoding down.
    threads, chunk = (cores.count(), 16) if _are_photographs(split) else (1, _CHUNK)

    def fill(start: int) -> int:
        indices = np.arange(start, min(start + chunk, len(split)))
        _fill(batch, start, split, indices)
        return len(indices)

    with (
        Progress(console=Console(stderr=True), disable=not on_terminal) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        task = bar.add_task(title, total=len(split))
        for done in pool.map(fill, range(0, len(split), chunk)):
            bar.advance(task, done)
    return batch


def _are_photographs(split: Split) -> bool:
    return isinstance(split.source, ImageFiles) or split.image_size > 64


def _empty_batch(split: Split, size: int) -> Batch:
    shape = (size, split.image_size, split.image_size, 3)
    return {"image": np.empty(shape, np.uint8), "label": np.empty(size, np.int32)}


def read_batch(split: Split, indices: np.ndarray, fit: Fit | None = None) -> Batch:
    """The decoded examples at `indices`, brought to size as by `decode`, or by `fit` if given."""
    batch = _empty_batch(split, len(indices))
    _fill(batch, 0, split, indices, fit)
    return batch


def _fill(batch: Batch, start: int, split: Split, indices: np.ndarray, fit: Fit | None = None) -> None:
    """Decode the records at `indices` into `batch` from position `start` on, resized by `fit` or as the split says."""
    indices = indices.tolist()
    try:
        records = split.source.__getitems__(indices)
    except Exception:  # array_record raises RuntimeError without naming the record: find it
        records = [_read_record(split, index) for index in indices]
    for position, (index, record) in enumerate(zip(indices, records), start):
        try:
            fit_it = partial(fit, index=index) if fit else partial(_fit, split)
            image, batch["label"][position] = _decode_record(split, record, fit_it)
            batch["image"][position] = np.asarray(image)
        except _NoLabel:
            raise UserError(f"{split.name} {split.split} has no labels: TFDS says -1; choose another split") from None
        except Exception as error:  # PIL raises anything from OSError to SyntaxError for a bad image
            raise _record_error(split, index, error) from error


class _NoLabel(Exception):
    """A record of a split whose labels were never published, such as ImageNet's test split."""


def _read_record(split: Split, index: int) -> bytes:
    try:
        return split.source[index]
    except Exception as error:
        raise _record_error(split, index, error) from error


def _record_error(split: Split, index: int, error: Exception) -> UserError:
    reason = first_line(error).split(";")[0]
    what = f"record {index} of {split.name} {split.split} in {split.directory}"
    remedy = f"; {_remedy(split.name, split.directory)}"
    if isinstance(split.source, ImageFiles):
        what = split.source.paths[index]
        remedy = "; replace it, or remove it if no run has begun, since a run resumes only with the same files"
    cause = error.__cause__ or error
    if isinstance(cause, MemoryError) or getattr(cause, "errno", None):  # the record is not to blame
        remedy = ""
    return UserError(f"{what} cannot be read ({reason}){remedy}")


def _decode_record(
    split: Split, record: bytes | tuple[str, int], fit: Callable[[Image.Image], Image.Image]
) -> tuple[Image.Image, int]:
    """A record's image, in RGB and passed through `fit`, and its label."""
    if isinstance(split.source, ImageFiles):
        path, label = record
        return image_files.read(path, fit), label
    # By hand: TFDS's own decoding takes three times as long, and would need OpenCV to be faster.
    feature = tf_example_pb2.Example.FromString(record).features.feature
    label = feature["label"].int64_list.value[0]
    if label == -1:
        raise _NoLabel
    if not 0 <= label < split.num_classes:
        raise ValueError(f"its label {label} is not one of the {split.num_classes} classes")
    image = image_files.open_image(io.BytesIO(feature["image"].bytes_list.value[0]))
    with image_files.one_if_large(image):
        image = image_files.eight_bits(image)
        return fit(image if image.mode == "RGB" else image.convert("RGB")), label


def _fit(split: Split, image: Image.Image) -> Image.Image:
    return (image_files.resize_and_crop if split.crop else image_files.squeeze)(image, split.image_size)


def is_resident(resident: bool | str, nbytes: int, limit_bytes: int) -> bool:
    """Whether a decoded split of `nbytes` is kept on the devices; "auto" compares with `limit_bytes`.

    Raises `UserError` unless `resident` is a bool or spells one of auto, true, false.
    """
    choice = str(resident).lower()
    if choice not in ("auto", "true", "false"):
        raise UserError(f"config.resident must be auto, true or false, not {resident!r}")
    return nbytes <= limit_bytes if choice == "auto" else choice == "true"
