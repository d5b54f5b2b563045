"""Sums over all positions of a map, channel by channel, as a GPU takes them fast."""

import math

import jax.numpy as jnp
from jax import lax


def sums(*maps):
    """Of each of the maps `(..., C)`, all of one shape, the sum over all but the last axis, `(C,)`.

    In two kernels: parts of the positions for all maps at once, then the parts. As one reduction, XLA gives 4,096 rows
    of 232 channels to 8 blocks of threads: 57 us on an H200, which reads them in 1.
    """
    channels = maps[0].shape[-1]
    rows = math.prod(maps[0].shape[:-1])
    parts = _parts(rows)
    partial = [values.reshape(parts, rows // parts, channels).sum(1) for values in maps]
    partial = lax.optimization_barrier(partial)  # or XLA makes one reduction of both again
    return list(jnp.stack(partial, 1).sum(0))


def wide(values):
    """At least float32: what is summed, and all that lies between two roundings."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _parts(rows: int) -> int:
    """The divisor of `rows` next below its square root, so that both kernels have as much to do."""
    return next((n for n in range(math.isqrt(rows), 0, -1) if rows % n == 0), 1)
