"""Run out of room at random moments, go on with room, and compare with a run that nothing disturbed.

    python -m tests.chaos.storage --count=60 [--seed=0]

Half of the runs have a small disk of their own (a tmpfs, which only root may mount), filled but for a random rest; the
others may write no file beyond a random size. The last line of standard output is one JSON object; with findings, the
status is 1.
"""

import contextlib
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.chaos import campaign, runs
from tests.tiny_net import registered

DISK = 8 << 20  # bytes, ten times what the tiny run leaves
PAGE = 4096


@contextlib.contextmanager
def small_disk(place: Path, size: int = DISK) -> Iterator[Path]:
    """A file system of `size` bytes on `place`; OSError where this user may mount none."""
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        raise OSError(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def can_mount(place: Path) -> bool:
    """Whether this user may mount a small disk."""
    try:
        with small_disk(place):
            return True
    except OSError:
        return False


def fill(disk: Path, room: int) -> Path:
    """A file that leaves `room` bytes on a disk."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(shutil.disk_usage(disk).free - room, 0) // PAGE * PAGE))
    return ballast


def fault_of(ended: subprocess.CompletedProcess, workdir: Path) -> str | None:
    """What is wrong with how a run without room ended: nothing, where it said so in one sentence or needed none."""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    if "Traceback" in ended.stderr:
        return f"a stack trace: {ended.stderr[-3000:]}"
    if ended.returncode not in (0, 1) or len(errors) != ended.returncode:
        return f"status {ended.returncode}: {ended.stderr[-3000:]}"
    if errors and not re.search(r"cannot be written: (No space left on device|File too large);", errors[0]):
        return f"no reason: {errors[0]}"
    if (workdir / "checkpoints").is_dir():
        runs.saved(workdir)  # raises for one that is not whole
    return None


def attempt(workdir: Path, data_dir: Path, reference: Path, file_size: int | None, ballast: Path | None) -> str:
    """A run without room, then one with it: "unharmed", "failed at step N and went on", or what was wrong."""
    ended = runs.command(workdir, data_dir, file_size=file_size)
    fault = fault_of(ended, workdir)
    if ballast:
        ballast.unlink()
    if fault:
        return fault
    at = runs.last_step(workdir) if workdir.exists() else 0
    again = runs.attempt(runs.make_config(data_dir), workdir)
    if again.error:
        return f"does not go on: {again.error}"
    wrong = runs.differences(workdir, reference)
    if wrong:
        return f"differs in {', '.join(wrong)}"
    return f"failed at step {at} and went on" if ended.returncode else "unharmed"


def main() -> None:
    """Run the campaign."""
    args = campaign.arguments(__doc__, count=60)
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="jaxnets-storage-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    data_dir, reference = folder / "data", folder / "reference"
    runs.command(reference, data_dir).check_returncode()
    used = sum(-(-path.stat().st_size // PAGE) * PAGE for path in reference.rglob("*") if path.is_file())
    largest = max(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    disks = can_mount(folder / "disk")
    tally = campaign.Tally()
    for number in range(args.count):
        with registered():
            if disks and number % 2:
                with small_disk(folder / "disk") as disk:
                    room = rng.randrange(2 * PAGE, used)
                    outcome = attempt(disk / "run", data_dir, reference, None, fill(disk, room))
                kind = "full disk"
            else:
                room = int(largest ** rng.uniform(0.4, 1.05))
                outcome = attempt(folder / "run", data_dir, reference, room, None)
                shutil.rmtree(folder / "run", ignore_errors=True)
                kind = "limited files"
        if outcome == "unharmed" or outcome.startswith("failed at step"):
            tally.add(kind, outcome)
        else:
            tally.add_finding(kind, f"{kind}, {room} bytes: {outcome}")
    shutil.rmtree(folder)
    tally.end(args, disks=disks)


if __name__ == "__main__":
    main()
