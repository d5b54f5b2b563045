"""Where the time of a run goes: `timing.jsonl`, one object per epoch, kept apart from what the seed determines."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxnets.errors import writing
from jaxnets.plain_files import parse_json, read_text

FILE = "timing.jsonl"
MAX_BYTES = 1 << 26
MAX_STEP = 1 << 62  # a number of steps beyond this is damage
REST = "set-up and rest"
TRAINING = ("train", "wait for data")  # phases while the steps of an epoch are taken
AFTERWARDS = ("evaluate", "checkpoint")  # and after its last step; all others come before its first


@dataclasses.dataclass(frozen=True)
class Span:
    """Seconds spent in each phase from one step of a run to another."""

    first: int  # the step that it starts from
    last: int
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def training(self) -> float:
        return self._of(TRAINING)

    @property
    def afterwards(self) -> float:
        return self._of(AFTERWARDS)

    def _of(self, phases: Sequence[str]) -> float:
        return sum(self.seconds.get(name, 0.0) for name in phases)


class Clock:
    """The seconds of a process by phase: every moment belongs to the innermost open phase."""

    def __init__(self, workdir: Path):
        self.step = 0  # the seconds since the last `write` count from this step
        self._path = workdir / FILE
        self._phase = REST
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards `name`, and not towards the enclosing phase."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def write(self, step: int) -> None:
        """Append the time since the last call, up to `step`."""
        self._switch(self._phase)
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        with writing(self._path), self._path.open("a") as file:
            # Ends a line that a kill has torn, so that it spoils no other.
            line = json.dumps({"first": self.step, "last": step, "seconds": seconds})
            file.write(f"\n{line}" if file.tell() else line)
        self.step, self._seconds = step, {}

    def _switch(self, name: str) -> str:
        now, outer = time.perf_counter(), self._phase
        self._seconds[outer] = self._seconds.get(outer, 0.0) + now - self._since
        self._phase, self._since = name, now
        return outer


def read(workdir: Path) -> list[Span]:
    """The spans of a workdir in order, without those that were redone from an earlier checkpoint."""
    try:
        lines = read_text(workdir / FILE, MAX_BYTES).splitlines()
    except FileNotFoundError:
        return []
    spans: list[Span] = []
    for line in lines:
        try:
            record = parse_json(line)
            seconds = {str(name): float(value) for name, value in record["seconds"].items()}
            span = Span(int(record["first"]), int(record["last"]), seconds)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            continue
        if not (0 <= span.first <= span.last < MAX_STEP and all(0 <= s < math.inf for s in seconds.values())):
            continue
        while spans and spans[-1].last > span.first:
            spans.pop()
        spans.append(span)
    return spans


def totals(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by phase, the longest first."""
    sums: dict[str, float] = {}
    for span in spans:
        for name, seconds in span.seconds.items():
            sums[name] = sums.get(name, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def elapsed(spans: Sequence[Span], steps: Sequence[int]) -> np.ndarray:
    """Seconds of work after which each step was taken, without pauses between starts; NaN beyond the spans.

    Within a span, steps are assumed to be equally long.
    """
    at, when, now = [], [], 0.0
    for span in spans:
        end = now + span.total - span.afterwards
        if span.last > span.first:
            at += [span.first + 0.5, span.last]  # not at `first`, where the previous span ends
            when += [end - span.training, end]
        now += span.total
    if not at:
        return np.full(len(steps), np.nan)
    return np.interp(steps, at, when, right=np.nan)
