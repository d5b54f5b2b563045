"""Convolutions that return their output's moments, and apply the BatchNorm of their input as they read it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.ops import reference, xla
from jaxnets.ops.deferred import Biased, Convolution, Normalized
from jaxnets.ops.manual_axes import align
from jaxnets.ops.native import library
from jaxnets.ops.native.calls import attributes_of, call, nothing
from jaxnets.ops.native.normalization import (
    affine_gradient,
    affine_of,
    apply_correction,
    as_it_is,
    correction_of,
    normalize,
    shift_by,
)
from jaxnets.ops.reference import NO_PADDING, UNBOUNDED

DEPTHWISE_SIZES = ((3, 3), (5, 5))


class Plan(NamedTuple):
    """What is computed, beyond the arrays; hashable."""

    kind: str  # of the kernel: depthwise, pointwise or dense
    stride: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    groups: int
    moments: bool  # whether those of the output are wanted
    bounds: tuple[float, float]  # of the input's reading
    shuffle: int  # groups in which the output's channels, and their moments, are shuffled

    def convolution(self, x, kernel):
        """`Convolution` of these."""
        return Convolution(x, kernel, (self.stride,) * 2, self.padding, self.groups)


ALONE, SUM, INTERLEAVED = range(3)  # the products, plus another array, in turns with another array's channels


class Together(NamedTuple):
    """Where the products of a convolution go, and with what other array; hashable."""

    join: int = ALONE
    first: int = 0  # of x's channels that are read
    other_first: int = 0  # of the other's
    channels: int = 0  # of the array that is written into, or 0: one for the products alone; `other` is it so far
    to: int = 0  # the first channel written there

    def of_output(self, channels):
        """The channels of what is delivered, of products with so many."""
        return self.channels or channels * (2 if self.join == INTERLEAVED else 1)

    def attributes(self, *names):
        """As a kernel wants them."""
        return {name: np.int64(getattr(self, name)) for name in names}


def plan_of(convolution, moments=False, shuffle=1):
    """The `Plan`, or None for what no kernel computes."""
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
    return kind and Plan(kind, strides[0], padding, groups, moments, UNBOUNDED, shuffle)


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
    """See `jaxnets.ops.conv_batch_norm`, for what has a plan; `Normalized`."""
    y, moments = products(plan_of(convolution, True, shuffle), convolution.x, convolution.kernel)
    scale, bias = (reference.channel_shuffle(vector, shuffle) for vector in (scale, bias))
    affine, mean, var = affine_of(moments, scale, bias, epsilon, axis_name)
    z = Normalized(*align(y, affine), bounds, normalize)
    # Its own inverse, with as many groups as there were channels in each.
    mean, var = (reference.channel_shuffle(vector, vector.size // shuffle) for vector in (mean, var))
    return z, lax.stop_gradient(mean), lax.stop_gradient(var)


def products(plan, x, kernel):
    """The products and, if the plan wants them, their (3, C) moments: mean, its rounding error, variance."""
    library.require()
    affine = nothing()
    if isinstance(x, Normalized) and plan.kind != "dense":
        x, affine, plan = x.raw, x.affine, plan._replace(bounds=x.bounds)
    return _conv_moments(*align(jnp.asarray(x), affine, kernel), plan)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv_moments(x, affine, kernel, plan):
    return forward(plan, x, affine, kernel)


def _conv_moments_forward(x, affine, kernel, plan):
    y, moments = _conv_moments(x, affine, kernel, plan)
    return (y, moments), (x, affine, kernel, y, moments)


def _conv_moments_backward(plan, saved, cotangents):
    x, affine, kernel, y, moments = saved
    dy, dmoments = cotangents
    correction = correction_of(y, moments, dmoments) if plan.moments else nothing()
    if plan.kind == "dense":
        return _dense_gradients(plan, dy, y, correction, x, affine, kernel)
    shapes = [x.shape, (2, x.shape[-1]) if affine.size else (2, 0), kernel.shape]
    arrays = align(dy, y, correction, x, affine, kernel)
    dx, sums, dkernel = call(f"{plan.kind}_gradients", shapes, *arrays, **_attributes(plan))
    return dx, affine_gradient(affine, sums), dkernel


_conv_moments.defvjp(_conv_moments_forward, _conv_moments_backward)


def _dense_gradients(plan, dy, y, correction, x, affine, kernel):
    if plan.moments:
        dy = dy + apply_correction(y, correction)
    arrays = align(dy, x)
    (dkernel,) = call("dense_kernel_gradient", [kernel.shape], *arrays, **window_of(plan))
    if plan.stride == 1:
        # Another convolution: of dy, with the kernel turned around.
        padding = tuple(
            (extent - 1 - low, extent - 1 - high) for extent, (low, high) in zip(kernel.shape, plan.padding)
        )
        turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
        none = nothing()
        dx = forward(plan._replace(padding=padding, moments=False), *align(dy, none, turned))[0]
    else:
        strides = (plan.stride,) * 2
        (dx,) = jax.linear_transpose(lambda x: reference.conv(x, kernel, strides, plan.padding), x)(dy)
    return dx, affine, dkernel


def forward(plan, x, affine, kernel, output=None, bounds=UNBOUNDED, together=None, other=None):
    """The kernel's two results: the products, read as `output` and `bounds` say, and their moments.

    Args:
      plan: what to compute.
      x, affine, kernel: the operands; what x is read as, or `nothing`.
      output: `(3, C)`: mean, gain, bias.
      bounds: `(low, high)` that the products are clipped to; only where there is `output`.
      together, other: where the products go and with what, but for those of a depthwise convolution.
    """
    together = together or Together()
    output, other_or_nothing = (nothing() if array is None else array for array in (output, other))
    *rest, channels = plan.convolution(x, kernel).shape
    shapes = [(*rest, together.of_output(channels)), (3, channels if plan.moments else 0)]
    attributes = {**output_attributes(bounds), **_attributes(plan)}
    read, joined = (() if plan.kind == "dense" else (affine,)), ()
    if plan.kind != "depthwise":
        joined = (other_or_nothing,)
        attributes |= together.attributes("join", "other_first", "to", *(["first"] if plan.kind == "pointwise" else []))
    arrays = align(x, *read, kernel, output, *joined)
    aliases = {len(arrays) - 1: 0} if together.channels and other is not None else None
    return tuple(call(plan.kind, shapes, *arrays, aliases=aliases, **attributes))


def _attributes(plan):
    if plan.kind == "dense":
        return window_of(plan)
    return {**(_grouping(plan) if plan.kind == "pointwise" else window_of(plan)), **attributes_of(plan.bounds)}


def output_attributes(bounds):
    """`(low, high)` of the output as a kernel wants it."""
    return {"output_low": np.float32(bounds[0]), "output_high": np.float32(bounds[1])}


def _grouping(plan):
    return {"groups": np.int64(plan.groups), "shuffle": np.int64(plan.shuffle)}


def window_of(plan):
    """Stride and padding as a kernel wants them."""
    (top, _), (left, _) = plan.padding
    return {"stride": np.int64(plan.stride), "top": np.int64(top), "left": np.int64(left)}


# ---- with a bias


def conv_bias(convolution, bias, bounds):
    """See `jaxnets.ops.conv_bias`, for what has a plan; `Biased`."""
    library.require()
    convolution = convolution._replace(x=jnp.asarray(convolution.x))
    return Biased(convolution, bias, plan_of(convolution), bounds, concatenate)


def concatenate(parts):
    """Of `Biased` with the same bounds, one array; only one may be a depthwise convolution, and then alone."""
    arrays = [array for part in parts for array in (part.convolution.x, part.convolution.kernel, part.bias)]
    return _conv_biases(tuple(part.plan for part in parts), parts[0].bounds, *align(*arrays))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv_biases(plans, bounds, *operands):
    """Operands: x, kernel and bias of each. All write their part of the same memory."""
    y, to, channels = None, 0, sum(bias.size for bias in operands[2::3])
    for plan, x, kernel, bias in zip(plans, operands[::3], operands[1::3], operands[2::3]):
        affine = shift_by(bias)
        y, _ = forward(plan, x, nothing(), kernel, affine, bounds, Together(channels=channels, to=to), y)
        to += bias.size
    return y


def _conv_biases_forward(plans, bounds, *operands):
    z = _conv_biases(plans, bounds, *operands)
    return z, (operands, z)


def _conv_biases_backward(plans, bounds, saved, dz):
    operands, z = saved
    # Where z lies between the bounds is where it was not clipped: it stands for what it was before.
    arrays = align(dz, z, as_it_is(z.shape[-1]), nothing())
    shapes = [z.shape, (2, z.shape[-1]), (0,)]
    dy, sums, _ = call("normalize_gradient", shapes, *arrays, aliases={0: 0}, **attributes_of(bounds))
    gradients, to = [], 0
    for plan, x, kernel, bias in zip(plans, operands[::3], operands[1::3], operands[2::3]):
        part = dy[..., to : to + bias.size]
        unread, moments = align(nothing(), jnp.zeros((3, 0), jnp.float32), x)[:2]
        dx, _, dkernel = _conv_moments_backward(plan, (x, unread, kernel, part, moments), (part, moments))
        gradients += [dx, dkernel, sums[0, to : to + bias.size]]
        to += bias.size
    return tuple(gradients)


_conv_biases.defvjp(_conv_biases_forward, _conv_biases_backward)
