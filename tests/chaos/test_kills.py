"""A run killed at four random moments, one of them in a save, ends as if nobody had disturbed it."""

from tests.chaos import kills

SEED = 34


def test_a_run_killed_again_and_again_is_the_run_that_was_not(tmp_path):
    assert {moment.phase for moment in kills.plan(4, SEED)} == {"train", "read data", "save", "start"}
    hits, findings, finished = kills.campaign(4, SEED, tmp_path, epochs=3)
    assert len(hits) == 4 and finished and not findings, findings
