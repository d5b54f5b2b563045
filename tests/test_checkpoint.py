"""What a run keeps of its checkpoints, and how one of them is named."""

import errno

import numpy as np
import pytest

from jaxnets import checkpoint
from jaxnets.errors import UserError
from tests.linear_runs import TOTALS, make_state


@pytest.fixture
def workdir(six):
    return six


def test_the_latest_three_and_the_best_are_kept(workdir):
    manager = checkpoint.open_reader(workdir)
    assert sorted(manager.all_steps()) == [2, 4, 5, 6]
    assert checkpoint.find_step(manager, "best") == 2
    assert checkpoint.find_step(manager, "latest") == 6
    assert checkpoint.find_step(manager, "4") == 4


@pytest.mark.parametrize("which", ["3", "bst", "-1"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(workdir, which):
    with pytest.raises(UserError, match=r"best, latest, \[2, 4, 5, 6\]"):
        checkpoint.find_step(checkpoint.open_reader(workdir), which)


def test_an_evaluation_that_cannot_be_read_now_stays(workdir, monkeypatch):
    def fails(path, limit):
        raise UserError("no") from PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "read_text", fails)
    with pytest.raises(UserError, match=r"metrics cannot be read now \(Permission denied\)"):
        checkpoint.open_manager(workdir, keep=3)
    assert not (workdir / "damaged").exists()


def test_weights_that_are_not_finite_are_not_saved(workdir):
    manager = checkpoint.open_manager(workdir, keep=3)
    broken = make_state(step=7)
    broken.params["Dense_0"]["bias"] = broken.params["Dense_0"]["bias"].at[1].set(np.nan)
    with pytest.raises(UserError, match="not? longer finite at step 7; the last good checkpoint is step 6"):
        checkpoint.save(manager, broken, TOTALS, None)
    assert manager.latest_step() == 6


def test_an_evaluated_checkpoint_replaces_the_one_of_an_interruption(tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep=3)
    checkpoint.save(manager, make_state(step=4), TOTALS, None)
    checkpoint.save(manager, make_state(step=4), TOTALS, {"eval_accuracy": 0.5})
    manager.close()
    assert checkpoint.open_reader(tmp_path).metrics(4) == {"eval_accuracy": 0.5}


def test_the_best_of_the_averaged_weights_is_kept_and_found_too(tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep=1)
    for step, (accuracy, averaged) in enumerate([(0.5, 0.4), (0.3, 0.8), (0.4, 0.6), (0.2, 0.5)], start=1):
        metrics = {"eval_accuracy": accuracy, "ema_eval_accuracy": averaged}
        checkpoint.save(manager, make_state(step=step), TOTALS, metrics)
    manager.close()
    manager = checkpoint.open_reader(tmp_path)
    assert sorted(manager.all_steps()) == [1, 2, 4]
    assert checkpoint.find_step(manager, "best") == 1
    assert checkpoint.find_step(manager, "best", ema=True) == 2


def test_a_checkpoint_that_waits_for_its_successor_is_there(tmp_path):
    """Moved away to be saved again, and then a kill: the run has begun all the same."""
    assert not checkpoint.exists(tmp_path)
    (tmp_path / "checkpoints" / "deleted" / "4").mkdir(parents=True)
    assert checkpoint.exists(tmp_path)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoints"):
        checkpoint.open_reader(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find_step(checkpoint.open_reader(tmp_path), "best")
