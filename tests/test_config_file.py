"""Configurations loaded with overrides, and every way to ask for one that is not there."""

import pytest

from jaxnets import config_file
from jaxnets.errors import UserError


def test_overrides_change_fields_and_the_last_counts(repository):
    path = f"{repository}/configs/mnv2.py:x0_5"
    config = config_file.load(path, ["--config.num_epochs=5", "--config.augment.flip=False", "--config.num_epochs=7"])
    assert (config.num_epochs, config.augment.flip, config.model.width) == (7, False, 0.5)
    assert config_file.name_of(path) == "mnv2_x0_5"


@pytest.mark.parametrize("last", [(0.5, 1.0), (12, 16), ()])
def test_a_later_tuple_replaces_an_earlier_one(repository, last):
    overrides = [f"--config.progressive_sizes={sizes}" for sizes in ((8, 32), last)]
    assert config_file.load(f"{repository}/configs/mnv2.py", overrides).progressive_sizes == last


@pytest.mark.parametrize(
    ("file", "override", "says"),
    [
        ("nothing.py", "--config.seed=1", "cannot be loaded"),
        ("mnv2.py:x9", "--config.seed=1", "x9"),
        ("mnv2.py", "--config.learning_rat=1", "no field learning_rat"),
        ("mnv2.py", "--config.optimizer.learning_rat=1", "did you mean learning_rate"),
        ("mnv2.py", "--config.num_epochs=many", "num_epochs"),
        ("mnv2.py", "--num_epochs=3", "unexpected argument '--num_epochs=3'"),
        ("mnv2.py", "--config.num_epochs", "unexpected argument"),
    ],
)
def test_what_cannot_be_is_one_sentence(repository, file, override, says):
    with pytest.raises(UserError, match=says) as caught:
        config_file.load(f"{repository}/configs/{file}", [override])
    assert "\n" not in str(caught.value)
