"""Break a run from within at a random step, go on once it is mended, and compare with one that nothing disturbed.

    python -m tests.chaos.faults --count=60 [--seed=0]

In turns: a NaN in the weights, the running statistics or the optimizer's state; the file of a streamed data set
overwritten in part, cut off or gone; a clock that jumps by up to 60 years. The last line of standard output is one
JSON object; with findings, the status is 1.
"""

import argparse
import contextlib
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from jaxnets import data, journal, loop, step, timing
from tests.chaos import runs

STEPS = 10  # of the tiny run
PARTS = ("params", "batch_stats", "opt_state")
YEARS = 60 * 365 * 86400.0


@contextlib.contextmanager
def poisoned(part: str, at: int) -> Iterator[None]:
    """Step `at` leaves one NaN in the first array of a part of the state."""
    original = step.train_step

    def poison(leaf: jax.Array, hit: jax.Array) -> jax.Array:
        first = (0,) * leaf.ndim
        return leaf.at[first].set(jnp.where(hit, jnp.nan, leaf[first]))

    def train_step(state, *args, **kwargs):
        new, metrics = original(state, *args, **kwargs)
        leaves, tree = jax.tree.flatten(getattr(new, part))
        place = next(i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating))
        leaves[place] = poison(leaves[place], new.step == at)
        return new.replace(**{part: jax.tree.unflatten(tree, leaves)}), metrics

    with mock.patch.object(step, "train_step", train_step):
        yield


@contextlib.contextmanager
def once_at(at: int, do: Callable[[], None]) -> Iterator[None]:
    """`do` is called as the record of step `at` is written."""
    original = journal.Journal.write

    def write(self, record):
        original(self, record)
        if record["step"] == at and "loss" in record:
            do()

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
    """The time of day is another one, up to 60 years before or after, whenever it is asked for."""
    real = time.time

    def jumped() -> float:
        return max(real() + rng.uniform(-YEARS, YEARS), 1.0)

    with mock.patch.object(time, "time", jumped), mock.patch.object(time, "time_ns", lambda: int(jumped() * 1e9)):
        yield


def break_by_nan(folder: Path, rng: random.Random, workdir: Path) -> tuple[str, str | None]:
    """The kind of the fault, and what is wrong with how the run ended."""
    part, at = rng.choice(PARTS), rng.randrange(1, STEPS)
    with poisoned(part, at):
        outcome = runs.attempt(runs.make_config(folder / "data"), workdir)
    said = outcome.error and "nan" in outcome.error or outcome.error and "no longer finite" in outcome.error
    return f"NaN in {part}", None if said else f"at step {at}: {outcome.error}"


def break_data(folder: Path, rng: random.Random, workdir: Path) -> tuple[str, str | None]:
    way, at, workers = rng.choice(list(SHARD_WAYS)), rng.randrange(1, STEPS), rng.choice((0, 1))
    place = workdir.with_name("data")
    shutil.copytree(folder / "data", place)
    shard = next(place.rglob("digits-train.array_record-*"))
    config = runs.make_config(place, resident="false", num_workers=workers)
    with once_at(at, lambda: SHARD_WAYS[way](shard, rng)):
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="jaxnets-faults-"))
    outcomes, findings = Counter(), []
    with runs.tiny_net():
        prepare(folder)
        for number in range(args.count):
            kind, wrong = attempt(BREAKS[number % len(BREAKS)], folder, rng)
            outcomes[f"{kind}: {'finding' if wrong else 'as it should be'}"] += 1
            if wrong:
                findings.append(f"{kind}: {wrong}")
                print(findings[-1], file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    total = {"count": args.count, "seed": args.seed}
    print(json.dumps(total | {"outcomes": dict(sorted(outcomes.items())), "findings": findings}))
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
