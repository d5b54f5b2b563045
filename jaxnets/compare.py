"""Train nets side by side, each with several seeds, and write one table and one page: what they reach, and cost.

`--models` names the nets, with fields of their own where wanted, `mobilenet_v2_cifar:width=0.5`, and patterns,
`shufflenet_v2*_cifar`; without it the nets are those of the configurations, of which there may be several. Fields of
all runs are set as `--config.num_epochs=3`. `--against=torch` trains every net in PyTorch too, from the same weights
and by the same recipe. Every run has a workdir in OUT/runs; the same command again goes on where it was stopped, and
does not run again what is finished. OUT/compare.{md,json,csv,html} are rewritten after every run.
Standard output is the table, and one JSON object in the last line.
"""

from jaxnets import huge_pages

if __name__ == "__main__":
    huge_pages.restart()

import dataclasses
import datetime
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_collections

import jaxnets
from jaxnets import (
    compare_page,
    compare_results,
    config_file,
    data,
    datasets,
    latency,
    loop,
    machine,
    plan,
    runtime,
    settings,
)
from jaxnets import summary as summaries
from jaxnets import workdir as workdirs
from jaxnets.compare_entries import JAXNETS, TORCH, Entry, beside_torch, make_entries, net_fields
from jaxnets.errors import ArgumentParser, UserError, exit_on_user_error, printable, writing
from jaxnets.plain_files import parse_json, read_text, replacing
from jaxnets.runtime import logger

STEM = "compare"
FORMATS = ("json", "md", "csv", "html")  # the first says whose the others are
MAX_BYTES = 1 << 28  # of a table as JSON, which holds every run's curve
LATENCY_FILE = "latency.json"
# What a run may be gone on with, but what runs that are compared may not differ in.
SAME = ("num_epochs", "eval_every_epochs")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A comparison by name: what stands on the command line for it."""

    models: tuple[str, ...]
    overrides: tuple[str, ...]
    latency_size: int | None = None


# Undoes what a family's recipe adds to the training of plain images.
PLAIN = ("--config.augment.cutout=0", "--config.label_smoothing=0.0", "--config.progressive_sizes=()")
PRESETS = {
    # The comparison that the literature of light nets opens with: all for the same 3 epochs of Adam.
    "classic": Preset(
        models=(
            "mobilenet_v1_cifar",
            "mobilenet_v2_cifar",
            "vgg16_bn_cifar",
            "vgg19_bn_cifar",
            "resnet50_cifar",
            "resnet152_cifar",
        ),
        overrides=(
            "--config.num_epochs=3",
            "--config.batch_size=100",
            "--config.eval_batch_size=100",
            "--config.optimizer.name=adamw",  # without decay AdamW is Adam
            "--config.optimizer.weight_decay=0.0",
            "--config.optimizer.learning_rate=1e-3",
            "--config.schedule.name=constant",
            "--config.schedule.warmup_epochs=0.0",
            "--config.augment.crop_padding=0",
            "--config.augment.flip=False",
            *PLAIN,
        ),
        latency_size=224,
    ),
}


def torch_side():
    """The module `compare_torch`; UserError where PyTorch is not installed."""
    try:
        from jaxnets import compare_torch
    except ImportError as error:
        raise UserError(
            f"--against=torch needs PyTorch and torchvision: pip install 'jaxnets[torch]' ({error})"
        ) from None
    return compare_torch


def workdir_of(out: Path, entry: Entry, number: int) -> Path:
    """Where an entry's run with its `number`-th seed lives."""
    return out / "runs" / entry.folder / f"seed{entry.config.seed + number}"


def check(entries: Sequence[Entry], num_seeds: int, out: Path) -> None:
    """UserError for the first run that cannot be: by its configuration, its net, or what its workdir holds."""
    first = entries[0].config
    for entry in entries:
        settings.check(entry.config)
        plan.check_net(entry.config)
        for field in ("dataset", "eval_split"):
            if entry.config[field] != first[field]:
                raise UserError(
                    f"nets are compared on the same images: config.{field} is {first[field]!r} for "
                    f"{entries[0].label} and {entry.config[field]!r} for {entry.label}"
                )
        if entry.framework == TORCH:
            torch_side().check(entry.config)
        for number in range(num_seeds):
            directory = workdir_of(out, entry, number)
            check_length(directory, workdirs.check(directory, entry.at_seed(number)), entry.config)


def check_length(directory: Path, before: ml_collections.ConfigDict | None, config: ml_collections.ConfigDict) -> None:
    """UserError where a run was begun with another length: gone on with, it is none that was made in one go."""
    for field in SAME:
        if before and before.get(field) != config[field]:
            raise UserError(
                f"{directory} holds a run with config.{field}={before.get(field)}, not {config[field]}; compare runs "
                "of that length, or choose another --out"
            )


def check_out(entries: Sequence[Entry], out: Path) -> None:
    """UserError where a table would take the place of what is none of ours; says what an older one had besides."""
    present = [path for path in (out / f"{STEM}.{ending}" for ending in FORMATS) if path.exists()]
    if not present:
        return
    try:
        labels = [net["label"] for net in parse_json(read_text(out / f"{STEM}.json", MAX_BYTES))["nets"]]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{present[0]} is there, but no table of jaxnets.compare: {STEM}.json is none; choose another --out"
        ) from None
    if gone := [label for label in labels if label not in {entry.label for entry in entries}]:
        logger.info("the table in %s no longer shows %s; their runs stay", out, printable(", ".join(gone)))


def train_all(
    entries: Sequence[Entry], num_seeds: int, out: Path, after_each: Callable[[dict[str, list[str]]], None]
) -> dict[str, list[str]]:
    """Train what is not finished, every net with one seed before any with the next.

    Returns, and after every run passes on, what went wrong: sentences by label. A run that fails does not keep the
    others from running. SystemExit where the user interrupts; the same call goes on there.
    """
    failed: dict[str, list[str]] = {entry.label: [] for entry in entries}
    for number in range(num_seeds):
        for entry in entries:
            config, directory = entry.at_seed(number), workdir_of(out, entry, number)
            if compare_results.read_run(directory, config):
                logger.info("%s, seed %d: finished before", entry.label, config.seed)
                continue
            logger.info("%s, seed %d:", entry.label, config.seed)
            try:
                (loop if entry.framework == JAXNETS else torch_side()).train(config, directory)
            except (UserError, RuntimeError, MemoryError) as error:  # XLA and PyTorch out of memory, too
                why = printable((str(error).splitlines() or [type(error).__name__])[0])
                unforeseen = not isinstance(error, UserError)
                logger.warning("%s, seed %d: %s", entry.label, config.seed, why, exc_info=unforeseen)
                failed[entry.label].append(f"seed {config.seed}: {why}")
            if entry.framework == TORCH:
                torch_side().release()
            after_each(failed)
    return failed


def num_classes_of(config: ml_collections.ConfigDict) -> int:
    """The outputs of the net that `config` trains."""
    if config.model.num_classes is not None:
        return config.model.num_classes
    split = data.open_split(config.dataset, config.eval_split, config.data_dir, image_size=config.image_size)
    return split.num_classes


def net_record(entry: Entry, num_seeds: int, out: Path, failed: Sequence[str], num_classes: int) -> dict[str, Any]:
    """All that is known of an entry now: its size, its finished runs and its latency, if measured."""
    config = entry.config
    fields = net_fields(config) | {"num_classes": num_classes}
    counted = summaries.summarize(config.model.name, config.image_size, **fields)
    found = [
        compare_results.read_run(workdir_of(out, entry, number), entry.at_seed(number)) for number in range(num_seeds)
    ]
    runs = [run for run in found if run]
    return {
        "label": entry.label,
        "model": config.model.name,
        "framework": entry.framework,
        "fields": fields,
        "image_size": config.image_size,
        "parameters": counted.parameters,
        "macs": counted.macs,
        "results": compare_results.over_seeds(runs),
        "latency": read_latency(out, entry),
        "failed": list(failed),
        "runs": runs,
        "config": settings.as_dict(config),
    }


def timed_net(entry: Entry, image_size: int | None, num_classes: int) -> tuple[str, int, dict[str, Any]]:
    """The net of an entry that is timed: its name, the side of its images, its fields.

    At another `image_size` than the run's own that is the net made for large images where there is one: that of the
    same name without `_cifar`.
    """
    config = entry.config
    name, size, fields = config.model.name, image_size or config.image_size, net_fields(config)
    twin = name.removesuffix("_cifar")
    if size != config.image_size and twin != name and twin in jaxnets.list_models():
        return twin, size, fields
    return name, size, fields | {"num_classes": num_classes}


def measure_latency(entry: Entry, image_size: int | None, batch_size: int, num_classes: int, out: Path) -> None:
    """Time the entry's net, `timed_net`, unless the same was timed before on this machine."""
    name, size, fields = timed_net(entry, image_size, num_classes)
    dtype = settings.compute_dtype(entry.config.model.dtype)
    counted = summaries.summarize(name, size, **fields)
    what = {
        "model": name,
        "fields": fields,
        "image_size": size,
        "batch_size": batch_size,
        "dtype": dtype,
        "parameters": counted.parameters,
        "macs": counted.macs,
        "machine": machine.describe(),
    }
    before = read_latency(out, entry)
    if before and {key: before.get(key) for key in what} == what:
        return
    logger.info("%s: latency of %s at %d pixels", entry.label, name, size)
    model = jaxnets.create_model(name, dtype=dtype, **fields)
    one, batch = (latency.measure(model, (images, size, size, 3), train=False) for images in (1, batch_size))
    measured = what | {"one": one, "batch": batch}
    path = out / "runs" / entry.folder / LATENCY_FILE
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(measured, indent=2) + "\n")


def read_latency(out: Path, entry: Entry) -> dict[str, Any] | None:
    """What `measure_latency` found, or None."""
    try:
        return json.loads((out / "runs" / entry.folder / LATENCY_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None


def comparison_record(nets: Sequence[dict[str, Any]], num_seeds: int, command: str, note: str) -> dict[str, Any]:
    """Everything that the table and the page show, for JSON."""
    config = nets[0]["config"]
    frameworks = {net["framework"] for net in nets}
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": metadata.version("torch") if TORCH in frameworks else None,
        "dataset": config["dataset"],
        "train_split": config["train_split"],
        "eval_split": config["eval_split"],
        "seeds": num_seeds,
        "note": note,
        "nets": list(nets),
    }


def write_files(comparison: dict[str, Any], out: Path) -> None:
    """The table as Markdown, JSON and CSV, and the page."""
    notes = "\n".join(f"- {note}" for note in compare_results.notes(comparison))
    where = f"`{comparison['command']}`; {comparison['date']}"
    texts = {
        "md": f"{summaries.markdown(compare_results.table(comparison))}\n\n{notes}\n- {where}\n",
        "json": json.dumps(comparison, indent=1) + "\n",
        "csv": compare_results.csv_text(comparison),
        "html": compare_page.html(comparison),
    }
    with writing(out):
        for ending in FORMATS:
            _write(out / f"{STEM}.{ending}", texts[ending])


def _write(path: Path, text: str) -> None:
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def run(
    entries: Sequence[Entry],
    num_seeds: int,
    out: Path,
    *,
    latency_size: int | None = None,
    latency_batch: int = 0,
    command: str = "",
    note: str = "",
) -> dict[str, Any]:
    """Train, time and write down a whole comparison, or go on with it; its record.

    `latency_batch=0` times nothing. Raises UserError where a run cannot be, before any is started, and where none
    was finished.
    """
    runtime.configure_logging()
    check(entries, num_seeds, out)
    check_out(entries, out)
    classes = {entry.label: num_classes_of(entry.config) for entry in entries}
    if latency_batch:
        for entry in entries:
            name, size, fields = timed_net(entry, latency_size, classes[entry.label])
            summaries.summarize(name, size, **fields)  # refuses a size that the net cannot have
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made a folder: {error.strerror}") from None

    def write(failed: dict[str, list[str]]) -> dict[str, Any]:
        nets = [net_record(e, num_seeds, out, failed[e.label], classes[e.label]) for e in entries]
        comparison = comparison_record(nets, num_seeds, command, note)
        write_files(comparison, out)
        return comparison

    failed = train_all(entries, num_seeds, out, write)
    if latency_batch:
        for entry in (entry for entry in entries if entry.framework == JAXNETS):
            measure_latency(entry, latency_size, latency_batch, classes[entry.label], out)
    comparison = write(failed)
    if not any(net["runs"] for net in comparison["nets"]):
        raise UserError(f"no run was finished; the first: {next(iter(filter(None, failed.values())))[0]}")
    return comparison


def load_configs(
    paths: Sequence[str], overrides: Sequence[str], models: Sequence[str] = ()
) -> dict[str, ml_collections.ConfigDict]:
    """The configurations by name; UserError for a field of one net where `models` names several."""
    for override in overrides:
        field = override.split("=")[0].removeprefix(config_file.PREFIX)
        if models and field.startswith("model.") and field != "model.dtype":
            raise UserError(f"--config.{field} belongs to one net: --models=NAME:{field.removeprefix('model.')}=VALUE")
    names = [config_file.name_of(path) for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two configurations are called {name}; give each once, under a name of its own")
    configs = {name: config_file.load(path, overrides) for name, path in zip(names, paths)}
    for config in configs.values():
        config.dataset = datasets.absolute(config.dataset)  # as a run's workdir keeps it
    return configs


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m jaxnets.compare", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs") / STEM,
        help="folder of the runs, the table and the page; default: runs/compare",
    )
    parser.add_argument("--models", help="nets, separated by commas; default: those of the configurations")
    parser.add_argument("--config", action="append", help="configuration file, may be repeated; configs/default.py")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="nets and fields of a comparison by name")
    parser.add_argument("--against", choices=(TORCH,), help="train every net in PyTorch too, on the same data")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each net, from config.seed on; default: 3")
    parser.add_argument("--latency_size", type=int, help="side in pixels of the timed images; default: the run's")
    parser.add_argument("--latency_batch", type=int, default=32, help="images timed beside one; 0: no latency; 32")
    parser.add_argument(
        "--note", default="", help="a sentence to stand below the table, such as which copy of the data"
    )
    return parser


def main(argv: list[str]) -> None:
    """Run the command; the last line it prints is the JSON result."""
    args, overrides = _parser().parse_known_args(argv[1:])
    config_file.check_overrides(overrides)
    if args.against:  # else XLA takes most of a GPU's memory at once, and keeps it
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.seeds < 1:
        raise UserError(f"--seeds={args.seeds} must be at least 1")
    if args.latency_batch < 0 or (args.latency_size is not None and args.latency_size < 1):
        raise UserError("--latency_batch must be 0 or more and --latency_size at least 1 pixel")
    preset = PRESETS.get(args.preset, Preset((), ()))
    # At the commas outside brackets: a field may be a tuple.
    models = [model for model in re.split(r",(?![^(]*\))", args.models or "") if model] or preset.models
    # What the user sets comes last, and counts.
    configs = load_configs(args.config or ["configs/default.py"], [*preset.overrides, *overrides], models)
    entries = make_entries(configs, models)
    comparison = run(
        beside_torch(entries) if args.against else entries,
        args.seeds,
        args.out,
        latency_size=args.latency_size or preset.latency_size,
        latency_batch=args.latency_batch,
        command=shlex.join(["python", "-m", "jaxnets.compare", *argv[1:]]),
        note=args.note,
    )
    print(summaries.markdown(compare_results.table(comparison)))
    failed = [f"{net['label']}, {sentence}" for net in comparison["nets"] for sentence in net["failed"]]
    runs = sum(len(net["runs"]) for net in comparison["nets"])
    print(json.dumps({"page": str(args.out / f"{STEM}.html"), "runs": runs, "failed": failed}))


if __name__ == "__main__":
    exit_on_user_error(main)(sys.argv)
