"""A run is loaded at the checkpoint that is asked for, and evaluated on the classes that it knows, or refused."""

import json

import jax
import numpy as np
import pytest

from configs import digits
from jaxnets import checkpoint, data, evaluate, models, settings
from jaxnets.checkpoint_damage import DamagedError
from jaxnets.errors import UserError
from jaxnets.restore import restore_item
from jaxnets.workdir import Data, keep_data
from tests.tiny_net import TinyNet


@pytest.fixture(scope="module")
def config(digits_dir):
    made = digits.get_config()
    made.data_dir = str(digits_dir)
    made.image_size = 16
    made.eval_batch_size, made.steps_per_call, made.num_workers = 12, 3, 0
    return made


@pytest.fixture(scope="module")
def split(config):
    return data.open_split("digits", "test[:50]", config.data_dir, image_size=config.image_size)


@pytest.fixture(scope="module")
def variables():
    return TinyNet(num_classes=10).init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))


def test_a_large_split_streams_and_a_small_one_is_resident(config, split):
    devices = jax.devices()[:1]
    assert evaluate.load_examples(split, config, devices).keys() == {"image", "label"}
    config = config.copy_and_resolve_references()
    config.resident_limit = split.nbytes - 1
    assert evaluate.load_examples(split, config, devices) == {}


@pytest.fixture
def workdir(config, variables, tmp_path):
    """A configuration, and the weights of a net that is not its own."""
    settings.write(config, tmp_path / "config.json")
    checkpoint.save_variables(tmp_path, variables)
    return tmp_path


def test_a_checkpoint_of_another_net_is_refused(workdir):
    with pytest.raises(UserError, match="checkpoint 0 in .* is of another model"):
        evaluate.load_run(workdir)


def test_weights_from_elsewhere_are_the_best_there_are(workdir, config, variables, monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    config = config.copy_and_resolve_references()
    config.model.name, config.model.width, config.model.stem_stride = "tiny", None, None
    settings.write(config, workdir / "config.json")
    run = evaluate.load_run(workdir, "best")
    assert run.step == 0 and run.model.num_classes == 10
    jax.tree.map(np.testing.assert_array_equal, run.variables, variables)
    with pytest.raises(UserError, match="no averaged weights"):
        evaluate.load_run(workdir, ema=True)


def test_a_checkpoint_deleted_while_it_is_read_is_looked_for_again(workdir, config, monkeypatch):
    """As beside a training run, which keeps the latest few."""
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    config = config.copy_and_resolve_references()
    config.model.name, config.model.width, config.model.stem_stride = "tiny", None, None
    settings.write(config, workdir / "config.json")
    failures = [DamagedError("gone")]

    def gone_once(*args):
        if failures:
            raise failures.pop()
        return restore_item(*args)

    monkeypatch.setattr(evaluate, "restore_item", gone_once)
    assert evaluate.load_run(workdir).step == 0 and not failures
    failures += [DamagedError("gone")] * 2
    with pytest.raises(DamagedError):
        evaluate.load_run(workdir)


@pytest.mark.parametrize("field", ["eval_batch_size", "mean", "dataset", "steps_per_call", "resident", "data_dir"])
def test_a_configuration_that_lacks_a_field_is_refused(workdir, config, field):
    config = config.copy_and_resolve_references().unlock()
    del config[field]
    settings.write(config, workdir / "config.json")
    with pytest.raises(UserError, match=f"config.{field} is missing"):
        evaluate.load_run(workdir)


def test_another_data_dir_than_the_runs_is_said(workdir, config, split, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    monkeypatch.setenv("TFDS_DATA_DIR", config.data_dir)
    gone = config.copy_and_resolve_references()
    gone.model.name, gone.model.width, gone.model.stem_stride = "tiny", None, None
    gone.data_dir, gone.compilation_cache = "/nowhere", False
    settings.write(gone, workdir / "config.json")
    evaluate.main(["evaluate", f"--workdir={workdir}", "--split=test[:7]"])
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["num_examples"] == 7
    assert f"the run's data_dir /nowhere is not there; in its place {config.data_dir}" in err


def test_images_that_may_have_been_trained_on_are_said(workdir, config, monkeypatch, capsys):
    """The run's own split has more images than when it was trained, as a folder has to which some were added."""
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    config = config.copy_and_resolve_references()
    config.model.name, config.model.width, config.model.stem_stride = "tiny", None, None
    config.eval_split, config.compilation_cache = "test[:7]", False
    settings.write(config, workdir / "config.json")
    names = tuple(map(str, range(10)))
    for count, said in (7, False), (6, True):
        keep_data(workdir, Data(names, 100, count))
        evaluate.main(["evaluate", f"--workdir={workdir}"])
        err = capsys.readouterr().err
        assert (f"test[:7] has 7 images, and had {count} when the run was trained" in err) == said
    evaluate.main(["evaluate", f"--workdir={workdir}", "--split=test[:7]"])
    assert "when the run was trained" not in capsys.readouterr().err


def test_an_empty_argument_is_no_default(workdir):
    with pytest.raises(UserError, match="--data_dir is empty"):
        evaluate.main(["evaluate", f"--workdir={workdir}", "--data_dir="])


def test_the_name_of_a_class_is_text(capsys):
    numbers = {"class_accuracy": [0.5] * 3, "loss": 1.0, "accuracy": 0.5, "top5_accuracy": 1.0, "num_examples": 6}
    evaluate._print_table(numbers, ("[old] cat", "[/x]", "bell\a"))
    printed = capsys.readouterr().out
    assert "[old] cat" in printed and "[/x]" in printed and "\a" not in printed
