"""Log lines go to standard error; the compilation cache and XLA's flags are as the user says."""

import os
import sys

from jaxnets import runtime


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


def test_answers_that_come_too_late_are_dropped_and_nothing_else(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    runtime.drop_late_answers()
    hook = sys.unraisablehook
    runtime.drop_late_answers()
    assert sys.unraisablehook is hook

    class Falling:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    for message in ("Event loop is closed", "something else"):
        Falling(message)
    assert seen == ["something else"]
