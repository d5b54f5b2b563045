"""Configuration files as flags: loaded with overrides of their fields, and errors explained in one sentence."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxnets.errors import UserError

PREFIX = "--config."
FIELD = re.compile(r"--?config\.([\w.]+)=")


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The configuration of `path[:WORDS]` with `overrides`, each `--config.FIELD=VALUE`; the later of two wins.

    Raises UserError if there is no such file, word or field, or the field cannot have the value.
    """
    check_overrides(overrides)
    argv = ["", f"--config={path}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "A configuration.", flag_values=values, sys_argv=argv)
    parse(values, argv)
    return require_config(values["config"].value, path)


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parse flags, one of which is the configuration `config`; returns the arguments that are not flags.

    If a field is given twice, the later value wins. Raises UserError for an unknown flag or field, a value that a field
    cannot have, two configurations, and one that fails: it is a program, which may fail in any way.
    """
    if len(paths := paths_of(argv)) > 1:
        raise UserError(f"--config is given {len(paths)} times, as {' and as '.join(paths)}; a run takes one")
    path = next(iter(paths), "")
    # If given twice, a tuple's flag would hold the items of both.
    last = {arg.split("=")[0]: at for at, arg in enumerate(argv) if FIELD.match(arg)}
    argv = [arg for at, arg in enumerate(argv) if last.get(arg.split("=")[0], at) == at]
    nones = [arg for arg in argv if FIELD.match(arg) and arg.endswith("=None")]  # absl takes it for a string
    _let_import_neighbours(path)
    try:
        rest = values([arg for arg in argv if arg not in nones])
    except flags.Error as error:  # first absl's sentence, last why the configuration failed, if it did
        first, *others = str(error).replace(r"\n", "\n").strip().splitlines()
        if group := re.search(r"config\.([\w.]+)=.*Failed to parse .* as a ConfigDict", first):
            raise _is_a_group(group[1]) from None
        why = [line.removeprefix("jaxnets.errors.UserError: ") for line in others[-1:]]
        raise UserError(" ".join((first, *why))) from None
    except Exception as error:
        raise _explained(error, path, argv) from None
    for none in nones:
        _clear(values["config"].value, FIELD.match(none)[1])
    return rest


def _let_import_neighbours(path: str) -> None:
    """Let a file in a folder `configs` import its neighbours, even if the command runs in another folder."""
    folder = Path(path.split(":")[0]).resolve().parent
    if folder.name == "configs" and str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))


def _explained(error: Exception, path: str, argv: Sequence[str]) -> UserError:
    """Why a configuration could not be loaded, or a field of it not be set on the command line."""
    if not is_file(path):
        return UserError(f"--config={path} cannot be loaded: there is no such file here")
    message = str(error).replace("\\", "")
    hint = re.search(r'Did you mean "(\w+)"', message)
    hint = f"did you mean {hint[1]}? " if hint else ""
    # In the file itself; the message then lists all other fields.
    if added := re.search(r'Key "(\w+)" does not exist and cannot be added', message):
        return UserError(
            f"{path} sets {added[1]}, which is not a field of a run; {hint}configs/default.py lists them all"
        )
    fields = [found[1] for arg in argv if (found := re.match(r"--?(?:no)?config\.([\w.]+)", arg))]
    unknown = [field for field in fields if any(re.search(rf"'{part}\b", message) for part in field.split("."))]
    if unknown:
        return UserError(f"{path} has no field {unknown[0]}; {hint}configs/default.py lists them all")
    return UserError(f"--config={path} cannot be loaded: {type(error).__name__}: {error}")


def _clear(config: ml_collections.ConfigDict, field: str) -> None:
    """Set an existing field to None; UserError if it is a group of fields."""
    *groups, name = field.split(".")
    for group in groups:
        config = config[group]
    if isinstance(config[name], ml_collections.ConfigDict):
        raise _is_a_group(field)
    config[name] = None


def _is_a_group(field: str) -> UserError:
    return UserError(f"config.{field} is a group of fields; set them one by one: --config.{field}.FIELD=VALUE")


def paths_of(argv: Sequence[str]) -> list[str]:
    """The PATH of every `--config=PATH` or `--config PATH`."""
    found = ((re.fullmatch(r"--?config(=(.*))?", arg), after) for arg, after in zip(argv, [*argv[1:], ""]))
    return [after if match[1] is None else match[2] for match, after in found if match]


def require_config(value: object, path: str) -> ml_collections.ConfigDict:
    """The value of a configuration's flag; UserError if that is not a configuration."""
    if isinstance(value, ml_collections.ConfigDict):
        return value
    why = "its get_config does not return a ConfigDict" if is_file(path) else "there is no such file here"
    try:
        hasattr(value, "get")
    except OSError as error:  # from the stand-in for a configuration that could not open a file, itself or another
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
    """The name of a configuration: its file's name and its words, `mnv2_x0_5` for `configs/mnv2.py:x0_5`."""
    file, *words = path.split(":")
    return "_".join([Path(file).stem, *words]).replace(",", "_")
