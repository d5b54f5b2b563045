"""What a run says as it begins or goes on: images used twice, other rates, devices and sizes than before."""

import json

import pytest

from jaxnets import announce, machine
from jaxnets.plan import make_plan
from tests.tiny_net import configurations


@pytest.fixture(scope="module")
def make_config(digits_dir):
    with configurations(digits_dir) as make:
        yield make


def test_images_trained_on_and_evaluated_are_said(make_config, caplog):
    announce.start(make_plan(make_config(eval_split="train[100:160]+test[:20]")), "run", 0, None)
    assert "60 of the 80 images of config.eval_split='train[100:160]+test[:20]' are also in config" in caplog.text


@pytest.mark.parametrize(
    ("length", "at", "remarked"),
    [(4, 8, False), (4, 12, True), (6, 12, False), (6, 17, True), (20, 11, False), (20, 27, True)],
)
def test_a_longer_run_says_whether_the_rates_so_far_are_its_own(make_config, caplog, length, at, remarked):
    """Steps of 5 an epoch, that fall by ten halfway: of 10 epochs at step 25, of fewer earlier."""
    fields = {"schedule__name": "step", "schedule__boundaries": (0.5,), "schedule__warmup_epochs": 0.0}
    before, longer = (make_config(num_epochs=epochs, **fields) for epochs in (length, 10))
    announce.warn_of_new_length(make_plan(longer), at, before)
    assert ("neither the shorter nor the longer" in caplog.text) == remarked


@pytest.mark.parametrize("shared", [True, False])
def test_another_number_of_devices_is_said_where_it_changes_what_is_normalised(make_config, tmp_path, caplog, shared):
    made = make_plan(make_config(sync_batch_norm=shared))
    for devices in (len(made.devices), 7):
        described = machine.describe() | {"num_devices": devices, "date": "2026-11-29"}
        (tmp_path / machine.FILE).write_text(json.dumps([described]))
        for at in (made.total_steps, 5):
            assert "device(s) before" not in caplog.text
            announce.start(made, tmp_path, at, made.config)
    assert ("was on 7 device(s) before and is now on" in caplog.text) == (not shared)


def test_another_dtype_is_said(make_config, tmp_path, caplog):
    made = make_plan(make_config())
    for at, dtype in enumerate(("float32", "bfloat16")):
        assert "was computed in" not in caplog.text
        machine.note(tmp_path, 5 * at, dtype=dtype)
        announce.start(made, tmp_path, 5, made.config)
    assert "was computed in bfloat16 before and is now in float32" in caplog.text


def test_a_longer_run_says_within_an_epoch_that_images_become_small_again(make_config, caplog):
    before, longer = (make_config(num_epochs=epochs, progressive_sizes=(0.5, 1.0)) for epochs in (4, 8))
    announce.warn_of_new_length(make_plan(longer), 12, before)  # of its 20 steps, the 2nd on large images
    assert "images of 16 pixels are followed by smaller ones, of 8" in caplog.text


@pytest.mark.parametrize(("side", "remarked"), [(32, True), (64, False)])
def test_a_net_for_large_images_is_remarked_on_where_they_are_small(make_config, tmp_path, caplog, side, remarked):
    config = make_config(num_epochs=1, image_size=side, model__name="squeezenet1_1")
    announce.start(make_plan(config), tmp_path, 0, None)
    assert ("squeezenet1_1 is made for images of 224 pixels but is given 32" in caplog.text) == remarked
    assert "squeezenet1_1 (727,626 parameters) on digits" in caplog.text


@pytest.mark.parametrize(
    ("model", "fields", "needs"),
    [
        ("squeezenet1_1_cifar", {}, "a tenth of it, and config.optimizer.clip_norm=1"),
        ("squeezenet1_1_cifar", {"clip_norm": 1.0}, None),
        ("squeezenet1_1_cifar", {"batch_scaling": "linear"}, None),
        ("squeezenet1_1_cifar", {"name": "muon", "learning_rate": 0.02}, "a quarter of it"),
        ("squeezenet1_1_cifar", {"name": "muon", "learning_rate": 0.005}, None),
        ("squeezenet1_1_cifar", {"name": "adamw"}, None),
        ("tiny", {}, None),
    ],
)
def test_a_rate_at_which_a_net_without_batch_norm_learns_nothing_is_remarked_on(
    make_config, caplog, model, fields, needs
):
    config = make_config(model__name=model, image_size=32)
    config.optimizer.update(**{"name": "sgd", "learning_rate": 0.1, "clip_norm": 0.0} | fields)
    announce.warn_of_high_rate(make_plan(config))
    assert ("squeezenet1_1_cifar has no BatchNorm, and may learn nothing at" in caplog.text) == bool(needs)
    assert not needs or caplog.text.rstrip().endswith(f"such nets need {needs}")


@pytest.mark.parametrize(
    ("name", "beta2", "usual"),
    [("lion", 0.999, 0.99), ("rmsprop", 0.999, 0.9), ("lion", 0.99, None), ("adamw", 0.999, None)],
)
def test_adams_beta2_is_remarked_on_where_another_is_usual(make_config, tmp_path, caplog, name, beta2, usual):
    config = make_config(num_epochs=1, optimizer__name=name, optimizer__beta2=beta2)
    announce.start(make_plan(config), tmp_path, 0, None)
    assert (f"config.optimizer.beta2=0.999 is the default for Adam; {usual} is usual" in caplog.text) == bool(usual)


def test_a_decay_for_decoupled_optimizers_is_remarked_on_under_sgd(make_config, tmp_path, caplog):
    config = make_config(num_epochs=1, optimizer__name="sgd", optimizer__weight_decay=0.05)
    announce.start(make_plan(config), tmp_path, 0, None)
    assert "weight_decay=0.05 is high for sgd, which adds it to the gradient (5e-4 is usual)" in caplog.text
