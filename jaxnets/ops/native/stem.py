"""A net's stem: a dense convolution and the max pooling that reads it, in one pass."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jaxnets.ops.lazy import LazyBiasedConv, LazyConv
from jaxnets.ops.manual_axes import align
from jaxnets.ops.native import convolution, evaluation, normalization, pooling
from jaxnets.ops.native.calls import attributes_of, call

MOST_WEIGHTS = 1 << 15  # every row of the map reads them all again: they have to stay in the nearest caches
LEAST_WIDTH = 16  # of the convolution's output, which is tiled row by row


class Stem(NamedTuple):
    """What to compute, apart from the arrays; hashable."""

    plan: convolution.KernelPlan
    bounds: tuple[float, float]  # of the convolution's output
    pooling: tuple  # window, strides, padding


def stem_parts(x):
    """How to compute x and from what, for `pooled_stem`: `(plan, bounds, arrays)`, or None."""
    if isinstance(x, LazyConv) and len(x.plans) == 1:
        (plan,), (bounds,), ((kernel, vector),), image = x.plans, x.bounds, x.layers, x.x
    elif isinstance(x, LazyBiasedConv):
        plan, bounds, kernel, vector, image = x.plan, x.bounds, x.convolution.kernel, x.bias, x.convolution.x
    else:
        return None
    if x.computed or plan.kind != "dense" or kernel.size > MOST_WEIGHTS or x.shape[2] < LEAST_WIDTH:
        return None
    return plan, bounds, (image, kernel, vector)


def pooled_stem(parts, window, strides, padding):
    """`jaxnets.ops.max_pool` of what the parts compute."""
    plan, bounds, arrays = parts
    return _stem(Stem(plan, bounds, (window, strides, padding)), *align(*arrays))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stem(how, x, kernel, vector):
    shape = how.plan.convolution(x, kernel).shape
    affine = vector if vector.ndim == 2 else normalization.shift_by(vector)
    attributes = {
        "map_height": np.int64(shape[1]),
        "map_width": np.int64(shape[2]),
        **convolution.window_of(how.plan),
        **attributes_of(how.bounds, "output_"),
        **{f"pool_{name}": value for name, value in pooling.pooling_attributes(*how.pooling).items()},
    }
    return call("stem", [pooling.output_shape(shape, *how.pooling)], *align(x, kernel, affine), **attributes)[0]


def _stem_forward(how, x, kernel, vector):
    return jax.vjp(partial(_composed, how), x, kernel, vector)


def _composed(how, x, kernel, vector):
    """The same in separate steps, whose gradients are defined."""
    if vector.ndim == 2:
        y = evaluation.evaluate(LazyConv(x, ((kernel, vector),), (how.plan,), (how.bounds,), evaluation.evaluate))
    else:
        biased = LazyBiasedConv(how.plan.convolution(x, kernel), vector, how.plan, how.bounds, convolution.concatenate)
        y = convolution.concatenate([biased])
    return pooling.max_pool(y, *how.pooling)


_stem.defvjp(_stem_forward, lambda how, vjp, dz: vjp(dz))
