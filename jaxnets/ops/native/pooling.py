"""Pooling."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.ops import reference, xla
from jaxnets.ops.manual_axes import align
from jaxnets.ops.native.calls import call
from jaxnets.ops.native.convolution import depthwise_conv


def avg_pool(x, window, strides, padding):
    """See `jaxnets.ops.avg_pool`."""
    return xla.avg_pool(x, window, strides, padding, depthwise_conv)


def max_pool(x, window, strides, padding):
    """See `jaxnets.ops.max_pool`."""
    if x.dtype != jnp.float32:
        return xla.max_pool(x, window, strides, padding)
    return _max_pool(x, window, strides, padding)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, strides, padding):
    shape = output_shape(x.shape, window, strides, padding)
    return call("max_pool", [shape], x, **pooling_attributes(window, strides, padding))[0]


def _max_pool_forward(x, *how):
    y = _max_pool(x, *how)
    return y, (x, y)


def _max_pool_backward(window, strides, padding, saved, dy):
    x, y = saved
    return tuple(call("max_pool_gradient", [x.shape], *align(dy, x, y), **pooling_attributes(window, strides, padding)))


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def output_shape(shape, window, strides, padding):
    """Shape of the `max_pool` of an array of that shape."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda x: reference.max_pool(x, window, strides, padding), x).shape


def pooling_attributes(window, strides, padding):
    """A pooling as a kernel's attributes."""
    (top, _), (left, _) = padding
    return {name: np.int64(v) for name, v in (("window", window), ("stride", strides), ("top", top), ("left", left))}
