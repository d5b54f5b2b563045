"""The machine as it is written beside numbers."""

import json
import os
import platform
import time
from importlib import metadata

import jax
import pytest

from jaxnets import machine, ops


def test_it_is_this_machine_and_these_versions():
    found = machine.describe()
    assert found["versions"]["jax"] == jax.__version__
    assert found["num_devices"] == jax.device_count()
    assert 1 <= found["cores"] <= os.cpu_count()
    with ops.using("reference"):
        assert machine.describe()["operators"] == "reference"
    assert json.loads(json.dumps(found)) == found
    sentence = machine.sentence(found)
    assert found["device"] in sentence and jax.__version__ in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx avx2\n", "AMD EPYC (AVX2)"),
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx avx2 avx512f\n\nmodel name\t: AMD EPYC\n", "AMD EPYC (AVX-512)"),
        ("model name\t: Old\nflags\t\t: fpu sse2\n", "Old"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", f"{platform.processor() or platform.machine()} (NEON)"),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_processors_of_one_name_are_told_apart_by_their_vectors(cpuinfo, name, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo:
        machine.CPUINFO.write_text(cpuinfo)
    assert machine._processor() == name


def test_other_operators_are_another_version(tmp_path, monkeypatch):
    """Times of before are not those of now, though no number has been raised."""
    (tmp_path / "native").mkdir()
    source = tmp_path / "native" / "kernels.cc"
    monkeypatch.setattr(machine, "OPERATORS", tmp_path)
    found = []
    for content in ("a", "b", "a"):
        source.write_text(content)
        machine._operators_digest.cache_clear()
        found.append(machine.describe()["versions"]["jaxnets"])
    machine._operators_digest.cache_clear()
    assert found[0] == found[2] != found[1] and found[0].startswith(metadata.version("jaxnets"))


def test_ticks_count_work():
    before, _ = machine.processor_ticks()
    if not before:
        pytest.skip("this system does not count processor time")
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert machine.processor_ticks()[0] >= before + 10


def test_a_machine_is_noted_once_and_another_beside_it(tmp_path, monkeypatch):
    assert machine.read(tmp_path) == []
    for at in (0, 0, 5):
        machine.note(tmp_path, at)
    (here,) = machine.read(tmp_path)
    assert here.items() >= machine.describe().items() and machine.dated_sentence(here).endswith(
        f"(from {here['date']})"
    )
    described = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: described | {"device": "another"})
    machine.note(tmp_path, 5)
    assert [where["device"] for where in machine.read(tmp_path)] == [here["device"], "another"]


def test_a_machine_that_saved_nothing_is_forgotten(tmp_path, monkeypatch):
    """Started on the wrong one and stopped before the first checkpoint; the same later, at step 10."""
    described = machine.describe()
    for at, device in ((0, "wrong"), (0, "right"), (10, "wrong"), (10, "right"), (20, "other")):
        monkeypatch.setattr(machine, "describe", lambda device=device: described | {"device": device})
        machine.note(tmp_path, at)
    assert [(where["step"], where["device"]) for where in machine.read(tmp_path)] == [(0, "right"), (20, "other")]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"device": "x"}]', "[" * 100_000])
def test_another_file_says_nothing(text, tmp_path):
    (tmp_path / machine.FILE).write_text(text)
    assert machine.read(tmp_path) == []


@pytest.mark.parametrize("date", [5, None, "yesterday"])
def test_a_machine_without_its_day_says_nothing(date, tmp_path):
    (tmp_path / machine.FILE).write_text(json.dumps([machine.describe() | {"date": date}]))
    assert machine.read(tmp_path) == []


def test_a_file_that_cannot_be_read_is_kept(tmp_path, caplog):
    (tmp_path / machine.FILE).write_text('[{"device": "x"}]')
    machine.note(tmp_path, 0)
    assert len(machine.read(tmp_path)) == 1 and "is kept as machines.1.json" in caplog.text
    assert (tmp_path / "machines.1.json").read_text() == '[{"device": "x"}]'
