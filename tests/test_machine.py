"""The machine as it is written beside numbers."""

import json
import os
import time

import jax
import pytest

from jaxnets import machine, ops


def test_it_is_this_machine_and_these_versions():
    found = machine.describe()
    assert found["versions"]["jax"] == jax.__version__
    assert found["num_devices"] == jax.local_device_count()
    assert 1 <= found["cores"] <= os.cpu_count()
    with ops.using("reference"):
        assert machine.describe()["operators"] == "reference"
    assert json.loads(json.dumps(found)) == found
    sentence = machine.sentence(found)
    assert found["device"] in sentence and jax.__version__ in sentence and "\n" not in sentence


def test_ticks_count_work():
    before, _ = machine.processor_ticks()
    if not before:
        pytest.skip("this system does not count processor time")
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert machine.processor_ticks()[0] >= before + 10
