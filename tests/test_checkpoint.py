"""What is saved comes back bit for bit; what is damaged, missing or another's is refused."""

import errno
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets import checkpoint, optim, state
from jaxnets.errors import UserError


class Linear(nn.Module):
    """A net with parameters and statistics, and nothing else."""

    features: int = 3

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(self.features)(images.mean((1, 2)))
        return nn.BatchNorm(use_running_average=not train)(x)


def make_state(seed=0, features=3, optimizer="sgd", ema=True, step=0):
    chain = optim.make_optimizer(optimizer, optax.constant_schedule(0.1))
    made = state.create(jax.random.key(seed), Linear(features), chain, 4, ema)
    return made.replace(step=jnp.int32(step))


def template(**fields):
    return jax.eval_shape(lambda: make_state(**fields))


TOTALS = {"loss": 0.1 + 0.2, "correct": 5, "count": 32}


@pytest.fixture
def workdir(tmp_path):
    """Checkpoints of steps 1 to 6, the best of them step 2, the last without an evaluation."""
    manager = checkpoint.open_manager(tmp_path, keep=3)
    for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.4, 0.9 - 1e-9, None], start=1):
        metrics = None if accuracy is None else {"eval_accuracy": accuracy}
        checkpoint.save(manager, make_state(seed=step, step=step), TOTALS, metrics)
    manager.close()
    return tmp_path


def damage(path):
    """Flip one bit in the middle of every file below a path (Orbax keeps some of them twice)."""
    for file in path.rglob("*"):
        if file.is_file() and (content := bytearray(file.read_bytes())):
            content[len(content) // 2] ^= 1
            file.write_bytes(content)


def test_the_latest_three_and_the_best_are_kept(workdir):
    manager = checkpoint.open_manager(workdir)
    assert sorted(manager.all_steps()) == [2, 4, 5, 6]
    assert checkpoint.find_step(manager, "best") == 2
    assert checkpoint.find_step(manager, "latest") == 6
    assert checkpoint.find_step(manager, "4") == 4


@pytest.mark.parametrize("which", ["3", "bst", "-1"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(workdir, which):
    with pytest.raises(UserError, match=r"best, latest, \[2, 4, 5, 6\]"):
        checkpoint.find_step(checkpoint.open_manager(workdir), which)


@pytest.mark.parametrize("ema", [True, False])
def test_a_state_comes_back_bit_for_bit(tmp_path, ema):
    manager = checkpoint.open_manager(tmp_path, keep=1)
    saved = make_state(seed=7, ema=ema, step=9)
    checkpoint.save(manager, saved, TOTALS, None)
    manager.wait_until_finished()
    restored, totals = checkpoint.restore_state(manager, 9, template(ema=ema))
    assert totals == TOTALS
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    averaged = checkpoint.restore_ema(manager, 9)
    assert (averaged is None) == (not ema)


@pytest.mark.parametrize("loss", [None, "0", [], 10**400])
def test_sums_that_are_no_numbers_are_damage(tmp_path, loss):
    manager = checkpoint.open_manager(tmp_path, keep=1)
    checkpoint.save(manager, make_state(step=9), TOTALS | {"loss": loss}, None)
    manager.wait_until_finished()
    with pytest.raises(checkpoint.DamagedError, match="no sums of the training examples"):
        checkpoint.restore_state(manager, 9, template())


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

    manager = checkpoint.open_manager(workdir)
    monkeypatch.setattr(checkpoint, "_restore_record", fails)
    with pytest.raises(UserError, match=rf"checkpoint 6 in .* cannot be read now \({says}\); it is as it was"):
        checkpoint.restore_latest(manager, template())
    assert sorted(manager.all_steps()) == [2, 4, 5, 6] and not (workdir / "damaged").exists()


def test_an_evaluation_that_cannot_be_read_now_stays(workdir, monkeypatch):
    def fails(path, limit):
        raise UserError("no") from PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "read_text", fails)
    with pytest.raises(UserError, match=r"metrics cannot be read now \(Permission denied\)"):
        checkpoint.open_manager(workdir, keep=3)
    assert not (workdir / "damaged").exists()


def test_training_on_does_not_reach_what_is_being_saved(tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep=1)
    saved = make_state(step=1)
    expected = jax.tree.map(np.array, saved)
    checkpoint.save(manager, saved, TOTALS, None)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(saved)
    manager.wait_until_finished()
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore_state(manager, 1, template())[0], expected)


def test_a_checkpoint_of_another_net_or_optimizer_is_refused(workdir):
    manager = checkpoint.open_manager(workdir)
    with pytest.raises(UserError, match=r"of another model: .*BatchNorm_0.mean is \(3,\) .*\(5,\)"):
        checkpoint.restore_variables(manager, 2, template(features=5).variables)
    with pytest.raises(UserError, match="optimizer"):
        checkpoint.restore_state(manager, 2, template(optimizer="adamw"))
    with pytest.raises(UserError, match="ema"):
        checkpoint.restore_state(manager, 2, template(ema=False))


@pytest.mark.parametrize("item", ["variables", "rest"])
def test_a_flipped_bit_is_found(workdir, item):
    damage(workdir / "checkpoints" / "6" / item)
    with pytest.raises(checkpoint.DamagedError, match="checkpoint 6"):
        checkpoint.restore_state(checkpoint.open_manager(workdir), 6, template())


@pytest.mark.parametrize("victim", ["variables", "rest", "record"])
def test_a_missing_item_is_found(workdir, victim):
    shutil.rmtree(workdir / "checkpoints" / "6" / victim)
    with pytest.raises(checkpoint.DamagedError, match="checkpoint 6"):
        checkpoint.restore_state(checkpoint.open_manager(workdir), 6, template())


def test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before(workdir, caplog):
    damage(workdir / "checkpoints" / "6" / "variables")
    manager = checkpoint.open_manager(workdir, keep=3)
    restored, _ = checkpoint.restore_latest(manager, template())
    assert restored.step == 5
    assert (workdir / "damaged" / "6.1").is_dir()
    checkpoint.save(manager, make_state(seed=6, step=6), TOTALS, None)
    manager.wait_until_finished()
    assert checkpoint.restore_latest(manager, template())[0].step == 6
    damage(workdir / "checkpoints" / "6" / "variables")  # and once more
    assert checkpoint.restore_latest(manager, template())[0].step == 5
    assert (workdir / "damaged" / "6.2").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(workdir):
    for folder in (workdir / "checkpoints").iterdir():
        damage(folder / "variables")
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint .* is whole"):
            checkpoint.restore_latest(checkpoint.open_manager(workdir, keep=3), template())
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
    assert checkpoint.open_manager(tmp_path).metrics(4) == {"eval_accuracy": 0.5}


def test_the_best_of_the_averaged_weights_is_kept_and_found_too(tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep=1)
    for step, (accuracy, averaged) in enumerate([(0.5, 0.4), (0.3, 0.8), (0.4, 0.6), (0.2, 0.5)], start=1):
        metrics = {"eval_accuracy": accuracy, "ema_eval_accuracy": averaged}
        checkpoint.save(manager, make_state(step=step), TOTALS, metrics)
    manager.close()
    manager = checkpoint.open_manager(tmp_path)
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
        checkpoint.open_manager(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find_step(checkpoint.open_manager(tmp_path), "best")
