"""Predictions equal the run's own evaluation and PyTorch's pipeline; bad files are reported and the rest go on."""

import contextlib
import csv
import dataclasses
import io
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import jaxnets
from jaxnets import checkpoint, data, loop, predict, settings, torch_weights, trained_run, weight_images
from jaxnets.augment import normalize
from jaxnets.errors import UserError, exit_on_user_error
from jaxnets.weights import weight_files
from tests.test_models import random_variables
from tests.tiny_net import registered, small_digits

SIZE = 16  # pixels a side, in the run


@pytest.fixture(scope="module")
def run(undrawn, digits_dir, tmp_path_factory):
    """A workdir of two short epochs on digits, and their result."""
    config = small_digits()
    config.data_dir = str(digits_dir)
    config.compilation_cache = False  # the suite's own is set in conftest.py
    config.ema_decay = 0.5
    workdir = tmp_path_factory.mktemp("run") / "run"
    with registered():
        yield workdir, loop.train(config, workdir)


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """The images of the run's evaluation as PNG files of their own size, and the labels."""
    config = settings.read(run[0] / "config.json")
    folder = tmp_path_factory.mktemp("digits")
    examples = data.decode(data.open_split("digits", config.eval_split, config.data_dir, image_size=8), progress=False)
    for i, image in enumerate(examples["image"]):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder, examples["label"]


def command(*arguments):
    """Status, standard output and standard error of the command."""
    status = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            exit_on_user_error(predict.main)(["predict", *map(str, arguments)])
        except SystemExit as ended:
            status = ended.code
    return status, out.getvalue(), err.getvalue()


def objects(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("which", ["latest", "5"])
def test_a_run_predicts_what_it_evaluates(run, files, which):
    workdir, folder = run[0], files[0]
    status, out, err = command(f"--workdir={workdir}", f"--checkpoint={which}", folder, "--format=json", "--top=10")
    assert (status, err) == (0, "")
    found = objects(out)
    assert [entry["image"] for entry in found] == [str(folder / f"{i:02}.png") for i in range(50)]
    # The evaluation's own path: the decoded, resized split, and the net of the checkpoint.
    evaluated = trained_run.load_run(workdir, which)
    config = evaluated.config
    split = data.open_split("digits", config.eval_split, config.data_dir, image_size=SIZE)
    images = normalize(data.decode(split, progress=False)["image"], config.mean, config.std)
    expected = np.asarray(jax.nn.softmax(jax.jit(evaluated.model.apply)(evaluated.variables, images)))
    for entry, probabilities in zip(found, expected):
        assert [p["class"] for p in entry["predictions"]] == list(np.argsort(-probabilities, kind="stable"))
        assert [p["name"] for p in entry["predictions"]] == [str(p["class"]) for p in entry["predictions"]]
        ranked = [p["probability"] for p in entry["predictions"]]
        np.testing.assert_allclose(ranked, -np.sort(-probabilities), rtol=1e-5)


def test_the_best_checkpoint_is_the_default_and_as_accurate_as_its_record(run, files, monkeypatch):
    workdir, (folder, labels) = run[0], files
    loaded = []  # this run's best is its latest too
    load = trained_run.load_run
    monkeypatch.setattr(trained_run, "load_run", lambda *args, **kw: loaded.append(args) or load(*args, **kw))
    _, out, _ = command(f"--workdir={workdir}", folder, "--format=json", "--top=1")
    first = [entry["predictions"][0]["class"] for entry in objects(out)]
    manager = checkpoint.open_reader(workdir)
    recorded = manager.metrics(checkpoint.find_step(manager, "best"))["eval_accuracy"]
    assert np.mean(np.array(first) == labels) == pytest.approx(recorded)
    assert [which for _, which in loaded] == ["best"]


def test_averaged_weights_are_others(run, files):
    arguments = [f"--workdir={run[0]}", "--checkpoint=latest", files[0] / "00.png", "--format=json"]
    raw, averaged = (objects(command(*arguments, *ema)[1]) for ema in ([], ["--ema"]))
    assert raw != averaged


def test_a_run_without_its_data_set_keeps_its_names_or_gives_numbers(run, files, tmp_path, monkeypatch, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    config = settings.read(workdir / "config.json")
    config.dataset, config.data_dir = "cifar10", str(tmp_path / "gone")
    settings.write(config, workdir / "config.json")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    arguments = [f"--workdir={workdir}", "--checkpoint=latest", files[0] / "00.png", "--top=3"]
    kept = objects(command(*arguments, "--format=json")[1])[0]["predictions"]
    assert all(p["name"] == str(p["class"]) for p in kept)
    (workdir / "data.json").unlink()
    status, out, _ = command(*arguments)
    assert status == 0 and not (tmp_path / "empty").exists()
    assert f"cifar10 (it is not prepared in {tmp_path / 'empty'})" in caplog.text
    path, *lines = out.splitlines()
    assert path == str(files[0] / "00.png")
    assert len(lines) == 3 and all("%  class " in line for line in lines)
    assert objects(command(*arguments, "--format=json")[1])[0]["predictions"][0]["name"] is None


def test_other_classes_than_the_nets_name_none(run, files, tmp_path, caplog):
    """A folder has one class more today: the names of all after it would be those of others."""
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    (workdir / "data.json").unlink()
    for name in range(11):
        (tmp_path / "more" / f"class {name}").mkdir(parents=True)
        shutil.copy(files[0] / "00.png", tmp_path / "more" / f"class {name}")
    config = settings.read(workdir / "config.json")
    config.dataset = f"folder:{tmp_path / 'more'}"
    settings.write(config, workdir / "config.json")
    _, out, _ = command(f"--workdir={workdir}", "--checkpoint=latest", files[0] / "00.png", "--format=json")
    assert objects(out)[0]["predictions"][0]["name"] is None
    assert "(it has 11 classes, the net 10): classes are shown as numbers" in caplog.text


def test_a_run_names_classes_as_it_was_trained_and_as_its_data_set_where_that_is_damaged(run, files, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    arguments = [f"--workdir={workdir}", files[0] / "00.png", "--top=1"]
    (name,) = (p["name"] for p in objects(command(*arguments, "--format=json")[1])[0]["predictions"])
    kept = json.loads((workdir / "data.json").read_text())
    kept["class_names"] = [f"class\n{name}" for name in kept["class_names"]]
    (workdir / "data.json").write_text(json.dumps(kept))
    assert command(*arguments)[1].splitlines()[1].endswith(f"%  class\\n{name}")
    (workdir / "data.json").write_bytes(b"damaged")
    assert command(*arguments)[1].splitlines()[1].endswith(f"%  {name}")


def test_bad_files_are_reported_and_the_others_go_on(run, files, tmp_path):
    folder = files[0]
    (tmp_path / "broken.png").write_bytes((folder / "01.png").read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("no image")
    images = [folder / "00.png", tmp_path / "broken.png", tmp_path / "notes.txt", folder / "02.png"]
    images += [tmp_path / "missing.png", f"{tmp_path}/*.jpg", folder / "03.png"]
    status, out, err = command(f"--workdir={run[0]}", *images, "--format=json", "--batch_size=2")
    assert status == 1
    found = objects(out)
    assert [entry["image"] for entry in found] == [str(folder / name) for name in ("00.png", "02.png", "03.png")]
    lines = sorted(err.splitlines())
    assert [line.split(": ")[0] for line in lines] == sorted(map(str, [*images[1:3], *images[4:6], "error"]))
    assert "error: 4 of the images could not be read or classified" in lines
    # A neighbour that cannot be read changes nothing.
    alone = objects(command(f"--workdir={run[0]}", folder / "02.png", "--format=json")[1])[0]
    for one, other in zip(found[1]["predictions"], alone["predictions"]):
        assert one["class"] == other["class"] and one["probability"] == pytest.approx(other["probability"], rel=1e-5)


def test_a_files_name_is_shown_and_not_obeyed(run, files, tmp_path):
    (tmp_path / "red\x1b[31m\nline.png").write_bytes((files[0] / "00.png").read_bytes())
    (tmp_path / "broken\x1b[31m\nline.png").write_bytes(b"")
    status, out, err = command(f"--workdir={run[0]}", tmp_path)
    assert status == 1 and "\x1b" not in out + err
    assert out.splitlines()[0].endswith("red\\x1b[31m\\nline.png")


def test_nothing_readable_is_status_1_and_no_output(run, tmp_path):
    status, out, err = command(f"--workdir={run[0]}", tmp_path)
    assert status == 1 and out == ""
    assert f"{tmp_path}: the folder holds no image files" in err


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_any_batch_size_compiles_once_and_agrees(run, files, monkeypatch, batch_size):
    classifier = predict.classifier_of_run(run[0], "latest")
    paths = [str(files[0] / f"{i:02}.png") for i in range(50)]
    expected = list(predict.predict(classifier, paths, batch_size=25))
    traced = []
    original = predict._most_probable
    monkeypatch.setattr(predict, "_most_probable", lambda *args: traced.append(args[-1].shape) or original(*args))
    found = list(predict.predict(classifier, paths, batch_size=batch_size))
    assert traced == [(min(batch_size, 50), SIZE, SIZE, 3)]
    for one, other in zip(found, expected, strict=True):
        assert one.path == other.path
        np.testing.assert_array_equal(one.classes, other.classes)
        np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-5)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A small net, its variables, and a file with them."""
    model = jaxnets.create_model("mobilenet_v2_mini", width=0.5)
    variables = random_variables(model)
    path = tmp_path_factory.mktemp("weights") / "mini.safetensors"
    save_file(torch_weights.export(model, variables, layout="jaxnets"), path)
    return model, variables, path


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A file that is no square."""
    path = tmp_path_factory.mktemp("photograph") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("overridden", [False, True])
def test_a_small_net_sees_the_whole_image_normalised(mini, photograph, overridden):
    model, variables, weights = mini
    arguments = ["--model=mobilenet_v2_mini", f"--weights={weights}", "--field=width=0.5", photograph]
    size, mean, std = 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    if overridden:
        size, mean, std = 24, (0.5, 0.4, 0.3), (0.6, 0.7, 0.8)
        arguments += ["--image_size=24", "--mean=0.5,0.4,0.3", "--std=.6,.7,.8"]
    transforms = pytest.importorskip("torchvision.transforms")
    prepare = transforms.Compose(
        [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    image = prepare(Image.open(photograph)).numpy().transpose(1, 2, 0)
    expected = np.asarray(jax.nn.softmax(jax.jit(model.apply)(variables, image[None])))[0]
    status, out, err = command(*arguments, "--format=json", "--top=10")
    assert (status, err) == (0, "")
    found = objects(out)[0]["predictions"]
    assert [p["class"] for p in found] == list(np.argsort(-expected))
    np.testing.assert_allclose([p["probability"] for p in found], -np.sort(-expected), rtol=1e-4, atol=1e-7)


def test_a_file_may_say_how_large_its_images_are_and_whether_they_are_cropped(mini, photograph, tmp_path):
    """And --image_size is of more weight."""
    said = weight_files.metadata_of(weight_files.Images(image_size=24, crop=True), {})
    save_file(load_file(mini[2]), tmp_path / "told.safetensors", said)
    made = predict.classifier_of_weights("mobilenet_v2_mini", tmp_path / "told.safetensors", width=0.5)
    assert (made.image_size, made.crop, made.mean, made.std) == (24, True, *weight_images.CIFAR10)
    arguments = ["--model=mobilenet_v2_mini", "--field=width=0.5", photograph, "--format=json"]
    for size, extra in ((24, []), (20, ["--image_size=20"])):
        (expected,) = predict.predict(dataclasses.replace(made, image_size=size), [str(photograph)])
        _, out, _ = command(*arguments, f"--weights={tmp_path / 'told.safetensors'}", *extra)
        assert [p["class"] for p in objects(out)[0]["predictions"]] == list(expected.classes)
        assert [p["probability"] for p in objects(out)[0]["predictions"]] == pytest.approx(expected.probabilities)


def test_an_output_that_is_not_finite_is_no_prediction(mini, photograph):
    model, variables, path = mini
    classifier = predict.classifier_of_weights("mobilenet_v2_mini", path, width=0.5)
    broken = dataclasses.replace(classifier, variables=jax.tree.map(lambda leaf: leaf * np.nan, variables))
    (found,) = predict.predict(broken, [str(photograph)])
    assert found.classes is None and "not finite" in found.error


def test_labels_name_the_classes(mini, photograph, tmp_path):
    labels = tmp_path / "labels.txt"
    names = [f"class-{i} of ten, numéro {i}" for i in range(10)]
    labels.write_text("\n".join(names) + "\n", encoding="utf-8")
    arguments = ["--model=mobilenet_v2_mini", f"--weights={mini[2]}", "--field=width=0.5", photograph]
    _, out, _ = command(*arguments, f"--labels={labels}", "--format=json")
    assert all(p["name"] == names[p["class"]] for p in objects(out)[0]["predictions"])
    _, out, _ = command(*arguments, f"--labels={labels}")
    assert len(out.splitlines()) == 1 + 5 and all(line.split("%  ")[1] in names for line in out.splitlines()[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "IMAGE"),
        (["x.png"], "--workdir=DIR, or --model=NAME and --weights=FILE"),
        (["--model=mobilenet_v2", "x.png"], "--weights=FILE"),
        (["--workdir=RUN", "--model=mobilenet_v2", "--weights=MINI", "x.png"], "either --workdir"),
        (["--workdir=missing", "x.png"], "not the workdir of a run"),
        (["--workdir=RUN", "--checkpoint=7", "x.png"], "no checkpoint '7'"),
        (["--workdir=RUN", "--field=width=1", "x.png"], "--field is for --model"),
        (["--model=mobilenet_v9", "--weights=MINI", "x.png"], "no net 'mobilenet_v9'"),
        (["--model=mobilenet_v2_mini", "--weights=missing.pth", "x.png"], "missing.pth"),
        (["--model=mobilenet_v2_mini", "--weights=MINI", "x.png"], "stem"),
        (["--model=mobilenet_v2_mini", "--weights=MINI", "--ema", "x.png"], "--ema"),
        (["--model=mobilenet_v2_mini", "--weights=MINI", "--field=widht=0.5", "x.png"], "no field 'widht'"),
        (["--model=mobilenet_v2_mini", "--weights=MINI", "--field=name=vgg16", "x.png"], "--field"),
        (["--model=mobilenet_v2_mini", "--weights=MINI", "--field=num_classes=0", "x.png"], "no classes"),
        (["--model=mobilenet_v2_mini", "--weights=MINI", "--field=weights=x", "x.png"], "no field 'weights'"),
        (["--workdir=MINI", "x.png"], "is a file, not the folder of a run"),
        (["--workdir=RUN", "--mean=0.5", "x.png"], "three numbers"),
        (["--workdir=RUN", "--std=1,0,1", "x.png"], "greater than 0"),
        (["--workdir=RUN", "--std=1,nan,1", "x.png"], "three numbers"),
        (["--workdir=RUN", "--image_size=0", "x.png"], "of at least 1"),
        (["--workdir=RUN", "--image_size=1000000", "x.png"], "--image_size must be at most 4096 pixels, not 1000000"),
        (["--workdir=RUN", "--labels=missing.txt", "x.png"], "missing.txt"),
        (["--workdir=RUN", "--labels=MINI", "x.png"], "--labels"),
        (["--workdir=RUN", "--top=0", "x.png"], "--top"),
        (["--workdir=RUN", "--format=xml", "x.png"], "xml"),
    ],
)
def test_bad_input_is_one_sentence_and_status_1(run, mini, arguments, message):
    given = [argument.replace("RUN", str(run[0])).replace("MINI", str(mini[2])) for argument in arguments]
    status, out, err = command(*given)
    assert status == 1 and out == ""
    assert message in err and len(err.splitlines()) == 1


def test_labels_of_another_number_of_classes_are_refused(run, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="2 lines; it must have one for each of 10 classes"):
        predict.main(["predict", f"--workdir={run[0]}", f"--labels={tmp_path / 'labels.txt'}", "x.png"])


def test_real_photographs_as_pytorch_sees_them(shared_dir):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    transforms = torchvision.transforms
    weights = shared_dir / "weights" / "squeezenet1_1_torchvision_fp16src.pth"
    photos = shared_dir / "photos"
    with (photos / "labels.csv").open() as file:
        labels = {row["file"]: int(row["imagenet_index"]) for row in csv.DictReader(file)}
    net = torchvision.models.squeezenet1_1().eval()
    net.load_state_dict({name: value.float() for name, value in torch.load(weights).items()})
    prepare = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.no_grad():
        batch = torch.stack([prepare(Image.open(photos / name).convert("RGB")) for name in sorted(labels)])
        expected = net(batch).softmax(-1).numpy()
    status, out, err = command("--model=squeezenet1_1", f"--weights={weights}", f"{photos}/*.JPEG", "--format=json")
    assert (status, err) == (0, "")
    found = objects(out)
    assert [entry["image"] for entry in found] == [str(photos / name) for name in sorted(labels)]
    for entry, probabilities in zip(found, expected):
        for prediction in entry["predictions"]:
            assert prediction["probability"] == pytest.approx(probabilities[prediction["class"]], rel=1e-4, abs=1e-7)
        ranked = [prediction["probability"] for prediction in entry["predictions"]]
        np.testing.assert_allclose(ranked, -np.sort(-probabilities)[:5], rtol=1e-4)
    right = [labels[name] in [p["class"] for p in entry["predictions"]] for name, entry in zip(sorted(labels), found)]
    assert np.mean(right) >= 0.7  # 80.6 % of all of ImageNet's


def test_megvii_s_net_sees_the_images_of_its_code(tmp_path):
    """As its own evaluation makes them: BGR, from 0 to 255."""
    torch = pytest.importorskip("torch")
    from tests.torch_twins import megvii

    net = megvii.shufflenet_v2(0.5).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    bgr = pixels[16:240, 16:240, ::-1].transpose(2, 0, 1)[None].astype(np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(bgr)).softmax(-1)[0].numpy()
    made = predict.classifier_of_weights("shufflenet_v2_x0_5", tmp_path / "net.pth", variant="megvii")
    (found,) = predict.predict(made, [str(tmp_path / "image.png")])
    np.testing.assert_array_equal(found.classes, np.argsort(-expected)[:5])
    np.testing.assert_allclose(found.probabilities, expected[found.classes], rtol=1e-3)


def test_real_cifar_images_with_published_weights(shared_dir, tmp_path):
    split = data.open_split("cifar10", "test[:100]", shared_dir / "tensorflow_datasets", image_size=32)
    examples = data.decode(split, progress=False)
    for i, image in enumerate(examples["image"]):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    weights = shared_dir / "weights" / "cifar10_shufflenetv2_x0_5-1308b4e9.pt"
    _, out, _ = command("--model=shufflenet_v2_x0_5_cifar", f"--weights={weights}", tmp_path, "--format=json")
    first = np.array([entry["predictions"][0]["class"] for entry in objects(out)])
    assert np.mean(first == examples["label"]) >= 0.75  # 83 % of the whole test set


def test_the_command_of_the_shell(repository, mini, photograph, tmp_path):
    command = [sys.executable, "-m", "jaxnets.predict", "--model=mobilenet_v2_mini", f"--weights={mini[2]}"]
    command += ["--field=width=0.5", str(tmp_path / "missing.png"), str(photograph)]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[0] == str(photograph) and len(ended.stdout.splitlines()) == 1 + 5
    *_, missing, error = ended.stderr.splitlines()
    assert missing == f"{tmp_path / 'missing.png'}: there is no such file" and error.startswith("error: 1 of")
