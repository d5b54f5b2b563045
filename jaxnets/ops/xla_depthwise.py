"""Depthwise convolution as a sum of shifted products, with its own gradients."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax

GROUP = 8  # images whose products the kernel gradient adds up in registers


def depthwise_conv(x, kernel, strides, padding):
    """See `jaxnets.ops.depthwise_conv`; any stride, kernel, padding and channel multiplier."""
    height, width, _, features = kernel.shape
    multiplier = features // x.shape[-1]
    if multiplier != 1:
        x = jnp.repeat(x, multiplier, axis=-1)
    padding = tuple((int(low), int(high)) for low, high in padding)
    return _depthwise(x, kernel.reshape(height, width, features), tuple(strides), padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, strides, padding):
    """x `(N, H, W, C)`, kernel `(h, w, C)`."""
    sizes = _output_sizes(x.shape, kernel.shape, strides, padding)
    x, kernel, dtype = _widen(x, kernel)
    y = jnp.zeros((x.shape[0], *sizes, x.shape[3]), kernel.dtype)
    for tap, of_image, of_output in _taps(x.shape, kernel.shape, strides, padding):
        y += _put(_take(x, of_image, strides) * kernel[tap], of_output, sizes, (1, 1))
    return y.astype(dtype)


def _forward(x, kernel, strides, padding):
    return _depthwise(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, dy):
    x, kernel = saved
    dx = _input_gradient(dy, x.shape, kernel, strides, padding)
    return dx, _kernel_gradient(x, dy, kernel, strides, padding)


_depthwise.defvjp(_forward, _backward)


def _input_gradient(dy, shape, kernel, strides, padding):
    """Each output's gradient, times the taps, goes back to where they met the image."""
    taps = _taps(shape, kernel.shape, strides, padding)
    dy, kernel, dtype = _widen(dy, kernel)
    dx = jnp.zeros(shape, kernel.dtype)
    for tap, of_image, of_output in taps:
        dx += _put(_take(dy, of_output, (1, 1)) * kernel[tap], of_image, shape[1:3], strides)
    return dx.astype(dtype)


def _kernel_gradient(x, dy, kernel, strides, padding):
    """Sum of the products of dy with every tap's window, a few images at a time.

    XLA reduces all taps in one loop only as one reduction with as many operands, and vectorises over the
    channels only where the inner loop, here over `GROUP` images, is short enough to be unrolled. What is
    left, one image for each tap, stays in the cache and is reduced at memory speed.
    """
    groups, rest = divmod(x.shape[0] if dy.size else 0, GROUP)
    split = groups * GROUP
    gradient = jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32))
    of_group = partial(_group_gradient, kernel_shape=kernel.shape, strides=strides, padding=padding)
    if groups:
        stacked = [a[:split].reshape(groups, GROUP, *a.shape[1:]) for a in (x, dy)]
        gradient += lax.map(lambda pair: of_group(*pair), stacked).sum(0)
    if rest:
        gradient += of_group(x[split:], dy[split:])
    return gradient.astype(kernel.dtype)


def _group_gradient(x, dy, kernel_shape, strides, padding):
    x, dy, _ = _widen(lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0))), dy)
    products = []
    for start in product(*map(range, kernel_shape[:2])):
        box = [(a, a + (size - 1) * stride + 1) for a, size, stride in zip(start, dy.shape[1:3], strides)]
        products.append(_take(x, box, strides) * dy)
    zeros = [jnp.zeros((), dy.dtype)] * len(products)
    of_images = lax.reduce(products, zeros, lambda a, b: [p + q for p, q in zip(a, b)], (0,))
    return jnp.stack([taps.sum((0, 1)) for taps in of_images]).reshape(kernel_shape)


def _widen(x, other):
    """Both at least in float32, since bfloat16 would round after every tap; and what to round to in the end."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x.astype(wide), other.astype(wide), x.dtype


def _output_sizes(shape, kernel_shape, strides, padding):
    return tuple(
        max(0, (size + low + high - taps) // stride + 1)
        for size, taps, stride, (low, high) in zip(shape[1:3], kernel_shape, strides, padding)
    )


def _taps(shape, kernel_shape, strides, padding):
    """Of every tap that meets the image: its index, the box it meets there, and the box of its outputs.

    A box is `(first, last + 1)` of each axis; the positions in the image are a stride apart.
    """
    outputs = _output_sizes(shape, kernel_shape, strides, padding)
    taps = []
    for tap in product(*map(range, kernel_shape[:2])):
        of_image, of_output = [], []
        for index, size, out, stride, (low, _) in zip(tap, shape[1:3], outputs, strides, padding):
            offset = index - low  # output o meets the image at o * stride + offset
            first = max(0, -(offset // stride))
            end = min(out, (size - 1 - offset) // stride + 1)
            of_output.append((first, end))
            of_image.append((first * stride + offset, (end - 1) * stride + offset + 1))
        if all(first < end for first, end in of_output):
            taps.append((tap, of_image, of_output))
    return taps


def _take(x, box, strides):
    starts, limits = zip(*box)
    return lax.slice(x, (0, *starts, 0), (x.shape[0], *limits, x.shape[3]), (1, *strides, 1))


def _put(x, box, sizes, strides):
    """x on a plane of zeros of `sizes`."""
    edges = ((first, size - end, stride - 1) for (first, end), size, stride in zip(box, sizes, strides))
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
