"""BatchNorm and clipping with their own gradient: it keeps the input and vectors of channels, no more."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

AXES = (0, 1, 2)


def batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    """See `jaxnets.ops.batch_norm`."""
    y, mean, var = _batch_norm(x, scale, bias, epsilon, bounds, axis_name)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    return _forward(x, scale, bias, epsilon, bounds, axis_name)[0]


def _forward(x, scale, bias, epsilon, bounds, axis_name):
    mean, var = _statistics(x, axis_name)
    inverse_std = lax.rsqrt(var + epsilon)
    y = _normalise(x, mean, inverse_std, scale, bias)
    low, high = bounds
    if low != -jnp.inf or high != jnp.inf:
        y = jnp.clip(y, low, high)
    return (y.astype(x.dtype), mean, var), (x, mean, inverse_std, scale, bias)


def _backward(epsilon, bounds, axis_name, saved, cotangents):
    x, mean, inverse_std, scale, bias = saved
    dy = cotangents[0].astype(mean.dtype)  # mean and variance feed the running statistics: no gradient
    low, high = bounds
    if low != -jnp.inf or high != jnp.inf:
        y = _normalise(x, mean, inverse_std, scale, bias)
        dy = jnp.where((y > low) & (y < high), dy, 0)
    normal = (x.astype(mean.dtype) - mean) * inverse_std
    count = x.size // x.shape[-1]
    dbias = dy.sum(AXES)
    dscale = (dy * normal).sum(AXES)
    dmean, dvar = dbias / count, dscale / count
    if axis_name is not None:
        dmean, dvar = lax.pmean((dmean, dvar), axis_name)
    dx = (dy - dmean - normal * dvar) * (scale * inverse_std)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_batch_norm.defvjp(_forward, _backward)


def _normalise(x, mean, inverse_std, scale, bias):
    return (x.astype(mean.dtype) - mean) * (scale * inverse_std) + bias


def _statistics(x, axis_name):
    """Mean and biased variance over the batch, float32, of every device's batch if `axis_name` is given."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(AXES)
    var = jnp.square(wide - mean).mean(AXES)
    if axis_name is not None:
        of_all = lax.pmean(mean, axis_name)
        var = lax.pmean(var + jnp.square(mean - of_all), axis_name)
        mean = of_all
    return mean, var
