"""SIGINT and SIGTERM in every phase of a run, then the same command, compared with a run that nobody disturbed.

    python -m tests.chaos.signals

The process must end with one line that says so, the status the shell expects and no stack trace, and must have saved
what there was to save. It is made to stay in each phase: for ever in compilation, where Python does nothing with a
signal, for five seconds elsewhere. The last line of standard output is one JSON object; with findings, the status is 1.
"""

import dataclasses
import http.server
import json
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxnets import runtime
from tests.chaos import runs
from tests.chaos.watched import Watched

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Phase -> how often it has been told when the signal comes.
PHASES = {"start": 1, "download": 0, "decode": 1, "compile": 1, "train": 3, "evaluation": 2, "save": 2}
STAYS = ("start", "decode", "compile", "evaluation", "save")
SAVED = ("train", "evaluation", "save")  # where there is something to save
FLAGS = ("--config.num_epochs=6",)


@dataclasses.dataclass(frozen=True)
class End:
    """How a run ended after a signal."""

    seconds: float  # from the signal on
    saved: int  # the newest checkpoint's step, 0 without
    faults: list[str]


@contextmanager
def slow_server() -> Iterator[tuple[str, threading.Event]]:
    """An archive on loopback that never ends, and whether somebody is downloading it."""
    asked, over = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.end_headers()
            try:
                while not over.wait(0.05):
                    self.wfile.write(bytes(1 << 19))
                    asked.set()
            except OSError:
                pass

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz", asked
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def interrupt(phase: str, signum: signal.Signals, workdir: Path, data_dir: Path) -> End:
    """Start the run, send it a signal in a phase, and look at how it ends and what it leaves."""
    if phase == "download":
        with slow_server() as (url, asked):
            flags = (*FLAGS, "--config.dataset=cifar10", "--config.image_size=32")
            with Watched(workdir, data_dir, *flags, archive=url) as start:
                while not asked.wait(0.1) and start.process.poll() is None:
                    pass
                return end_of(start, phase, signum, workdir, data_dir)
    with Watched(workdir, data_dir, *FLAGS, stay=phase if phase in STAYS else "") as start:
        if start.wait_for(phase, PHASES[phase]) and phase in STAYS:
            time.sleep(0.5)  # it is on its way
        return end_of(start, phase, signum, workdir, data_dir)


def end_of(start: Watched, phase: str, signum: signal.Signals, workdir: Path, data_dir: Path) -> End:
    start.process.send_signal(signum)
    began = time.monotonic()
    status = start.end()
    seconds = time.monotonic() - began
    return End(seconds, runs.newest(workdir), list(faults(start, status, phase, signum, workdir, data_dir)))


def faults(
    start: Watched, status: int, phase: str, signum: signal.Signals, workdir: Path, data_dir: Path
) -> Iterator[str]:
    """What must not be after a signal in a phase."""
    if status != 128 + signum:
        yield f"status {status}"
    if "Traceback" in start.err or "Exception" in start.err or start.out:
        yield start.err + start.out
    lines = [line for line in start.err.splitlines() if f" {signum.name}: " in line]
    if len(lines) != 1:
        yield f"{len(lines)} lines: {start.err}"
    if phase in SAVED:
        said = re.search(r"saved step (\d+); the same command resumes", start.err)
        last = runs.last_step(workdir)
        if not said or not last or not int(said[1]) == last == max(runs.saved(workdir)):
            yield f"step {last} is not saved: {start.err}"
    elif runs.newest(workdir):
        yield "a checkpoint where there was nothing to save"
    if left := [str(path) for pattern in ("*.part", "*incomplete*") for path in data_dir.rglob(pattern)]:
        yield f"left behind: {left}"


def campaign(folder: Path) -> tuple[dict[str, float], list[str]]:
    """Every signal in every phase, and on to the end: seconds by case, and what was wrong."""
    seconds, findings = {}, []
    data_dir, reference = folder / "data", folder / "undisturbed"
    with Watched(reference, data_dir, *FLAGS) as start:
        if start.end():
            raise RuntimeError(start.err)
        result = start.out
    for phase in PHASES:
        for signum in SIGNALS:
            case = f"{signum.name} in {phase}"
            workdir = folder / f"{phase}-{signum.name}"
            ended = interrupt(phase, signum, workdir, data_dir)
            seconds[case], wrong = round(ended.seconds, 1), ended.faults
            if phase == "download":  # and no such archive to go on with
                shutil.rmtree(workdir, ignore_errors=True)
            with Watched(workdir, data_dir, *FLAGS) as start:
                if start.end() or start.out != result:
                    wrong.append(f"went on to {start.out} {start.err}")
                else:
                    wrong += runs.differences(workdir, reference)
            findings += [f"{case}: {what}" for what in wrong]
            print(f"{case}: ended after {seconds[case]} s, saved step {ended.saved}", file=sys.stderr, flush=True)
    return seconds, findings


def main() -> None:
    runtime.configure_logging()
    with tempfile.TemporaryDirectory(prefix="jaxnets-signals-") as folder:
        seconds, findings = campaign(Path(folder))
    print(json.dumps({"seconds": seconds, "findings": findings}))
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
