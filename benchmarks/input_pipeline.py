"""Measure the share of a training step that its input takes: gathering, augmenting and normalising resident images.

`python benchmarks/input_pipeline.py [--model=mobilenet_v2_cifar] [--batch_size=128] [--rounds=5]` times whole steps
and their input alone, in turns, on one device with random images like CIFAR-10's. The last line is one JSON object.
"""

import json
import statistics
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnets
from jaxnets import optim, runtime, state, step
from jaxnets.augment import augment
from jaxnets.errors import ArgumentParser, UserError, exit_on_user_error

SIDE, CLASSES, COUNT = 32, 10, 50_000
AUGMENTATION = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}  # and, by default, a crop and a flip
KEY = jax.random.key(0)


def random_examples() -> step.Batch:
    """Random images and labels of a data set, on the device."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    return jax.device_put({"image": images, "label": rng.integers(0, CLASSES, COUNT).astype(np.int32)})


@jax.jit
def inputs(examples, index):
    """Make the images of K batches, one after the other as a training call does; returns the last ones."""

    def body(_, step_and_index):
        at, of_step = step_and_index
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(KEY, at)))(jnp.arange(len(of_step)))
        batch = step.gather(examples, {"index": of_step})
        return jax.vmap(partial(augment, **AUGMENTATION))(keys, batch["image"]), batch["label"].sum()

    batches = jnp.arange(len(index)), index
    return jax.lax.scan(body, jnp.zeros((index.shape[1], SIDE, SIDE, 3)), batches)


def milliseconds(call, *args) -> tuple[float, object]:
    """How long a call takes, and what it returns."""
    began = time.perf_counter()
    result = jax.block_until_ready(call(*args))
    return (time.perf_counter() - began) * 1e3, result


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python benchmarks/input_pipeline.py", description=__doc__)
    parser.add_argument("--model", default="mobilenet_v2_cifar")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv[1:])
    if args.rounds < 1 or args.batch_size < 2:
        raise UserError(f"--rounds={args.rounds} must be at least 1, --batch_size={args.batch_size} at least 2")
    model = jaxnets.create_model(args.model, num_classes=CLASSES)
    runtime.enable_compilation_cache()
    steps = 4
    optimizer = optim.make_optimizer("sgd", optax.constant_schedule(0.1))
    current = jax.jit(partial(state.create, KEY, model, optimizer, SIDE, False))()
    one_step = partial(step.train_step, model=model, optimizer=optimizer, augmentation=AUGMENTATION)
    train = step.pmap_train(one_step, jax.local_devices()[:1])
    examples = random_examples()
    index = np.random.default_rng(1).integers(0, COUNT, (steps, args.batch_size)).astype(np.int32)
    whole, alone = [], []
    for _ in range(args.rounds + 1):
        spent, (current, _) = milliseconds(train, current, examples, {"index": index[None]}, KEY)
        whole.append(spent / steps)
        # Enough to take a while: a single batch is too short to measure.
        alone.append(sum(milliseconds(inputs, examples, index)[0] for _ in range(8)) / (8 * steps))
    step_ms, input_ms = statistics.median(whole[1:]), statistics.median(alone[1:])  # the first compiles
    print(f"{args.model}, batch {args.batch_size}: step {step_ms:.1f} ms, input {input_ms:.2f} ms")
    print(json.dumps({"step_ms": step_ms, "input_ms": input_ms, "share": input_ms / step_ms}))


if __name__ == "__main__":
    exit_on_user_error(main)(sys.argv)
