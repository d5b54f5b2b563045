"""What a run's devices are given: resident examples, batches call by call, and the program that takes them."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import jax
import numpy as np

from jaxnets import data, distributed, programs, sampling, step, streaming
from jaxnets.plan import Plan
from jaxnets.runtime import logger


def load_examples(plan: Plan) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The decoded training and evaluation images on every device, or {} for those that are streamed."""
    config = plan.config
    # A random-resized crop is another part of the original image every epoch, so it is made where images are read.
    splits = (plan.eval_split,) if config.crop_area else (plan.train_split, plan.eval_split)
    nbytes = sum({split.split: split.nbytes for split in splits}.values())
    if not data.is_resident(config.resident, nbytes, config.resident_limit):
        logger.info("streaming the images (%.1f GB decoded)", (plan.train_split.nbytes + plan.eval_split.nbytes) / 1e9)
        return {}, {}
    # If both are the same split, it is decoded and kept only once.
    decoded = {split.split: step.replicate(data.decode(split), plan.devices) for split in splits}
    logger.info("%.0f MB of images on each device", nbytes / 1e6)
    if config.crop_area:
        logger.info("streaming the training images, cropped afresh every epoch")
        return {}, decoded[plan.eval_split.split]
    return decoded[plan.train_split.split], decoded[plan.eval_split.split]


def steps_per_call(limit: int, steps_per_epoch: int, at: int) -> int:
    """The most steps per call, up to `limit`, with which calls from step `at` on end exactly with every epoch.

    If that is too few, as for epochs of 781 or 97 steps, it is `limit`, and an epoch's last call is shorter: one more
    program to compile.
    """
    limit = min(limit, steps_per_epoch)
    span = math.gcd(steps_per_epoch, at % steps_per_epoch)
    even = max(k for k in range(1, min(limit, span) + 1) if span % k == 0)
    return even if even * 4 >= limit else limit


def train_calls(plan: Plan, resident: bool, per_call: int, at: int) -> Iterator[dict[str, jax.Array | np.ndarray]]:
    """The batches that the mapped training step takes, call by call, from step `at` to the last one."""
    config, size, part = plan.config, len(plan.train_split), distributed.share()
    if resident:
        calls = (
            {
                "index": sampling.take_part(
                    sampling.train_indices(config.seed, size, config.batch_size, first, count), part
                )
            }
            for first, count in sampling.call_steps(at, plan.total_steps, plan.steps_per_epoch, per_call)
        )
    else:
        calls = streaming.stream_train(
            plan.train_split,
            seed=config.seed,
            batch_size=config.batch_size,
            start_step=at,
            end_step=plan.total_steps,
            num_workers=config.num_workers,
            steps_per_call=per_call,
            crop_area=config.crop_area,
            part=part,
        )
    with closing(calls):  # its worker processes end with the training
        for batches in calls:
            yield step.assemble(step.shard(batches, len(plan.devices) // part[1]), plan.devices)


def call_shapes(plan: Plan, resident: bool, per_call: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and types of one item of `train_calls`, as this process feeds it."""
    lead = (len(plan.devices) // distributed.share()[1], per_call, plan.config.batch_size // len(plan.devices))
    if resident:
        return {"index": jax.ShapeDtypeStruct(lead, np.int32)}
    side = plan.config.image_size
    return {
        "image": jax.ShapeDtypeStruct((*lead, side, side, 3), np.uint8),
        "label": jax.ShapeDtypeStruct(lead, np.int32),
    }


def call_kinds(plan: Plan, per_call: int, at: int) -> list[tuple[int, int]]:
    """The distinct kinds of calls from step `at` on: the side of their images, and their number of steps."""
    found, seen = {}, set()
    per_epoch = plan.steps_per_epoch
    for epoch in range(at // per_epoch, plan.config.num_epochs):
        size, first = plan.training_size(epoch), max(at, epoch * per_epoch)
        if (size, first % per_epoch) not in seen:  # all whole epochs of a size are split alike
            seen.add((size, first % per_epoch))
            calls = sampling.call_steps(first, (epoch + 1) * per_epoch, per_epoch, per_call)
            found |= dict.fromkeys((size, count) for _, count in calls)
    return list(found)


def compile_train(plan: Plan, examples: dict[str, jax.Array], size: int, per_call: int) -> Callable:
    """The program of a kind of calls: `(state, batches) -> (state, metrics)`."""
    key = step.replicate(jax.random.key(plan.config.seed), plan.devices)
    shapes = tuple((name, values.shape) for name, values in sorted(examples.items()))
    deterministic = plan.config.deterministic
    # Set on the program too: XLA reads its flags only once, perhaps already for an earlier run in this process.
    options = {"xla_gpu_deterministic_ops": True} if deterministic else None
    began = time.perf_counter()
    compiled = programs.keep(
        ("train", plan.program_key, deterministic, shapes, size, per_call),
        lambda: lower_train(plan, examples, size, per_call, key).compile(options),
    )
    seconds = time.perf_counter() - began
    held = "an amount of memory that its platform does not report"
    if memory := compiled.memory_analysis():
        state_bytes, step_bytes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        held = f"{state_bytes / 1e6:.0f} MB of state and data, {step_bytes / 1e6:.0f} MB of activations and gradients"
    logger.info("compiled the training step in %.1f s; %d step(s) per call; a device holds %s", seconds, per_call, held)
    return lambda current, batches: compiled(current, examples, batches, key)


def lower_train(
    plan: Plan, examples: dict[str, jax.Array], size: int, per_call: int, key: jax.Array
) -> jax.stages.Lowered:
    """The program of `per_call` steps on images of `size` pixels a side, not yet compiled."""
    config = plan.config
    augmentation = {"mean": tuple(config.mean), "std": tuple(config.std), "size": size, **config.augment}
    mixing = {name: augmentation.pop(name) for name in ("mixup", "cutmix")}
    one_step = partial(
        step.train_step,
        model=plan.model,
        optimizer=plan.optimizer,
        augmentation=augmentation,
        mixing=mixing if any(mixing.values()) else None,
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        axis_name=step.AXIS,
    )
    shapes = plan.state_shapes, call_shapes(plan, bool(examples), per_call)
    current, batches = step.placeholders(*shapes, plan.devices)
    return step.pmap_train(one_step, plan.devices).lower(current, examples, batches, key)
