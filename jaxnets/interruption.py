"""SIGINT, SIGTERM and SIGHUP: a command ends within seconds and says so; a run saves first what it has to save.

Imports no JAX, so that a command can begin with it.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

GRACE_SECONDS = 5.0  # for what is open to be closed, before the process ends as it is
# Within this time a signal repeats the one before: `timeout` sends its own to the command and to its group, a parent
# passes a terminal's Ctrl-C on to a command that got it too, and systemd may send SIGHUP right after SIGTERM.
ECHO_SECONDS = 1.0
SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides
# A terminal that closes sends SIGHUP; under nohup it is ignored, and stays so.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    SIGNALS += (signal.SIGHUP,)
ENDED = "ended; the same command takes it up again"

_deferring = False  # whether a run is asked to end by being told so
_said = False  # whether the log has the line of the end
_logger = logging.getLogger("jaxnets")


class Ended(SystemExit):
    """The process was asked to end where there was nothing to save."""


class Interrupted(Exception):
    """The run was asked to end, and what it has to save is saved, or to be saved before it ends."""


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
    """Have Ctrl-C end this command without a word while it imports; `errors.exit_on_user_error` takes over then."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_at_once() -> None:
    """Have the `SIGNALS` end this command with one line and the shell's status, from its imports on.

    Wherever it is: Python acts on a signal between two of its instructions only, and may be compiling, or waiting for
    another process, for minutes. What `raised` and `deferred` make of a signal counts while they are open.
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
    """End the process where its main thread has not, in time, after a signal that nobody deferred."""
    while True:
        signum = os.read(reader, 1)[0]
        if signum in SIGNALS and not _deferring:
            time.sleep(GRACE_SECONDS)
            if not _said:
                _say(signum, ENDED)
            leave(128 + signum)


def leave(status: int) -> None:
    """End the process as it is, but for the terminal."""
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, SHOW_CURSOR)
    os._exit(status)


def _say(signum: int, what: str) -> None:
    """One line of the log; by `os.write`, since a signal may come in the midst of writing another."""
    global _said
    _said = True
    if _logger.level <= logging.INFO:  # of several processes the first speaks
        line = f"{time.strftime('%H:%M:%S')} {signal.Signals(signum).name}: {what}\n"
        with contextlib.suppress(OSError):
            os.write(2, (("\n" if os.isatty(2) else "") + line).encode())


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within it the first of the `SIGNALS` raises Ended, so that what is open is closed; a second ends the process.

    What comes within ECHO_SECONDS is no second one.
    """

    def end(signum):
        _say(signum, ENDED)
        raise Ended(128 + signum)

    before = sys.unraisablehook

    def quietly(unraisable):
        # Raised where Python cannot pass an exception on, as in `__del__`: `_watch` ends the process all the same.
        if not isinstance(unraisable.exc_value, Ended):
            before(unraisable)

    sys.unraisablehook = quietly
    try:
        with _handled(end):
            yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def deferred(interruption: Interruption) -> Iterator[None]:
    """Within it the first of the `SIGNALS` is noted for the caller to act on; a second, as in `raised`, ends all."""
    global _deferring

    def note(signum):
        interruption.signum = signum
        _say(signum, "saving after the steps in flight; again to end at once")

    _deferring = True
    try:
        with _handled(note):
            yield
    finally:
        _deferring = False


@contextlib.contextmanager
def _handled(first: Callable[[int], None]) -> Iterator[None]:
    """Have `first` called with the first of the signals, and the process ended by the second, unless it is an echo."""
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
