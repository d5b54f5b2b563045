"""The tiny run, telling where it is (`telling`): `python -m tests.chaos.victim --config=tests/tiny_run.py FLAGS`.

CHAOS_ARCHIVE is where it finds CIFAR-10, CHAOS_GRACE how many seconds it has to close what is open.
"""

from jaxnets import interruption
from tests.chaos import telling

if __name__ == "__main__":
    interruption.end_at_once()
    telling.tell("start")

import contextlib
import dataclasses
import os

from jaxnets import checkpoint, data, evaluator, loop, timing
from jaxnets.datasets import cifar, locate
from tests import tiny_run


class TellingClock(timing.Clock):
    """The clock of the run, which knows its phases."""

    @contextlib.contextmanager
    def phase(self, name):
        told = name != "wait for data"  # which is a part of training
        with super().phase(name):
            if told:
                telling.tell(name)
            yield
        if told:
            telling.tell(f"after {name}")


def told(module, name: str, before: str | None = None, after: str | None = None) -> None:
    """Have a function tell a phase as it begins, or as it ends."""
    original = getattr(module, name)

    def call(*args, **kwargs):
        if before:
            telling.tell(before)
        result = original(*args, **kwargs)
        if after:
            telling.tell(after)
        return result

    setattr(module, name, call)


if __name__ == "__main__":
    loop.Clock = TellingClock
    told(locate, "_prepare", before="prepare", after="after prepare")
    told(data, "_fill", before="decode")
    told(loop, "compile_train", before="compile")
    told(evaluator, "_add", before="evaluation")
    told(checkpoint, "save", after="save")  # its files are written from then on
    interruption.GRACE_SECONDS = float(os.environ.get("CHAOS_GRACE", interruption.GRACE_SECONDS))
    if url := os.environ["CHAOS_ARCHIVE"]:
        cifar.Cifar10.ARCHIVE = dataclasses.replace(cifar.Cifar10.ARCHIVE, url=url)
    tiny_run.main()
