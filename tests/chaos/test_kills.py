"""A run killed at random moments, one of them in a save, ends as if nobody had disturbed it."""

import pytest

from tests.chaos import kills


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "phases"), [(6, ["save", "train"]), (34, ["read data", "save", "start", "train"])])
def test_a_run_killed_again_and_again_is_the_run_that_was_not(tmp_path, seed, phases):
    assert sorted(moment.phase for moment in kills.plan(len(phases), seed)) == phases
    hits, findings, finished = kills.campaign(len(phases), seed, tmp_path, epochs=3)
    assert len(hits) == len(phases) and finished and not findings, findings
