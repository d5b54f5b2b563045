"""A disk that is full, files that may not grow, a folder that is read-only; at random by `tests.chaos.storage`."""

import os
import subprocess

import pytest

from jaxnets import workdir
from jaxnets.errors import UserError
from tests.chaos import runs, storage
from tests.slow import slow_after

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def reference(tiny, data_dir, tmp_path_factory):
    """The run that nothing disturbed."""
    place = tmp_path_factory.mktemp("reference") / "run"
    assert runs.attempt(runs.make_config(data_dir), place).error is None
    return place


@pytest.fixture
def disk(tmp_path):
    if not storage.can_mount(tmp_path / "disk"):
        pytest.skip("only root may mount a small disk, and not everywhere")
    with storage.small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.mark.parametrize("room", slow_after(1, [12, 3, 28]))
def test_a_full_disk_ends_the_run_and_more_room_lets_it_go_on(disk, data_dir, reference, room):
    """`room` pages: within the first checkpoint; for the configuration alone; within the second."""
    ballast = storage.fill(disk, room * storage.PAGE)
    outcome = runs.attempt(runs.make_config(data_dir), disk / "run")
    assert outcome.error.startswith(str(disk / "run"))
    assert "cannot be written: No space left on device; what was saved before is unchanged" in outcome.error
    if (disk / "run" / "checkpoints").is_dir():
        assert set(runs.saved(disk / "run")) <= {5}
    ballast.unlink()
    assert runs.attempt(runs.make_config(data_dir), disk / "run").error is None
    assert runs.differences(disk / "run", reference) == []


@pytest.mark.parametrize("size", slow_after(1, [1500, 150]))
def test_the_command_ends_with_one_sentence_where_no_file_may_grow(data_dir, reference, tmp_path, size):
    """`size` bytes: less than a checkpoint's arrays; less than the configuration."""
    ended = runs.command(tmp_path / "run", data_dir, file_size=size)
    assert ended.returncode == 1
    assert storage.fault_of(ended, tmp_path / "run") is None
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert runs.attempt(runs.make_config(data_dir), tmp_path / "run").error is None
    assert runs.differences(tmp_path / "run", reference) == []


def test_a_folder_that_became_read_only_is_refused_as_it_is(disk, data_dir, reference):
    config = runs.make_config(data_dir, num_epochs=1)
    runs.attempt(config, disk / "run")
    before = runs.records(disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for place in (disk / "run", disk / "new"):
        error = runs.attempt(runs.make_config(data_dir), place).error
        assert f"--workdir={place} " in error and "writable" in error and "\n" not in error
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert runs.records(disk / "run") == before and set(runs.saved(disk / "run")) == {5}
    assert runs.attempt(config, disk / "run").error is None


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_checkpoints_that_are_read_only_are_refused(data_dir, tmp_path):
    runs.attempt(runs.make_config(data_dir, num_epochs=1), tmp_path / "run")
    (tmp_path / "run" / "checkpoints").chmod(0o500)
    outcome = runs.attempt(runs.make_config(data_dir), tmp_path / "run")
    (tmp_path / "run" / "checkpoints").chmod(0o700)
    assert "cannot be written: Permission denied" in outcome.error
    assert set(runs.saved(tmp_path / "run")) == {5}


def test_a_lock_that_cannot_be_written_is_one_sentence(disk, data_dir):
    config = runs.make_config(data_dir)
    with workdir.claim(disk / "run", config):
        pass
    (disk / "run" / ".lock").unlink()
    storage.fill(disk, 0)
    with (
        pytest.raises(UserError, match="cannot be written: No space left on device"),
        workdir.claim(disk / "run", config),
    ):
        pass
