"""The benchmark's JAX side: a net trained and evaluated as a user would do it, without our loop."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets import create_model, machine
from jaxnets.benchmark_worker import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Task, fastest, ready_bytes
from jaxnets.models.initializers import init_shapes


def make_optimizer() -> optax.GradientTransformation:
    """SGD with momentum and weight decay of every parameter, as PyTorch's has by default."""
    return optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, MOMENTUM))


def make_train_step(model, optimizer):
    """A step of SGD in one program: ((params, batch_stats, opt_state, key), images, labels) -> (state, loss)."""

    def loss_of(params, batch_stats, images, labels, key):
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated.get("batch_stats", {})

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, images, labels):
        params, batch_stats, opt_state, key = state
        key, dropout_key = jax.random.split(key)
        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, batch_stats), gradients = gradient_of(params, batch_stats, images, labels, dropout_key)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state, key), loss

    return train_step


def random_variables(model, image_size: int) -> dict[str, Any]:
    """He normal kernels and no-op BatchNorms. `model.init` would compile, which is not part of the race."""
    shapes = init_shapes(model, jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32))
    random = np.random.default_rng(0)

    def value(path, leaf):
        name = path[-1].key
        if name == "kernel":
            scale = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(scale * random.standard_normal(leaf.shape, np.float32))
        return (jnp.ones if name in ("scale", "var") else jnp.zeros)(leaf.shape, leaf.dtype)

    return jax.tree.map_with_path(value, {"batch_stats": {}} | shapes)


class _Contender:
    """A call to repeat; in training, where each depends on the one before, only the last is waited for."""

    def __init__(self, call, wait_for_each, report):
        self._call, self._wait_for_each, self.report = call, wait_for_each, report

    def run(self, steps: int) -> None:
        for _ in range(steps):
            result = self._call()
            if self._wait_for_each:
                jax.block_until_ready(result)
        jax.block_until_ready(result)

    def device_peak_bytes(self) -> int | None:
        stats = jax.local_devices()[0].memory_stats()
        return stats and stats.get("peak_bytes_in_use")


def prepare(task: Task) -> _Contender:
    """Compile the task's function and take a first step.

    On a GPU the net computes in bfloat16. `report`: parameters, compile_seconds (tracing included),
    first_step_seconds (compilation included), ready_bytes (resident after compiling, before the first step), temp_bytes
    and argument_bytes of XLA's plan, dtype, form, loss.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    model = create_model(task.model, num_classes=task.num_classes, dtype=dtype)
    variables = random_variables(model, task.image_size)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    key_images, key_labels, key = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(key_images, (task.batch_size, task.image_size, task.image_size, 3))
    labels = jax.random.randint(key_labels, (task.batch_size,), 0, task.num_classes)
    if task.mode == "train":
        optimizer = make_optimizer()
        function = make_train_step(model, optimizer)
        params = variables["params"]
        kept = [(params, variables["batch_stats"], optimizer.init(params), key)]

        def call():
            kept[0], loss = function(kept[0], images, labels)
            return loss

        arguments = kept[0], images, labels
    else:
        function = jax.jit(partial(model.apply, train=False))
        arguments = variables, images

        def call():
            return function(variables, images)

    jax.block_until_ready(arguments)
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    before = ready_bytes()
    # Called through jit, as users do: it reuses what was just compiled.
    first = jax.block_until_ready(call())
    report = {
        "parameters": parameters,
        "compile_seconds": compile_seconds,
        "first_step_seconds": time.perf_counter() - began,
        "ready_bytes": before,
        "temp_bytes": memory and memory.temp_size_in_bytes,
        "argument_bytes": memory and memory.argument_size_in_bytes,
        "dtype": jnp.dtype(dtype).name,
        "form": f"operators: {machine.describe()['operators']}",
        "loss": float(first) if task.mode == "train" else None,
    }
    return _Contender(call, task.mode != "train", report)


def rates(threads: int) -> dict[str, Any]:
    """Bytes per second read and written in a copy, floating-point operations per second in a matrix product."""
    del threads  # XLA follows the process's CPU affinity
    on_cpu = jax.default_backend() == "cpu"
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    kept = [jnp.zeros((1 << 26 if on_cpu else 1 << 28,), jnp.float32)]

    def call_copy():
        kept[0] = copy(kept[0])
        return kept[0]

    n, dtype = (2048, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)  # with all ones a GPU draws less power and runs faster
    product = jax.jit(lambda a: a @ a)
    return {
        "copy_bytes_per_second": 2 * kept[0].nbytes / fastest(call_copy, jax.block_until_ready),
        "flops_per_second": 2 * n**3 / fastest(lambda: product(a), jax.block_until_ready),
        "about": machine.describe(),
    }
