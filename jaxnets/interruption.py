"""SIGINT, SIGTERM and SIGHUP: a command ends within seconds and says so; a run first saves what it has to save.

Imports no JAX, so that a command can begin with it.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

GRACE_SECONDS = 5.0  # for closing what is open, before the process is ended as it is
# Within this time after the first signal, another is its echo: `timeout` signals both the command and its group, a
# parent passes a terminal's Ctrl-C on to a command that got it too, and systemd may send SIGHUP right after SIGTERM.
ECHO_SECONDS = 1.0
SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides
# A terminal that closes sends SIGHUP; under nohup it is ignored, and stays so.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    SIGNALS += (signal.SIGHUP,)
ENDED = "ended; the same command resumes it"

_deferring = False  # whether a signal is only noted, for a run to end by itself
_said = False  # whether the line about the end is logged
_logger = logging.getLogger("jaxnets")


class Ended(SystemExit):
    """The process was asked to end where there was nothing to save."""


class Interrupted(Exception):
    """The run was asked to end; what it has to save is saved, or will be before it ends."""


class Interruption:
    """Whether the user or the system has asked this process to end, and by which signal."""

    signum: int | None = None

    def asked(self) -> bool:
        return self.signum is not None

    def raise_if_asked(self) -> None:
        if self.asked():
            raise Interrupted

    @property
    def status(self) -> int:
        """The shell's exit status for a process that ended on the signal."""
        return 128 + self.signum


def end_quietly() -> None:
    """Let Ctrl-C end this command silently while it imports; then `errors.exit_on_user_error` takes over."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_at_once() -> None:
    """Let the `SIGNALS` end this command with one line and the shell's status, from its imports on.

    Wherever it is: Python handles a signal only between two of its instructions, and may be compiling, or waiting for
    another process, for minutes. While `raised` or `deferred` is open, that decides what a signal does.
    """

    def end(signum, _frame):
        _say(signum, ENDED)
        leave(128 + signum)

    for signum in SIGNALS:
        signal.signal(signum, end)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _watch(reader: int) -> None:
    """End the process if its main thread has not done so in time, after a signal that nobody deferred."""
    while True:
        signum = os.read(reader, 1)[0]
        if signum in SIGNALS and not _deferring:
            time.sleep(GRACE_SECONDS)
            if not _said:
                _say(signum, ENDED)
            leave(128 + signum)


def leave(status: int) -> None:
    """End the process as it is, except that the terminal gets its cursor back."""
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, SHOW_CURSOR)
    os._exit(status)


def _say(signum: int, what: str) -> None:
    """Log one line; by `os.write`, since a signal may come while another line is being written."""
    global _said
    _said = True
    if _logger.level <= logging.INFO:  # of several processes, only process 0 logs it
        line = f"{time.strftime('%H:%M:%S')} {signal.Signals(signum).name}: {what}\n"
        with contextlib.suppress(OSError):
            os.write(2, (("\n" if os.isatty(2) else "") + line).encode())


@functools.cache
def drop_late_errors() -> None:
    """Silence, from now on, two errors that come where Python can only report them.

    `Ended`, raised within a `__del__`, say: `_watch` still ends the process. And "Event loop is closed", TensorStore's
    replies after an error made Orbax stop waiting.
    """
    report = sys.unraisablehook

    def report_others(unraisable):
        error = unraisable.exc_value
        if not isinstance(error, Ended) and str(error) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within the block, the first of the `SIGNALS` raises Ended, to close what is open; a second ends the process.

    One that comes within ECHO_SECONDS does not count as a second.
    """

    def end(signum):
        _say(signum, ENDED)
        raise Ended(128 + signum)

    drop_late_errors()
    with _handled(end):
        yield


@contextlib.contextmanager
def deferred(interruption: Interruption) -> Iterator[None]:
    """Within the block, the first of the `SIGNALS` is noted for the caller; as in `raised`, a second ends all."""
    global _deferring

    def note(signum):
        interruption.signum = signum
        _say(signum, "saving after the steps in flight; another signal ends it at once")

    _deferring = True
    try:
        with _handled(note):
            yield
    finally:
        _deferring = False


@contextlib.contextmanager
def _handled(first: Callable[[int], None]) -> Iterator[None]:
    """Call `first` with the first of the signals, and end the process on the second, unless it is an echo."""
    received: float | None = None  # when the first came

    def handle(signum, _frame):
        nonlocal received
        if received is None:
            received = time.monotonic()
            first(signum)
        elif time.monotonic() > received + ECHO_SECONDS:
            leave(128 + signum)

    before = {signum: signal.signal(signum, handle) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
