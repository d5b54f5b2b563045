"""A workdir is one run's, and one process's at a time."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import default
from jaxnets import journal, settings, workdir
from jaxnets.errors import UserError


def config(**fields):
    made = default.get_config()
    made.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return made


def begin(folder):
    """As the first report of a run does."""
    (folder / journal.FILE).write_text('{"step": 1, "epoch": 1}\n')


def test_a_new_folder_is_made_and_gets_its_configuration(tmp_path):
    with workdir.claim(tmp_path / "a" / "b", config()) as before:
        assert before is None
    assert settings.as_dict(settings.read(tmp_path / "a" / "b" / "config.json")) == settings.as_dict(config())


def test_the_same_run_goes_on_and_free_fields_may_change(tmp_path):
    with workdir.claim(tmp_path, config()):
        begin(tmp_path)
    with workdir.claim(tmp_path, config(num_epochs=99)) as before:
        assert before.num_epochs == default.get_config().num_epochs
        assert settings.read(tmp_path / "config.json").num_epochs == before.num_epochs
        workdir.keep(tmp_path, config(num_epochs=99))
    assert settings.read(tmp_path / "config.json").num_epochs == 99


@pytest.mark.parametrize("below", ["runs/one", "cat/run"])
def test_a_folder_of_images_is_no_place_for_a_run(tmp_path, below, monkeypatch):
    """It would be a class of its own when the run resumes."""
    monkeypatch.chdir(tmp_path)
    for dataset in ("folder:.", f"folder:{tmp_path}"):
        with pytest.raises(UserError, match="where it would count as a class of images"):
            workdir.check(Path(below), config(dataset=dataset))
        assert workdir.check(Path(".hidden") / below, config(dataset=dataset)) is None
    assert workdir.check(Path(below), config(dataset=f"folder:{tmp_path / 'photos'}")) is None
    (tmp_path / "train" / "cat").mkdir(parents=True)  # beside splits it does no harm
    assert workdir.check(Path(below), config(dataset="folder:.")) is None


def test_a_run_that_took_no_step_may_be_configured_anew(tmp_path):
    for batch_size in (4096, 128):
        with workdir.claim(tmp_path, config(batch_size=batch_size)) as before:
            assert before is None
        assert settings.read(tmp_path / "config.json").batch_size == batch_size


def test_another_run_is_refused_with_every_differing_field_and_changes_nothing(tmp_path):
    with workdir.claim(tmp_path, config()):
        begin(tmp_path)
    content = (tmp_path / "config.json").read_bytes()
    other = config(seed=4, batch_size=32, model__width=0.5, optimizer__learning_rate=0.2)
    with (
        pytest.raises(
            UserError, match=r"batch_size was 128, is 32; model.width was None, is 0.5; optimizer.learn.*; seed was 0"
        ),
        workdir.claim(tmp_path, other),
    ):
        pass
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_width_of_one_is_what_it_was_when_it_was_written_down(tmp_path):
    with workdir.claim(tmp_path, config(model__width=1.0)):
        begin(tmp_path)
    with workdir.claim(tmp_path, config()) as before:
        assert before.model.width == 1.0


def test_weights_without_a_run_are_told_how_to_be_used(tmp_path):
    weights = config()
    with weights.unlocked():
        del weights.batch_size
    settings.write(weights, tmp_path / "config.json")
    begin(tmp_path)
    says = f"holds weights but no run to resume; give them as --config.init_from={tmp_path}"
    with pytest.raises(UserError, match=says), workdir.claim(tmp_path, config()):
        pass


def test_a_folder_with_strangers_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="thesis.tex"), workdir.claim(tmp_path, config()):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_two_runs_at_once_are_refused(tmp_path):
    with workdir.claim(tmp_path, config()), pytest.raises(UserError, match="in use"):  # noqa: SIM117
        with workdir.claim(tmp_path, config()):
            pass
    with workdir.claim(tmp_path, config()):
        pass


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_file_is_not_a_workdir(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="folder"), workdir.claim(tmp_path / below, config()):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    for folder in (tmp_path, tmp_path / "below"):
        with pytest.raises(UserError, match="cannot be"), workdir.claim(folder, config()):
            pass


def test_what_a_run_is_trained_on_comes_back(tmp_path):
    assert workdir.read_data(tmp_path) is workdir.class_names(tmp_path) is None
    data = workdir.Data(("blåhaj", "a\nb"), 60, 10, ("12ab", "34cd"))
    workdir.keep_data(tmp_path, data)
    assert workdir.read_data(tmp_path) == data and workdir.class_names(tmp_path) == data.class_names
    workdir.keep_data(tmp_path, data._replace(train_images=61))
    assert workdir.read_data(tmp_path).train_images == 61
    (tmp_path / workdir.DATA).write_text('{"class_names": ["a"], "train_images": 6, "eval_images": 1}')
    assert workdir.read_data(tmp_path) == workdir.Data(("a",), 6, 1)  # of an earlier version


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"class_names": [1], "train_images": 1, "eval_images": 1}', b"\xff", b"[" * 100_000]
    + [b'{"class_names": ["a"], "train_images": "1", "eval_images": 1}', b'{"class_names": ["a"], "other": 1}'],
)
def test_a_damaged_file_of_it_is_one_sentence(tmp_path, content, caplog):
    (tmp_path / workdir.DATA).write_bytes(content)
    with pytest.raises(UserError, match=workdir.DATA):
        workdir.read_data(tmp_path)
    assert workdir.class_names(tmp_path) is None and workdir.DATA in caplog.text


@pytest.mark.parametrize("late", [True, False])
def test_processes_wait_for_what_a_network_shows_late(tmp_path, monkeypatch, late):
    """Process 1 of two: the first has the lock."""
    monkeypatch.setattr(workdir, "PATIENCE", 1.0)
    monkeypatch.setattr(workdir.distributed, "on_primary", lambda take: ("token", None))
    now = [0.0]

    def sleep(seconds):
        now[0] += 0.6
        if late:
            (tmp_path / workdir.LOCK).write_text("token")

    monkeypatch.setattr(workdir, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    with (
        contextlib.nullcontext() if late else pytest.raises(UserError, match="must be one folder for all processes"),
        workdir.claim(tmp_path, config()) as before,
    ):
        assert before is None
    assert now == [0.6 if late else 1.2]


def test_a_file_system_without_locks_is_no_other_run(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fails)
    with (
        pytest.raises(UserError, match="cannot be locked: No locks available; choose another"),
        workdir.claim(tmp_path, config()),
    ):
        pass
