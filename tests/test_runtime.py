"""Log lines go to standard error; the compilation cache and XLA's flags are as the user says."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxnets import runtime
from jaxnets.errors import UserError


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.cache_directory() == tmp_path / "jaxnets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runtime.cache_directory() == tmp_path / ".cache" / "jaxnets"


def test_without_a_home_folder_the_cache_needs_a_name(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(UserError, match="set HOME or XDG_CACHE_HOME"):
        runtime.cache_directory()


@pytest.mark.parametrize(("platform", "says"), [("cuda", "plugin"), ("none", "'none' is not in the list")])
def test_a_platform_that_is_not_there_is_one_sentence(platform, says):
    code = "from jaxnets import errors, runtime; errors.exit_on_user_error(lambda _: runtime.require_device())(())"
    env = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if platform == "cuda" and not done.returncode:
        pytest.skip("there is a GPU")
    line = done.stderr.splitlines()[-1]  # before it JAX may have logged why its plugin did not start
    assert done.returncode == 1 and line.startswith(f"error: JAX_PLATFORMS={platform}: JAX has no such device")
    assert says in line


@pytest.mark.parametrize(("share", "told"), [(1, "1"), (2, None)])
def test_xla_is_told_of_a_containers_share_of_the_cores(share, told, monkeypatch):
    monkeypatch.setenv("NPROC", "")  # to be put back as it was
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr(runtime.cores, "count", lambda: share)
    monkeypatch.setattr(runtime.cores, "usable", lambda: {0, 1})
    runtime.share_cores()
    assert os.environ.get("NPROC") == told


def test_log_lines_go_to_standard_error_once(capsys):
    runtime.configure_logging()
    runtime.configure_logging()
    runtime.logger.info("one line of %d", 1)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("one line of 1") == 1


XLA_CACHES = "jax_persistent_cache_enable_xla_caches"


@pytest.fixture
def xla_caches():
    """The cache of XLA that JAX turns on by default."""
    before = getattr(jax.config, XLA_CACHES)
    jax.config.update(XLA_CACHES, "xla_gpu_per_fusion_autotune_cache_dir")
    yield
    jax.config.update(XLA_CACHES, before)


def test_what_was_fastest_in_an_earlier_run_decides_nothing_in_a_deterministic_one(xla_caches, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    runtime.make_deterministic()
    assert not getattr(jax.config, XLA_CACHES)


def test_what_xla_is_told_for_determinism_is_told_once_and_never_against_the_user(xla_caches, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=somewhere")
    runtime.make_deterministic()
    runtime.make_deterministic()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=somewhere --xla_gpu_deterministic_ops=true"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    runtime.make_deterministic()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false"


def test_a_terminal_that_closed_ends_nothing(monkeypatch):
    def fails(text):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    runtime.configure_logging()
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=fails, flush=lambda: None))
    runtime.logger.info("saved step 5")


def test_a_machine_without_enough_memory_is_one_sentence():
    with (
        pytest.raises(UserError, match=r"^this machine does not have enough memory \(Unable to .* 9 EiB\): take less$"),
        runtime.short_of_memory("take less"),
    ):
        raise MemoryError("Unable to allocate 9 EiB")


def test_a_device_without_enough_memory_is_one_sentence_and_other_errors_stay():
    with (
        pytest.raises(
            UserError, match=r"^the device does not have enough memory \(RESOURCE_EXHAUSTED: 8 bytes\): take less$"
        ),
        runtime.short_of_memory("take less"),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 8 bytes\nmore of it")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), runtime.short_of_memory("take less"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
