"""The loader is strict in both directions, whatever the names, the wrapping and the file."""

import os
import pickle
import string
import zipfile
from collections import OrderedDict

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import create_model, torch_weights
from jaxnets.errors import UserError

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
    state_dict = torch_weights.export(whole, whole.init(jax.random.key(0), images))
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


# Bit by bit tests/test_layouts.py has it for every family.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet1_1_cifar", "shufflenet_v1_g3_cifar", "vgg16_bn_cifar", "resnet50_cifar"])
def test_our_own_names_hold_every_net(name):
    model = create_model(name, width=0.25)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)))
    rng = np.random.default_rng(0)
    made = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), {"batch_stats": {}} | dict(shapes))
    assert_same(torch_weights.load(model, torch_weights.export(model, made, "jaxnets")), made)


def test_half_precision_files_become_float32(theirs, tmp_path):
    half = {key: value.half().numpy() for key, value in theirs.items() if "num_batches" not in key}
    safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
    loaded = load(tmp_path / "half.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}


class Payload:
    """A pickle that would make a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_runs_code_is_refused_without_running_it(tmp_path, legacy):
    mark = tmp_path / "ran"
    file = tmp_path / "evil.pth"
    if legacy:
        file.write_bytes(pickle.dumps({"weight": Payload(str(mark))}))
    else:
        torch.save({"weight": Payload(str(mark))}, file)
    with pytest.raises(UserError, match=r"evil\.pth"):
        load(file)
    assert not mark.exists()


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


def test_a_safetensors_header_that_lies_about_its_size_is_refused(tmp_path):
    file = tmp_path / "lies.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="lies"):
        load(file)


def test_an_archive_that_inflates_is_refused(tmp_path):
    file = tmp_path / "bomb.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(64 << 20))
    with pytest.raises(UserError, match="bomb"):
        load(file)


@pytest.mark.parametrize("source", ["missing.pth", "net.onnx", 3, {"weight": "text"}, {}])
def test_what_is_no_weights_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").touch()
    with pytest.raises(UserError):
        load(source)


def test_unknown_layouts_and_heads_are_refused(theirs, variables):
    with pytest.raises(UserError, match="torchvision"):
        torch_weights.export(create_model("mobilenet_v2", **FIELDS), variables, layout="tf")
    with pytest.raises(UserError, match="head='keep'"):
        load(theirs, head="keep")
