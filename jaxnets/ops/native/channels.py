"""Reordering channels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.ops import reference, xla
from jaxnets.ops.lazy import LazyBatchNorm
from jaxnets.ops.manual_axes import align
from jaxnets.ops.native.calls import attributes_of, call, nothing
from jaxnets.ops.native.normalization import affine_gradient
from jaxnets.ops.reference import UNBOUNDED


def channel_shuffle(x, groups):
    """See `jaxnets.ops.channel_shuffle`; a `LazyBatchNorm` stays one."""
    if isinstance(x, LazyBatchNorm):
        affine = reference.channel_shuffle(x.affine, groups)
        return LazyBatchNorm(channel_shuffle(x.raw, groups), affine, x.bounds, x.compute)
    x = jnp.asarray(x)
    if x.dtype != jnp.float32:
        return xla.channel_shuffle(x, groups)
    return _shuffle(x, groups)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shuffle(x, groups):
    return call("shuffle", [x.shape], x, groups=np.int64(groups))[0]


_shuffle.defvjp(
    lambda x, groups: (_shuffle(x, groups), None),
    lambda groups, _, dy: (_shuffle(dy, dy.shape[-1] // groups),),
)


def interleave(a, b):
    """`channel_shuffle`, in two groups, of a's channels followed by b's; either may be `LazyBatchNorm`."""
    parts = [
        (x.raw, x.affine, x.bounds) if isinstance(x, LazyBatchNorm) else (jnp.asarray(x), None, UNBOUNDED)
        for x in (a, b)
    ]
    arrays = [nothing() if x is None else x for part in parts for x in part[:2]]
    return _interleave(*align(*arrays), tuple(part[2] for part in parts))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _interleave(a, a_affine, b, b_affine, bounds):
    shape = (*a.shape[:3], 2 * a.shape[3])
    return call("interleave", [shape], a, a_affine, b, b_affine, **_attributes(bounds))[0]


def _interleave_backward(bounds, saved, dy):
    shapes = [
        shape for x, affine in (saved[:2], saved[2:]) for shape in (x.shape, (2, x.shape[3] if affine.size else 0))
    ]
    results = call("interleave_gradients", shapes, *align(dy, *saved), **_attributes(bounds))
    da, a_sums, db, b_sums = results
    return da, affine_gradient(saved[1], a_sums), db, affine_gradient(saved[3], b_sums)


_interleave.defvjp(lambda *args: (_interleave(*args), args[:4]), _interleave_backward)


def _attributes(bounds):
    return attributes_of(bounds[0]) | attributes_of(bounds[1], "other_")
