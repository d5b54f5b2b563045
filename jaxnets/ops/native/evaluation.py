"""Convolutions whose affine is known beforehand, like a BatchNorm's in evaluation, fused with what reads them.

They stay `LazyConv`: a 1x1 convolution computes the depthwise one that it reads; a sum, or a concatenation and shuffle,
is done in the epilogue; and a stem is pooled as it is computed (`stem`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.ops import reference
from jaxnets.ops.lazy import ChannelSlice, LazyConv
from jaxnets.ops.manual_axes import align
from jaxnets.ops.native import channels, normalization
from jaxnets.ops.native.calls import attributes_of, call, nothing
from jaxnets.ops.native.convolution import (
    ALONE,
    INTERLEAVED,
    SUM,
    Epilogue,
    KernelPlan,
    forward,
    plan_of,
    products,
    window_of,
)
from jaxnets.ops.reference import UNBOUNDED


class Evaluation(NamedTuple):
    """What to compute, apart from the arrays; hashable."""

    plans: tuple[KernelPlan, ...]  # of the convolutions: one, or a depthwise and a 1x1
    bounds: tuple[tuple[float, float], ...]  # of each one's output
    count: int  # channels of the input
    epilogue: Epilogue
    sum_bounds: tuple[float, float]


def conv_affine(convolution, gain, bias, bounds, shuffle):
    """See `jaxnets.ops.conv_affine`; only for a convolution with a plan. Returns a `LazyConv`."""
    x, plan = convolution.x, plan_of(convolution, shuffle=shuffle)
    layer = (convolution.kernel, jnp.stack([jnp.zeros_like(bias), gain, bias]))
    if plan.kind == "pointwise" and shuffle == 1 and isinstance(x, LazyConv) and x.depthwise and not x.computed:
        return LazyConv(x.x, (*x.layers, layer), (*x.plans, plan), (*x.bounds, bounds), evaluate)
    if not (plan.kind == "pointwise" and isinstance(x, ChannelSlice)):
        x = jnp.asarray(x)
    return LazyConv(x, (layer,), (plan,), (bounds,), evaluate)


def evaluate(lazy, other=None, interleaved=False, sum_bounds=UNBOUNDED):
    """The array: `lazy`, or its sum with `other`, clipped, or the channels of `other` and `lazy` interleaved.

    With an `other`, an array or `ChannelSlice`, `lazy` must not be a depthwise convolution alone, and must have no
    bounds for a sum.
    """
    x, first = _place(lazy.x)
    join = ALONE if other is None else INTERLEAVED if interleaved else SUM
    other, other_first = (nothing(), 0) if other is None else _place(other)
    epilogue = Epilogue(join, first, other_first)
    how = Evaluation(lazy.plans, lazy.bounds, lazy.x.shape[3], epilogue, sum_bounds)
    return _evaluate(how, *align(x, other, *(array for layer in lazy.layers for array in layer)))


def _place(x):
    return (x.whole, x.first) if isinstance(x, ChannelSlice) else (jnp.asarray(x), 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _evaluate(how, x, other, *layers):
    bounds = how.sum_bounds if how.epilogue.join == SUM else how.bounds[-1]
    *_, (kernel, affine) = pairs = list(zip(layers[::2], layers[1::2]))
    if len(pairs) == 1:
        return forward(how.plans[0], x, nothing(), kernel, affine, bounds, how.epilogue, other)[0]
    lazy = LazyConv(x, pairs, how.plans, how.bounds, evaluate)
    *rest, features = lazy.shape
    attributes = {
        **window_of(how.plans[0]),
        **attributes_of(how.bounds[0]),
        **how.epilogue.attributes("join", "other_first"),
        **attributes_of(bounds, "output_"),
        "groups": np.int64(how.plans[1].groups),
    }
    return call("separable", [(*rest, how.epilogue.of_output(features))], *align(x, *layers, other), **attributes)[0]


def _evaluate_forward(how, x, other, *layers):
    return jax.vjp(partial(_composed, how), x, other, *layers)


def _composed(how, x, other, *layers):
    """The same in separate steps, whose gradients are defined."""
    y = jnp.asarray(ChannelSlice(x, how.epilogue.first, how.count))
    for plan, bounds, kernel, affine in zip(how.plans, how.bounds, layers[::2], layers[1::2]):
        affine = reference.channel_shuffle(affine, plan.shuffle)
        y = normalization.normalize(products(plan, y, kernel)[0], affine, bounds)
    if how.epilogue.join == ALONE:
        return y
    other = jnp.asarray(ChannelSlice(other, how.epilogue.other_first, y.shape[3]))
    if how.epilogue.join == SUM:
        return normalization.add(other, y, how.sum_bounds)
    return channels.interleave(other, y)


_evaluate.defvjp(_evaluate_forward, lambda how, vjp, dz: vjp(dz))
