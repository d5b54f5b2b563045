"""Signals are noted and handed back; the compilation cache goes where the user says."""

import os
import signal
import subprocess
import sys

import pytest

from jaxnets import runtime


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_its_handler_comes_back(signum):
    before = signal.getsignal(signum)
    with runtime.deferred_interrupts() as interruption:
        interruption.raise_if_asked()
        os.kill(os.getpid(), signum)
        with pytest.raises(runtime.Interrupted):
            interruption.raise_if_asked()
        assert interruption.status == 128 + signum
    assert signal.getsignal(signum) is before


def test_a_second_signal_ends_the_process():
    code = (
        "import os, signal\nfrom jaxnets import runtime\n"
        "with runtime.deferred_interrupts():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGTERM and ended.stdout == ""


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.cache_directory() == tmp_path / "jaxnets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runtime.cache_directory() == tmp_path / ".cache" / "jaxnets"


def test_log_lines_go_to_standard_error_once(capsys):
    runtime.configure_logging()
    runtime.configure_logging()
    runtime.logger.info("one line of %d", 1)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("one line of 1") == 1


def test_what_xla_is_told_for_determinism_is_told_once_and_never_against_the_user(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=somewhere")
    runtime.make_deterministic()
    runtime.make_deterministic()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=somewhere --xla_gpu_deterministic_ops=true"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    runtime.make_deterministic()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false"
