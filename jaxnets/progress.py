"""The progress bar of a training run; on a terminal only."""

import contextlib
import sys

import rich.progress
from rich.console import Console

from jaxnets import distributed


class Progress:
    """Epoch, loss, accuracy, images/s and time left on standard error; nothing where that is not a terminal."""

    def __init__(self, at: int, total_steps: int, steps_per_epoch: int):
        self.shown = sys.stderr.isatty() and distributed.is_primary()
        self._steps_per_epoch = steps_per_epoch
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("epoch {task.fields[epoch]}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[metrics]}"),
            rich.progress.TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            disable=not self.shown,
            speed_estimate_period=1800,  # seconds; the default is the last 30, in which perhaps no call ends
        )
        # `completed` steps of an earlier start do not count towards the speed from which the time left follows.
        self._task = self._bar.add_task("", total=total_steps, completed=at, epoch="", metrics="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # from a terminal that closed
            self._bar.stop()

    def advance(self, at: int, totals: dict[str, float], images_per_second: float) -> None:
        """Show step `at` with the means of `totals`."""
        count = totals["count"]
        self._bar.update(
            self._task,
            completed=at,
            epoch=-(-at // self._steps_per_epoch),
            metrics=f"loss {totals['loss'] / count:.4f}  accuracy {totals['correct'] / count:.2%}  "
            f"{images_per_second:.0f} images/s",
        )
