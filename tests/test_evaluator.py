"""Evaluation sees every example once, however it is fed and grouped."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnets import data, step
from jaxnets.evaluator import call_size, eval_calls, load_examples, make_evaluator, one_behind, summarize
from tests.tiny_net import TinyNet, first_variables, make_config


@pytest.fixture(scope="module")
def config(digits_dir):
    return make_config(digits_dir, eval_batch_size=12, steps_per_call=3)


@pytest.fixture(scope="module")
def split(config):
    return data.open_split("digits", "test[:50]", config.data_dir, image_size=config.image_size)


@pytest.fixture(scope="module")
def net():
    return TinyNet(num_classes=10), first_variables()


def test_every_example_is_evaluated_once_in_calls_of_one_shape(config, split):
    calls = list(eval_calls(split, True, config, 4))
    assert [call["index"].shape for call in calls] == [(4, 3, 3)] * 2
    seen = np.concatenate([call["index"][call["mask"]] for call in calls])
    assert sorted(seen) == list(range(50))


def test_a_large_split_streams_and_a_small_one_is_resident(config, split):
    devices = jax.devices()[:1]
    assert load_examples(split, config, devices).keys() == {"image", "label"}
    config = config.copy_and_resolve_references()
    config.resident_limit = split.nbytes - 1
    assert load_examples(split, config, devices) == {}


@given(st.integers(1, 3000), st.integers(1, 40), st.integers(1, 12), st.integers(1, 8))
def test_calls_hold_all_examples_and_little_else(count, share, most_batches, devices):
    size, per_call = call_size(count, share * devices, most_batches, devices)
    batches = math.ceil(count / size)
    calls = math.ceil(batches / per_call)
    assert size % devices == 0 and size <= share * devices and per_call <= most_batches
    assert batches == math.ceil(count / (share * devices))  # no more of them than of the largest
    assert batches * size - count < batches * devices
    assert calls == math.ceil(batches / most_batches) and calls * per_call - batches < calls


def test_a_streamed_evaluation_equals_a_resident_one_and_plain_means(config, split, net):
    model, variables = net
    devices = jax.devices()[:1]
    decoded = data.decode(split, progress=False)
    resident, _ = make_evaluator(model, split, step.replicate(decoded, devices), config, devices)(variables)
    assert make_evaluator(model, split, {}, config, devices)(variables)[0] == resident
    images = (decoded["image"] / np.float32(255) - np.float32(config.mean)) / np.float32(config.std)
    right = np.asarray(model.apply(variables, images)).argmax(-1) == decoded["label"]
    assert resident["accuracy"] == right.mean() and resident["num_examples"] == 50
    for label, accuracy in enumerate(resident["class_accuracy"]):
        assert accuracy == right[decoded["label"] == label].mean()


def test_four_devices_equal_one(config, split, net):
    decoded = data.decode(split, progress=False)
    one, four = (
        make_evaluator(net[0], split, step.replicate(decoded, devices), config, devices)(net[1])[0]
        for devices in (jax.devices()[:1], jax.devices()[:4])
    )
    assert one["accuracy"] == four["accuracy"] and one["top5_accuracy"] == four["top5_accuracy"]
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-6)


def test_an_item_is_handed_on_once_the_next_has_been_taken():
    taken = []
    items = (taken.append(number) or number for number in range(4))
    assert [(item, len(taken)) for item in one_behind(items)] == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(one_behind([])) == []


def test_an_evaluation_can_be_abandoned_between_calls(config, split, net):
    devices = jax.devices()[:1]

    def abandon():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_evaluator(net[0], split, {}, config, devices, abandon)(net[1])


def test_a_class_without_examples_has_no_accuracy():
    totals = step.EvalTotals(
        loss=np.float64(6),
        correct=np.float64(2),
        correct_top5=np.float64(3),
        count=np.float64(3),
        class_correct=np.array([2.0, 0.0, 0.0]),
        class_count=np.array([2.0, 1.0, 0.0]),
    )
    metrics = summarize(totals)
    assert (metrics["loss"], metrics["accuracy"], metrics["top5_accuracy"]) == (2.0, 2 / 3, 1.0)
    assert metrics["class_accuracy"][:2] == [1.0, 0.0] and math.isnan(metrics["class_accuracy"][2])
