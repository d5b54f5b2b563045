"""Portable formulations: what XLA compiles well where its grouped convolution does not."""

import jax.numpy as jnp
from jax import lax

from jaxnets.ops import reference
from jaxnets.ops.reference import channel_shuffle
from jaxnets.ops.xla_batch_norm import batch_norm
from jaxnets.ops.xla_depthwise import depthwise_conv

FEW_CHANNELS = 4  # images: the patches of a kxk convolution are then small enough to write out


def conv(x, kernel, strides, padding, feature_group_count):
    """A dense kxk convolution: patches times kernel for images, otherwise as lax computes it."""
    if x.shape[-1] <= FEW_CHANNELS:
        return _patches_conv(x, kernel, strides, padding)
    return reference.conv(x, kernel, strides, padding, 1)


def pointwise_conv(x, kernel, strides):
    """A product of two matrices; as one, XLA's weight gradient is 5 times faster than as a 4-D product."""
    x = x[:, :: strides[0], :: strides[1]]
    y = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[-2:])
    return y.reshape(*x.shape[:3], -1)


def grouped_conv(x, kernel, strides, padding, feature_group_count):
    return reference.grouped_conv(x, kernel, strides, padding, feature_group_count)


def _patches_conv(x, kernel, strides, padding):
    (top, bottom), (left, right) = padding
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)))
    height, width, _, features = kernel.shape
    rows = (x.shape[1] - height) // strides[0] + 1
    columns = (x.shape[2] - width) // strides[1] + 1
    patches = [
        x[
            :,
            i : i + (rows - 1) * strides[0] + 1 : strides[0],
            j : j + (columns - 1) * strides[1] + 1 : strides[1],
        ]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(patches, -1)
    y = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, features)
    return y.reshape(x.shape[0], rows, columns, features)


__all__ = ["batch_norm", "channel_shuffle", "conv", "depthwise_conv", "grouped_conv", "pointwise_conv"]
