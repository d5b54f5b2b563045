"""BatchNorm and clipping for GPUs, with a custom gradient: one pass for the statistics, two backward.

Barriers mark where an array is materialised, in the net's dtype: without them XLA keeps float32 copies, since it
considers the rounding between two float32 operations unnecessary, and it writes out masks and products that it could
recompute as it reads.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.ops.gpu_sums import sums
from jaxnets.ops.manual_axes import align, mean_of_devices
from jaxnets.ops.reference import clip, upcast, within

GOLDEN_RATIO = 0.6180339887498949


def batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    """See `jaxnets.ops.batch_norm`."""
    x, scale, bias = align(x, scale, bias)
    y, mean, var = _batch_norm(x, scale, bias, epsilon, bounds, axis_name)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    return _forward(x, scale, bias, epsilon, bounds, axis_name)[0]


def _forward(x, scale, bias, epsilon, bounds, axis_name):
    x = lax.optimization_barrier(x)
    origin = _origin(x, axis_name)
    shifted = upcast(x) - origin
    count = max(1, x.size // x.shape[-1])
    difference, square = (mean_of_devices(total / count, axis_name) for total in sums(shifted, jnp.square(shifted)))
    var = jnp.maximum(square - jnp.square(difference), 0)
    inverse_std = lax.rsqrt(var + epsilon)
    y = clip(_normalised(x, origin, difference, inverse_std) * scale + bias, bounds)
    saved = x, origin, difference, inverse_std, scale, bias
    return (y.astype(x.dtype), origin + difference, var), saved


def _backward(epsilon, bounds, axis_name, saved, cotangents):
    x, origin, difference, inverse_std, scale, bias = saved

    def read(x, dy):
        """dy where the output was not clipped, and the normalised input."""
        normalised = _normalised(x, origin, difference, inverse_std)
        return within(normalised * scale + bias, upcast(dy), bounds), normalised

    # Mean and variance feed the running statistics: no gradient comes from them.
    x, dy = lax.optimization_barrier((x, cotangents[0]))
    inside, normalised = read(x, dy)
    dbias, dscale = sums(inside, inside * normalised)

    count = max(1, x.size // x.shape[-1])
    of_mean, of_std = (mean_of_devices(total / count, axis_name) for total in (dbias, dscale))
    inside, normalised = read(*lax.optimization_barrier((x, dy)))  # recomputed rather than kept
    dx = (inside - of_mean - normalised * of_std) * (scale * inverse_std)
    dx = lax.optimization_barrier(dx.astype(x.dtype))
    return dx, dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_batch_norm.defvjp(_forward, _backward)


def _normalised(x, origin, difference, inverse_std):
    return ((upcast(x) - origin) - difference) * inverse_std


def _origin(x, axis_name):
    """A value of each channel to measure differences from: the median of three, far apart.

    Squared differences from it lose digits only if it lies many standard deviations from the mean, which two of three
    values at once hardly ever do (for k deviations, with probability below 3 / k^4 by Chebyshev's inequality).
    """
    flat = upcast(x).reshape(-1, x.shape[-1])
    if not len(flat):
        return jnp.zeros(x.shape[-1], flat.dtype)
    a, b, c = (flat[int(GOLDEN_RATIO * (i + 1) % 1 * len(flat))] for i in range(3))
    middle = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
    middle = mean_of_devices(jnp.where(jnp.isfinite(middle), middle, 0), axis_name)
    return lax.optimization_barrier(middle)
