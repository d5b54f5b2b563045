"""How the commands report errors to their user: one sentence, status 1."""

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

NOTHING_LOST = "what was saved before is unchanged, and the same command resumes from there once there is room"


def printable(text: str) -> str:
    """The text with escapes for what a terminal would obey rather than show: line ends, control sequences."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def as_utf8(text: str) -> str:
    """The text with replacements for what UTF-8 cannot encode: lone surrogates, as from a file name in Latin-1."""
    return re.sub(r"[\ud800-\udfff]", "\ufffd", text)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, shortened; its type's name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class UserError(ValueError):
    """Bad input: the message says what, where, and what would be right.

    The message is one line that any terminal can show: names read from files may hold line ends and control sequences.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


@contextlib.contextmanager
def writing(path: Path, consequence: str = f"; {NOTHING_LOST}") -> Iterator[None]:
    """UserError if a file (by default, of a run) cannot be written: a full disk, a limit, a read-only folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}{consequence}") from error


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, except that a bad or abbreviated argument is a `UserError` like any other bad input."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)  # else --seed would be taken for --seeds

    def parse_mixed_args(self, args: Sequence[str]) -> argparse.Namespace:
        """`parse_args`, with positional arguments before and after options; after `--` there are no options."""
        return self.parse_args(args) if "--" in args else self.parse_intermixed_args(args)

    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the arguments)")


def _leave_output() -> None:
    """Discard output that is not written yet: Python flushes once more as it exits, and would fail again."""
    with contextlib.suppress(OSError, ValueError):  # in a test, which has no file there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_on_user_error(main: Callable) -> Callable:
    """Wrap a command's `main(argv)`: a `UserError` ends it with one line on standard error and status 1.

    So does a file that cannot be opened. If nobody reads its output any longer, as with `| head`, it ends
    quietly, also with status 1.
    """

    def wrapped(argv):
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # by `interruption.end_quietly`
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(AttributeError):  # a test's or a notebook's own
            sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal's encoding lacks
        try:
            result = main(argv)
            sys.stdout.flush()
            return result
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except BrokenPipeError:
            _leave_output()
            sys.exit(1)
        except OSError as error:
            if error.filename is not None:
                print(f"error: {printable(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
                sys.exit(1)
            try:
                sys.stdout.flush()
            except OSError:  # standard output is on a full disk: the error names no file
                print(f"error: standard output: {error.strerror}", file=sys.stderr)
                _leave_output()
                sys.exit(1)
            raise

    return wrapped
