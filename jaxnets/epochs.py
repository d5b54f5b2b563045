"""The epochs of a run: trained call by call, reported, evaluated, saved."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxnets import checkpoint, distributed, interruption, state, step
from jaxnets.checkpoint import NO_TOTALS, Totals
from jaxnets.errors import UserError
from jaxnets.evaluator import Evaluator
from jaxnets.journal import Journal
from jaxnets.plan import Plan
from jaxnets.progress import Progress
from jaxnets.report import LivePage
from jaxnets.runtime import logger
from jaxnets.timing import Clock


@dataclasses.dataclass(frozen=True)
class Running:
    """What the epochs of a run share: its compiled steps, and where its numbers and states go."""

    plan: Plan
    compiled: dict[tuple[int, int], Callable]  # (side of the images, steps): (state, batches) -> (state, TrainMetrics)
    calls: Iterator[dict[str, np.ndarray]]  # what is dispatched, from the first step of this start on
    evaluator: Evaluator
    manager: ocp.CheckpointManager
    journal: Journal
    clock: Clock
    page: LivePage
    progress: Progress
    interruption: interruption.Interruption


@dataclasses.dataclass
class Reading:
    """How far the host has read what the devices computed, and what it has not reported yet."""

    at: int  # the step
    totals: Totals  # since the last report
    images: int  # since then, or since this start of the run: for the rate
    began: float  # when the devices began on them


def train_epoch(run: Running, current: state.TrainState, at: int, totals: Totals) -> tuple[state.TrainState, int]:
    """Train from step `at` to the end of its epoch, reporting on the way; returns the state and its step.

    The devices work on one call while the host reads the metrics of the previous one. An interruption
    within the epoch saves the state and raises Interrupted.
    """
    plan, every = run.plan, run.plan.config.checkpoint_every_steps
    epoch = at // plan.steps_per_epoch
    end = (epoch + 1) * plan.steps_per_epoch
    size = plan.training_size(epoch)
    dispatched, reading = at, Reading(at, totals, 0, time.perf_counter())
    in_flight: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(1) as reader:
        while dispatched < end and not run.interruption.asked():
            try:
                with run.clock.phase("wait for data"):
                    batches = next(run.calls)
            except UserError:  # a file cannot be read: save, so that the steps before it need not be repeated
                read_calls(run, reading, in_flight)
                save_alone(run, current, reading.at, reading.totals)
                raise
            _, count = next(iter(batches.values())).shape[:2]  # (devices, steps, ...)
            current, metrics = run.compiled[size, count](current, batches)
            in_flight.append(reader.submit(to_host, metrics))
            before, dispatched = dispatched, dispatched + count
            if every and dispatched // every > before // every and dispatched < end:
                read_calls(run, reading, in_flight)
                saving = time.perf_counter()
                save_unless_saved(run, current, reading.at, reading.totals)
                reading.began += time.perf_counter() - saving  # does not count towards the rate
            else:
                read_calls(run, reading, in_flight, left=1)
        read_calls(run, reading, in_flight)
    if reading.at != end:
        save_unless_saved(run, current, reading.at, reading.totals)
        run.interruption.raise_if_asked()
    return current, reading.at


def read_calls(run: Running, reading: Reading, in_flight: collections.deque[Future], left: int = 0) -> None:
    """Read the metrics of calls, oldest first, and report them where due, until only `left` are in flight."""
    config, per_epoch = run.plan.config, run.plan.steps_per_epoch
    while len(in_flight) > left:
        metrics, now = in_flight.popleft().result()
        require_finite(metrics.loss, reading.at, run.manager)
        before, reading.at = reading.at, reading.at + len(metrics.loss)
        reading.images += len(metrics.loss) * config.batch_size
        reading.totals = add_call(reading.totals, metrics, config.batch_size)
        rate = reading.images / (now - reading.began)
        run.progress.advance(reading.at, reading.totals, rate)
        start = before - before % per_epoch  # from which this epoch's reports are counted
        due = (reading.at - start) // config.log_every_steps > (before - start) // config.log_every_steps
        if due or reading.at % per_epoch == 0:
            write_record(run, reading.at, reading.totals, rate)
            reading.totals, reading.images, reading.began = dict(NO_TOTALS), 0, now


def to_host(metrics: step.TrainMetrics) -> tuple[step.TrainMetrics, float]:
    """The metrics of a call as NumPy arrays, and the time in seconds at which the devices had them.

    Accurate to a few milliseconds in a thread of its own: the loop looks later, after it has waited for data or, on a
    CPU, computed the next call.
    """
    return jax.tree.map(np.asarray, metrics), time.perf_counter()


def add_call(totals: Totals, metrics: step.TrainMetrics, batch_size: int) -> Totals:
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
            f"the loss became {losses[bad[0]]} at step {at + int(bad[0]) + 1}; {checkpoint.last_good(manager)}; "
            f"{checkpoint.ADVICE}"
        )


def require_finite_evaluation(metrics: dict[str, float], at: int, manager: ocp.CheckpointManager) -> None:
    """UserError where the evaluation after step `at` has a loss that is NaN or infinite."""
    for loss in (value for name, value in metrics.items() if name.endswith("eval_loss")):
        if not math.isfinite(loss):
            raise UserError(
                f"the evaluation loss became {loss} after step {at}; {checkpoint.last_good(manager)}; "
                f"{checkpoint.ADVICE}"
            )


def write_record(run: Running, at: int, totals: Totals, images_per_second: float) -> None:
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
    """Evaluate and save if they are due for the epoch that ends at step `at`."""
    config = run.plan.config
    epoch, last = at // run.plan.steps_per_epoch, at >= run.plan.total_steps
    metrics = predictions = None
    if last or epoch % config.eval_every_epochs == 0:
        metrics, predictions = evaluate_epoch(run, current, at)
    steps = run.manager.all_steps()
    saved = at in steps  # by the interruption that this start resumes from
    due = last or epoch % config.checkpoint_every_epochs == 0
    due |= 0 < config.checkpoint_every_steps <= at - max(steps, default=0)
    if due and not (saved and metrics is None):
        with run.clock.phase("checkpoint"):
            checkpoint.save(run.manager, current, NO_TOTALS, metrics)
    if distributed.is_primary():
        run.clock.write(at)
        if predictions:
            run.page.update(at, predictions)
    if not last and run.interruption.asked():
        save_unless_saved(run, current, at, NO_TOTALS, metrics)
        run.interruption.raise_if_asked()


def evaluate_epoch(run: Running, current: state.TrainState, at: int) -> tuple[dict[str, float], step.Predictions]:
    """Evaluate after the epoch that ends at step `at`, and record it; what cannot be evaluated is saved at least."""
    try:
        with run.clock.phase("evaluate"):
            metrics, predictions = evaluation(run, current, at)
    except interruption.Interrupted:
        save_unless_saved(run, current, at, NO_TOTALS)
        raise
    except Exception:  # an unreadable file, say: the epoch need not be repeated
        save_alone(run, current, at, NO_TOTALS)
        raise
    require_finite_evaluation(metrics, at, run.manager)
    epoch = at // run.plan.steps_per_epoch
    run.journal.write({"step": at, "epoch": epoch} | metrics)
    averaged = f"; averaged weights {metrics['ema_eval_accuracy']:.2%}" if "ema_eval_accuracy" in metrics else ""
    logger.info(
        f"epoch {epoch}: evaluation loss {metrics['eval_loss']:.4f}, accuracy {metrics['eval_accuracy']:.2%}{averaged}"
    )
    return metrics, predictions


def save_unless_saved(
    run: Running, current: state.TrainState, at: int, totals: Totals, metrics: dict[str, float] | None = None
) -> None:
    """Save the state at step `at`, unless that is done, and write what has taken time until then."""
    if not at or at in run.manager.all_steps():
        return
    with run.clock.phase("checkpoint"):
        checkpoint.save(run.manager, current, totals, metrics)
    if distributed.is_primary():
        run.clock.write(at)


def save_alone(run: Running, current: state.TrainState, at: int, totals: Totals) -> None:
    """Save after an error, unless the run has several processes: the others would not join in saving."""
    if jax.process_count() == 1:
        save_unless_saved(run, current, at, totals)


def evaluation(run: Running, current: state.TrainState, at: int) -> tuple[dict[str, float], step.Predictions]:
    """The metrics of the weights and, if the run keeps them, of the averaged weights; the predictions of the latter.

    A run with averaged weights is judged by them.
    """
    record = {}
    for prefix, variables in (("eval", current.variables), ("ema_eval", current.ema)):
        if variables is None:
            continue
        metrics, predictions = run.evaluator(variables)
        record |= {
            f"{prefix}_loss": metrics["loss"],
            f"{prefix}_accuracy": metrics["accuracy"],
            f"{prefix}_top5_accuracy": metrics["top5_accuracy"],
        }
    return record | {"num_examples": metrics["num_examples"]}, predictions
