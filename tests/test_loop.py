"""Whole runs in one process, on four simulated devices: resumed, streamed, averaged, diverging, refused."""

import itertools
import json
import os
import re
import shutil
import signal
from contextlib import closing
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from jaxnets import (
    checkpoint,
    dispatch,
    epochs,
    evaluate,
    interruption,
    journal,
    loop,
    predictions,
    report,
    streaming,
    timing,
    workdir,
)
from jaxnets.errors import UserError
from jaxnets.restore import restore_item
from tests.slow import slow_after
from tests.tiny_net import configurations


def numbers(workdir):
    """The records of a run without what depends on the clock."""
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in journal.read(workdir)]


def weights(workdir):
    """The newest variables of a run, bit for bit."""
    manager = checkpoint.open_reader(workdir)
    step = checkpoint.find_step(manager, "latest")
    return step, restore_item(manager, step, "variables")


def assert_same_run(one, other):
    assert numbers(one) == numbers(other)
    jax.tree.map(np.testing.assert_array_equal, weights(one), weights(other))


@pytest.fixture(scope="module")
def make_config(digits_dir):
    with configurations(digits_dir) as make:
        yield make


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """A run in one go, to compare others with."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = loop.train(make_config(), workdir)
    return workdir, result


@pytest.fixture(autouse=True)
def undrawn(finished, monkeypatch):
    """No page but that of the finished run: half a second of each test."""
    monkeypatch.setattr(report, "write", lambda workdirs: None)


def test_a_run_leaves_its_records_and_returns_the_last(finished):
    workdir, result = finished
    records = numbers(workdir)
    trained = [r for r in records if "loss" in r]
    evaluated = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in trained] == [5, 10]  # five steps a call
    assert [(r["step"], r["epoch"]) for r in evaluated] == [(5, 1), (10, 2)]
    assert all({"step", "epoch", "loss", "accuracy", "learning_rate"} <= r.keys() for r in trained)
    assert result == evaluated[-1]
    assert result["num_examples"] == 50 and 0 <= result["eval_accuracy"] <= result["eval_top5_accuracy"] <= 1
    assert json.loads((workdir / "config.json").read_text())["model"]["name"] == "tiny"


def test_a_run_leaves_its_page_its_predictions_and_its_times(finished):
    workdir, result = finished
    kept = predictions.load(workdir)
    assert int(kept.step) == 10 and len(kept.label) == 50
    assert (kept.predicted == kept.label).mean() == result["eval_accuracy"]
    assert f"{result['eval_accuracy']:.2%}" in (workdir / "report.html").read_text()
    spans = timing.read(workdir)
    assert [(span.first, span.last) for span in spans] == [(0, 5), (5, 10)]
    assert {"compile", "train", "evaluate", "checkpoint"} <= timing.totals(spans).keys()


def test_a_page_that_cannot_be_drawn_harms_no_run(finished, make_config, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(report, "write", fail)
    loop.train(make_config(), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished[0])


def test_a_finished_run_has_nothing_left_to_do(finished, make_config):
    workdir, result = finished
    before = numbers(workdir)
    assert loop.train(make_config(), workdir) == result
    assert numbers(workdir) == before


def test_a_page_that_a_kill_came_before_is_drawn_by_the_next_start(finished, make_config, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    page = workdir / report.FILE
    text = page.read_text().replace(str(finished[0]), str(workdir))
    minute = r"\d\d:\d\d UTC"  # in which it was drawn
    page.unlink()
    kept = (workdir / predictions.FILE).read_bytes()
    monkeypatch.undo()
    loop.train(make_config(), workdir)
    assert re.sub(minute, "", page.read_text()) == re.sub(minute, "", text)
    assert (workdir / predictions.FILE).read_bytes() == kept


def test_the_same_seed_makes_the_same_run_and_another_does_not(finished, make_config, tmp_path):
    loop.train(make_config(), tmp_path / "same")
    assert_same_run(tmp_path / "same", finished[0])
    loop.train(make_config(seed=1), tmp_path / "other")
    assert numbers(tmp_path / "other") != numbers(finished[0])


@pytest.mark.parametrize("num_workers", slow_after(1, [0, 1]))
def test_a_streamed_run_equals_a_resident_one(finished, make_config, tmp_path, num_workers):
    loop.train(make_config(resident="false", num_workers=num_workers), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished[0])


def test_an_epoch_is_not_trained_again_where_its_evaluation_fails(finished, make_config, tmp_path, monkeypatch):
    """As by a file that cannot be read: the mend goes on with the evaluation."""
    make, trained = loop.make_evaluator, []

    def make_failing(*args):
        def evaluator(variables):
            raise UserError("photo.jpg cannot be read")

        return evaluator

    monkeypatch.setattr(loop, "make_evaluator", make_failing)
    with pytest.raises(UserError, match="photo.jpg"):
        loop.train(make_config(), tmp_path / "run")
    monkeypatch.setattr(loop, "make_evaluator", make)
    train_epoch = epochs.train_epoch

    def noted(run, current, at, totals):
        trained.append(at)
        return train_epoch(run, current, at, totals)

    monkeypatch.setattr(epochs, "train_epoch", noted)
    loop.train(make_config(), tmp_path / "run")
    assert trained == [5]
    assert_same_run(tmp_path / "run", finished[0])


@pytest.mark.parametrize("every", slow_after(1, [2, 3]))
def test_a_kill_within_an_epoch_costs_the_steps_since_the_last_checkpoint(make_config, tmp_path, monkeypatch, every):
    """Two epochs of five steps, killed at the ninth: the run goes on from within the second."""
    config = make_config(steps_per_call=1, checkpoint_every_steps=every)
    loop.train(config, tmp_path / "whole")
    add, steps = epochs.add_call, itertools.count(1)

    def dies(*args):
        if next(steps) == 9:
            raise Stop
        return add(*args)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(epochs, "add_call", dies)
        loop.train(config, tmp_path / "run")
    at = 8 if every == 2 else 6
    assert max(checkpoint.open_reader(tmp_path / "run").all_steps()) == at
    assert timing.read(tmp_path / "run")[-1].last == at
    loop.train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_is_due_at_an_epochs_end_too(make_config, tmp_path):
    """Every 5 steps, of epochs of 5 of which only every hundredth is saved for its own sake."""
    config = make_config(num_epochs=3, checkpoint_every_steps=5, checkpoint_every_epochs=100)
    loop.train(config, tmp_path / "run")
    with closing(checkpoint.open_reader(tmp_path / "run")) as manager:
        assert sorted(manager.all_steps()) == [5, 10, 15]


def test_data_that_changed_are_not_gone_on_with(make_config, folder, tmp_path):
    """Two images more, of as many steps an epoch and evaluated on the same: nothing else would show them."""
    fields = {"train_split": "train[:-12]", "eval_split": "train[-12:]", "batch_size": 8}
    config = make_config(dataset=f"folder:{folder}", augment__crop_padding=0, num_epochs=1, **fields)
    loop.train(config, tmp_path / "run")
    config.num_epochs = 2
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.json*")}
    (folder / "red" / "0.png").rename(folder / "red" / "another.png")
    with pytest.raises(UserError, match="trained on other data: as many images, but some with other names or classes"):
        loop.train(config, tmp_path / "run")
    for number in range(2):
        shutil.copy(folder / "red" / "another.png", folder / "red" / f"new{number}.png")
    says = "was trained on other data: 36 training and 12 evaluation images, but there are now 38 and 12"
    with pytest.raises(UserError, match=says):
        loop.train(config, tmp_path / "run")
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_has_saved_nothing_may_have_other_data(make_config, folder, tmp_path, monkeypatch):
    def dies(*args, **kwargs):
        raise Stop

    fields = {"train_split": "train[:-12]", "eval_split": "train[-12:]", "batch_size": 8, "num_epochs": 1}
    config = make_config(dataset=f"folder:{folder}", augment__crop_padding=0, **fields)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(epochs, "train_epoch", dies)
        loop.train(config, tmp_path / "run")
    assert workdir.read_data(tmp_path / "run")[:3] == (("blue", "red"), 36, 12)
    shutil.copy(folder / "red" / "0.png", folder / "red" / "new.png")
    loop.train(config, tmp_path / "run")
    assert workdir.read_data(tmp_path / "run")[:3] == (("blue", "red"), 37, 12)


def test_an_image_that_cannot_be_read_costs_no_steps(make_config, folder, tmp_path, monkeypatch):
    """Streamed, the third batch of four fails: once its file is there again, the run goes on behind the second."""
    fields = {"train_split": "train[:-16]", "eval_split": "train[-16:]", "batch_size": 8, "resident": "false"}
    fields |= {"num_workers": 0, "steps_per_call": 1, "num_epochs": 2, "augment__crop_padding": 0}
    config = make_config(dataset=f"folder:{folder}", **fields)
    loop.train(config, tmp_path / "whole")
    read_batch, calls = streaming.read_batch, itertools.count()

    def fails(*args, **kwargs):
        if next(calls) >= 2:
            raise UserError("7.png cannot be read")
        return read_batch(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="7.png"):
        patch.setattr(streaming, "read_batch", fails)
        loop.train(config, tmp_path / "run")
    assert checkpoint.open_reader(tmp_path / "run").all_steps() == [2]
    loop.train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_folder_that_moved_is_gone_on_with_and_one_of_other_classes_is_not(make_config, folder, tmp_path, caplog):
    fields = {"train_split": "train[:75%]", "eval_split": "train[75%:]", "batch_size": 8, "augment__crop_padding": 0}
    loop.train(make_config(dataset=f"folder:{folder}", num_epochs=1, **fields), tmp_path / "run")
    moved = folder.rename(tmp_path / "moved")
    config = make_config(dataset=f"folder:{moved}", num_epochs=2, **fields)
    (moved / "blue").rename(moved / "yellow")  # the last one now
    with pytest.raises(UserError, match="class 0 was .blue. and is now .red."):
        loop.train(config, tmp_path / "run")
    (moved / "yellow").rename(moved / "blue")
    assert loop.train(config, tmp_path / "run")["epoch"] == 2
    assert f"dataset was folder:{folder} and is now folder:{moved}: it must hold" in caplog.text


def test_processes_must_have_the_same_images(make_config, tmp_path, monkeypatch):
    """A folder may lie elsewhere on each machine, as data_dir may."""
    agreed = {}
    monkeypatch.setattr(loop.distributed, "require_agreement", lambda what, text: agreed.update({what: text}))
    loop.train(make_config(num_epochs=1), tmp_path / "run")
    assert json.loads(agreed["the data set"]) == [list(map(str, range(10))), 160, 50, ["1.0.0", "1.0.0"]]


def test_another_data_dir_is_said(finished, make_config, tmp_path, caplog):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    config = make_config(num_epochs=3)
    config.data_dir = str(shutil.copytree(config.data_dir, tmp_path / "elsewhere"))
    loop.train(config, workdir)
    assert f"data_dir was {make_config().data_dir} and is now {config.data_dir}" in caplog.text


def test_a_failure_after_a_signal_ends_as_the_signal_says(make_config, tmp_path, monkeypatch, caplog):
    """As of a process that reads the data, and got the signal too: a comparison would go on with its next run."""

    def fails(run, *_):
        run.interruption.signum = signal.SIGTERM
        raise UserError("a process that reads the data has ended")

    monkeypatch.setattr(epochs, "train_epoch", fails)
    with pytest.raises(SystemExit) as ended:
        loop.train(make_config(), tmp_path / "run")
    assert ended.value.code == 143 and "a process that reads the data has ended" in caplog.text


class Stop(BaseException):
    """What the tests raise to kill a run at a chosen place; no Exception, after which an epoch is saved."""


@pytest.mark.parametrize("place", slow_after(1, ["save", "dispatch", "evaluate"]))
def test_a_run_that_dies_and_goes_on_equals_one_in_one_go(finished, make_config, tmp_path, monkeypatch, place):
    """Killed in the second epoch: while training, while evaluating, before its checkpoint is written."""
    calls = 0
    module, name = {
        "dispatch": (epochs, "add_call"),
        "evaluate": (epochs, "evaluation"),
        "save": (checkpoint, "save"),
    }[place]
    original = getattr(module, name)
    steps = 5 // dispatch.steps_per_call(make_config().steps_per_call, 5, 0)

    def dies(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == (steps + 1 if place == "dispatch" else 2):
            raise Stop
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, name, dies)
        loop.train(make_config(), tmp_path / "run")
    assert weights(tmp_path / "run")[0] == 5
    loop.train(make_config(), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished[0])


def test_a_longer_run_goes_on_from_a_shorter_one_and_says_what_changes(make_config, tmp_path, caplog):
    loop.train(make_config(num_epochs=1), tmp_path / "run")
    result = loop.train(make_config(num_epochs=2), tmp_path / "run")
    assert result["step"] == 10
    assert "cosine schedule follows the new length from step 5" in caplog.text


@pytest.mark.slow
def test_a_longer_run_says_where_images_become_small_again(make_config, tmp_path, caplog):
    fields = {"progressive_sizes": (0.5, 1.0), "schedule__name": "constant", "schedule__warmup_epochs": 0.0}
    loop.train(make_config(num_epochs=2, **fields), tmp_path / "run")
    assert "smaller" not in caplog.text
    loop.train(make_config(num_epochs=6, **fields), tmp_path / "run")
    assert "images of 16 pixels are followed by smaller ones, of 8" in caplog.text


def test_a_signal_after_the_last_look_is_not_forgotten(finished, make_config, tmp_path, monkeypatch, caplog):
    """In a comparison the next run would begin. The run itself is whole."""
    caplog.set_level("INFO")

    def asked_too_late(asked):
        asked.signum = signal.SIGTERM

    monkeypatch.setattr(interruption.Interruption, "raise_if_asked", asked_too_late)
    monkeypatch.setattr(interruption.Interruption, "asked", lambda asked: False)
    with pytest.raises(SystemExit) as ended:
        loop.train(make_config(), tmp_path / "run")
    assert ended.value.code == 128 + signal.SIGTERM and "saved step 10, the last" in caplog.text
    assert numbers(tmp_path / "run") == numbers(finished[0])


def test_a_device_that_is_too_small_is_one_sentence(make_config, tmp_path, monkeypatch):
    def fails(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore of it")

    monkeypatch.setattr(loop, "fit", fails)
    with pytest.raises(UserError, match=r"enough memory \(RESOURCE_EXHAUSTED.*8 bytes.\): config.resident=false, "):
        loop.train(make_config(), tmp_path / "run")


def test_a_run_beyond_its_new_horizon_is_refused_and_kept(make_config, tmp_path):
    loop.train(make_config(num_epochs=3), tmp_path / "run")
    before = numbers(tmp_path / "run")
    with pytest.raises(UserError, match="is at step 15, beyond config.num_epochs=2"):
        loop.train(make_config(num_epochs=2), tmp_path / "run")
    assert numbers(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_epochs"] == 3


def test_a_finished_run_that_lost_its_records_is_evaluated_again(finished, make_config, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert loop.train(make_config(), tmp_path / "run") == finished[1]


def test_a_signal_between_two_epochs_repeats_nothing(finished, make_config, tmp_path, monkeypatch):
    original = epochs.finish_epoch

    def signalled(*args):
        original(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(epochs, "finish_epoch", signalled)
        loop.train(make_config(), tmp_path / "run")
    manager = checkpoint.open_reader(tmp_path / "run")
    assert list(manager.all_steps()) == [5] and manager.metrics(5)
    loop.train(make_config(), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished[0])


def test_a_bad_net_is_refused_before_data_is_looked_for(make_config, tmp_path):
    with pytest.raises(UserError, match="nonsense"):
        loop.train(make_config(dataset="cifar10", model__name="nonsense"), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 30}, "config.batch_size=30 must be a multiple of the 4 devices"),
        ({"eval_batch_size": 30}, "config.eval_batch_size=30 must be a multiple of the 4 devices"),
        ({"batch_size": 4, "augment__mixup": 0.2}, "config.augment.mixup pairs the images on a device"),
        ({"batch_size": 164}, "config.batch_size=164 must be at most the 160 examples"),
        ({"batch_size": 0}, "config.batch_size"),
        ({"num_epochs": 0}, "config.num_epochs"),
        ({"dataset": "digitz"}, "digitz"),
        ({"train_split": "trian"}, "trian"),
        ({"train_split": "train[:0]"}, "train"),
        ({"model__name": "mobilenet_v7"}, "mobilenet_v7"),
        ({"model__activation": "projekt"}, "projekt"),
        ({"resident": "perhaps"}, "perhaps"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(make_config, tmp_path, fields, message):
    with pytest.raises(UserError) as caught:
        loop.train(make_config(**fields), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_net_that_cannot_take_the_images_is_refused(make_config, tmp_path):
    fields = {"model__name": "squeezenet1_0", "image_size": 8, "augment__crop_padding": 0}
    with pytest.raises(UserError, match="cannot take images of 8x8"):
        loop.train(make_config(**fields), tmp_path / "run")


@pytest.mark.parametrize("resident", slow_after(1, ["true", "false"]))
def test_a_shorter_last_call_makes_the_same_run(make_config, tmp_path, resident):
    """Five steps an epoch as calls of one, and of four and one."""
    loop.train(make_config(steps_per_call=1, num_epochs=1), tmp_path / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "steps_per_call", lambda *_: 4)
        loop.train(make_config(num_epochs=1, resident=resident), tmp_path / "run")
    one, other = ((numbers(tmp_path / name)[-1], weights(tmp_path / name)) for name in ("one", "run"))
    assert one[0]["step"] == one[1][0] == other[1][0] == 5
    if jax.__version__ == "0.10.0":  # whose XLA rounds a call of one step otherwise
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), one[1], other[1])
    else:
        assert one[0] == other[0]
        jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


def test_small_images_first_and_the_whole_size_last(make_config, tmp_path, monkeypatch):
    """Progressive resizing, interrupted between the sizes: the sizes compiled, and the end of the whole run."""
    seen = []
    compile_train = loop.compile_train

    def note(plan, examples, size, per_call):
        seen.append(size)
        return compile_train(plan, examples, size, per_call)

    monkeypatch.setattr(loop, "compile_train", note)
    fields = {"progressive_sizes": (8, 16), "augment__mixup": 0.5, "optimizer__name": "muon", "num_epochs": 3}
    config = make_config(**fields, optimizer__learning_rate=0.01)
    loop.train(config, tmp_path / "whole")
    assert seen == [8, 16]

    def dies(*args, **kwargs):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        finish = epochs.finish_epoch
        patch.setattr(epochs, "finish_epoch", lambda *run_to: (dies if run_to[-1] == 15 else finish)(*run_to))
        loop.train(config, tmp_path / "run")
    loop.train(config, tmp_path / "run")
    assert seen == [8, 16, 8, 16, 16]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    losses = [record["loss"] for record in numbers(tmp_path / "whole") if "loss" in record]
    assert losses[-1] < losses[0]


@pytest.fixture
def folder(tmp_path):
    """Red and blue images of many sizes in a folder for each class."""
    rng = np.random.default_rng(0)
    for name, colour in (("blue", (20, 20, 200)), ("red", (200, 20, 20))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(24):
            pixels = rng.normal(colour, 20, (20 + i, 40 - i, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_a_folder_of_images_trains_on_random_crops(make_config, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    fields = {"train_split": "train[:32]", "eval_split": "train[32:]", "crop_area": 0.2, "crop": True}
    fields["eval_every_epochs"] = 4
    config = make_config(dataset="folder:images", **fields, batch_size=8, num_epochs=4, augment__crop_padding=0)
    result = loop.train(config, tmp_path / "run")
    assert result["num_examples"] == 16 and result["eval_accuracy"] > 0.9
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dataset"] == f"folder:{folder}"
    # In worker processes the same crops.
    config.num_workers = 1
    loop.train(config, tmp_path / "again")
    assert_same_run(tmp_path / "again", tmp_path / "run")

    (folder / "green").mkdir()
    shutil.copy(folder / "red" / "0.png", folder / "green" / "0.png")
    (folder / "red").rename(tmp_path / "red")
    with pytest.raises(UserError, match="class 1 was .red. and is now .green."):
        evaluate.main(["", f"--workdir={tmp_path / 'run'}", "--checkpoint=latest", "--split=train[:1]"])
    shutil.rmtree(folder / "green")
    (tmp_path / "red").rename(folder / "red")

    folder.rename(tmp_path / "moved")
    evaluate.main(["", f"--workdir={tmp_path / 'run'}", "--checkpoint=latest", f"--data_dir={tmp_path / 'moved'}"])
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluated["num_examples"] == 16 and evaluated["eval_accuracy"] == result["eval_accuracy"]
