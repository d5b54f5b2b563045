import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from jaxnets import data
from jaxnets.errors import UserError
from tests.photo_set import MODES, Photos, noise

# Opening


def test_split_describes_itself(digits):
    assert (digits.name, digits.split, digits.image_size) == ("digits", "train", 8)
    assert digits.num_classes == 10
    assert digits.class_names == tuple("0123456789")
    assert len(digits) == 1437
    assert digits.nbytes == 1437 * 8 * 8 * 3


def test_decoded_size_is_what_nbytes_says(digits, decoded):
    assert decoded["image"].nbytes == digits.nbytes
    assert (decoded["image"].dtype, decoded["image"].shape) == (np.uint8, (1437, 8, 8, 3))
    assert (decoded["label"].dtype, decoded["label"].shape) == (np.int32, (1437,))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:1000]", np.s_[:1000]),
        ("train[1000:]", np.s_[1000:]),
        ("train[-7:]", np.s_[-7:]),
        ("train[100:101]", np.s_[100:101]),
        ("train[:50%]", np.s_[:718]),
        ("train[50%:]", np.s_[718:]),
    ],
)
def test_slices_are_tfds_slices(split, expected, root, decoded):
    part = data.decode(data.open_split("digits", split, root, image_size=8), progress=False)
    np.testing.assert_array_equal(part["image"], decoded["image"][expected])
    np.testing.assert_array_equal(part["label"], decoded["label"][expected])


def test_splits_can_be_added(root, decoded):
    both = data.decode(data.open_split("digits", "test+train[:10]", root, image_size=8), progress=False)
    test = data.decode(data.open_split("digits", "test", root, image_size=8), progress=False)
    for name in ("image", "label"):
        np.testing.assert_array_equal(both[name], np.concatenate([test[name], decoded[name][:10]]))


@pytest.mark.parametrize(
    "split",
    [
        *("tset", "train[:0]", "train[10:10]", "train[5000:]", "train[200:100]", "train[100:99]"),
        *("train[", "train[:x]", ""),
        *("train+nope", "all[:90%]"),
    ],
)
def test_bad_split_lists_what_exists(split, root):
    with pytest.raises(UserError, match=r"train \(1437 examples\), test \(360 examples\)") as error:
        data.open_split("digits", split, root, image_size=8)
    assert repr(split) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("train", "test", 0),
        ("train", "train[1400:]", 37),
        ("train[:1000]", "train[1000:]", 0),
        ("train[:100]+test", "train[90:200]+test[:5]", 15),
    ],
)
def test_examples_that_two_splits_share_are_counted(root, one, other, shared):
    splits = [data.open_split("digits", name, root, image_size=8) for name in (one, other)]
    assert data.count_shared(*splits) == data.count_shared(*splits[::-1]) == shared


def test_bad_image_size(root):
    with pytest.raises(UserError, match="image_size"):
        data.open_split("digits", "test", root, image_size=0)


def test_environment_chooses_the_place(root, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    assert data.open_split("photos", "train", image_size=8).directory == str(root / "photos" / "2.0.0")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": tfds.features.Image(), "answer": tfds.features.Text()}, "image classification"),
        ({"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)}, "image classification"),
        ({"image": tfds.features.Image(dtype=np.uint16), "label": tfds.features.ClassLabel(num_classes=2)}, "uint16"),
        ({"image": tfds.features.Image(), "label": tfds.features.ClassLabel()}, "how many classes"),
    ],
)
def test_data_set_of_another_kind(features, message, root, tmp_path):
    directory = tmp_path / "photos" / "2.0.0"
    shutil.copytree(root / "photos" / "2.0.0", directory)
    tfds.features.FeaturesDict(features).save_metadata(directory)
    (directory / "features.json").write_text(json.dumps(tfds.features.FeaturesDict(features).to_json()))
    with pytest.raises(UserError, match=message):
        data.open_split("photos", "train", tmp_path, image_size=8)


def test_split_survives_pickling(digits, decoded):
    again = pickle.loads(pickle.dumps(digits))
    assert (again.class_names, len(again)) == (digits.class_names, len(digits))
    np.testing.assert_array_equal(data.decode(again, progress=False)["image"], decoded["image"])


# Decoding


def test_digits_are_upsampled_like_jax_does(root, decoded):
    """Half-pixel-centred bilinear interpolation, up to PIL's rounding between its two passes."""
    large = data.decode(data.open_split("digits", "train[:50]", root, image_size=32), progress=False)
    small = decoded["image"][:50].astype(np.float32)
    expected = jax.image.resize(small, (50, 32, 32, 3), "bilinear")
    assert np.abs(large["image"] - np.asarray(expected)).max() <= 1.01


def test_digits_have_scikit_learns_values(decoded):
    """As a multiset: every image of the split is one of scikit-learn's, with its label."""
    digits = load_digits()
    known = {
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), target)
        for image, target in zip(digits.images, digits.target)
    }
    found = {(image[..., 0].tobytes(), label) for image, label in zip(decoded["image"], decoded["label"])}
    assert found <= known
    assert (decoded["image"] == decoded["image"][..., :1]).all()


def test_all_kinds_of_images(root):
    split = data.open_split("photos", "train", root, image_size=32)
    assert split.class_names == ("0", "1", "2", "3")
    batch = data.decode(split, progress=False)
    np.testing.assert_array_equal(batch["label"], Photos.labels)
    for index, (width, height, mode, file_format) in MODES.items():
        image = noise(index).convert("RGB")
        if file_format == "JPEG":
            file = io.BytesIO()
            noise(index).save(file, "JPEG")
            image = Image.open(file).convert("RGB")
        pixels = np.asarray(image, np.float32)
        # jax.image.resize antialiases where it shrinks, as PIL does.
        expected = np.asarray(jax.image.resize(pixels, (32, 32, 3), "bilinear"))
        assert np.abs(batch["image"][index] - expected).max() <= 1.01, (width, height, mode)


def test_grey_of_16_bits_keeps_its_upper_8(tmp_path):
    """PIL's conversion to RGB would make nearly all of it white."""
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (32, 32), np.uint16)

    class Deep(Photos, skip_registration=True):
        name = "photos"

        def _generate_examples(self):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            yield 0, {"image": file.getvalue(), "label": 0}

    Deep(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    decoded = data.decode(data.open_split("photos", "train", tmp_path, image_size=32), progress=False)
    np.testing.assert_array_equal(decoded["image"][0], np.repeat((pixels >> 8)[..., None], 3, axis=2))


def test_decoding_agrees_with_tfds(shared_dir):
    place = shared_dir / "tensorflow_datasets"
    split = data.open_split("cifar10", "test[100:140]", place, image_size=32)
    ours = data.decode(split, progress=False)
    theirs = tfds.builder("cifar10", data_dir=place).as_data_source("test[100:140]")
    for index, example in enumerate(theirs):
        np.testing.assert_array_equal(ours["image"][index], example["image"])
        assert ours["label"][index] == example["label"]
    assert split.class_names[:2] == ("airplane", "automobile")


def test_progress_is_a_bar_on_a_terminal_only(root, capsys, monkeypatch):
    split = data.open_split("digits", "test", root, image_size=8)
    monkeypatch.setattr(data.logger, "disabled", True)  # a line of the log has the same words
    data.decode(split)
    assert "Decoding" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    data.decode(split)
    shown = capsys.readouterr()
    assert "Decoding digits test" in shown.err and shown.out == ""


# Resident


@pytest.mark.parametrize(
    ("resident", "expected"),
    [(True, True), (False, False), ("true", True), ("FALSE", False), ("True", True), ("auto", None), ("Auto", None)],
)
def test_is_resident(resident, expected):
    for nbytes, fits in ((99, True), (100, True), (101, False)):
        assert data.is_resident(resident, nbytes, 100) is (fits if expected is None else expected)


@pytest.mark.parametrize("resident", ["yes", "", None, 1, "on device"])
def test_is_resident_refuses(resident):
    with pytest.raises(UserError, match=r"config\.resident must be auto, true or false"):
        data.is_resident(resident, 1, 1)


# Damaged files


@pytest.fixture
def damaged(root, tmp_path) -> Path:
    """A copy of the digits, to be damaged."""
    shutil.copytree(root / "digits", tmp_path / "digits")
    return tmp_path / "digits" / "1.0.0"


def open_test(damaged: Path) -> data.Split:
    return data.open_split("digits", "test", damaged.parents[1], image_size=8)


@pytest.mark.parametrize("keep", [0, 1, 1000, 0.5, -1, -(1 << 16)])
def test_truncated_shard_does_not_open(keep, damaged):
    shard = damaged / "digits-test.array_record-00000-of-00001"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else keep])
    with pytest.raises(UserError, match="truncated or damaged") as error:
        open_test(damaged)
    assert str(shard) in str(error.value) and "\n" not in str(error.value)
    data.open_split("digits", "train", damaged.parents[1], image_size=8)  # the other files are whole


@pytest.mark.parametrize(
    ("error", "says"),
    [(PermissionError(13, "Permission denied"), ": Permission denied$"), (RuntimeError("x"), r" \(x\); delete ")],
)
def test_shard_that_cannot_be_read_is_not_damaged(error, says, damaged, monkeypatch):
    def fails(path):
        raise error

    monkeypatch.setattr(data, "ArrayRecordReader", fails)
    with pytest.raises(UserError, match=f"00000-of-00001 cannot be read{says}"):
        open_test(damaged)


def test_missing_shard_does_not_open(damaged):
    shard = damaged / "digits-test.array_record-00000-of-00001"
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_test(damaged)


def test_shard_with_other_records_does_not_open(damaged):
    shard = damaged / "digits-test.array_record-00000-of-00001"
    shutil.copy(damaged / "digits-train.array_record-00000-of-00001", shard)
    with pytest.raises(UserError, match="holds 1437 records instead of 360"):
        open_test(damaged)


def test_shard_that_is_no_array_record(damaged):
    shard = damaged / "digits-test.array_record-00000-of-00001"
    shard.write_bytes(np.random.default_rng(0).bytes(300_000))
    with pytest.raises(UserError, match="truncated or damaged"):
        open_test(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": (0, 1, 4, 0, 0, 0, 0, 0)}, "record 2 of photos train.*label 4 is not one of the 4 classes"),
        ({"labels": (-2,) + (0,) * 7}, "record 0 of photos train.*label -2"),
        ({"labels": (-1,) * 8}, "^photos train has no labels: TFDS says -1; choose another split$"),
        ({"picture": b"not an image"}, "record 3 of photos train.*cannot identify image"),
        ({"picture": None}, "record 3 of photos train.*truncated"),
    ],
)
def test_record_that_is_no_example_is_named(change, message, tmp_path):
    class Broken(Photos, skip_registration=True):
        name = "photos"
        LABEL = tfds.features.Scalar(np.int64)  # takes any number
        labels = change.get("labels", Photos.labels)

        def _generate_examples(self):
            for index, example in super()._generate_examples():
                if index == 3 and "picture" in change:
                    example["image"] = change["picture"] or example["image"][:500]
                yield index, example

    Broken(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": Photos.LABEL})
    (tmp_path / "photos" / "2.0.0" / "features.json").write_text(json.dumps(features.to_json()))
    split = data.open_split("photos", "train", tmp_path, image_size=32)
    with pytest.raises(UserError, match=message):
        data.decode(split, progress=False)


def test_a_split_can_be_cropped_to_the_middle_of_its_images(digits_dir):
    """As torchvision resizes and crops, not squeezed."""

    def images(**how):
        return data.decode(data.open_split("digits", "test[:3]", digits_dir, **how), progress=False)["image"]

    squeezed, cropped = (images(image_size=14, crop=crop) for crop in (False, True))
    large = images(image_size=16)
    np.testing.assert_array_equal(cropped, large[:, 1:15, 1:15])
    assert not np.array_equal(cropped, squeezed)


@pytest.mark.parametrize(
    ("error", "blamed"), [(OSError("truncated"), True), (OSError(5, "I/O error"), False), (MemoryError(), False)]
)
def test_a_record_is_to_blame_only_for_what_is_in_it(error, blamed, digits, monkeypatch):
    def fails(split, record, fit):
        raise error

    monkeypatch.setattr(data, "_decode_record", fails)
    with pytest.raises(UserError, match="record 0 of digits .* cannot be read") as caught:
        data.read_batch(digits, np.zeros(1, int))
    assert (f"delete {digits.directory}" in str(caught.value)) == blamed
