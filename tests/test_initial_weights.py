"""A run begins with the weights that `init_from` names, a file's or another run's, or is refused without a trace."""

from contextlib import closing

import jax
import numpy as np
import pytest

from jaxnets import checkpoint, create_model, initial_weights, loop, plan, settings, torch_weights, workdir
from jaxnets.errors import UserError
from jaxnets.restore import restore_ema, restore_item
from tests import tiny_net
from tests.test_models import random_variables

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def tiny(digits_dir):
    """One epoch of two steps of a tiny net on small digits."""
    config = tiny_net.small_digits()
    config.data_dir, config.num_epochs, config.compilation_cache = str(digits_dir), 1, False
    config.train_split, config.eval_split, config.sync_batch_norm = "train[:64]", "test[:32]", False
    with tiny_net.registered():
        yield config


def test_a_run_starts_from_the_best_checkpoint_of_another(tiny, tmp_path):
    loop.train(tiny, tmp_path / "source")
    manager = checkpoint.open_reader(tmp_path / "source")
    source = restore_item(manager, checkpoint.find_step(manager, "best"), "variables")
    tiny.init_from, tiny.seed = str(tmp_path / "source"), 1
    made = plan.make_plan(tiny)
    started = plan.compile_and_create_state(made, initial_weights.load(made))
    jax.tree.map(np.testing.assert_array_equal, started.variables, source)

    tiny.model.num_classes, classifiers = 12, []
    del source["params"]["classifier"]
    for tiny.seed in (1, 2, 1):
        made = plan.make_plan(tiny)
        started = plan.compile_and_create_state(made, initial_weights.load(made)).variables
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
    assert set(np.unique(jax.tree.leaves(initial_weights.load(made)["params"])[0])) == {2}
    assert "has not been evaluated yet: using its latest checkpoint" in caplog.text


def test_weights_of_images_normalised_otherwise_are_warned_of(tiny, tmp_path, caplog):
    loop.train(tiny, tmp_path / "source")
    tiny.init_from = str(tmp_path / "source")
    initial_weights.load(plan.make_plan(tiny))
    assert "normalisation" not in caplog.text
    tiny.std = (0.5, 0.5, 0.5)
    initial_weights.load(plan.make_plan(tiny))
    assert "expect another normalisation of images: mean " in caplog.text


def test_a_run_whose_net_has_other_fields_is_warned_of_as_a_file_is(tiny, tmp_path, caplog):
    loop.train(tiny, tmp_path / "source")
    tiny.init_from, tiny.model.activation = str(tmp_path / "source"), "silu"
    initial_weights.load(plan.make_plan(tiny))
    assert "source fits, but its net has activation='relu', this one activation='silu'" in caplog.text


@pytest.mark.parametrize(
    ("name", "classes", "std", "warned"),
    [
        ("shufflenet_v2_x0_5_cifar", 10, (0.2023, 0.1994, 0.2010), False),
        ("shufflenet_v2_x0_5_cifar", 10, (0.2470, 0.2435, 0.2616), True),
        ("shufflenet_v2_x0_5_cifar", 100, (0.2023, 0.1994, 0.2010), True),  # the file is of CIFAR-100's images
    ],
)
def test_published_weights_have_their_code_bases_images(tiny, tmp_path, caplog, name, classes, std, warned):
    """The file does not say it: its layout is known, and what is usual for its net and its number of classes."""
    import safetensors.numpy

    net = create_model(name, num_classes=classes)
    safetensors.numpy.save_file(
        torch_weights.export(net, random_variables(net), "chenyaofo"), tmp_path / "net.safetensors"
    )
    tiny.model.name, tiny.image_size = name, 32
    tiny.init_from, tiny.mean, tiny.std = str(tmp_path / "net.safetensors"), (0.4914, 0.4822, 0.4465), std
    initial_weights.load(plan.make_plan(tiny))
    assert ("expect another normalisation of images" in caplog.text) == warned


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
