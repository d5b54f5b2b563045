"""Depthwise convolution as a sum of shifted products, with its own gradients."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def depthwise_conv(x, kernel, strides, padding):
    """See `jaxnets.ops.depthwise_conv`; any stride, kernel, padding and channel multiplier."""
    height, width, _, features = kernel.shape
    multiplier = features // max(x.shape[-1], 1)
    if multiplier != 1:
        x = jnp.repeat(x, multiplier, axis=-1)
    padding = tuple((int(low), int(high)) for low, high in padding)
    kernel = kernel.reshape(height, width, features)
    return _shifted(x, kernel, tuple(strides), padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted(x, kernel, strides, padding):
    return _correlate(_pad(x, padding), kernel, strides)


def _forward(x, kernel, strides, padding):
    return _shifted(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, dy):
    x, kernel = saved
    return _input_gradient(dy, kernel, strides, padding, x.shape), _kernel_gradient(
        x, dy, kernel, strides, padding
    )


_shifted.defvjp(_forward, _backward)


def _pad(x, padding, interior=(0, 0)):
    (top, bottom), (left, right) = padding
    config = ((0, 0, 0), (top, bottom, interior[0]), (left, right, interior[1]), (0, 0, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _windows(padded, kernel_shape, strides, size):
    """For each tap of the kernel, row by row: what it meets at each of `size` output positions."""
    batch, _, _, channels = padded.shape
    for i in range(kernel_shape[0]):
        for j in range(kernel_shape[1]):
            last = (i + (size[0] - 1) * strides[0] + 1, j + (size[1] - 1) * strides[1] + 1)
            yield (
                (i, j),
                lax.slice(padded, (0, i, j, 0), (batch, *last, channels), (1, *strides, 1)),
            )


def _output_size(padded_shape, kernel_shape, strides):
    return tuple(
        max(0, (size - taps) // stride + 1)
        for size, taps, stride in zip(padded_shape[1:3], kernel_shape, strides)
    )


def _correlate(padded, kernel, strides):
    size = _output_size(padded.shape, kernel.shape, strides)
    wide = jnp.promote_types(padded.dtype, jnp.float32)  # bfloat16 would round after every tap
    y = jnp.zeros((padded.shape[0], *size, padded.shape[-1]), wide)
    if y.size:
        taps = kernel.astype(wide)
        y = sum(
            window.astype(wide) * taps[i, j]
            for (i, j), window in _windows(padded, kernel.shape, strides, size)
        )
    return y.astype(padded.dtype)


def _input_gradient(dy, kernel, strides, padding, shape):
    """Correlation of the dilated output gradient with the kernel turned by 180 degrees."""
    if not dy.size:
        return jnp.zeros(shape, dy.dtype)
    pads = []
    for axis in (0, 1):
        taps, (low, _) = kernel.shape[axis], padding[axis]
        dilated = (dy.shape[1 + axis] - 1) * strides[axis] + 1
        before = taps - 1 - low
        pads.append((before, shape[1 + axis] + taps - 1 - before - dilated))
    dilated = _pad(dy, pads, (strides[0] - 1, strides[1] - 1))
    return _correlate(dilated, kernel[::-1, ::-1], (1, 1))


CHUNK = 8  # images: what one step of the weight gradient's loop reads then stays in the cache


def _kernel_gradient(x, dy, kernel, strides, padding):
    if not dy.size:
        return jnp.zeros_like(kernel)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def of_chunk(chunk):
        x, dy = chunk
        windows = _windows(_pad(x, padding), kernel.shape, strides, dy.shape[1:3])
        dy = dy.astype(wide)
        return jnp.stack([(window.astype(wide) * dy).sum((0, 1, 2)) for _, window in windows])

    batch = x.shape[0]
    if batch % CHUNK or batch == CHUNK:
        gradient = of_chunk((x, dy))
    else:
        chunks = [a.reshape(batch // CHUNK, CHUNK, *a.shape[1:]) for a in (x, dy)]
        gradient = lax.map(of_chunk, chunks).sum(0)
    return gradient.reshape(kernel.shape).astype(kernel.dtype)
