"""What each operator means: `lax.conv_general_dilated` and the plain BatchNorm formula.

Every other formulation is tested against these.
"""

import jax
import jax.numpy as jnp
from jax import lax

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv(x, kernel, strides, padding, feature_group_count):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=DIMENSION_NUMBERS,
        feature_group_count=feature_group_count,
    )


def batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    x32 = x.astype(jnp.float32)
    mean = x32.mean((0, 1, 2))
    if axis_name is not None:
        mean = lax.pmean(mean, axis_name)
    var = jnp.square(x32 - mean).mean((0, 1, 2))
    if axis_name is not None:
        var = lax.pmean(var, axis_name)
    y = (x32 - mean) * (scale * lax.rsqrt(var + epsilon)) + bias
    low, high = bounds
    if low != -jnp.inf or high != jnp.inf:
        y = jnp.clip(y, low, high)
    return y.astype(x.dtype), lax.stop_gradient(mean), lax.stop_gradient(var)


def channel_shuffle(x, groups):
    *batch, channels = x.shape
    x = x.reshape(*batch, groups, channels // groups)
    return jnp.swapaxes(x, -1, -2).reshape(*batch, channels)


__all__ = ["batch_norm", "channel_shuffle", "conv"]
del jax
