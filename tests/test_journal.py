"""The journal goes on exactly where a checkpoint stands."""

import json
import subprocess
import sys

import pytest
from tensorboardX.proto import event_pb2

from jaxnets import journal
from jaxnets.errors import UserError

RECORDS = [
    {"step": 5, "epoch": 1, "loss": 2.0, "accuracy": 0.1},
    {"step": 10, "epoch": 1, "loss": 1.5, "accuracy": 0.2},
    {"step": 10, "epoch": 1, "eval_loss": 1.4, "eval_accuracy": 0.3, "num_examples": 50},
    {"step": 15, "epoch": 2, "loss": 1.0, "accuracy": 0.4},
]


@pytest.fixture
def workdir(tmp_path):
    written = journal.Journal(tmp_path, 0, False)
    for record in RECORDS:
        written.write(record)
    written.close()
    return tmp_path


def test_what_is_written_is_read(workdir):
    assert journal.read(workdir) == RECORDS
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS


@pytest.mark.parametrize(
    ("step", "evaluated", "kept"), [(0, False, 0), (5, False, 1), (10, False, 2), (10, True, 3), (15, False, 4)]
)
def test_going_on_drops_what_will_be_made_again(workdir, step, evaluated, kept):
    again = journal.Journal(workdir, step, evaluated)
    assert journal.read(workdir) == RECORDS[:kept]
    again.write(RECORDS[3])
    assert journal.read(workdir) == [*RECORDS[:kept], RECORDS[3]]


def test_the_mean_of_an_epoch_counts_every_step_once():
    trained = [record for record in RECORDS if "loss" in record] + [{"step": 16, "epoch": 2, "loss": 7, "accuracy": 1}]
    means = journal.epoch_means(trained)
    assert means[1] == {"loss": 1.75, "accuracy": pytest.approx(0.15)}
    assert means[2] == {"loss": 2.0, "accuracy": pytest.approx(0.5)}
    # Of damaged records, which do not go on: nothing is divided by no steps.
    assert journal.epoch_means([trained[-1], trained[0]]).keys() == {2}


def test_a_torn_last_line_is_dropped(workdir):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "epo')
    assert journal.read(workdir) == RECORDS
    again = journal.Journal(workdir, 15, False)
    again.write({"step": 20, "epoch": 2, "loss": 0.5})
    assert journal.read(workdir) == [*RECORDS, {"step": 20, "epoch": 2, "loss": 0.5}]


def test_a_line_between_others_is_not_given_up_with_all_after_it(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    damaged = "\n".join([lines[0], lines[1].replace("{", "[", 1), *lines[2:]])
    path.write_text(damaged)
    with pytest.raises(UserError, match="metrics.jsonl: line 2 is not a record"):
        journal.Journal(workdir, 15, False)
    assert path.read_text() == damaged


def test_starting_over_is_said(workdir, caplog):
    journal.Journal(workdir, 5, False).close()
    assert not caplog.text
    journal.Journal(workdir, 0, False).close()
    assert "has no checkpoint yet: it starts over, and its 1 records are made again" in caplog.text
    assert journal.read(workdir) == [] and not list(workdir.glob("metrics.*.jsonl"))


def test_evaluations_are_kept_where_the_checkpoints_are_gone(workdir, caplog):
    (workdir / "metrics.1.jsonl").write_text("of another time\n")
    text = (workdir / "metrics.jsonl").read_text()
    journal.Journal(workdir, 0, False).close()
    assert "no longer has a checkpoint: it starts over; its records are now in metrics.2.jsonl" in caplog.text
    assert (workdir / "metrics.2.jsonl").read_text() == text and journal.read(workdir) == []
    assert (workdir / "metrics.1.jsonl").read_text() == "of another time\n"


def test_the_last_evaluation_is_that_of_the_step(workdir):
    again = journal.Journal(workdir, 15, True)
    assert again.last_evaluation(10) == RECORDS[2]
    assert again.last_evaluation(15) is None


def events(file):
    content, at = file.read_bytes(), 0
    while at < len(content):  # TFRecord framing: length, its CRC, the event, its CRC
        length = int.from_bytes(content[at : at + 8], "little")
        yield event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


def test_tensorboard_drops_what_comes_after_the_step_gone_on_from(workdir, monkeypatch):
    """It keeps of a number what is of steps before that of a start: of 10 the evaluation, too."""
    (before,) = (workdir / "tensorboard").iterdir()
    monkeypatch.setattr(journal.os, "getpid", lambda: 1)  # within a second two files of a process have one name
    journal.Journal(workdir, 10, True).close()
    (after,) = set((workdir / "tensorboard").iterdir()) - {before}
    starts = [
        [event.step for event in events(file) if event.session_log.status == event_pb2.SessionLog.START]
        for file in (before, after)
    ]
    assert starts == [[0], [11]]


def test_tensorboard_gets_every_number(workdir):
    (file,) = (workdir / "tensorboard").iterdir()
    scalars = {
        (event.step, value.tag, round(value.simple_value, 4)) for event in events(file) for value in event.summary.value
    }
    assert scalars == {
        (5, "train/loss", 2.0),
        (5, "train/accuracy", 0.1),
        (10, "train/loss", 1.5),
        (10, "train/accuracy", 0.2),
        (10, "eval/eval_loss", 1.4),
        (10, "eval/eval_accuracy", 0.3),
        (10, "eval/num_examples", 50.0),
        (15, "train/loss", 1.0),
        (15, "train/accuracy", 0.4),
    }


def test_the_journal_does_not_import_pytorch_and_leaves_it_importable(tmp_path):
    pytest.importorskip("torch")
    code = (
        "import importlib.util, pathlib, sys\nfrom jaxnets import journal\n"
        "journal.Journal(pathlib.Path(sys.argv[1]), 0, False).close()\n"
        "assert 'torch' not in sys.modules and importlib.util.find_spec('torch')\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
