"""What a run logs about itself when it starts or resumes, and its warnings about what may be unintended."""

import math
from pathlib import Path

import jax
import ml_collections
import numpy as np

from jaxnets import augment, data, list_models, machine, optim, settings
from jaxnets.models import default_image_size
from jaxnets.plan import Plan, make_schedule, rates
from jaxnets.runtime import logger

USUAL_DECAY = 0.01  # at most, where decay is added to the gradient
HIGH_RATE = {"sgd": 0.05, "muon": 0.01}  # for nets without BatchNorm
ADAMS_BETA2 = 0.999
USUAL_BETA2 = {"rmsprop": 0.9, "lion": 0.99}  # where it is not Adam's
SMALL = 48  # pixels a side, which a net for 224 reduces to one or two


def start(plan: Plan, directory: Path, at: int, before: ml_collections.ConfigDict | None) -> None:
    """Log what starts or resumes, and warn of what may be unintended."""
    config = plan.config
    logger.info(
        "%s (%s parameters) on %s: %d training and %d evaluation images of %d classes, %d epochs of %d steps of %d "
        "images, %s, %d %s device(s)",
        config.model.name,
        f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plan.state_shapes.params)):,}",
        config.dataset,
        len(plan.train_split),
        len(plan.eval_split),
        plan.train_split.num_classes,
        config.num_epochs,
        plan.steps_per_epoch,
        config.batch_size,
        settings.compute_dtype(config.model.dtype),
        len(plan.devices),
        plan.devices[0].platform,
    )
    if shared := data.count_shared(plan.train_split, plan.eval_split):
        logger.warning(
            "%d of the %d images of config.eval_split=%r are also in config.train_split=%r: the accuracy on them says "
            "little about other images",
            shared,
            len(plan.eval_split),
            config.eval_split,
            config.train_split,
        )
    if config.optimizer.name in optim.COUPLED and config.optimizer.weight_decay > USUAL_DECAY:
        logger.warning(
            "config.optimizer.weight_decay=%g is high for %s, which adds it to the gradient (5e-4 is usual); muon, "
            "adamw and lion decouple it and take larger values",
            config.optimizer.weight_decay,
            config.optimizer.name,
        )
    usual = USUAL_BETA2.get(config.optimizer.name)
    if usual and config.optimizer.beta2 == ADAMS_BETA2:
        logger.warning(
            "config.optimizer.beta2=%g is the default for Adam; %g is usual for %s",
            config.optimizer.beta2,
            usual,
            config.optimizer.name,
        )
    if not at:
        warn_of_small_images(config)
        warn_of_high_rate(plan)
        logger.info("starting a new run in %s", directory)
        return
    logger.info("resuming the run in %s at step %d of %d", directory, at, plan.total_steps)
    place = settings.place_of(config)
    if before[place] != config[place]:
        logger.warning("%s was %s and is now %s: it must hold the same images", place, before[place], config[place])
    if at < plan.total_steps:
        _warn_of_other_machines(plan, directory)
    if before.num_epochs != config.num_epochs:
        warn_of_new_length(plan, at, before)


def warn_of_small_images(config: ml_collections.ConfigDict) -> None:
    """Warn if a net for large images, which soon leaves nothing of small ones, gets these but has a form for them."""
    name = config.model.name
    if name + "_cifar" in list_models() and config.image_size <= SMALL:
        logger.warning(
            "%s is made for images of %d pixels but is given %d: use %s_cifar, its form for small images",
            name,
            default_image_size(name),
            config.image_size,
            name,
        )


def warn_of_high_rate(plan: Plan) -> None:
    """Warn if a net without BatchNorm has a rate at which it may learn nothing; its family's recipes allow for that."""
    optimizer = plan.config.optimizer
    peak = optim.scale_rate(optimizer.learning_rate, plan.config.batch_size, optimizer.batch_scaling)
    of_sgd = optimizer.name == "sgd"
    if peak < HIGH_RATE.get(optimizer.name, math.inf) or of_sgd and optimizer.clip_norm:
        return
    if not jax.tree.leaves(plan.state_shapes.batch_stats):
        logger.warning(
            "%s has no BatchNorm, and may learn nothing at a learning rate of %g: such nets need %s",
            plan.config.model.name,
            peak,
            "a tenth of it, and config.optimizer.clip_norm=1" if of_sgd else "a quarter of it",
        )


def _warn_of_other_machines(plan: Plan, directory: Path) -> None:
    """Warn if the run was trained in another dtype, or on more or fewer devices, each normalising its own images."""
    machines, dtype = machine.read(directory), settings.compute_dtype(plan.config.model.dtype)
    if others := {str(where["dtype"]) for where in machines if "dtype" in where} - {dtype}:
        logger.warning(
            "the run was computed in %s before and is now in %s, because config.model.dtype=auto depends on the device "
            "(in a new workdir, config.model.dtype fixes it)",
            " and ".join(sorted(others)),
            dtype,
        )
    before = {where["num_devices"] for where in machines} - {len(plan.devices)}
    normalises = jax.tree.leaves(plan.state_shapes.batch_stats)
    if before and normalises and not plan.config.sync_batch_norm:
        logger.warning(
            "the run was on %s device(s) before and is now on %d: each normalises its own share of a batch, so the "
            "result matches neither (in a new workdir, config.sync_batch_norm=True normalises over all devices)",
            " and ".join(map(str, sorted(before))),
            len(plan.devices),
        )


def warn_of_new_length(plan: Plan, at: int, before: ml_collections.ConfigDict) -> None:
    """Warn if a run of the new length would have had other learning rates so far, or if images become smaller again."""
    config = plan.config
    so_far = rates(make_schedule(before, plan.steps_per_epoch), at)
    if not np.array_equal(so_far, plan.learning_rates[:at]):
        logger.warning(
            "num_epochs was %d and is now %d: the %s schedule follows the new length from step %d on, so this run "
            "equals neither the shorter nor the longer one trained without a break",
            before.num_epochs,
            config.num_epochs,
            config.schedule.name,
            at,
        )
    epoch = at // plan.steps_per_epoch
    done = (at - 1) // plan.steps_per_epoch  # the epoch of the last step
    last = augment.progressive_size(before.progressive_sizes, config.image_size, done, before.num_epochs)
    if epoch < config.num_epochs and plan.training_size(epoch) < last:
        logger.warning(
            "num_epochs was %d and is now %d: config.progressive_sizes are spread over the new length, so images of %d "
            "pixels are followed by smaller ones, of %d",
            before.num_epochs,
            config.num_epochs,
            last,
            plan.training_size(epoch),
        )
