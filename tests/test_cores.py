"""The cores that a process may use."""

import os
import subprocess
import sys

import pytest

from jaxnets import cores


def test_all_of_the_machine_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores.usable() == set(range(os.cpu_count()))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
def test_a_process_that_is_bound_to_one_core_has_that(repository):
    code = "import os; own = min(os.sched_getaffinity(0)); os.sched_setaffinity(0, {own})\n"
    code += "from jaxnets import cores; print(cores.usable() == {own})"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("text", "most"),
    [("100000 100000", 1), ("50000 100000", 1), ("150000 100000", 2), ("max 100000", 2), ("", 2), (None, 2)],
)
def test_a_container_keeps_no_more_at_work_than_its_quota(text, most, tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "usable", lambda: {3, 5})
    if text is not None:
        (tmp_path / "cpu.max").write_text(f"{text}\n")
    assert cores.count() == most
