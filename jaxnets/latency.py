"""The latency of a net, or of a layer: the forward pass of evaluation, on one device."""

import time
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

MIN_CALLS, MAX_CALLS = 5, 200
SECONDS = 1.5  # of calls, within those bounds


def measure(module: nn.Module, shape: tuple[int, ...], **arguments) -> dict[str, float]:
    """Milliseconds from a float32 input of `shape` to the output, without compilation.

    The median of the calls as `ms`, and their quartiles as `low_ms` and `high_ms`. Weights are random: time does not
    depend on them. `arguments` are passed to the module with the input, `train=False` for a net.
    """
    device = jax.local_devices()[0]
    inputs = jax.device_put(jax.random.normal(jax.random.key(0), shape, jnp.float32), device)
    # What runs once is not worth optimising.
    options = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    initialise = jax.jit(partial(module.init, **arguments), compiler_options=options)
    variables = jax.device_put(initialise(jax.random.key(0), inputs[:1]), device)
    # A block may return a lazy array, from which the array is yet to be computed.
    forward = jax.jit(lambda variables, x: jnp.asarray(module.apply(variables, x, **arguments)))
    forward = forward.lower(variables, inputs).compile()
    times = call_times(lambda: forward(variables, inputs))
    low, median, high = np.percentile(times, (25, 50, 75)) * 1e3
    return {"ms": float(median), "low_ms": float(low), "high_ms": float(high), "calls": len(times)}


def call_times(call: Callable) -> np.ndarray:
    """Seconds of each of several calls of a compiled function, after two to warm up."""
    for _ in range(2):
        jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < MIN_CALLS or (sum(times) < SECONDS and len(times) < MAX_CALLS):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return np.asarray(times)
