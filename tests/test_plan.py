"""A plan says how long a run is; what does not fit is refused before anything is computed."""

import jax
import numpy as np
import pytest
from configs import digits

from jaxnets import plan
from jaxnets.errors import UserError


@pytest.fixture
def config(tmp_path_factory):
    made = digits.get_config()
    made.data_dir = str(tmp_path_factory.mktemp("tfds"))
    made.model.width = 0.25
    return made


def test_the_length_of_a_run_leaves_out_incomplete_batches(config):
    config.batch_size, config.num_epochs = 100, 3
    made = plan.make_plan(config)
    assert made.steps_per_epoch == 14 and made.total_steps == 42
    assert made.schedule(41) < made.schedule(28) and made.schedule(28) == pytest.approx(0.05)


def test_the_initial_state_is_the_seeds_and_the_checked_shapes(config):
    states = []
    for seed in (0, 0, 1):
        config.seed = seed
        made = plan.make_plan(config)
        states.append(plan.compile_and_create_state(made))
    shapes = plan.check_model(made)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), states[0])
    same = jax.tree.map(np.array_equal, states[0].params, states[1].params)
    other = jax.tree.map(np.array_equal, states[0].params, states[2].params)
    assert all(jax.tree.leaves(same)) and not all(jax.tree.leaves(other))


def test_a_split_without_one_batch_is_refused(config):
    config.train_split, config.batch_size = "train[:8]", 16
    with pytest.raises(UserError, match="at most the 8 examples of config.train_split='train"):
        plan.make_plan(config)
