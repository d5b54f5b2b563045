"""Depthwise convolution as a sum of shifted products, with custom gradients."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.ops.manual_axes import align
from jaxnets.ops.reference import NO_PADDING, upcast, upcast_dtype
from jaxnets.ops.windows import output_size, pad, taps, window

IMAGES_AT_ONCE = 8  # images whose products the kernel gradient adds up in registers
FEW_TAPS = 9  # with more of them in one loop, XLA does not vectorise it


def depthwise_conv(x, kernel, strides, padding):
    """See `jaxnets.ops.depthwise_conv`; any stride, kernel, padding and channel multiplier."""
    height, width, _, features = kernel.shape
    multiplier = features // x.shape[-1]
    if multiplier != 1:
        x = jnp.repeat(x, multiplier, axis=-1)
    x, kernel = align(x, kernel.reshape(height, width, features))
    return _depthwise(x, kernel, strides, padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, strides, padding):
    """x `(N, H, W, C)`, kernel `(h, w, C)`."""
    return _forward(x, kernel, strides, padding)[0]


def _forward(x, kernel, strides, padding):
    padded = pad(x, padding)
    size = output_size(padded.shape[1:3], kernel, strides)
    inputs, weights = upcast(padded), upcast(kernel)  # bfloat16 would round after every tap
    y = jnp.zeros((x.shape[0], *size, x.shape[3]), inputs.dtype)
    if y.size:
        y = sum(window(inputs, tap, size, strides) * weights[tap] for tap in taps(kernel))
    # The residual is the padded image: it has to be written out anyway, unlike the image itself.
    return y.astype(x.dtype), (padded, kernel)


def _backward(strides, padding, saved, dy):
    padded, kernel = saved
    size = [n - low - high for n, (low, high) in zip(padded.shape[1:3], padding)]
    if not dy.size:
        return jnp.zeros((dy.shape[0], *size, dy.shape[3]), padded.dtype), jnp.zeros_like(kernel)
    dx = input_gradient(dy, kernel, strides, padding, size)
    return dx, _kernel_gradient(padded, dy, kernel, strides, padding)


_depthwise.defvjp(_forward, _backward)


def input_gradient(dy, kernel, strides, padding, size):
    """Only every stride-th tap reads input `cell * stride + phase`: each phase is a separate convolution."""
    if len(taps(kernel)) > FEW_TAPS:
        return _input_gradient_of_many_taps(dy, kernel, strides, padding, size)
    gradient, weights = upcast(dy), upcast(kernel)
    cells = [-(-n // stride) for n, stride in zip(size, strides)]
    rows = []
    for row in range(strides[0]):
        phases = []
        for column in range(strides[1]):
            total = jnp.zeros((dy.shape[0], *cells, dy.shape[3]), gradient.dtype)
            for tap in taps(kernel):
                axes = zip((row, column), tap, strides, padding)
                steps = [divmod(phase + low - index, stride) for phase, index, stride, (low, _) in axes]
                if all(rest == 0 for _, rest in steps):
                    # Multiply before padding: XLA is slow if what it pads is not itself a product.
                    total += _place(gradient * weights[tap], [step for step, _ in steps], cells)
            phases.append(total)
        rows.append(jnp.stack(phases, 3))
    dx = jnp.stack(rows, 2).reshape(dy.shape[0], *(n * s for n, s in zip(cells, strides)), dy.shape[3])
    return dx[:, : size[0], : size[1]].astype(dy.dtype)


def _input_gradient_of_many_taps(dy, kernel, strides, padding, size):
    """Convolution of the output gradient, dilated by the strides, with the kernel flipped."""
    spread = [(n - 1) * stride + 1 for n, stride in zip(dy.shape[1:3], strides)]
    edges = [
        (extent - 1 - low, n + low - have, stride - 1)
        for extent, n, have, stride, (low, _) in zip(kernel.shape, size, spread, strides, padding)
    ]
    padded = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    return _forward(padded, kernel[::-1, ::-1], (1, 1), NO_PADDING)[0]


def _place(x, steps, size):
    """x from `steps` on, cropped or zero-padded to `size`."""
    return pad(x, [(-step, n + step - have) for step, n, have in zip(steps, size, x.shape[1:3])])


def _kernel_gradient(padded, dy, kernel, strides, padding):
    """Sum of the products of dy with every tap's window, a few images at a time.

    XLA reduces all taps in one loop only as one reduction with that many operands, and vectorises over the
    channels only if the inner loop, here over the images of a group, is short enough to be unrolled.
    The result, one image per tap, stays in the cache and is reduced at memory speed.
    """

    def of_group(start, count):
        x, d = (upcast(lax.dynamic_slice_in_dim(a, start, count)) for a in (padded, dy))
        # Cropping and padding it again copies the group into the cache; a mere slice would not.
        x = pad(pad(x, [(-low, -high) for low, high in padding]), padding)
        products = [window(x, tap, d.shape[1:3], strides) * d for tap in taps(kernel)]
        of_taps = []
        for first in range(0, len(products), FEW_TAPS):
            of_taps += sum_together(products[first : first + FEW_TAPS], 0)
        return jnp.stack([of_tap.sum((0, 1)) for of_tap in of_taps])

    groups, rest = divmod(dy.shape[0], IMAGES_AT_ONCE)
    zeros = jnp.zeros((len(taps(kernel)), kernel.shape[2]), upcast_dtype(dy.dtype))
    gradient, _ = align(zeros, dy)
    if groups:
        count = IMAGES_AT_ONCE
        gradient = lax.fori_loop(0, groups, lambda i, total: total + of_group(i * count, count), gradient)
    if rest:
        gradient += of_group(groups * IMAGES_AT_ONCE, rest)
    return gradient.reshape(kernel.shape).astype(kernel.dtype)


def sum_together(arrays, axis):
    """The sum of each of the arrays over an axis, as one reduction with that many operands."""
    zeros = [jnp.zeros((), values.dtype) for values in arrays]
    return lax.reduce(arrays, zeros, lambda totals, values: list(map(lax.add, totals, values)), (axis,))
