"""Configuration files as flags: loaded with fields of their own beside them, and what is wrong said in a sentence."""

import re
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxnets.errors import UserError

PREFIX = "--config."


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The configuration of `path[:WORDS]` with `overrides`, each `--config.FIELD=VALUE`; of two the later counts.

    Raises UserError where there is no such file, word or field, or the field cannot have the value.
    """
    check_overrides(overrides)
    # Only the last of each: given twice, a tuple's flag would hold the items of both.
    last = {override.split("=")[0]: override for override in overrides}
    argv = ["", f"--config={path}", *last.values()]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "A configuration.", flag_values=values, sys_argv=argv)
    parse(values, argv)
    return require_config(values["config"].value, path)


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Give flags, of which one is the configuration `config`, their values; the arguments that are none.

    Raises UserError for what is no flag, no field of the configuration or no value for it, and for a configuration
    that fails: it is a program, which may fail in any way.
    """
    try:
        return values(argv)
    except flags.Error as error:  # with absl's sentence first, and last why the configuration failed, if it did
        first, *others = str(error).replace(r"\n", "\n").strip().splitlines()
        why = [line.removeprefix("jaxnets.errors.UserError: ") for line in others[-1:]]
        raise UserError(" ".join((first, *why))) from None
    except Exception as error:
        path = path_of(argv)
        if not is_file(path):
            raise UserError(f"--config={path} cannot be loaded: there is no such file here") from None
        message = str(error).replace("\\", "")
        fields = [arg.lstrip("-").removeprefix("config.").split("=")[0] for arg in argv if "config." in arg]
        if unknown := [field for field in fields if any(f"'{part}" in message for part in field.split("."))]:
            hint = re.search(r'Did you mean "(\w+)"', message)
            hint = f"did you mean {hint[1]}? " if hint else ""
            raise UserError(f"{path} has no field {unknown[0]}; {hint}configs/default.py lists them all") from None
        raise UserError(f"--config={path} cannot be loaded: {type(error).__name__}: {error}") from None


def path_of(argv: Sequence[str]) -> str:
    """What `--config=PATH` or `--config PATH` names, "" without."""
    for arg, after in zip(argv, [*argv[1:], ""]):
        if found := re.fullmatch(r"--?config(=(.*))?", arg):
            return after if found[1] is None else found[2]
    return ""


def require_config(value: object, path: str) -> ml_collections.ConfigDict:
    """The value of a configuration's flag; UserError where that is no configuration."""
    if isinstance(value, ml_collections.ConfigDict):
        return value
    why = "its get_config gives no ConfigDict" if is_file(path) else "there is no such file here"
    try:
        hasattr(value, "get")
    except OSError as error:  # what stands for a configuration that could not open a file, itself or another
        why = str(error.__cause__ or error) if is_file(path) else why
    raise UserError(f"--config={path} cannot be loaded: {why}")


def is_file(path: str) -> bool:
    """Whether there is a file for `path[:WORDS]`."""
    return Path(path.split(":")[0]).is_file()


def check_overrides(arguments: Sequence[str]) -> None:
    """UserError unless each is of the form `--config.FIELD=VALUE`."""
    for argument in arguments:
        if not argument.startswith(PREFIX) or "=" not in argument:
            raise UserError(f"unexpected argument {argument!r}; fields are set as --config.FIELD=VALUE")


def name_of(path: str) -> str:
    """What a configuration is called: its file's name and its words, `mnv2_x0_5` for `configs/mnv2.py:x0_5`."""
    file, *words = path.split(":")
    return "_".join([Path(file).stem, *words]).replace(",", "_")
