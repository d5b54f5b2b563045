"""What a run got wrong, counted as scikit-learn counts it."""

import numpy as np
import sklearn.metrics

from jaxnets import report, report_errors
from tests.test_report import make_run


def test_the_confusions_are_sklearns(tmp_path):
    run = report.load(make_run(tmp_path / "run")).evaluated
    found = report_errors.Confusions.of(run, 4)
    expected = sklearn.metrics.confusion_matrix(run.label, run.predicted, labels=range(4), normalize="true")
    np.testing.assert_array_equal(found.shares(), expected)
    assert found.wrong()[2].tolist() == sorted(found.wrong()[2], reverse=True)
