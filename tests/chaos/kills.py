"""SIGKILL at random moments of the tiny run, each followed by the same command; compared with a run nobody disturbed.

    python -m tests.chaos.kills --kills=50 [--seed=0]

A moment is a phase, in turn and in random order, one of its occurrences, and a random part of the time it has taken on
average so far. When a run has come to its end a new one begins, in a new workdir. After every kill each checkpoint
must be whole, and `metrics.jsonl` the beginning of the undisturbed run's; in the end all must be equal, bit for bit.
A run that is killed after an evaluation but before its first checkpoint is whole starts over and sets the records of
that evaluation aside; they too must be the beginning of the undisturbed run's.
The last line of standard output is one JSON object; with findings, the status is 1.
"""

import argparse
import dataclasses
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from jaxnets import runtime
from jaxnets.checkpoint_damage import DamagedError
from jaxnets.journal import FILE
from tests.chaos import runs
from tests.chaos.watched import Watched

PHASES = ("start", "prepare", "read data", "compile", "train", "evaluate", "save")
ASIDE = "metrics.[0-9]*.jsonl"
REPEATED = ("train", "evaluate", "save")  # once an epoch
FLAGS = ("--config.ema_decay=0.9", "--config.keep_checkpoints=2")


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: in which phase, at which of its occurrences, and after which part of the time it takes."""

    phase: str
    occurrence: int
    part: float


@dataclasses.dataclass
class Kill:
    """What a kill hit and cost."""

    planned: str
    phase: str  # in which it really fell
    writing: bool  # whether a checkpoint was being written
    deleting: bool  # or an old one deleted
    at: int  # the last step on record
    saved: int  # the step from which the next start goes on
    lost: int  # steps that this start took and the next will take again


def plan(kills: int, seed: int) -> list[Moment]:
    """So many moments, every phase equally often."""
    rng = random.Random(seed)
    phases = [phase for _ in range(-(-kills // len(PHASES))) for phase in rng.sample(PHASES, len(PHASES))]
    return [Moment(phase, rng.randint(1, 3) if phase in REPEATED else 1, rng.random()) for phase in phases[:kills]]


def durations(starts: list[list[tuple[str, float]]]) -> dict[str, float]:
    """Seconds that each phase took on average; saving, which goes on behind other phases, until the next save."""
    seconds: dict[str, list[float]] = {}
    for told in starts:
        saves = [moment for moment in told if moment[0] == "save"]
        others = [moment for moment in told if moment[0] != "save"]
        for (phase, began), (_, ended) in [*itertools.pairwise(others), *itertools.pairwise(saves)]:
            seconds.setdefault(phase, []).append(ended - began)
    return {phase: statistics.fmean(values) for phase, values in seconds.items()}


def kill(start: Watched, moment: Moment, seconds: dict[str, float]) -> bool:
    """Kill a start at a moment; False where it has ended without coming to it."""
    if not start.wait_for(moment.phase, moment.occurrence):
        return False
    time.sleep(moment.part * seconds[moment.phase])
    if start.process.poll() is not None:
        return False
    start.process.kill()
    start.end()
    return True


def faults(workdir: Path, expected: list[dict]) -> list[str]:
    """What a kill has left that must not be: a checkpoint that is not whole, a record lost, doubled or torn."""
    found = []
    for aside in workdir.glob(ASIDE):
        kept = runs.records_of(aside)
        if kept != expected[: len(kept)] or not any("eval_loss" in record for record in kept):
            found.append(f"{aside.name} has records of steps {[record['step'] for record in kept]}")
    file = workdir / FILE
    if file.exists():
        lines = file.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            found.append("a torn line")
        if (records := runs.records(workdir)) != expected[: len(lines)]:
            found.append(f"records of steps {[record['step'] for record in records]}")
    try:
        saved = runs.saved(workdir) if (workdir / "checkpoints").is_dir() else {}
    except DamagedError as error:
        return [*found, str(error)]
    if max(saved, default=0) > runs.last_step(workdir):
        found.append(f"no record of step {max(saved)}, which is saved")
    return found


def entries(workdir: Path) -> set[str]:
    """What lies among the checkpoints, whole ones and others."""
    checkpoints = workdir / "checkpoints"
    return {path.name for path in checkpoints.iterdir()} if checkpoints.is_dir() else set()


def what_it_hit(start: Watched, planned: str, workdir: Path, before: set[str]) -> Kill:
    """`before` are the entries of the start's beginning: a kill before this one may have left them."""
    now = entries(workdir)
    writing = any("tmp" in name for name in now - before)
    saved = runs.newest(workdir)
    at = runs.last_step(workdir)
    lost = at - saved if any(phase == "train" for phase, _ in start.phases) else 0
    return Kill(planned, start.phases[-1][0], writing, "deleted" in now - before, at, saved, lost)


def campaign(kills: int, seed: int, folder: Path, epochs: int) -> tuple[list[Kill], list[str], int]:
    """Kill, go on, compare: what the kills hit, what was wrong, and how many runs came to their end."""
    flags = (*FLAGS, f"--config.num_epochs={epochs}")
    reference = folder / "undisturbed"
    with Watched(reference, folder / "data", *flags) as start:
        if start.end():
            raise RuntimeError(start.err)
        starts, result = [start.phases], start.out
    expected, names = runs.records(reference), listing(reference)
    moments, hits, findings, finished = plan(kills, seed), [], [], 0
    workdir, unfinished = folder / "run0", False
    while moments or unfinished:
        data_dir = folder / "data"
        if moments and moments[0].phase == "prepare":
            shutil.rmtree(data_dir, ignore_errors=True)
        before = entries(workdir)
        with Watched(workdir, data_dir, *flags) as start:
            starts.append(start.phases)
            if moments and kill(start, moments[0], durations(starts)):
                hits.append(what_it_hit(start, moments.pop(0).phase, workdir, before))
                unfinished = True
                findings += [f"kill {len(hits)} ({hits[-1]}): {fault}" for fault in faults(workdir, expected)]
                print(f"{len(hits)} of {kills}: {hits[-1]}", file=sys.stderr, flush=True)
                continue
            status = start.end()
            wrong = [f"status {status}: {start.err[-2000:]}"] if status or start.out != result else []
            wrong += ["a stack trace"] if "Traceback" in start.err else []
            wrong += runs.differences(workdir, reference)
            wrong += [] if listing(workdir) == names else [f"left behind: {set(listing(workdir)) ^ set(names)}"]
            finished, unfinished = finished + 1, False
            findings += [f"run {finished}: {what}" for what in wrong]
            workdir = folder / f"run{finished}"
    return hits, findings, finished


def listing(workdir: Path) -> list[str]:
    """The files and folders of a run, two levels deep, but those of TensorBoard and records that were set aside."""
    paths = [*set(workdir.iterdir()).difference(workdir.glob(ASIDE)), *(workdir / "checkpoints").iterdir()]
    return sorted(str(path.relative_to(workdir)) for path in paths)


def summary(hits: list[Kill], findings: list[str], finished: int) -> dict:
    """The campaign's figures, for JSON."""
    return {
        "kills": len(hits),
        "phases": dict(Counter(hit.phase for hit in hits)),
        "while a checkpoint was written": sum(hit.writing for hit in hits),
        "while one was deleted": sum(hit.deleting for hit in hits),
        "steps lost": sum(hit.lost for hit in hits),
        "most steps lost": max(hit.lost for hit in hits),
        "runs compared": finished,
        "findings": findings,
    }


def print_table(hits: list[Kill]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("phase", "kills", "checkpoint in the making", "steps lost", title="SIGKILL")
    for phase in dict.fromkeys(hit.phase for hit in hits):
        those = [hit for hit in hits if hit.phase == phase]
        lost = [hit.lost for hit in those]
        table.add_row(
            phase, str(len(those)), str(sum(hit.writing for hit in those)), f"{sum(lost)}, at most {max(lost)}"
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6, help="of the run that is killed")
    args = parser.parse_args()
    runtime.configure_logging()
    with tempfile.TemporaryDirectory(prefix="jaxnets-kills-") as folder:
        hits, findings, finished = campaign(args.kills, args.seed, Path(folder), args.epochs)
    print_table(hits)
    print(json.dumps(summary(hits, findings, finished)))
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
