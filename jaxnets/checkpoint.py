"""Orbax checkpoints of a run: the latest few and the best, with digests by which restore.py verifies them."""

import contextlib
import json
import math
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxnets import distributed
from jaxnets import step as step_lib
from jaxnets.checkpoint_damage import digest, is_as_written, json_digest, passing, set_aside
from jaxnets.checkpoint_manager import DELETED, Manager
from jaxnets.errors import UserError, first_line, writing
from jaxnets.interruption import drop_late_errors
from jaxnets.plain_files import parse_json, read_text
from jaxnets.runtime import logger
from jaxnets.state import TrainState

BEST_METRIC = "eval_accuracy"
METRICS = "metrics"  # Orbax's name for the item, and for the file in it
# Seconds that a save may take. Orbax goes by the time of day: a clock set forward by 20 minutes would end the run.
# Where processes wait for each other, only this timeout notices a failure in one of them.
PATIENCE_ALONE, PATIENCE_TOGETHER = 10 * 365 * 86400, 1800
# For users whose training diverges; in another workdir, since a run only resumes with its own configuration.
ADVICE = "a lower config.optimizer.learning_rate, or config.optimizer.clip_norm=1, usually helps, in a new workdir"
MAX_RECORD = 1 << 20  # bytes of a checkpoint's JSON files

Totals = dict[str, float]  # sums over the training examples since the last report
NO_TOTALS: Totals = {"loss": 0.0, "correct": 0, "count": 0}


def open_manager(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoints of a workdir, for writing: the `keep` latest and the best are kept.

    Raises UserError if something else is in their place.
    """
    directory = _directory(workdir)
    distributed.on_primary(partial(_set_damaged_evaluations_aside, directory))
    best = [
        preservation_policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        for score in (_score, _averaged_score)
    ]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), *best]),
        best_fn=_score,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(timeout_secs=PATIENCE_TOGETHER if distributed.many() else PATIENCE_ALONE),
    )
    return _open(directory, options)


def _directory(workdir: Path) -> Path:
    return (workdir / "checkpoints").resolve()


def open_reader(workdir: Path) -> ocp.CheckpointManager:
    """The checkpoints of a workdir, for reading by each process on its own: nothing in it waits for another process.

    Raises UserError if there are none, or something else is in their place.
    """
    directory = _directory(workdir)
    if not directory.is_dir():
        raise UserError(f"{workdir} has no checkpoints: {directory} is missing")
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(index, {index}, f"reader{index}") if distributed.many() else None
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        best_fn=_score,
        save_interval_steps=0,
        create=False,
        multiprocessing_options=alone or ocp.options.MultiprocessingOptions(),
    )
    return _open(directory, options)


def _open(directory: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    drop_late_errors()
    processes = {"multiprocessing_options": options.multiprocessing_options}
    handlers = {
        "variables": ocp.StandardCheckpointHandler(**processes),
        "rest": ocp.StandardCheckpointHandler(**processes),
        "record": ocp.JsonCheckpointHandler(**processes),
    }
    try:
        return Manager(directory, options=options, item_handlers=handlers)
    except Exception as error:  # Orbax reads all metrics at once, and may raise anything for damaged ones
        if isinstance(error, OSError) and not options.read_only:
            with writing(directory):
                raise
        raise UserError(f"{directory} cannot be read as the checkpoints of a run: {first_line(error)}") from error


def _set_damaged_evaluations_aside(directory: Path) -> None:
    """Move metrics that differ from what was written away from their checkpoints, and log it.

    Orbax opens no checkpoint at all if the metrics of one cannot be read. Such a checkpoint is as good as one that was
    not evaluated: a run that resumes from it evaluates it again.
    """
    for file in directory.glob(f"*/{METRICS}/{METRICS}"):
        step = file.parents[1].name
        try:
            metrics = parse_json(read_text(file, MAX_RECORD))
            record = parse_json(read_text(directory / step / "record" / "metadata", MAX_RECORD))
            whole = math.isfinite(_score(metrics)) and is_as_written(record, METRICS, metrics)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if why := passing(error):
                raise UserError(f"{file} cannot be read now ({why}); it is unchanged") from error
            whole = False
        if not whole:
            moved = set_aside(directory, f"{step}/{METRICS}")
            logger.warning("the evaluation of checkpoint %s in %s is damaged; moved to %s", step, directory, moved)


def exists(workdir: Path) -> bool:
    """Whether a workdir has a finished checkpoint, whole or not."""
    return latest_step(workdir) is not None


def latest_step(workdir: Path) -> int | None:
    """The step of a workdir's latest finished checkpoint, whole or not; None where it has none."""
    directory = workdir / "checkpoints"
    # One that was about to be replaced may still be among the deleted ones, from where it is brought back.
    names = (path.name for place in (directory, directory / DELETED) for path in place.glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=None)


def find_step(manager: ocp.CheckpointManager, which: str | int, *, ema: bool = False) -> int:
    """The step that "best", "latest" or a number names; else a UserError listing what exists.

    With `ema`, the best is the one whose averaged weights are best.
    """
    steps = sorted(manager.all_steps())
    if not steps:
        raise UserError(f"{manager.directory} holds no checkpoint")
    if which == "latest":
        return steps[-1]
    if which == "best":
        try:
            score = _averaged_score if ema else _score
            scores = {step: float(score(metrics)) for step in steps if (metrics := manager.metrics(step))}
        except Exception as error:
            raise UserError(f"the evaluations in {manager.directory} cannot be read: {first_line(error)}") from error
        if not scores and len(steps) == 1:  # as for weights from elsewhere
            return steps[0]
        if not scores:
            raise UserError(f"no checkpoint in {manager.directory} has been evaluated; use latest or a step")
        return max(scores, key=lambda step: (scores[step], step))
    if str(which) in map(str, steps):
        return int(which)
    raise UserError(f"no checkpoint {which!r} in {manager.directory}; there are best, latest, {steps}")


def has_best(workdir: Path) -> bool:
    """Whether to ask `find_step` for "best": a checkpoint was evaluated, or there is just one, or none at all."""
    with closing(open_reader(workdir)) as manager:
        steps = manager.all_steps()
        return len(steps) <= 1 or any(manager.metrics(step) for step in steps)


def _score(metrics: dict[str, float]) -> float:
    return metrics[BEST_METRIC]


def _averaged_score(metrics: dict[str, float]) -> float:
    """The score of the averaged weights, if the run has them."""
    return metrics.get(f"ema_{BEST_METRIC}", _score(metrics))


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    totals: Totals,
    metrics: dict[str, float] | None,
) -> None:
    """Write the state under its step, in the background, replacing what an interruption saved there.

    `variables` are separate from the rest: they are all that evaluation needs. `totals` are the training
    sums not reported yet. `metrics` decide which checkpoint is the best; None if it was not evaluated.
    """
    # Copied, since training continues in the same buffers (they are donated) while Orbax writes.
    host = jax.tree.map(np.array, jax.device_get(state))
    rest = {"step": host.step, "opt_state": host.opt_state, "ema": host.ema}
    items = {"variables": host.variables, "rest": flax.serialization.to_state_dict(rest)}
    step = int(host.step)
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((host.variables, host.ema)))
    # An optimizer's state may contain infinities, by which it divides.
    if not finite or any(np.isnan(leaf).any() for leaf in jax.tree.leaves(host.opt_state)):
        raise UserError(f"the weights are no longer finite at step {step}; {last_good(manager)}; {ADVICE}")
    _save_items(manager, step, items, totals, metrics)


def last_good(manager: ocp.CheckpointManager) -> str:
    """Which checkpoint a diverged run could be continued from, as a phrase for the user."""
    with contextlib.suppress(UserError):  # the user is told of something worse
        manager.wait_until_finished()
    kept = manager.latest_step()
    return "there is no checkpoint yet" if kept is None else f"the last good checkpoint is step {kept}"


def save_variables(workdir: Path, variables: dict[str, Any]) -> None:
    """Write weights from elsewhere as the only checkpoint, step 0, of a new workdir."""
    variables = jax.tree.map(np.asarray, {name: variables[name] for name in ("params", "batch_stats")})
    with closing(open_manager(workdir, keep=1)) as manager:
        _save_items(manager, 0, {"variables": variables}, {}, None)


def _save_items(manager: ocp.CheckpointManager, step: int, items: dict[str, Any], totals, metrics) -> None:
    digests = {name: digest(tree) for name, tree in items.items()}
    if distributed.many():
        # Each process writes a part, so all must have the same state. They do not if their processors round
        # differently, as in a mix of several kinds of machines.
        distributed.require_agreement(f"the state at step {step}", json.dumps(digests))
        items = step_lib.replicate(items, distributed.devices())
    digests |= {"totals": json_digest(totals), METRICS: json_digest(metrics)}
    record = {"digests": digests, "totals": totals}
    manager.save(
        step,
        metrics=metrics,
        args=ocp.args.Composite(
            record=ocp.args.JsonSave(record),
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
        ),
    )
