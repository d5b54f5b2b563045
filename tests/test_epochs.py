"""Epochs of a tiny run: interrupted, averaged, diverging, timed."""

import itertools
import math
import os
import signal
import threading
import types
from contextlib import closing
from functools import partial

import numpy as np
import pytest

from jaxnets import checkpoint, epochs, interruption, journal, loop, predictions, step, timing
from jaxnets.errors import UserError
from jaxnets.progress import Progress
from tests.chaos import runs
from tests.tiny_net import registered, small_digits


@pytest.fixture(scope="module")
def tiny(digits_dir, undrawn):
    """The configuration of two epochs of five steps, a call each."""
    with registered():
        yield partial(runs.make_config, digits_dir, steps_per_call=5)


@pytest.mark.parametrize(("place", "at", "saved"), [("add_call", 6, 7), ("evaluation", 2, 10)])
def test_an_interrupted_run_saves_where_it_is(tiny, tmp_path, monkeypatch, place, at, saved):
    """SIGTERM in the middle of the second epoch and of its evaluation; then on to the same end."""
    config = tiny(steps_per_call=1, log_every_steps=2)
    loop.train(config, tmp_path / "whole")
    calls = 0

    def signalled(original, when):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == when:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(epochs, place, signalled(getattr(epochs, place), at))
        loop.train(config, tmp_path / "run")
    assert ended.value.code == 128 + signal.SIGTERM
    assert runs.newest(tmp_path / "run") == saved  # the step in flight is finished too
    loop.train(config, tmp_path / "run")
    assert not runs.differences(tmp_path / "run", tmp_path / "whole")
    assert {span.last for span in timing.read(tmp_path / "run")} == {5, saved, 10}


def test_a_run_interrupted_before_its_first_step_says_so(tiny, tmp_path, monkeypatch, caplog):
    make = loop.make_evaluator

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return make(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(loop, "make_evaluator", signalled)
        loop.train(tiny(), tmp_path / "run")
    assert ended.value.code == 128 + signal.SIGINT and runs.newest(tmp_path / "run") == 0
    assert "ended before the first step" in caplog.text and "saved" not in caplog.messages[-1]


def test_the_averaged_weights_are_evaluated_too_and_their_predictions_kept(tiny, tmp_path):
    result = loop.train(tiny(ema_decay=0.9, num_epochs=1), tmp_path / "run")
    assert result["ema_eval_loss"] != result["eval_loss"]
    assert math.isfinite(result["ema_eval_loss"])
    # What is kept example by example is what the run is judged by: the averaged weights.
    made = predictions.load(tmp_path / "run")
    assert -np.log(made.label_probability).mean() == pytest.approx(result["ema_eval_loss"], rel=1e-5)


def test_reports_are_counted_within_each_epoch(tiny, tmp_path):
    """Of five steps, every second one and the last; counted through, the second epoch's would be others."""
    loop.train(tiny(steps_per_call=1, log_every_steps=2), tmp_path / "run")
    steps = [record["step"] for record in journal.read(tmp_path / "run") if "loss" in record]
    assert steps == [2, 4, 5, 7, 9, 10]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny, tmp_path, monkeypatch):
    loop.train(tiny(num_epochs=1, steps_per_call=1), tmp_path / "run")
    real = epochs.require_finite

    def poisoned(losses, at, manager):
        real(np.where(np.arange(len(losses)) + at == 6, np.nan, losses), at, manager)

    monkeypatch.setattr(epochs, "require_finite", poisoned)
    with pytest.raises(UserError, match=r"the loss became nan at step 7; the last good checkpoint is step 5"):
        loop.train(tiny(steps_per_call=1), tmp_path / "run")
    assert runs.newest(tmp_path / "run") == 5
    assert timing.read(tmp_path / "run")[-1].last == 6  # how far it came


def test_a_rate_that_explodes_is_noticed(tiny, tmp_path):
    with pytest.raises(UserError, match=r"loss became (nan|inf) (at|after) step \d+"):
        loop.train(tiny(optimizer__learning_rate=1e30, schedule__warmup_epochs=0.0), tmp_path / "run")


def test_the_speed_is_that_of_the_devices_to_the_last_call(tmp_path, monkeypatch):
    """Calls of one second, computed before the next is asked for, as a CPU may: the host asks a call too late."""
    seconds, read = 0, threading.Semaphore(1)

    def clock():
        if threading.current_thread() is not threading.main_thread():
            read.release()  # the call before has been read
        return seconds

    def compute(current, _):
        nonlocal seconds
        assert read.acquire(timeout=60)
        seconds += 1
        return current, step.TrainMetrics(np.ones(1, np.float32), np.ones(1, np.int32))

    monkeypatch.setattr(epochs.time, "perf_counter", clock)
    config = small_digits()
    config.log_every_steps = 1
    plan = types.SimpleNamespace(
        config=config, steps_per_epoch=5, training_size=lambda epoch: 16, learning_rates=np.ones(10)
    )
    with closing(journal.Journal(tmp_path, 0, False)) as written, Progress(0, 10, 5) as progress:
        run = epochs.Running(
            plan=plan,
            compiled={(16, 1): compute},
            calls=itertools.repeat({"index": np.zeros((1, 1, 8), np.int32)}),
            evaluator=None,
            manager=None,
            journal=written,
            clock=timing.Clock(tmp_path),
            page=None,
            progress=progress,
            interruption=interruption.Interruption(),
        )
        for at in (0, 5):
            assert epochs.train_epoch(run, None, at, dict(checkpoint.NO_TOTALS)) == (None, at + 5)
    assert [record["images_per_second"] for record in journal.read(tmp_path)] == [config.batch_size] * 10
