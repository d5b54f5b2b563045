"""The kernels' build: cached, safe with several processes, and done without where it fails."""

import logging
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxnets import ops
from jaxnets.errors import UserError
from jaxnets.ops.native import library as native_library

CODE = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
import jax.numpy as jnp
from jaxnets import ops
from jaxnets.ops.native import library as native_library
if SOURCE: native_library.SOURCE = __import__("pathlib").Path(SOURCE)
try:
    print(native_library.available(), ops.formulation())
    if not FAKE: print(float(ops.depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))).sum()))
except ValueError as error:
    print(type(error).__name__, error)
"""
# What it takes to be registered; the kernels themselves take half a minute to build, as all other tests have them.
FAKE = """
#include "xla/ffi/api/c_api.h"
extern "C" bool keep_buffers() { return false; }
static XLA_FFI_Error* tell_version(XLA_FFI_CallFrame* frame) {
  auto* asked = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
  asked->metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  asked->metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return nullptr;
}
"""
FAKE += "".join(
    f'extern "C" XLA_FFI_Error* {name}(XLA_FFI_CallFrame* frame) {{ return tell_version(frame); }}\n'
    for name in native_library.HANDLERS
)
SLOW_COMPILER = """#!/bin/sh
case "$*" in *--version*) ;; *) sleep 1 ;; esac
exec {compiler} "$@"
"""


@pytest.fixture(autouse=True)
def _compiler():
    if not any(shutil.which(name) for name in native_library.COMPILERS):
        pytest.skip("needs a C++ compiler")


def start(cache, source="", fake=False, **variables):
    """A process with a cache and a source of its own, which computes a depthwise convolution by kernels not `fake`."""
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "XDG_CACHE_HOME": str(cache), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", f"SOURCE, FAKE = {str(source)!r}, {fake}\n{CODE}"], env=env, **pipes)


def finish(process):
    """What it printed, line by line, and what the operators logged."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    about = [line for line in err.splitlines() if line.startswith("operators:") and "keeps its buffers" not in line]
    return out.splitlines(), about


def test_processes_that_start_at_once_and_after(tmp_path):
    """One builds, and the other waits for it."""
    (source := tmp_path / "fake.cc").write_text(FAKE)
    compiler = next(filter(shutil.which, native_library.COMPILERS))
    (slow := tmp_path / "slow").write_text(SLOW_COMPILER.format(compiler=compiler))
    slow.chmod(0o755)

    def begin():
        return start(tmp_path, source, fake=True, CXX=str(slow))

    (out, log), (other_out, other_log) = map(finish, [begin(), begin()])
    assert out == other_out == ["True native"]
    assert sum("built" in line for line in log + other_log) == 1
    assert all("built" in line or "waiting for another process" in line for line in log + other_log)
    folder = tmp_path / "jaxnets" / "native"
    (library,) = folder.iterdir()
    assert library.suffix == ".so"
    assert finish(begin()) == (["True native"], [])

    library.write_bytes(b"damaged")
    out, (line,) = finish(begin())
    assert out == ["True native"]
    assert "built" in line


@pytest.fixture
def load(monkeypatch, tmp_path, caplog):
    """A function that loads the kernels of a source, by a compiler, from a cache of its own: why it failed, if it did.

    It registers nothing with XLA, which has the kernels of the other tests.
    """
    monkeypatch.setattr(native_library, "HANDLERS", ())
    monkeypatch.setattr(native_library, "_keep_buffers", lambda library: library.depthwise)
    caplog.set_level(logging.INFO, logger="jaxnets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def load(source: str | None = None, compiler: str | None = None) -> str | None:
        if source is not None:
            (tmp_path / "source").mkdir(exist_ok=True)
            (path := tmp_path / "source" / "kernels.cc").write_text(source)
            monkeypatch.setattr(native_library, "SOURCE", path)
        if compiler is not None:
            monkeypatch.setenv("CXX", compiler)
            monkeypatch.setenv("PATH", str(tmp_path))
        caplog.clear()
        return native_library._load.__wrapped__()[1]

    return load


def test_without_a_compiler(tmp_path):
    out, (line,) = finish(start(tmp_path, PATH=str(tmp_path), CXX="no-such-compiler"))
    assert out == ["False xla", "72.0"]
    assert "no C++ compiler" in line


def test_without_a_compiler_what_one_has_built_serves(load, caplog):
    assert load(FAKE) is None and "built the native kernels" in caplog.text
    assert load(compiler="no-such-compiler") is None and "built" not in caplog.text
    assert "no C++ compiler" in load(FAKE + "// another", "no-such-compiler")


def test_what_is_asked_for_and_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(native_library, "_problem", lambda: "no C++ compiler")
    monkeypatch.setenv("JAXNETS_OPS", "native")
    with pytest.raises(UserError, match=r"not available \(no C\+\+ compiler\): use JAXNETS_OPS=xla"):
        ops.formulation()


def test_a_source_that_does_not_compile(load, caplog, tmp_path):
    assert "failed with status 1" in load("this is no C++")
    assert "not available, using xla's" in caplog.text
    assert not list((tmp_path / "jaxnets" / "native").iterdir())


def test_a_library_without_the_kernels(load):
    assert "undefined symbol" in load("int nothing;")


def test_a_cache_that_cannot_be_written(load, tmp_path):
    (tmp_path / "jaxnets").write_text("a file where the folder would be")
    assert "Not a directory" in load(FAKE)


def test_a_cache_from_which_nothing_may_run_is_not_built_in_at_every_start(load, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert "noexec" in load(FAKE)
    assert not list((tmp_path / "jaxnets" / "native").iterdir())
