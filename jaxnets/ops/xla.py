"""Portable formulations that XLA compiles well, unlike its grouped convolution.

The figures are CPU milliseconds on one core of a Xeon with AVX-512, JAX 0.10.2, float32.
"""

import math
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.ops import reference
from jaxnets.ops.reference import add_bias, upcast, upcast_dtype
from jaxnets.ops.windows import output_size, pad, taps, window
from jaxnets.ops.xla_batch_norm import batch_norm
from jaxnets.ops.xla_depthwise import depthwise_conv

PATCH_SIZE = 36  # values per window: 3x3 on images; for 7x7, patches are slower than lax
MANY_GROUPS = 8  # with more, one product per group takes too long to compile


def conv(x, kernel, strides, padding):
    """Patches times kernel for small windows (first layers), otherwise as lax computes it.

    32x32x3 to 32 channels, forward and kernel gradient: 5.1 against lax's 7.8 ms for 32 images. With 64 or
    more channels, lax is at least as fast as patches or one product per tap.
    """
    padded = pad(x, padding)
    size = output_size(padded.shape[1:3], kernel, strides)
    if math.prod(kernel.shape[:3]) > PATCH_SIZE or not all(size):
        return reference.conv(x, kernel, strides, padding)
    patches = jnp.concatenate([window(padded, tap, size, strides) for tap in taps(kernel)], -1)
    return pointwise_conv(patches, kernel.reshape(1, 1, -1, kernel.shape[3]), (1, 1))


def pointwise_conv(x, kernel, strides):
    """A product of two matrices, whose kernel gradient is 5 times faster in XLA than that of a 4-D product."""
    x = x[:, :: strides[0], :: strides[1]]
    channels, features = kernel.shape[2:]
    y = x.reshape(math.prod(x.shape[:3]), channels) @ kernel.reshape(channels, features)
    return y.reshape(*x.shape[:3], features)


def grouped_conv(x, kernel, strides, padding, feature_group_count):
    """A dense convolution for each group or, for many groups, a batched product for each tap.

    1x1, 3 groups, 240 to 60 channels at 16x16, 32 images: 2.7 ms forward, 5.7 for the gradients; einsum 3.4
    and 5.3. A block-diagonal matrix takes 4.1 and 5.9, and would spread an infinity in one group to the others.
    """
    groups = feature_group_count
    if groups > MANY_GROUPS:
        return _many_groups_conv(x, kernel, strides, padding, groups)
    one = kernel.shape[:2] == (1, 1) and not any(map(any, padding))
    of_group = partial(pointwise_conv, strides=strides) if one else partial(conv, strides=strides, padding=padding)
    parts = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1))
    return jnp.concatenate([of_group(*part) for part in parts], -1)


def _many_groups_conv(x, kernel, strides, padding, groups):
    padded = pad(x, padding)
    size = output_size(padded.shape[1:3], kernel, strides)
    sum_type = upcast_dtype(x.dtype)
    y = jnp.zeros((x.shape[0], *size, kernel.shape[3]), sum_type)
    if y.size:
        for tap in taps(kernel):
            inputs = window(padded, tap, size, strides)
            inputs = inputs.reshape(*inputs.shape[:3], groups, -1)
            weights = kernel[tap].reshape(kernel.shape[2], groups, -1)
            product = jnp.einsum("nhwgi,igo->nhwgo", inputs, weights, preferred_element_type=sum_type)
            y += product.reshape(y.shape)
    return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def channel_shuffle(x, groups):
    """A gather with constant indices; 16x16x240, 32 images: 1.3 ms, transpose 2.2, copy 0.6.

    The gradient is the inverse shuffle; autodiff would give a scatter (13 ms).
    """
    return _gather(x, groups)


def _gather(x, groups):
    order = np.arange(x.shape[-1]).reshape(groups, -1).T.reshape(-1)
    return jnp.take(x, order, axis=-1, mode="clip")


channel_shuffle.defvjp(
    lambda x, groups: (_gather(x, groups), None),
    lambda groups, _, dy: (_gather(dy, dy.shape[-1] // groups),),
)


def avg_pool(x, window, strides, padding, conv=depthwise_conv):
    """A depthwise convolution in at least float32: 1 / 9 is too inexact in bfloat16."""
    kernel = jnp.full((window, window, 1, x.shape[-1]), 1 / window**2, upcast_dtype(x.dtype))
    return conv(upcast(x), kernel, (strides, strides), padding).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x, window, strides, padding):
    """As lax computes it; the gradient tap by tap, instead of XLA's slow select-and-scatter."""
    return reference.max_pool(x, window, strides, padding)


def max_pool_forward(x, window, strides, padding):
    y = max_pool(x, window, strides, padding)
    return y, (x, y)


def max_pool_backward(size, strides, padding, saved, dy):
    x, y = saved
    lowest = jnp.array(-jnp.inf, x.dtype)
    padded = lax.pad(x, lowest, ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)))
    numbered = list(enumerate(product(range(size), repeat=2)))
    first = jnp.full(y.shape, len(numbered), np.min_scalar_type(len(numbered)))
    for number, tap in reversed(numbered):
        inputs = window(padded, tap, y.shape[1:3], (strides, strides))
        first = jnp.where((inputs == y) | jnp.isnan(inputs), first.dtype.type(number), first)
    # Materialised: otherwise XLA searches for each window's maximum again at every pixel of the window.
    first = lax.optimization_barrier(first)
    # Where windows overlap, an input gets several gradients: they are added in at least float32.
    sum_type = upcast_dtype(dy.dtype)
    zero = jnp.zeros((), sum_type)
    total = jnp.zeros(padded.shape, sum_type)
    for number, tap in numbered:
        edges = [
            (start, n - start - (count - 1) * strides - 1, strides - 1)
            for start, n, count in zip(tap, padded.shape[1:3], y.shape[1:3])
        ]
        of_tap = jnp.where(first == number, dy, 0).astype(sum_type)
        total += lax.pad(of_tap, zero, ((0, 0, 0), *edges, (0, 0, 0)))
    crop = [(-low, -high, 0) for low, high in padding]
    return (lax.pad(total, zero, ((0, 0, 0), *crop, (0, 0, 0))).astype(dy.dtype),)


max_pool.defvjp(max_pool_forward, max_pool_backward)


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
