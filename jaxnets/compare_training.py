"""The runs of a comparison, one by one: refused, trained or resumed.

Every run has a workdir in OUT/runs, from which all that is known about it is read.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxnets import checkpoint, compare_results, compare_train_accuracy, loop, settings
from jaxnets import workdir as workdirs
from jaxnets.compare_entries import JAXNETS, TORCH, Entry, workdir_at
from jaxnets.errors import UserError, first_line, printable
from jaxnets.plain_files import user_path
from jaxnets.runtime import logger


def torch_side():
    """The module `compare_torch`; UserError where PyTorch is not installed."""
    try:
        from jaxnets import compare_torch
    except ImportError as error:
        raise UserError(f"--against=torch needs PyTorch and torchvision: pip install -e '.[torch]' ({error})") from None
    return compare_torch


def workdir_of(out: Path, entry: Entry, number: int) -> Path:
    """The workdir of an entry's run with its `number`-th seed."""
    return workdir_at(out, entry.label, entry.config.seed + number)


def check(entries: Sequence[Entry], num_seeds: int, out: Path) -> None:
    """UserError for the first impossible run, judging only by its configuration and by what its workdir holds.

    Quick: opening the data and tracing the net is left to `Net.of`.
    """
    first = entries[0].config
    for entry in entries:
        with named(entry):
            for number in (0, num_seeds - 1):
                settings.check(entry.at_seed(number))
            if entry.framework == TORCH:
                torch_side().check(entry.config)
        for field in ("dataset", "data_dir", "train_split", "eval_split"):
            if entry.config[field] != first[field]:
                raise UserError(
                    f"nets are compared on the same images: config.{field} is {first[field]!r} for "
                    f"{entries[0].label} and {entry.config[field]!r} for {entry.label}"
                )
        for number in range(num_seeds):
            directory = workdir_of(out, entry, number)
            check_length(directory, workdirs.check(directory, entry.at_seed(number)), entry.config)
            numbers_of(entry, number, out)
            source = entry.config.init_from
            if source and not has_begun(entry, number, out) and not user_path(source).exists():
                raise UserError(f"{entry.label}: config.init_from={source!r}: there is no such file or workdir")


@contextlib.contextmanager
def named(entry: Entry) -> Iterator[None]:
    """Prefix the message of a UserError about an entry with its label."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{entry.label}: {error}") from None


def check_length(directory: Path, before: ml_collections.ConfigDict | None, config: ml_collections.ConfigDict) -> None:
    """UserError if a run was begun with another length: resumed, it would not equal one made in one go."""
    for field in compare_results.SAME:
        if before and before.get(field) != config[field]:
            raise UserError(
                f"{directory} holds a run with config.{field}={before.get(field)}, not {config[field]}; compare runs "
                "of that length, or choose another --out"
            )


def numbers_of(entry: Entry, number: int, out: Path) -> dict[str, Any] | None:
    """What `compare_results.read_run` finds of an entry's run with its `number`-th seed."""
    return compare_results.read_run(workdir_of(out, entry, number), entry.at_seed(number))


def is_finished(entry: Entry, number: int, out: Path) -> bool:
    """Whether the run with the `number`-th seed is complete, and its last checkpoint, if any, was saved."""
    numbers = numbers_of(entry, number, out)
    if not numbers or entry.framework == TORCH:
        return bool(numbers)
    # The disk may have been full; if all checkpoints were deleted, that is no reason to train again.
    saved = checkpoint.latest_step(workdir_of(out, entry, number))
    return saved is None or saved * entry.config.batch_size >= numbers["train_images"]


def finished(entry: Entry, num_seeds: int, out: Path) -> list[Path]:
    """The workdirs of the entry's completed runs."""
    return [workdir_of(out, entry, number) for number in range(num_seeds) if numbers_of(entry, number, out)]


def has_begun(entry: Entry, number: int, out: Path) -> bool:
    """Whether the run with the `number`-th seed needs no initial weights: it has a checkpoint, or is finished."""
    directory = workdir_of(out, entry, number)
    saved = checkpoint.exists(directory) or (directory / workdirs.TORCH_CHECKPOINT).exists()
    return saved or bool(numbers_of(entry, number, out))


def train_all(
    entries: Sequence[Entry],
    num_seeds: int,
    out: Path,
    after_each: Callable[[dict[str, list[str]]], None],
    *,
    train_accuracy: bool = False,
) -> dict[str, list[str]]:
    """Train what is not finished, every net with one seed before any with the next.

    Returns what went wrong, sentences by label, and passes it to `after_each` after every run. A run that fails does
    not keep the others from running. SystemExit if the user interrupts; the same call then resumes. `train_accuracy`:
    evaluate finished runs on their training images.
    """
    failed: dict[str, list[str]] = {entry.label: [] for entry in entries}
    for number in range(num_seeds):
        for entry in entries:
            seed, did, measured = f"seed {entry.config.seed + number}", True, False
            with noted(failed, entry, seed):
                did = train(entry, number, out)
            if train_accuracy:
                with noted(failed, entry, f"{seed}, accuracy on its training images"):
                    measured = measure_train_accuracy(entry, number, out)
            if not did and not measured:
                continue
            try:
                after_each(failed)
            except Exception as error:  # later runs are worth more than a table that will be rewritten anyway
                why = printable(first_line(error))
                logger.warning("the table so far was not written: %s", why, exc_info=not isinstance(error, UserError))
    return failed


def train(entry: Entry, number: int, out: Path) -> bool:
    """Train an entry with its `number`-th seed, or resume it; False if it has finished."""
    config, directory = entry.at_seed(number), workdir_of(out, entry, number)
    if is_finished(entry, number, out):
        logger.info("%s, seed %d: already finished", entry.label, config.seed)
        return False
    why = " it has finished, but its last checkpoint was not saved" if numbers_of(entry, number, out) else ""
    logger.info("%s, seed %d:%s", entry.label, config.seed, why)
    with released(entry):
        (loop if entry.framework == JAXNETS else torch_side()).train(config, directory)
    return True


def measure_train_accuracy(entry: Entry, number: int, out: Path) -> bool:
    """Evaluate a finished run on its training images; False if that is done, or cannot be."""
    config, directory = entry.at_seed(number), workdir_of(out, entry, number)
    last = compare_results.last_evaluation(directory, config)
    with released(entry):
        return last is not None and compare_train_accuracy.measure(entry, config, directory, last)


@contextlib.contextmanager
def released(entry: Entry) -> Iterator[None]:
    """Give back the memory that PyTorch caches, if it is PyTorch that worked: JAX needs it next."""
    try:
        yield
    finally:
        if entry.framework == TORCH:
            torch_side().release()


@contextlib.contextmanager
def noted(failed: dict[str, list[str]], entry: Entry, what: str) -> Iterator[None]:
    """Guard work of an entry that may fail for any reason: a failure becomes a sentence in the log and in `failed`."""
    try:
        yield
    except Exception as error:
        why = printable(first_line(error))
        logger.warning("%s, %s: %s", entry.label, what, why, exc_info=not isinstance(error, UserError))
        failed[entry.label].append(f"{what}: {why}")
