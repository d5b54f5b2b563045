"""The predictions of an evaluation are kept whole, with the images that were worst, and read back or refused."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits
from jaxnets import data, predictions, step
from jaxnets.errors import UserError
from jaxnets.evaluator import make_evaluator
from tests.tiny_net import TinyNet, first_variables


@pytest.fixture(scope="module")
def split(digits_dir):
    return data.open_split("digits", "test[:50]", digits_dir, image_size=16)


@pytest.fixture(scope="module")
def decoded(split):
    return data.decode(split, progress=False)


@pytest.fixture
def made(decoded):
    """Predictions that are wrong, more and more so, about the examples 3, 7 and 30."""
    label = decoded["label"].copy()
    predicted, of_label = label.copy(), np.full(50, 0.9, np.float32)
    for at, probability in ((3, 0.3), (7, 0.2), (30, 0.1)):
        predicted[at], of_label[at] = (label[at] + 1) % 10, probability
    return step.Predictions(label, predicted, np.full(50, 0.9, np.float32), of_label)


def test_a_mistake_in_a_folder_says_its_file(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "0.png")
    split = data.open_split(f"folder:{tmp_path / 'photos'}", "train", image_size=8)
    label = data.decode(split, progress=False)["label"]
    half = np.full(2, 0.5, np.float32)
    predictions.save(tmp_path, 1, step.Predictions(label, 1 - label, half, half), split)
    loaded = predictions.load(tmp_path)
    assert loaded.origins.tolist() == [f"{split.class_names[label[at]]}/0.png" for at in loaded.mistakes]


def test_an_image_that_is_gone_is_black_and_keeps_nothing_else_from_being_saved(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "white").save(tmp_path / "photos" / name / "0.png")
    split = data.open_split(f"folder:{tmp_path / 'photos'}", "train", image_size=8)
    label = data.decode(split, progress=False)["label"]
    (tmp_path / "photos" / "cat" / "0.png").unlink()
    half = np.full(2, 0.5, np.float32)
    predictions.save(tmp_path, 1, step.Predictions(label, 1 - label, half, half), split)
    loaded = predictions.load(tmp_path)
    shown = {origin: image.max() for origin, image in zip(loaded.origins.tolist(), loaded.images)}
    assert shown == {"cat/0.png": 0, "dog/0.png": 255}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("num_devices", [1, 4])
def test_an_evaluation_predicts_every_example_in_order(split, decoded, num_devices, streamed):
    config = digits.get_config()
    config.eval_batch_size, config.steps_per_call, config.num_workers = 12, 3, 0
    model, devices = TinyNet(num_classes=10), jax.devices()[:num_devices]
    variables = first_variables()
    examples = {} if streamed else step.replicate(decoded, devices)
    _, made = make_evaluator(model, split, examples, config, devices)(variables)
    images = (decoded["image"] / np.float32(255) - np.float32(config.mean)) / np.float32(config.std)
    probabilities = np.asarray(jax.nn.softmax(model.apply(variables, images)))
    np.testing.assert_array_equal(made.label, decoded["label"])
    np.testing.assert_array_equal(made.predicted, probabilities.argmax(-1))
    np.testing.assert_allclose(made.probability, probabilities.max(-1), rtol=1e-5)
    np.testing.assert_allclose(made.label_probability, probabilities[np.arange(50), made.label], rtol=1e-4)


def test_what_is_saved_is_loaded_with_the_worst_mistakes_first(split, decoded, made, tmp_path):
    predictions.save(tmp_path, 70, made, split)
    loaded = predictions.load(tmp_path)
    assert int(loaded.step) == 70 and loaded.class_names.tolist() == list(split.class_names)
    np.testing.assert_array_equal(loaded.mistakes, [30, 7, 3])
    np.testing.assert_array_equal(loaded.images, decoded["image"][[30, 7, 3]])
    assert loaded.origins.tolist() == [f"test[:50], record {number}" for number in (30, 7, 3)]
    for name in ("label", "predicted", "probability", "label_probability"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(made, name))
    assert [path.name for path in tmp_path.iterdir()] == [predictions.FILE]


def test_a_net_without_mistakes_is_saved_too(split, made, tmp_path):
    predictions.save(tmp_path, 1, made.replace(predicted=made.label), split)
    loaded = predictions.load(tmp_path)
    assert len(loaded.mistakes) == 0 and loaded.images.shape == (0, 16, 16, 3)


def test_large_images_are_kept_small(made, tmp_path, tmp_path_factory, split):
    large = data.open_split("digits", "test[:50]", split.directory.split("/digits/")[0], image_size=200)
    predictions.save(tmp_path, 1, made, large)
    assert predictions.load(tmp_path).images.shape == (3, 128, 128, 3)


def test_a_workdir_without_predictions_has_none(tmp_path):
    assert predictions.load(tmp_path) is None


@pytest.mark.parametrize(
    "damage", ["cut", "text", "label", "missing", "image", "length", "names", "four", "step", "share", "origins"]
)
def test_another_file_is_refused(split, made, tmp_path, damage):
    predictions.save(tmp_path, 1, made, split)
    path = tmp_path / predictions.FILE
    content = dict(np.load(path))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "text":
        path.write_text("nonsense")
    else:
        content["label"] = content["label"] + (damage == "label") * 9
        content["images"] = content["images"].astype(np.float32 if damage == "image" else np.uint8)
        content["predicted"] = content["predicted"][: 50 - (damage == "length")]
        if damage == "names":
            content["class_names"] = content["class_names"].astype(np.bytes_)
        if damage == "four":
            content["images"] = content["images"].repeat(2, -1)
        if damage == "step":
            content["step"] = np.array([1, 2])
        if damage == "share":
            content["probability"] = content["probability"].astype(np.str_)
        if damage == "missing":
            del content["mistakes"]
        if damage == "origins":
            content["origins"] = content["origins"][:2]
        np.savez(path, **content)
    with pytest.raises(UserError, match="cannot be read as a run's predictions"):
        predictions.load(tmp_path)
