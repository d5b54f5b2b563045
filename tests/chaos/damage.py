"""Damage the newest checkpoint of a run at random, go on with the run, and compare it with one that nothing disturbed.

    python -m tests.chaos.damage --count=100 [--seed=0]

Each file of the checkpoint is damaged in every way first, then files at random. The last line of standard output is
one JSON object; with findings, the status is 1.
"""

import random
import shutil
import tempfile
from pathlib import Path

from jaxnets import epochs, loop
from tests.chaos import campaign, runs
from tests.tiny_net import registered

NEWEST = 15  # steps, of the run in `make_runs`
BEFORE = 10


class Stop(Exception):
    """What ends a run in its last epoch, as if it were killed."""


def make_runs(folder: Path, data_dir: Path) -> tuple[Path, Path]:
    """A finished run of four epochs, and the same one with three checkpoints, killed in its last epoch."""
    config = runs.make_config(data_dir, num_epochs=4)
    loop.train(config, folder / "reference")
    finish = epochs.finish_epoch

    def stop_at_the_end(run, current, at):
        if at > NEWEST:
            raise Stop
        finish(run, current, at)

    epochs.finish_epoch = stop_at_the_end
    try:
        loop.train(config, folder / "killed")
    except Stop:
        return folder / "reference", folder / "killed"
    finally:
        epochs.finish_epoch = finish
    raise AssertionError("the run was to end early")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(max(path.stat().st_size, 1))])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero(path: Path, rng: random.Random) -> None:
    """The end of the file as zeros: written, but not on disk when the power went."""
    content = path.read_bytes()
    kept = rng.randrange(max(len(content), 1))
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


WAYS = {"remove": remove, "truncate": truncate, "flip": flip, "zero": zero}


def files(workdir: Path, step: int = NEWEST) -> list[Path]:
    """The files of a checkpoint, as paths in the workdir."""
    folder = workdir / "checkpoints" / str(step)
    return sorted(path.relative_to(workdir) for path in folder.rglob("*") if path.is_file())


def outcome_of(workdir: Path, reference: Path, data_dir: Path) -> str:
    """Go on with a damaged run: "kept", "went back" or what was wrong."""
    outcome = runs.attempt(runs.make_config(data_dir, num_epochs=4), workdir)
    if outcome.error:
        return f"refused: {outcome.error}"
    said = any("damaged" in line and "moved to" in line for line in outcome.log)
    went_back = any(f"at step {BEFORE} of" in line for line in outcome.log)
    if not went_back and not any(f"at step {NEWEST} of" in line for line in outcome.log):
        return "started over"
    if went_back and not said:
        return "went back without a word"
    wrong = runs.differences(workdir, reference)
    return f"differs in {', '.join(wrong)}" if wrong else "went back" if went_back else "kept"


def main() -> None:
    """Run the campaign."""
    args = campaign.arguments(__doc__, count=100)
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="jaxnets-damage-"))
    tally = campaign.Tally()
    with registered():
        reference, killed = make_runs(folder, folder / "data")
        number = len(files(killed))
        cases = [(file, way) for file in files(killed) for way in WAYS]
        rng.shuffle(cases)
        cases += [(rng.choice(files(killed)), rng.choice(list(WAYS))) for _ in range(args.count - len(cases))]
        for file, way in cases[: args.count]:
            workdir = folder / "damaged"
            shutil.copytree(killed, workdir)
            WAYS[way](workdir / file, rng)
            outcome = outcome_of(workdir, reference, folder / "data")
            if outcome in ("kept", "went back"):
                tally.add(way, outcome)
            else:
                tally.add_finding(way, f"{way} {file}: {outcome}")
            shutil.rmtree(workdir)
    shutil.rmtree(folder)
    tally.end(args, files=number)


if __name__ == "__main__":
    main()
