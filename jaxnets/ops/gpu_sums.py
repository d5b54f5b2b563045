"""Per-channel sums over all positions of a map, computed so that they are fast on GPUs."""

import math

from jax import lax

from jaxnets.ops.xla_depthwise import sum_together


def sums(*maps):
    """The sum of each map `(..., C)` over all but the last axis, `(C,)`; all maps have the same shape.

    Uses two kernels: one sums parts of the positions for all maps at once, the other sums the parts. In a single
    reduction, XLA gives 4,096 rows of 232 channels to 8 thread blocks: 57 us on an H200, which reads them in 1.
    """
    batch, *positions, channels = maps[0].shape
    rows = batch * math.prod(positions)
    parts = _parts(batch, rows // max(batch, 1))
    # Together: for separate reductions XLA writes out what they have in common, such as a mask.
    partial = sum_together([values.reshape(parts, rows // parts, channels) for values in maps], 1)
    return sum_together(lax.optimization_barrier(partial), 0)  # without a barrier XLA merges the two reductions again


def _parts(batch: int, positions: int) -> int:
    """How many parts to cut into: four times the square root of all positions, enough for a GPU's threads.

    With fewer, XLA considers what is summed too much work and writes some of it out first. A part lies within one image
    or consists of whole ones, so that a batch that jit shards over devices stays in place if the number of devices
    divides that of the parts, as powers of 2 do.
    """
    wanted = 4 * math.isqrt(batch * positions)
    if not wanted:
        return 1
    if batch <= wanted:
        return batch * max(n for n in range(1, min(wanted // batch, positions) + 1) if positions % n == 0)
    return min(n for n in range(wanted, batch + 1) if batch % n == 0)
