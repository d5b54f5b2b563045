"""Evaluate a checkpoint of a run: loss, top-1, top-5 and per-class accuracy on any split.

Needs the workdir and the data set. The last line of standard output is one JSON object.
"""

from jaxnets import interruption

if __name__ == "__main__":
    interruption.end_at_once()

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxnets import checkpoint, data, runtime, settings
from jaxnets.arguments import count
from jaxnets.datasets import data_root, folder_path, is_folder, where_it_still_is
from jaxnets.errors import ArgumentParser, UserError, exit_on_user_error, printable
from jaxnets.evaluator import evaluate_split
from jaxnets.plain_files import user_path
from jaxnets.trained_run import load_run
from jaxnets.workdir import CONFIG, class_names, read_data, require_same_classes


def require_classes(workdir: Path, split: data.Split, num_classes: int) -> None:
    """UserError if a split does not have the run's classes: a label is a class's place among them.

    For weights from elsewhere, only the number of classes is known.
    """
    known = class_names(workdir)
    if split.num_classes > num_classes or (not known and split.num_classes != num_classes):
        raise UserError(
            f"{split.name} has {split.num_classes} classes, the net of {workdir} {num_classes}: a label is a class's "
            "place among all, so the classes must be the same"
        )
    require_same_classes(workdir, split.name, split.class_names, known)


def warn_of_other_images(workdir: Path, split: data.Split) -> None:
    """Warn if the run's own split has other images today: some may have been trained on."""
    with contextlib.suppress(UserError):  # which `require_classes` has reported
        then = read_data(workdir)
        if then and then.eval_images == len(split) and then.files and then.files[1] not in ("", split.identity):
            runtime.logger.warning(
                "%s %s is not what it was when the run was trained (another version or, in a folder, other names or "
                "classes of files): some of its images may have been trained on",
                split.name,
                split.split,
            )
        if then and then.eval_images != len(split):
            runtime.logger.warning(
                "%s %s has %d images, and had %d when the run was trained: some of them may have been trained on",
                split.name,
                split.split,
                len(split),
                then.eval_images,
            )


def note_choice(workdir: Path, step: int, which: str) -> None:
    """Log that the best checkpoint was chosen by the images that it is evaluated on, if it is not the last as well."""
    last = checkpoint.latest_step(workdir)
    if which == "best" and step != last:
        runtime.logger.info(
            "checkpoint %d was the best on these very images, so its accuracy is an optimistic one; "
            "--checkpoint=latest evaluates %d, the last",
            step,
            last,
        )


def _print_table(metrics: dict[str, Any], names: tuple[str, ...]) -> None:
    table = Table("class", "accuracy", title="Accuracy by class")
    table.columns[1].justify = "right"
    for name, accuracy in zip(names, metrics["class_accuracy"]):
        table.add_row(
            Text(printable(name)),  # brackets in a name are no markup
            "-" if np.isnan(accuracy) else f"{accuracy:.2%}",
        )
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100).print(table)
    print(
        f"loss {metrics['loss']:.4f}  top-1 {metrics['accuracy']:.2%}  top-5 {metrics['top5_accuracy']:.2%}  "
        f"of {metrics['num_examples']} examples"
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m jaxnets.evaluate", description=__doc__)
    parser.add_argument("--workdir", type=user_path, required=True, help="the folder of the run")
    best = "best (default; by eval_accuracy, with --ema that of the averaged weights), latest, or a step"
    parser.add_argument("--checkpoint", default="best", help=best)
    parser.add_argument("--split", help="TFDS split to evaluate, e.g. test[:1000]; default: the run's eval_split")
    parser.add_argument("--data_dir", help="where the data set (or its folder) is now, if not where the run found it")
    parser.add_argument("--batch_size", type=count, help="most images at once; default: the run's eval_batch_size")
    parser.add_argument("--ema", action="store_true", help="evaluate the averaged weights of the run")
    return parser


def require_folder(data_dir: str | None) -> None:
    """UserError where --data_dir is given and is no folder."""
    if data_dir == "":
        raise UserError("--data_dir is empty; leave it out for the place where the run found its data")
    if data_dir and not user_path(data_dir).is_dir():
        raise UserError(f"--data_dir={data_dir}: there is no such folder")


def locate_data(config: ml_collections.ConfigDict, data_dir: str | None) -> None:
    """Have a run's configuration say where its images are now: in `data_dir`, if given; UserError for a folder gone."""
    if data_dir and is_folder(config.dataset):
        config.dataset = f"folder:{data_dir}"
    elif data_dir:
        config.data_dir = data_dir
    elif is_folder(config.dataset) and not folder_path(config.dataset).is_dir():
        raise UserError(f"{config.dataset} is no longer there; --data_dir=FOLDER says where it is now")
    elif config.data_dir and not is_folder(config.dataset) and where_it_still_is(config.data_dir) is None:
        runtime.logger.warning("the run's data_dir %s is not there; using %s instead", config.data_dir, data_root())
        config.data_dir = None


def main(argv: list[str]) -> None:
    """Run the command; the last line it prints is the JSON result."""
    args = _parser().parse_args(argv[1:])
    runtime.configure_logging()
    if settings.read(args.workdir / CONFIG).get("deterministic"):
        runtime.make_deterministic()
    runtime.require_device()
    require_folder(args.data_dir)
    if (args.batch_size or 1) > (most := settings.LIMITS["eval_batch_size"]):
        raise UserError(f"--batch_size={args.batch_size} must be at most {most}")
    run = load_run(args.workdir, args.checkpoint, ema=args.ema)
    config = run.config
    if config.get("ema_decay") and not args.ema:
        runtime.logger.info("these are the weights as trained; --ema evaluates the averaged ones")
    locate_data(config, args.data_dir)
    if args.batch_size is not None:
        config.eval_batch_size = args.batch_size
    if config.compilation_cache:
        runtime.enable_compilation_cache()
    split = data.open_split(
        config.dataset,
        config.eval_split if args.split is None else args.split,
        config.data_dir,
        image_size=config.image_size,
        crop=config.crop,
    )
    require_classes(args.workdir, split, run.model.num_classes)
    if args.split is None:
        warn_of_other_images(args.workdir, split)
        note_choice(args.workdir, run.step, args.checkpoint)
    with runtime.short_of_memory("a smaller --batch_size needs less"):
        metrics = evaluate_split(run.model, run.variables, split, config)
    _print_table(metrics, split.class_names)
    if not np.isfinite(metrics["loss"]):
        raise UserError(f"the loss of checkpoint {run.step} is {metrics['loss']}: its weights may be damaged")
    result = {
        "eval_accuracy": metrics["accuracy"],
        "eval_loss": metrics["loss"],
        "eval_top5_accuracy": metrics["top5_accuracy"],
        "num_examples": metrics["num_examples"],
        "step": run.step,
        "split": split.split,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    exit_on_user_error(main)(sys.argv)
