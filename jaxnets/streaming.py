"""Streaming a split: read and decoded ahead of time by Grain's worker processes, in the order of `sampling`."""

import atexit
import functools
import gc
import logging
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from multiprocessing import connection, resource_tracker

import grain
import jax
import numpy as np
from absl import flags
from PIL import Image

from jaxnets import cores, distributed, image_files
from jaxnets.data import Batch, Split, read_batch
from jaxnets.errors import UserError, first_line
from jaxnets.interruption import SIGNALS
from jaxnets.runtime import ignore_warnings_of_images
from jaxnets.sampling import call_steps, eval_indices, steps_per_epoch, take_part, train_indices

logger = logging.getLogger(__name__)

MOST_WORKERS = 16  # unless their number is given
IN_SHARED_MEMORY = 10  # batches per worker at most: in its queue, in Grain's buffers, being made and being read
_open_streams: weakref.WeakSet = weakref.WeakSet()


def stream_train(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    end_step: int,
    num_workers: int | None,
    steps_per_call: int,
    crop_area: float = 0.0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """The training batches of steps `start_step` to `end_step`, `steps_per_call` (K) stacked at a time.

    Yields `{'image': uint8 (K, B, S, S, 3), 'label': int32 (K, B)}`, the examples of `train_indices`
    whatever `num_workers` is. K is smaller at the end of an epoch, which a call never crosses, and at
    `end_step`. Close the iterator (it is a generator) to end its processes.

    Args:
      num_workers: processes that read and decode; None: one per core, up to 16, or down to half as many if shared
        memory has no room for more; 0: threads of this process. As many threads replace processes without room.
      crop_area: smallest share of the image in a random-resized crop, new every epoch; 0: as in evaluation.
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


def stream_eval(
    split: Split, *, batch_size: int, num_workers: int | None, part: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """The batches of `eval_indices`: `{'image': uint8 (B, S, S, 3), 'label': int32 (B,), 'mask': bool (B,)}`.

    Where the mask is False, images and labels are 0.

    See `stream_train` for `num_workers`, `part`, closing, and errors.
    """
    indices, _ = eval_indices(len(split), batch_size)
    load = partial(_eval_batch, split, batch_size, part)
    return _stream(load, 0, len(indices), num_workers, batch_size // part[1] * split.nbytes // len(split))


def _train_batch(split: Split, seed: int, batch_size: int, crop_area: float, part: tuple[int, int], step: int) -> Batch:
    epoch = step // steps_per_epoch(len(split), batch_size)
    fit = partial(_random_fit, split, seed, epoch, crop_area) if crop_area else None
    indices = train_indices(seed, len(split), batch_size, step, 1)
    return read_batch(split, take_part(indices, part)[0], fit)


def _eval_batch(split: Split, batch_size: int, part: tuple[int, int], number: int) -> Batch:
    indices, mask = (take_part(values, part)[number] for values in eval_indices(len(split), batch_size))
    batch = read_batch(split, indices[mask])
    missing = len(mask) - mask.sum()  # of the last batch: at its end
    padded = {name: np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)) for name, values in batch.items()}
    return padded | {"mask": mask}


def _random_fit(split: Split, seed: int, epoch: int, crop_area: float, image: Image.Image, index: int) -> Image.Image:
    """The random-resized crop that a training image gets in an epoch; depends on nothing else."""
    # More entropy words than in `epoch_order`, so that the draws are different.
    raw = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch, index, 1])).random_raw((10, 4))
    return image_files.random_resized_crop(image, split.image_size, crop_area, (raw >> 11) / 2.0**53)


def _stack_calls(
    batches: Iterator[Batch], start_step: int, end_step: int, per_epoch: int, steps_per_call: int
) -> Iterator[Batch]:
    with closing(batches):
        for _, count in call_steps(start_step, end_step, per_epoch, steps_per_call):
            call: Batch = {}  # filled batch by batch: for large images, a list of them would double the memory
            for at in range(count):
                batch = next(batches)
                call = call or {name: np.empty((count, *values.shape), values.dtype) for name, values in batch.items()}
                for name, values in batch.items():
                    call[name][at] = values
            yield call


def _stream(
    load: Callable[[int], Batch], start: int, stop: int, num_workers: int | None, batch_bytes: int
) -> Iterator[Batch]:
    """`load(start)`, ..., `load(stop - 1)`, each of `batch_bytes`, computed ahead of time by Grain."""
    if num_workers is not None and num_workers < 0:
        raise UserError(f"config.num_workers must not be negative, but is {num_workers}")
    stream = _iterate(load, start, stop, num_workers, batch_bytes)
    _open_streams.add(stream)
    return stream


def _iterate(
    load: Callable[[int], Batch], start: int, stop: int, num_workers: int | None, batch_bytes: int
) -> Iterator[Batch]:
    if start >= stop:
        return
    dataset = grain.MapDataset.range(start, stop).map(load)
    num_workers, threads = _readers(num_workers, stop - start, batch_bytes)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags here, even in a program that parses none
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        options = grain.experimental.DatasetOptions(min_shm_size=0)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
        workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_start_worker)
    else:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 4))
        dataset = dataset.to_iter_dataset(options)
    try:
        yield from _copies(iter(dataset), num_workers)
    finally:
        # What Grain raises, at the end too, is in a reference cycle that holds the last batch. Its shared memory must
        # go before Python exits, when cycles are no longer collected.
        if num_workers:
            gc.collect()


def _readers(num_workers: int | None, batches: int, batch_bytes: int) -> tuple[int, int]:
    """How many processes read, and how many threads if none do."""
    here = distributed.local_processes()
    share = cores.count() // (here if len(cores.usable()) == os.cpu_count() else 1)  # else each is bound to its own
    wanted = min(max(1, min(share, MOST_WORKERS)) if num_workers is None else num_workers, batches)
    # Not through pipes: a reader killed in the middle of a batch would leave us waiting forever for the rest of it.
    room = _shared_memory_bytes() // here // (IN_SHARED_MEMORY * max(batch_bytes, 1))
    if wanted <= room:
        return wanted, 2
    if num_workers is None and 2 * room >= wanted:  # fewer processes are better than threads
        return room, 0
    _say_threads(wanted, IN_SHARED_MEMORY * wanted * batch_bytes)
    return 0, wanted


@functools.cache  # once, not in every evaluation
def _say_threads(num_workers: int, wanted: int) -> None:
    logger.warning(
        "the data are read by %d threads instead of processes, whose batches may need %d MB of shared memory, but only "
        "%d MB are free for them (in a container, see --shm-size)",
        num_workers,
        wanted // 10**6,
        _shared_memory_bytes() // distributed.local_processes() // 10**6,
    )


def _copies(iterator: grain.DatasetIterator, num_workers: int) -> Iterator[Batch]:
    """Grain's batches as plain arrays and its errors as ours; ends its processes."""
    ended = None
    with closing(iterator):
        try:
            batch = _first(iterator) if num_workers else next(iterator, None)
            while batch is not None:
                # The shared memory goes with Grain's array, even if something still refers to it.
                yield {name: np.array(value) for name, value in batch.items()}
                batch = next(iterator, None)
        except UserError as error:
            ended = str(error)
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            if not num_workers:
                raise
            ended = (
                f"a process that reads the data has ended ({first_line(error)}); if memory is short, "
                f"set config.num_workers below {num_workers}"
            )
    if ended:  # raised here, since Grain's error holds the previous batch
        raise UserError(ended)


def _first(iterator: grain.DatasetIterator) -> Batch | None:
    """The first batch, read by a thread that blocks signals, so that the processes it starts block them too.

    Until `_start_worker`, a process would answer a signal, which often goes to the whole group, with a stack trace. The
    main thread waits, and still gets signals.
    """
    found: queue.SimpleQueue[tuple[Batch | None, BaseException | None]] = queue.SimpleQueue()
    resource_tracker.ensure_running()  # its start would unblock signals again

    def read():
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            found.put((next(iterator, None), None))
        except BaseException as error:
            found.put((None, error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        batch, error = found.get()
    except BaseException:
        reader.join(timeout=5)  # or it would use the iterator while that is being closed
        raise
    if error:
        raise error
    return batch


def _shared_memory_bytes() -> int:
    """Bytes of free shared memory; unlimited where it has no file system of its own (macOS, Windows)."""
    if not os.path.isdir("/dev/shm"):
        return sys.maxsize
    return shutil.disk_usage("/dev/shm").free


@atexit.register
def _close_open_streams() -> None:
    """Close open streams: once Python tears its modules down, they could no longer end their processes."""
    for stream in list(_open_streams):
        stream.close()


def _start_worker(index: int, count: int) -> None:
    """Keep a worker process off the accelerator, deaf to its parent's signals, and from outliving its parent."""
    del index, count  # Grain passes them
    jax.config.update("jax_platforms", "cpu")
    os.environ.pop("XLA_FLAGS", None)  # the parent's simulated devices
    # Signals often reach the whole process group. The parent finishes its step, saves, and closes us.
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    ignore_warnings_of_images()

    def follow_parent():
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
