"""A signal ends a command at once, with one line; a run is told of it, and saves first."""

import os
import signal
import subprocess
import sys

import pytest

from jaxnets import interruption

SIGNALS = interruption.SIGNALS


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_deferred_signal_is_noted_and_its_handler_comes_back(signum):
    before = signal.getsignal(signum)
    asked = interruption.Interruption()
    with interruption.deferred(asked):
        asked.raise_if_asked()
        os.kill(os.getpid(), signum)
        with pytest.raises(interruption.Interrupted):
            asked.raise_if_asked()
        assert asked.status == 128 + signum
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_raised_signal_closes_what_is_open(signum, capfd):
    before = signal.getsignal(signum)
    closed = []
    with pytest.raises(SystemExit) as ended, interruption.raised():
        try:
            os.kill(os.getpid(), signum)
        finally:
            closed.append(1)
    assert ended.value.code == 128 + signum and closed
    assert signal.getsignal(signum) is before
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{signum.name}: ended; the same command resumes it" in line


KILL = "os.kill(os.getpid(), signal.SIGTERM)"
PROGRAMS = {
    "twice": (
        "interruption.ECHO_SECONDS = 0.1\n"
        f"with interruption.deferred(interruption.Interruption()):\n    {KILL}\n    time.sleep(0.2)\n    {KILL}"
    ),
    "and by another": (
        "interruption.ECHO_SECONDS = 0.1\n"
        f"with interruption.deferred(interruption.Interruption()):\n    {KILL}\n    time.sleep(0.2)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    ),
    "at once": f"interruption.end_at_once()\n{KILL}",
    "where no exception passes": (
        "class Thing:\n"
        "    def __del__(self):\n"
        f"        {KILL}\n"
        "interruption.end_at_once()\n"
        "with interruption.raised():\n"
        "    Thing()\n"
        "    time.sleep(60)"
    ),
    # A lock that its own thread holds: no instruction of Python comes after it.
    "in C": (
        "interruption.end_at_once()\n"
        "lock = ctypes.create_string_buffer(128)\n"
        "with interruption.raised():\n"
        f"    threading.Timer(0.2, lambda: {KILL}).start()\n"
        "    for _ in range(2):\n"
        "        ctypes.CDLL(None).pthread_mutex_lock(lock)"
    ),
}


@pytest.mark.parametrize("place", PROGRAMS)
def test_a_signal_ends_the_process_wherever_it_is(repository, place):
    code = (
        "import ctypes, os, signal, threading, time\nfrom jaxnets import interruption\n"
        f"interruption.GRACE_SECONDS = 0.5\n{PROGRAMS[place]}\nprint('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, timeout=300)
    last = signal.SIGINT if "SIGINT" in PROGRAMS[place] else signal.SIGTERM
    assert ended.returncode == 128 + last and ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1 and "SIGTERM: " in ended.stderr


@pytest.mark.parametrize("again", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_comes_twice_at_once_is_one(repository, again):
    """As `timeout` sends it, to the command and to its group; or with SIGHUP after it, as systemd may."""
    kills = f"    {KILL}\n    os.kill(os.getpid(), signal.{again})\n"
    code = (
        "import os, signal\nfrom jaxnets import interruption\nasked = interruption.Interruption()\n"
        f"with interruption.deferred(asked):\n{kills}    print('saved', asked.status)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, f"saved {128 + signal.SIGTERM}\n")


@pytest.mark.parametrize(("ignored", "said"), [(True, "still here"), (False, "SIGHUP: ended; the same command")])
def test_a_terminal_that_closes_ends_it_but_under_nohup(repository, ignored, said):
    action = "signal.SIG_IGN" if ignored else "signal.SIG_DFL"
    code = (
        f"import os, signal\nsignal.signal(signal.SIGHUP, {action})\nfrom jaxnets import interruption\n"
        "interruption.end_at_once()\nos.kill(os.getpid(), signal.SIGHUP)\nprint('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, timeout=300)
    assert said in ended.stdout + ended.stderr
    assert ended.returncode == (0 if ignored else 128 + signal.SIGHUP)


def test_a_command_that_begins_with_it_has_not_imported_jax(repository):
    code = "import sys\nfrom jaxnets import interruption\nassert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository)


def test_errors_that_come_too_late_are_dropped_and_no_others(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    interruption.drop_late_errors.__wrapped__()

    class Falling:
        def __init__(self, error):
            self.error = error

        def __del__(self):
            raise self.error

    for error in (RuntimeError("Event loop is closed"), interruption.Ended(143), RuntimeError("something else")):
        Falling(error)
    assert seen == ["something else"]
