"""BatchNorm on its own: moments, the per-channel affine that follows from them, and applying it.

Computations on per-channel vectors alone are jitted: layers with the same number of channels then share what was
traced, a third of the tracing of a net's gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.ops import xla
from jaxnets.ops.lazy import LazyBatchNorm
from jaxnets.ops.manual_axes import align
from jaxnets.ops.native.calls import attributes_of, call, nothing
from jaxnets.ops.reference import UNBOUNDED


def batch_norm(x, scale, bias, epsilon, bounds, axis_name):
    """See `jaxnets.ops.batch_norm`."""
    if any(a.dtype != jnp.float32 for a in (x, scale, bias)):
        return xla.batch_norm(x, scale, bias, epsilon, bounds, axis_name)
    affine, mean, var = affine_of(moments_of(x), scale, bias, epsilon, axis_name)
    z = normalize(x, affine, bounds)
    return z, lax.stop_gradient(mean), lax.stop_gradient(var)


@partial(jax.jit, static_argnames=("epsilon", "axis_name"))
def affine_of(moments, scale, bias, epsilon, axis_name):
    """The per-channel (mean, gain, bias) that normalise, the mean and the variance."""
    # `rest` is what the mean lost to rounding: with a small variance, leaving it out would show.
    mean, rest, var = moments
    rest = lax.stop_gradient(rest)
    if axis_name is not None:
        of_all, of_all_rest = lax.pmean((mean, rest), axis_name)
        var = lax.pmean(var + jnp.square((mean - of_all) + (rest - of_all_rest)), axis_name)
        mean, rest = of_all, of_all_rest
    gain = scale * lax.rsqrt(var + epsilon)
    return jnp.stack([mean, gain, bias - rest * gain]), mean, var


@jax.custom_vjp
def moments_of(x):
    """`(3, C)`: each channel's mean, its rounding error, its variance."""
    return call("moments", [(3, x.shape[-1])], x)[0]


def _moments_forward(x):
    moments = moments_of(x)
    return moments, (x, moments)


def _moments_backward(saved, dmoments):
    x, moments = saved
    return (apply_correction(x, correction_of(x, moments, dmoments)),)


moments_of.defvjp(_moments_forward, _moments_backward)


def correction_of(x, moments, dmoments):
    """`(3, C)`: mean, slope and offset of the term that the gradient of x's moments adds to that of x."""
    return _correction(moments, dmoments, max(x.size // x.shape[-1], 1))


@partial(jax.jit, static_argnames="count")
def _correction(moments, dmoments, count):
    mean, rest, _ = moments
    dmean, _, dvar = dmoments
    slope = 2 / count * dvar
    return jnp.stack([mean, slope, dmean / count - rest * slope])


def apply_correction(x, correction):
    """(x - mean) * slope + offset, with the vectors of `correction_of`."""
    mean, slope, offset = correction
    return (x - mean) * slope + offset


def as_it_is(channels):
    """The `(3, C)` affine that is the identity."""
    return jnp.zeros((3, channels), jnp.float32).at[1].set(1)


def shift_by(bias):
    """The `(3, C)` affine that adds the bias."""
    return as_it_is(bias.size).at[2].set(bias)


def normalize(x, affine, bounds, added=None):
    """clip((x - mean) * gain + bias + added), with `affine` `(3, C)`: mean, gain, bias."""
    added = nothing() if added is None else added
    return _normalize(*align(x, affine, added), bounds)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x, affine, added, bounds):
    return call("normalize", [x.shape], x, affine, added, **attributes_of(bounds))[0]


def _normalize_forward(x, affine, added, bounds):
    z = _normalize(x, affine, added, bounds)
    return z, (x, affine, added, z if added.size and bounds != UNBOUNDED else jnp.zeros_like(added, shape=(0,)))


def _normalize_backward(bounds, saved, dz):
    x, affine, added, z = saved
    shapes = [x.shape, (2, x.shape[-1]), x.shape if z.size else (0,)]
    arrays = align(dz, x, affine, z)
    dx, sums, d_added = call("normalize_gradient", shapes, *arrays, aliases={0: 0}, **attributes_of(bounds))
    if not z.size:
        d_added = dz if added.size else added
    return dx, affine_gradient(affine, sums), d_added


_normalize.defvjp(_normalize_forward, _normalize_backward)


def unclipped_gradient(dz, z, bounds):
    """dz where the output z was not clipped, in dz's memory, and its per-channel sum."""
    # Strictly between the bounds, z is what it was before clipping.
    arrays = align(dz, z, as_it_is(z.shape[-1]), nothing())
    shapes = [z.shape, (2, z.shape[-1]), (0,)]
    dy, sums, _ = call("normalize_gradient", shapes, *arrays, aliases={0: 0}, **attributes_of(bounds))
    return dy, sums[0]


@jax.jit
def affine_gradient(affine, sums):
    """From the sums of dz where z was not clipped, and of that times x - mean; `affine` itself if it is empty."""
    return jnp.stack([-affine[1] * sums[0], sums[1], sums[0]]) if affine.size else affine


def add(x, y, bounds):
    """See `jaxnets.ops.add`; y is a `LazyBatchNorm` without bounds, or an array of x's shape."""
    if isinstance(y, LazyBatchNorm):
        y, affine = y.raw, y.affine
    else:
        affine = as_it_is(y.shape[-1])
    return normalize(y, affine, bounds, jnp.asarray(x))
