"""Orbax's CheckpointManager as a run needs it: failed writes are UserErrors, and nothing is left half deleted."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import orbax.checkpoint as ocp

from jaxnets import distributed
from jaxnets.checkpoint_damage import tensorstore_errno
from jaxnets.errors import UserError, first_line, writing

DELETED = "deleted"  # subfolder for the checkpoints that are about to be deleted


class Manager(ocp.CheckpointManager):
    """Orbax's manager, with UserErrors for failed writes, and checkpoints that are whole as long as they exist.

    Orbax deletes a checkpoint file by file, so a kill can leave half of it. Here it is first moved away in one step.
    So is a checkpoint that is saved again, which comes back if its successor is never completed.
    """

    def __init__(self, directory: Path, options: ocp.CheckpointManagerOptions, **kwargs):
        self._writes = not options.read_only
        if self._writes:
            options = dataclasses.replace(options, todelete_subdir=DELETED)
            distributed.on_primary(partial(settle_deletions, directory))
        super().__init__(directory, options=options, **kwargs)

    def save(self, step: int, *args, **kwargs):
        self.wait_until_finished()
        self._settle()
        if step in self.all_steps():
            self.delete(step)
        with _saving(self.directory):
            if not super().save(step, *args, **kwargs):
                raise UserError(f"{self.directory} cannot take a new checkpoint {step}: it has a later one")

    def reached_preemption(self, step: int) -> bool:
        """Never: a run handles its signals itself, without JAX's service, where Orbax before 0.12.3 would fail."""
        return False

    def wait_until_finished(self):
        with _saving(self.directory):
            super().wait_until_finished()

    def delete(self, step: int):
        with _saving(self.directory):
            super().delete(step)

    def close(self):
        with _saving(self.directory):
            super().close()
        self._settle()

    def _settle(self) -> None:
        if self._writes and distributed.is_primary():
            settle_deletions(Path(self.directory))


def settle_deletions(directory: Path) -> None:
    """Remove checkpoints that were moved away to be deleted; bring back one whose replacement was not completed."""
    folder = directory / DELETED
    if folder.is_symlink() or not folder.is_dir():
        return
    newest = max((int(path.name) for path in directory.iterdir() if path.name.isdecimal()), default=-1)
    with writing(directory):
        for path in folder.iterdir():
            # Only the newest checkpoint is ever replaced, and it is never deleted for good.
            if path.name.isdecimal() and int(path.name) > newest:
                path.rename(directory / path.name)
    # What cannot be removed now, such as a file that another machine holds open, is no reason to end a run.
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _saving(directory: Path) -> Iterator[None]:
    """UserError if a checkpoint cannot be written: Orbax raises OSError, TensorStore ValueError with its number."""
    with writing(directory):
        try:
            yield
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            number = tensorstore_errno(error)
            raise OSError(os.strerror(number) if number else first_line(error)) from error
