"""The usual run of a product of cases leaves no value out."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.slow import each_once

MARK = pytest.mark.skipif(False, reason="of a value")


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_every_value_is_in_a_usual_case_and_every_case_in_all(lengths):
    _, cases = each_once({f"axis{at}": range(length) for at, length in enumerate(lengths)}).args
    assert [case.values for case in cases] == list(itertools.product(*map(range, lengths)))
    usual = [case.values for case in cases if not case.marks]
    assert len(usual) == max(lengths)
    for values, length in zip(zip(*usual), lengths):
        assert set(values) == set(range(length))


def test_several_names_are_unpacked_and_marks_kept():
    names, cases = each_once({"name": ["x", pytest.param("y", marks=MARK)], "side, pad": [(3, (1, 1))]}).args
    assert names == "name, side, pad"
    assert [case.values for case in cases] == [("x", 3, (1, 1)), ("y", 3, (1, 1))]
    assert [[mark.name for mark in case.marks] for case in cases] == [[], ["skipif"]]
