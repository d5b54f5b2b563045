"""Convolutions and BatchNorm by C++ kernels, on the CPU and in float32; the rest is `xla`'s.

A convolution followed by BatchNorm writes its products once and takes their moments on the way; its normalised and
clipped values are written only where something other than a convolution wants them (`Normalized`): the next
convolution normalises what it reads. The gradients likewise: each convolution's reads its output's gradient, its
output and its input once, and gives the gradient before the BatchNorm that it read through.

All of it has first derivatives in reverse mode and no others.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets.errors import UserError
from jaxnets.ops import reference, xla
from jaxnets.ops.deferred import Convolution, Normalized
from jaxnets.ops.manual_axes import align
from jaxnets.ops.native import library

UNBOUNDED = (-float("inf"), float("inf"))
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


def batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    """See `jaxnets.ops.batch_norm`."""
    if any(a.dtype != jnp.float32 for a in (x, scale, bias)):
        return xla.batch_norm(x, scale, bias, epsilon, bounds, axis_name)
    library.require()
    affine, mean, var = _affine(_moments(x), scale, bias, epsilon, axis_name)
    z = _normalize(*align(x, affine), tuple(map(float, bounds)))
    return z, lax.stop_gradient(mean), lax.stop_gradient(var)


def conv_batch_norm(convolution, scale, bias, epsilon, bounds, axis_name):
    """See `jaxnets.ops.conv_batch_norm`, for what has a plan; `Normalized`."""
    y, moments = _conv(plan_of(convolution, moments=True), convolution.x, convolution.kernel)
    affine, mean, var = _affine(moments, scale, bias, epsilon, axis_name)
    z = Normalized(*align(y, affine), tuple(map(float, bounds)), _normalize)
    return z, lax.stop_gradient(mean), lax.stop_gradient(var)


def conv_affine(convolution, gain, bias, bounds):
    """See `jaxnets.ops.conv_affine`, for what has a plan."""
    library.require()
    affine = jnp.stack([jnp.zeros_like(bias), gain, bias])
    arrays = align(jnp.asarray(convolution.x), convolution.kernel, affine)
    return _conv_affine(*arrays, plan_of(convolution), tuple(map(float, bounds)))


def _affine(moments, scale, bias, epsilon, axis_name):
    """(mean, gain, bias) by channel that normalise, the mean and the variance."""
    # `rest` is what rounding took from the mean: with a small variance it would be seen.
    mean, rest, var = moments
    rest = lax.stop_gradient(rest)
    if axis_name is not None:
        of_all, of_all_rest = lax.pmean((mean, rest), axis_name)
        var = lax.pmean(var + jnp.square((mean - of_all) + (rest - of_all_rest)), axis_name)
        mean, rest = of_all, of_all_rest
    gain = scale * lax.rsqrt(var + epsilon)
    return jnp.stack([mean, gain, bias - rest * gain]), mean, var


# ---- convolution, with the moments of what it gives


def _conv(plan, x, kernel):
    """The products and, if the plan wants them, their (3, C) moments: mean, its rounding error, variance."""
    library.require()
    affine = jnp.zeros((0,), jnp.float32)
    if isinstance(x, Normalized):
        if plan.kind == "dense":
            x = jnp.asarray(x)
        else:
            x, affine, plan = x.raw, x.affine, plan._replace(bounds=x.bounds)
    return _conv_moments(*align(x, affine, kernel), plan)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv_moments(x, affine, kernel, plan):
    return _forward(plan, x, affine, kernel, jnp.zeros((0,), jnp.float32), UNBOUNDED)


def _conv_moments_forward(x, affine, kernel, plan):
    y, moments = _conv_moments(x, affine, kernel, plan)
    return (y, moments), (x, affine, kernel, y, moments)


def _conv_moments_backward(plan, saved, cotangents):
    x, affine, kernel, y, moments = saved
    dy, dmoments = cotangents
    correction = jnp.zeros((0,), jnp.float32)
    if plan.moments:
        (mean, rest, _), (dmean, _, dvar) = moments, dmoments
        count = max(y.size // y.shape[-1], 1)
        slope = 2 / count * dvar
        correction = jnp.stack([mean, slope, dmean / count - rest * slope])
    if plan.kind == "dense":
        return _dense_gradients(plan, dy, y, correction, x, affine, kernel)
    shapes = [x.shape, (2, x.shape[-1]) if affine.size else (2, 0), kernel.shape]
    arrays = align(dy, y, correction, x, affine, kernel)
    dx, sums, dkernel = _call(f"{plan.kind}_gradients", shapes, *arrays, **_attributes(plan))
    return dx, jnp.stack([-affine[1] * sums[0], sums[1], sums[0]]) if affine.size else affine, dkernel


_conv_moments.defvjp(_conv_moments_forward, _conv_moments_backward)


def _dense_gradients(plan, dy, y, correction, x, affine, kernel):
    if plan.moments:
        mean, slope, offset = correction
        dy = dy + ((y - mean) * slope + offset)
    arrays = align(dy, x)
    (dkernel,) = _call("dense_kernel_gradient", [kernel.shape], *arrays, **_window(plan))
    if plan.stride == 1:
        # Another convolution: of dy, with the kernel turned around.
        padding = tuple(
            (extent - 1 - low, extent - 1 - high) for extent, (low, high) in zip(kernel.shape, plan.padding)
        )
        turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
        none = jnp.zeros((0,), jnp.float32)
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
    return tuple(_call(plan.kind, shapes, *arrays, **bounds, **_attributes(plan)))


def _attributes(plan):
    if plan.kind == "dense":
        return _window(plan)
    return {
        **({"groups": np.int64(plan.groups)} if plan.kind == "pointwise" else _window(plan)),
        **_bounds(plan.bounds),
    }


def _window(plan):
    (top, _), (left, _) = plan.padding
    return {"stride": np.int64(plan.stride), "top": np.int64(top), "left": np.int64(left)}


def _bounds(bounds):
    return {"low": np.float32(bounds[0]), "high": np.float32(bounds[1])}


# ---- the affine known beforehand, as in evaluation


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv_affine(x, kernel, affine, plan, bounds):
    return _forward(plan, x, jnp.zeros((0,), jnp.float32), kernel, affine, bounds)[0]


def _conv_affine_forward(x, kernel, affine, plan, bounds):
    def unfused(x, kernel, affine):
        return _normalize(*align(_conv(plan, x, kernel)[0], affine), bounds)

    return jax.vjp(unfused, x, kernel, affine)


_conv_affine.defvjp(_conv_affine_forward, lambda plan, bounds, vjp, dz: vjp(dz))


# ---- normalisation by itself


@jax.custom_vjp
def _moments(x):
    return _call("moments", [(3, x.shape[-1])], x)[0]


def _moments_forward(x):
    moments = _moments(x)
    return moments, (x, moments)


def _moments_backward(saved, dmoments):
    x, (mean, rest, _) = saved
    dmean, _, dvar = dmoments
    count = max(x.size // x.shape[-1], 1)
    slope = 2 / count * dvar
    return ((x - mean) * slope + (dmean / count - rest * slope),)


_moments.defvjp(_moments_forward, _moments_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normalize(x, affine, bounds):
    return _call("normalize", [x.shape], x, affine, **_bounds(bounds))[0]


def _normalize_backward(bounds, saved, dz):
    x, affine = saved
    shapes = [x.shape, (2, x.shape[-1])]
    dx, sums = _call("normalize_gradient", shapes, *align(dz, x, affine), aliases={0: 0}, **_bounds(bounds))
    return dx, jnp.stack([-affine[1] * sums[0], sums[1], sums[0]])


_normalize.defvjp(lambda x, affine, bounds: (_normalize(x, affine, bounds), (x, affine)), _normalize_backward)


# ---- calls


def _call(name, shapes, *args, aliases=None, **attributes):
    """Run a kernel; float32 results of these shapes, one after another under vmap."""
    results = [_result(shape, args[0]) for shape in shapes]

    @jax.custom_jvp
    def kernel(*args):
        call = jax.ffi.ffi_call(f"jaxnets_{name}", results, vmap_method="sequential", input_output_aliases=aliases)
        return call(*args, **attributes)

    @kernel.defjvp
    def no_jvp(primals, tangents):
        raise UserError("the native operators have first derivatives only: use JAXNETS_OPS=xla for the second")

    return kernel(*args)


def _result(shape, like):
    """Inside shard_map a result varies over the mesh as the arguments do."""
    aval = jax.typeof(like)
    if hasattr(aval, "vma"):  # renamed within JAX 0.10
        return jax.ShapeDtypeStruct(shape, jnp.float32, vma=aval.vma)
    if not aval.manual_axis_type.varying:
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    sharding = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding, manual_axis_type=aval.manual_axis_type)


channel_shuffle = xla.channel_shuffle

__all__ = [
    "batch_norm",
    "channel_shuffle",
    "conv",
    "conv_affine",
    "conv_batch_norm",
    "depthwise_conv",
    "grouped_conv",
    "pointwise_conv",
]
