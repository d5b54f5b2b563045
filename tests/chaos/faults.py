"""Break a run from within at a random step, go on once it is mended, and compare with one that nothing disturbed.

    python -m tests.chaos.faults --count=60 [--seed=0]

In turns: a NaN in the weights, the running statistics or the optimizer's state; the file of a streamed data set
overwritten in part, cut off or gone; a clock that is set anew after every step. The last line of standard output is one
JSON object; with findings, the status is 1.
"""

import contextlib
import math
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from jaxnets import data, journal, loop, timing
from tests.chaos import campaign, runs
from tests.tiny_net import registered

STEPS = 10  # of the tiny run
PARTS = ("params", "batch_stats", "opt_state")
YEARS = 2 * 365 * 86400.0


@contextlib.contextmanager
def poisoned(part: str, at: int) -> Iterator[None]:
    """Step `at` leaves one NaN in the first array of a part of the state; the program of a step is what it was."""
    compile_train = loop.compile_train

    def poison(state):
        leaves, tree = jax.tree.flatten(getattr(state, part))
        place = next(i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating))
        leaves[place] = leaves[place].at[(0,) * leaves[place].ndim].set(jnp.nan)
        return state.replace(**{part: jax.tree.unflatten(tree, leaves)})

    def compile_poisoned(*args):
        compiled = compile_train(*args)

        def poisoned(state, batches):
            state, metrics = compiled(state, batches)
            return (poison(state) if int(state.step) == at else state), metrics

        return poisoned

    with mock.patch.object(loop, "compile_train", compile_poisoned):
        yield


@contextlib.contextmanager
def each_step(do: Callable[[int], None]) -> Iterator[None]:
    """`do` is called with the step as the record of a step is written."""
    original = journal.Journal.write

    def write(self, record):
        original(self, record)
        if "loss" in record:
            do(record["step"])

    with mock.patch.object(journal.Journal, "write", write):
        yield


def overwrite(shard: Path, rng: random.Random) -> None:
    """Every record spoiled, in place."""
    content = bytearray(shard.read_bytes())
    for place in range(rng.randrange(64), len(content), 64):
        content[place] ^= rng.randrange(1, 256)
    shard.write_bytes(content)


def cut_off(shard: Path, rng: random.Random) -> None:
    """Shorter, in place."""
    with shard.open("r+b") as file:
        file.truncate(rng.randrange(shard.stat().st_size))


def vanish(shard: Path, rng: random.Random) -> None:
    shard.unlink()


SHARD_WAYS = {"overwrite": overwrite, "cut off": cut_off, "vanish": vanish}


@contextlib.contextmanager
def jumping_clock(rng: random.Random) -> Iterator[None]:
    """After every step the time of day is set anew, by up to two years to either side."""
    real, ahead = time.time, 0.0

    def jump(_):
        nonlocal ahead
        ahead = rng.uniform(-YEARS, YEARS)

    def now() -> float:
        return real() + ahead

    clocks = mock.patch.multiple(time, time=now, time_ns=lambda: int(now() * 1e9))
    with clocks, each_step(jump):
        yield


def break_by_nan(folder: Path, rng: random.Random, workdir: Path) -> tuple[str, str | None]:
    """The kind of the fault, and what is wrong with how the run ended."""
    part, at = rng.choice(PARTS), rng.randrange(1, STEPS)
    with poisoned(part, at):
        outcome = runs.attempt(runs.make_config(folder / "data"), workdir)
    said = re.search("became nan|no longer finite", outcome.error or "")
    return f"NaN in {part}", None if said else f"at step {at}: {outcome.error}"


def break_data(folder: Path, rng: random.Random, workdir: Path) -> tuple[str, str | None]:
    way, at, workers = rng.choice(list(SHARD_WAYS)), rng.randrange(1, STEPS), rng.choice((0, 1))
    place = workdir.with_name("data")
    shutil.copytree(folder / "data", place)
    shard = next(place.rglob("digits-train.array_record-*"))
    config = runs.make_config(place, resident="false", num_workers=workers)
    with each_step(lambda step: SHARD_WAYS[way](shard, rng) if step == at else None):
        outcome = runs.attempt(config, workdir)
    shutil.rmtree(place)
    shutil.copytree(folder / "data", place)
    # Without an error it was read before: from memory, or from a file that is open.
    good = outcome.error is None or str(place) in outcome.error and "\n" not in outcome.error
    return f"data: {way}", None if good else f"at step {at}, {workers} workers: {outcome.error}"


def break_clock(folder: Path, rng: random.Random, workdir: Path) -> tuple[str, str | None]:
    with jumping_clock(rng):
        outcome = runs.attempt(runs.make_config(folder / "data"), workdir)
    if outcome.error:
        return "clock", outcome.error
    rates = [record["images_per_second"] for record in journal.read(workdir) if "images_per_second" in record]
    seconds = [value for span in timing.read(workdir) for value in span.seconds.values()]
    good = all(math.isfinite(rate) and rate > 0 for rate in rates) and all(0 <= value < 600 for value in seconds)
    return "clock", None if good and rates and seconds else f"rates {rates}, seconds {seconds}"


BREAKS = (break_by_nan, break_data, break_clock)


def attempt(breaks: Callable, folder: Path, rng: random.Random) -> tuple[str, str | None]:
    """Break a run, go on with it, and compare: the kind of the fault, and what was wrong if anything was."""
    place = Path(tempfile.mkdtemp(dir=folder))
    workdir = place / "run"
    kind, wrong = breaks(folder, rng, workdir)
    if not wrong:
        runs.saved(workdir) if (workdir / "checkpoints").exists() else None  # raises for one that is not whole
        outcome = runs.attempt(runs.make_config(folder / "data"), workdir)
        wrong = outcome.error or ", ".join(runs.differences(workdir, folder / "reference"))
    shutil.rmtree(place)
    return kind, wrong or None


def prepare(folder: Path) -> None:
    """The data, and the run that nothing disturbed."""
    data.open_split("digits", "train", folder / "data", image_size=16)
    loop.train(runs.make_config(folder / "data"), folder / "reference")


def main() -> None:
    """Run the campaign."""
    args = campaign.arguments(__doc__, count=60)
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="jaxnets-faults-"))
    tally = campaign.Tally()
    with registered():
        prepare(folder)
        for number in range(args.count):
            kind, wrong = attempt(BREAKS[number % len(BREAKS)], folder, rng)
            if wrong:
                tally.add_finding(kind, f"{kind}: {wrong}")
            else:
                tally.add(kind, "as it should be")
    shutil.rmtree(folder)
    tally.end(args)


if __name__ == "__main__":
    main()
