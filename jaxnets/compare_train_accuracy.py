"""The accuracy of finished runs on the images that they were trained on, as they are, stored next to their records."""

import json
from pathlib import Path
from typing import Any

import ml_collections

from jaxnets import checkpoint, data
from jaxnets.compare_entries import TORCH, Entry
from jaxnets.errors import writing
from jaxnets.evaluator import evaluate_split
from jaxnets.plain_files import parse_json, read_text, replacing
from jaxnets.runtime import logger
from jaxnets.trained_run import load_run
from jaxnets.workdir import MAX_BYTES

FILE = "train_accuracy.json"


def measure(entry: Entry, config: ml_collections.ConfigDict, directory: Path, last: dict[str, Any]) -> bool:
    """Evaluate the final weights of a run on its training split, and write the result; whether that was done.

    `last` is the record of its last evaluation. Nothing is done again, nor for a run without its last checkpoint.
    """
    if read(directory, last) is not None:
        return False
    logger.info("%s, seed %d: evaluating its training images", entry.label, config.seed)
    if entry.framework == TORCH:
        from jaxnets import compare_torch

        metrics = compare_torch.evaluate_training(config, directory, last["step"])
    else:
        metrics = _evaluate(config, directory, last["step"])
    if metrics is None:
        logger.info("%s, seed %d: not evaluated, since its last checkpoint is gone", entry.label, config.seed)
        return False
    logger.info(
        "%s, seed %d: accuracy %.2f%% on its training images", entry.label, config.seed, 100 * metrics["accuracy"]
    )
    with writing(directory / FILE), replacing(directory / FILE) as scratch:
        scratch.write_text(json.dumps(_key(last) | {"accuracy": metrics["accuracy"], "loss": metrics["loss"]}) + "\n")
    return True


def _evaluate(config: ml_collections.ConfigDict, directory: Path, step: int) -> dict[str, Any] | None:
    if checkpoint.latest_step(directory) != step:
        return None
    run = load_run(directory, step, ema=config.ema_decay > 0)
    split = data.open_split(
        config.dataset, config.train_split, config.data_dir, image_size=config.image_size, crop=config.crop
    )
    return evaluate_split(run.model, run.variables, split, config)


def read(directory: Path, last: dict[str, Any]) -> float | None:
    """The accuracy that `measure` wrote for these weights, if it did: a run may have been trained again since."""
    try:
        found = parse_json(read_text(directory / FILE, MAX_BYTES))
        return float(found["accuracy"]) if _key(found) == _key(last) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError, OverflowError):  # UserError is a ValueError
        return None


def _key(record: dict[str, Any]) -> dict[str, Any]:
    """What tells the weights of an evaluation from others of the run."""
    return {name: record[name] for name in ("step", "eval_loss")}
