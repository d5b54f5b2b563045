"""Depthwise convolution for GPUs: cuDNN's in half precision, for which it has dedicated kernels.

Otherwise sums of shifted products, which XLA compiles into one kernel; likewise the gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxnets.ops import reference
from jaxnets.ops.gpu_sums import sums
from jaxnets.ops.manual_axes import align
from jaxnets.ops.reference import upcast
from jaxnets.ops.windows import output_size, pad, taps, window
from jaxnets.ops.xla_depthwise import input_gradient

MAX_TAPS = 9  # of a 3x3 kernel, the only size tried on a GPU


def depthwise_conv(x, kernel, strides, padding):
    """See `jaxnets.ops.depthwise_conv`; lax's for half precision, many taps or several outputs per channel."""
    height, width, _, features = kernel.shape
    if jnp.finfo(x.dtype).bits == 16 or features != x.shape[-1] or height * width > MAX_TAPS:
        return reference.depthwise_conv(x, kernel, strides, padding)
    x, kernel = align(x, kernel.reshape(height, width, features))
    return _depthwise(x, kernel, strides, padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, strides, padding):
    """x `(N, H, W, C)`, kernel `(h, w, C)`."""
    return _shifted_products(x, kernel, strides, padding)


def _shifted_products(x, kernel, strides, padding):
    padded = pad(x, padding)
    size = output_size(padded.shape[1:3], kernel, strides)
    weights = upcast(kernel)
    y = jnp.zeros((x.shape[0], *size, x.shape[3]), weights.dtype)
    if y.size:
        y = sum(upcast(window(padded, tap, size, strides)) * weights[tap] for tap in taps(kernel))
    return y.astype(x.dtype)


def _forward(x, kernel, strides, padding):
    return _shifted_products(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, dy):
    x, kernel = saved
    if not dy.size:
        return jnp.zeros_like(x), jnp.zeros_like(kernel)
    if strides == (1, 1):
        # The convolution of dy with the flipped kernel.
        sides = zip(kernel.shape, x.shape[1:3], dy.shape[1:3], padding)
        edges = tuple((extent - 1 - low, size + low - have) for extent, size, have, (low, _) in sides)
        dx = _shifted_products(dy, kernel[::-1, ::-1], strides, edges)
    else:
        dx = input_gradient(dy, kernel, strides, padding, x.shape[1:3])
    return dx, _kernel_gradient(x, dy, kernel, strides, padding)


_depthwise.defvjp(_forward, _backward)


def _kernel_gradient(x, dy, kernel, strides, padding):
    """Sums of the products of dy with every tap's window, with all taps concatenated as channels of one map."""
    padded, size = pad(x, padding), dy.shape[1:3]
    products = [upcast(window(padded, tap, size, strides)) * upcast(dy) for tap in taps(kernel)]
    (gradient,) = sums(jnp.concatenate(products, -1))
    return gradient.reshape(kernel.shape).astype(kernel.dtype)
