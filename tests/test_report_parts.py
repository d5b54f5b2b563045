"""How the page of a run says what it says."""

import dataclasses

import pytest

from jaxnets import report, report_parts
from tests.slow import each_once
from tests.test_report import make_run, sketched  # noqa: F401  a fixture


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.42, "0.42 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.7, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.8, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_said_as_a_person_does(seconds, said):
    assert report_parts.duration(seconds) == said


def test_a_run_is_said_to_be_where_it_is(tmp_path):
    """Not at its last evaluation, and at its end only when that was evaluated."""
    run = report.load(make_run(tmp_path / "run"))
    assert "3 epochs, 30 steps" in report_parts.lede(run)
    going_on = dataclasses.replace(run, evaluations=run.evaluations[:1])
    assert "epoch 3 of 3 so far, 30 steps" in report_parts.lede(going_on)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize(
    "fields", [{"batch_size": None}, {"batch_size": "many"}, {"num_epochs": "three"}, {"augment": 3}]
)
def test_a_page_is_drawn_of_a_damaged_configuration(tmp_path, fields):
    assert "87.50%" in report.write([make_run(tmp_path / "run", **fields)]).read_text()


@each_once(
    {
        "value": ['"q"', "NaN", "1e400", "[]", "null", f"1{'0' * 400}"],
        "field": ["step", "eval_accuracy", "ema_eval_accuracy", "learning_rate", "num_examples"],
    }
)
def test_what_is_no_number_in_a_record_is_left_out(tmp_path, field, value):
    workdir = make_run(tmp_path / "run")
    records = (workdir / "metrics.jsonl").read_text().splitlines()
    damaged = '{"step": 30, "epoch": 3, "loss": 1, "accuracy": 1, "eval_loss": 1, "eval_accuracy": 0.5, "%s": %s}'
    (workdir / "metrics.jsonl").write_text("\n".join([*records, damaged % (field, value)]))
    assert "87.50%" in report.write([workdir]).read_text()


def test_an_evaluation_stands_with_the_mean_of_its_epochs_training(tmp_path):
    at = [{"step": 10 * epoch, "epoch": epoch} for epoch in range(1, 1001)]
    trained = []
    for each in at[6:]:  # nothing is known of the first six
        half = each | {"step": each["step"] - 2, "loss": each["epoch"] - 1.0, "accuracy": 0.5, "learning_rate": 0.2}
        trained += [half, half | {"step": each["step"], "loss": each["epoch"] + 4.0, "learning_rate": 0.1}]
    evaluations = [each | {"eval_loss": 1.0, "eval_accuracy": 0.5} for each in at[:1000:3]]
    run = dataclasses.replace(report.load(make_run(tmp_path / "run")), trained=trained, evaluations=evaluations)
    table = report_parts.evaluations(run)  # every other one of 334, with the last
    rows = table["rows"]
    assert len(rows) == 167 and table["left_out"] == "One in 2 is shown; metrics.jsonl has all 334."
    # 8 steps at a loss of the epoch less 1, and 2 at the epoch and 4.
    assert [row[4] for row in rows[:3]] == ["–", "10.0000", "16.0000"] and rows[-1][4] == "1000.0000"
    assert rows[-1][3] == "0.1"


def test_a_loss_that_diverged_fits_its_tile(tmp_path):
    run = report.load(make_run(tmp_path / "run"))
    last = run.evaluations[-1] | {"eval_loss": 38898.4}
    (tile,) = (tile for tile in report_parts.tiles(dataclasses.replace(run, evaluations=[last])) if "loss" in str(tile))
    assert "3.89e+04" in str(tile)


def test_runs_look_different_as_long_as_can_be():
    styles = report_parts.run_styles(24)
    assert len(set(styles)) == 24
