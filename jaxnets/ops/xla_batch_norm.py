"""BatchNorm and clipping with their own gradient: it keeps the input and vectors of channels, no more."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.ops.manual_axes import align

AXES = (0, 1, 2)


def batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    """See `jaxnets.ops.batch_norm`."""
    x, scale, bias = align(x, scale, bias)
    y, mean, var = _batch_norm(x, scale, bias, epsilon, bounds, axis_name)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    return _forward(x, scale, bias, epsilon, bounds, axis_name)[0]


def _forward(x, scale, bias, epsilon, bounds, axis_name):
    mean, var = _statistics(x, axis_name)
    inverse_std = lax.rsqrt(var + epsilon)
    y = (x.astype(mean.dtype) - mean) * (scale * inverse_std) + bias
    low, high = bounds
    if low != -jnp.inf or high != jnp.inf:
        y = lax.clamp(low, y, high)
    return (y.astype(x.dtype), mean, var), (x, mean, inverse_std, scale, bias)


def _backward(epsilon, bounds, axis_name, saved, cotangents):
    x, mean, inverse_std, scale, bias = saved
    dy = cotangents[0].astype(mean.dtype)  # mean and variance feed the running statistics: no gradient
    gain = scale * inverse_std
    wide = x.astype(mean.dtype)
    dy = _of_unclipped(dy, (wide - mean) * gain + bias, bounds)
    count = x.size // x.shape[-1]
    dbias = dy.sum(AXES)
    dscale = (_flat(dy) * (_flat(wide) + (-mean))).sum(0) * inverse_std
    dmean, dvar = dbias / count, dscale / count
    if axis_name is not None:
        dmean, dvar = lax.pmean((dmean, dvar), axis_name)
    dx = dy * gain - ((wide - mean) * (dvar * inverse_std * gain) + dmean * gain)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_batch_norm.defvjp(_forward, _backward)


def _of_unclipped(dy, y, bounds):
    low, high = bounds
    if low != -jnp.inf:
        dy = jnp.where(y > low, dy, 0)
    if high != jnp.inf:
        dy = jnp.where(y < high, dy, 0)
    return dy


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _statistics(x, axis_name):
    """Mean and biased variance over the batch, of every device's batch if `axis_name` is given.

    Two passes: exact for a large mean with a small variance, and no slower than one, since XLA reduces sums
    and sums of squares at memory speed, but not both at once. Yet the difference to the mean, or only the
    mean spread over the batch, would be written out if it were the same operation in any two places: hence
    flat here, negated in the gradient of the scale, and neither elsewhere.
    """
    flat = _flat(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = flat.mean(0)
    var = jnp.square(flat - mean).mean(0)
    if axis_name is not None:
        of_all = lax.pmean(mean, axis_name)
        var = lax.pmean(var + jnp.square(mean - of_all), axis_name)
        mean = of_all
    return mean, var
