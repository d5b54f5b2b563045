"""What comes out of a file or a mapping before anyone asks which net it is for."""

import json
import logging

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxnets.errors import UserError
from jaxnets.weights import weight_files

ENTRIES = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2])}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_pytorch_file_keeps_names_order_and_values(tmp_path, suffix):
    torch.save(ENTRIES, tmp_path / f"net{suffix}")
    weights = weight_files.read(tmp_path / f"net{suffix}")
    assert list(weights.entries) == list(ENTRIES) and weights.ordered
    assert all(torch.equal(weights.entries[name], value) for name, value in ENTRIES.items())


def test_the_older_pytorch_format_is_read(tmp_path):
    torch.save(ENTRIES, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    assert list(weight_files.read(tmp_path / "net.pth").entries) == list(ENTRIES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_type_becomes_float32(tmp_path, dtype):
    tensor = torch.tensor([0.5, -3.0, 1024.0], dtype=dtype)
    safetensors.torch.save_file({"x": tensor}, tmp_path / "net.safetensors")
    for value in (tensor, weight_files.read(tmp_path / "net.safetensors").entries["x"]):
        array = weight_files.to_numpy(value)
        assert array.dtype == np.float32 and array.tolist() == [0.5, -3.0, 1024.0]


def test_safetensors_does_not_keep_the_order(tmp_path):
    safetensors.torch.save_file(ENTRIES, tmp_path / "net.safetensors")
    weights = weight_files.read(tmp_path / "net.safetensors")
    assert weights.entries.keys() == ENTRIES.keys() and not weights.ordered


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(3),
        np.array(["text"]),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
    ],
)
def test_tensors_without_plain_numbers_are_refused(value):
    with pytest.raises(UserError, match="tensor"):
        weight_files.to_numpy(value)


@pytest.mark.parametrize(("plain", "averaged"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_the_plain_weights_are_taken_beside_averaged_ones_and_it_is_said(caplog, plain, averaged):
    content = {averaged: {"x": np.zeros(1)}, plain: {"x": np.ones(1)}, "epoch": 3}
    with caplog.at_level(logging.WARNING):
        assert weight_files.unwrap(content, "here")["x"] == 1
    assert f"holds {plain} and {averaged}; using {plain}" in caplog.text
    assert weight_files.unwrap({averaged: {"x": np.zeros(1)}}, "here")["x"] == 0


def test_a_checkpoint_with_the_milestones_of_its_schedule_is_read(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    content = {"state_dict": {"x": torch.ones(2)}, "optimizer": optimizer.state_dict(), "s": schedule.state_dict()}
    torch.save(content, tmp_path / "net.pth")
    np.testing.assert_array_equal(weight_files.read(tmp_path / "net.pth").entries["x"], np.ones(2))


def test_a_wrapper_around_itself_comes_to_an_end():
    content = {}
    content["model"] = content
    with pytest.raises(UserError, match="here"):
        weight_files.unwrap(content, "here")


def test_names_that_differ_only_in_their_wrapping_are_refused():
    with pytest.raises(UserError, match=r"two entries called a\.weight"):
        weight_files.unwrap({"a.weight": np.zeros(1), "module.a.weight": np.zeros(1)}, "here")


def test_the_count_of_an_averaged_model_is_no_weight():
    """As torch.optim.swa_utils.AveragedModel has it beside the weights."""
    content = {"n_averaged": np.array(5), "module.a.weight": np.zeros(1)}
    assert weight_files.unwrap(content, "here").keys() == {"a.weight"}


def test_a_whole_model_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pth")
    with pytest.raises(UserError, match="state_dict"):
        weight_files.read(tmp_path / "net.pth")


def test_without_pytorch_its_files_say_what_to_install(tmp_path, monkeypatch):
    torch.save(ENTRIES, tmp_path / "net.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[torch\]'"):
        weight_files.read(tmp_path / "net.pth")


def test_a_folder_is_no_weight_file(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        weight_files.read(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"jaxnets.mean": "[0, 0, 0]"}, None),
        ({"mean": "0.5", "std": "0.5"}, None),
        ({"format": "pt"}, None),
        ({"jaxnets.mean": "[0.1, 0.2, 0.3]", "jaxnets.std": "[1, 2, 3]"}, ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))),
    ],
)
def test_a_safetensors_file_may_say_how_its_images_are_normalised(tmp_path, metadata, expected):
    save_file({"a.weight": np.ones(3, np.float32)}, tmp_path / "net.safetensors", metadata)
    assert weight_files.read(tmp_path / "net.safetensors").images == weight_files.Images(expected)


@pytest.mark.parametrize("mean", ["1", "[1, 2]", "[1, 2, 1e999]", '["a", 1, 2]', "{", '"abc"', "[" * 10_000])
def test_numbers_that_normalise_nothing_are_one_sentence(tmp_path, mean):
    for values in ((mean, "[1, 1, 1]"), ("[1, 1, 1]", "[1, 0, 1]")):
        metadata = dict(zip(weight_files.NORMALIZATION, values))
        save_file({"a.weight": np.ones(3, np.float32)}, tmp_path / "net.safetensors", metadata)
        with pytest.raises(UserError, match="net.safetensors: jaxnets.mean and jaxnets.std must be three numbers"):
            weight_files.read(tmp_path / "net.safetensors")


NORMALIZATIONS = st.tuples(st.tuples(*[st.floats(-300, 300)] * 3), st.tuples(*[st.floats(1e-6, 300)] * 3))
IMAGES = {"normalization": NORMALIZATIONS, "image_size": st.integers(1, 4096), "crop": st.booleans()}
VALUES = st.none() | st.booleans() | st.integers(0, 99) | st.floats(-99, 99) | st.text(max_size=4)


@settings(max_examples=30)
@given(
    st.builds(weight_files.Images, **{name: st.none() | values for name, values in IMAGES.items()}),
    st.dictionaries(st.text(max_size=4), VALUES | st.lists(VALUES, max_size=3), max_size=3),
)
def test_what_a_file_says_of_its_net_and_images_is_read_as_it_was_written(images, fields):
    assert weight_files.metadata_in(weight_files.metadata_of(images, fields), "") == (images, fields)


@pytest.mark.parametrize(
    ("name", "must", "texts"),
    [
        (
            "image_size",
            "a whole number of at least 1",
            ["0", "-5", "1.5", "true", "null", '"224"', "[224]", "9" * 5000],
        ),
        ("crop", "true or false", ["1", "True", "null", '"true"', "{}", ""]),
        (
            "fields",
            "an object of numbers, words and lists of them",
            ["[]", "null", '{"a": {}}', '{"a": [[1]]}', "{", "[" * 1999, '{"a": ' * 300, json.dumps({"a": "b" * 2000})],
        ),
    ],
)
def test_metadata_that_no_net_and_no_images_have_is_one_sentence(tmp_path, name, must, texts):
    for text in texts:
        save_file({"a.weight": np.ones(3, np.float32)}, tmp_path / "net.safetensors", {f"jaxnets.{name}": text})
        with pytest.raises(UserError, match=rf"net.safetensors: jaxnets.{name} must be {must}.* not '") as error:
            weight_files.read(tmp_path / "net.safetensors")
        assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_a_suffix_may_be_in_capitals(tmp_path):
    save_file({"a.weight": np.ones(3, np.float32)}, tmp_path / "NET.SAFETENSORS")
    assert list(weight_files.read(tmp_path / "NET.SAFETENSORS").entries) == ["a.weight"]
