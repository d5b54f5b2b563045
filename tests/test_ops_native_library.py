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
native_library.FLAGS = [flag.replace("-O3", "-O0") for flag in native_library.FLAGS]  # quick to build
if SOURCE: native_library.SOURCE = __import__("pathlib").Path(SOURCE)
print(native_library.available(), ops.formulation())
try:
    print(float(ops.depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))).sum()))
except ValueError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(autouse=True)
def _compiler():
    if not any(shutil.which(name) for name in native_library.COMPILERS):
        pytest.skip("needs a C++ compiler")


def start(cache, source="", **variables):
    """A process that computes a depthwise convolution with a cache and a source of its own."""
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "XDG_CACHE_HOME": str(cache), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", f"SOURCE = {str(source)!r}\n{CODE}"], env=env, **pipes)


def finish(process):
    """What it printed, line by line, and what the operators logged."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    about = [line for line in err.splitlines() if line.startswith("operators:") and "keeps its buffers" not in line]
    return out.splitlines(), about


def test_processes_that_start_at_once_and_after(tmp_path):
    """One builds, and the other waits for it."""
    (out, log), (other_out, other_log) = map(finish, [start(tmp_path), start(tmp_path)])
    assert out == other_out == ["True native", "72.0"]
    assert sum("built" in line for line in log + other_log) == 1
    assert all("built" in line or "waiting for another process" in line for line in log + other_log)
    folder = tmp_path / "jaxnets" / "native"
    (library,) = folder.iterdir()
    assert library.suffix == ".so"
    assert finish(start(tmp_path)) == (["True native", "72.0"], [])

    library.write_bytes(b"damaged")
    out, (line,) = finish(start(tmp_path))
    assert out == ["True native", "72.0"]
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
