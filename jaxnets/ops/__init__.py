"""Convolutions, BatchNorm and channel shuffle: one function each, however it is computed.

The only place that knows how a convolution is computed. Arrays are NHWC `(N, H, W, C)`, kernels HWIO
`(height, width, input channels / feature_group_count, output channels)`, both of one floating dtype.
`strides` is `(down, across)`, `padding` is `((top, bottom), (left, right))` in pixels, of a convolution also negative,
which crops. Where the arguments do not fit, every function raises ValueError as it is traced, by whatever formulations:
the native kernels read and write memory as the shapes say.

There are four sets of formulations: `reference` (lax, plain autodiff), which says what each function means,
`xla` (portable XLA as CPUs want it, some gradients of its own), `native` (C++ on the CPU, built on first use; what it
does not do is xla's), and `gpu` (portable XLA as GPUs want it). JAXNETS_OPS=reference|xla|native|gpu or
`with ops.using(name)` forces one; otherwise the platform decides: native on the CPU, or xla where the build fails, gpu
on a GPU, and reference elsewhere. Native operators may return lazy arrays (`deferred`): a BatchNorm's output, in
training `LazyBatchNorm` and in evaluation `LazyConv`; a convolution with a bias, `LazyBiasedConv`; and a part of an
array, `ChannelSlice`. Native operators read them as they are; everyone else sees arrays.

All work under jit, grad, vmap, pmap, shard_map, scan and remat. All but `native`, which raises UserError, have second
derivatives; forward-mode differentiation (`jax.jvp`, `jax.jacfwd`) needs `reference`: what has a gradient of its own
in another set, such as depthwise_conv, batch_norm and max_pool, raises JAX's TypeError about custom_vjp. Under jit
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
from jaxnets.ops.deferred import ChannelSlice, Convolution, LazyBatchNorm, LazyBiasedConv, LazyConv
from jaxnets.ops.native import library as native_library
from jaxnets.ops.reference import NO_PADDING, UNBOUNDED

FORMULATIONS = {"reference": reference, "xla": xla, "native": native, "gpu": gpu}

_forced = contextvars.ContextVar("jaxnets.ops.using", default=None)


@contextlib.contextmanager
def using(name):
    """Compute with the formulations `name`, one of `FORMULATIONS`, in this scope.

    Read where an operator is traced: a function that `jax.jit` compiled before keeps what it was compiled
    with, so make the jitted function inside the scope. Raises UserError for any other name, and for `native` where
    the kernels are not there.
    """
    token = _forced.set(_available(name, "ops.using"))
    try:
        yield
    finally:
        _forced.reset(token)


def formulation():
    """Name of the formulations in use: that of `using`, else of JAXNETS_OPS, else the platform's.

    Raises UserError if JAXNETS_OPS is no such name, or asks for native ones that are not there.
    """
    if name := _forced.get():
        return name
    if name := os.environ.get("JAXNETS_OPS"):
        return _available(name, "the environment variable JAXNETS_OPS")
    if jax.default_backend() == "cpu":
        return "native" if native_library.available() else "xla"
    # On a TPU nothing has been measured.
    return "gpu" if jax.default_backend() == "gpu" else "reference"


def conv(x, kernel, *, strides=(1, 1), padding=NO_PADDING, feature_group_count=1):
    """2-D convolution, `(N, H, W, C) -> (N, H', W', O)`: whichever of the following three fits, or a dense one.

    Raises ValueError for other ranks, for two dtypes or one that is not floating, for channels that do not fit the
    kernel and its groups, for a kernel without height or width, and for a padding that crops more than there is.
    """
    x, kernel, strides, padding, groups = arguments.operands(x, kernel, strides, padding, feature_group_count)
    if groups == x.shape[3] > 1:
        return _formulations(x).depthwise_conv(x, kernel, strides, padding)
    if groups > 1:
        return _formulations(x).grouped_conv(x, kernel, strides, padding, groups)
    if kernel.shape[:2] == (1, 1) and not any(map(any, padding)):
        return _formulations(x).pointwise_conv(x, kernel, strides)
    return _formulations(x).conv(x, kernel, strides, padding)


def depthwise_conv(x, kernel, *, strides=(1, 1), padding=NO_PADDING):
    """Each channel by filters of its own, kernel `(h, w, 1, C * multiplier)`; bfloat16 rounds once, at the end.

    Output channel `c * multiplier + m` is the m-th of input channel c. ValueError as for `conv`.
    """
    groups = arguments.array("x", x).shape[3]
    x, kernel, strides, padding, _ = arguments.operands(x, kernel, strides, padding, groups)
    return _formulations(x).depthwise_conv(x, kernel, strides, padding)


def pointwise_conv(x, kernel, *, strides=(1, 1)):
    """1x1 convolution without padding, kernel `(1, 1, C, O)`. ValueError as for `conv`."""
    x, kernel, strides, *_ = arguments.operands(x, kernel, strides, NO_PADDING, 1)
    if kernel.shape[:2] != (1, 1):
        raise ValueError(f"the kernel of a pointwise convolution must be 1x1, not {kernel.shape}")
    return _formulations(x).pointwise_conv(x, kernel, strides)


def grouped_conv(x, kernel, *, strides=(1, 1), padding=NO_PADDING, feature_group_count):
    """Convolution within each of `feature_group_count` groups of channels. ValueError as for `conv`."""
    x, *how = arguments.operands(x, kernel, strides, padding, feature_group_count)
    return _formulations(x).grouped_conv(x, *how)


def batch_norm(x, scale, bias, *, epsilon=1e-5, bounds=UNBOUNDED, axis_name=None):
    """Normalise by the batch's statistics, scale, shift and clip (1502.03167, algorithm 1).

    Args:
      x: `(N, H, W, C)`, floating.
      scale, bias: `(C,)`, float32.
      epsilon: added to the variance.
      bounds: `(low, high)` that the result is clipped to; where it is clipped, no gradient passes.
      axis_name: of the devices (pmap, shard_map, vmap) to share the statistics with.

    Returns:
      y `(N, H, W, C)` of x's dtype, and the mean and the biased variance `(C,)`, at least float32, which are
      for running statistics: they pass no gradient on.

    Raises ValueError for other shapes and dtypes that are not floating, and for bounds that are none.
    """
    x, bounds = jnp.asarray(arguments.array("x", x)), arguments.bounds(bounds)
    scale, bias = arguments.array("scale", scale, x.shape[3:]), arguments.array("bias", bias, x.shape[3:])
    return _formulations(x).batch_norm(x, scale, bias, epsilon, bounds, axis_name)


def conv_batch_norm(convolution, scale, bias, *, epsilon=1e-5, bounds=UNBOUNDED, axis_name=None, shuffle=1):
    """`batch_norm` of `conv`, in fewer passes where the formulation has a way.

    Args:
      convolution: `Convolution`, what `conv` takes; its x may be deferred.
      scale, bias: `(O,)`, float32: a value for each output channel.
      epsilon, bounds, axis_name: as for `batch_norm`.
      shuffle: groups for `channel_shuffle` of y; scale, bias, mean and variance stay in the kernel's order.

    Returns:
      What `batch_norm` returns, but y may be `LazyBatchNorm`: computed when `jnp.asarray` asks for it, or by the
      next convolution as it reads. ValueError as for `conv`, `batch_norm` and `channel_shuffle`.
    """
    convolution, bounds = arguments.fitting(convolution), arguments.bounds(bounds)
    channels = convolution.kernel.shape[3:]
    scale, bias = arguments.array("scale", scale, channels), arguments.array("bias", bias, channels)
    shuffle = arguments.dividing("shuffle", shuffle, *channels)
    if _is_native(convolution, scale, bias, shuffle=shuffle):
        return native.conv_batch_norm(convolution, scale, bias, epsilon, bounds, axis_name, shuffle)
    y = conv(**convolution._asdict())
    y, mean, var = batch_norm(y, scale, bias, epsilon=epsilon, bounds=bounds, axis_name=axis_name)
    return channel_shuffle(y, shuffle), mean, var


def conv_affine(convolution, gain, bias, *, bounds=UNBOUNDED, shuffle=1):
    """clip(`conv` * gain + bias), gain and bias `(O,)` float32: a BatchNorm in evaluation. Of x's dtype.

    `shuffle` as for `conv_batch_norm`. May be `LazyConv`: computed when `jnp.asarray` asks for it, or together with
    the 1x1 convolution, the sum, the concatenation or the max pooling that reads it. ValueError as for
    `conv_batch_norm`.
    """
    convolution, bounds = arguments.fitting(convolution), arguments.bounds(bounds)
    channels = convolution.kernel.shape[3:]
    gain, bias = arguments.array("gain", gain, channels), arguments.array("bias", bias, channels)
    shuffle = arguments.dividing("shuffle", shuffle, *channels)
    if _is_native(convolution, gain, bias, shuffle=shuffle):
        return native.conv_affine(convolution, gain, bias, bounds, shuffle)
    y = conv(**convolution._asdict())
    return channel_shuffle(reference.clip((y * gain + bias).astype(y.dtype), bounds), shuffle)


def conv_bias(convolution, bias, *, bounds=UNBOUNDED):
    """clip(`conv` + bias), bias `(O,)` float32; of x's dtype. ValueError as for `conv_batch_norm`.

    May be `LazyBiasedConv`: computed when `jnp.asarray` asks for it, or by `concatenate` or `max_pool`.
    """
    convolution, bounds = arguments.fitting(convolution), arguments.bounds(bounds)
    bias = arguments.array("bias", bias, convolution.kernel.shape[3:])
    if _is_native(convolution, bias):
        return native.conv_bias(convolution, bias, bounds)
    y = conv(**convolution._asdict())
    return _formulations(y).add_bias(y, bias, bounds)


def add(x, y, *, bounds=UNBOUNDED):
    """clip(x + y), the sum of a block's input and its branch; either may be deferred.

    Both are `(N, H, W, C)` of one floating dtype, or what NumPy's rules broadcast and promote to that. Raises
    ValueError for shapes that do not broadcast, other dtypes and bounds that are none.
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

    The gradient goes to the first maximum, as in PyTorch and lax. x, `(N, H, W, C)`, may be deferred, and is then
    computed together with its maximum; what reads x after that computes it again.

    Raises ValueError for other ranks and dtypes that are not floating, for a window, strides (one integer each) or
    padding that are none, and where the padded image is smaller than the window.
    """
    x, *how = arguments.pooled(x, window, strides, padding)
    if parts := native.stem_parts(x):
        return native.pooled_stem(parts, *how)
    return _formulations(x).max_pool(jnp.asarray(x), *how)


def avg_pool(x, window, *, strides, padding=NO_PADDING):
    """Mean of `window` x `window` pixels, `strides` apart, the zeros of the padding counted.

    x as for `max_pool`, and ValueError.
    """
    x, *how = arguments.pooled(x, window, strides, padding)
    return _formulations(x).avg_pool(jnp.asarray(x), *how)


def concatenate(parts):
    """Channels of arrays `(N, H, W, C)` one behind another; they may be deferred, and each have a C of its own.

    Raises ValueError for other ranks and where N, H or W differ.
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
    """`channel_shuffle`, in two groups, of x's channels and then y's; either may be deferred.

    ValueError as for `concatenate` and `channel_shuffle`.
    """
    x = arguments.array("x", x, floating=False)
    y = arguments.array("y", y, (*x.shape[:3], "C"), floating=False)
    if _takes_part(y, x):
        return native.evaluate(y, x, interleaved=True)
    if formulation() == "native" and _are_alike(x, y):
        return native.interleave(x, y)
    return channel_shuffle(jnp.concatenate((jnp.asarray(x), jnp.asarray(y)), -1), 2)


def halves(x):
    """The first and the second half of x's channels, `(N, H, W, C / 2)` each; they may be `ChannelSlice`.

    Raises ValueError for an odd number, and where x is not `(N, H, W, C)`.
    """
    x = jnp.asarray(arguments.array("x", x, floating=False))
    half = x.shape[3] // arguments.dividing("groups", 2, x.shape[3])
    if formulation() == "native":
        return ChannelSlice(x, 0, half), ChannelSlice(x, half, half)
    return x[..., :half], x[..., half:]


def channel_shuffle(x, groups):
    """Interleave the channels of `groups` groups (ShuffleNet, 1707.01083, figure 1).

    Raises ValueError where the groups do not divide the channels, and where x is not `(N, H, W, C)`.
    """
    x = arguments.array("x", x, floating=False)
    groups = arguments.dividing("groups", groups, x.shape[3])
    return _formulations(x).channel_shuffle(x, groups) if groups > 1 else x


def _takes_part(y, x):
    """Whether y is `LazyConv` and can be computed together with x."""
    if not isinstance(y, LazyConv) or y.computed or y.depthwise or y.plans[-1].shuffle > 1:
        return False
    return x.shape == y.shape and x.dtype == y.dtype


def _are_alike(x, y):
    """Whether one native kernel reads both."""
    return x.ndim == 4 and x.shape == y.shape and x.dtype == y.dtype == jnp.float32


def _is_native(convolution, *vectors, shuffle=1):
    if formulation() != "native" or any(v.dtype != jnp.float32 for v in vectors):
        return False
    return native.plan_of(convolution, shuffle=shuffle) is not None


def _formulations(x):
    """Those in use; but of an empty x the reference: the others divide by the number of its channels or values."""
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
