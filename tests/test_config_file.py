"""Configurations loaded with overrides, and every way to ask for one that is not there."""

import os
import re
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from jaxnets import config_file
from jaxnets.errors import UserError


def test_overrides_change_fields_and_the_last_counts(repository):
    path = f"{repository}/configs/mnv2.py:x0_5"
    config = config_file.load(path, ["--config.num_epochs=5", "--config.augment.flip=False", "--config.num_epochs=7"])
    assert (config.num_epochs, config.augment.flip, config.model.width) == (7, False, 0.5)
    assert config_file.name_of(path) == "mnv2_x0_5"


def test_none_leaves_a_field_to_what_it_was_without_the_file(repository):
    overrides = ["--config.init_from=None", "--config.model.width=0.5", "--config.model.width=None"]
    config = config_file.load(f"{repository}/configs/finetune.py", overrides)
    assert config.init_from is None and config.model.width is None


def test_a_configuration_finds_its_neighbours_from_any_folder(repository, tmp_path):
    path = f"{repository}/configs/mnv2.py:x0_5"
    script = f"from jaxnets import config_file; print(config_file.load({path!r}).model.width)"
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "0.5\n", done.stderr


@pytest.mark.parametrize("last", [(0.5, 1.0), (12, 16), ()])
def test_a_later_tuple_replaces_an_earlier_one(repository, last):
    overrides = [f"--config.progressive_sizes={sizes}" for sizes in ((8, 32), last)]
    assert config_file.load(f"{repository}/configs/mnv2.py", overrides).progressive_sizes == last


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import nothing_here", "ModuleNotFoundError: No module named 'nothing_here'"),
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("def get_config(): raise ValueError('no good')", "ValueError: no good"),
        ("def get_config(): return 3", "get_config does not return a ConfigDict"),
        ("def get_config(): open('/no/such/file')", "No such file or directory: '/no/such/file'"),
    ],
)
def test_a_configuration_that_fails_says_why(tmp_path, text, says):
    (tmp_path / "mine.py").write_text(text + "\n")
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        config_file.load(str(tmp_path / "mine.py"))
    assert str(caught.value).count("mine.py") >= 1 and "Traceback" not in str(caught.value)


def test_a_module_that_is_not_there_is_no_field(tmp_path):
    (tmp_path / "mine.py").write_text("from models_of_mine import x\n")
    with pytest.raises(UserError, match="cannot be loaded: ModuleNotFoundError: No module named 'models_of_mine'"):
        config_file.load(str(tmp_path / "mine.py"), ["--config.model.width=1"])


def test_words_that_contradict_each_other_are_said_in_full(repository):
    with pytest.raises(UserError, match=r"x0_5 and x1_0 contradict each other: name one; .* recipes default") as caught:
        config_file.load(f"{repository}/configs/mnv2.py:x0_5,x1_0")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("form", [["--config=a.py:x"], ["--config", "a.py:x"], ["-config=a.py:x"]])
def test_the_path_is_found_however_it_is_given(form):
    assert config_file.paths_of(["train.py", "--config.seed=1", *form, "--workdir=w"]) == ["a.py:x"]


@pytest.mark.parametrize(
    ("file", "override", "says"),
    [
        ("nothing.py", "--config.seed=1", "cannot be loaded"),
        ("mnv2.py:x9", "--config.seed=1", "x9"),
        ("default.py:quick", "--config.seed=1", "default.py takes no words such as 'quick'"),
        ("mnv2.py", "--config.learning_rat=1", "no field learning_rat"),
        ("mnv2.py", "--config.optimizer.learning_rat=1", "did you mean learning_rate"),
        ("mnv2.py", "--config.num_epochs=many", "num_epochs"),
        (
            "mnv2.py",
            "--config.schedule.warmup_epoch=1",
            "has no field schedule.warmup_epoch; did you mean warmup_epochs",
        ),
        ("mnv2.py", "--config.optimizer=adamw", "optimizer is a group of fields"),
        ("mnv2.py", "--config.optimizer=None", "optimizer is a group of fields"),
        ("mnv2.py", "--config.optimizr=None", "no field optimizr"),
        ("mnv2.py", "--config.optimizr.name=None", "no field optimizr.name"),
        ("mnv2.py", "--num_epochs=3", "unexpected argument '--num_epochs=3'"),
        ("mnv2.py", "--config.num_epochs", "unexpected argument"),
    ],
)
def test_what_cannot_be_is_one_sentence(repository, file, override, says):
    with pytest.raises(UserError, match=says) as caught:
        config_file.load(f"{repository}/configs/{file}", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("config.num_epoch = 3", "sets num_epoch, which is not a field of a run; did you mean num_epochs"),
        ("config.schedule.warmup_epoch = 2.0", "sets warmup_epoch, which is not a field of a run; did you mean warm"),
        ("config.augment.update(blur=1)", "sets blur, which is not a field of a run; configs/default.py lists them"),
    ],
)
def test_a_field_misspelt_in_a_file_is_one_sentence(tmp_path, line, says):
    file = tmp_path / "own.py"
    file.write_text(
        "from configs import default\n\n"
        f"def get_config():\n    config = default.get_config()\n    {line}\n    return config\n"
    )
    with pytest.raises(UserError, match=says) as caught:
        config_file.load(str(file), ["--config.num_epochs=3", "--config.optimizer.momentum=0.5"])
    assert "\n" not in str(caught.value)


def test_of_a_field_given_twice_the_later_counts(repository):
    """A tuple's flag would hold the items of both."""
    values = flags.FlagValues()
    argv = ["", f"--config={repository}/configs/mnv2.py", "--config.progressive_sizes=8,16", "--config.seed=3"]
    argv += ["--config.progressive_sizes=12,32", "more"]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    assert config_file.parse(values, argv) == ["", "more"]
    assert values["config"].value.progressive_sizes == (12, 32) and values["config"].value.seed == 3


def test_two_configurations_are_refused(repository):
    argv = ["", "--config=a.py", "--config.num_epochs=3", "--config=b.py"]
    with pytest.raises(UserError, match="--config is given 2 times, as a.py and as b.py; a run takes one"):
        config_file.parse(flags.FlagValues(), argv)
