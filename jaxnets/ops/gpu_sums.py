"""Sums over all positions of a map, channel by channel, as a GPU takes them fast."""

import math

from jax import lax

from jaxnets.ops.xla_depthwise import sum_together


def sums(*maps):
    """Of each of the maps `(..., C)`, all of one shape, the sum over all but the last axis, `(C,)`.

    In two kernels: parts of the positions for all maps at once, then the parts. As one reduction, XLA gives 4,096 rows
    of 232 channels to 8 blocks of threads: 57 us on an H200, which reads them in 1.
    """
    batch, *positions, channels = maps[0].shape
    rows = batch * math.prod(positions)
    parts = _parts(batch, rows // max(batch, 1))
    # Together: of reductions one by one XLA writes down what they have in common, such as a mask.
    partial = sum_together([values.reshape(parts, rows // parts, channels) for values in maps], 1)
    return sum_together(lax.optimization_barrier(partial), 0)  # without a barrier XLA makes one reduction of both again


def _parts(batch: int, positions: int) -> int:
    """Into how many parts to cut: four times the square root of all, so that a GPU has parts enough for its threads.

    With fewer, XLA takes what is summed for too much work, and writes some of it down first. A part is of one image or
    of whole ones, so that a batch that jit spreads over devices stays where it is, if their number divides that of
    the parts, as powers of 2 do.
    """
    wanted = 4 * math.isqrt(batch * positions)
    if not wanted:
        return 1
    if batch <= wanted:
        return batch * max(n for n in range(1, min(wanted // batch, positions) + 1) if positions % n == 0)
    return min(n for n in range(wanted, batch + 1) if batch % n == 0)
