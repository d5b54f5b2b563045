"""Orbax's CheckpointManager as a run needs it: failures to write are sentences, and nothing is left half deleted."""

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import orbax.checkpoint as ocp

from jaxnets import distributed
from jaxnets.errors import UserError, first_line, writing

DELETED = "deleted"  # beside the checkpoints: those that are about to go


class Manager(ocp.CheckpointManager):
    """Orbax's, with UserErrors for failures to write, and checkpoints that are whole as long as they are there.

    Orbax deletes a checkpoint file by file, where a kill leaves half of it. Here it is moved away first, in one step,
    and so is one that is saved again, which comes back should its successor never be there.
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
            return super().save(step, *args, **kwargs)

    def reached_preemption(self, step: int) -> bool:
        """Never: a run looks after its signals itself, and Orbax before 0.12.3 fails where JAX does not."""
        return False

    def wait_until_finished(self):
        with _saving(self.directory):
            super().wait_until_finished()

    def delete(self, step: int):
        with _saving(self.directory):
            super().delete(step)

    def close(self):
        super().close()
        self._settle()

    def _settle(self) -> None:
        if self._writes and distributed.is_primary():
            settle_deletions(Path(self.directory))


def settle_deletions(directory: Path) -> None:
    """Remove what was moved away to be deleted; bring back what was to be replaced and is not."""
    folder = directory / DELETED
    if folder.is_symlink() or not folder.is_dir():
        return
    newest = max((int(path.name) for path in directory.iterdir() if path.name.isdecimal()), default=-1)
    with writing(directory):
        for path in folder.iterdir():
            # Only the newest checkpoint is ever replaced, and it is never deleted for good.
            if path.name.isdecimal() and int(path.name) > newest:
                path.rename(directory / path.name)
            else:
                shutil.rmtree(path)
        folder.rmdir()


@contextlib.contextmanager
def _saving(directory: Path) -> Iterator[None]:
    """UserError where a checkpoint cannot be written: Orbax raises OSError, TensorStore ValueError, with its number."""
    with writing(directory):
        try:
            yield
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            number = re.search(r"os_error_code='(\d+)'", str(error))
            raise OSError(os.strerror(int(number[1])) if number else first_line(error)) from error
