"""The runs of a comparison, one by one: refused, trained or resumed.

Every run has a workdir in OUT/runs, from which all that is known about it is read.
"""

import contextlib
import dataclasses
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
    except (ImportError, OSError) as error:  # OSError: a library of CUDA is missing
        raise UserError(f"--against=torch needs PyTorch and torchvision: pip install -e '.[torch]' ({error})") from None
    return compare_torch


@dataclasses.dataclass(frozen=True)
class SeedRun:
    """An entry's run with its `number`-th seed: what its workdir in `out` says."""

    entry: Entry
    number: int
    out: Path

    @property
    def config(self) -> ml_collections.ConfigDict:
        return self.entry.at_seed(self.number)

    @property
    def seed(self) -> int:
        return self.entry.config.seed + self.number

    @property
    def workdir(self) -> Path:
        return workdir_at(self.out, self.entry.label, self.seed)

    def numbers(self) -> dict[str, Any] | None:
        """What `compare_results.read_run` finds; None if the run is not complete."""
        return compare_results.read_run(self.workdir, self.config)

    def is_finished(self) -> bool:
        """Whether it is complete, and its last checkpoint, if any, was saved."""
        numbers = self.numbers()
        if not numbers or self.entry.framework == TORCH:
            return bool(numbers)
        # The disk may have been full; if all checkpoints were deleted, that is no reason to train again.
        saved = checkpoint.latest_step(self.workdir)
        return saved is None or saved * self.entry.config.batch_size >= numbers["train_images"]

    def has_begun(self) -> bool:
        """Whether it needs no initial weights: it has a checkpoint, or is complete."""
        saved = checkpoint.exists(self.workdir) or (self.workdir / workdirs.TORCH_CHECKPOINT).exists()
        return saved or bool(self.numbers())


def runs_of(entry: Entry, num_seeds: int, out: Path) -> list[SeedRun]:
    """An entry's runs, in the order of their seeds."""
    return [SeedRun(entry, number, out) for number in range(num_seeds)]


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
        for run in runs_of(entry, num_seeds, out):
            check_length(run.workdir, workdirs.check(run.workdir, run.config), entry.config)
            run.numbers()
            source = entry.config.init_from
            if source and not run.has_begun() and not user_path(source).exists():
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
            run, did, measured = SeedRun(entry, number, out), True, False
            with noted(failed, entry, f"seed {run.seed}"):
                did = train(run)
            if train_accuracy:
                with noted(failed, entry, f"seed {run.seed}, accuracy on its training images"):
                    measured = measure_train_accuracy(run)
            if not did and not measured:
                continue
            try:
                after_each(failed)
            except Exception as error:  # later runs are worth more than a table that will be rewritten anyway
                why = printable(first_line(error))
                logger.warning("the table so far was not written: %s", why, exc_info=not isinstance(error, UserError))
    return failed


def train(run: SeedRun) -> bool:
    """Train a run, or resume it; False if it has finished."""
    if run.is_finished():
        logger.info("%s, seed %d: already finished", run.entry.label, run.seed)
        return False
    why = " it has finished, but its last checkpoint was not saved" if run.numbers() else ""
    logger.info("%s, seed %d:%s", run.entry.label, run.seed, why)
    with released(run.entry):
        (loop if run.entry.framework == JAXNETS else torch_side()).train(run.config, run.workdir)
    return True


def measure_train_accuracy(run: SeedRun) -> bool:
    """Evaluate a finished run on its training images; False if that is done, or cannot be."""
    last = compare_results.last_evaluation(run.workdir, run.config)
    with released(run.entry):
        return last is not None and compare_train_accuracy.measure(run.entry, run.config, run.workdir, last)


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
