"""The numbers of a run: `metrics.jsonl`, one object a line, and TensorBoard events."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxnets import distributed
from jaxnets.errors import UserError
from jaxnets.plain_files import parse_json, read_text

FILE = "metrics.jsonl"
MAX_BYTES = 1 << 27  # half a million records


def _import_tensorboard_x():
    """tensorboardX without PyTorch, which it imports where it finds it, and which takes two seconds."""
    unwanted = "torch" not in sys.modules
    if unwanted:
        sys.modules["torch"] = None  # Python's way to say: not installed
    try:
        import tensorboardX
    finally:
        if unwanted:
            del sys.modules["torch"]
    return tensorboardX


def read(workdir: Path) -> list[dict[str, Any]]:
    """The records of a workdir in order; a last line that a kill tore is left out."""
    try:
        lines = read_text(workdir / FILE, MAX_BYTES).splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(parse_json(line))
        except ValueError:
            break
    return records


class Journal:
    """Appends records to `metrics.jsonl` and to TensorBoard; goes on from a given step.

    Of several processes each knows the records, and process 0 writes them.
    """

    def __init__(self, workdir: Path, step: int, evaluated: bool):
        """Drop what stands after `step`, the step of the restored checkpoint (0: a new run).

        `evaluated` tells whether the checkpoint holds its evaluation; if not, that is dropped as well,
        since it will be made again.
        """
        records = read(workdir)
        if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
            raise UserError(f"{workdir / FILE} has lines that are no records of a run")
        self.records = [
            record
            for record in records
            if record["step"] < step or record["step"] == step and (evaluated or "eval_loss" not in record)
        ]
        self._file = self._tensorboard = None
        if not distributed.is_primary():
            return
        path = workdir / FILE
        scratch = path.with_suffix(".tmp")
        with scratch.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        self._file = path.open("a")
        self._tensorboard = _import_tensorboard_x().SummaryWriter(str(workdir / "tensorboard"), purge_step=step)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, with at least `step` and `epoch`; on disk when this returns."""
        self.records.append(record)
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in record.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                group = "eval" if "eval_" in name else "train"
                self._tensorboard.add_scalar(f"{group}/{name}", value, record["step"])
        self._tensorboard.flush()

    def last_evaluation(self, step: int) -> dict[str, Any] | None:
        """The evaluation recorded at `step`, if there is one."""
        found = [record for record in self.records if record["step"] == step and "eval_loss" in record]
        return found[-1] if found else None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()
