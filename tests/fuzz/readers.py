"""Everything that reads a file from outside, by kind; and a process that tries files one by one and says what came."""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

from jaxnets import data, image_files, journal, predictions, settings, timing, torch_weights, trained_run
from jaxnets.datasets import archive
from jaxnets.errors import UserError
from jaxnets.weights import keras_weights, weight_files

MEMBERS = {"data/a.bin": 3000, "data/names.txt": None}  # what the archives of these tests should hold


def read_weights(path: Path) -> None:
    """As `torch_weights.load` does, and then every entry, fitting or not."""
    reader = keras_weights if keras_weights.is_keras_file(path) else weight_files
    for value in reader.read(path).entries.values():
        if value.size if isinstance(value.size, int) else value.numel() < 1 << 20:
            weight_files.to_numpy(value)


def load_weights(path: Path) -> None:
    torch_weights.load("squeezenet1_1_cifar", path)


def read_config(path: Path) -> None:
    config = settings.read(path)
    settings.check_evaluation(config)
    settings.make_model(config, 10)


def read_run(path: Path) -> None:
    trained_run.load_run(path, "latest")
    trained_run.load_run(path, "best", ema=True)


def read_records(path: Path) -> None:
    """The journals of a workdir, as a run that goes on reads them."""
    journal.read(path)
    timing.read(path)
    journal.Journal(path, 10, True).close()


def read_dataset(path: Path) -> None:
    """A data set that is said to be prepared below `path`."""
    for split in ("train", "test"):
        data.decode(data.open_split("strange", split, path, image_size=8), progress=False)


READERS = {
    "weights": read_weights,
    "fitting": load_weights,
    "image": lambda path: image_files.read(str(path)),
    "archive": lambda path: archive.read_members(path, MEMBERS),
    "config": read_config,
    "run": read_run,
    "records": read_records,
    "predictions": predictions.load,
    "dataset": read_dataset,
}


def peak_megabytes() -> float:
    """The most memory that this process has had resident since `forget_peak`, or ever where that is not known."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    """Count the peak from here on, on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def attempt(kind: str, path: Path) -> dict:
    """Read one file: how it ended, what was said, the seconds of processor time and the megabytes it took."""
    forget_peak()
    before, began = peak_megabytes(), time.process_time()
    ended, said = "read", ""
    try:
        READERS[kind](path)
    except UserError as error:
        ended, said = "refused", str(error)
    except BaseException as error:  # even SystemExit would be a finding
        ended, said = type(error).__name__, str(error)
    seconds, megabytes = time.process_time() - began, peak_megabytes() - before
    return {"ended": ended, "said": said, "seconds": seconds, "megabytes": megabytes}


def is_fine(outcome: dict) -> bool:
    """Read or refused, in one sentence, in bounded time and memory."""
    sentence = outcome["said"].isprintable() and (outcome["ended"] == "read" or outcome["said"])
    within = outcome["seconds"] < 5 and outcome["megabytes"] < 1024
    return outcome["ended"] in ("read", "refused") and bool(sentence) and within


def main(listing: str) -> None:
    """Try what a file lists, one line `KIND PATH` each; one JSON object a line on standard output."""
    # What a reader fails to bound must not harm the machine that tests it.
    resource.setrlimit(resource.RLIMIT_AS, (1 << 37, 1 << 37))
    os.environ["OMP_NUM_THREADS"] = "1"
    for line in Path(listing).read_text().splitlines():
        kind, path = line.split(" ", 1)
        print(json.dumps({"path": path, **attempt(kind, Path(path))}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
