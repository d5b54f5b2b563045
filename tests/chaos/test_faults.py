"""A fault of each kind from within; at random moments by `tests.chaos.faults`."""

import random
import shutil
import subprocess
import sys

import pytest

from jaxnets import data, journal, progress, timing
from tests.chaos import faults, runs
from tests.photo_set import flip_one_record
from tests.slow import slow_after

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def folder(tiny, digits_dir, tmp_path_factory):
    """With the data, and the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copytree(digits_dir, folder / "data")
    faults.prepare(folder)
    return folder


def assert_goes_on(folder, workdir):
    outcome = runs.attempt(runs.make_config(folder / "data"), workdir)
    assert outcome.error is None
    assert runs.differences(workdir, folder / "reference") == []


@pytest.mark.parametrize(
    ("part", "at", "sentence"),
    slow_after(
        2,
        [
            ("params", 7, "the loss became nan at step 8; the last good checkpoint is step 5"),
            ("batch_stats", 10, "the evaluation loss became nan after step 10; the last good checkpoint is step 5"),
            ("params", 5, "the evaluation loss became nan after step 5; there is no checkpoint yet"),
            ("opt_state", 6, "the loss became nan at step 8; the last good checkpoint is step 5"),
        ],
    ),
)
def test_a_nan_ends_the_run_before_it_is_saved(folder, tmp_path, part, at, sentence):
    with faults.poisoned(part, at):
        outcome = runs.attempt(runs.make_config(folder / "data"), tmp_path / "run")
    assert sentence in outcome.error
    assert list(runs.saved(tmp_path / "run")) == ([5] if at > 5 else [])
    assert_goes_on(folder, tmp_path / "run")


@pytest.mark.parametrize("part", slow_after(1, faults.PARTS))
def test_a_nan_that_no_loss_shows_is_not_saved(folder, tmp_path, part):
    """At the end of an epoch that is saved and not evaluated."""
    config = runs.make_config(folder / "data", eval_every_epochs=2)
    with faults.poisoned(part, 5):
        outcome = runs.attempt(config, tmp_path / "run")
    assert "no longer finite at step 5" in outcome.error
    assert runs.saved(tmp_path / "run") == {}


@pytest.fixture
def copy(folder, tmp_path):
    """The data in a place of its own, and the file of its training split."""
    shutil.copytree(folder / "data", tmp_path / "data")
    return tmp_path / "data", next((tmp_path / "data").rglob("digits-train.array_record-*"))


def mend(folder, copy):
    shutil.copytree(folder / "data", copy[0], dirs_exist_ok=True)


@pytest.mark.parametrize("workers", slow_after(1, [0, 1]))
def test_spoiled_records_are_named_and_the_run_goes_on_once_they_are_whole(folder, copy, tmp_path, workers):
    place, shard = copy
    config = runs.make_config(place, resident="false", num_workers=workers)
    runs.attempt(runs.make_config(place), tmp_path / "run")  # to keep its first epoch alone
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    flip_one_record(shard, data.open_split("digits", "train", place, image_size=16).source[77])
    outcome = runs.attempt(config, tmp_path / "run")
    assert "record 77 of digits train[:160] in" in outcome.error and "cannot be read" in outcome.error
    assert {5} < set(runs.saved(tmp_path / "run")) < {5, 6, 7, 8, 9, 10}  # and the step before that record
    mend(folder, copy)
    assert_goes_on(folder, tmp_path / "run")


@pytest.mark.parametrize("way", slow_after(1, faults.SHARD_WAYS))
def test_a_file_that_goes_while_it_is_read_costs_no_more_than_the_epoch(folder, copy, tmp_path, way):
    """Whether the rest has been read before or not."""
    place, shard = copy
    config = runs.make_config(place, resident="false")
    rng = random.Random(way)
    with faults.each_step(lambda step: faults.SHARD_WAYS[way](shard, rng) if step == 1 else None):
        outcome = runs.attempt(config, tmp_path / "run")
    assert outcome.error is None or str(place) in outcome.error
    if way != "overwrite":  # which a new start finds record by record
        assert str(shard) in runs.attempt(config, tmp_path / "new").error
        assert not (tmp_path / "new").exists()
    mend(folder, copy)
    assert_goes_on(folder, tmp_path / "run")


def test_a_clock_that_is_set_changes_nothing(folder):
    kind, wrong = faults.attempt(faults.break_clock, folder, random.Random(0))
    assert wrong is None


def test_tensorboard_gets_its_numbers_whatever_the_clock_says(tmp_path):
    """tensorboardX's own thread ends on a clock that is set back by a month, and its queue of ten then stays full."""
    with faults.jumping_clock(random.Random(0)):
        written = journal.Journal(tmp_path, 0, False)
        for step in range(1, 60):
            written.write({"step": step, "epoch": 1, "loss": 1.0})
    written.close()
    size = sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())
    assert size > 59 * len("train/loss")


def test_the_time_left_does_not_ask_what_day_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = progress.Progress(0, 100, 10)
    with faults.jumping_clock(random.Random(0)), shown:
        written = journal.Journal(tmp_path, 0, False)
        for at in range(1, 50):
            shown.advance(at, {"loss": 1.0, "correct": 1, "count": 2}, 100.0)
            written.write({"step": at, "epoch": 1, "loss": 1.0})  # which sets the clock
        task = shown._bar.tasks[0]
        assert task.time_remaining is not None and 0 <= task.time_remaining < 60
        assert 0 <= task.elapsed < 60


@pytest.mark.slow
def test_a_clock_that_jumps_under_everything_changes_nothing(folder, repository, tmp_path, monkeypatch):
    """Under C++ and the kernel's answers to Python, too."""
    library = tmp_path / "jumping_clock.so"
    source = repository / "tests" / "chaos" / "jumping_clock.c"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a C compiler for Linux")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    ended = runs.command(tmp_path / "run", folder / "data", "--config.compilation_cache=False")
    assert ended.returncode == 0, ended.stderr
    assert runs.differences(tmp_path / "run", folder / "reference") == []
    seconds = [value for span in timing.read(tmp_path / "run") for value in span.seconds.values()]
    assert seconds and all(0 <= value < 600 for value in seconds)
