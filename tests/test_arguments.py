"""What several commands take as arguments is read, or refused in one sentence."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnets.arguments import check_deviation, count, field, triple
from jaxnets.errors import UserError


@given(st.integers(1, 10**18 - 1))
def test_a_count_is_a_whole_number_from_1_on(number):
    assert count(str(number)) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "+1", "1.0", "1e3", "1_000", " 1", "²", "1" * 19, "9" * 5000])
def test_anything_else_is_no_count(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 1") as refused:
        count(text)
    assert len(str(refused.value)) < 80


@given(st.tuples(*[st.floats(-1e30, 1e30)] * 3))
def test_a_triple_is_three_numbers(values):
    assert triple(",".join(map(repr, values))) == values


@pytest.mark.parametrize("text", ["", "0.5", "0.5,0.5", "1,2,3,4", "a,b,c", "nan,0,0", "0,inf,0", "inf,-inf,0"])
def test_anything_else_is_no_triple(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not three numbers"):
        triple(text)


@pytest.mark.parametrize("std", [(1.0, 0.0, 1.0), (1.0, 1.0, -0.5)])
def test_nothing_is_divided_by_zero(std):
    with pytest.raises(UserError, match="--std=.*greater than 0 in every channel"):
        check_deviation(std)


def test_a_deviation_may_be_left_out():
    check_deviation(None)
    check_deviation((0.2, 0.2, 0.2))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("width=0.5", ("width", 0.5)),
        ("hidden_features=512,512", ("hidden_features", (512, 512))),
        ("shortcut=identity", ("shortcut", "identity")),
        ("norm=a=b", ("norm", "a=b")),
        ("features_only=True", ("features_only", True)),
        ("shortcut=", ("shortcut", "")),
        ("width={[]:1}", ("width", "{[]:1}")),  # which Python cannot make
    ],
)
def test_a_field_is_a_python_literal_or_a_word(text, value):
    assert field(text) == value


@pytest.mark.parametrize("text", ["width", "=0.5", "", "name=mobilenet_v1"])
def test_a_field_has_a_name_and_a_value(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=VALUE"):
        field(text)
