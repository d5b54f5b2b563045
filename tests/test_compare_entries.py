"""The nets of a comparison, as they stand on the command line and in presets."""

import shutil

import pytest

from jaxnets import compare_entries, compare_runs, compare_training
from jaxnets.errors import UserError
from jaxnets.models import MODELS
from tests.tiny_net import TinyNet, small_digits


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ("a", ["a"]),
        ("a,,b,", ["a", "b"]),
        ("a:x=(1,2),b", ["a:x=(1,2)", "b"]),
        ("a:x=[1,2],b", ["a:x=[1,2]", "b"]),
        ("a:x=(1,(2,[3,4]),5):y=[],b[12],c", ["a:x=(1,(2,[3,4]),5):y=[]", "b[12]", "c"]),
    ],
)
def test_nets_are_split_outside_brackets(text, models):
    assert compare_entries.split_models(text) == models


def test_a_field_may_be_a_list(digits_dir):
    """The net is that of the tuple."""
    config = small_digits()
    config.data_dir = str(digits_dir)
    narrow = "mobilenet_v1_cifar:width=0.25"
    specs = [narrow, *(f"{narrow}:stage_strides={strides}" for strides in ("[1,1,2,2,2]", "(1,1,2,2,2)"))]
    nets = (compare_runs.Net.of(*compare_entries.make_entries({"digits": config}, [spec])) for spec in specs)
    default, one, other = (net.macs for net in nets)
    assert one == other > default > 0


def test_a_configurations_name_may_be_in_latin_1(repository, tmp_path):
    path = tmp_path / "caf\udce9.py"
    shutil.copy(repository / "configs" / "digits.py", path)
    configs = compare_entries.load_configs([str(path)], ())
    assert [entry.label for entry in compare_entries.make_entries(configs)] == ["caf\ufffd"]


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
        (["no_net", "no_net"], "no net 'no_net'"),
        (["tiny:width"], "must be FIELD=VALUE"),
        (["tiny", "tiny"], "twice"),
        (["tiny:name=resnet18_cifar"], "name comes before its fields"),
        (["tiny:width=1", "tiny_width=1"], "twice"),  # one folder
    ],
)
def test_nets_that_cannot_be_compared_are_refused(models, says, monkeypatch):
    for name in ("tiny", "tiny_width=1"):
        monkeypatch.setitem(MODELS, name, TinyNet)
    with pytest.raises(UserError, match=says):
        compare_entries.make_entries({"digits": small_digits()}, models)


@pytest.mark.parametrize("name", compare_entries.PRESETS)
def test_a_preset_can_be_trained(name, repository, digits_dir, tmp_path):
    preset = compare_entries.PRESETS[name]
    overrides = [*preset.overrides, "--config.dataset=digits", f"--config.data_dir={digits_dir}"]
    configs = compare_entries.load_configs([f"{repository}/configs/default.py"], overrides, preset.models)
    entries = compare_entries.make_entries(configs, preset.models)
    compare_training.check(entries, 1, tmp_path / "out")
    for entry in entries:
        compare_runs.Net.of(entry)
    assert [entry.config.model.name for entry in entries] == list(preset.models)
    assert {entry.config.num_epochs for entry in entries} == {3}
