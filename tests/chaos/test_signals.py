"""Asked to end in any phase, a run ends with one line, the shell's status, and what there was to save saved."""

import itertools

import pytest

from tests.chaos import signals
from tests.slow import mark_slow

# One signal in each; `python -m tests.chaos.signals` sends both.
PHASES = list(zip(signals.PHASES, itertools.cycle(signals.SIGNALS)))
SLOW = ("start", "download", "decode", "train", "evaluation", "save")


@pytest.mark.parametrize(("phase", "signum"), [mark_slow(pair) if pair[0] in SLOW else pair for pair in PHASES])
def test_a_signal_in_a_phase(tmp_path, data_dir, monkeypatch, phase, signum):
    if phase == "compile":  # where there is nothing to close
        monkeypatch.setenv("CHAOS_GRACE", "0.5")
    assert signals.interrupt(phase, signum, tmp_path / "run", data_dir).faults == []
