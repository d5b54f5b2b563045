"""A fault of each kind from within; at random moments by `tests.chaos.faults`."""

import random
import shutil
import subprocess
import sys

import pytest

from jaxnets import journal, progress, report, timing
from tests.chaos import faults, runs


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with runs.tiny_net(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda workdirs: None)  # half a second each
        yield


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """With the data, and the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("faults")
    faults.prepare(folder)
    return folder


def assert_goes_on(folder, workdir):
    outcome = runs.attempt(runs.make_config(folder / "data"), workdir)
    assert outcome.error is None
    assert runs.differences(workdir, folder / "reference") == []


@pytest.mark.parametrize(
    ("part", "at", "sentence"),
    [
        ("params", 7, "the loss became nan at step 8; the last good checkpoint is step 5"),
        ("params", 5, "the evaluation loss became nan after step 5, the last good checkpoint is step None"),
        ("batch_stats", 10, "the evaluation loss became nan after step 10, the last good checkpoint is step 5"),
        ("opt_state", 6, "the loss became nan at step 8; the last good checkpoint is step 5"),
    ],
)
def test_a_nan_ends_the_run_before_it_is_saved(folder, tmp_path, part, at, sentence):
    with faults.poisoned(part, at):
        outcome = runs.attempt(runs.make_config(folder / "data"), tmp_path / "run")
    assert sentence in outcome.error
    assert list(runs.saved(tmp_path / "run")) == ([5] if at > 5 else [])
    assert_goes_on(folder, tmp_path / "run")


@pytest.mark.parametrize("part", faults.PARTS)
def test_a_nan_that_no_loss_shows_is_not_saved(folder, tmp_path, part):
    """At the end of an epoch that is saved and not evaluated."""
    config = runs.make_config(folder / "data", eval_every_epochs=2)
    with faults.poisoned(part, 5):
        outcome = runs.attempt(config, tmp_path / "run")
    assert "no longer finite at step 5" in outcome.error
    assert runs.saved(tmp_path / "run") == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_spoiled_records_are_named_and_the_run_goes_on_once_they_are_whole(folder, tmp_path, workers):
    shutil.copytree(folder / "data", tmp_path / "data")
    shard = next((tmp_path / "data").rglob("digits-train.array_record-*"))
    config = runs.make_config(tmp_path / "data", resident="false", num_workers=workers, num_epochs=20)
    with faults.once_at(6, lambda: faults.overwrite(shard, random.Random(0))):
        outcome = runs.attempt(config, tmp_path / "run")
    assert "of digits train[:160] in" in outcome.error and "cannot be read" in outcome.error
    assert 5 in runs.saved(tmp_path / "run")
    shutil.copytree(folder / "data", tmp_path / "data", dirs_exist_ok=True)
    config.num_epochs = 2
    runs.attempt(config, tmp_path / "again")
    assert runs.differences(tmp_path / "again", folder / "reference") == []


@pytest.mark.parametrize("way", ["cut off", "vanish"])
def test_a_file_that_goes_does_no_harm(folder, tmp_path, way):
    rng = random.Random(way)
    workdir = tmp_path / "run"
    shutil.copytree(folder / "data", tmp_path / "data")
    shard = next((tmp_path / "data").rglob("digits-train.array_record-*"))
    config = runs.make_config(tmp_path / "data", resident="false")
    with faults.once_at(1, lambda: faults.SHARD_WAYS[way](shard, rng)):
        runs.attempt(config, workdir)
    outcome = runs.attempt(config, tmp_path / "new")
    assert str(shard) in outcome.error and not (tmp_path / "new").exists()
    shutil.copytree(folder / "data", tmp_path / "data", dirs_exist_ok=True)
    assert_goes_on(folder, workdir)


def test_a_clock_that_jumps_at_every_question_changes_nothing(folder, tmp_path):
    kind, wrong = faults.attempt(faults.break_clock, folder, random.Random(0))
    assert wrong is None


def test_tensorboard_gets_its_numbers_whatever_the_clock_says(tmp_path):
    """tensorboardX's own thread ends on a clock that is set back, and its queue of ten then stays full."""
    written = journal.Journal(tmp_path, 0, False)
    with faults.jumping_clock(random.Random(0)):
        for step in range(1, 60):
            written.write({"step": step, "epoch": 1, "loss": 1.0})
    written.close()
    size = sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())
    assert size > 59 * len("train/loss")


def test_the_time_left_does_not_ask_what_day_it_is(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = progress.Progress(0, 100, 10)
    with faults.jumping_clock(random.Random(0)), shown:
        for at in range(1, 50):
            shown.advance(at, {"loss": 1.0, "correct": 1, "count": 2}, 100.0)
        task = shown._bar.tasks[0]
        assert task.time_remaining is None or 0 <= task.time_remaining < 60
        assert 0 <= task.elapsed < 60


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
