"""The order of the examples: every one once an epoch, the same on every machine."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import sampling
from jaxnets.errors import UserError


def test_epoch_order_is_pinned():
    """Runs resume on other machines and under other NumPy versions: these numbers may never change."""
    assert sampling.epoch_order(0, 0, 8).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sampling.epoch_order(42, 7, 8).tolist() == [5, 7, 1, 6, 2, 0, 4, 3]
    assert sampling.epoch_order(0, 0, 8).dtype == np.int32


@given(seed=st.integers(-(2**63), 2**64 - 1), epoch=st.integers(0, 10_000), size=st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_epoch_order_is_a_permutation(seed, epoch, size):
    np.testing.assert_array_equal(np.sort(sampling.epoch_order(seed, epoch, size)), np.arange(size))


def test_epoch_orders_are_uniform_and_differ():
    orders = np.stack([sampling.epoch_order(seed, epoch, 6) for seed in range(30) for epoch in range(40)])
    counts = np.stack([np.bincount(orders[:, position], minlength=6) for position in range(6)])
    assert abs(counts - 200).max() < 5 * np.sqrt(200)
    assert len(np.unique(orders, axis=0)) > 0.75 * 720  # 1,200 draws of 720 permutations: 584 expected
    large = [sampling.epoch_order(seed, epoch, 1000).tobytes() for seed in range(5) for epoch in range(5)]
    assert len(set(large)) == 25


@given(
    seed=st.integers(0, 9),
    size=st.integers(1, 40),
    batch=st.integers(1, 40),
    start=st.integers(0, 60),
    steps=st.integers(0, 60),
)
@settings(max_examples=100, deadline=None)
def test_train_indices_follow_the_epochs(seed, size, batch, start, steps):
    if batch > size:
        with pytest.raises(UserError, match=f"batch_size must be between 1 and the {size} examples, not {batch}"):
            sampling.train_indices(seed, size, batch, start, steps)
        return
    found = sampling.train_indices(seed, size, batch, start, steps)
    assert (found.dtype, found.shape) == (np.int32, (steps, batch))
    # Defined by hand: whole batches of every epoch's order, one after the other.
    stream = (
        sampling.epoch_order(seed, epoch, size)[first : first + batch]
        for epoch in itertools.count()
        for first in range(0, size - batch + 1, batch)
    )
    for row, expected in zip(found, itertools.islice(stream, start, start + steps), strict=True):
        np.testing.assert_array_equal(row, expected)


def test_train_indices_can_be_written_to():
    first = sampling.train_indices(0, 10, 5, 0, 2)
    first[:] = -1
    assert sampling.train_indices(0, 10, 5, 0, 2).min() == 0


@given(size=st.integers(1, 200), batch=st.integers(1, 250))
@settings(max_examples=100, deadline=None)
def test_eval_indices_see_every_example_once(size, batch):
    index, mask = sampling.eval_indices(size, batch)
    assert index.shape == mask.shape == (-(-size // batch), batch)
    assert (index.dtype, mask.dtype) == (np.int32, np.bool_)
    np.testing.assert_array_equal(index[mask], np.arange(size))
    assert not index[~mask].any()


@pytest.mark.parametrize("batch", [0, -1])
def test_bad_batch_sizes(batch):
    with pytest.raises(UserError, match="batch"):
        sampling.eval_indices(10, batch)
    with pytest.raises(UserError, match="batch"):
        sampling.steps_per_epoch(10, batch)
