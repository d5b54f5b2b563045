"""Thirty epochs hold no more at their end than after ten; 2,000 by `tests.chaos.soak`."""

import pytest

from tests.chaos import soak
from tests.tiny_net import registered


@pytest.mark.slow
@pytest.mark.parametrize("resident", ["true", "false"])
def test_what_a_run_holds_does_not_grow(tmp_path, resident):
    with registered():
        samples = soak.soak(tmp_path, 32, every=2, num_samples=16, resident=resident)
    assert [one.epoch for one in samples] == list(range(2, 33, 2))
    assert all(one.resident > 0 and one.device > 0 and one.arrays and one.files and one.threads for one in samples)
    # The resident memory of so few epochs is still that of warming up. A pool makes a thread where all it has are busy,
    # which on a loaded machine may be late; one thread a save would be eight more.
    assert [name for name in soak.growing(samples, new_threads=4) if name != "resident"] == []


def test_what_grows_is_found():
    flat = [soak.Sample(epoch, 100.0, 5.0, 40, 30, 20) for epoch in range(10, 2001, 10)]
    assert soak.growing(flat) == []
    for name, step in {"resident": 0.2, "device": 0.01, "arrays": 1, "files": 1, "threads": 1}.items():
        grown = [soak.dataclasses.replace(one, **{name: getattr(one, name) + step * i}) for i, one in enumerate(flat)]
        assert soak.growing(grown) == [name]
