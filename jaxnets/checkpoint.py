"""Orbax checkpoints of a run: the latest few and the best, each verified when it is read."""

import errno
import hashlib
import itertools
import json
import math
import os
import re
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
from jaxnets.checkpoint_manager import DELETED, Manager
from jaxnets.errors import UserError, first_line, writing
from jaxnets.plain_files import parse_json, read_text
from jaxnets.runtime import drop_late_answers, logger
from jaxnets.state import TrainState

BEST_METRIC = "eval_accuracy"
METRICS = "metrics"  # Orbax's name for the item, and for the file in it
NUMBERS = "fiubV"  # kinds of NumPy's types; V is bfloat16
# Seconds that a save may take. Orbax counts them by the time of day: one set forward by 20 minutes would end the run.
PATIENCE = 10 * 365 * 86400
# To whom training diverges; in another workdir, since a run only goes on as it was configured.
ADVICE = "a lower config.optimizer.learning_rate, or config.optimizer.clip_norm=1, usually helps, in a new workdir"
# By which the system says that a file cannot be read now.
PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
MAX_RECORD = 1 << 20  # bytes of a checkpoint's JSON files
# Arrays compress, but not like this; what is smaller than the slack may.
MAX_RATIO, MAX_SLACK = 16, 1 << 26

Totals = dict[str, float]  # sums over the training examples since the last report
NO_TOTALS: Totals = {"loss": 0.0, "correct": 0, "count": 0}


class DamagedError(UserError):
    """A checkpoint that is there but is not what was written."""


def open_manager(workdir: Path, keep: int | None = None) -> ocp.CheckpointManager:
    """The checkpoints of a workdir; with `keep` for writing: that many of the latest, and the best, are kept.

    Raises UserError where there are none to read, or what lies there is something else.
    """
    directory = (workdir / "checkpoints").resolve()
    if keep is None:
        if not directory.is_dir():
            raise UserError(f"{workdir} has no checkpoints: {directory} is missing")
        return _open_reader(directory)
    distributed.on_primary(partial(_set_damaged_evaluations_aside, directory))
    best = [
        preservation_policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        for score in (_score, _averaged_score)
    ]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), *best]),
        best_fn=_score,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(timeout_secs=PATIENCE),
    )
    return _open(directory, options)


def _open_reader(directory: Path) -> ocp.CheckpointManager:
    """A manager that reads, each process on its own: nothing in it waits for another process."""
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
    drop_late_answers()
    processes = {"multiprocessing_options": options.multiprocessing_options}
    handlers = {
        "variables": ocp.StandardCheckpointHandler(**processes),
        "rest": ocp.StandardCheckpointHandler(**processes),
        "record": ocp.JsonCheckpointHandler(**processes),
    }
    try:
        return Manager(directory, options=options, item_handlers=handlers)
    except Exception as error:  # Orbax reads all metrics at once, and raises what it will for those that are damaged
        if isinstance(error, OSError) and not options.read_only:
            with writing(directory):
                raise
        raise UserError(f"{directory} cannot be read as the checkpoints of a run: {first_line(error)}") from error


def _set_damaged_evaluations_aside(directory: Path) -> None:
    """Move the metrics of checkpoints that are not what was written away from them, and say so.

    Orbax opens no checkpoint at all where those of one cannot be read. The checkpoint is as good as one that has not
    been evaluated: the run will do that again if it goes on there.
    """
    for file in directory.glob(f"*/{METRICS}/{METRICS}"):
        step = file.parents[1].name
        try:
            metrics = parse_json(read_text(file, MAX_RECORD))
            record = parse_json(read_text(directory / step / "record" / "metadata", MAX_RECORD))
            whole = math.isfinite(_score(metrics)) and _is_as_written(record, METRICS, metrics)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if why := _passing(error):
                raise UserError(f"{file} cannot be read now ({why}); it is as it was") from error
            whole = False
        if not whole:
            moved = _set_aside(directory, f"{step}/{METRICS}")
            logger.warning("the evaluation of checkpoint %s in %s is damaged; moved to %s", step, directory, moved)


def exists(workdir: Path) -> bool:
    """Whether a workdir has a finished checkpoint, whole or not."""
    return latest_step(workdir) is not None


def latest_step(workdir: Path) -> int | None:
    """The step of a workdir's latest finished checkpoint, whole or not; None where it has none."""
    directory = workdir / "checkpoints"
    # What was to be replaced may still lie among the deleted ones, from where it comes back.
    names = (path.name for place in (directory, directory / DELETED) for path in place.glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _score(metrics: dict[str, float]) -> float:
    return metrics[BEST_METRIC]


def _averaged_score(metrics: dict[str, float]) -> float:
    """Of the averaged weights, where the run has them."""
    return metrics.get(f"ema_{BEST_METRIC}", _score(metrics))


def _digest(tree) -> str:
    """SHA-256 over the names, types and bytes of all arrays."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def _is_as_written(record: dict[str, Any], name: str, value: Any) -> bool:
    """Whether a record has the digest of a JSON value, or none, as those of earlier versions."""
    digests = record["digests"]
    return name not in digests or digests[name] == _json_digest(value)


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    totals: Totals,
    metrics: dict[str, float] | None,
) -> None:
    """Write the state under its step, in the background; in place of what an interruption saved there.

    `variables` stand apart from the rest: they are all that evaluation needs. `totals` are the training
    sums not reported yet. `metrics` decide which checkpoint is the best; None for one without an evaluation.
    """
    # Copied, since training goes on in the very buffers (they are donated) while Orbax writes.
    host = jax.tree.map(np.array, jax.device_get(state))
    rest = {"step": host.step, "opt_state": host.opt_state, "ema": host.ema}
    items = {"variables": host.variables, "rest": flax.serialization.to_state_dict(rest)}
    step = int(host.step)
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((host.variables, host.ema)))
    # An optimizer may well have an infinity: it divides by it.
    if not finite or any(np.isnan(leaf).any() for leaf in jax.tree.leaves(host.opt_state)):
        raise UserError(f"the weights are no longer finite at step {step}; {last_good(manager)}; {ADVICE}")
    _save_items(manager, step, items, totals, metrics)


def last_good(manager: ocp.CheckpointManager) -> str:
    """From where a run that went astray may go on, for its user."""
    manager.wait_until_finished()
    kept = manager.latest_step()
    return "there is no checkpoint yet" if kept is None else f"the last good checkpoint is step {kept}"


def save_variables(workdir: Path, variables: dict[str, Any]) -> None:
    """Write weights from elsewhere as the one checkpoint, step 0, of a new workdir."""
    manager = open_manager(workdir, keep=1)
    variables = jax.tree.map(np.asarray, {name: variables[name] for name in ("params", "batch_stats")})
    _save_items(manager, 0, {"variables": variables}, {}, None)
    manager.close()


def _save_items(manager: ocp.CheckpointManager, step: int, items: dict[str, Any], totals, metrics) -> None:
    digests = {name: _digest(tree) for name, tree in items.items()}
    if distributed.many():
        # Each process writes a part, so the parts must be of one whole. They are not where processors round
        # differently: where machines of several kinds are mixed.
        distributed.require_agreement(f"the state at step {step}", json.dumps(digests))
        items = step_lib.replicate(items, distributed.devices())
    digests |= {"totals": _json_digest(totals), METRICS: _json_digest(metrics)}
    record = {"digests": digests, "totals": totals}
    manager.save(
        step,
        metrics=metrics,
        args=ocp.args.Composite(
            record=ocp.args.JsonSave(record),
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
        ),
    )


def restore_item(manager: ocp.CheckpointManager, step: int, name: str) -> Any:
    """One item as a tree of NumPy arrays, whatever devices it was written from."""
    where = f"checkpoint {step} in {manager.directory}"
    try:
        digest = _restore_record(manager, step)["digests"].get(name)
        _require_honest_size(manager, step, name)
        # NumPy arrays, or Orbax would look for the devices that wrote them.
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), manager.item_metadata(step)[name].tree)
        tree = manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(target)}))[name]
    except Exception as error:  # Orbax and TensorStore raise what they will for a damaged file
        if why := _passing(error):
            raise UserError(f"{where} cannot be read now ({why}); it is as it was") from error
        raise DamagedError(f"{where} is incomplete or damaged: {first_line(error)}") from error
    tree = jax.tree.map(np.asarray, tree)
    if not isinstance(tree, dict) or not all(leaf.dtype.kind in NUMBERS for leaf in jax.tree.leaves(tree)):
        raise DamagedError(f"{where} is damaged: {name} is not a tree of arrays of numbers")
    if _digest(tree) != digest:
        raise DamagedError(f"{where} is damaged: {name} differs from what was written")
    return tree


def _passing(error: BaseException | None) -> str | None:
    """What the system said where it is to blame rather than the file: no right to read it, too many open files."""
    while error is not None:
        number = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's
        number = int(number[1]) if number else getattr(error, "errno", None)
        if isinstance(error, MemoryError) or number in PASSING:
            return os.strerror(number or errno.ENOMEM)
        error = error.__cause__ or error.__context__
    return None


def _require_honest_size(manager: ocp.CheckpointManager, step: int, name: str) -> None:
    """ValueError for arrays that claim far more memory than the files that hold them."""
    folder = Path(manager.directory) / str(step) / name
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    arrays = jax.tree.leaves(manager.item_metadata(step)[name].tree)
    claimed = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)
    if claimed > MAX_SLACK + MAX_RATIO * on_disk:
        raise ValueError(f"{name} claims {claimed} bytes and has {on_disk}")


def _restore_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record


def any_evaluated(workdir: Path) -> bool:
    """Whether a workdir has a checkpoint that can be the best, or none at all."""
    with closing(open_manager(workdir)) as manager:
        steps = manager.all_steps()
        return len(steps) <= 1 or any(manager.metrics(step) for step in steps)


def _shapes(tree) -> dict[str, tuple]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def require_same_shapes(found, expected, where: str, other: str = "model") -> None:
    """UserError naming the first array in which a checkpoint and a net differ: it is of an `other`."""
    found, expected = _shapes(found), _shapes(expected)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            has, wants = (shapes.get(name, "no such array") for shapes in (found, expected))
            raise UserError(f"{where} is of another {other}: {name} is {has} in it, and {wants} by this configuration")


def restore_variables(manager: ocp.CheckpointManager, step: int, expected) -> dict[str, Any]:
    """`{'params', 'batch_stats'}` of one checkpoint, NumPy arrays of the shapes in `expected`.

    Raises DamagedError, and UserError if the checkpoint is of another model.
    """
    tree = {"params": {}, "batch_stats": {}} | restore_item(manager, step, "variables")
    require_same_shapes(tree, expected, f"checkpoint {step} in {manager.directory}")
    return tree


def restore_ema(manager: ocp.CheckpointManager, step: int) -> dict[str, Any] | None:
    """The averaged variables of one checkpoint, or None where the run kept none."""
    if "rest" not in manager.item_metadata(step):
        return None
    return restore_item(manager, step, "rest").get("ema")


def restore_state(
    manager: ocp.CheckpointManager, step: int, template: TrainState
) -> tuple[TrainState, dict[str, float]]:
    """The state of one checkpoint, NumPy arrays in the structure of `template`, and the unreported totals.

    Raises DamagedError, and UserError if the checkpoint is of another model or optimizer.
    """
    variables = restore_variables(manager, step, template.variables)
    rest = restore_item(manager, step, "rest")
    expected = {name: getattr(template, name) for name in ("step", "opt_state", "ema")}
    where = f"the optimizer state of checkpoint {step} in {manager.directory}"
    other = "optimizer, or version of jaxnets (its weights can be evaluated, and are config.init_from's to start from)"
    require_same_shapes(rest, flax.serialization.to_state_dict(expected), where, other)
    values = flax.serialization.from_state_dict(expected, rest)
    state = template.replace(**variables, **values)
    record = _restore_record(manager, step)
    totals = record.get("totals")
    if not isinstance(totals, dict) or not all(_is_finite(totals.get(name)) for name in NO_TOTALS):
        raise DamagedError(f"{where} has no sums of the training examples beside it")
    if not _is_as_written(record, "totals", totals):
        raise DamagedError(f"{where} is damaged: the sums beside it differ from what was written")
    return state, totals


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):  # no number, or one beyond floats
        return False


def restore_latest(manager: ocp.CheckpointManager, template: TrainState) -> tuple[TrainState, dict[str, float]] | None:
    """The newest checkpoint that is whole, as `restore_state`; None where the run has saved nothing yet.

    Damaged newer ones are said so and set aside, in `damaged/` beside the others. UserError if none is whole,
    and nothing is moved: a run that has saved something never starts over silently.
    """
    damaged: list[tuple[int, DamagedError]] = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            restored = restore_state(manager, step, template)
        except DamagedError as error:
            damaged.append((step, error))
            continue
        # Only now, so that a run without a whole checkpoint stays as it was found.
        for bad_step, error in damaged:
            logger.warning("%s; moved to %s", error, _set_aside(Path(manager.directory), str(bad_step)))
        if damaged:
            manager.reload()
        return restored
    if damaged:
        raise UserError(
            f"no checkpoint in {manager.directory} is whole ({damaged[0][1]}); to start over, choose another workdir"
        )
    return None


def restore_agreed(manager: ocp.CheckpointManager, template: TrainState) -> tuple[TrainState, dict[str, float]] | None:
    """`restore_latest`; of several processes the first chooses the checkpoint, and all restore it."""
    if not distributed.many():
        return restore_latest(manager, template)
    found = []

    def choose() -> int | None:
        with closing(_open_reader(Path(manager.directory))) as reader:
            found.append(restore_latest(reader, template))
        return found[0] and int(found[0][0].step)

    at = distributed.on_primary(choose)
    manager.reload()  # without what has been set aside
    if not found and at is not None:
        with closing(_open_reader(Path(manager.directory))) as reader:
            found.append(restore_state(reader, at, template))
    return found[0] if found else None


def _set_aside(directory: Path, name: str) -> Path:
    """Move a checkpoint, or a part of one, to `damaged/` beside the checkpoints: where it then is."""
    folder = directory.parent / "damaged"
    names = (f"{name.replace('/', '.')}.{number}" for number in itertools.count(1))
    target = next(folder / name for name in names if not (folder / name).exists())
    with writing(directory):
        folder.mkdir(exist_ok=True)
        (directory / name).rename(target)
    return target


def find_step(manager: ocp.CheckpointManager, which: str, *, ema: bool = False) -> int:
    """The step that "best", "latest" or a number names; UserError listing what exists.

    With `ema` the best is that of the averaged weights.
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
        if not scores and len(steps) == 1:  # as weights from elsewhere are
            return steps[0]
        if not scores:
            raise UserError(f"no checkpoint in {manager.directory} has been evaluated; take latest or a step")
        return max(scores, key=lambda step: (scores[step], step))
    if which in map(str, steps):
        return int(which)
    raise UserError(f"no checkpoint {which!r} in {manager.directory}; there are best, latest, {steps}")
