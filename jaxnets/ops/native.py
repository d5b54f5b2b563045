"""Depthwise convolution and BatchNorm by C++ kernels, on the CPU and in float32; the rest is `xla`'s.

They have first derivatives in reverse mode and no others.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets.errors import UserError
from jaxnets.ops import native_library, xla
from jaxnets.ops.manual_axes import align
from jaxnets.ops.windows import output_size
from jaxnets.ops.xla import channel_shuffle, conv, grouped_conv, pointwise_conv

SIZES = ((3, 3), (5, 5))
STRIDES = ((1, 1), (2, 2))


def depthwise_conv(x, kernel, strides, padding):
    """See `jaxnets.ops.depthwise_conv`; native for 3x3 and 5x5, strides 1 and 2, without a multiplier."""
    strides, padding = tuple(strides), tuple((int(low), int(high)) for low, high in padding)
    fits = kernel.shape[:2] in SIZES and strides in STRIDES and kernel.shape[3] == x.shape[3]
    if x.dtype != jnp.float32 or not fits:
        return xla.depthwise_conv(x, kernel, strides, padding)
    native_library.require()
    x, kernel = align(x, kernel)
    return _depthwise(x, kernel, strides[0], padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, stride, padding):
    sides = [n + sum(pads) for n, pads in zip(x.shape[1:3], padding)]
    height, width = output_size(np.empty((1, *sides, 1)), kernel, (stride, stride))
    return _call("depthwise", [(x.shape[0], height, width, x.shape[3])], x, kernel, **_window(stride, padding))[0]


def _depthwise_forward(x, kernel, stride, padding):
    return _depthwise(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, saved, dy):
    x, kernel = saved
    window = _window(stride, padding)
    return tuple(_call("depthwise_gradients", [x.shape, kernel.shape], dy, x, kernel, **window))


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _window(stride, padding):
    return {"stride": np.int64(stride), "top": np.int64(padding[0][0]), "left": np.int64(padding[1][0])}


def batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    """See `jaxnets.ops.batch_norm`."""
    if any(a.dtype != jnp.float32 for a in (x, scale, bias)):
        return xla.batch_norm(x, scale, bias, epsilon, bounds, axis_name)
    native_library.require()
    x, scale, bias = align(x, scale, bias)
    y, mean, var = _batch_norm(x, scale, bias, epsilon, tuple(bounds), axis_name)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    return _batch_norm_forward(x, scale, bias, epsilon, bounds, axis_name)[0]


def _batch_norm_forward(x, scale, bias, epsilon, bounds, axis_name):
    # `rest` is what rounding took from the mean: with a small variance it would be seen.
    mean, rest, var = _call("statistics", [(3, x.shape[-1])], x)[0]
    if axis_name is not None:
        of_all, of_all_rest = lax.pmean((mean, rest), axis_name)
        var = lax.pmean(var + jnp.square((mean - of_all) + (rest - of_all_rest)), axis_name)
        mean, rest = of_all, of_all_rest
    inverse_std = lax.rsqrt(var + epsilon)
    gain = scale * inverse_std
    affine = jnp.stack([mean, gain, bias - rest * gain])
    y = _call("normalize", [x.shape], x, *align(affine, x)[:1], **_bounds(bounds))[0]
    return (y, mean, var), (x, affine, rest, inverse_std)


def _batch_norm_backward(epsilon, bounds, axis_name, saved, cotangents):
    x, affine, rest, inverse_std = saved
    dy = cotangents[0]  # mean and variance feed the running statistics: no gradient
    affine, dy = align(affine, dy)
    dbias, product = _call("gradient_sums", [(2, x.shape[-1])], dy, x, affine, **_bounds(bounds))[0]
    dscale = (product - rest * dbias) * inverse_std
    count = x.size // x.shape[-1] if x.shape[-1] else 0
    of_mean, of_std = dbias / count, dscale / count
    if axis_name is not None:
        of_mean, of_std = lax.pmean((of_mean, of_std), axis_name)
    gain = affine[1]
    slope = of_std * inverse_std * gain
    affine = jnp.concatenate([affine, jnp.stack([slope, of_mean * gain - rest * slope])])
    (dx,) = _call("normalize_gradient", [x.shape], dy, x, *align(affine, x)[:1], aliases={0: 0}, **_bounds(bounds))
    return dx, dscale, dbias


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _bounds(bounds):
    return {"low": np.float32(bounds[0]), "high": np.float32(bounds[1])}


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


__all__ = ["batch_norm", "channel_shuffle", "conv", "depthwise_conv", "grouped_conv", "pointwise_conv"]
