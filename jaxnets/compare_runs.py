"""A comparison as a whole: checked, trained or resumed, with the results written after each run.

OUT holds compare.{md,json,csv,html} and, as compare.1.*, those of an earlier comparison some of whose runs no longer
exist.
"""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxnets import (
    announce,
    compare_latency,
    compare_page,
    compare_results,
    compare_training,
    initial_weights,
    journal,
    plan,
    runtime,
    settings,
    summary,
    tables,
)
from jaxnets import workdir as workdirs
from jaxnets.compare_entries import JAXNETS, TORCH, Entry, net_fields, workdir_at
from jaxnets.errors import UserError, as_utf8, printable, writing
from jaxnets.plain_files import locked, make_folder, read_own, replacing, set_aside
from jaxnets.runtime import logger

STEM = "compare"
LOCK = ".lock"
FORMATS = ("json", "md", "csv", "html")  # the first shows whether all are ours
MAX_BYTES = 1 << 28  # of a table as JSON, which holds every run's curve


def files_of(out: Path) -> list[Path]:
    """The files of the table and the page, one for each of `FORMATS`."""
    return [out / f"{STEM}.{ending}" for ending in FORMATS]


def check_out(entries: Sequence[Entry], num_seeds: int, out: Path) -> bool:
    """Whether there is an older table whose runs all still exist; logs those that the new table leaves out.

    UserError if a table would overwrite files that are not ours.
    """

    def runs_of(table: dict[str, Any]) -> list[tuple[str, int]]:
        runs = [(net["label"], run["seed"]) for net in table["nets"] for run in net["runs"]]
        if not all(isinstance(label, str) and isinstance(seed, int) for label, seed in runs):
            raise TypeError
        return runs

    runs = read_own(files_of(out), "jaxnets.compare table", runs_of, MAX_BYTES)
    if runs is None:
        return False
    there = {(label, seed) for label, seed in runs if (workdir_at(out, label, seed) / journal.FILE).exists()}
    shown = {(entry.label, entry.config.seed + number) for entry in entries for number in range(num_seeds)}
    labels = {label for label, _ in shown}
    gone = [(label, seed) for label, seed in runs if (label, seed) in there - shown]
    if gone := dict.fromkeys(f"{label}, seed {seed}" if label in labels else label for label, seed in gone):
        logger.info("the table in %s no longer shows %s; their runs are kept", out, printable("; ".join(gone)))
    return there == set(runs)


def keep(files: Sequence[Path]) -> None:
    """Set aside files made from runs that no longer exist, since they cannot be made again."""
    if kept := set_aside(files):
        names = ", ".join(path.name for path in kept)
        logger.warning("%s was made from runs that no longer exist: it is kept as %s", files[0], names)


@dataclasses.dataclass(frozen=True)
class Net:
    """An entry's net as the table shows it: its own fields, and what one image of its run costs."""

    fields: dict[str, Any]
    parameters: int
    macs: int

    @classmethod
    def of(cls, entry: Entry, ended: Sequence[Path] = (), begun: bool = False) -> "Net":
        """Open and build all that the entry's runs need, and check it against the workdirs of those that `ended`.

        `begun`: whether all runs have weights. UserError, with the entry's label, if something does not fit.
        """
        config = entry.config
        with compare_training.named(entry):
            planned = plan.make_plan(entry.at_seed(0))
            if not ended and entry.framework == JAXNETS:
                announce.warn_of_high_rate(planned)  # now, not only when it starts, hours later
            if entry.framework == TORCH:
                compare_training.torch_side().check_plan(planned)
            if config.init_from and not begun:
                initial_weights.load(planned)
            for directory in ended:
                require_same_images(planned, directory)
            fields = net_fields(config) | {"num_classes": planned.model.num_classes}
            counted = summary.summarize(config.model.name, config.image_size, **fields)
        return cls(fields, counted.parameters, counted.macs)


def require_same_images(planned: plan.Plan, directory: Path) -> None:
    """UserError if a finished run had other images or classes; a warning if its images were elsewhere.

    The configuration does not show it: another folder may be the same one, moved.
    """
    plan.require_same_data(planned, directory)
    place = settings.place_of(planned.config)
    configs = settings.read(directory / workdirs.CONFIG), planned.config
    before, now = (settings.with_absolute_places(config)[place] for config in configs)
    if before != now:
        logger.warning(
            "%s was trained on %s, and the data are now in %s: they must hold the same images", directory, before, now
        )


def net_record(
    entry: Entry, net: Net, num_seeds: int, out: Path, failed: Sequence[str], what: dict[str, Any] | None
) -> dict[str, Any]:
    """All that is known about an entry so far: its size, its finished runs, and the latency of `what`, if measured."""
    config = entry.config
    failed, runs = list(failed), []
    for run in compare_training.runs_of(entry, num_seeds, out):
        try:
            if numbers := run.numbers():
                runs.append(numbers)
        except UserError as error:  # its files cannot be read now; the other runs' can
            if not any(sentence.endswith(str(error)) for sentence in failed):
                failed.append(f"seed {run.seed}: {error}")
    return {
        "label": entry.label,
        "model": config.model.name,
        "framework": entry.framework,
        "fields": net.fields,
        "image_size": config.image_size,
        "parameters": net.parameters,
        "macs": net.macs,
        "results": compare_results.over_seeds(runs, lost=bool(failed) and len(runs) < num_seeds),
        "latency": compare_latency.read(what, out) if what else None,
        "failed": failed,
        "runs": runs,
        "config": settings.as_dict(config),
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, as far as it is known before any training, and where the results are written."""

    entries: Sequence[Entry]
    nets: Sequence[Net]
    timed: Sequence[dict[str, Any] | None]  # what the latency of each net is measured on, if it is
    num_seeds: int
    out: Path
    command: str
    note: str
    train_accuracy: bool

    def record(self, failed: dict[str, list[str]]) -> dict[str, Any]:
        """Everything that the table and the page show, for JSON; `failed`: what went wrong, by label."""
        nets = [
            net_record(entry, net, self.num_seeds, self.out, failed[entry.label], what)
            for entry, net, what in zip(self.entries, self.nets, self.timed, strict=True)
        ]
        config = nets[0]["config"]
        return {
            "command": self.command,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "torch": compare_results.torch_versions(nets),
            "dataset": config["dataset"],
            "train_split": config["train_split"],
            "eval_split": config["eval_split"],
            "seeds": self.num_seeds,
            "note": self.note,
            "nets": nets,
        }

    def write(self, failed: dict[str, list[str]]) -> dict[str, Any]:
        """Write what is known so far; returns the record."""
        record = self.record(failed)
        write_files(record, self.out)
        return record


def write_files(comparison: dict[str, Any], out: Path) -> None:
    """Write the table as Markdown, JSON and CSV, and the page."""
    notes = "\n".join(f"- {note}" for note in compare_results.notes(comparison))
    where = f"`{comparison['command']}`; {comparison['date']}"
    texts = {
        "md": f"{tables.markdown(compare_results.table(comparison))}\n\n{notes}\n- {where}\n",
        "json": json.dumps(comparison, indent=1) + "\n",
        "csv": compare_results.csv_text(comparison),
        "html": compare_page.html(comparison),
    }
    with writing(out):
        for ending, file in zip(FORMATS, files_of(out)):
            with replacing(file) as scratch:
                scratch.write_text(as_utf8(texts[ending]), encoding="utf-8")


def run(
    entries: Sequence[Entry],
    num_seeds: int,
    out: Path,
    *,
    latency_size: int | None = None,
    latency_batch: int = 0,
    command: str = "",
    note: str = "",
    train_accuracy: bool = False,
    further: Sequence[Path] = (),
) -> dict[str, Any]:
    """Train, time and record a whole comparison, or resume it; returns its record.

    `latency_batch=0` times nothing. `train_accuracy` evaluates finished runs on their training images. `further` files
    are made from the same runs, and kept as the table is. Raises UserError for an impossible run, before any is
    started, and if no run was finished.
    """
    runtime.configure_logging()
    if any(entry.config.deterministic for entry in entries):
        runtime.make_deterministic()
    runtime.require_device()
    compare_training.check(entries, num_seeds, out)
    all_there = check_out(entries, num_seeds, out)
    nets = []
    for entry in entries:
        runs = compare_training.runs_of(entry, num_seeds, out)
        ended = [run.workdir for run in runs if run.numbers()]
        nets.append(Net.of(entry, ended, begun=all(run.has_begun() for run in runs)))
    timed = [
        compare_latency.timed(entry, latency_size, latency_batch, net.fields["num_classes"])
        if latency_batch and entry.framework == JAXNETS
        else None
        for entry, net in zip(entries, nets)
    ]
    make_folder(out)
    with locked(out / LOCK, f"--out={out}", "comparison"):
        if not all_there:
            with writing(out):
                keep(files_of(out))
                keep(further)
        return train_and_write(Comparison(entries, nets, timed, num_seeds, out, command, note, train_accuracy))


def train_and_write(comparison: Comparison) -> dict[str, Any]:
    """The long-running part of `run`."""
    failed = compare_training.train_all(
        comparison.entries,
        comparison.num_seeds,
        comparison.out,
        comparison.write,
        train_accuracy=comparison.train_accuracy,
    )
    for entry, what in zip(comparison.entries, comparison.timed, strict=True):
        if what:
            with compare_training.noted(failed, entry, "latency"):
                compare_latency.measure(what, comparison.out)
    record = comparison.write(failed)
    if not any(net["runs"] for net in record["nets"]):
        raise UserError(f"no run was finished; the first failure: {compare_results.failures(record['nets'])[0]}")
    return record
