"""The taps of a convolution's kernel, and the pixels that each of them reads."""

from itertools import product

import jax.numpy as jnp
from jax import lax


def pad(x, padding):
    """x `(N, H, W, C)` padded with `((top, bottom), (left, right))` rows and columns of zeros; negative ones crop."""
    edges = ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def taps(kernel):
    """Row and column of every tap."""
    return list(product(range(kernel.shape[0]), range(kernel.shape[1])))


def output_size(sides, kernel, strides):
    """Height and width of the convolution of a padded image with these sides; 0 where the kernel does not fit."""
    return [max(0, (size - extent) // stride + 1) for size, extent, stride in zip(sides, kernel.shape, strides)]


def window(padded, tap, size, strides):
    """The `size` positions, `strides` apart, that a tap reads in a padded image."""
    limits = [first + (n - 1) * stride + 1 for first, n, stride in zip(tap, size, strides)]
    return lax.slice(padded, (0, *tap, 0), (padded.shape[0], *limits, padded.shape[3]), (1, *strides, 1))
