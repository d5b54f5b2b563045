"""Asked to end in any phase, a run ends with one line, the shell's status, and what there was to save saved."""

import itertools

import pytest

from tests.chaos import signals


# One signal in each; `python -m tests.chaos.signals` sends both.
@pytest.mark.parametrize(("phase", "signum"), list(zip(signals.PHASES, itertools.cycle(signals.SIGNALS))))
def test_a_signal_in_a_phase(tmp_path, data_dir, phase, signum):
    assert signals.interrupt(phase, signum, tmp_path / "run", data_dir).faults == []
