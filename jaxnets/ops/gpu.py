"""Formulations for GPUs: portable XLA where a library convolution is slow, cuDNN's where it is not.

Arithmetic is cheap there; what counts is how often an array passes through memory, and the number of kernels.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.ops import reference, xla
from jaxnets.ops.gpu_batch_norm import batch_norm
from jaxnets.ops.gpu_depthwise import depthwise_conv
from jaxnets.ops.gpu_sums import sums
from jaxnets.ops.manual_axes import align
from jaxnets.ops.reference import channel_shuffle, conv, upcast, within
from jaxnets.ops.xla import pointwise_conv


def grouped_conv(x, kernel, strides, padding, feature_group_count):
    """1x1 kernels as a batch of matrix products, others as lax computes them."""
    if kernel.shape[:2] != (1, 1) or any(map(any, padding)):
        return reference.grouped_conv(x, kernel, strides, padding, feature_group_count)
    x = x[:, :: strides[0], :: strides[1]]
    *_, inputs, outputs = kernel.shape
    rows = x.reshape(-1, feature_group_count, inputs)
    y = jnp.einsum("rgi,igo->rgo", rows, kernel.reshape(inputs, feature_group_count, -1))
    return y.reshape(*x.shape[:3], outputs)


def avg_pool(x, window, strides, padding):
    """See `reference.avg_pool`; summed in at least float32."""
    return reference.avg_pool(upcast(x), window, strides, padding).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x, window, strides, padding):
    """See `xla.max_pool`."""
    return reference.max_pool(x, window, strides, padding)


def _max_pool_backward(size, strides, padding, saved, dy):
    # Materialised in the net's dtype: inputs recomputed without that rounding would equal no maximum.
    x, y, dy = lax.optimization_barrier((*saved, dy))
    return xla.max_pool_backward(size, strides, padding, (x, y), dy)


max_pool.defvjp(xla.max_pool_forward, _max_pool_backward)


def add_bias(x, bias, bounds):
    """See `reference.add_bias`; the bias's gradient is computed by `gpu_sums`."""
    return _add_bias(*align(x, bias), bounds)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add_bias(x, bias, bounds):
    if bounds == (0, math.inf):  # XLA fuses a maximum with 0 into cuDNN's convolution, but not a clamp
        return jnp.maximum(x + bias.astype(x.dtype), 0)
    return reference.add_bias(x, bias, bounds)


def _add_bias_forward(x, bias, bounds):
    y = _add_bias(x, bias, bounds)
    return y, (y if any(map(math.isfinite, bounds)) else None, bias)


def _add_bias_backward(bounds, saved, dy):
    y, bias = saved
    if y is None:  # nothing is clipped
        (dbias,) = sums(upcast(dy))
        return dy, dbias.astype(bias.dtype)
    y, dy = lax.optimization_barrier((y, dy))
    (dbias,) = sums(upcast(within(y, dy, bounds)))
    y, dy = lax.optimization_barrier((y, dy))  # so that `within` is recomputed as it reads them
    return within(y, dy, bounds), dbias.astype(bias.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


__all__ = [
    "add_bias",
    "avg_pool",
    "batch_norm",
    "channel_shuffle",
    "conv",
    "depthwise_conv",
    "grouped_conv",
    "max_pool",
    "pointwise_conv",
]
