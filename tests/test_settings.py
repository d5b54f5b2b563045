"""Bad fields are refused by name; a configuration survives its file; what decides a result is compared."""

from types import SimpleNamespace

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import default
from jaxnets import settings
from jaxnets.errors import UserError


def changed(**fields):
    config = default.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


BAD = {
    "batch_size": [0, -8],
    "num_epochs": [0, -1],
    "image_size": [0],
    "steps_per_call": [0],
    "eval_batch_size": [0],
    "checkpoint_every_epochs": [0],
    "checkpoint_every_steps": [-1],
    "resident": ["sometimes"],
    "log_every_steps": [0],
    "seed": [-1, 2**32],
    "optimizer__learning_rate": [0.0, -0.1, float("nan"), float("inf")],
    "optimizer__momentum": [1.0, -0.1, float("nan")],
    "optimizer__weight_decay": [-1e-4, float("inf")],
    "optimizer__name": ["adamwe"],
    "schedule__name": ["cosin"],
    "schedule__warmup_epochs": [-1.0],
    "schedule__boundaries": [(0.5, 1.0)],
    "model__dtype": ["float8", "float16"],
    "label_smoothing": [1.0],
    "ema_decay": [1.0],
    "augment__crop_padding": [32, -1],
    "augment__cutout": [33],
    "augment__mixup": [-0.1, float("inf")],
    "augment__cutmix": [-0.1],
    "crop_area": [-0.1, 1.1],
    "progressive_sizes": [(16, 33), (0,), (16.5,), (0.5, 1.1), (0.0, 1.0), (float("nan"),), (True,), (0.5, 1)],
    "optimizer__batch_scaling": ["square"],
    "mean": [(0.5, 0.5)],
    "std": [(0.5, 0.5, 0.0)],
    "num_workers": [-1],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_with_its_field(field, value):
    name = field.replace("__", ".")
    with pytest.raises(UserError, match=rf"^config\.{name} must be .*, not "):
        settings.check(changed(**{field: value}))


@pytest.mark.parametrize("field", ["init_from", "data_dir"])
def test_an_empty_path_is_refused(field):
    """As of a variable of the shell that is not set."""
    with pytest.raises(UserError, match=f"config.{field}"):
        settings.check(changed(**{field: ""}))


def test_the_defaults_pass():
    settings.check(default.get_config())


def test_crops_made_where_images_are_read_cannot_be_resident():
    settings.check(changed(crop_area=0.1))
    with pytest.raises(UserError, match="config.crop_area=0.1 .*config.resident"):
        settings.check(changed(crop_area=0.1, resident="true"))


def test_a_configuration_survives_its_file(tmp_path):
    config = changed(model__stage_strides=(1, 1, 2, 2, 1, 2, 1), optimizer__learning_rate=0.1 + 0.2)
    settings.write(config, tmp_path / "config.json")
    restored = settings.read(tmp_path / "config.json")
    assert settings.as_dict(restored) == settings.as_dict(config)
    settings.check(restored)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"model": 3}', '{"model": {', "\x00\xff"])
def test_a_broken_file_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json"):
        settings.read(tmp_path / "config.json")


def test_a_missing_file_names_the_folder(tmp_path):
    with pytest.raises(UserError, match="not the workdir of a run"):
        settings.read(tmp_path / "config.json")


@given(st.sampled_from(sorted(settings.flatten(default.get_config().to_dict()))))
def test_every_field_but_the_free_ones_keeps_runs_apart(name):
    saved = settings.as_dict(default.get_config())
    new = settings.as_dict(default.get_config())
    *path, last = name.split(".")
    node = new
    for part in path:
        node = node[part]
    node[last] = "changed"
    assert list(settings.differences(saved, new)) == ([] if name in settings.FREE_FIELDS else [name])


def test_a_folder_of_images_may_move_but_no_other_data_set_takes_its_place():
    def differing(before, now):
        return list(settings.differences({"dataset": before}, {"dataset": now}))

    assert differing("folder:/here", "folder:/there") == []
    assert differing("folder:/here", "cifar10") == differing("cifar10", "folder:/here") == ["dataset"]


def test_the_free_fields_exist():
    assert settings.flatten(default.get_config().to_dict()).keys() >= settings.FREE_FIELDS


def test_the_model_takes_the_classes_of_the_data_set():
    assert settings.make_model(changed(), 100).num_classes == 100
    assert settings.make_model(changed(model__num_classes=12), 10).num_classes == 12
    with pytest.raises(UserError, match="config.model.num_classes=5 is less than the 10 classes"):
        settings.make_model(changed(model__num_classes=5), 10)


@pytest.mark.parametrize(
    "fields", [{"model__name": "mobilenet_v9"}, {"model__width": 0.0}, {"model__activation": "rellu"}]
)
def test_a_bad_model_is_refused_with_its_field(fields):
    (value,) = fields.values()
    with pytest.raises(UserError, match=f"config.model.*{value}"):
        settings.make_model(changed(**fields), 10)


def test_flatten_joins_names_with_dots():
    nested = ml_collections.ConfigDict({"a": 1, "b": {"c": 2, "d": {"e": 3}}})
    assert settings.flatten(nested.to_dict()) == {"a": 1, "b.c": 2, "b.d.e": 3}


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "10.0", "bfloat16"),
        ("gpu", "gfx942", "bfloat16"),
    ],
)
def test_auto_is_bfloat16_where_the_hardware_is_made_for_it(monkeypatch, platform, capability, dtype):
    device = SimpleNamespace(platform=platform, **({"compute_capability": capability} if capability else {}))
    monkeypatch.setattr(settings.jax, "local_devices", lambda: [device])
    assert settings.compute_dtype("auto") == dtype
    assert settings.compute_dtype("bfloat16") == "bfloat16"


@pytest.mark.parametrize(
    ("saved", "new", "differ"),
    [
        ("photos", "photos:1.0.0", False),
        ("photos:1.0.0", "photos", False),
        ("photos", "pictures", True),
        ("photos:1.0.0", "photos:2.0.0", True),
        ("folder:a", "folder", True),
        ("folder:a", "folder:b", False),
        ("folder:a", "photos", True),
    ],
)
def test_a_data_set_may_be_named_with_its_version_and_a_folder_may_move(saved, new, differ):
    assert bool(settings.differences({"dataset": saved}, {"dataset": new})) == differ


def test_a_field_that_an_earlier_version_did_not_have_keeps_no_run_from_resuming():
    new = settings.as_dict(default.get_config())
    saved = {name: dict(value) if isinstance(value, dict) else value for name, value in new.items()}
    del saved["optimizer"]["decay_vectors"]
    assert settings.differences(saved, new) == {}
    new["optimizer"]["decay_vectors"] = True
    assert settings.differences(saved, new) == {"optimizer.decay_vectors": (False, True)}
