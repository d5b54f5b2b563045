"""The bar shows what is asked for on a terminal, and nothing anywhere else."""

import sys

from jaxnets.progress import Progress


def draw(monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    with Progress(at=4, total_steps=40, steps_per_epoch=10) as progress:
        progress.advance(14, {"loss": 6.0, "correct": 1, "count": 4}, 123.4)
    return progress


def test_a_terminal_sees_epoch_loss_accuracy_and_speed(monkeypatch, capsys):
    assert draw(monkeypatch, terminal=True).shown
    shown = capsys.readouterr()
    for part in ("epoch 2", "14/40", "loss 1.5000", "accuracy 25.00%", "123 images/s"):
        assert part in shown.err
    assert shown.out == ""


def test_a_pipe_sees_nothing(monkeypatch, capsys):
    assert not draw(monkeypatch, terminal=False).shown
    assert "epoch" not in capsys.readouterr().err
