"""Weights pass between PyTorch, safetensors and workdirs bit for bit, and nothing is written over."""

import io
import json
import logging
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
import safetensors.numpy
import torch
import torchvision
from PIL import Image

from jaxnets import (
    checkpoint,
    convert,
    create_model,
    evaluate,
    predict,
    settings,
    torch_weights,
    trained_run,
    weight_images,
)
from jaxnets.errors import UserError
from jaxnets.weights import weight_files
from tests.slow import slow_after
from tests.test_models import random_variables
from tests.torch_twins import megvii

WIDTH = "--field=width=0.25"


@pytest.fixture(scope="module")
def theirs():
    """A PyTorch net with random BatchNorm statistics."""
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.25).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return net


@pytest.fixture
def pth(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    return tmp_path / "net.pth"


def run(*arguments):
    convert.main(["convert", *map(str, arguments)])


def test_round_trip_through_every_form(theirs, pth, tmp_path, capsys):
    model = ["--model=mobilenet_v2", WIDTH, "--field=num_classes=7"]
    run(pth, tmp_path / "net.safetensors", *model)
    run(tmp_path / "net.safetensors", tmp_path / "run", *model)
    run(tmp_path / "run", tmp_path / "back" / "net.pt", "--layout=torchvision")
    assert "MobileNetV2" in capsys.readouterr().out
    back = torch.load(tmp_path / "back" / "net.pt", weights_only=True)
    theirs.load_state_dict(back, strict=True)
    expected = torch.load(pth, weights_only=True)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], value) for key, value in expected.items())


def test_a_converted_workdir_evaluates_and_computes_the_nets_logits(theirs, pth, tmp_path):
    run(pth, tmp_path / "run", "--model=mobilenet_v2", WIDTH, "--field=num_classes=7", "--dataset=digits")
    made = trained_run.load_run(tmp_path / "run")
    assert made.config.dataset == "digits" and made.model.num_classes == 7
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    ours = jax.jit(made.model.apply)(made.variables, images)
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("split", "count", "accuracy"), slow_after(1, [("test[:2000]", 2000, 0.85), ("test", 10000, 0.834)])
)
def test_the_published_cifar_weights_evaluate_from_the_shell(shared_dir, tmp_path, capsys, split, count, accuracy):
    """ShuffleNetV2 x0.5 gets the accuracy that it has in PyTorch on this copy of CIFAR-10."""
    source = shared_dir / "weights" / "cifar10_shufflenetv2_x0_5-1308b4e9.pt"
    run(source, tmp_path / "run", "--model=shufflenet_v2_x0_5_cifar")
    data = f"--data_dir={shared_dir / 'tensorflow_datasets'}"
    evaluate.main(["evaluate", f"--workdir={tmp_path / 'run'}", f"--split={split}", data])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_examples"] == count
    assert result["eval_accuracy"] == pytest.approx(accuracy, abs=0.0005)


def test_megvii_s_weights_keep_their_images_on_the_way(tmp_path):
    """From 0 to 255, though a file in our names no longer shows whose weights they are."""
    torch.save(megvii.shufflenet_v2(0.5).state_dict(), tmp_path / "net.pth")
    net = ["--model=shufflenet_v2_x0_5"]
    run(tmp_path / "net.pth", tmp_path / "net.safetensors", *net)
    run(tmp_path / "net.safetensors", tmp_path / "run", *net)
    made = predict.classifier_of_weights("shufflenet_v2_x0_5", tmp_path / "net.safetensors")
    config = settings.read(tmp_path / "run" / "config.json")
    for mean, std in ((made.mean, made.std), (config.mean, config.std)):
        np.testing.assert_allclose([mean, std], [[0] * 3, [1 / 255] * 3])


def test_a_folder_may_have_a_dot_in_its_name_and_its_data_elsewhere(pth, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    run(pth, "net_x0.25", *NET, "--dataset=folder:photos")
    assert trained_run.load_run(tmp_path / "net_x0.25").config.dataset == f"folder:{tmp_path / 'photos'}"


def test_a_converted_imagenet_net_sees_what_its_weights_were_trained_on(shared_dir, tmp_path):
    """The same predictions through a workdir as from the file: the middle of the image, not a squeezed one."""
    source = shared_dir / "weights" / "squeezenet1_1_torchvision_fp16src.pth"
    photos = sorted(map(str, (shared_dir / "photos").glob("*.JPEG")))[:4]
    run(source, tmp_path / "run", "--model=squeezenet1_1")
    ways = predict.classifier_of_weights("squeezenet1_1", source), predict.classifier_of_run(tmp_path / "run")
    one, other = (list(predict.predict(classifier, photos)) for classifier in ways)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.classes, b.classes)
        np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-5)


def test_nothing_is_written_over(pth, tmp_path, monkeypatch):
    """Neither the file, nor a link to nowhere, nor what appears there while the weights are read."""
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "link.pth").symlink_to(tmp_path / "nowhere")
    for name in ("there.safetensors", "link.pth"):
        with pytest.raises(UserError, match=f"/{name} exists"):
            run(pth, tmp_path / name, *NET)
    name, published = "mobilenet_v2_mini", torch_weights.Published({})
    with monkeypatch.context() as patch, pytest.raises(UserError, match="/there.safetensors exists"):
        patch.setattr(torch_weights, "export", lambda *_: {})
        convert.write(tmp_path / "there.safetensors", name, create_model(name), published, None)
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "new.pth.tmp").write_text("mine")
    run(pth, tmp_path / "new.pth", *NET)
    assert (tmp_path / "there.safetensors").read_text() == (tmp_path / "new.pth.tmp").read_text() == "mine"
    assert (tmp_path / "link.pth").is_symlink()


def test_the_images_of_a_file_are_its_code_bases_or_as_told(tmp_path):
    """chenyaofo's nets of CIFAR-100 have that set's statistics."""
    net = ["--model=shufflenet_v2_x0_5_cifar", "--field=num_classes=100"]
    torch.save(torchvision.models.shufflenet_v2_x0_5(num_classes=100).state_dict(), tmp_path / "net.pth")
    run(tmp_path / "net.pth", tmp_path / "run", *net)
    made = settings.read(tmp_path / "run" / "config.json")
    assert (made.dataset, made.mean, made.std) == ("cifar100", *map(list, weight_images.CIFAR100))
    run(tmp_path / "net.pth", tmp_path / "net.safetensors", *net, "--std=0.2,0.2,0.3")
    of_file = predict.classifier_of_weights("shufflenet_v2_x0_5_cifar", tmp_path / "net.safetensors", num_classes=100)
    assert (tuple(of_file.mean), tuple(of_file.std)) == (weight_images.CIFAR100[0], (0.2, 0.2, 0.3))


@pytest.mark.parametrize(
    ("splits", "expected"),
    [(["train", "val"], "val"), (["train", "valid"], "valid"), (["train", "test"], "test"), ([], "train")],
)
def test_a_folder_is_evaluated_on_the_split_that_it_has(pth, tmp_path, splits, expected):
    for split in splits or ["."]:
        for name in "abcdefg":
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / "photos" / split / name / "0.png")
    run(pth, tmp_path / "new", *NET, f"--dataset=folder:{tmp_path / 'photos'}")
    assert settings.read(tmp_path / "new" / "config.json").eval_split == expected


NET = ["--model=mobilenet_v2", WIDTH, "--field=num_classes=7"]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_full_disk_is_one_sentence(pth, tmp_path, monkeypatch, ending):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=f"new.{ending} cannot be written: No space left on device$"):
        run(pth, tmp_path / f"new.{ending}", *NET)


def test_a_name_that_is_not_utf_8_is_printed_with_a_replacement(pth, tmp_path, monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", printed)
    run(pth, tmp_path / "caf\udce9.safetensors", *NET)
    printed.flush()
    assert "caf\N{REPLACEMENT CHARACTER}.safetensors: MobileNetV2" in printed.buffer.getvalue().decode()


def test_a_workdir_that_cannot_be_written_leaves_no_half(pth, tmp_path, monkeypatch):
    def full(folder, variables):
        (folder / "checkpoints").mkdir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device"):
        patch.setattr(checkpoint, "save_variables", full)
        run(pth, tmp_path / "new", *NET)
    run(pth, tmp_path / "new", *NET)
    assert trained_run.load_run(tmp_path / "new").model.num_classes == 7


def test_weights_of_other_classes_are_not_evaluated_on_a_folder(pth, tmp_path):
    """Two folders' labels, 0 and 1, are no classes of a net of seven."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "photos" / name / "0.png")
    run(pth, tmp_path / "new", *NET, f"--dataset=folder:{tmp_path / 'photos'}")
    with pytest.raises(UserError, match="photos has 2 classes, the net of .*new 7: a label is a class's place"):
        evaluate.main(["evaluate", f"--workdir={tmp_path / 'new'}", "--split=train"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth", "out.pt"], "there is no nowhere.pth"),
        (["net.pth", "out.pt"], "--model is missing"),
        (["net.pth", "out.onnx", "--model=mobilenet_v2"], "out.onnx must end in .pth, .pt or .safetensors"),
        (["net.pth", "out.safetensor", "--model=mobilenet_v2"], "out.safetensor must end in .pth, .pt or .safetensors"),
        (["net.pth", "-", "--model=mobilenet_v2"], "- must end in .pth, .pt or .safetensors"),
        (["net.pth", "out.pt", "--model=mobilenet_v9"], "mobilenet_v9"),
        (["net.pth", "out.pt", "--model=mobilenet_v2"], "net.pth"),  # another width
        (["net.pth", "out.pt", "--model=mobilenet_v2", WIDTH, "--field=num_classes=7", "--layout=megvii"], "megvii"),
        (["folder", "out.pt"], "not the workdir of a run"),
        (["net.pth", "out.pt", "--model=mobilenet_v2", "--ema"], "--checkpoint and --ema are for the workdir of a run"),
        (["net.pth", "out.pt", "--model=mobilenet_v2", "--checkpoint=5"], "are for the workdir of a run"),
        (["folder", "out"], "already a workdir"),
        (["net.pth", "out.pt", "--model=mobilenet_v2", "--dataset=digits"], "--dataset is for a new folder"),
        (["net.pth", "out", "--model=mobilenet_v2", "--layout=timm"], "--layout is for a file"),
        (["net.pth", "out.pt", *NET, "--std=1,0,1"], "must be greater than 0"),
        (["folder", "out.pt", "--mean=0,0,0"], "--mean and --std are for a file"),
        (
            ["net.pth", "out", "--model=mobilenet_v2", WIDTH, "--field=num_classes=0"],
            "has no classes: OUT can only be a file",
        ),
        (["net.pth", "out", *NET, "--field=dtype=float16"], "model.dtype must be one of auto, float32, bfloat16"),
        (["net.pth", "net.pth/out", *NET], "net.pth/out cannot be written: Not a directory$"),
        (["net.pth", "net.pth/out.pt", *NET], "net.pth/out.pt cannot be written: File exists$"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(pth, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        run(*arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_becomes_a_file_with_the_weights_of_its_checkpoint(tmp_path):
    model = create_model("squeezenet1_1_cifar")
    shapes = jax.eval_shape(model.init, jax.random.key(3), np.zeros((1, 32, 32, 3), np.float32))
    random = np.random.default_rng(3)
    variables = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(leaf.dtype), shapes)
    convert.write_workdir(
        tmp_path / "run", "squeezenet1_1_cifar", {}, torch_weights.Published({"batch_stats": {}} | variables)
    )
    assert checkpoint.find_step(checkpoint.open_reader(tmp_path / "run"), "latest") == 0
    run(tmp_path / "run", tmp_path / "net.safetensors", "--checkpoint=latest")
    loaded = torch_weights.load(model, safetensors.numpy.load_file(tmp_path / "net.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])


def test_a_run_gives_its_averaged_weights_when_asked(theirs, tmp_path, monkeypatch):
    model = create_model("mobilenet_v2", width=0.25, num_classes=7)
    both = {ema: torch_weights.load(model, theirs.state_dict()) for ema in (False, True)}
    both[True]["params"]["classifier"]["bias"] += 1
    asked, config = [], ml_collections.ConfigDict({"model": {"name": "mobilenet_v2"}, "image_size": 96, "crop": False})
    config.mean, config.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)

    def load_run(workdir, which, *, ema):
        asked.append((workdir, which, ema))
        return trained_run.Run(config, model, both[ema], 7)

    monkeypatch.setattr(trained_run, "load_run", load_run)
    for ema in (False, True):
        run(tmp_path, tmp_path / f"{ema}.safetensors", *["--ema"] * ema)
        loaded = torch_weights.load(model, tmp_path / f"{ema}.safetensors")
        jax.tree.map(np.testing.assert_array_equal, loaded, both[ema])
        # What a file says of itself comes first.
        made = predict.classifier_of_weights("mobilenet_v2", tmp_path / f"{ema}.safetensors", width=0.25, num_classes=7)
        assert (made.mean, made.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
        run(tmp_path / f"{ema}.safetensors", tmp_path / f"back{ema}", *NET)
        again = settings.read(tmp_path / f"back{ema}" / "config.json")
        assert (list(again.mean), list(again.std)) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert asked == [(tmp_path, "best", False), (tmp_path, "best", True)]


@pytest.fixture
def squeezed(tmp_path):
    """The workdir of a narrow net with other fields and images than those of its name, and the net's variables."""
    fields = {"width": 0.1, "bypass": "simple", "activation": "silu"}
    model = create_model("squeezenet1_1_cifar", **fields)
    variables = random_variables(model)
    images = weight_files.Images(((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), 48, True)
    published = torch_weights.Published({"batch_stats": {}} | variables, images)
    convert.write_workdir(tmp_path / "run", "squeezenet1_1_cifar", fields, published, "digits")
    return tmp_path / "run", variables


THEIR_FIELDS = "--field=width=0.1 --field=activation=silu --field=bypass=simple"


def test_a_file_made_of_a_run_is_refused_for_a_net_of_other_fields(squeezed, tmp_path):
    file = tmp_path / "net.safetensors"
    run(squeezed[0], file)
    wrong = ["--model=squeezenet1_1_cifar", "--field=width=0.1", "--field=bypass=simple"]
    refusal = f"{file} fits, but its net has activation='silu', this one activation='relu': .* --field=activation=silu$"
    with pytest.raises(UserError, match=refusal):
        run(file, tmp_path / "back", *wrong)
    with pytest.raises(UserError, match=refusal):
        predict.classifier_of_weights("squeezenet1_1_cifar", file, width=0.1, bypass="simple")
    assert not (tmp_path / "back").exists()


def test_a_file_made_of_a_run_has_its_images(squeezed, tmp_path):
    """There and back, and in between to predict with."""
    file = tmp_path / "net.safetensors"
    run(squeezed[0], file)
    run(file, tmp_path / "again.safetensors", "--model=squeezenet1_1_cifar", *THEIR_FIELDS.split())
    first, second = (weight_files.read(tmp_path / f"{name}.safetensors") for name in ("net", "again"))
    assert (first.images, first.fields) == (second.images, second.fields)
    run(file, tmp_path / "back", "--model=squeezenet1_1_cifar", *THEIR_FIELDS.split(), "--dataset=digits")
    before, after = (settings.read(folder / "config.json") for folder in (squeezed[0], tmp_path / "back"))
    assert before == after and (after.image_size, after.crop, after.model.activation) == (48, True, "silu")
    made = predict.classifier_of_weights("squeezenet1_1_cifar", file, width=0.1, bypass="simple", activation="silu")
    assert (made.image_size, made.crop, made.mean, made.std) == (48, True, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    jax.tree.map(np.testing.assert_array_equal, made.variables["params"], squeezed[1]["params"])


def test_what_a_pytorch_file_cannot_tell_is_logged(squeezed, pth, tmp_path, caplog):
    """And nothing of what the net's name tells."""
    usual = "normalised with mean 0.485, 0.456, 0.406; standard deviation 0.229, 0.224, 0.225"
    with caplog.at_level(logging.INFO):
        run(squeezed[0], tmp_path / "narrow.pth")
        run(pth, tmp_path / "usual.pth", *NET)
    told = [message for message in caplog.messages if "normalised" in message]
    assert told == [
        "this net's images are normalised with mean 0.1, 0.2, 0.3; standard deviation 0.5, 0.6, 0.7; their "
        f"image_size is 48; their crop is True; the net is squeezenet1_1_cifar with {THEIR_FIELDS}",
        f"this net's images are {usual}; the net is mobilenet_v2 with --field=num_classes=7 --field=width=0.25",
    ]


@pytest.mark.parametrize("size", ["5000", "1" + 1000 * "0"], ids=["large", "huge"])
def test_images_that_no_net_takes_are_one_sentence(squeezed, tmp_path, size):
    run(squeezed[0], tmp_path / "whole.safetensors")
    content = safetensors.numpy.load_file(tmp_path / "whole.safetensors")
    safetensors.numpy.save_file(content, tmp_path / "net.safetensors", {"jaxnets.image_size": size})
    for target in ("out", "out.pth"):
        with pytest.raises(UserError, match="that the weights want must be at most 4096 pixels, not [015]+$"):
            run(tmp_path / "net.safetensors", tmp_path / target, "--model=squeezenet1_1_cifar", *THEIR_FIELDS.split())
        assert not (tmp_path / target).exists()
