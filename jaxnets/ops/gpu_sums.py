"""Sums over all positions of a map, channel by channel, as a GPU takes them fast."""

import math

import jax.numpy as jnp
from jax import lax


def sums(*maps):
    """Of each of the maps `(..., C)`, all of one shape, the sum over all but the last axis, `(C,)`.

    In two kernels: parts of the positions for all maps at once, then the parts. As one reduction, XLA gives 4,096 rows
    of 232 channels to 8 blocks of threads: 57 us on an H200, which reads them in 1.
    """
    batch, *positions, channels = maps[0].shape
    rows = batch * math.prod(positions)
    parts = _parts(batch, rows // max(batch, 1))
    partial = [values.reshape(parts, rows // parts, channels).sum(1) for values in maps]
    partial = lax.optimization_barrier(partial)  # or XLA makes one reduction of both again
    return list(jnp.stack(partial, 1).sum(0))


def wide(values):
    """At least float32: what is summed, and all that lies between two roundings."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _parts(batch: int, positions: int) -> int:
    """Into how many parts to cut: near the square root of all, so that both kernels have as much to do.

    A part is of one image or of whole ones, so that a batch that jit spreads over devices stays where it is, if their
    number divides that of the parts, as powers of 2 do.
    """
    root = math.isqrt(batch * positions)
    if not root:
        return 1
    if batch <= root:
        return batch * max(n for n in range(1, root // batch + 1) if positions % n == 0)
    return min(n for n in range(root, batch + 1) if batch % n == 0)
