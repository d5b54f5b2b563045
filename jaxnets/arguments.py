"""Arguments that several commands take."""

import argparse
import ast
import math
from typing import Any

from jaxnets.errors import UserError
from jaxnets.weights.weight_files import Triple


def count(text: str) -> int:
    """The value of an argument such as `--batch_size=32`."""
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number of at least 1")
    return int(text)


def triple(text: str) -> Triple:
    """The value of a `--mean=R,G,B` argument."""
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        red = green = blue = math.nan
    if not math.isfinite(red + green + blue):
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers such as 0.5,0.5,0.5")
    return red, green, blue


def check_deviation(std: Triple | None) -> None:
    """UserError unless every value of `--std` is above 0, since images are divided by it."""
    if std and min(std) <= 0:
        raise UserError(f"--std={std} must be greater than 0 in every channel")


def field(text: str) -> tuple[str, Any]:
    """The name and value of a `--field=NAME=VALUE` argument."""
    name, equals, value = text.partition("=")
    if not (name and equals) or name == "name":
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as shortcut=identity")
    return name, literal(value)


def literal(text: str) -> Any:
    """The value of a text that is a Python literal, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
