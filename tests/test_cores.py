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
