"""A plan says how long a run is; what does not fit is refused before anything is computed."""

from contextlib import closing

import jax
import numpy as np
import pytest

from configs import digits
from jaxnets import checkpoint, create_model, data, loop, models, ops, plan, settings, torch_weights, workdir
from jaxnets.errors import UserError
from jaxnets.restore import restore_ema, restore_item
from tests.test_models import random_variables
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
    with pytest.raises(UserError, match="num_epochs=100000000 are [0-9,]+ steps: at most 100,000,000"):
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
        plan.state_shapes(plan.make_plan(config))


def test_the_learning_rate_is_scaled_to_the_batch(config):
    config.batch_size, config.optimizer.batch_scaling = 64, "sqrt"
    config.schedule.update(name="constant", warmup_epochs=0.0)
    assert plan.make_plan(config).learning_rates[0] == pytest.approx(0.05 / 2)


def test_sizes_that_the_net_cannot_take_are_refused(config):
    config.model.name, config.model.width, config.model.stem_stride = "vgg16_cifar", None, None
    config.progressive_sizes = (16, 32)
    with pytest.raises(UserError, match=r"'vgg16_cifar' cannot take images of 16x16 \(progressive_sizes\)"):
        plan.make_plan(config)


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
    shapes = plan.state_shapes(made)
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
    with pytest.raises(UserError, match="config.batch_size=4 leaves a device one image: BatchNorm in training needs"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.sync_batch_norm = True
    assert plan.make_plan(config).steps_per_epoch > 0


def test_a_run_starts_from_the_best_checkpoint_of_another(tiny, tmp_path):
    loop.train(tiny, tmp_path / "source")
    manager = checkpoint.open_reader(tmp_path / "source")
    source = restore_item(manager, checkpoint.find_step(manager, "best"), "variables")
    tiny.init_from, tiny.seed = str(tmp_path / "source"), 1
    made = plan.make_plan(tiny)
    started = plan.compile_and_create_state(made, plan.load_initial_weights(made))
    jax.tree.map(np.testing.assert_array_equal, started.variables, source)

    tiny.model.num_classes, classifiers = 12, []
    del source["params"]["classifier"]
    for tiny.seed in (1, 2, 1):
        made = plan.make_plan(tiny)
        started = plan.compile_and_create_state(made, plan.load_initial_weights(made)).variables
        classifiers.append(np.asarray(started["params"].pop("classifier")["kernel"]))
        jax.tree.map(np.testing.assert_array_equal, started, source)
    one, other, again = classifiers
    assert one.shape == (8, 12) and np.array_equal(one, again) and not np.allclose(one, other)


def test_a_run_starts_from_the_latest_checkpoint_of_one_never_evaluated(tiny, tmp_path, caplog):
    made = plan.make_plan(tiny)
    workdir.keep(tmp_path, tiny)
    for at in (1, 2):
        state = plan.compile_and_create_state(made).replace(step=np.int32(at))
        params = jax.tree.map(lambda leaf, at=at: np.full_like(leaf, at), state.params)
        with closing(checkpoint.open_manager(tmp_path, keep=3)) as manager:
            checkpoint.save(manager, state.replace(params=params), {"loss": 0.0, "correct": 0, "count": 0}, None)
    tiny.init_from = str(tmp_path)
    assert set(np.unique(jax.tree.leaves(plan.load_initial_weights(made)["params"])[0])) == {2}
    assert "has not been evaluated yet: its latest checkpoint is taken" in caplog.text


def test_weights_of_images_normalised_otherwise_are_warned_of(tiny, tmp_path, caplog):
    loop.train(tiny, tmp_path / "source")
    tiny.init_from = str(tmp_path / "source")
    plan.load_initial_weights(plan.make_plan(tiny))
    assert "normalisation" not in caplog.text
    tiny.std = (0.5, 0.5, 0.5)
    plan.load_initial_weights(plan.make_plan(tiny))
    assert "want images of another normalisation: mean " in caplog.text


def test_a_run_whose_net_has_other_fields_is_warned_of_as_a_file_is(tiny, tmp_path, caplog):
    loop.train(tiny, tmp_path / "source")
    tiny.init_from, tiny.model.activation = str(tmp_path / "source"), "silu"
    plan.load_initial_weights(plan.make_plan(tiny))
    assert "source fits, but its net has activation='relu', this one activation='silu'" in caplog.text


@pytest.mark.parametrize(
    ("name", "classes", "std", "warned"),
    [
        ("shufflenet_v2_x0_5_cifar", 10, (0.2023, 0.1994, 0.2010), False),
        ("shufflenet_v2_x0_5_cifar", 10, (0.2470, 0.2435, 0.2616), True),
        ("shufflenet_v2_x0_5_cifar", 100, (0.2023, 0.1994, 0.2010), True),  # the file is of CIFAR-100's images
    ],
)
def test_published_weights_have_their_code_bases_images(config, tmp_path, caplog, name, classes, std, warned):
    """The file does not say it: its layout is known, and what is usual for its net and its number of classes."""
    import safetensors.numpy

    net = create_model(name, num_classes=classes)
    safetensors.numpy.save_file(
        torch_weights.export(net, random_variables(net), "chenyaofo"), tmp_path / "net.safetensors"
    )
    config.model.name, config.model.width, config.model.stem_stride = name, None, None
    config.init_from, config.mean, config.std = str(tmp_path / "net.safetensors"), (0.4914, 0.4822, 0.4465), std
    plan.load_initial_weights(plan.make_plan(config))
    assert ("want images of another normalisation" in caplog.text) == warned


def test_a_run_starts_from_a_file_and_resumes_without_it(tiny, tmp_path, caplog):
    import safetensors.numpy

    model = settings.make_model(tiny, 10)
    variables = model.init(jax.random.key(5), np.zeros((1, 16, 16, 3), np.float32))
    file = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(torch_weights.export(model, variables), file)
    tiny.init_from, tiny.ema_decay, tiny.optimizer.learning_rate = str(file), 0.9, 1e-12
    loop.train(tiny, tmp_path / "run")
    assert "normalisation" not in caplog.text  # of which a file in our own names says nothing
    manager = checkpoint.open_reader(tmp_path / "run")
    for trained in (restore_item(manager, 2, "variables"), restore_ema(manager, 2)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained["params"], variables["params"])
    file.unlink()
    tiny.num_epochs = 2
    assert loop.train(tiny, tmp_path / "run")["step"] == 4


@pytest.mark.parametrize("name", ["missing.pth", "empty.safetensors", "folder"])
def test_weights_that_cannot_be_had_are_refused_and_leave_no_workdir(tiny, tmp_path, name):
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder").mkdir()
    tiny.init_from = str(tmp_path / name)
    with pytest.raises(UserError, match=f"config.init_from='.*{name}'"):
        loop.train(tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()
