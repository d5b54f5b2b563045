"""A plan says how long a run is; what does not fit is refused before anything is computed."""

import jax
import numpy as np
import pytest

from configs import digits
from jaxnets import data, loop, models, ops, plan, workdir
from jaxnets.errors import UserError
from tests.tiny_net import TinyNet

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def config(digits_dir):
    made = digits.get_config()
    made.data_dir = str(digits_dir)
    made.model.width = 0.25
    return made


def test_a_run_that_never_ends_is_refused(config):
    config = config.copy_and_resolve_references()
    config.num_epochs = 10**8
    with pytest.raises(UserError, match="num_epochs=100000000 makes [0-9,]+ steps: at most 100,000,000"):
        plan.make_plan(config)


def test_more_records_than_can_be_read_again_are_refused(config):
    """They are of every so many steps, of every epoch, and of its evaluation."""
    config.num_epochs, config.log_every_steps = 10**5, 1
    with pytest.raises(UserError, match="with config.log_every_steps=1 .*make [0-9,]+ records: at most 500,000"):
        plan.make_plan(config)
    config.num_epochs, config.log_every_steps, config.eval_every_epochs = 260_000, 10**9, 1
    with pytest.raises(UserError, match="would make 520,000 records"):
        plan.make_plan(config)


def test_the_length_of_a_run_leaves_out_incomplete_batches(config):
    config.batch_size, config.num_epochs = 100, 3
    made = plan.make_plan(config)
    assert made.steps_per_epoch == 14 and made.total_steps == 42
    assert made.learning_rates[41] < made.learning_rates[21] == pytest.approx(0.05)


@pytest.mark.parametrize("split", ["train", "test"])
def test_records_that_cannot_be_read_are_noticed_before_the_first_step(config, monkeypatch, split):
    """One of each split is read: of those that are streamed the evaluation's would be, after an epoch."""
    unread = data.read_batch

    def read(opened, indices):
        if opened.split.startswith(split):
            raise UserError(f"{split} has no labels")
        return unread(opened, indices)

    monkeypatch.setattr(data, "read_batch", read)
    with pytest.raises(UserError, match=f"{split} has no labels"):
        plan.make_plan(config)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_net_that_cannot_take_the_images_is_refused_with_and_without_data(config, monkeypatch, prepared):
    monkeypatch.setattr(plan, "find_prepared", lambda *_: config.data_dir if prepared else None)
    config.model.name, config.model.width, config.model.stem_stride = "squeezenet1_0", None, None
    config.image_size, config.augment.crop_padding = 8, 0
    with pytest.raises(UserError, match="squeezenet1_0' cannot take images of 8x8"):
        _ = plan.make_plan(config).state_shapes


def test_the_learning_rate_is_scaled_to_the_batch(config):
    config.batch_size, config.optimizer.batch_scaling = 64, "sqrt"
    config.schedule.update(name="constant", warmup_epochs=0.0)
    assert plan.make_plan(config).learning_rates[0] == pytest.approx(0.05 / 2)


def test_sizes_that_the_net_cannot_take_are_refused(config):
    config.model.name, config.model.width, config.model.stem_stride = "vgg16_cifar", None, None
    config.progressive_sizes = (16, 32)
    with pytest.raises(UserError, match=r"'vgg16_cifar' cannot take images of 16x16 \(progressive_sizes\)"):
        plan.make_plan(config)
    config.num_epochs = 1  # which has the last size
    assert plan.make_plan(config).training_size(0) == 32
    config.num_epochs = 10**12
    with pytest.raises(UserError, match="cannot take images of 16x16"):  # at once
        plan.make_plan(config)


def test_another_version_of_a_data_set_is_named_with_its_remedy(config, tmp_path):
    made = plan.make_plan(config)
    workdir.keep_data(tmp_path, made.data_record._replace(files=("0.9.9", "0.9.9")))
    with pytest.raises(UserError, match=r"of version 0.9.9 of the data set, not \d.*; config.dataset=NAME:VERSION"):
        plan.require_same_data(made, tmp_path)


def test_a_split_without_one_batch_is_refused(config):
    config.train_split, config.batch_size = "train[:8]", 16
    with pytest.raises(UserError, match="at most the 8 examples of config.train_split='train"):
        plan.make_plan(config)


@pytest.fixture
def tiny(config, monkeypatch):
    """A configuration of a tiny net that takes small images."""
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    config.model.name, config.model.width, config.model.stem_stride = "tiny", None, None
    config.image_size, config.num_epochs = 16, 1
    config.train_split, config.eval_split, config.compilation_cache = "train[:64]", "test[:32]", False
    return config


def test_the_initial_state_is_the_seeds_and_the_checked_shapes(tiny):
    states = []
    for seed in (0, 0, 1):
        tiny.seed = seed
        made = plan.make_plan(tiny)
        states.append(plan.compile_and_create_state(made))
    shapes = made.state_shapes
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), states[0])
    same = jax.tree.map(np.array_equal, states[0].params, states[1].params)
    other = jax.tree.map(np.array_equal, states[0].params, states[2].params)
    assert all(jax.tree.leaves(same)) and not all(jax.tree.leaves(other))


def test_only_what_reaches_a_program_tells_it_from_others(tiny):
    """Seeds share theirs, and what a run may be gone on with; a rate, a length, another net do not."""

    def key(**fields):
        changed = tiny.copy_and_resolve_references()
        changed.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
        return plan.make_plan(changed).program_key

    same = [key(), key(seed=3), key(eval_every_epochs=7), key(data_dir=tiny.data_dir + "/")]
    others = [{"optimizer__learning_rate": 0.3}, {"num_epochs": 2}, {"model__width": 0.5}, {"augment__flip": True}]
    with ops.using("reference"):
        of_other_operators = key()
    assert len(set(same)) == 1 and len({same[0], of_other_operators, *(key(**fields) for fields in others)}) == 6


def test_an_image_a_device_whose_map_is_one_pixel_is_refused_before_the_run_has_a_folder(config, tmp_path):
    config.model.name, config.model.stem_stride, config.image_size = "mobilenet_v1_cifar", None, 16
    config.batch_size, config.num_epochs = len(jax.devices()), 1
    with pytest.raises(UserError, match="config.batch_size=4 leaves a device only one image: BatchNorm in training"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.sync_batch_norm = True
    assert plan.make_plan(config).steps_per_epoch > 0
