"""Memory that is kept: a buffer freed and asked for again costs no page faults."""

import os
import platform
import subprocess
import sys

import pytest

from jaxnets import memory

CODE = """
import resource, sys
if sys.argv[1] == "keep":
    import jaxnets
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = libc.malloc(100 << 20)
    ctypes.memset(buffer, 1, 100 << 20)
    libc.free(buffer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(repository, *words, **environment):
    command = [sys.executable, "-c", CODE, *words]
    clean = {name: value for name, value in os.environ.items() if name not in (memory.SWITCH, "GLIBC_TUNABLES")}
    ended = subprocess.run(
        command, env={**clean, **environment}, cwd=repository, capture_output=True, text=True, check=True
    )
    return int(ended.stdout)


def test_freed_memory_is_kept_where_that_is_asked_for(repository, monkeypatch):
    monkeypatch.setenv(memory.SWITCH, "1")
    if not memory.keep_freed():
        pytest.skip("not glibc, or an accelerator is there")
    assert faults(repository, "keep", **{memory.SWITCH: "1"}) < 100
    assert faults(repository, "as it is") > 1000
    assert faults(repository, "keep") > 1000


def test_nothing_is_done_for_another_c_library(monkeypatch):
    monkeypatch.setenv(memory.SWITCH, "1")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed()
