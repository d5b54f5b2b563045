"""A training run from its configuration to its last number: set up, train by epochs, evaluate, save."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from jaxnets import (
    augment,
    checkpoint,
    distributed,
    evaluate,
    interruption,
    machine,
    optim,
    runtime,
    settings,
    state,
    step,
    workdir,
)
from jaxnets.datasets import absolute, data_root
from jaxnets.dispatch import call_lengths, load_examples, make_dispatch, steps_per_call, train_calls
from jaxnets.errors import UserError
from jaxnets.journal import Journal, read_strictly
from jaxnets.plan import Plan, compile_and_create_state, load_initial_weights, make_plan, make_schedule, state_shapes
from jaxnets.progress import Progress
from jaxnets.report import LivePage
from jaxnets.runtime import logger
from jaxnets.timing import Clock

Totals = dict[str, float]  # sums over the training examples since the last report
USUAL_DECAY = 0.01  # at most, where it is added to the gradient
NO_TOTALS: Totals = {"loss": 0.0, "correct": 0, "count": 0}


def train(config: ml_collections.ConfigDict, directory: str | Path) -> dict[str, Any]:
    """Train the run of `config` in a workdir, or go on with it; returns the last evaluation's record.

    Raises UserError for bad input, before any long work, and for a loss that is no longer finite.
    On SIGINT and SIGTERM SystemExit is raised with the status the shell expects; from the first step on, when the
    state is saved.
    """
    with interruption.raised():
        return _train(config, Path(directory))


def _train(config: ml_collections.ConfigDict, directory: Path) -> dict[str, Any]:
    clock = Clock(directory)
    runtime.configure_logging()
    settings.check(config)
    if config.deterministic:
        runtime.make_deterministic()
    config = config.copy_and_resolve_references()
    # Kept in the workdir, so that evaluation finds the data wherever it is started, in whatever environment.
    config.data_dir = str(data_root(config.data_dir).resolve())
    config.dataset = absolute(config.dataset)
    if config.compilation_cache:
        runtime.enable_compilation_cache()
    workdir.check(directory, config)
    initialise = bool(config.init_from) and not checkpoint.exists(directory)
    if initialise and not Path(config.init_from).expanduser().exists():
        raise UserError(f"config.init_from={config.init_from!r}: there is no such file or workdir")
    distributed.require_agreement("the configuration", json.dumps(settings.as_dict(config) | {"data_dir": None}))
    plan = distributed.primary_first(partial(make_plan, config))
    template = state_shapes(plan)
    # Before the workdir is claimed: weights that cannot be had leave no trace of this run.
    weights = load_initial_weights(plan) if initialise else None
    with (
        workdir.claim(directory, config) as before,
        closing(checkpoint.open_manager(directory, config.keep_checkpoints)) as manager,
        ThreadPoolExecutor(1) as background,
    ):
        saved = checkpoint.restore_agreed(manager, template) if before else None
        start, totals = saved or (None, dict(NO_TOTALS))
        at = int(start.step) if saved else 0
        if at > plan.total_steps:
            raise UserError(
                f"the run in {directory} is at step {at}, beyond config.num_epochs={config.num_epochs}, "
                f"which ends at {plan.total_steps}; its checkpoints are as they were"
            )
        require_same_data(plan, directory, at)
        distributed.on_primary(partial(workdir.keep, directory, config))
        if at < plan.total_steps:
            distributed.on_primary(partial(machine.note, directory))
        # XLA compiles this while the training step is traced, which takes as long.
        create = None if saved else background.submit(compile_and_create_state, plan, weights)
        if distributed.is_primary():
            announce(plan, directory, at, before)
        evaluated = bool(saved and manager.metrics(at))
        with (
            closing(Journal(directory, at, evaluated)) as journal,
            closing(LivePage(directory, plan.eval_split)) as page,
        ):
            return fit(plan, at, create.result if create else lambda: start, totals, manager, journal, clock, page)


def require_same_data(plan: Plan, directory: Path, at: int) -> None:
    """UserError where the run up to step `at` had another number of images than there are now."""
    steps, examples = plan.steps_per_epoch, len(plan.eval_split)
    for record in read_strictly(directory):
        epoch, evaluated = math.ceil(record["step"] / steps), record.get("num_examples", examples)
        if record["step"] <= at and (record["epoch"], evaluated) != (epoch, examples):
            raise UserError(
                f"the run in {directory} had other data: now there are {steps} steps an epoch and {examples} images of "
                f"evaluation, where its record of step {record['step']} is of epoch {record['epoch']} and {evaluated} "
                "images"
            )


def announce(plan: Plan, directory: Path, at: int, before: ml_collections.ConfigDict | None) -> None:
    """Say what starts, or goes on, and what of it may not be meant."""
    config = plan.config
    logger.info(
        "%s on %s: %d training and %d evaluation images, %d epochs of %d steps of %d images, %s, %d %s device(s)",
        config.model.name,
        config.dataset,
        len(plan.train_split),
        len(plan.eval_split),
        config.num_epochs,
        plan.steps_per_epoch,
        config.batch_size,
        settings.compute_dtype(config.model.dtype),
        len(plan.devices),
        plan.devices[0].platform,
    )
    if config.optimizer.name in optim.COUPLED and config.optimizer.weight_decay > USUAL_DECAY:
        logger.warning(
            "config.optimizer.weight_decay=%g under %s is added to the gradient, where 5e-4 is usual; that of muon, "
            "adamw and lion is decoupled, and larger",
            config.optimizer.weight_decay,
            config.optimizer.name,
        )
    if not at:
        logger.info("a new run in %s", directory)
        return
    logger.info("going on with the run in %s at step %d of %d", directory, at, plan.total_steps)
    if before.data_dir != config.data_dir:
        logger.warning("data_dir was %s and is now %s: it must hold the same images", before.data_dir, config.data_dir)
    if before.num_epochs != config.num_epochs:
        announce_length(plan, at, before)


def announce_length(plan: Plan, at: int, before: ml_collections.ConfigDict) -> None:
    """Say whether another number of epochs than `before` changes the learning rate, or makes the images small again."""
    config = plan.config
    schedules = make_schedule(before, plan.steps_per_epoch), plan.schedule
    last_of_both = min(before.num_epochs, config.num_epochs) * plan.steps_per_epoch - 1
    if any(schedules[0](there) != schedules[1](there) for there in (0, at - 1, at, last_of_both)):
        logger.warning(
            "num_epochs was %d and is now %d: the %s schedule follows the new length from step %d on, so this "
            "run is neither the shorter nor the longer one made in one go (learning rate now %.3g)",
            before.num_epochs,
            config.num_epochs,
            config.schedule.name,
            at,
            plan.schedule(at),
        )
    epoch = at // plan.steps_per_epoch
    done = (at - 1) // plan.steps_per_epoch  # the epoch of the last step
    last = augment.progressive_size(before.progressive_sizes, config.image_size, done, before.num_epochs)
    if epoch < config.num_epochs and plan.training_size(epoch) < last:
        logger.warning(
            "num_epochs was %d and is now %d: config.progressive_sizes are shared out anew, and images of %d pixels "
            "are followed by smaller ones, of %d",
            before.num_epochs,
            config.num_epochs,
            last,
            plan.training_size(epoch),
        )


@dataclasses.dataclass(frozen=True)
class Running:
    """What the epochs of a run share: its compiled steps, and where its numbers and states go."""

    plan: Plan
    dispatch: dict[int, Callable]  # by side of the images: (state, batches) -> (state, TrainMetrics) of one call
    calls: Iterator[dict[str, np.ndarray]]  # what is dispatched, from the first step of this start on
    evaluator: evaluate.Evaluator
    manager: ocp.CheckpointManager
    journal: Journal
    clock: Clock
    page: LivePage
    progress: Progress
    interruption: interruption.Interruption


def fit(
    plan: Plan,
    at: int,
    start: Callable[[], state.TrainState],
    totals: Totals,
    manager: ocp.CheckpointManager,
    journal: Journal,
    clock: Clock,
    page: LivePage,
) -> dict[str, Any]:
    """Train from the state that `start` gives, of step `at`, to the plan's last; the last evaluation's record."""
    if at >= plan.total_steps and journal.last_evaluation(at):
        logger.info("nothing left to do: the run has its %d epochs", at // plan.steps_per_epoch)
        if distributed.is_primary():
            page.redraw()  # a kill may have come before it
        return journal.last_evaluation(at)
    clock.step = at
    with clock.phase("read data"):
        examples, eval_examples = load_examples(plan)
    per_call = steps_per_call(plan.config.steps_per_call, plan.steps_per_epoch, at)
    with clock.phase("compile"):
        lengths = call_lengths(plan, per_call, at)
        dispatch = {size: make_dispatch(plan, examples, counts, size) for size, counts in lengths.items()}
        current = step.replicate(start(), plan.devices)
    asked = distributed.interruption(plan.devices)
    with (
        closing(train_calls(plan, bool(examples), per_call, at)) as calls,
        interruption.deferred(asked),
        Progress(at, plan.total_steps, plan.steps_per_epoch) as progress,
    ):
        evaluator = evaluate.make_evaluator(
            plan.model, plan.eval_split, eval_examples, plan.config, plan.devices, asked.raise_if_asked
        )
        run = Running(plan, dispatch, calls, evaluator, manager, journal, clock, page, progress, asked)
        try:
            # A run that was interrupted while it evaluated goes on there, as does one that lost its record.
            at_an_end = at and at % plan.steps_per_epoch == 0
            if at_an_end and not (manager.metrics(at) and journal.last_evaluation(at)):
                finish_epoch(run, current, at)
            while at < plan.total_steps:
                with clock.phase("train"):
                    current, at = train_epoch(run, current, at, totals)
                totals = dict(NO_TOTALS)
                finish_epoch(run, current, at)
            manager.wait_until_finished()  # before a signal may end it
            asked.raise_if_asked()
        except interruption.Interrupted:
            manager.wait_until_finished()
            saved = manager.latest_step() or 0
            if distributed.is_primary():
                clock.write(saved)
            logger.info("saved step %d; the same command goes on from there", saved)
            raise SystemExit(asked.status) from None
    return journal.last_evaluation(at)


def train_epoch(run: Running, current: state.TrainState, at: int, totals: Totals) -> tuple[state.TrainState, int]:
    """Train from step `at` to the end of its epoch, reporting on the way: the state and its step.

    The devices work on one call while the host reads the metrics of the one before. An interruption
    saves the state and raises Interrupted.
    """
    plan = run.plan
    epoch = at // plan.steps_per_epoch
    end = (epoch + 1) * plan.steps_per_epoch
    dispatch = run.dispatch[plan.training_size(epoch)]
    dispatched = at
    began, seen = time.perf_counter(), 0
    in_flight: list[Future] = []

    def settle() -> None:
        nonlocal at, totals, began, seen
        metrics, now = in_flight.pop(0).result()
        require_finite(metrics.loss, at, run.manager)
        before, at = at, at + len(metrics.loss)
        images = len(metrics.loss) * plan.config.batch_size
        seen += images
        totals = add(totals, metrics, plan.config.batch_size)
        run.progress.advance(at, totals, seen / (now - began))
        every = plan.config.log_every_steps
        if at // every > before // every or at % plan.steps_per_epoch == 0:
            report(run, at, totals, seen / (now - began))
            totals, began, seen = dict(NO_TOTALS), now, 0

    with ThreadPoolExecutor(1) as reader:
        while dispatched < end and not run.interruption.asked():
            with run.clock.phase("wait for data"):
                batches = next(run.calls)
            current, metrics = dispatch(current, batches)
            in_flight.append(reader.submit(read, metrics))
            dispatched += metrics.loss.shape[0]
            if len(in_flight) > 1:
                settle()
        while in_flight:
            settle()
    if at != end:
        with run.clock.phase("checkpoint"):
            save_unless_saved(run, current, at, totals)
        run.interruption.raise_if_asked()
    return current, at


def read(metrics: step.TrainMetrics) -> tuple[step.TrainMetrics, float]:
    """The metrics of a call as NumPy arrays, and the second at which the devices had them.

    To a few milliseconds, in a thread of its own: the loop asks later, after it has waited for data or, on a CPU,
    computed the next call.
    """
    return jax.tree.map(np.asarray, metrics), time.perf_counter()


def add(totals: Totals, metrics: step.TrainMetrics, batch_size: int) -> Totals:
    """The totals with the steps of one call added, in float64."""
    return {
        "loss": totals["loss"] + float(metrics.loss.astype(np.float64).sum()) * batch_size,
        "correct": totals["correct"] + int(metrics.correct.sum()),
        "count": totals["count"] + len(metrics.loss) * batch_size,
    }


def require_finite(losses: np.ndarray, at: int, manager: ocp.CheckpointManager) -> None:
    """UserError naming the step of the first loss that is NaN or infinite; checkpoints stay as they are."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise UserError(
            f"the loss became {losses[bad[0]]} at step {at + int(bad[0]) + 1}; {checkpoint.last_good(manager)}; a "
            "lower config.optimizer.learning_rate, or config.optimizer.clip_norm=1, usually helps"
        )


def require_finite_evaluation(metrics: dict[str, float], at: int, manager: ocp.CheckpointManager) -> None:
    """UserError where the evaluation after step `at` has a loss that is NaN or infinite."""
    for loss in (value for name, value in metrics.items() if name.endswith("eval_loss")):
        if not math.isfinite(loss):
            raise UserError(
                f"the evaluation loss became {loss} after step {at}; {checkpoint.last_good(manager)}; a lower "
                "config.optimizer.learning_rate usually helps"
            )


def report(run: Running, at: int, totals: Totals, images_per_second: float) -> None:
    """Write one train record."""
    record = {
        "step": at,
        "epoch": math.ceil(at / run.plan.steps_per_epoch),
        "loss": totals["loss"] / totals["count"],
        "accuracy": totals["correct"] / totals["count"],
        "learning_rate": float(run.plan.learning_rates[at - 1]),
        "images_per_second": round(images_per_second, 1),
    }
    run.journal.write(record)
    if not run.progress.shown:
        logger.info(
            f"step {at}, epoch {record['epoch']}: loss {record['loss']:.4f}, accuracy {record['accuracy']:.2%}, "
            f"learning rate {record['learning_rate']:.3g}, {images_per_second:.0f} images/s"
        )


def finish_epoch(run: Running, current: state.TrainState, at: int) -> None:
    """Evaluate and save where the epoch that ends at step `at` is due for it."""
    config = run.plan.config
    epoch, last = at // run.plan.steps_per_epoch, at >= run.plan.total_steps
    metrics = predictions = None
    if last or epoch % config.eval_every_epochs == 0:
        try:
            with run.clock.phase("evaluate"):
                metrics, predictions = evaluation(run, current, at)
        except Exception as error:  # a file that cannot be read, too: the epoch is not to be trained again
            # Alone: where one of several processes fails, the others do not come to save with it.
            if isinstance(error, interruption.Interrupted) or jax.process_count() == 1:
                save_unless_saved(run, current, at, NO_TOTALS)
            raise
        require_finite_evaluation(metrics, at, run.manager)
        run.journal.write({"step": at, "epoch": epoch} | metrics)
        logger.info(
            f"epoch {epoch}: evaluation loss {metrics['eval_loss']:.4f}, accuracy {metrics['eval_accuracy']:.2%}"
        )
    saved = at in run.manager.all_steps()  # by the interruption that this start goes on from
    if (last or epoch % config.checkpoint_every_epochs == 0) and not (saved and metrics is None):
        with run.clock.phase("checkpoint"):
            checkpoint.save(run.manager, current, NO_TOTALS, metrics)
    if distributed.is_primary():
        run.clock.write(at)
        if predictions:
            run.page.update(at, predictions)
    if not last and run.interruption.asked():
        save_unless_saved(run, current, at, NO_TOTALS, metrics)
        run.interruption.raise_if_asked()


def save_unless_saved(
    run: Running, current: state.TrainState, at: int, totals: Totals, metrics: dict[str, float] | None = None
) -> None:
    """Save where an interruption finds the run, at step `at`."""
    if at and at not in run.manager.all_steps():
        checkpoint.save(run.manager, current, totals, metrics)


def evaluation(run: Running, current: state.TrainState, at: int) -> tuple[dict[str, float], step.Predictions]:
    """The metrics of the weights, and of their moving average where the run keeps one; the weights' predictions."""
    record, predictions = {}, None
    for prefix, variables in (("eval", current.variables), ("ema_eval", current.ema)):
        if variables is None:
            continue
        metrics, predicted = run.evaluator(variables)
        predictions = predictions or predicted  # of the weights, which come first
        record |= {
            f"{prefix}_loss": metrics["loss"],
            f"{prefix}_accuracy": metrics["accuracy"],
            f"{prefix}_top5_accuracy": metrics["top5_accuracy"],
        }
    return record | {"num_examples": metrics["num_examples"]}, predictions
