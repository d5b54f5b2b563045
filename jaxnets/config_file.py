"""Configuration files for commands that take more than one, or fields of their own beside them."""

import re
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxnets.errors import UserError

PREFIX = "--config."


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The configuration of `path[:VARIANT]` with `overrides`, each `--config.FIELD=VALUE`; of two the later counts.

    Raises UserError where there is no such file, variant or field, or the field cannot have the value.
    """
    check_overrides(overrides)
    if not Path(path.split(":")[0]).is_file():
        raise UserError(f"--config={path} cannot be loaded: there is no such file here")
    # Only the last of each: given twice, a tuple's flag would hold the items of both.
    last = {override.split("=")[0]: override for override in overrides}
    argv = ["", f"--config={path}", *last.values()]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "A configuration.", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except flags.Error as error:  # of a configuration file that fails, the last line says why
        raise UserError(" ".join((str(error).splitlines()[0], *str(error).strip().splitlines()[1:][-1:]))) from None
    except (AttributeError, KeyError) as error:
        fields = [override.removeprefix(PREFIX).split("=")[0] for override in overrides]
        unknown = [field for field in fields if f"'{field.split('.')[-1]}" in str(error).replace("\\", "")] or fields
        hint = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f"did you mean {hint[1]}? " if hint else ""
        raise UserError(f"{path} has no field {unknown[0]}; {hint}configs/default.py lists them all") from None
    config = values["config"].value
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={path} cannot be loaded: it fails when it is run")
    return config


def check_overrides(arguments: Sequence[str]) -> None:
    """UserError unless each is of the form `--config.FIELD=VALUE`."""
    for argument in arguments:
        if not argument.startswith(PREFIX) or "=" not in argument:
            raise UserError(f"unexpected argument {argument!r}; fields are set as --config.FIELD=VALUE")


def name_of(path: str) -> str:
    """What a configuration is called: its file's name and its words, `mnv2_x0_5` for `configs/mnv2.py:x0_5`."""
    file, *variant = path.split(":")
    return "_".join([Path(file).stem, *variant]).replace(",", "_")
