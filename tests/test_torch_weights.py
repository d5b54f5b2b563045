"""The loader is strict in both directions, whatever the names, the wrapping and the file."""

import json
import logging
import shlex
import string
from collections import OrderedDict

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import create_model, list_models, predict, torch_weights
from jaxnets.errors import UserError
from jaxnets.weights import weight_files
from tests.test_models import random_variables

FIELDS = {"width": 0.25, "num_classes": 7}


@pytest.fixture(scope="module")
def theirs():
    """The state_dict of a live PyTorch net with random statistics."""
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.25)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return net.state_dict()


@pytest.fixture(scope="module")
def variables(theirs):
    return torch_weights.load("mobilenet_v2", theirs, **FIELDS)


def load(source, **fields):
    return torch_weights.load("mobilenet_v2", source, **(FIELDS | fields))


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def renamed(state_dict, name):
    """The entries under other module names, in the same order."""
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in state_dict))
    names = {module: name(i) for i, module in enumerate(modules)}
    return OrderedDict((f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}", v) for k, v in state_dict.items())


def test_the_variables_are_those_of_the_model_and_float32(theirs, variables):
    model = create_model("mobilenet_v2", **FIELDS)
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32)))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), variables)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), dict(expected))
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, theirs["features.0.0.weight"].numpy().transpose(2, 3, 1, 0))


def test_what_is_not_finite_is_said(theirs, caplog):
    broken = theirs | {"classifier.1.weight": theirs["classifier.1.weight"] * torch.nan}
    load(broken)
    assert "the mapping: weight for the net's classifier is not finite everywhere" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net", "state_dict_ema"])
def test_prefixes_and_wrappers_are_taken_off(theirs, variables, prefix, wrapper):
    source = {prefix + key: value for key, value in theirs.items()}
    if wrapper:
        source = {wrapper: source, "epoch": 3}
    assert_same(load(source), variables)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_names_that_keep_the_forward_order_load(theirs, variables, data):
    words = data.draw(st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=5), min_size=60, max_size=60))
    assert_same(load(renamed(theirs, lambda i: f"{words[i % 60]}.{i:03}")), variables)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_dropped_added_or_reshaped_entry_is_refused(theirs, data):
    keys = [key for key in theirs if not key.endswith("num_batches_tracked")]
    key = data.draw(st.sampled_from(keys))
    source = dict(theirs)
    if data.draw(st.booleans()):
        source = renamed(source, lambda i: f"m{i:03}")
        key = list(source)[list(theirs).index(key)]
    match data.draw(st.sampled_from(["dropped", "added", "reshaped"])):
        case "dropped":
            del source[key]
        case "added":
            source[f"extra.{data.draw(st.integers(0, 9))}.weight"] = torch.zeros(3, 2)
        case "reshaped":
            value = source[key]
            source[key] = torch.cat([value, value[:1]])
    with pytest.raises(UserError):
        load(source)


def test_a_refusal_names_both_sides(theirs):
    source = dict(theirs)
    source["classifier.1.weight"] = torch.zeros(9, 1280)
    source["classifier.1.bias"] = torch.zeros(9)
    with pytest.raises(UserError, match=r"(?s)classifier.1.*classifier"):
        load(source)


def test_another_number_of_classes_loads_all_but_the_head_when_asked(theirs, variables):
    dropped = load(theirs, num_classes=3, head="drop")
    assert dropped["params"]["classifier"]["kernel"].shape == (1280, 3)
    for tree in (dropped, expected := jax.tree.map(np.asarray, variables)):
        tree["params"] = {name: value for name, value in tree["params"].items() if name != "classifier"}
    assert_same(dropped, expected)
    with pytest.raises(UserError):
        load(theirs, num_classes=3)


@pytest.mark.parametrize("name", ["vgg16_bn", "mobilenet_v2_mini"])
def test_a_net_of_features_has_no_hidden_layers_before_a_classifier(name):
    whole = create_model(name, num_classes=3, width=0.125)
    model = whole.clone(features_only=True)
    images = np.zeros((1, 64, 64, 3), np.float32)
    state_dict = torch_weights.export(whole, random_variables(whole))
    expected = jax.eval_shape(model.init, jax.random.key(0), images)
    for source, head in (
        (state_dict, "drop"),
        (torch_weights.export(model, torch_weights.load(model, state_dict, head="drop")), "strict"),
    ):
        loaded = torch_weights.load(model, source, head=head)
        assert jax.tree.map(np.shape, loaded) == {"batch_stats": {}} | jax.tree.map(np.shape, dict(expected))


@pytest.mark.parametrize("fields", [{"num_classes": 0}, {"features_only": True}])
def test_a_net_without_classifier_takes_the_rest_when_asked(theirs, variables, fields):
    expected = variables | {"params": {n: v for n, v in variables["params"].items() if n != "classifier"}}
    assert_same(load(theirs, head="drop", **fields), expected)
    headless = {key: value for key, value in theirs.items() if not key.startswith("classifier")}
    assert_same(load(headless, **fields), expected)
    with pytest.raises(UserError, match=r"classifier\.1 .* is left over.*head='drop'"):
        load(theirs, **fields)


def test_a_file_without_classifier_starts_one_when_asked(theirs, variables):
    headless = {key: value for key, value in theirs.items() if not key.startswith("classifier")}
    with pytest.raises(UserError, match=r"classifier\.1\.weight is missing, for the net's classifier"):
        load(headless)
    loaded = load(headless, head="drop")
    kernel = loaded["params"]["classifier"]["kernel"]
    assert kernel.shape == (1280, 7) and 0 < np.abs(kernel).max() < 0.1
    np.testing.assert_array_equal(
        loaded["params"]["head"]["conv"]["kernel"], variables["params"]["head"]["conv"]["kernel"]
    )


def test_a_net_and_fields_that_it_does_not_have(theirs):
    with pytest.raises(UserError, match="widht"):
        torch_weights.load(create_model("mobilenet_v2"), theirs, widht=0.25)


def test_a_bias_in_front_of_a_batch_norm_is_folded_into_its_mean(theirs, variables):
    source = OrderedDict()
    for key, value in theirs.items():
        source[key] = value
        if key == "features.0.0.weight":
            source["features.0.0.bias"] = torch.arange(len(value), dtype=torch.float32)
    loaded = load(source)
    shift = np.arange(8, dtype=np.float32)
    means = (tree["batch_stats"]["stem"]["bn"]["mean"] for tree in (variables, loaded))
    np.testing.assert_allclose(next(means) - shift, next(means), rtol=1e-6)


def test_export_gives_back_every_bit(theirs, variables):
    state_dict = torch_weights.export(create_model("mobilenet_v2", **FIELDS), variables, layout="torchvision")
    assert list(state_dict) == list(theirs)
    for key, value in theirs.items():
        assert state_dict[key].dtype == value.numpy().dtype and np.array_equal(state_dict[key], value.numpy())


def test_half_precision_files_become_float32(theirs, tmp_path):
    half = {key: value.half().numpy() for key, value in theirs.items() if "num_batches" not in key}
    safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
    loaded = load(tmp_path / "half.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "half", "noise"])
def test_a_damaged_file_is_one_sentence(theirs, tmp_path, suffix, damage):
    file = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(theirs, file)
    else:
        safetensors.numpy.save_file({key: value.numpy() for key, value in theirs.items()}, file)
    content = file.read_bytes()
    noise = np.random.default_rng(0).bytes(4096)
    file.write_bytes({"empty": b"", "half": content[: len(content) // 2], "noise": noise}[damage])
    with pytest.raises(UserError, match="net"):
        load(file)


@pytest.mark.parametrize("source", ["missing.pth", "net.onnx", 3, {"weight": "text"}, {}])
def test_what_is_no_weights_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").touch()
    with pytest.raises(UserError):
        load(source)


@pytest.fixture
def told(variables, tmp_path):
    """A file that says what its net is."""
    model = create_model("mobilenet_v2", activation="silu", stage_strides=(1, 2, 2, 2, 1, 1, 1), **FIELDS)
    content = torch_weights.export(model, variables, "jaxnets")
    metadata = weight_files.metadata_of(weight_files.Images(), torch_weights.fields_of(model))
    safetensors.numpy.save_file(content, tmp_path / "net.safetensors", metadata)
    return tmp_path / "net.safetensors"


def test_a_file_is_refused_for_a_net_that_its_shapes_fit_but_not_its_fields(told, variables):
    whole = {"activation": "silu", "stage_strides": [1, 2, 2, 2, 1, 1, 1]}
    assert_same(load(told, **whole), variables)
    with pytest.raises(UserError) as error:
        load(told, stage_strides=whole["stage_strides"])
    assert str(error.value) == (
        f"{told} fits, but its net has activation='silu', this one activation='relu6': give this one the same, on the "
        "command line with --field=activation=silu"
    )
    with pytest.raises(UserError, match=r"has activation='silu', stage_strides=\[1, 2, 2, 2, 1, 1, 1\], this one acti"):
        load(told)
    with pytest.raises(UserError, match=r"net.safetensors does not fit MobileNetV2: .*; its net has width=0.25, acti"):
        load(told, width=0.5)


def test_a_file_that_says_what_its_net_is_is_not_held_for_the_published_one(variables, tmp_path, caplog):
    model = create_model("mobilenet_v2", stem_stride=1, **FIELDS)
    content = torch_weights.export(model, variables, "torchvision")
    for known in (torch_weights.fields_of(model), {}):
        with caplog.at_level(logging.WARNING):
            assert not caplog.text
            safetensors.numpy.save_file(content, tmp_path / "net.safetensors", {weight_files.FIELDS: json.dumps(known)})
            load(tmp_path / "net.safetensors", stem_stride=1)
    assert "the published net of torchvision has stem_stride=2, this one stem_stride=1" in caplog.text


def test_fields_of_training_and_precision_may_be_others(told, variables):
    others = {"dropout": 0.7, "stochastic_depth": 0.1, "bn_momentum": 0.5, "dtype": "bfloat16", "bn_axis_name": "x"}
    assert_same(load(told, activation="silu", stage_strides=(1, 2, 2, 2, 1, 1, 1), **others), variables)


def test_weights_to_be_trained_on_may_be_of_other_fields_and_it_is_said(told, caplog):
    with caplog.at_level(logging.WARNING):
        load(told, num_classes=3, head="drop", stage_strides=(1, 2, 2, 2, 1, 1, 1))
    assert "net.safetensors fits, but its net has activation='silu', this one activation='relu6'" in caplog.text


def test_a_file_of_a_net_with_more_fields_than_ours_is_refused(variables, tmp_path):
    model = create_model("mobilenet_v2", **FIELDS)
    content = torch_weights.export(model, variables)
    for said in ({"twist": True}, {"twist\x1b": [1] * 500}):
        metadata = {weight_files.FIELDS: json.dumps(torch_weights.fields_of(model) | said)}
        safetensors.numpy.save_file(content, tmp_path / "net.safetensors", metadata)
        with pytest.raises(UserError, match=r"its net has twist.*, this one no twist") as error:
            torch_weights.load(model, tmp_path / "net.safetensors")
        assert str(error.value).isprintable()


@pytest.mark.parametrize("name", list_models())
def test_the_fields_of_a_net_are_json_and_arguments_that_make_it(name):
    fields = torch_weights.fields_of(create_model(name))
    assert json.loads(json.dumps(fields)) == fields and len(json.dumps(fields)) < weight_files.MAX_VALUE / 4
    arguments = shlex.split(torch_weights.as_arguments(fields))
    again = dict(predict.field(argument.removeprefix("--field=")) for argument in arguments)
    assert again == fields and torch_weights.fields_of(create_model(name, **again)) == fields


def test_unknown_layouts_and_heads_are_refused(theirs, variables):
    with pytest.raises(UserError, match="torchvision"):
        torch_weights.export(create_model("mobilenet_v2", **FIELDS), variables, layout="tf")
    with pytest.raises(UserError, match="head='keep'"):
        load(theirs, head="keep")
