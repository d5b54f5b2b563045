"""BatchNorm and clipping with a custom gradient, whose residuals are the input and per-channel vectors only.

XLA reduces a plain sum or a sum of squares at memory speed, but not both at once: statistics in two passes
are as fast as in one. It fuses the difference `x - mean` into everything that reads it, but writes out an
operation that occurs in two reductions: hence a flat x in the statistics, `x + (-mean)` in the gradient of
the scale, `x - mean` elsewhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.ops.manual_axes import align, mean_of_devices
from jaxnets.ops.reference import clip, upcast, within


def batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    """See `jaxnets.ops.batch_norm`."""
    x, scale, bias = align(x, scale, bias)
    y, mean, var = _batch_norm(x, scale, bias, epsilon, bounds, axis_name)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    return _forward(x, scale, bias, epsilon, bounds, axis_name)[0]


def _forward(x, scale, bias, epsilon, bounds, axis_name):
    mean, error, var = _statistics(x, axis_name)
    inverse_std = lax.rsqrt(var + epsilon)
    saved = (x, mean, error, inverse_std, scale, bias)
    y = clip(_unclipped(*saved), bounds)
    return (y.astype(x.dtype), mean, var), saved


def _backward(epsilon, bounds, axis_name, saved, cotangents):
    x, mean, error, inverse_std, scale, bias = saved
    # Mean and variance feed the running statistics: no gradient comes from them.
    dy = within(_unclipped(*saved), cotangents[0].astype(mean.dtype), bounds)

    flat_dy = _flat(dy)
    dbias = flat_dy.sum(0)
    dscale = ((flat_dy * (_flat(x) + (-mean))).sum(0) + error * dbias) * inverse_std

    count = x.size // x.shape[-1]
    of_mean, of_std = mean_of_devices((dbias / count, dscale / count), axis_name)
    gain = scale * inverse_std
    slope = of_std * inverse_std * gain
    dx = dy * gain - ((x - mean) * slope + (of_mean * gain + error * slope))
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_batch_norm.defvjp(_forward, _backward)


def _unclipped(x, mean, error, inverse_std, scale, bias):
    gain = scale * inverse_std
    return (x - mean) * gain + (bias + error * gain)


def _statistics(x, axis_name):
    """Mean, its rounding error (mean minus true mean) and the biased variance, in at least float32.

    Over the batches of all devices together if `axis_name` is given. Summing differences from one of the values
    and keeping the error preserves precision where the mean is large and the variance small.
    """
    flat = upcast(_flat(x))
    origin = flat[len(flat) // 2] if len(flat) else jnp.zeros(flat.shape[1], flat.dtype)
    origin = mean_of_devices(jnp.where(jnp.isfinite(origin), origin, 0), axis_name)
    difference = mean_of_devices((flat - origin).mean(0), axis_name)
    mean = origin + difference
    error = (mean - origin) - difference
    var = mean_of_devices(jnp.square(flat - mean).mean(0), axis_name) - jnp.square(error)
    return mean, error, jnp.maximum(var, 0)


def _flat(x):
    return x.reshape(-1, x.shape[-1])
