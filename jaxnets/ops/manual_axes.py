"""Arrays inside `jax.pmap` and `jax.shard_map`: their types, and means over the devices."""

import jax
from jax import lax


def align(*arrays):
    """The same arrays, all marked as varying over every mesh axis that any of them varies over.

    `shard_map` with `check_vma` requires a gradient to vary as its input does; the transpose of this marking sums
    the gradients of an array that is the same on all devices. Elsewhere, it changes nothing.
    """
    axes = frozenset().union(*map(_varying, arrays))
    missing = [tuple(axes - _varying(a)) for a in arrays]
    return [lax.pcast(a, names, to="varying") if names else a for a, names in zip(arrays, missing)]


def mean_of_devices(x, axis_name):
    """The mean over the devices of `axis_name`; x itself if that is None."""
    return x if axis_name is None else lax.pmean(x, axis_name)


def _varying(array):
    aval = jax.typeof(array)
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # renamed within JAX 0.10
