"""A training run from its configuration to its last number: checked, set up, resumed, ended."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ml_collections
import orbax.checkpoint as ocp

from jaxnets import (
    announce,
    checkpoint,
    distributed,
    epochs,
    initial_weights,
    interruption,
    machine,
    runtime,
    settings,
    state,
    step,
    workdir,
)
from jaxnets.checkpoint_damage import digest
from jaxnets.dispatch import call_kinds, compile_train, load_examples, steps_per_call, train_calls
from jaxnets.errors import UserError
from jaxnets.evaluator import make_evaluator
from jaxnets.journal import Journal
from jaxnets.plain_files import user_path
from jaxnets.plan import Plan, compile_and_create_state, make_plan, require_same_data
from jaxnets.progress import Progress
from jaxnets.report import LivePage
from jaxnets.restore import restore_agreed
from jaxnets.runtime import logger
from jaxnets.timing import Clock


def train(config: ml_collections.ConfigDict, directory: str | Path) -> dict[str, Any]:
    """Train the run of `config` in a workdir, or resume it; returns the last evaluation's record.

    Raises UserError for bad input (before any long work), for a loss that is no longer finite, and if the device runs
    out of memory. On SIGINT, SIGTERM and SIGHUP, raises SystemExit with the status the shell expects; from the first
    step on, only once the state is saved.
    """
    smaller = "config.resident=false, a lower config.steps_per_call or, in evaluation, a lower config.eval_batch_size"
    remedy = f"{smaller} needs less; so does a lower config.batch_size, in a workdir where nothing was saved"
    with interruption.raised(), runtime.short_of_memory(remedy):
        return _train(config, user_path(directory))


def _train(config: ml_collections.ConfigDict, directory: Path) -> dict[str, Any]:
    clock = Clock(directory)
    runtime.configure_logging()
    settings.check(config)
    if config.deterministic:
        runtime.make_deterministic()
    runtime.require_device()
    config = settings.with_absolute_places(config)
    if config.compilation_cache:
        runtime.enable_compilation_cache()
    workdir.check(directory, config)
    initialise = bool(config.init_from) and not checkpoint.exists(directory)
    if initialise and not user_path(config.init_from).exists():
        raise UserError(f"config.init_from={config.init_from!r}: there is no such file or workdir")
    places = {"data_dir": None, settings.place_of(config): None}  # may differ between machines
    distributed.require_agreement("the configuration", json.dumps(settings.as_dict(config) | places))
    plan = distributed.primary_first(partial(make_plan, config))
    distributed.require_agreement("the data set", json.dumps(plan.data_record))
    template = plan.state_shapes
    # Before the workdir is claimed: if the weights cannot be loaded, this run leaves no trace.
    weights = initial_weights.load(plan) if initialise else None
    if distributed.many():  # each has read them itself
        distributed.require_agreement("what config.init_from holds", digest(weights))
    with (
        workdir.claim(directory, config) as before,
        closing(checkpoint.open_manager(directory, config.keep_checkpoints)) as manager,
        ThreadPoolExecutor(1) as background,
    ):
        saved = restore_agreed(manager, template) if before else None
        start, totals = saved or (None, dict(checkpoint.NO_TOTALS))
        at = int(start.step) if saved else 0
        if at > plan.total_steps:
            raise UserError(
                f"the run in {directory} is at step {at}, beyond config.num_epochs={config.num_epochs}, "
                f"which ends at {plan.total_steps}; its checkpoints are unchanged"
            )
        if at:
            require_same_data(plan, directory)
        distributed.on_primary(partial(workdir.keep, directory, config))
        distributed.on_primary(partial(workdir.keep_data, directory, plan.data_record))
        if at < plan.total_steps:
            dtype = settings.compute_dtype(config.model.dtype)
            distributed.on_primary(partial(machine.note, directory, at, dtype=dtype))
        # XLA compiles this while the training step is traced, which takes as long.
        create = None if saved else background.submit(compile_and_create_state, plan, weights)
        if distributed.is_primary():
            announce.start(plan, directory, at, before)
        evaluated = bool(saved and manager.metrics(at))
        with (
            closing(Journal(directory, at, evaluated)) as journal,
            closing(LivePage(directory, plan.eval_split)) as page,
        ):
            return fit(plan, at, create.result if create else lambda: start, totals, manager, journal, clock, page)


def fit(
    plan: Plan,
    at: int,
    first_state: Callable[[], state.TrainState],
    totals: checkpoint.Totals,
    manager: ocp.CheckpointManager,
    journal: Journal,
    clock: Clock,
    page: LivePage,
) -> dict[str, Any]:
    """Train from step `at` to the plan's last; returns the last evaluation.

    `first_state` waits for the state at step `at`, whose program may be compiled at the same time as the step's.
    """
    if at >= plan.total_steps and journal.last_evaluation(at):
        logger.info("nothing left to do: the run has finished its %d epochs", at // plan.steps_per_epoch)
        if distributed.is_primary():
            page.redraw()  # a kill may have come before that
        return journal.last_evaluation(at)
    clock.step = at
    with clock.phase("read data"):
        examples, eval_examples = load_examples(plan)
    per_call = steps_per_call(plan.config.steps_per_call, plan.steps_per_epoch, at)
    with clock.phase("compile"):
        kinds = call_kinds(plan, per_call, at)
        compiled = {(size, count): compile_train(plan, examples, size, count) for size, count in kinds}
        current = step.replicate(first_state(), plan.devices)
    asked = distributed.interruption(plan.devices)
    with (
        closing(train_calls(plan, bool(examples), per_call, at)) as calls,
        interruption.deferred(asked),
        Progress(at, plan.total_steps, plan.steps_per_epoch) as progress,
    ):
        evaluator = make_evaluator(
            plan.model, plan.eval_split, eval_examples, plan.config, plan.devices, asked.raise_if_asked
        )
        run = epochs.Running(plan, compiled, calls, evaluator, manager, journal, clock, page, progress, asked)
        with ending_when_asked(run):
            at = go_on(run, current, at, totals)
    if asked.signum is not None:  # after the last check, by which several processes agree
        logger.info("saved step %d, the last; nothing is left to do", at)
        raise SystemExit(128 + asked.signum)
    return journal.last_evaluation(at)


def go_on(run: epochs.Running, current: state.TrainState, at: int, totals: checkpoint.Totals) -> int:
    """Train from step `at` to the plan's last, which it returns; raises Interrupted, or UserError if it fails."""
    # A run that was interrupted while evaluating resumes there, as does one that lost the evaluation's record.
    at_an_end = at and at % run.plan.steps_per_epoch == 0
    if at_an_end and not (run.manager.metrics(at) and run.journal.last_evaluation(at)):
        epochs.finish_epoch(run, current, at)
    while at < run.plan.total_steps:
        with run.clock.phase("train"):
            current, at = epochs.train_epoch(run, current, at, totals)
        totals = dict(checkpoint.NO_TOTALS)
        epochs.finish_epoch(run, current, at)
    run.manager.wait_until_finished()  # before a signal may end the run
    run.interruption.raise_if_asked()
    return at


@contextmanager
def ending_when_asked(run: epochs.Running) -> Iterator[None]:
    """SystemExit, after logging what is saved, if the run was interrupted, or failed after it was asked to end.

    If it fails otherwise, its page is drawn as far as the run got.
    """
    asked = run.interruption
    try:
        yield
        return
    except interruption.Interrupted:
        ended = SystemExit(asked.status)
    except UserError as error:
        if asked.signum is None:
            _show_how_far(run)
            raise
        logger.warning("%s", error)  # a process that reads the data may have been asked too
        ended = interruption.Ended(128 + asked.signum)  # which the other processes of a run do not know of
    run.manager.wait_until_finished()
    saved = run.manager.latest_step() or 0
    if distributed.is_primary():
        run.clock.write(saved)
    if saved:
        logger.info("saved step %d; the same command resumes from there", saved)
    else:
        logger.info("ended before the first step; the same command starts again")
    raise ended


def _show_how_far(run: epochs.Running) -> None:
    if not distributed.is_primary() or not run.journal.records:
        return
    if (last := run.journal.records[-1]["step"]) > run.clock.step:
        with suppress(UserError):  # of a full disk, say; the run has failed for another reason
            run.clock.write(last)
    run.page.redraw()
