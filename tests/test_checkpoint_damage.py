"""Damage is told from what cannot be read now, and what is set aside keeps what lay there before."""

import errno

import numpy as np
import pytest

from jaxnets.checkpoint_damage import digest, is_as_written, json_digest, passing, set_aside

TREE = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    "other",
    [
        TREE | {"kernel": np.nextafter(TREE["kernel"], np.float32(9))},
        TREE | {"kernel": TREE["kernel"].reshape(3, 2)},
        TREE | {"bias": np.zeros(3, np.int32)},  # of the same bytes
        TREE | {"bias": -TREE["bias"]},  # equal, but not to the bit
        {"kernel": TREE["kernel"], "scale": TREE["bias"]},
        {"kernel": TREE["kernel"]},
    ],
    ids=["value", "shape", "dtype", "sign of zero", "name", "missing"],
)
def test_a_digest_is_of_names_types_shapes_and_bits(other):
    assert digest(other) != digest(TREE)


def test_a_digest_is_of_the_values_however_they_lie_in_memory():
    other_order = {"bias": TREE["bias"], "kernel": np.asfortranarray(TREE["kernel"])}
    assert digest(other_order) == digest(TREE)


def test_a_record_tells_a_changed_value_and_knows_nothing_of_one_without_a_digest():
    record = {"digests": {"totals": json_digest({"loss": 0.1, "count": 3})}}
    assert is_as_written(record, "totals", {"count": 3, "loss": 0.1})
    assert not is_as_written(record, "totals", {"count": 3, "loss": 0.2})
    assert is_as_written(record, "metrics", None)


def raised(error, cause=None):
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "no"), "Permission denied"),
        (MemoryError(), "Cannot allocate memory"),
        (OSError(errno.EHOSTDOWN, "of a server that is started anew"), "Host is down"),
        (raised(KeyError("item"), raised(ValueError("of TensorStore [os_error_code='24']"))), "Too many open files"),
        (FileNotFoundError(errno.ENOENT, "gone"), None),
        (raised(ValueError("bad"), raised(ValueError("[os_error_code='2']"))), None),
        (KeyError("item"), None),
    ],
)
def test_only_what_the_system_refuses_now_passes(error, says):
    assert passing(error) == says


def test_what_is_set_aside_twice_is_there_twice(tmp_path):
    directory = tmp_path / "checkpoints"
    for content in ("first", "second"):
        (directory / "6" / "metrics").mkdir(parents=True)
        (directory / "6" / "metrics" / "metrics").write_text(content)
        moved = set_aside(directory, "6/metrics")
        assert (moved / "metrics").read_text() == content
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["6.metrics.1", "6.metrics.2"]
