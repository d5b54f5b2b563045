"""Timed calls: as many as asked for, warm-up apart, and of the very module."""

import jax.numpy as jnp
import pytest

from jaxnets import create_model, latency
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


@pytest.mark.slow
def test_a_larger_net_takes_longer():
    """Ten times the arithmetic, so that no load on the machine can turn it round."""
    small, large = (create_model("mobilenet_v1_cifar", width=width) for width in (0.25, 1.0))
    small, large = (latency.measure(net, (8, 32, 32, 3), train=False) for net in (small, large))
    assert small["low_ms"] < large["high_ms"]
