"""Which examples each step and each batch of an evaluation takes: a matter of the seed and the epoch alone."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from jaxnets.errors import UserError


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The permutation of `num_examples` in which epoch `epoch` sees them, read-only int32; depends on nothing else.

    The rank order of 64-bit draws of PCG64: NumPy keeps these raw draws the same in all versions and on all
    platforms, which it does not promise for `Generator.permutation`.
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(num_examples)
    order = np.argsort(draws, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Whole batches in an epoch; raises `UserError` if there is none."""
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
        order = epoch_order(seed, epoch, num_examples)
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


def take_part(batches: np.ndarray, part: tuple[int, int]) -> np.ndarray:
    """The i-th of n equal parts, `part` = (i, n), of every batch in `(K, B)`: `(K, B / n)`."""
    number, count = part
    size = batches.shape[1] // count
    return batches[:, number * size : (number + 1) * size]


def call_steps(start_step: int, end_step: int, per_epoch: int, steps_per_call: int) -> Iterator[tuple[int, int]]:
    """The first step and the number of steps of every call; a call never crosses the end of an epoch."""
    step = start_step
    while step < end_step:
        count = min(steps_per_call, per_epoch - step % per_epoch, end_step - step)
        yield step, count
        step += count
