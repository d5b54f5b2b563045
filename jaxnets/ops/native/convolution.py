"""Convolutions that return their output's moments and apply their input's BatchNorm as they read it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.ops import reference, xla
from jaxnets.ops.lazy import Convolution, LazyBatchNorm, LazyBiasedConv
from jaxnets.ops.manual_axes import align
from jaxnets.ops.native.calls import attributes_of, call, nothing
from jaxnets.ops.native.normalization import (
    affine_gradient,
    affine_of,
    correction_of,
    normalize,
    shift_by,
    unclipped_gradient,
)
from jaxnets.ops.reference import NO_PADDING, UNBOUNDED

DEPTHWISE_SIZES = ((3, 3), (5, 5))
IMAGE_CHANNELS = 4  # an input with at most this many is taken to be the net's images


class KernelPlan(NamedTuple):
    """What to compute, apart from the arrays; hashable."""

    kind: str  # of kernel: depthwise, pointwise or dense
    stride: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    groups: int
    moments: bool  # whether to compute the output's
    bounds: tuple[float, float]  # to clip the input to as it is read
    shuffle: int  # groups in which the output's channels, and their moments, are shuffled

    def convolution(self, x, kernel):
        """The `Convolution` of x and kernel."""
        return Convolution(x, kernel, (self.stride,) * 2, self.padding, self.groups)


ALONE, SUM, INTERLEAVED = range(3)  # the products alone, added to another array, alternating with its channels


class Epilogue(NamedTuple):
    """Where the products of a convolution go, and which other array they join; hashable."""

    join: int = ALONE
    first: int = 0  # the first channel of x to read
    other_first: int = 0  # the first channel of the other array to read
    channels: int = 0  # of the array to write into, passed as `other` once begun; 0: a new array for the result alone
    to: int = 0  # the first channel to write there

    def of_output(self, channels):
        """Channels of the output, given those of the products."""
        return self.channels or channels * (2 if self.join == INTERLEAVED else 1)

    def attributes(self, *names):
        """The named fields as a kernel's attributes."""
        return {name: np.int64(getattr(self, name)) for name in names}


def plan_of(convolution, moments=False, shuffle=1):
    """The `KernelPlan`, or None if no kernel computes the convolution."""
    x, kernel, strides, padding, groups = convolution
    if x.dtype != jnp.float32 or strides[0] != strides[1]:
        return None
    if 0 in (*x.shape[1:], *kernel.shape, *convolution.shape[1:]):  # no image, channel or output: nothing to speed up
        return None
    if groups == x.shape[-1] > 1:
        fits = kernel.shape[:2] in DEPTHWISE_SIZES and strides[0] <= 2 and kernel.shape[3] == groups
        kind = "depthwise" if fits else None
    elif kernel.shape[:2] == (1, 1) and strides[0] == 1 and not any(map(any, padding)):
        kind = "pointwise"
    else:
        kind = "dense" if groups == 1 else None
    if shuffle > 1 and kind != "pointwise":
        return None
    return kind and KernelPlan(kind, strides[0], padding, groups, moments, UNBOUNDED, shuffle)


def conv(x, kernel, strides, padding):
    """See `jaxnets.ops.conv`, without groups."""
    return _plain(x, kernel, strides, padding, 1, xla.conv)


def pointwise_conv(x, kernel, strides):
    """See `jaxnets.ops.pointwise_conv`."""
    if strides != (1, 1):
        x = x[:, :: strides[0], :: strides[1]]
    return _plain(x, kernel, (1, 1), NO_PADDING, 1, lambda x, kernel, *_: xla.pointwise_conv(x, kernel, (1, 1)))


def grouped_conv(x, kernel, strides, padding, feature_group_count):
    """See `jaxnets.ops.grouped_conv`; native for 1x1."""
    portable = partial(xla.grouped_conv, feature_group_count=feature_group_count)
    return _plain(x, kernel, strides, padding, feature_group_count, portable)


def depthwise_conv(x, kernel, strides, padding):
    """See `jaxnets.ops.depthwise_conv`; native for 3x3 and 5x5, strides 1 and 2, without a multiplier."""
    return _plain(x, kernel, strides, padding, x.shape[-1], xla.depthwise_conv)


def _plain(x, kernel, strides, padding, groups, portable):
    plan = plan_of(Convolution(x, kernel, strides, padding, groups))
    if plan is None:
        return portable(x, kernel, strides, padding)
    return products(plan, x, kernel)[0]


# ---- products with their moments


def conv_batch_norm(convolution, scale, bias, epsilon, bounds, axis_name, shuffle):
    """See `jaxnets.ops.conv_batch_norm`; only for a convolution with a plan. Returns a `LazyBatchNorm`."""
    y, moments = products(plan_of(convolution, True, shuffle), convolution.x, convolution.kernel)
    scale, bias = (reference.channel_shuffle(vector, shuffle) for vector in (scale, bias))
    affine, mean, var = affine_of(moments, scale, bias, epsilon, axis_name)
    z = LazyBatchNorm(*align(y, affine), bounds, normalize)
    # The inverse shuffle has as many groups as each group had channels.
    mean, var = (reference.channel_shuffle(vector, vector.size // shuffle) for vector in (mean, var))
    return z, lax.stop_gradient(mean), lax.stop_gradient(var)


def products(plan, x, kernel):
    """The products and, if the plan asks for them, their (3, C) moments: mean, its rounding error, variance."""
    affine = nothing()
    if isinstance(x, LazyBatchNorm) and plan.kind != "dense":
        x, affine, plan = x.raw, x.affine, plan._replace(bounds=x.bounds)
    return _conv_moments(*align(jnp.asarray(x), affine, kernel), plan)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv_moments(x, affine, kernel, plan):
    return forward(plan, x, affine, kernel)


def _conv_moments_forward(x, affine, kernel, plan):
    y, moments = _conv_moments(x, affine, kernel, plan)
    return (y, moments), (x, affine, kernel, y if plan.moments else nothing(), moments)


def _conv_moments_backward(plan, saved, cotangents):
    x, affine, kernel, y, moments = saved
    dy, dmoments = cotangents
    correction = correction_of(y, moments, dmoments) if plan.moments else nothing()
    if plan.kind == "dense":
        dx, dkernel, _ = _dense_gradients(plan, dy, y, correction, x, kernel)
        return dx, affine, dkernel
    run = _depthwise_gradients if plan.kind == "depthwise" else _pointwise_gradients
    dx, sums, dkernel, *_ = run(plan, dy, y, correction, x, affine, kernel)
    return dx, affine_gradient(affine, sums), dkernel


_conv_moments.defvjp(_conv_moments_forward, _conv_moments_backward)


class Part(NamedTuple):
    """The part of dy and y that belongs to one convolution with a bias; hashable."""

    to: int = 0  # its first channel
    bias: int = 0  # its number of channels, or 0: no bias
    bounds: tuple[float, float] = UNBOUNDED  # that y was clipped to

    def attributes(self):
        """Its place and bounds as a kernel's attributes."""
        return {"to": np.int64(self.to), **attributes_of(self.bounds, "output_")}


WHOLE = Part()

# The gradients take dy and y (or `nothing`): y with the `correction_of` its moments, or alone, after bias and clipping.
# They return those of x, of the affine that x was read through (as sums: see `affine_gradient`), kernel and bias.


def _dense_gradients(plan, dy, y, correction, x, kernel, part=WHOLE):
    arrays, attributes = align(dy, y, correction, x, kernel), {**_attributes(plan), **part.attributes()}
    of_x, others, none = [x.shape], [kernel.shape, (part.bias,)], [(0,)]
    if x.shape[-1] > IMAGE_CHANNELS:
        return call("dense_gradients", of_x + others, *arrays, **attributes)
    # A net's images: nothing uses their gradient, and XLA drops it if it is a separate call.
    dx, *_ = call("dense_gradients", of_x + 2 * none, *arrays, **attributes)
    _, *rest = call("dense_gradients", none + others, *arrays, **attributes)
    return dx, *rest


def _pointwise_gradients(plan, dy, y, correction, x, affine, kernel, part=WHOLE):
    shapes = [x.shape, (2, affine.size and x.shape[-1]), kernel.shape, (part.bias,)]
    arrays = align(dy, y, correction, x, affine, kernel)
    return call("pointwise_gradients", shapes, *arrays, **_attributes(plan), **part.attributes())


def _depthwise_gradients(plan, dy, y, correction, x, affine, kernel):
    shapes = [x.shape, (2, affine.size and x.shape[-1]), kernel.shape]
    return call("depthwise_gradients", shapes, *align(dy, y, correction, x, affine, kernel), **_attributes(plan))


def forward(plan, x, affine, kernel, output=None, bounds=UNBOUNDED, epilogue=None, other=None):
    """The kernel's two results: the products, with `output` and `bounds` applied, and their moments.

    Args:
      plan: what to compute.
      x, affine, kernel: the operands; `affine` is applied to x as it is read, or `nothing`.
      output: `(3, C)`: mean, gain, bias.
      bounds: `(low, high)` to clip the products to; used only with `output`.
      epilogue, other: where the products go and what they join; not for a depthwise convolution.
    """
    epilogue = epilogue or Epilogue()
    output, other_or_nothing = (nothing() if array is None else array for array in (output, other))
    *rest, channels = plan.convolution(x, kernel).shape
    shapes = [(*rest, epilogue.of_output(channels)), (3, channels if plan.moments else 0)]
    attributes = {**attributes_of(bounds, "output_"), **_attributes(plan)}
    read, joined = (() if plan.kind == "dense" else (affine,)), ()
    if plan.kind != "depthwise":
        joined = (other_or_nothing,)
        attributes |= epilogue.attributes("join", "other_first", "to", *(["first"] if plan.kind == "pointwise" else []))
    arrays = align(x, *read, kernel, output, *joined)
    aliases = {len(arrays) - 1: 0} if epilogue.channels and other is not None else None
    return tuple(call(plan.kind, shapes, *arrays, aliases=aliases, **attributes))


def _attributes(plan):
    if plan.kind == "dense":
        return window_of(plan)
    return {**(_grouping(plan) if plan.kind == "pointwise" else window_of(plan)), **attributes_of(plan.bounds)}


def _grouping(plan):
    return {"groups": np.int64(plan.groups), "shuffle": np.int64(plan.shuffle)}


def window_of(plan):
    """Stride and padding as a kernel's attributes."""
    (top, _), (left, _) = plan.padding
    return {"stride": np.int64(plan.stride), "top": np.int64(top), "left": np.int64(left)}


# ---- with a bias


def conv_bias(convolution, bias, bounds):
    """See `jaxnets.ops.conv_bias`; only for a convolution with a plan. Returns a `LazyBiasedConv`."""
    convolution = convolution._replace(x=jnp.asarray(convolution.x))
    return LazyBiasedConv(convolution, bias, plan_of(convolution), bounds, concatenate)


def concatenate(parts):
    """One array of several `LazyBiasedConv` with the same bounds; a depthwise convolution must be the only one."""
    arrays = [array for part in parts for array in (part.convolution.x, part.convolution.kernel, part.bias)]
    return _conv_biases(tuple(part.plan for part in parts), parts[0].bounds, *align(*arrays))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv_biases(plans, bounds, *operands):
    """Operands: x, kernel and bias of each. Each writes its part of the same memory."""
    y, to, channels = None, 0, sum(bias.size for bias in operands[2::3])
    for plan, x, kernel, bias in zip(plans, operands[::3], operands[1::3], operands[2::3]):
        affine = shift_by(bias)
        y, _ = forward(plan, x, nothing(), kernel, affine, bounds, Epilogue(channels=channels, to=to), y)
        to += bias.size
    return y


def _conv_biases_forward(plans, bounds, *operands):
    z = _conv_biases(plans, bounds, *operands)
    return z, (operands, nothing() if bounds == UNBOUNDED else z)


def _conv_biases_backward(plans, bounds, saved, dz):
    operands, z = saved
    gradients, to, none = [], 0, nothing()
    for plan, x, kernel, bias in zip(plans, operands[::3], operands[1::3], operands[2::3]):
        part = Part(to, bias.size, bounds)
        if plan.kind == "dense":
            dx, dkernel, dbias = _dense_gradients(plan, dz, z, none, x, kernel, part)
        elif plan.kind == "pointwise":
            dx, _, dkernel, dbias = _pointwise_gradients(plan, dz, z, none, x, none, kernel, part)
        else:
            dy, dbias = unclipped_gradient(dz, z if z.size else dz, bounds)
            dx, _, dkernel = _depthwise_gradients(plan, dy, none, none, x, none, kernel)
        gradients += [dx, dkernel, dbias]
        to += bias.size
    return tuple(gradients)


_conv_biases.defvjp(_conv_biases_forward, _conv_biases_backward)
