"""Convolutions: products with the moments of what they give, read through the BatchNorm of what they take."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.ops import reference, xla
from jaxnets.ops.deferred import Convolution, Filtered, Normalized
from jaxnets.ops.manual_axes import align
from jaxnets.ops.native import library
from jaxnets.ops.native.calls import UNBOUNDED, attributes_of, call, nothing
from jaxnets.ops.native.normalization import (
    affine_gradient,
    affine_of,
    apply_correction,
    as_it_is,
    correction_of,
    normalize,
)

DEPTHWISE_SIZES = ((3, 3), (5, 5))


class Plan(NamedTuple):
    """What is computed, beyond the arrays; hashable."""

    kind: str  # of the kernel: depthwise, pointwise or dense
    stride: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    groups: int
    moments: bool  # whether those of the output are wanted
    bounds: tuple[float, float]  # of the input's reading


def plan_of(convolution, moments=False):
    """The `Plan`, or None for what no kernel computes."""
    x, kernel, strides, padding, groups = convolution
    padding = tuple((int(low), int(high)) for low, high in padding)
    if x.dtype != jnp.float32 or strides[0] != strides[1]:
        return None
    if groups == x.shape[-1] > 1:
        fits = kernel.shape[:2] in DEPTHWISE_SIZES and strides[0] <= 2 and kernel.shape[3] == groups
        kind = "depthwise" if fits else None
    elif kernel.shape[:2] == (1, 1) and strides[0] == 1 and not any(map(any, padding)):
        kind = "pointwise"
    else:
        kind = "dense" if groups == 1 else None
    return kind and Plan(kind, int(strides[0]), padding, groups, moments, UNBOUNDED)


def conv(x, kernel, strides, padding):
    """See `jaxnets.ops.conv`, without groups."""
    return _plain(x, kernel, strides, padding, 1, xla.conv)


def pointwise_conv(x, kernel, strides):
    """See `jaxnets.ops.pointwise_conv`."""
    if strides != (1, 1):
        x = x[:, :: strides[0], :: strides[1]]
    return _plain(x, kernel, (1, 1), ((0, 0), (0, 0)), 1, lambda x, kernel, *_: xla.pointwise_conv(x, kernel, (1, 1)))


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
    return _conv(plan, x, kernel)[0]


# ---- products with their moments


def conv_batch_norm(convolution, scale, bias, epsilon, bounds, axis_name):
    """See `jaxnets.ops.conv_batch_norm`, for what has a plan; `Normalized`."""
    y, moments = _conv(plan_of(convolution, moments=True), convolution.x, convolution.kernel)
    affine, mean, var = affine_of(moments, scale, bias, epsilon, axis_name)
    z = Normalized(*align(y, affine), tuple(map(float, bounds)), normalize)
    return z, lax.stop_gradient(mean), lax.stop_gradient(var)


def _conv(plan, x, kernel):
    """The products and, if the plan wants them, their (3, C) moments: mean, its rounding error, variance."""
    library.require()
    affine = nothing()
    if isinstance(x, Normalized) and plan.kind != "dense":
        x, affine, plan = x.raw, x.affine, plan._replace(bounds=x.bounds)
    return _conv_moments(*align(jnp.asarray(x), affine, kernel), plan)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv_moments(x, affine, kernel, plan):
    return _forward(plan, x, affine, kernel, nothing(), UNBOUNDED)


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
    (dkernel,) = call("dense_kernel_gradient", [kernel.shape], *arrays, **_window(plan))
    if plan.stride == 1:
        # Another convolution: of dy, with the kernel turned around.
        padding = tuple(
            (extent - 1 - low, extent - 1 - high) for extent, (low, high) in zip(kernel.shape, plan.padding)
        )
        turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
        none = nothing()
        dx = _forward(plan._replace(padding=padding, moments=False), *align(dy, none, turned, none), UNBOUNDED)[0]
    else:
        strides = (plan.stride,) * 2
        (dx,) = jax.linear_transpose(lambda x: reference.conv(x, kernel, strides, plan.padding), x)(dy)
    return dx, affine, dkernel


def _forward(plan, x, affine, kernel, output, output_bounds):
    shape = Convolution(x, kernel, (plan.stride,) * 2, plan.padding, plan.groups).shape
    shapes = [shape, (3, shape[-1] if plan.moments else 0)]
    read = () if plan.kind == "dense" else (affine,)
    bounds = {"output_low": np.float32(output_bounds[0]), "output_high": np.float32(output_bounds[1])}
    arrays = align(x, *read, kernel, output)
    return tuple(call(plan.kind, shapes, *arrays, **bounds, **_attributes(plan)))


def _attributes(plan):
    if plan.kind == "dense":
        return _window(plan)
    return {
        **({"groups": np.int64(plan.groups)} if plan.kind == "pointwise" else _window(plan)),
        **attributes_of(plan.bounds),
    }


def _window(plan):
    (top, _), (left, _) = plan.padding
    return {"stride": np.int64(plan.stride), "top": np.int64(top), "left": np.int64(left)}


# ---- the affine known beforehand, as in evaluation


def conv_affine(convolution, gain, bias, bounds):
    """See `jaxnets.ops.conv_affine`, for what has a plan; `Filtered` of a depthwise one."""
    library.require()
    x, kernel, plan, bounds = convolution.x, convolution.kernel, plan_of(convolution), tuple(map(float, bounds))
    affine = jnp.stack([jnp.zeros_like(bias), gain, bias])
    if isinstance(x, Filtered) and plan.kind == "pointwise":
        return _separable(*align(x.x, x.kernel, x.affine, kernel, affine), (x.plan, plan), (x.bounds, bounds))
    arrays = align(jnp.asarray(x), kernel, affine)
    if plan.kind == "depthwise":
        return Filtered(*arrays, plan, bounds, _conv_affine)
    return _conv_affine(*arrays, plan, bounds)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv_affine(x, kernel, affine, plan, bounds):
    return _forward(plan, x, nothing(), kernel, affine, bounds)[0]


def _conv_affine_forward(x, kernel, affine, plan, bounds):
    def unfused(x, kernel, affine):
        return normalize(_conv(plan, x, kernel)[0], affine, bounds)

    return jax.vjp(unfused, x, kernel, affine)


_conv_affine.defvjp(_conv_affine_forward, lambda plan, bounds, vjp, dz: vjp(dz))


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _separable(x, kernel, affine, pointwise_kernel, pointwise_affine, plans, bounds):
    """A depthwise convolution and the 1x1 convolution that reads it, each with its affine, in one pass."""
    filtered = Filtered(x, kernel, affine, plans[0], bounds[0], _conv_affine)
    shape = (*filtered.shape[:3], pointwise_kernel.shape[3])
    arrays = align(x, kernel, affine, pointwise_kernel, pointwise_affine)
    low, high = (np.float32(bound) for bound in bounds[1])
    attributes = {**_window(plans[0]), "groups": np.int64(plans[1].groups), **attributes_of(bounds[0])}
    return call("separable", [shape], *arrays, **attributes, output_low=low, output_high=high)[0]


def _separable_forward(*args):
    *arrays, plans, bounds = args

    def unfused(x, kernel, affine, pointwise_kernel, pointwise_affine):
        filtered = _conv_affine(x, kernel, affine, plans[0], bounds[0])
        return _conv_affine(filtered, pointwise_kernel, pointwise_affine, plans[1], bounds[1])

    return jax.vjp(unfused, *arrays)


_separable.defvjp(_separable_forward, lambda plans, bounds, vjp, dz: vjp(dz))


def conv_bias(convolution, bias, bounds):
    """See `jaxnets.ops.conv_bias`, for what has a plan."""
    library.require()
    arrays = align(jnp.asarray(convolution.x), convolution.kernel, bias)
    return _conv_bias(*arrays, plan_of(convolution), tuple(map(float, bounds)))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv_bias(x, kernel, bias, plan, bounds):
    affine = as_it_is(bias.size).at[2].set(bias)
    return _forward(plan, x, nothing(), kernel, affine, bounds)[0]


def _conv_bias_forward(x, kernel, bias, plan, bounds):
    z = _conv_bias(x, kernel, bias, plan, bounds)
    return z, (x, kernel, z)


def _conv_bias_backward(plan, bounds, saved, dz):
    x, kernel, z = saved
    # Where z lies between the bounds is where it was not clipped: it stands for what it was before.
    none = nothing()
    arrays = align(dz, z, as_it_is(z.shape[-1]), none)
    shapes = [z.shape, (2, z.shape[-1]), (0,)]
    dy, sums, _ = call("normalize_gradient", shapes, *arrays, aliases={0: 0}, **attributes_of(bounds))
    moments = jnp.zeros((3, 0), jnp.float32)
    dx, _, dkernel = _conv_moments_backward(plan, (x, *align(none, x)[:1], kernel, z, moments), (dy, moments))
    return dx, dkernel, sums[0]


_conv_bias.defvjp(_conv_bias_forward, _conv_bias_backward)
