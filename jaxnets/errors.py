"""How the commands speak to their user when something is wrong: one sentence, status 1."""

import argparse
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: the message says what, where, and what would be right."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that a bad argument is a `UserError` like any other bad input."""

    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the arguments)")


def exit_on_user_error(main: Callable) -> Callable:
    """Wrap a command's `main(argv)`: a `UserError` ends it with one line on standard error and status 1."""

    def wrapped(argv):
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    return wrapped
