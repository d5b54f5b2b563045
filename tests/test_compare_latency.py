"""The net that is timed for an entry, and that it is timed once."""

import json

from jaxnets import compare_entries, compare_latency, latency
from tests.tiny_net import small_digits

CONFIGS = {"digits": small_digits()}


def test_the_twin_for_large_images_is_another_net():
    """A net without one keeps its classes at any size."""
    (entry, twin) = compare_entries.make_entries(CONFIGS, ["mobilenet_v1:width=0.25", "mobilenet_v1_cifar:width=0.25"])
    fields = {"width": 0.25}
    assert compare_latency.timed_net(entry, 192, 7) == ("mobilenet_v1", 192, fields | {"num_classes": 7})
    assert compare_latency.timed_net(twin, 192, 7) == ("mobilenet_v1", 192, fields)
    assert compare_latency.timed_net(twin, None, 7) == ("mobilenet_v1_cifar", 16, fields | {"num_classes": 7})


def test_a_net_under_several_recipes_is_timed_once(tmp_path, monkeypatch):
    timed = []
    found = {"ms": 1.0, "low_ms": 1.0, "high_ms": 1.0, "calls": 1}
    monkeypatch.setattr(latency, "measure", lambda model, shape, **_: timed.append((model.width, shape[0])) or found)
    other = small_digits()
    other.label_smoothing = 0.2
    entries = compare_entries.make_entries(CONFIGS | {"other": other}, ["mobilenet_v1:width=0.25", "mobilenet_v1"])
    for entry in entries:
        compare_latency.measure(compare_latency.timed(entry, None, 4, 10), tmp_path)
    assert len(entries) == 4 and timed == [(0.25, 1), (0.25, 4), (1.0, 1), (1.0, 4)]


def test_large_images_are_timed_on_the_net_made_for_them(tmp_path, monkeypatch):
    timed = []

    def measure(model, shape, **arguments):
        timed.append((type(model).__name__, model.stem_stride, model.width, model.num_classes, shape))
        return {"ms": 1.0, "low_ms": 1.0, "high_ms": 1.0, "calls": 1}

    monkeypatch.setattr(latency, "measure", measure)
    # One of its fields is a tuple, which JSON gives back as a list.
    spec = "mobilenet_v1_cifar:width=0.25:stage_strides=(1,1,2,2,2)"
    (entry,) = compare_entries.make_entries(CONFIGS, [spec])

    def time(image_size):
        compare_latency.measure(compare_latency.timed(entry, image_size, 4, 10), tmp_path)

    time(96)
    assert timed == [("MobileNetV1", 2, 0.25, 1000, (n, 96, 96, 3)) for n in (1, 4)]
    what = compare_latency.timed(entry, 96, 4, 10)
    assert compare_latency.read(what, tmp_path)["model"] == "mobilenet_v1"
    assert compare_latency.read(what | {"batch_size": 8}, tmp_path) is None
    time(96)
    assert len(timed) == 2  # known already
    path = compare_latency.path_of(what, tmp_path)
    for text in ("[" * 100_000, "[]", json.dumps(what)):  # nothing that was measured
        path.write_text(text)
        assert compare_latency.read(what, tmp_path) is None
    time(None)
    assert timed[2:] == [("MobileNetV1", 1, 0.25, 10, (n, 16, 16, 3)) for n in (1, 4)]
