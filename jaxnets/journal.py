"""The numbers of a run: `metrics.jsonl`, one object per line, and TensorBoard events."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from jaxnets import distributed
from jaxnets.errors import UserError, writing
from jaxnets.plain_files import parse_json, read_text, replacing, set_aside
from jaxnets.runtime import logger

FILE = "metrics.jsonl"
MAX_BYTES = 1 << 27  # half a million records


def _import_tensorboard_x():
    """tensorboardX without PyTorch, which it would import if installed, and which takes two seconds."""
    unwanted = "torch" not in sys.modules
    if unwanted:
        sys.modules["torch"] = None  # Python's way to say: not installed
    try:
        import tensorboardX.event_file_writer
        import tensorboardX.proto.event_pb2
        import tensorboardX.summary
    finally:
        if unwanted:
            del sys.modules["torch"]
    return tensorboardX


class Events:
    """TensorBoard's event file of one start of a run.

    Not tensorboardX's SummaryWriter: its thread ends on a full disk, and when the clock is set back by 25 days or
    more, and the next write then waits for it forever.
    """

    def __init__(self, folder: Path, step: int):
        """Begin a file that invalidates what earlier ones hold of steps after `step`."""
        tensorboard_x = _import_tensorboard_x()
        self._proto, self._scalar = tensorboard_x.proto.event_pb2, tensorboard_x.summary.scalar
        folder.mkdir(exist_ok=True)
        # Named by process too: else a start within the same second would empty the previous one's file.
        self._file = tensorboard_x.event_file_writer.EventsWriter(str(folder / "events"), f".{os.getpid()}")
        # TensorBoard also drops what is at the step of a start itself.
        self._add(step + 1 if step else 0, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append numbers by name; on disk when this returns."""
        for name, value in values.items():
            self._add(step, summary=self._scalar(name, value))
        self._file.flush()

    def _add(self, step: int, **content) -> None:
        self._file.write_event(self._proto.Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        self._file.close()


def read(workdir: Path) -> list[dict[str, Any]]:
    """The records of a workdir in order; a last line that a kill has cut off is left out.

    Raises UserError for any other line that is not a record.
    """
    try:
        lines = read_text(workdir / FILE, MAX_BYTES).splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse_json(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{workdir / FILE}: line {number} is not a record; repair or delete it") from None
    return records


def read_strictly(workdir: Path) -> list[dict[str, Any]]:
    """As `read`, but UserError unless all records have a step and an epoch."""
    records = read(workdir)
    if not all(
        isinstance(r, dict) and all(isinstance(r.get(name), int) for name in ("step", "epoch")) for r in records
    ):
        raise UserError(f"{workdir / FILE} has lines that are not records of a run")
    return records


def is_evaluation(record: dict[str, Any]) -> bool:
    """Whether a record is of an evaluation; the others are of training."""
    return "eval_loss" in record


def with_steps(trained: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """Each train record of a run, in order, and the number of steps that it is the mean of: those since the last."""
    before = 0
    for record in trained:
        yield record, max(record["step"] - before, 0)
        before = record["step"]


def epoch_means(trained: Sequence[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Loss and accuracy of each epoch: the means of all train records of a run, in order, weighted by their steps."""
    sums: dict[int, list[float]] = {}
    for record, steps in with_steps(trained):
        of_epoch = sums.setdefault(record["epoch"], [0, 0.0, 0.0])
        for at, value in enumerate((1, record["loss"], record["accuracy"])):
            of_epoch[at] += steps * value
    return {
        epoch: {"loss": loss / steps, "accuracy": accuracy / steps}
        for epoch, (steps, loss, accuracy) in sums.items()
        if steps
    }


def _start_over(path: Path, records: list[dict[str, Any]]) -> None:
    """Log what becomes of records without checkpoints; set them aside if evaluated: they may be all that is left."""
    if not any(map(is_evaluation, records)):
        logger.warning(
            "%s has no checkpoint yet: it starts over, and its %d records are made again", path.parent, len(records)
        )
        return
    (kept,) = set_aside([path])
    logger.warning("%s no longer has a checkpoint: it starts over; its records are now in %s", path.parent, kept.name)


class Journal:
    """Appends records to `metrics.jsonl` and to TensorBoard; resumes from a given step.

    With several processes, each knows the records, and process 0 writes them.
    """

    def __init__(self, workdir: Path, step: int, evaluated: bool):
        """Drop the records after `step`, the step of the restored checkpoint (0: a new run).

        `evaluated` tells whether the checkpoint holds its evaluation; if not, the evaluation's record is dropped as
        well, since it will be made again.
        """
        records = read_strictly(workdir)
        self.records = [
            record
            for record in records
            if record["step"] < step or record["step"] == step and (evaluated or not is_evaluation(record))
        ]
        self._workdir = workdir
        self._file = self._events = None
        if not distributed.is_primary():
            return
        path = workdir / FILE
        with writing(workdir):
            if records and not step:
                _start_over(path, records)
            with replacing(path) as scratch:
                scratch.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            self._file = path.open("a")
            self._events = Events(workdir / "tensorboard", step)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, with at least `step` and `epoch`; on disk when this returns."""
        self.records.append(record)
        if self._file is None:
            return
        with writing(self._workdir):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            part = "eval" if is_evaluation(record) else "train"
            numbers = {
                f"{part}/{name}": value
                for name, value in record.items()
                if name not in ("step", "epoch") and isinstance(value, int | float)
            }
            self._events.write(record["step"], numbers)

    def last_evaluation(self, step: int) -> dict[str, Any] | None:
        """The evaluation recorded at `step`, if there is one."""
        found = [record for record in self.records if record["step"] == step and is_evaluation(record)]
        return found[-1] if found else None

    def close(self) -> None:
        if self._file is not None:
            with writing(self._workdir), closing(self._file):
                self._events.close()
