"""Calls end with their epoch, and feed every example once."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxnets import dispatch, sampling
from jaxnets.plan import make_plan
from tests.tiny_net import small_digits


@pytest.mark.parametrize(
    ("limit", "per_epoch", "at", "expected"),
    [
        (10, 390, 0, 10),
        (10, 195, 0, 5),
        (10, 390, 20, 10),
        (10, 390, 15, 5),
        (4, 3, 0, 3),
        (7, 7, 14, 7),
    ],
)
def test_calls_end_with_the_epoch(limit, per_epoch, at, expected):
    per_call = dispatch.steps_per_call(limit, per_epoch, at)
    assert per_call == expected and per_epoch % per_call == 0 and at % per_call == 0


@pytest.mark.parametrize(("limit", "per_epoch", "at"), [(10, 97, 0), (10, 781, 0), (10, 781, 780), (10, 781, 797)])
def test_calls_are_full_but_for_the_last_of_an_epoch_where_no_number_divides_it(limit, per_epoch, at):
    per_call = dispatch.steps_per_call(limit, per_epoch, at)
    assert per_call == limit
    calls = list(sampling.call_steps(at, 3 * per_epoch, per_epoch, per_call))
    ends = [first + count for first, count in calls]
    assert [first for first, _ in calls] == [at, *ends[:-1]] and ends[-1] == 3 * per_epoch
    assert all(count == limit or end % per_epoch == 0 for (_, count), end in zip(calls, ends))


@pytest.mark.parametrize("at", [0, 3, 7, 21, 33])
def test_every_length_of_a_call_is_known_before_the_first(digits_dir, at):
    """Else its program would be compiled among the steps, and count as training."""
    config = small_digits()
    config.data_dir, config.model.name = str(digits_dir), "mobilenet_v1_cifar"
    config.train_split, config.batch_size, config.num_epochs = "train[:224]", 32, 5  # epochs of 7 steps
    config.progressive_sizes = (8, 16)
    plan = make_plan(config)
    for per_call in (3, 4, 7):
        calls = sampling.call_steps(at, plan.total_steps, plan.steps_per_epoch, per_call)
        taken = {(plan.training_size(first // 7), count) for first, count in calls}
        known = dispatch.call_kinds(plan, per_call, at)
        assert set(known) == taken and len(known) == len(taken)


def test_determinism_is_told_to_the_compiler_of_the_run_that_asks_for_it(digits_dir, monkeypatch):
    """Two runs in one process, of which one asks: they have programs of their own."""
    asked = []

    class Lowered:
        def compile(self, options):
            asked.append(options)
            return SimpleNamespace(memory_analysis=lambda: None)

    monkeypatch.setattr(dispatch, "lower_train", lambda *_: Lowered())
    config = small_digits()
    config.data_dir, config.model.name = str(digits_dir), "mobilenet_v1_cifar"
    for config.deterministic in (False, True, True, False):
        dispatch.compile_train(make_plan(config), {}, 16, 5)
    assert asked == [None, {"xla_gpu_deterministic_ops": True}]


def test_every_training_example_of_an_epoch_is_fed_in_the_epochs_order(digits_dir):
    config = small_digits()
    config.data_dir, config.seed, config.model.name = str(digits_dir), 5, "mobilenet_v1_cifar"
    plan = make_plan(config)
    calls = list(dispatch.train_calls(plan, True, 5, 5))
    assert len(calls) == 1 and calls[0]["index"].shape == (4, 5, 8)
    assert dispatch.call_shapes(plan, True, 5)["index"].shape == calls[0]["index"].shape
    fed = calls[0]["index"].swapaxes(0, 1).reshape(-1)
    np.testing.assert_array_equal(fed, sampling.epoch_order(5, 1, 160))
