"""Timed calls: as many as asked for, warm-up apart, and of the very module."""

import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import latency
from tests.tiny_net import TinyNet


def test_calls_are_counted_without_the_warm_up(monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    made = []
    times = latency.call_times(lambda: made.append(1) or jnp.zeros(()))
    assert len(times) == latency.MIN_CALLS and len(made) == latency.MIN_CALLS + 2
    assert (times > 0).all()


def test_a_module_is_applied_to_the_shape_asked_for(monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    seen = []
    call = TinyNet.__call__
    monkeypatch.setattr(
        TinyNet, "__call__", lambda net, x, train=True: seen.append((x.shape, train)) or call(net, x, train)
    )
    found = latency.measure(TinyNet(num_classes=10), (3, 16, 16, 3), train=False)
    assert seen[-1] == ((3, 16, 16, 3), False)
    assert 0 < found["low_ms"] <= found["ms"] <= found["high_ms"]


@pytest.mark.parametrize(("seconds", "calls"), [(10.0, 5), (0.25, 6), (0.001, 200)])
def test_calls_end_with_the_time_for_them(seconds, calls, monkeypatch):
    """By a clock that only calls move on: slow ones are the fewest, fast ones the most, others fill 1.5 seconds."""
    clock = itertools.count()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: seconds * next(clock)))
    np.testing.assert_allclose(latency.call_times(lambda: jnp.zeros(())), [seconds] * calls)


def test_the_median_and_the_quartiles_are_in_milliseconds(monkeypatch):
    monkeypatch.setattr(latency, "call_times", lambda call: np.array([0.009, 0.001, 0.002, 0.004, 0.003]))
    found = latency.measure(TinyNet(num_classes=10), (1, 16, 16, 3), train=False)
    assert found == pytest.approx({"ms": 3.0, "low_ms": 2.0, "high_ms": 4.0, "calls": 5})
