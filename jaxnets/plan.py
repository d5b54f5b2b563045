"""A run before its first step: data opened, net and optimizer built, everything checked to fit together."""

import contextlib
import dataclasses
import json
from collections.abc import Hashable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from jaxnets import (
    augment,
    data,
    distributed,
    ops,
    optim,
    programs,
    sampling,
    settings,
    state,
    step,
    workdir,
)
from jaxnets.datasets import find_prepared, is_folder
from jaxnets.errors import UserError
from jaxnets.models.initializers import init_shapes

Variables = dict[str, Any]  # {'params', 'batch_stats'}
MAX_STEPS = 100_000_000  # the learning rates of all are kept in memory
MAX_RECORDS = 500_000  # of metrics.jsonl: each start reads them all


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run is made of, before its first step."""

    config: ml_collections.ConfigDict
    devices: list[jax.Device]
    train_split: data.Split
    eval_split: data.Split
    model: nn.Module
    optimizer: optax.GradientTransformation
    learning_rates: np.ndarray  # at every step, float32

    @property
    def steps_per_epoch(self) -> int:
        return sampling.steps_per_epoch(len(self.train_split), self.config.batch_size)

    @property
    def total_steps(self) -> int:
        return self.config.num_epochs * self.steps_per_epoch

    @cached_property
    def data_record(self) -> workdir.Data:
        splits = self.train_split, self.eval_split
        return workdir.Data(self.eval_split.class_names, *map(len, splits), tuple(split.identity for split in splits))

    @cached_property
    def program_key(self) -> Hashable:
        """What its programs depend on: plans with the same key, such as for several seeds of a run, share them."""
        fields = settings.flatten(settings.as_dict(self.config))
        reaching = {name: value for name, value in fields.items() if name not in (*settings.FREE_FIELDS, "seed")}
        lengths = self.steps_per_epoch, self.total_steps
        return json.dumps(reaching), self.model, lengths, tuple(self.devices), ops.formulation()

    @property
    def traced_state(self) -> jax.stages.Traced:
        """`state.create` as one program of the key, traced once for both its shapes and its values.

        In one program, the forward pass of initialisation is dead code; op by op, it would run and compile every op.
        """
        config = self.config
        fields = {"image_size": config.image_size, "ema": config.ema_decay > 0}
        # What runs once is not worth optimising: this halves its compilation on the CPU.
        options = {"xla_backend_optimization_level": 0} if self.devices[0].platform == "cpu" else None

        def trace():
            create = partial(state.create, model=self.model, optimizer=self.optimizer, **fields)
            with _refuse_unfit_images(config.model.name, config.image_size):
                return jax.jit(create, compiler_options=options).trace(jax.random.key(0))

        return programs.keep(("traced state", self.program_key), trace)

    @property
    def state_shapes(self) -> state.TrainState:
        """The shapes of the state, found without computing; UserError if the net cannot take the images."""
        return self.traced_state.out_info

    def training_size(self, epoch: int) -> int:
        """Side in pixels of the training images of epoch `epoch`, counted from 0."""
        config = self.config
        return augment.progressive_size(config.progressive_sizes, config.image_size, epoch, config.num_epochs)


def compile_and_create_state(plan: Plan, weights: Variables | None = None) -> state.TrainState:
    """The state before the first step, with `weights`, as far as they go, instead of the initial ones."""
    create = programs.keep(("state", plan.program_key), lambda: plan.traced_state.lower().compile())
    made = create(jax.random.key(plan.config.seed))
    if weights is None:
        return made
    variables = {name: made.variables[name] | weights[name] for name in ("params", "batch_stats")}
    ema = None if made.ema is None else jax.tree.map(jnp.array, variables)
    return made.replace(**variables, ema=ema)


def make_plan(config: ml_collections.ConfigDict) -> Plan:
    """Everything that a configuration names, opened or built; UserError if it does not fit together.

    What needs no data is checked first, since data may have to be downloaded and prepared.
    """
    devices = distributed.devices()
    _check_batches(config, len(devices))
    # With a prepared data set, the first trace checks this as soon, but only for image_size.
    if config.progressive_sizes or find_prepared(config.dataset, config.data_dir) is None:
        _check_net(config)
    train_split, eval_split = data.open_splits(
        config.dataset,
        (config.train_split, config.eval_split),
        config.data_dir,
        image_size=config.image_size,
        crop=config.crop,
    )
    for split in (train_split, eval_split):  # streamed data are read late: the evaluation's after an epoch
        data.read_batch(split, np.zeros(1, int))
    if config.batch_size > len(train_split):
        raise UserError(
            f"config.batch_size={config.batch_size} must be at most the {len(train_split)} examples "
            f"of config.train_split={config.train_split!r}"
        )
    steps_per_epoch = sampling.steps_per_epoch(len(train_split), config.batch_size)
    total_steps = config.num_epochs * steps_per_epoch
    _check_length(config, total_steps)
    schedule = make_schedule(config, steps_per_epoch)
    elsewhere = ("name", "learning_rate", "batch_scaling")  # in the schedule, and the first argument
    options = {name: value for name, value in config.optimizer.items() if name not in elsewhere}
    optimizer = optim.make_optimizer(config.optimizer.name, schedule, **options)
    axis_name = step.AXIS if config.sync_batch_norm and len(devices) > 1 else None
    model = settings.make_model(config, train_split.num_classes, bn_axis_name=axis_name)
    if config.batch_size == len(devices) and axis_name is None:
        _check_net(config)
        _require_several_values(config, model)
    # All at once and now: later, each one would wait for the training steps in flight.
    learning_rates = rates(schedule, total_steps)
    return Plan(config, devices, train_split, eval_split, model, optimizer, learning_rates)


def _check_batches(config: ml_collections.ConfigDict, num_devices: int) -> None:
    """UserError if a batch cannot be divided among the devices."""
    for field in ("batch_size", "eval_batch_size"):
        if config[field] % num_devices:
            raise UserError(
                f"config.{field}={config[field]} must be a multiple of the {num_devices} devices it is spread over"
            )
    for field in ("mixup", "cutmix"):
        if config.augment[field] and config.batch_size == num_devices:
            raise UserError(
                f"config.augment.{field} pairs the images on a device, but config.batch_size={config.batch_size} "
                f"gives each of {num_devices} devices only one"
            )


def _check_length(config: ml_collections.ConfigDict, total_steps: int) -> None:
    """UserError for more steps, or more records, than a run may have."""
    if total_steps > MAX_STEPS:
        raise UserError(
            f"config.num_epochs={config.num_epochs} makes {total_steps:,} steps: at most {MAX_STEPS:,} are allowed"
        )
    records = total_steps // config.log_every_steps + config.num_epochs + config.num_epochs // config.eval_every_epochs
    if records > MAX_RECORDS:
        raise UserError(
            f"config.num_epochs={config.num_epochs} with config.log_every_steps={config.log_every_steps} and "
            f"config.eval_every_epochs={config.eval_every_epochs} would make {records:,} records: at most "
            f"{MAX_RECORDS:,} are kept"
        )


def rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """The learning rates of the first `steps` steps, float32 `(steps,)`."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


def make_schedule(config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step of this configuration."""
    fields = {name: value for name, value in config.schedule.items() if name != "name"}
    return optim.make_schedule(
        config.schedule.name,
        optim.scale_rate(config.optimizer.learning_rate, config.batch_size, config.optimizer.batch_scaling),
        steps_per_epoch=steps_per_epoch,
        num_epochs=config.num_epochs,
        **fields,
    )


def require_same_data(plan: Plan, directory: Path) -> None:
    """UserError if the run in a workdir is known to have had other images or classes than there are now."""
    before, now = workdir.read_data(directory), plan.data_record
    if before is None:
        return
    workdir.require_same_classes(directory, plan.eval_split.name, now.class_names, before.class_names)
    if before[:3] != now[:3]:
        raise UserError(
            f"the run in {directory} was trained on other data: {before.train_images} training and "
            f"{before.eval_images} evaluation images, but there are now {now.train_images} and {now.eval_images}"
        )
    for then, is_now in zip(before.files, now.files):
        if then and then != is_now:
            raise UserError(
                f"the run in {directory} was trained on other data: as many images, but "
                + (
                    "some with other names or classes"
                    if is_folder(plan.config.dataset)
                    else f"of version {then} of the data set, not {is_now}; config.dataset=NAME:VERSION chooses one"
                )
            )


def _smallest_size(config: ml_collections.ConfigDict) -> int:
    """Side in pixels of the smallest images of a run: they can be too small, never too large."""
    sizes, side = config.progressive_sizes, config.image_size
    epochs = min(config.num_epochs, len(sizes))  # in as many epochs as sizes, or more, all of them are used
    return min((side, *(augment.progressive_size(sizes, side, epoch, epochs) for epoch in range(epochs))))


def _check_net(config: ml_collections.ConfigDict) -> None:
    """UserError if the net cannot be made or cannot take the images; by shapes, without computing anything."""
    model = settings.make_model(config, num_classes=1)  # only the data tell how many there are
    size = _smallest_size(config)
    origin = "" if size == config.image_size else " (progressive_sizes)"
    with _refuse_unfit_images(config.model.name, size, origin):
        init_shapes(model, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))


def _require_several_values(config: ml_collections.ConfigDict, model: nn.Module) -> None:
    """UserError if BatchNorm would train on one value per channel: one image per device, and a map of one pixel."""
    size = _smallest_size(config)
    image = jnp.zeros((1, size, size, 3))

    def trained(key):
        variables = model.init(key, image, train=False)
        return model.apply(variables, image, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    try:
        with ops.using("reference"):
            jax.eval_shape(trained, jax.random.key(0))
    except ValueError as error:
        raise UserError(f"config.batch_size={config.batch_size} leaves a device only one image: {error}") from None


@contextlib.contextmanager
def _refuse_unfit_images(name: str, size: int, origin: str = "") -> Iterator[None]:
    """Turn the error of a net traced with too small images into a UserError; `origin` says where the size is from."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"config.model.name={name!r} cannot take images of {size}x{size}{origin}: {error}") from None
