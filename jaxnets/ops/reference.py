"""What each operator means: `lax.conv_general_dilated` and the plain BatchNorm formula.

Every other formulation is tested against these and shares their signatures.
"""

import jax.numpy as jnp
from jax import lax

from jaxnets.ops.windows import pad

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
NO_PADDING = ((0, 0), (0, 0))
UNBOUNDED = (-float("inf"), float("inf"))


def conv(x, kernel, strides, padding):
    """As lax computes it."""
    return grouped_conv(x, kernel, strides, padding, 1)


def grouped_conv(x, kernel, strides, padding, feature_group_count):
    """`lax.conv_general_dilated`."""
    # XLA for CPUs treats a padding of -1 and 1 as none. So padding that crops, here or in the gradient, is done first.
    if not all(0 <= edge < extent for extent, edges in zip(kernel.shape, padding) for edge in edges):
        x, padding = pad(x, padding), NO_PADDING
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=DIMENSION_NUMBERS,
        feature_group_count=feature_group_count,
    )


def depthwise_conv(x, kernel, strides, padding):
    """One group per input channel."""
    return grouped_conv(x, kernel, strides, padding, x.shape[-1])


def pointwise_conv(x, kernel, strides):
    """A 1x1 kernel, no padding."""
    return conv(x, kernel, strides, NO_PADDING)


def batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    """Two passes over the batch in float32, gradient by autodiff."""
    x32 = upcast(x)
    mean = x32.mean((0, 1, 2))
    if axis_name is not None:
        mean = lax.pmean(mean, axis_name)
    var = jnp.square(x32 - mean).mean((0, 1, 2))
    if axis_name is not None:
        var = lax.pmean(var, axis_name)
    y = clip((x32 - mean) * (scale * lax.rsqrt(var + epsilon)) + bias, bounds)
    return y.astype(x.dtype), lax.stop_gradient(mean), lax.stop_gradient(var)


def upcast(values):
    """To at least float32, in which sums and everything between two roundings are computed."""
    return values.astype(upcast_dtype(values.dtype))


def upcast_dtype(dtype):
    """float32, or `dtype` if that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def add_bias(x, bias, bounds):
    """clip(x + bias), of x's dtype."""
    return clip(x + bias.astype(x.dtype), bounds)


def clip(x, bounds):
    """x clipped to `(low, high)`; no gradient passes where it is at a bound."""
    if bounds == UNBOUNDED:
        return x
    low, high = (jnp.asarray(bound, x.dtype) for bound in bounds)
    return lax.clamp(low, x, high)


def within(y, dy, bounds):
    """dy where y, clipped or not, lies strictly between the bounds, else 0: the gradient of clipping."""
    low, high = bounds
    if low != -jnp.inf:
        dy = jnp.where(y > low, dy, 0)
    if high != jnp.inf:
        dy = jnp.where(y < high, dy, 0)
    return dy


def channel_shuffle(x, groups):
    """Transpose of the (group, channel in group) matrix."""
    *batch, channels = x.shape
    if groups in (1, channels):
        return x
    x = x.reshape(*batch, groups, channels // groups)
    return jnp.swapaxes(x, -1, -2).reshape(*batch, channels)


def avg_pool(x, window, strides, padding):
    """`lax.reduce_window`, divided by the number of values."""
    edges = ((0, 0), *padding, (0, 0))
    total = lax.reduce_window(x, 0.0, lax.add, (1, window, window, 1), (1, strides, strides, 1), edges)
    return total / window**2


def max_pool(x, window, strides, padding):
    """`lax.reduce_window`, gradient by autodiff: all of it goes to the first maximum."""
    edges = ((0, 0), *padding, (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, strides, strides, 1), edges)
