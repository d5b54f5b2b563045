"""Which cases of a test run only when all are asked for: `pytest -m ''`."""

from collections.abc import Iterable, Sequence

import pytest


def slow_after(count: int, cases: Iterable) -> list:
    """The cases of a `parametrize`, all but the first `count` of them marked slow."""
    return [case if at < count else mark_slow(case) for at, case in enumerate(cases)]


def mark_slow(case):
    """One case of a `parametrize`, marked slow."""
    values: Sequence = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
