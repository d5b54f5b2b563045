"""The folder of one run: claimed by one process, or the processes of one run, for one configuration."""

import contextlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from jaxnets import checkpoint, distributed, journal, settings
from jaxnets.datasets.folder import is_folder, is_in_a_class
from jaxnets.errors import UserError, writing
from jaxnets.plain_files import locked, parse_json, read_text, replacing, scratch_of
from jaxnets.runtime import logger

CONFIG = "config.json"
LOCK = ".lock"
TORCH_CHECKPOINT = "torch.pt"  # what a comparison's run in PyTorch resumes from
DATA = "data.json"
PATIENCE = 20.0  # seconds
MAX_BYTES = 1 << 26  # of a data.json: a million classes with long names


class Data(NamedTuple):
    """What a run is trained and evaluated on, as far as it must stay the same."""

    class_names: tuple[str, ...]
    train_images: int
    eval_images: int
    files: tuple[str, ...] = ()  # `Split.identity` of both; (), or "", in workdirs from before 2026-12


@contextlib.contextmanager
def claim(workdir: Path, config: ml_collections.ConfigDict) -> Iterator[ml_collections.ConfigDict | None]:
    """Lock the workdir while training; yields the configuration of the run in it, None if it is new.

    A new run gets `config`; one that resumes keeps its own until `keep` changes it.

    With several processes, process 0 claims it for all.

    Raises UserError as `check` does, and if the workdir cannot be written, is in use, or is not the same folder for
    all processes.
    """
    with contextlib.ExitStack() as held:

        def take():
            claimed = held.enter_context(_locked(_created(workdir)))
            before = check(workdir, config)
            if before is None:
                keep(workdir, config)
            return claimed, before and settings.as_dict(before)

        claimed, before = distributed.on_primary(take)
        if not _is_seen(workdir / LOCK, claimed):
            raise UserError(f"--workdir={workdir} must be one folder for all processes, on a file system they share")
        yield before and ml_collections.ConfigDict(before, convert_dict=True)


def _is_seen(lock: Path, claimed: str) -> bool:
    """Whether this process sees what process 0 wrote, which a network file system may show only after a while."""
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if lock.read_text() == claimed:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def keep(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Make `config` the configuration of the run in a workdir, all of it or not at all."""
    path = workdir / CONFIG
    if path.exists() and settings.as_dict(settings.read(path)) == settings.as_dict(config):
        return
    with writing(workdir), replacing(path) as scratch:
        settings.write(config, scratch)


def keep_data(workdir: Path, data: Data) -> None:
    """Record what the run in a workdir is trained on, unless that is recorded already."""
    if read_data(workdir) != data:
        with writing(workdir), replacing(workdir / DATA) as scratch:
            scratch.write_text(json.dumps(data._asdict()) + "\n")


def read_data(workdir: Path) -> Data | None:
    """What `keep_data` wrote; None if it has not. UserError for a file that is something else."""
    try:
        values = parse_json(read_text(workdir / DATA, MAX_BYTES))
        found = Data(tuple(values.pop("class_names")), **values | {"files": tuple(values.get("files", ()))})
        if not _is_data(found):
            raise ValueError("a number or a name is missing")
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{workdir / DATA} does not say what a run is trained on ({error}); without that file the run continues, "
            "and its data are not compared with the earlier ones"
        ) from None
    return found


def class_names(workdir: Path) -> tuple[str, ...] | None:
    """The class names of a run; None if they are not recorded or cannot be read, which is then logged."""
    try:
        found = read_data(workdir)
    except UserError as error:
        logger.warning("%s", error)
        return None
    return found and found.class_names


def require_same_classes(workdir: Path, dataset: str, class_names: Sequence[str], known: Sequence[str] | None) -> None:
    """UserError if a data set's classes are not the `known` ones of the run in a workdir, if they are known."""
    for place, (before, now) in enumerate(itertools.zip_longest(known or class_names, class_names)):
        if before != now:
            said = [f"{name!r}" if name is not None else "not there" for name in (before, now)]
            raise UserError(
                f"{dataset} has different classes from the run in {workdir}: class {place} was {said[0]} and is now "
                f"{said[1]}"
            )


def _is_data(found: Any) -> bool:
    names, *counts, files = found
    strings = all(isinstance(name, str) for name in (*names, *files))
    return strings and len(files) in (0, 2) and all(type(count) is int for count in counts)


def check(workdir: Path, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict | None:
    """The configuration of the run in a workdir; None if there is none, or one that left no record. Touches nothing.

    Raises UserError if the workdir is a file, belongs to something else, or to a run whose configuration
    differs in what decides the result (the fields are listed).
    """
    if is_folder(config.dataset) and is_in_a_class(workdir, config.dataset):
        raise UserError(f"--workdir={workdir} lies in {config.dataset}, where it would count as a class of images")
    try:
        present = set(os.listdir(workdir))
    except FileNotFoundError:
        parent = next(folder for folder in workdir.absolute().parents if folder.exists())
        if parent.is_dir() and not os.access(parent, os.W_OK):
            raise UserError(f"--workdir={workdir} cannot be created: {parent} is not writable") from None
        return None
    except NotADirectoryError:
        raise UserError(f"--workdir={workdir} is, or lies below, a file; it must be a folder") from None
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be read: {error.strerror}") from None
    if not os.access(workdir, os.W_OK):
        raise UserError(f"--workdir={workdir} is not writable")
    _require_own_files(workdir)
    if CONFIG in present:
        before = settings.read(workdir / CONFIG)
        if not _has_begun(workdir):  # out of memory at its first step, say: there is nothing to lose
            if differing := settings.differences(settings.as_dict(before), settings.as_dict(config)):
                logger.info("the run in %s left no record: it starts with a new %s", workdir, ", ".join(differing))
            return None
        _require_same_run(workdir, before, config)
        return before
    if strangers := sorted(present - {LOCK, scratch_of(workdir / CONFIG).name}):
        raise UserError(
            f"--workdir={workdir} holds {strangers[0]!r} but no {CONFIG}: it is not the folder of a run; "
            "choose a new or an empty one"
        )
    return None


def _has_begun(workdir: Path) -> bool:
    """Whether there is a record or a checkpoint, which may be that of a comparison's run in PyTorch."""
    if checkpoint.exists(workdir) or (workdir / TORCH_CHECKPOINT).exists():
        return True
    with contextlib.suppress(FileNotFoundError):
        return (workdir / journal.FILE).stat().st_size > 0
    return False


def _require_own_files(workdir: Path) -> None:
    """UserError if a file of the run is a link (writing it would change something elsewhere), a pipe or the like."""
    for entry in os.scandir(workdir):
        if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
            raise UserError(
                f"--workdir={workdir} holds {entry.name!r}, a link or a special file, where a run has files and "
                "folders of its own; to keep a run elsewhere, make --workdir itself the link"
            )


def _created(workdir: Path) -> Path:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--workdir={workdir} is, or lies below, a file; it must be a folder") from None
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be created: {error.strerror}") from None
    _require_own_files(workdir)
    return workdir


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[str]:
    """Hold the lock; yields its content, which is unique to this claim."""
    with locked(workdir / LOCK, f"--workdir={workdir}", "run") as lock:
        claimed = uuid.uuid4().hex
        with writing(workdir):
            lock.truncate(0)
            lock.write(claimed.encode())
            os.fsync(lock.fileno())  # for the other machines of a network file system
        yield claimed


def _require_same_run(workdir: Path, before: ml_collections.ConfigDict, config: ml_collections.ConfigDict) -> None:
    differing = settings.differences(settings.as_dict(before), settings.as_dict(config))
    if "batch_size" not in before:
        raise UserError(
            f"--workdir={workdir} holds weights but no run to resume; give them as --config.init_from={workdir} "
            "and choose another workdir"
        )
    if differing:
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in differing.items())
        raise UserError(
            f"--workdir={workdir} holds a run with another configuration ({listed}); "
            "choose another workdir, or give the same fields to resume it"
        )
