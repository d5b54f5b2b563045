"""What a checkpoint holds, verified as it is read: weights for evaluation, the whole state to resume a run."""

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxnets import distributed
from jaxnets.checkpoint import NO_TOTALS, Totals, open_reader
from jaxnets.checkpoint_damage import DamagedError, digest, is_as_written, passing, set_aside
from jaxnets.errors import UserError, first_line
from jaxnets.runtime import logger
from jaxnets.state import TrainState

NUMBERS = "fiubV"  # kinds of NumPy's types; V is bfloat16
# Arrays compress, but not by this ratio; the slack is allowed on top.
MAX_RATIO, MAX_SLACK = 16, 1 << 26


def restore_item(manager: ocp.CheckpointManager, step: int, name: str) -> Any:
    """One item as a tree of NumPy arrays, whatever devices it was written from.

    Raises DamagedError if it is not what was written, and UserError if it cannot be read now.
    """
    where = f"checkpoint {step} in {manager.directory}"
    try:
        written = _restore_record(manager, step)["digests"].get(name)
        _require_honest_size(manager, step, name)
        # NumPy arrays, or Orbax would look for the devices that wrote them.
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), manager.item_metadata(step)[name].tree)
        tree = manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(target)}))[name]
    except Exception as error:  # Orbax and TensorStore may raise anything for a damaged file
        if why := passing(error):
            raise UserError(f"{where} cannot be read now ({why}); it is unchanged") from error
        raise DamagedError(f"{where} is incomplete or damaged: {first_line(error)}") from error
    tree = jax.tree.map(np.asarray, tree)
    if not isinstance(tree, dict) or not all(leaf.dtype.kind in NUMBERS for leaf in jax.tree.leaves(tree)):
        raise DamagedError(f"{where} is damaged: {name} is not a tree of arrays of numbers")
    if digest(tree) != written:
        raise DamagedError(f"{where} is damaged: {name} differs from what was written")
    return tree


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


def restore_variables(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """`{'params', 'batch_stats'}` of one checkpoint, NumPy arrays; raises as `restore_item`."""
    return {"params": {}, "batch_stats": {}} | restore_item(manager, step, "variables")


def restore_ema(manager: ocp.CheckpointManager, step: int) -> dict[str, Any] | None:
    """The averaged variables of one checkpoint, or None where the run kept none."""
    if "rest" not in manager.item_metadata(step):
        return None
    return restore_item(manager, step, "rest").get("ema")


def restore_state(manager: ocp.CheckpointManager, step: int, template: TrainState) -> tuple[TrainState, Totals]:
    """The state of one checkpoint, NumPy arrays in the structure of `template`, and the unreported totals.

    Raises DamagedError, and UserError if the checkpoint is of another model or optimizer.
    """
    variables = restore_variables(manager, step)
    require_same_shapes(variables, template.variables, f"checkpoint {step} in {manager.directory}")
    rest = restore_item(manager, step, "rest")
    expected = {name: getattr(template, name) for name in ("step", "opt_state", "ema")}
    where = f"the optimizer state of checkpoint {step} in {manager.directory}"
    other = "optimizer, or version of jaxnets (its weights can still be evaluated, or used by config.init_from)"
    require_same_shapes(rest, flax.serialization.to_state_dict(expected), where, other)
    values = flax.serialization.from_state_dict(expected, rest)
    state = template.replace(**variables, **values)
    record = _restore_record(manager, step)
    totals = record.get("totals")
    if not isinstance(totals, dict) or not all(_is_finite(totals.get(name)) for name in NO_TOTALS):
        raise DamagedError(f"{where} lacks the sums of the training examples")
    if not is_as_written(record, "totals", totals):
        raise DamagedError(f"{where} is damaged: the sums saved with it differ from what was written")
    return state, totals


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):  # no number, or one beyond floats
        return False


def require_same_shapes(found, expected, where: str, other: str = "model") -> None:
    """UserError naming the first array in which `found` and `expected` differ; `other` is what must differ then."""
    found, expected = _shapes(found), _shapes(expected)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            has, wants = (shapes.get(name, "no such array") for shapes in (found, expected))
            raise UserError(f"{where} is of another {other}: {name} is {has} in it, but {wants} in this configuration")


def _shapes(tree) -> dict[str, tuple]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def restore_latest(manager: ocp.CheckpointManager, template: TrainState) -> tuple[TrainState, Totals] | None:
    """The newest whole checkpoint, as from `restore_state`; None if the run has saved nothing yet.

    Damaged newer ones are reported and moved to `damaged/`. If none is whole, UserError, and nothing is moved: a run
    that has saved something never starts over silently.
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
            logger.warning("%s; moved to %s", error, set_aside(Path(manager.directory), str(bad_step)))
        if damaged:
            manager.reload()
        return restored
    if damaged:
        raise UserError(
            f"no checkpoint in {manager.directory} is intact ({damaged[0][1]}); to start over, choose another workdir"
        )
    return None


def restore_agreed(manager: ocp.CheckpointManager, template: TrainState) -> tuple[TrainState, Totals] | None:
    """`restore_latest`; with several processes, process 0 chooses the checkpoint and all restore it."""
    if not distributed.many():
        return restore_latest(manager, template)
    found, workdir = [], Path(manager.directory).parent

    def choose() -> int | None:
        with closing(open_reader(workdir)) as reader:
            found.append(restore_latest(reader, template))
        return found[0] and int(found[0][0].step)

    at = distributed.on_primary(choose)
    manager.reload()  # without what has been set aside
    if not found and at is not None:
        with closing(open_reader(workdir)) as reader:
            found.append(restore_state(reader, at, template))
    return found[0] if found else None
