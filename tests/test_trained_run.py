"""A run is loaded at the checkpoint that is asked for, or refused."""

import jax
import numpy as np
import pytest

from configs import digits
from jaxnets import checkpoint, restore, settings
from jaxnets.checkpoint_damage import DamagedError
from jaxnets.errors import UserError
from jaxnets.restore import restore_item
from jaxnets.trained_run import load_run
from tests.tiny_net import configurations, first_variables


@pytest.fixture(scope="module")
def tiny(digits_dir):
    with configurations(digits_dir) as make:
        yield make()


@pytest.fixture(scope="module")
def variables():
    return first_variables()


@pytest.fixture
def workdir(variables, tmp_path):
    """A configuration, and the weights of a net that is not its own."""
    settings.write(digits.get_config(), tmp_path / "config.json")
    checkpoint.save_variables(tmp_path, variables)
    return tmp_path


def test_a_checkpoint_of_another_net_is_refused(workdir):
    with pytest.raises(UserError, match="checkpoint 0 in .* is of another model"):
        load_run(workdir)


def test_weights_from_elsewhere_are_the_best_there_are(workdir, tiny, variables):
    settings.write(tiny, workdir / "config.json")
    run = load_run(workdir, "best")
    assert run.step == 0 and run.model.num_classes == 10
    jax.tree.map(np.testing.assert_array_equal, run.variables, variables)
    with pytest.raises(UserError, match="no averaged weights"):
        load_run(workdir, ema=True)


def test_a_checkpoint_deleted_while_it_is_read_is_looked_for_again(workdir, tiny, monkeypatch):
    """As beside a training run, which keeps the latest few."""
    settings.write(tiny, workdir / "config.json")
    failures = [DamagedError("gone")]

    def gone_once(*args):
        if failures:
            raise failures.pop()
        return restore_item(*args)

    monkeypatch.setattr(restore, "restore_item", gone_once)
    assert load_run(workdir).step == 0 and not failures
    failures += [DamagedError("gone")] * 2
    with pytest.raises(DamagedError):
        load_run(workdir)


@pytest.mark.parametrize("field", ["eval_batch_size", "mean", "dataset", "steps_per_call", "resident", "data_dir"])
def test_a_configuration_that_lacks_a_field_is_refused(workdir, field):
    config = digits.get_config().unlock()
    del config[field]
    settings.write(config, workdir / "config.json")
    with pytest.raises(UserError, match=f"config.{field} is missing"):
        load_run(workdir)
