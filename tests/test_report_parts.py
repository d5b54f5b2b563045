"""How the page of a run says what it says."""

import dataclasses

import pytest

from jaxnets import report, report_parts
from tests.test_report import make_run


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
