"""What is read comes back bit for bit; what is damaged, missing or another's is refused."""

import errno
import shutil

import jax
import numpy as np
import pytest

from jaxnets import checkpoint, restore
from jaxnets.checkpoint_damage import DamagedError
from jaxnets.errors import UserError
from jaxnets.restore import restore_ema, restore_latest, restore_state
from tests.linear_runs import TOTALS, damage, make_state, template


@pytest.fixture
def workdir(six):
    return six


@pytest.mark.parametrize("ema", [True, False])
def test_a_state_comes_back_bit_for_bit(tmp_path, ema):
    manager = checkpoint.open_manager(tmp_path, keep=1)
    saved = make_state(seed=7, ema=ema, step=9)
    checkpoint.save(manager, saved, TOTALS, None)
    manager.wait_until_finished()
    restored, totals = restore_state(manager, 9, template(ema=ema))
    assert totals == TOTALS
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    averaged = restore_ema(manager, 9)
    assert (averaged is None) == (not ema)


@pytest.mark.parametrize("loss", [None, "0", [], 10**400])
def test_sums_that_are_no_numbers_are_damage(tmp_path, loss):
    manager = checkpoint.open_manager(tmp_path, keep=1)
    checkpoint.save(manager, make_state(step=9), TOTALS | {"loss": loss}, None)
    manager.wait_until_finished()
    with pytest.raises(DamagedError, match="lacks the sums of the training examples"):
        restore_state(manager, 9, template())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (ValueError("Error opening file [os_error_code='13']"), "Permission denied"),
        (MemoryError(), "Cannot allocate memory"),
    ],
)
def test_what_cannot_be_read_now_is_not_damaged(workdir, monkeypatch, error, says):
    """The newest checkpoint stays where it is, and is not gone back behind."""

    def fails(*args):
        try:
            raise error
        except Exception as cause:
            raise ValueError("no such item") from cause

    manager = checkpoint.open_reader(workdir)
    monkeypatch.setattr(restore, "_restore_record", fails)
    with pytest.raises(UserError, match=rf"checkpoint 6 in .* cannot be read now \({says}\); it is unchanged"):
        restore_latest(manager, template())
    assert sorted(manager.all_steps()) == [2, 4, 5, 6] and not (workdir / "damaged").exists()


def test_training_on_does_not_reach_what_is_being_saved(tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep=1)
    saved = make_state(step=1)
    expected = jax.tree.map(np.array, saved)
    checkpoint.save(manager, saved, TOTALS, None)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(saved)
    manager.wait_until_finished()
    jax.tree.map(np.testing.assert_array_equal, restore_state(manager, 1, template())[0], expected)


def test_a_checkpoint_of_another_net_or_optimizer_is_refused(workdir):
    manager = checkpoint.open_reader(workdir)
    with pytest.raises(UserError, match=r"of another model: .*BatchNorm_0.mean is \(3,\) .*\(5,\)"):
        restore_state(manager, 2, template(features=5))
    with pytest.raises(UserError, match="optimizer"):
        restore_state(manager, 2, template(optimizer="adamw"))
    with pytest.raises(UserError, match="ema"):
        restore_state(manager, 2, template(ema=False))


@pytest.mark.parametrize("item", ["variables", "rest"])
def test_a_flipped_bit_is_found(workdir, item):
    damage(workdir / "checkpoints" / "6" / item)
    with pytest.raises(DamagedError, match="checkpoint 6"):
        restore_state(checkpoint.open_reader(workdir), 6, template())


@pytest.mark.parametrize("victim", ["variables", "rest", "record"])
def test_a_missing_item_is_found(workdir, victim):
    shutil.rmtree(workdir / "checkpoints" / "6" / victim)
    with pytest.raises(DamagedError, match="checkpoint 6"):
        restore_state(checkpoint.open_reader(workdir), 6, template())


def test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before(workdir, caplog):
    damage(workdir / "checkpoints" / "6" / "variables")
    manager = checkpoint.open_manager(workdir, keep=3)
    restored, _ = restore_latest(manager, template())
    assert restored.step == 5
    assert (workdir / "damaged" / "6.1").is_dir()
    checkpoint.save(manager, make_state(seed=6, step=6), TOTALS, None)
    manager.wait_until_finished()
    assert restore_latest(manager, template())[0].step == 6
    damage(workdir / "checkpoints" / "6" / "variables")  # and once more
    assert restore_latest(manager, template())[0].step == 5
    assert (workdir / "damaged" / "6.2").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(workdir):
    for folder in (workdir / "checkpoints").iterdir():
        damage(folder / "variables")
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint .* is intact"):
            restore_latest(checkpoint.open_manager(workdir, keep=3), template())
    assert not (workdir / "damaged").exists()
