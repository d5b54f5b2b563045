"""The command says what it evaluates, and on which images, or refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxnets import checkpoint, data, evaluate, settings
from jaxnets.errors import UserError
from jaxnets.workdir import Data, keep_data
from tests.tiny_net import configurations, first_variables


@pytest.fixture(scope="module")
def config(digits_dir):
    with configurations(digits_dir) as make:
        yield make()


@pytest.fixture(scope="module")
def variables():
    return first_variables()


@pytest.mark.parametrize(("step", "which", "noted"), [(5, "best", True), (10, "best", False), (5, "5", False)])
def test_the_best_checkpoint_is_said_to_be_the_best_on_these_images(tmp_path, caplog, step, which, noted):
    for saved in ("5", "10"):
        (tmp_path / "checkpoints" / saved).mkdir(parents=True)
    evaluate.note_choice(tmp_path, step, which)
    assert ("--checkpoint=latest evaluates 10, the last" in caplog.text) == noted


@pytest.fixture
def workdir(config, variables, tmp_path):
    """A configuration, and the weights of its net."""
    settings.write(config, tmp_path / "config.json")
    checkpoint.save_variables(tmp_path, variables)
    return tmp_path


def test_another_data_dir_than_the_runs_is_said(workdir, config, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", config.data_dir)
    gone = config.copy_and_resolve_references()
    gone.data_dir = "/nowhere"
    settings.write(gone, workdir / "config.json")
    evaluate.main(["evaluate", f"--workdir={workdir}", "--split=test[:7]"])
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["num_examples"] == 7
    assert f"the run's data_dir /nowhere is not there; using {config.data_dir} instead" in err


def test_images_that_may_have_been_trained_on_are_said(workdir, config, capsys):
    """The run's own split has more images than when it was trained, as a folder has to which some were added."""
    config = config.copy_and_resolve_references()
    config.eval_split = "test[:7]"
    settings.write(config, workdir / "config.json")
    names = tuple(map(str, range(10)))
    for count, said in (7, False), (6, True):
        keep_data(workdir, Data(names, 100, count))
        evaluate.main(["evaluate", f"--workdir={workdir}"])
        err = capsys.readouterr().err
        assert (f"test[:7] has 7 images, and had {count} when the run was trained" in err) == said
    split = data.open_split(config.dataset, config.eval_split, config.data_dir, image_size=16)
    for version, said in (("", False), ("0.9.9", True), (split.identity, False)):
        keep_data(workdir, Data(names, 100, 7, ("", version)))
        evaluate.main(["evaluate", f"--workdir={workdir}"])
        assert ("is not what it was when the run was trained" in capsys.readouterr().err) == said
    evaluate.main(["evaluate", f"--workdir={workdir}", "--split=test[:7]"])
    assert "when the run was trained" not in capsys.readouterr().err


def test_weights_that_overflow_are_no_result(config, variables, tmp_path, capsys):
    settings.write(config, tmp_path / "config.json")
    checkpoint.save_variables(tmp_path, jax.tree.map(lambda values: values * np.float32(1e30), variables))
    with pytest.raises(UserError, match="the loss of checkpoint 0 is (nan|inf): its weights may be damaged"):
        evaluate.main(["evaluate", f"--workdir={tmp_path}", "--split=test[:7]"])
    assert "{" not in capsys.readouterr().out


def test_a_place_that_is_not_there_is_refused_and_not_made(workdir, tmp_path):
    with pytest.raises(UserError, match="data: there is no such folder"):
        evaluate.main(["evaluate", f"--workdir={workdir}", f"--data_dir={tmp_path / 'data'}"])
    assert not (tmp_path / "data").exists()


def test_photographs_that_have_moved_are_asked_for(workdir, config, monkeypatch, tmp_path):
    moved = config.copy_and_resolve_references()
    moved.dataset = f"folder:{tmp_path / 'photos'}"
    run = evaluate.load_run(workdir)
    monkeypatch.setattr(evaluate, "load_run", lambda *_, **__: dataclasses.replace(run, config=moved))
    with pytest.raises(UserError, match=r"folder:.*photos is no longer there; --data_dir=FOLDER says"):
        evaluate.main(["evaluate", f"--workdir={workdir}"])


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_deterministic_run_is_evaluated_so_before_a_device_is_asked_for(
    deterministic, config, variables, tmp_path, monkeypatch
):
    config = config.copy_and_resolve_references()
    config.deterministic = deterministic
    settings.write(config, tmp_path / "config.json")
    checkpoint.save_variables(tmp_path, variables)
    asked = []
    monkeypatch.setattr(evaluate.runtime, "make_deterministic", lambda: asked.append("deterministic"))
    monkeypatch.setattr(evaluate.runtime, "require_device", lambda: asked.append("device"))
    evaluate.main(["evaluate", f"--workdir={tmp_path}", "--split=test[:7]"])
    assert asked == ["deterministic"] * deterministic + ["device"]


def test_an_empty_argument_is_no_default(workdir):
    with pytest.raises(UserError, match="--data_dir is empty"):
        evaluate.main(["evaluate", f"--workdir={workdir}", "--data_dir="])


def test_the_name_of_a_class_is_text(capsys):
    numbers = {"class_accuracy": [0.5] * 3, "loss": 1.0, "accuracy": 0.5, "top5_accuracy": 1.0, "num_examples": 6}
    evaluate._print_table(numbers, ("[old] cat", "[/x]", "bell\a"))
    printed = capsys.readouterr().out
    assert "[old] cat" in printed and "[/x]" in printed and "\a" not in printed
