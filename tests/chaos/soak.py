"""A tiny run of very many epochs: memory, open files and threads stay what they are after warming up.

    python -m tests.chaos.soak --epochs=2000 [--streamed]

Every fifth epoch is evaluated, saved and drawn. What the process holds is sampled 200 times. It holds no more than it
should if, from the second quarter of the run to the last, the medians of device memory, open files and threads do not
grow, that of the resident memory by at most 3 %, and a line through the resident memory of these three quarters rises
by at most 10 MiB in 1,000 epochs. The last line of standard output is one JSON object; else the status is 1.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import psutil

from jaxnets import epochs, loop
from tests.chaos import runs
from tests.tiny_net import registered

EVERY = 5  # epochs between evaluations, each with a checkpoint and the page
SAMPLES = 200
MAX_GROWTH = 1.03  # of the resident memory's median, from the second quarter to the last
MAX_SLOPE = 10.0  # MiB in 1,000 epochs


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the process holds at the end of an epoch."""

    epoch: int
    resident: float  # MiB
    device: float  # MiB, in living arrays
    arrays: int
    files: int
    threads: int


def sample(epoch: int) -> Sample:
    """What this process holds now."""
    process, arrays = psutil.Process(), jax.live_arrays()
    device = sum(array.nbytes for array in arrays) / 2**20
    return Sample(
        epoch, process.memory_info().rss / 2**20, device, len(arrays), process.num_fds(), process.num_threads()
    )


def soak(folder: Path, num_epochs: int, every: int = EVERY, num_samples: int = SAMPLES, **fields) -> list[Sample]:
    """Train for `num_epochs`, evaluating and saving every few, and sample on the way."""
    config = runs.make_config(folder / "data", num_epochs=num_epochs, steps_per_call=5, log_every_steps=5, **fields)
    config.eval_every_epochs = config.checkpoint_every_epochs = every
    samples, finish = [], epochs.finish_epoch

    def finish_epoch(run, current, at):
        finish(run, current, at)
        epoch = at // run.plan.steps_per_epoch
        if epoch * num_samples // num_epochs > (epoch - 1) * num_samples // num_epochs:
            run.manager.wait_until_finished()  # its threads and files come and go
            samples.append(sample(epoch))

    with mock.patch.object(epochs, "finish_epoch", finish_epoch):
        loop.train(config, folder / "run")
    return samples


def quarters(samples: list[Sample]) -> list[dict[str, float]]:
    """The medians of each quarter of the samples."""
    names = [field.name for field in dataclasses.fields(Sample)]
    parts = np.array_split(np.array([dataclasses.astuple(one) for one in samples]), 4)
    return [dict(zip(names, np.round(np.median(part, axis=0), 2).tolist())) for part in parts]


def slope(samples: list[Sample]) -> float:
    """MiB of resident memory in 1,000 epochs, of the line through all but the first quarter."""
    later = samples[len(samples) // 4 :]
    return 1000 * float(np.polyfit([one.epoch for one in later], [one.resident for one in later], 1)[0])


def growing(samples: list[Sample], new_threads: int = 0) -> list[str]:
    """What is held more of at the end than after warming up; so many `new_threads` may still join the pools."""
    _, second, _, last = quarters(samples)
    allowed = {"device": 0, "arrays": 0, "files": 0, "threads": new_threads}
    found = [name for name, more in allowed.items() if last[name] > second[name] + more]
    if last["resident"] > MAX_GROWTH * second["resident"] or slope(samples) > MAX_SLOPE:
        found.append("resident")
    return found


def main() -> None:
    """Run it, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--streamed", action="store_true", help="read the images anew every epoch, in threads")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxnets-soak-") as folder, registered():
        samples = soak(Path(folder), args.epochs, resident="false" if args.streamed else "true")
    for number, quarter in enumerate(quarters(samples), 1):
        print(f"quarter {number}: {quarter}")
    found = growing(samples)
    total = {"epochs": args.epochs, "streamed": args.streamed, "MiB per 1,000 epochs": round(slope(samples), 2)}
    print(json.dumps(total | {"growing": found, "last": dataclasses.asdict(samples[-1])}))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
