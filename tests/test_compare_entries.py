"""The nets of a comparison, as they stand on the command line and in presets."""

import pytest

from jaxnets import compare_entries, compare_runs, config_file
from jaxnets.errors import UserError
from tests.tiny_net import small_digits


def test_a_net_keeps_no_field_of_the_configurations_own(repository):
    configs = compare_entries.load_configs(
        [f"{repository}/configs/mnv2.py:x0_5"], ["--config.model.dtype=bfloat16"], ("x",)
    )
    entries = compare_entries.make_entries(
        configs, ["shufflenet_v2_x1_*_cifar", "mobilenet_v2_cifar:width=0.75:activation=silu"]
    )
    assert [entry.label for entry in entries] == [
        "shufflenet_v2_x1_0_cifar",
        "shufflenet_v2_x1_5_cifar",
        "mobilenet_v2_cifar:width=0.75:activation=silu",
    ]
    assert [entry.config.model.width for entry in entries] == [None, None, 0.75]
    assert {entry.config.model.dtype for entry in entries} == {"bfloat16"}
    assert entries[2].config.model.activation == "silu"
    own = compare_entries.make_entries(configs)
    assert [(entry.label, entry.config.model.width) for entry in own] == [("mnv2_x0_5", 0.5)]


def test_a_folder_of_images_has_the_same_name_in_any_working_directory(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (config,) = compare_entries.load_configs(
        [f"{repository}/configs/mnv2.py"], ["--config.dataset=folder:photos"]
    ).values()
    assert config.dataset == f"folder:{tmp_path / 'photos'}"


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (["nothing_*"], "no net matches"),
        (["tiny:width"], "must be FIELD=VALUE"),
        (["tiny", "tiny"], "twice"),
        (["tiny:name=resnet18_cifar"], "named in front of its fields"),
        (["tiny:width=1", "tiny_width=1"], "twice"),  # one folder
    ],
)
def test_nets_that_cannot_be_compared_are_refused(models, says):
    with pytest.raises(UserError, match=says):
        compare_entries.make_entries({"digits": small_digits()}, models)


@pytest.mark.parametrize("name", compare_entries.PRESETS)
def test_a_preset_can_be_trained(name, repository, tmp_path):
    preset = compare_entries.PRESETS[name]
    configs = compare_entries.load_configs([f"{repository}/configs/default.py"], preset.overrides, preset.models)
    entries = compare_entries.make_entries(configs, preset.models)
    for entry in entries:
        entry.config.batch_size = entry.config.eval_batch_size = 100
    compare_runs.check(entries, 1, tmp_path)
    assert [entry.config.model.name for entry in entries] == list(preset.models)
    assert {entry.config.num_epochs for entry in entries} == {3}


def test_the_users_fields_come_after_the_presets(repository):
    overrides = [*compare_entries.PRESETS["classic"].overrides, "--config.num_epochs=1"]
    assert config_file.load(f"{repository}/configs/default.py", overrides).num_epochs == 1
