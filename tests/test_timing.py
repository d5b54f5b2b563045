"""Every second of a process has one phase, and a step its time, however often the run was started."""

import itertools
import json

import numpy as np
import pytest

from jaxnets import timing
from jaxnets.timing import REST, Clock, Span


@pytest.fixture
def ticks(monkeypatch):
    """A clock that reads 0, 1, 2, ... seconds, one more at each look."""
    counter = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(counter)))


def test_every_second_belongs_to_the_innermost_phase(tmp_path, ticks):
    clock = Clock(tmp_path)  # 0
    with clock.phase("train"):  # 1
        with clock.phase("wait for data"):  # 2, left at 3
            pass
        with pytest.raises(ZeroDivisionError), clock.phase("evaluate"):  # 4, left at 5
            raise ZeroDivisionError
    # 6
    clock.write(10)  # 7
    clock.write(20)  # 8
    first, second = timing.read(tmp_path)
    assert first == Span(0, 10, {REST: 2.0, "train": 3.0, "wait for data": 1.0, "evaluate": 1.0})
    assert second == Span(10, 20, {REST: 1.0})
    assert timing.totals([first, second]) == {"train": 3.0, REST: 3.0, "wait for data": 1.0, "evaluate": 1.0}


def write(workdir, *spans):
    lines = [json.dumps({"first": first, "last": last, "seconds": seconds}) for first, last, seconds in spans]
    (workdir / timing.FILE).write_text("\n".join(lines))


def test_what_an_earlier_checkpoint_made_again_counts_once(tmp_path):
    write(tmp_path, (0, 5, {"train": 1}), (5, 10, {"train": 2}), (5, 10, {"train": 4}), (10, 15, {"train": 8}))
    assert timing.totals(timing.read(tmp_path)) == {"train": 13.0}


WRONG = [
    '{"first": 0, "last": 5, "seconds": {"train": NaN}}',
    '{"first": 0, "last": 5, "seconds": {"train": 1e400}}',
    '{"first": 0, "last": 5, "seconds": {"train": -1}}',
    '{"first": 9, "last": 5, "seconds": {}}',
    f'{{"first": 0, "last": 1{"0" * 400}, "seconds": {{}}}}',
]


@pytest.mark.parametrize(
    "line", ['{"first": 5, "la', "[]", '{"first": 1}', '{"first": 1, "last": 2, "seconds": 3}', *WRONG]
)
def test_a_line_that_is_no_span_spoils_no_other(tmp_path, line):
    write(tmp_path, (0, 5, {"train": 1}))
    with (tmp_path / timing.FILE).open("a") as file:
        file.write("\n" + line)
    clock = Clock(tmp_path)
    clock.step = 5
    clock.write(10)
    assert [(span.first, span.last) for span in timing.read(tmp_path)] == [(0, 5), (5, 10)]


def test_no_file_is_no_time(tmp_path):
    assert timing.read(tmp_path) == []
    assert np.isnan(timing.elapsed([], [1, 2])).all()


def test_a_step_is_timed_within_its_span_after_set_up_and_before_evaluation():
    spans = [
        Span(0, 10, {REST: 3.0, "compile": 4.0, "train": 18.0, "wait for data": 1.0, "evaluate": 5.0}),
        Span(10, 20, {"train": 9.5, "checkpoint": 2.0, REST: 0.5}),
    ]
    times = timing.elapsed(spans, [5, 10, 15, 20, 25])
    np.testing.assert_allclose(times[:4], [7 + 19 * 4.5 / 9.5, 26, 31.5 + 9.5 * 4.5 / 9.5, 41])
    assert np.isnan(times[4])
