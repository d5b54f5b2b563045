"""Data sets as uint8 arrays: decoded once, or streamed, in one order that depends on the seed alone.

A split is either decoded whole (`decode`) and indexed by `train_indices` and `eval_indices`, or it does not
fit and `stream_train` and `stream_eval` yield the very batches those indices name.
"""

import atexit
import io
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import connection
from typing import Any

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from tensorflow_datasets.proto import tf_example_pb2

from jaxnets import image_files
from jaxnets.datasets import ImageFiles, is_folder, open_builder, read_folder
from jaxnets.errors import UserError

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
Fit = Callable[[Image.Image, int], Image.Image]  # an image and its index -> the pixels of it that are used

MAX_CLASSES = 1 << 20
_CHUNK = 512  # records read at once while decoding
_open_streams: weakref.WeakSet = weakref.WeakSet()


@dataclass(frozen=True)
class Split:
    """The records of one split, still encoded; picklable, for the processes that stream it."""

    name: str  # data set
    split: str  # in TFDS's split syntax
    directory: str  # of the prepared files
    source: ArrayRecordDataSource | ImageFiles  # index -> serialized tf.train.Example, or path and label
    class_names: tuple[str, ...]
    image_size: int  # pixels a side, after resizing
    crop: bool = False  # to the middle of the image; else all of it, squeezed to a square

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded uint8 images."""
        return len(self) * self.image_size**2 * 3


def open_split(
    dataset: str, split: str, data_dir: str | os.PathLike | None = None, *, image_size: int, crop: bool = False
) -> Split:
    """The split of a prepared data set; cifar10, cifar100 and digits are prepared where they are not yet.

    Args:
      dataset: a TFDS name of an image classification data set, `name[/config][:version]`, or `folder:PATH`.
      split: TFDS's split syntax: `train`, `train[:45000]`, `train[90%:]`, `train+test`.
      data_dir: None means `TFDS_DATA_DIR`, else TFDS's default.
      image_size: side in pixels to which images are brought, squeezed or, with `crop`, resized and cropped.

    Raises:
      UserError: data set or split is unknown or empty, or its files are damaged or missing.
    """
    if image_size < 1:
        raise UserError(f"config.image_size must be at least 1 pixel, not {image_size}")
    if is_folder(dataset):
        return _open_folder(dataset, split, image_size, crop)
    builder = open_builder(dataset, data_dir)
    splits = builder.info.splits
    known = ", ".join(f"{name} ({info.num_examples} examples)" for name, info in splits.items())
    try:
        instructions = splits[split].file_instructions
    except Exception as error:  # ValueError, KeyError, AssertionError, by the kind of mistake
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"split {split!r} of {dataset} does not exist ({reason}); it has {known}") from error
    if min((instruction.take for instruction in instructions), default=0) < 1:
        raise UserError(f"split {split!r} of {dataset} is empty; it has {known}")
    names = class_names(builder)
    _check_shards(instructions, builder.data_path)
    source = ArrayRecordDataSource(instructions)
    return Split(dataset, split, str(builder.data_path), source, names, image_size, crop)


def _open_folder(dataset: str, split: str, image_size: int, crop: bool) -> Split:
    folder = read_folder(dataset)
    try:
        source = folder.select(split)
    except ValueError as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"split {split!r} of {dataset} does not exist ({reason}); it has {folder.describe()}"
        ) from error
    if not len(source):
        raise UserError(f"split {split!r} of {dataset} is empty; it has {folder.describe()}")
    return Split(dataset, split, str(folder.directory), source, folder.class_names, image_size, crop)


def class_names(builder: tfds.core.DatasetBuilder) -> tuple[str, ...]:
    """The classes by label; UserError if this is no classification of uint8 images."""
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


def _check_shards(instructions: Sequence[Any], directory: os.PathLike) -> None:
    """Raise `UserError` unless each file holds as many records as dataset_info.json says."""

    def fault(path_and_count: tuple[str, int]) -> str | None:
        path, count = path_and_count
        if not os.path.isfile(path):
            return f"{path} is missing"
        reader = ArrayRecordReader(path)
        if not reader.ok():
            return f"{path} is truncated or damaged"
        found = reader.num_records()
        reader.close()
        if found > os.path.getsize(path):
            return f"{path} claims {found} records, more than it has bytes"
        return None if found == count else f"{path} holds {found} records in place of {count}"

    files = {(str(instruction.filename), instruction.examples_in_shard) for instruction in instructions}
    with ThreadPoolExecutor(16) as pool:
        faults = sorted(filter(None, pool.map(fault, files)))
    if faults:
        more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}; delete {directory} and have it prepared again")


def decode(split: Split, progress: bool = True) -> Batch:
    """All of a split as `{'image': uint8 (N, S, S, 3), 'label': int32 (N,)}`, in the order of its records.

    Grey images become RGB; images of another size are resized to S x S with PIL's antialiased bilinear
    filter. With `progress`, shows a bar on standard error where that is a terminal, else logs a line.
    Raises `UserError` naming the record that cannot be read.
    """
    batch = _empty_batch(split, len(split))
    title = f"Decoding {split.name} {split.split}"
    on_terminal = progress and sys.stderr.isatty()
    if progress and not on_terminal:
        logger.info("%s: %d images", title, len(split))
    # One thread: PIL holds the interpreter's lock for most of a small image, and threads only slow it down.
    with Progress(console=Console(stderr=True), disable=not on_terminal) as bar:
        task = bar.add_task(title, total=len(split))
        for start in range(0, len(split), _CHUNK):
            indices = np.arange(start, min(start + _CHUNK, len(split)))
            _fill(batch, start, split, indices)
            bar.advance(task, len(indices))
    return batch


def _empty_batch(split: Split, size: int) -> Batch:
    shape = (size, split.image_size, split.image_size, 3)
    return {"image": np.empty(shape, np.uint8), "label": np.empty(size, np.int32)}


def read_batch(split: Split, indices: np.ndarray, fit: Fit | None = None) -> Batch:
    """The decoded examples at `indices`, as `decode` gives them all, or brought to their size by `fit`."""
    batch = _empty_batch(split, len(indices))
    _fill(batch, 0, split, indices, fit)
    return batch


def _fill(batch: Batch, start: int, split: Split, indices: np.ndarray, fit: Fit | None = None) -> None:
    """Decode the records at `indices` into `batch` from position `start` on, `fit` or else squeezed or cropped."""
    indices = indices.tolist()
    try:
        records = split.source.__getitems__(indices)
    except Exception:  # array_record raises RuntimeError without naming the record: find it
        records = [_read_record(split, index) for index in indices]
    for position, (index, record) in enumerate(zip(indices, records), start):
        try:
            image, batch["label"][position] = _decode_record(split, record)
            batch["image"][position] = np.asarray(fit(image, index) if fit else _fit(split, image))
        except Exception as error:  # PIL raises anything from OSError to SyntaxError for a bad image
            raise _record_error(split, index, error) from error


def _read_record(split: Split, index: int) -> bytes:
    try:
        return split.source[index]
    except Exception as error:
        raise _record_error(split, index, error) from error


def _record_error(split: Split, index: int, error: Exception) -> UserError:
    reason = str(error).split("\n")[0].split(";")[0][:200] or type(error).__name__
    if isinstance(split.source, ImageFiles):
        return UserError(f"{split.source.paths[index]} cannot be read ({reason}); replace it or take it out")
    return UserError(
        f"record {index} of {split.name} {split.split} in {split.directory} cannot be read ({reason}); "
        "delete the directory and have it prepared again"
    )


def _decode_record(split: Split, record: bytes | tuple[str, int]) -> tuple[Image.Image, int]:
    """The image of a record in RGB, and its label."""
    if isinstance(split.source, ImageFiles):
        path, label = record
        return image_files.read(path), label
    # By hand: TFDS's own decoding takes three times as long, and would want OpenCV to be faster.
    feature = tf_example_pb2.Example.FromString(record).features.feature
    label = feature["label"].int64_list.value[0]
    if not 0 <= label < split.num_classes:
        raise ValueError(f"its label {label} is none of {split.num_classes} classes")
    image = image_files.open_image(io.BytesIO(feature["image"].bytes_list.value[0]))
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image, label


def _fit(split: Split, image: Image.Image) -> Image.Image:
    return (image_files.resize_and_crop if split.crop else image_files.squeeze)(image, split.image_size)


def _random_fit(split: Split, seed: int, epoch: int, crop_area: float, image: Image.Image, index: int) -> Image.Image:
    """The random-resized crop that a training image gets in an epoch; depends on nothing else."""
    # Longer than the entropy of `epoch_order`, so that they are other draws.
    raw = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch, index, 1])).random_raw((10, 4))
    return image_files.random_resized_crop(image, split.image_size, crop_area, (raw >> 11) / 2.0**53)


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The permutation of `num_examples` in which epoch `epoch` sees them, int32; depends on nothing else.

    The rank order of 64-bit draws of PCG64: NumPy keeps these raw draws the same in all versions and on all
    platforms, which it does not promise for `Generator.permutation`.
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(num_examples)
    return np.argsort(draws, kind="stable").astype(np.int32)


@lru_cache(maxsize=2)
def _cached_epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    order = epoch_order(seed, epoch, num_examples)
    order.flags.writeable = False
    return order


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Whole batches in an epoch; raises `UserError` where there is none."""
    if not 0 < batch_size <= num_examples:
        raise UserError(f"batch_size must be between 1 and the {num_examples} examples, not {batch_size}")
    return num_examples // batch_size


def train_indices(seed: int, num_examples: int, batch_size: int, start_step: int, num_steps: int) -> np.ndarray:
    """The examples of the training steps from `start_step` on, int32 `(num_steps, batch_size)`.

    Step s belongs to epoch s // steps_per_epoch; the rest of an epoch's order, smaller than a batch, is
    dropped.
    """
    per_epoch = steps_per_epoch(num_examples, batch_size)
    rows = np.empty((num_steps, batch_size), np.int32)
    for row, step in enumerate(range(start_step, start_step + num_steps)):
        epoch, position = divmod(step, per_epoch)
        order = _cached_epoch_order(seed, epoch, num_examples)
        rows[row] = order[position * batch_size : (position + 1) * batch_size]
    return rows


def eval_indices(num_examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every example once: indices int32 and mask bool, both `(num_batches, batch_size)`.

    The last batch is padded with example 0, where the mask is False.
    """
    if batch_size < 1:
        raise UserError(f"the evaluation batch size must be at least 1, not {batch_size}")
    positions = np.arange(-(-num_examples // batch_size) * batch_size, dtype=np.int32).reshape(-1, batch_size)
    mask = positions < num_examples
    return np.where(mask, positions, 0).astype(np.int32), mask


def is_resident(resident: bool | str, nbytes: int, limit_bytes: int) -> bool:
    """Whether a decoded split of `nbytes` is kept on the devices; "auto" compares with `limit_bytes`.

    Raises `UserError` unless `resident` is a bool or spells one of auto, true, false.
    """
    choice = str(resident).lower()
    if choice not in ("auto", "true", "false"):
        raise UserError(f"config.resident must be auto, true or false, not {resident!r}")
    return nbytes <= limit_bytes if choice == "auto" else choice == "true"


def stream_train(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    end_step: int,
    num_workers: int,
    steps_per_call: int,
    crop_area: float = 0.0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """The training batches of steps `start_step` to `end_step`, `steps_per_call` (K) stacked at a time.

    Yields `{'image': uint8 (K, B, S, S, 3), 'label': int32 (K, B)}`, the examples of `train_indices`
    whatever `num_workers` is. K is smaller at the end of an epoch, which a call never crosses, and at
    `end_step`. Close the iterator (it is a generator) to end its processes.

    Args:
      num_workers: processes that read and decode; 0 reads in threads of this process.
      crop_area: smallest share of the image in a random-resized crop, other ones every epoch; 0: as in evaluation.
      part: `(i, n)` yields the i-th of n equal parts of every batch, and reads no more.

    Raises:
      UserError: bad sizes, at once; or, while iterating, a record that cannot be read.
    """
    per_epoch = steps_per_epoch(len(split), batch_size)
    if steps_per_call < 1:
        raise UserError(f"config.steps_per_call must be at least 1, not {steps_per_call}")
    load = partial(_train_batch, split, seed, batch_size, crop_area, part)
    batches = _stream(load, start_step, end_step, num_workers, batch_size // part[1] * split.nbytes // len(split))
    return _stack_calls(batches, start_step, end_step, per_epoch, steps_per_call)


def stream_eval(split: Split, *, batch_size: int, num_workers: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
    """The batches of `eval_indices`: `{'image': uint8 (B, S, S, 3), 'label': int32 (B,), 'mask': bool (B,)}`.

    See `stream_train` for `num_workers`, `part`, closing, and errors.
    """
    indices, _ = eval_indices(len(split), batch_size)
    load = partial(_eval_batch, split, batch_size, part)
    return _stream(load, 0, len(indices), num_workers, batch_size // part[1] * split.nbytes // len(split))


def take_part(batches: np.ndarray, part: tuple[int, int]) -> np.ndarray:
    """The i-th of n equal parts, `part` = (i, n), of every batch in `(K, B)`: `(K, B / n)`."""
    number, count = part
    size = batches.shape[1] // count
    return batches[:, number * size : (number + 1) * size]


def _train_batch(split: Split, seed: int, batch_size: int, crop_area: float, part: tuple[int, int], step: int) -> Batch:
    epoch = step // steps_per_epoch(len(split), batch_size)
    fit = partial(_random_fit, split, seed, epoch, crop_area) if crop_area else None
    indices = train_indices(seed, len(split), batch_size, step, 1)
    return read_batch(split, take_part(indices, part)[0], fit)


def _eval_batch(split: Split, batch_size: int, part: tuple[int, int], number: int) -> Batch:
    indices, mask = (take_part(values, part)[number] for values in eval_indices(len(split), batch_size))
    return read_batch(split, indices) | {"mask": mask}


def call_steps(start_step: int, end_step: int, per_epoch: int, steps_per_call: int) -> Iterator[tuple[int, int]]:
    """The first step and the number of steps of every call; a call never crosses the end of an epoch."""
    step = start_step
    while step < end_step:
        count = min(steps_per_call, per_epoch - step % per_epoch, end_step - step)
        yield step, count
        step += count


def _stack_calls(
    batches: Iterator[Batch], start_step: int, end_step: int, per_epoch: int, steps_per_call: int
) -> Iterator[Batch]:
    with closing(batches):
        for _, count in call_steps(start_step, end_step, per_epoch, steps_per_call):
            call = [next(batches) for _ in range(count)]
            yield {name: np.stack([batch[name] for batch in call]) for name in call[0]}


def _stream(load: Callable[[int], Batch], start: int, stop: int, num_workers: int, batch_bytes: int) -> Iterator[Batch]:
    """`load(start)`, ..., `load(stop - 1)`, each of `batch_bytes`, computed ahead of time by Grain."""
    if num_workers < 0:
        raise UserError(f"config.num_workers must not be negative, but is {num_workers}")
    stream = _iterate(load, start, stop, min(num_workers, stop - start), batch_bytes)
    _open_streams.add(stream)
    return stream


def _iterate(
    load: Callable[[int], Batch], start: int, stop: int, num_workers: int, batch_bytes: int
) -> Iterator[Batch]:
    if start >= stop:
        return
    dataset = grain.MapDataset.range(start, stop).map(load)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags here, also in a program that parses none
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        # In shared memory, or through pipes at a third of the speed: containers often have only 64 MB of it.
        shared = _shared_memory_bytes() > 16 * num_workers * batch_bytes
        options = grain.experimental.DatasetOptions(min_shm_size=0 if shared else sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
        workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_start_worker)
    else:
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    with closing(iter(dataset)) as iterator:
        try:
            for batch in iterator:
                # Shared memory goes with Grain's array, whoever still looks at it.
                yield {name: np.array(value) for name, value in batch.items()}
        except RuntimeError as error:
            if not num_workers:
                raise
            raise UserError(
                f"a process that reads the data has ended ({str(error).splitlines()[0]}); where memory is short, "
                f"set config.num_workers below {num_workers}"
            ) from error


def _shared_memory_bytes() -> int:
    """Free shared memory; where it has no file system of its own (macOS, Windows), what is free is not limited."""
    if not os.path.isdir("/dev/shm"):
        return sys.maxsize
    return shutil.disk_usage("/dev/shm").free


@atexit.register
def _close_open_streams() -> None:
    """Left open until Python tears its modules down, a stream could no longer end its processes."""
    for stream in list(_open_streams):
        stream.close()


def _start_worker(index: int, count: int) -> None:
    """Keep a worker process off the accelerator, deaf to its parent's signals, and from outliving it."""
    del index, count  # Grain passes them
    jax.config.update("jax_platforms", "cpu")
    os.environ.pop("XLA_FLAGS", None)  # the parent's simulated devices
    # Both often reach the whole process group. The parent finishes its step, saves, and closes us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def follow_parent():
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
