"""Convolutions, BatchNorm and channel shuffle: one function each, however it is computed.

No other module knows how a convolution is computed. Arrays are NHWC `(N, H, W, C)`, kernels HWIO
`(height, width, input channels / feature_group_count, output channels)`, both of the same floating dtype.
`strides` is `(down, across)`; `padding` is `((top, bottom), (left, right))` in pixels, and for a convolution may be
negative, which crops. Whatever the formulations, every function raises ValueError at trace time if its arguments do
not fit: the native kernels trust the shapes when they read and write memory.

There are four sets of formulations: `reference` (lax, plain autodiff), which defines what each function means,
`xla` (portable XLA tuned for CPUs, with some custom gradients), `native` (C++ on the CPU, built on first use; falls
back to `xla` for what it lacks), and `gpu` (portable XLA tuned for GPUs). JAXNETS_OPS=reference|xla|native|gpu or
`with ops.using(name)` forces one; otherwise the platform decides: native on the CPU, or xla if the build fails, gpu
on a GPU, and reference elsewhere. Native operators may return lazy arrays (`lazy`): `LazyBatchNorm` for the output
of a BatchNorm in training and `LazyConv` in evaluation, `LazyBiasedConv` for a convolution with a bias, `ChannelSlice`
for part of an array. Native operators read them without computing them first; all other code sees arrays.

All work under jit, grad, vmap, pmap, shard_map, scan and remat. All but `native`, which raises UserError, have second
derivatives. Forward-mode differentiation (`jax.jvp`, `jax.jacfwd`) needs `reference`: operators with a custom gradient
in another set, such as depthwise_conv, batch_norm and max_pool, raise JAX's TypeError about custom_vjp. Under jit
with a batch sharded over devices, `native` and the kernel gradient of `xla`'s depthwise_conv gather the batch: use
pmap or shard_map there, or `reference`.
"""

import contextlib
import contextvars
import os

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.errors import UserError
from jaxnets.ops import arguments, gpu, native, reference, xla
from jaxnets.ops.lazy import ChannelSlice, Convolution, LazyBatchNorm, LazyBiasedConv, LazyConv
from jaxnets.ops.native import library as native_library
from jaxnets.ops.reference import NO_PADDING, UNBOUNDED

FORMULATIONS = {"reference": reference, "xla": xla, "native": native, "gpu": gpu}

_forced = contextvars.ContextVar("jaxnets.ops.using", default=None)


@contextlib.contextmanager
def using(name):
    """Use the formulations `name`, one of `FORMULATIONS`, in this scope.

    The choice is read when an operator is traced: a function already compiled by `jax.jit` keeps the formulations it
    was compiled with, so create the jitted function inside the scope. Raises UserError for any other name, and for
    `native` if the kernels are not available.
    """
    token = _forced.set(_available(name, "ops.using"))
    try:
        yield
    finally:
        _forced.reset(token)


def formulation():
    """Name of the formulations in use: from `using`, else from JAXNETS_OPS, else the platform's default.

    Raises UserError if JAXNETS_OPS is not a known name, or is `native` and the kernels are not available.
    """
    if name := _forced.get():
        return name
    if name := os.environ.get("JAXNETS_OPS"):
        return _available(name, "the environment variable JAXNETS_OPS")
    if jax.default_backend() == "cpu":
        return "native" if native_library.available() else "xla"
    # Nothing has been measured on a TPU.
    return "gpu" if jax.default_backend() == "gpu" else "reference"


def conv(x, kernel, *, strides=(1, 1), padding=NO_PADDING, feature_group_count=1):
    """2-D convolution, `(N, H, W, C) -> (N, H', W', O)`: whichever of the following three fits, or a dense one.

    Raises ValueError for other ranks, for mixed or non-floating dtypes, for channels that do not fit the kernel and
    its groups, for a kernel of zero height or width, and for padding that crops more than the image has.
    """
    x, kernel, strides, padding, groups = arguments.eager_convolution(x, kernel, strides, padding, feature_group_count)
    if groups == x.shape[3] > 1:
        return _formulations(x).depthwise_conv(x, kernel, strides, padding)
    if groups > 1:
        return _formulations(x).grouped_conv(x, kernel, strides, padding, groups)
    if kernel.shape[:2] == (1, 1) and not any(map(any, padding)):
        return _formulations(x).pointwise_conv(x, kernel, strides)
    return _formulations(x).conv(x, kernel, strides, padding)


def depthwise_conv(x, kernel, *, strides=(1, 1), padding=NO_PADDING):
    """Convolve each channel with its own filters, kernel `(h, w, 1, C * multiplier)`; bfloat16 rounds once, at the end.

    Output channel `c * multiplier + m` is the m-th of input channel c. Raises ValueError as `conv` does.
    """
    groups = arguments.array("x", x).shape[3]
    x, kernel, strides, padding, _ = arguments.eager_convolution(x, kernel, strides, padding, groups)
    return _formulations(x).depthwise_conv(x, kernel, strides, padding)


def pointwise_conv(x, kernel, *, strides=(1, 1)):
    """1x1 convolution without padding, kernel `(1, 1, C, O)`. Raises ValueError as `conv` does."""
    x, kernel, strides, *_ = arguments.eager_convolution(x, kernel, strides, NO_PADDING, 1)
    if kernel.shape[:2] != (1, 1):
        raise ValueError(f"the kernel of a pointwise convolution must be 1x1, not {kernel.shape}")
    return _formulations(x).pointwise_conv(x, kernel, strides)


def grouped_conv(x, kernel, *, strides=(1, 1), padding=NO_PADDING, feature_group_count):
    """Convolution within each of `feature_group_count` groups of channels. Raises ValueError as `conv` does."""
    x, *how = arguments.eager_convolution(x, kernel, strides, padding, feature_group_count)
    return _formulations(x).grouped_conv(x, *how)


def batch_norm(x, scale, bias, *, epsilon=1e-5, bounds=UNBOUNDED, axis_name=None):
    """Normalise by the batch's statistics, scale, shift and clip (1502.03167, algorithm 1).

    Args:
      x: `(N, H, W, C)`, floating.
      scale, bias: `(C,)`, float32.
      epsilon: added to the variance.
      bounds: `(low, high)` to clip the result to; no gradient passes where it is clipped.
      axis_name: the mapped axis (pmap, shard_map, vmap) over which to share the statistics.

    Returns:
      y `(N, H, W, C)` of x's dtype, and the mean and the biased variance `(C,)` in at least float32, which are
      for running statistics and pass no gradient.

    Raises ValueError for other shapes, non-floating dtypes and invalid bounds.
    """
    x, bounds = jnp.asarray(arguments.array("x", x)), arguments.bounds(bounds)
    scale, bias = arguments.array("scale", scale, x.shape[3:]), arguments.array("bias", bias, x.shape[3:])
    return _formulations(x).batch_norm(x, scale, bias, epsilon, bounds, axis_name)


def conv_batch_norm(convolution, scale, bias, *, epsilon=1e-5, bounds=UNBOUNDED, axis_name=None, shuffle=1):
    """`batch_norm` of `conv`, in fewer passes where the formulation can.

    Args:
      convolution: `Convolution`, the operands of `conv`; its x may be lazy.
      scale, bias: `(O,)`, float32: one value per output channel.
      epsilon, bounds, axis_name: as for `batch_norm`.
      shuffle: groups for a `channel_shuffle` of y; scale, bias, mean and variance keep the kernel's channel order.

    Returns:
      What `batch_norm` returns, but y may be a `LazyBatchNorm`: computed by `jnp.asarray`, or by the next
      convolution as it reads y. Raises ValueError as `conv`, `batch_norm` and `channel_shuffle` do.
    """
    convolution, bounds = arguments.convolution(convolution), arguments.bounds(bounds)
    channels = convolution.kernel.shape[3:]
    scale, bias = arguments.array("scale", scale, channels), arguments.array("bias", bias, channels)
    shuffle = arguments.groups("shuffle", shuffle, *channels)
    if _is_native(convolution, scale, bias, shuffle=shuffle):
        return native.conv_batch_norm(convolution, scale, bias, epsilon, bounds, axis_name, shuffle)
    y = conv(**convolution._asdict())
    y, mean, var = batch_norm(y, scale, bias, epsilon=epsilon, bounds=bounds, axis_name=axis_name)
    return channel_shuffle(y, shuffle), mean, var


def conv_affine(convolution, gain, bias, *, bounds=UNBOUNDED, shuffle=1):
    """clip(`conv` * gain + bias) of x's dtype, gain and bias `(O,)` float32: a BatchNorm in evaluation.

    `shuffle` as for `conv_batch_norm`. The result may be a `LazyConv`: computed by `jnp.asarray`, or together with
    the 1x1 convolution, sum, concatenation or max pooling that reads it. Raises ValueError as `conv_batch_norm` does.
    """
    convolution, bounds = arguments.convolution(convolution), arguments.bounds(bounds)
    channels = convolution.kernel.shape[3:]
    gain, bias = arguments.array("gain", gain, channels), arguments.array("bias", bias, channels)
    shuffle = arguments.groups("shuffle", shuffle, *channels)
    if _is_native(convolution, gain, bias, shuffle=shuffle):
        return native.conv_affine(convolution, gain, bias, bounds, shuffle)
    y = conv(**convolution._asdict())
    return channel_shuffle(reference.clip((y * gain + bias).astype(y.dtype), bounds), shuffle)


def conv_bias(convolution, bias, *, bounds=UNBOUNDED):
    """clip(`conv` + bias) of x's dtype, bias `(O,)` float32. Raises ValueError as `conv_batch_norm` does.

    The result may be a `LazyBiasedConv`: computed by `jnp.asarray`, `concatenate` or `max_pool`.
    """
    convolution, bounds = arguments.convolution(convolution), arguments.bounds(bounds)
    bias = arguments.array("bias", bias, convolution.kernel.shape[3:])
    if _is_native(convolution, bias):
        return native.conv_bias(convolution, bias, bounds)
    y = conv(**convolution._asdict())
    return _formulations(y).add_bias(y, bias, bounds)


def add(x, y, *, bounds=UNBOUNDED):
    """clip(x + y), the sum of a block's input and its branch; either may be lazy.

    Both are `(N, H, W, C)` of the same floating dtype, or broadcast and promote to that by NumPy's rules. Raises
    ValueError for shapes that do not broadcast, other dtypes and invalid bounds.
    """
    x, y, bounds = arguments.array("x", x, None), arguments.array("y", y, None), arguments.bounds(bounds)
    if _takes_part(y, x) and y.bounds[-1] == UNBOUNDED:
        return native.evaluate(y, x, sum_bounds=bounds)
    if formulation() == "native" and _are_alike(x, y):
        unclipped = isinstance(y, LazyBatchNorm) and y.bounds == UNBOUNDED
        return native.add(x, y if unclipped else jnp.asarray(y), bounds)
    try:
        np.broadcast_shapes(x.shape, y.shape)
    except ValueError:
        raise ValueError(f"x and y must broadcast to one shape, not be {x.shape} and {y.shape}") from None
    return reference.clip(jnp.asarray(x) + jnp.asarray(y), bounds)


def max_pool(x, window, *, strides, padding=NO_PADDING):
    """Maximum over `window` x `window` pixels, `strides` apart; `padding` is never the maximum.

    The gradient goes to the first maximum, as in PyTorch and lax. x, `(N, H, W, C)`, may be lazy; if it is then
    computed together with its maximum, whatever reads x later computes it again.

    Raises ValueError for other ranks and non-floating dtypes, for an invalid window, strides (one integer each) or
    padding, and if the padded image is smaller than the window.
    """
    x, *how = arguments.pooling(x, window, strides, padding)
    if parts := native.stem_parts(x):
        return native.pooled_stem(parts, *how)
    return _formulations(x).max_pool(jnp.asarray(x), *how)


def avg_pool(x, window, *, strides, padding=NO_PADDING):
    """Mean over `window` x `window` pixels, `strides` apart, counting the zeros of the padding.

    Takes x, and raises ValueError, as `max_pool` does.
    """
    x, *how = arguments.pooling(x, window, strides, padding)
    return _formulations(x).avg_pool(jnp.asarray(x), *how)


def concatenate(parts):
    """Concatenate the channels of arrays `(N, H, W, C)`, which may be lazy and differ in C.

    Raises ValueError for other ranks and if N, H or W differ.
    """
    parts = [arguments.array("each part", part, floating=False) for part in parts]
    parts = [arguments.array("each part", part, (*parts[0].shape[:3], "C"), floating=False) for part in parts]
    joined = all(
        isinstance(part, LazyBiasedConv) and not part.computed and part.plan.kind != "depthwise" for part in parts
    )
    if joined and len({part.bounds for part in parts}) == 1:
        return native.concatenate(parts)
    return jnp.concatenate(list(map(jnp.asarray, parts)), -1)


def concatenate_shuffle(x, y):
    """`channel_shuffle`, in two groups, of x's channels followed by y's; either may be lazy.

    Raises ValueError as `concatenate` and `channel_shuffle` do.
    """
    x = arguments.array("x", x, floating=False)
    y = arguments.array("y", y, (*x.shape[:3], "C"), floating=False)
    if _takes_part(y, x):
        return native.evaluate(y, x, interleaved=True)
    if formulation() == "native" and _are_alike(x, y):
        return native.interleave(x, y)
    return channel_shuffle(jnp.concatenate((jnp.asarray(x), jnp.asarray(y)), -1), 2)


def halves(x):
    """The first and second halves of x's channels, `(N, H, W, C / 2)` each; they may be `ChannelSlice`.

    Raises ValueError for an odd number of channels, and if x is not `(N, H, W, C)`.
    """
    x = jnp.asarray(arguments.array("x", x, floating=False))
    half = x.shape[3] // arguments.groups("groups", 2, x.shape[3])
    if formulation() == "native":
        return ChannelSlice(x, 0, half), ChannelSlice(x, half, half)
    return x[..., :half], x[..., half:]


def channel_shuffle(x, groups):
    """Interleave the channels of `groups` groups (ShuffleNet, 1707.01083, figure 1).

    Raises ValueError if the groups do not divide the channels, and if x is not `(N, H, W, C)`.
    """
    x = arguments.array("x", x, floating=False)
    groups = arguments.groups("groups", groups, x.shape[3])
    return _formulations(x).channel_shuffle(x, groups) if groups > 1 else x


def _takes_part(y, x):
    """Whether y is a `LazyConv` that can be computed together with x."""
    if not isinstance(y, LazyConv) or y.computed or y.depthwise or y.plans[-1].shuffle > 1:
        return False
    return x.shape == y.shape and x.dtype == y.dtype


def _are_alike(x, y):
    """Whether a single native kernel can read both."""
    return x.ndim == 4 and x.shape == y.shape and x.dtype == y.dtype == jnp.float32


def _is_native(convolution, *vectors, shuffle=1):
    if formulation() != "native" or any(v.dtype != jnp.float32 for v in vectors):
        return False
    return native.plan_of(convolution, shuffle=shuffle) is not None


def _formulations(x):
    """Those in use, but `reference` for an empty x: the others divide by its number of channels or values."""
    return FORMULATIONS[formulation()] if x.size else reference


def _available(name, source):
    if name not in FORMULATIONS:
        raise UserError(f"{source} must be one of {', '.join(FORMULATIONS)}, not {name!r}")
    if name == "native":
        native_library.require()
    return name


__all__ = [
    "NO_PADDING",
    "UNBOUNDED",
    "ChannelSlice",
    "Convolution",
    "LazyBatchNorm",
    "LazyBiasedConv",
    "LazyConv",
    "add",
    "avg_pool",
    "batch_norm",
    "channel_shuffle",
    "concatenate",
    "concatenate_shuffle",
    "conv",
    "conv_affine",
    "conv_batch_norm",
    "conv_bias",
    "depthwise_conv",
    "formulation",
    "grouped_conv",
    "halves",
    "max_pool",
    "pointwise_conv",
    "using",
]
