"""Tiny runs to break: started in this process or by the command, and compared bit for bit."""

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxnets import checkpoint, journal, loop, runtime
from jaxnets.errors import UserError
from jaxnets.restore import restore_item
from tests import tiny_net

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_FILES = (
    "import os, resource, sys; size = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


def make_config(data_dir: Path, **fields: Any) -> ml_collections.ConfigDict:
    """Two epochs of five steps of the tiny net, each step a call and a record; `fields` with __ for dots."""
    return tiny_net.make_config(data_dir, **{"steps_per_call": 1, "log_every_steps": 1} | fields)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run in this process ended."""

    error: str | None  # the sentence of a UserError
    log: list[str]
    result: dict[str, Any] | None


def attempt(config: ml_collections.ConfigDict, workdir: Path) -> Outcome:
    """Train, or go on, in this process; what is no UserError is raised."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler = Lines()
    runtime.logger.addHandler(handler)
    try:
        return Outcome(None, lines, loop.train(config, workdir))
    except UserError as error:
        return Outcome(str(error), lines, None)
    finally:
        runtime.logger.removeHandler(handler)


def command(workdir: Path, data_dir: Path, *flags: str, file_size: int | None = None) -> subprocess.CompletedProcess:
    """The same run by the command, to its end; no file may grow beyond `file_size` bytes."""
    limited = [] if file_size is None else ["-c", LIMIT_FILES, str(file_size)]
    arguments = ["--config=tests/tiny_run.py", f"--workdir={workdir}", *flags]
    return subprocess.run(
        [sys.executable, *limited, "-m", "tests.tiny_run", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"TFDS_DATA_DIR": str(data_dir)},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def records(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run without what depends on the clock."""
    return [_without_rate(record) for record in journal.read(workdir)]


def records_of(file: Path) -> list[dict[str, Any]]:
    """Likewise, of a file of whole lines."""
    return [_without_rate(json.loads(line)) for line in file.read_text().splitlines()]


def _without_rate(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "images_per_second"}


def last_step(workdir: Path) -> int:
    """The last step on record, 0 where there is none."""
    return max((record["step"] for record in records(workdir)), default=0)


def newest(workdir: Path) -> int:
    """The step of the newest checkpoint, which need not be whole; 0 where there is none."""
    steps = (int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())
    return max(steps, default=0)


def saved(workdir: Path) -> dict[int, list[dict]]:
    """All checkpoints of a run, each verified as it is read."""
    with contextlib.closing(checkpoint.open_reader(workdir)) as manager:
        steps = list(manager.all_steps())
        return {step: [restore_item(manager, step, name) for name in ("variables", "rest")] for step in steps}


def differences(workdir: Path, reference: Path) -> list[str]:
    """What two finished runs do not have in common, bit for bit: nothing, if all is well."""
    found = []
    if records(workdir) != records(reference):
        found.append("records")
    ours, theirs = saved(workdir), saved(reference)
    last = max(theirs)
    if max(ours) != last:
        return [*found, f"last step {max(ours)} in place of {last}"]
    equal = jax.tree.map(np.array_equal, ours[last], theirs[last])
    if not all(jax.tree.leaves(equal)):
        found.append("state")
    return found
