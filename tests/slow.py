"""Which cases of a test run only when all are asked for: `pytest -m ''`."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import pytest


def each_once(axes: Mapping[str, Iterable]):
    """`parametrize` over a product, marked slow but for as few cases as have every value of every axis once.

    A key names what its values are given to, several names as in `parametrize`: "size, stride".
    """
    names = ", ".join(axes)
    columns = [[_case(value, "," in name) for value in values] for name, values in axes.items()]
    lengths = [len(column) for column in columns]
    # The k-th has the k-th value of the longest axis; a shorter one begins anew, shifted against the others.
    kept = {
        tuple((k + k // length * axis) % length for axis, length in enumerate(lengths)) for k in range(max(lengths))
    }
    cases = []
    for at in itertools.product(*map(range, lengths)):
        parts = [column[i] for column, i in zip(columns, at)]
        marks = [mark for part in parts for mark in part.marks] + [pytest.mark.slow] * (at not in kept)
        cases.append(pytest.param(*(value for part in parts for value in part.values), marks=marks))
    return pytest.mark.parametrize(names, cases)


def slow_after(count: int, cases: Iterable) -> list:
    """The cases of a `parametrize`, all but the first `count` of them marked slow."""
    return [case if at < count else mark_slow(case) for at, case in enumerate(cases)]


def mark_slow(case):
    """One case of a `parametrize`, marked slow."""
    values: Sequence = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)


def _case(value, of_several: bool):
    if hasattr(value, "marks"):  # a `pytest.param`
        return value
    return pytest.param(*value) if of_several else pytest.param(value)
