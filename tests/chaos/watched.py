"""One start of the tiny run as its own process, and where it is: what `victim` tells."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.chaos.runs import REPOSITORY

# So long a start may be silent: far longer than one needs, since a busy machine may stop for minutes.
SILENT_SECONDS = 1200


class Watched:
    """A start that tells its phases; ended with the `with` block."""

    def __init__(self, workdir: Path, data_dir: Path, *flags: str, stay: str = "", archive: str = ""):
        reader, writer = os.pipe()
        flags_of_xla = (flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
        environment = os.environ | {
            "XLA_FLAGS": " ".join(flags_of_xla),
            "TFDS_DATA_DIR": str(data_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "CHAOS_TELL": str(writer),
            "CHAOS_STAY": stay,
            "CHAOS_ARCHIVE": archive,
        }
        arguments = ["--config=tests/tiny_run.py", f"--workdir={workdir}", *flags]
        self.phases: list[tuple[str, float]] = [("interpreter", time.monotonic())]  # told, and when
        self._outputs = [(workdir.parent / f"{workdir.name}.{name}") for name in ("out", "err")]
        with contextlib.ExitStack() as files:
            out, err = (files.enter_context(path.open("w")) for path in self._outputs)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.victim", *arguments],
                cwd=REPOSITORY,
                env=environment,
                stdout=out,
                stderr=err,
                pass_fds=[writer],
            )
        os.close(writer)
        self._told = os.fdopen(reader)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.end()
        self._told.close()

    def wait_for(self, phase: str, count: int = 1) -> bool:
        """Whether the start comes to a phase for the `count`-th time before it ends."""
        while count and (line := self._told.readline()):
            self.phases.append((line.strip(), time.monotonic()))
            count -= line.strip() == phase
        return not count

    def end(self) -> int:
        """The status with which it ends, when it has."""
        self.wait_for("")
        return self.process.wait(SILENT_SECONDS)

    @property
    def out(self) -> str:
        return self._outputs[0].read_text()

    @property
    def err(self) -> str:
        return self._outputs[1].read_text()
