"""What a run got wrong, counted as scikit-learn counts it."""

import dataclasses

import numpy as np
import pytest
import sklearn.metrics

from jaxnets import report, report_errors
from tests.test_report import make_run


def test_the_confusions_are_sklearns(tmp_path):
    run = report.load(make_run(tmp_path / "run")).evaluated
    found = report_errors.Confusions.of(run, 4)
    expected = sklearn.metrics.confusion_matrix(run.label, run.predicted, labels=range(4), normalize="true")
    np.testing.assert_array_equal(found.shares(), expected)
    assert found.wrong()[2].tolist() == sorted(found.wrong()[2], reverse=True)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "·"), (0.0049, "·"), (0.005, "1"), (0.025, "3"), (29 / 200, "15"), (0.994, "99"), (1, "100")],
)
def test_a_share_is_rounded_half_up(share, text):
    cell = report_errors._cell(share, right=False)
    assert (cell["text"], "none" in cell["kind"]) == (text, text == "·")


@pytest.mark.parametrize(
    ("share", "right", "kinds"),
    [(0.4, True, ""), (0.5, True, "strong"), (0.9, True, "strong stronger"), (0.9, False, "strong")],
)
def test_light_text_is_for_dark_cells(share, right, kinds):
    """Where a page is dark itself, its text is dark on strong colours from an earlier shade on."""
    assert report_errors._cell(share, right)["kind"].removeprefix("right").strip() == kinds


def test_the_hardest_class_of_all_runs_comes_first(tmp_path):
    """The mean of the runs counts, not the first one."""
    runs = [report.load(make_run(tmp_path / name)) for name in ("one", "two")]
    for run, wrong in zip(runs, ((2, 6, 9), (11, 1, 10))):
        run.evaluated.predicted[:] = run.evaluated.label
        for number, count in enumerate(wrong):  # of the 20 images of each class
            run.evaluated.predicted[np.flatnonzero(run.evaluated.label == number)[:count]] = (number + 1) % 3
    rows = report_errors.by_class(runs)
    assert [[float(cell["width"]) for cell in row["cells"]] for row in rows] == [[55, 50], [90, 45], [70, 95]]


def test_a_run_without_predictions_has_an_empty_place(tmp_path):
    one, new = (report.load(make_run(tmp_path / name)) for name in ("one", "new"))
    new = dataclasses.replace(new, evaluated=None)
    for runs in ((one, new), (new, one)):
        rows = report_errors.by_class(runs)
        assert len(rows) == 3 and all(row["cells"][runs.index(new)]["text"] == "–" for row in rows)
        assert [row["cells"][runs.index(one)] for row in rows] == [
            row["cells"][0] for row in report_errors.by_class([one])
        ]
    assert report_errors.by_class([new, new]) == []


def test_a_run_with_an_average_says_whose_mistakes_they_are(tmp_path):
    plain, averaged = (report.load(make_run(tmp_path / f"{decay}", ema_decay=decay)) for decay in (0.0, 0.9))
    assert "average" not in report_errors.mistakes(plain)["note"]
    assert "The last evaluation of the averaged weights: 60 images" in report_errors.mistakes(averaged)["note"]
