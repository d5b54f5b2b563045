"""A checkpoint is whole as long as it is there, whatever is cut short: a deletion, or the saving of a successor."""

import contextlib
import errno
import os
import resource
import shutil
from contextlib import closing

import orbax.checkpoint as ocp
import pytest

from jaxnets import checkpoint
from jaxnets.errors import UserError
from jaxnets.restore import restore_item
from tests.linear_runs import TOTALS, make_state


class Killed(BaseException):
    """What the tests raise to end a process at a chosen place."""


def steps_on_disk(workdir):
    """The steps that are there, each restored and verified."""
    with closing(checkpoint.open_reader(workdir)) as manager:
        for step in manager.all_steps():
            restore_item(manager, step, "rest")
        return sorted(manager.all_steps())


def save(manager, step, metrics=None):
    checkpoint.save(manager, make_state(step=step), TOTALS, metrics)
    manager.wait_until_finished()


def test_a_deletion_cut_short_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch):
    def dies(path, **_):
        next(file for file in path.rglob("*") if file.is_file()).unlink()
        raise Killed

    manager = checkpoint.open_manager(tmp_path, keep=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", dies)
        for step in range(1, 5):
            save(manager, step)
    assert steps_on_disk(tmp_path) == [2, 3]
    with closing(checkpoint.open_manager(tmp_path, keep=2)) as manager:
        save(manager, 4)
    assert steps_on_disk(tmp_path) == [3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


@pytest.mark.parametrize("cut", ["before its successor is written", "before it is removed"])
def test_a_checkpoint_that_is_replaced_is_there_until_its_successor_is(tmp_path, monkeypatch, cut):
    module, name, evaluated = {
        "before its successor is written": (ocp.CheckpointManager, "save", None),
        "before it is removed": (shutil, "rmtree", {"eval_accuracy": 0.5}),
    }[cut]

    def dies(*_, **__):
        raise Killed

    manager = checkpoint.open_manager(tmp_path, keep=2)
    save(manager, 3)
    save(manager, 4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, dies)
        save(manager, 4, {"eval_accuracy": 0.5})
        manager.close()
    again = checkpoint.open_manager(tmp_path, keep=2)
    assert again.metrics(4) == evaluated
    again.close()
    assert steps_on_disk(tmp_path) == [3, 4]
    assert not (tmp_path / "checkpoints" / "deleted").exists()


def test_nothing_is_deleted_through_a_link(tmp_path):
    """A workdir from someone else may have one in place of the folder."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "1").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "deleted").symlink_to(elsewhere)
    checkpoint.open_manager(tmp_path, keep=2).close()
    assert (elsewhere / "1").is_dir()


@contextlib.contextmanager
def no_room():
    """Within it no file can be written beyond 100 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def start_saving(manager, step):
    """What a run does: it goes on while the checkpoint is written."""
    checkpoint.save(manager, make_state(step=step), TOTALS, None)


def test_a_save_that_failed_behind_the_run_is_told_by_the_next_or_at_the_end(tmp_path):
    for told in ("next", "end"):
        manager = checkpoint.open_manager(tmp_path / told, keep=2)
        save(manager, 1)
        says = "cannot be written: File too large; what was saved before is unchanged"
        with pytest.raises(UserError, match=says), no_room():
            start_saving(manager, 2)
            if told == "end":
                manager.close()
            start_saving(manager, 3)
        assert 1 in steps_on_disk(tmp_path / told)


def test_a_save_that_orbax_leaves_out_is_no_success(tmp_path):
    with closing(checkpoint.open_manager(tmp_path, keep=2)) as manager:
        save(manager, 5)
        with pytest.raises(UserError, match="cannot take a new checkpoint 4: it has a later one"):
            save(manager, 4)


def test_what_cannot_be_removed_now_is_no_reason_to_end_a_run(tmp_path, monkeypatch):
    """As a file that another machine holds open."""
    rmdir = os.rmdir

    def busy(path, **kwargs):
        if str(path).endswith("deleted"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rmdir(path, **kwargs)

    folder = tmp_path / "checkpoints" / "deleted"
    folder.mkdir(parents=True)
    monkeypatch.setattr(os, "rmdir", busy)
    with closing(checkpoint.open_manager(tmp_path, keep=2)) as manager:
        save(manager, 1)
    assert steps_on_disk(tmp_path) == [1] and folder.is_dir()
