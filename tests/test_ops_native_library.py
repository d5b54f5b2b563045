"""The kernels' build: cached, safe with several processes, and done without where it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_without_a_compiler(tmp_path):
    nowhere = {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
    out, (line,) = finish(start(tmp_path, **nowhere))
    assert out == ["False xla", "72.0"]
    assert "no C++ compiler" in line

    out, _ = finish(start(tmp_path, JAXNETS_OPS="native", **nowhere))
    assert out[-1].startswith("UserError")
    assert "JAXNETS_OPS=xla" in out[-1]


def test_a_source_that_does_not_compile(tmp_path):
    source = tmp_path / "broken.cc"
    source.write_text("this is no C++")
    out, (line,) = finish(start(tmp_path, source))
    assert out == ["False xla", "72.0"]
    assert "failed with status 1" in line
    assert not list((tmp_path / "jaxnets" / "native").iterdir())


def test_a_library_without_the_kernels(tmp_path):
    source = tmp_path / "empty.cc"
    source.write_text("int nothing;")
    out, (_, line) = finish(start(tmp_path, source))
    assert out == ["False xla", "72.0"]
    assert "undefined symbol" in line


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "jaxnets").write_text("a file where the folder would be")
    out, (line,) = finish(start(tmp_path))
    assert out == ["False xla", "72.0"]
    assert "not available" in line
