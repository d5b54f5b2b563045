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
    z = normalize(x, affine, tuple(map(float, bounds)))
    return z, lax.stop_gradient(mean), lax.stop_gradient(var)


def conv_batch_norm(convolution, scale, bias, epsilon, bounds, axis_name):
    """See `jaxnets.ops.conv_batch_norm`, for what has a plan; `Normalized`."""
    y, moments = _conv(plan_of(convolution, moments=True), convolution.x, convolution.kernel)
    affine, mean, var = _affine(moments, scale, bias, epsilon, axis_name)
    z = Normalized(*align(y, affine), tuple(map(float, bounds)), normalize)
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
    return dx, _affine_gradient(affine, sums), dkernel


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
        return normalize(_conv(plan, x, kernel)[0], affine, bounds)

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


def normalize(x, affine, bounds, added=None):
    """clip((x - mean) * gain + bias + added), `affine` being `(3, C)`: mean, gain, bias."""
    added = jnp.zeros((0,), jnp.float32) if added is None else added
    return _normalize(*align(x, affine, added), bounds)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x, affine, added, bounds):
    return _call("normalize", [x.shape], x, affine, added, **_bounds(bounds))[0]


def _normalize_forward(x, affine, added, bounds):
    z = _normalize(x, affine, added, bounds)
    return z, (x, affine, added, z if added.size and bounds != UNBOUNDED else jnp.zeros_like(added, shape=(0,)))


def _normalize_backward(bounds, saved, dz):
    x, affine, added, z = saved
    shapes = [x.shape, (2, x.shape[-1]), x.shape if z.size else (0,)]
    arrays = align(dz, x, affine, z)
    dx, sums, d_added = _call("normalize_gradient", shapes, *arrays, aliases={0: 0}, **_bounds(bounds))
    if not z.size:
        d_added = dz if added.size else added
    return dx, _affine_gradient(affine, sums), d_added


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _affine_gradient(affine, sums):
    """From the sums of dz where it was not clipped, and of that times x - mean; `affine` itself if it is empty."""
    return jnp.stack([-affine[1] * sums[0], sums[1], sums[0]]) if affine.size else affine


def add(x, y, bounds):
    """See `jaxnets.ops.add`; y is `Normalized`, without bounds."""
    return normalize(y.raw, y.affine, tuple(map(float, bounds)), jnp.asarray(x))


def conv_bias(convolution, bias, bounds):
    """See `jaxnets.ops.conv_bias`, for what has a plan."""
    library.require()
    arrays = align(jnp.asarray(convolution.x), convolution.kernel, bias)
    return _conv_bias(*arrays, plan_of(convolution), tuple(map(float, bounds)))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv_bias(x, kernel, bias, plan, bounds):
    affine = jnp.stack([jnp.zeros_like(bias), jnp.ones_like(bias), bias])
    return _forward(plan, x, jnp.zeros((0,), jnp.float32), kernel, affine, bounds)[0]


def _conv_bias_forward(x, kernel, bias, plan, bounds):
    z = _conv_bias(x, kernel, bias, plan, bounds)
    return z, (x, kernel, z)


def _conv_bias_backward(plan, bounds, saved, dz):
    x, kernel, z = saved
    # Where z lies between the bounds is where it was not clipped: it stands for what it was before.
    nothing = jnp.zeros((0,), jnp.float32)
    as_it_is = jnp.zeros((3, z.shape[-1])).at[1].set(1)
    arrays = align(dz, z, as_it_is, nothing)
    shapes = [z.shape, (2, z.shape[-1]), (0,)]
    dy, sums, _ = _call("normalize_gradient", shapes, *arrays, aliases={0: 0}, **_bounds(bounds))
    moments = jnp.zeros((3, 0), jnp.float32)
    dx, _, dkernel = _conv_moments_backward(plan, (x, *align(nothing, x)[:1], kernel, z, moments), (dy, moments))
    return dx, dkernel, sums[0]


_conv_bias.defvjp(_conv_bias_forward, _conv_bias_backward)


# ---- channels in another order


def channel_shuffle(x, groups):
    """See `jaxnets.ops.channel_shuffle`; of `Normalized`, the same."""
    if isinstance(x, Normalized):
        affine = reference.channel_shuffle(x.affine, groups)
        return Normalized(channel_shuffle(x.raw, groups), affine, x.bounds, x.compute)
    if x.dtype != jnp.float32 or x.ndim != 4:
        return xla.channel_shuffle(x, groups)
    library.require()
    return _shuffle(x, groups)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shuffle(x, groups):
    return _call("shuffle", [x.shape], x, groups=np.int64(groups))[0]


_shuffle.defvjp(
    lambda x, groups: (_shuffle(x, groups), None),
    lambda groups, _, dy: (_shuffle(dy, dy.shape[-1] // groups),),
)


def interleave(a, b):
    """`channel_shuffle` of two arrays' channels, one behind the other, in two groups; either may be `Normalized`."""
    library.require()
    parts = [(x.raw, x.affine, x.bounds) if isinstance(x, Normalized) else (x, None, UNBOUNDED) for x in (a, b)]
    arrays = [jnp.zeros((0,), jnp.float32) if x is None else x for part in parts for x in part[:2]]
    return _interleave(*align(*arrays), tuple(part[2] for part in parts))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _interleave(a, a_affine, b, b_affine, bounds):
    shape = (*a.shape[:3], 2 * a.shape[3])
    return _call("interleave", [shape], a, a_affine, b, b_affine, **_both_bounds(bounds))[0]


def _interleave_backward(bounds, saved, dy):
    shapes = [
        shape for x, affine in (saved[:2], saved[2:]) for shape in (x.shape, (2, x.shape[3] if affine.size else 0))
    ]
    results = _call("interleave_gradients", shapes, *align(dy, *saved), **_both_bounds(bounds))
    da, a_sums, db, b_sums = results
    return da, _affine_gradient(saved[1], a_sums), db, _affine_gradient(saved[3], b_sums)


_interleave.defvjp(lambda *args: (_interleave(*args), args[:4]), _interleave_backward)


def _both_bounds(bounds):
    other = {f"other_{name}": value for name, value in _bounds(bounds[1]).items()}
    return {**_bounds(bounds[0]), **other}


# ---- pooling


def avg_pool(x, window, strides, padding):
    """See `jaxnets.ops.avg_pool`: a depthwise convolution."""
    kernel = jnp.full((window, window, 1, x.shape[-1]), 1 / window**2, x.dtype)
    return depthwise_conv(x, kernel, (strides, strides), padding)


def max_pool(x, window, strides, padding):
    """See `jaxnets.ops.max_pool`."""
    if x.dtype != jnp.float32:
        return xla.max_pool(x, window, strides, padding)
    library.require()
    return _max_pool(x, window, strides, padding)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, strides, padding):
    shape = jax.eval_shape(lambda x: reference.max_pool(x, window, strides, padding), x).shape
    return _call("max_pool", [shape], x, **_pooling(window, strides, padding))[0]


def _max_pool_backward(window, strides, padding, x, dy):
    return tuple(_call("max_pool_gradient", [x.shape], *align(dy, x), **_pooling(window, strides, padding)))


_max_pool.defvjp(lambda x, *where: (_max_pool(x, *where), x), _max_pool_backward)


def _pooling(window, strides, padding):
    (top, _), (left, _) = padding
    return {name: np.int64(v) for name, v in (("window", window), ("stride", strides), ("top", top), ("left", left))}


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


__all__ = [
    "add",
    "avg_pool",
    "batch_norm",
    "channel_shuffle",
    "conv",
    "conv_affine",
    "conv_batch_norm",
    "conv_bias",
    "depthwise_conv",
    "grouped_conv",
    "interleave",
    "max_pool",
    "pointwise_conv",
]
