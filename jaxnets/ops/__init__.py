"""Convolutions, BatchNorm and channel shuffle: one function each, however it is computed.

The only place that knows how a convolution is computed. Arrays are NHWC `(N, H, W, C)`, kernels HWIO
`(height, width, input channels / feature_group_count, output channels)`, both of one floating dtype.
`strides` is `(down, across)`, `padding` is `((top, bottom), (left, right))` in pixels.

There are four sets of formulations: `reference` (lax, plain autodiff), which says what each function means,
`xla` (portable XLA as CPUs want it, some gradients of its own), `native` (C++ on the CPU, built on first use; what it
does not do is xla's), and `gpu` (portable XLA as GPUs want it). JAXNETS_OPS=reference|xla|native|gpu or
`with ops.using(name)` forces one; otherwise the platform decides: native on the CPU, or xla where the build fails, gpu
on a GPU, and reference elsewhere. A convolution that a BatchNorm follows may stay a `Convolution`, and
the BatchNorm's output `Normalized` or, in evaluation, `Filtered`, one with a bias `Biased`, and part of an array
`Channels`, until the native operators read them: all are arrays to everyone else.

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

from jaxnets.errors import UserError
from jaxnets.ops import gpu, native, reference, xla
from jaxnets.ops.deferred import Biased, Channels, Convolution, Filtered, Normalized
from jaxnets.ops.native import library as native_library

UNBOUNDED = (-float("inf"), float("inf"))
FORMULATIONS = {"reference": reference, "xla": xla, "native": native, "gpu": gpu}
NO_PADDING = ((0, 0), (0, 0))

_forced = contextvars.ContextVar("jaxnets.ops.using", default=None)


@contextlib.contextmanager
def using(name):
    """Compute with the formulations `name`, one of `FORMULATIONS`, in this scope.

    Read where an operator is traced: a function that `jax.jit` compiled before keeps what it was compiled
    with, so make the jitted function inside the scope. Raises UserError for any other name.
    """
    token = _forced.set(_checked(name, "ops.using"))
    try:
        yield
    finally:
        _forced.reset(token)


def formulation():
    """Name of the formulations in use: that of `using`, else of JAXNETS_OPS, else the platform's.

    Raises UserError if JAXNETS_OPS is no such name.
    """
    if name := _forced.get():
        return name
    if name := os.environ.get("JAXNETS_OPS"):
        return _checked(name, "the environment variable JAXNETS_OPS")
    if jax.default_backend() == "cpu":
        return "native" if native_library.available() else "xla"
    # On a TPU nothing has been measured.
    return "gpu" if jax.default_backend() == "gpu" else "reference"


def conv(x, kernel, *, strides=(1, 1), padding=NO_PADDING, feature_group_count=1):
    """2-D convolution, `(N, H, W, C) -> (N, H', W', O)`: whichever of the following three fits, or a dense one.

    Raises ValueError where the shapes or dtypes do not fit together.
    """
    x, kernel = _fitting(x, kernel, feature_group_count)
    if feature_group_count == x.shape[-1] > 1:
        return _formulations().depthwise_conv(x, kernel, strides, padding)
    if feature_group_count > 1:
        return _formulations().grouped_conv(x, kernel, strides, padding, feature_group_count)
    if kernel.shape[:2] == (1, 1) and not any(map(any, padding)):
        return _formulations().pointwise_conv(x, kernel, strides)
    return _formulations().conv(x, kernel, strides, padding)


def depthwise_conv(x, kernel, *, strides=(1, 1), padding=NO_PADDING):
    """Each channel by filters of its own, kernel `(h, w, 1, C * multiplier)`; bfloat16 rounds once, at the end.

    Output channel `c * multiplier + m` is the m-th of input channel c. ValueError as for `conv`.
    """
    x, kernel = _fitting(x, kernel, x.shape[-1])
    return _formulations().depthwise_conv(x, kernel, strides, padding)


def pointwise_conv(x, kernel, *, strides=(1, 1)):
    """1x1 convolution without padding, kernel `(1, 1, C, O)`. ValueError as for `conv`."""
    x, kernel = _fitting(x, kernel, 1)
    if kernel.shape[:2] != (1, 1):
        raise ValueError(f"the kernel of a pointwise convolution must be 1x1, not {kernel.shape}")
    return _formulations().pointwise_conv(x, kernel, strides)


def grouped_conv(x, kernel, *, strides=(1, 1), padding=NO_PADDING, feature_group_count):
    """Convolution within each of `feature_group_count` groups of channels. ValueError as for `conv`."""
    x, kernel = _fitting(x, kernel, feature_group_count)
    return _formulations().grouped_conv(x, kernel, strides, padding, feature_group_count)


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
    """
    x, scale, bias = map(jnp.asarray, (x, scale, bias))
    return _formulations().batch_norm(x, scale, bias, epsilon, bounds, axis_name)


def conv_batch_norm(convolution, scale, bias, *, epsilon=1e-5, bounds=UNBOUNDED, axis_name=None, shuffle=1):
    """`batch_norm` of `conv`, in fewer passes where the formulation has a way.

    Args:
      convolution: `Convolution`, what `conv` takes; its x may be deferred.
      scale, bias, epsilon, bounds, axis_name: as for `batch_norm`.
      shuffle: groups for `channel_shuffle` of y; scale, bias, mean and variance stay in the kernel's order.

    Returns:
      What `batch_norm` returns, but y may be `Normalized`: computed when `jnp.asarray` asks for it, or by the
      next convolution as it reads. ValueError as for `conv`.
    """
    _require_divided(scale.size, shuffle)
    if _is_native(convolution, scale, bias, shuffle=shuffle):
        return native.conv_batch_norm(convolution, scale, bias, epsilon, bounds, axis_name, shuffle)
    y = conv(**convolution._asdict())
    y, mean, var = batch_norm(y, scale, bias, epsilon=epsilon, bounds=bounds, axis_name=axis_name)
    return channel_shuffle(y, shuffle), mean, var


def conv_affine(convolution, gain, bias, *, bounds=UNBOUNDED, shuffle=1):
    """clip(`conv` * gain + bias), gain and bias `(C,)` float32: a BatchNorm in evaluation. Of x's dtype.

    `shuffle` as for `conv_batch_norm`. May be `Filtered`: computed when `jnp.asarray` asks for it, or together with
    the 1x1 convolution, the sum, the concatenation or the max pooling that reads it. ValueError as for `conv`.
    """
    _require_divided(gain.size, shuffle)
    if _is_native(convolution, gain, bias, shuffle=shuffle):
        return native.conv_affine(convolution, gain, bias, bounds, shuffle)
    y = conv(**convolution._asdict())
    return channel_shuffle(reference.clip((y * gain + bias).astype(y.dtype), bounds), shuffle)


def conv_bias(convolution, bias, *, bounds=UNBOUNDED):
    """clip(`conv` + bias), bias `(C,)` float32; of x's dtype. ValueError as for `conv`.

    May be `Biased`: computed when `jnp.asarray` asks for it, or by `concatenate` or `max_pool`.
    """
    if _is_native(convolution, bias):
        return native.conv_bias(convolution, bias, bounds)
    y = conv(**convolution._asdict())
    return _formulations().add_bias(y, bias, bounds)


def add(x, y, *, bounds=UNBOUNDED):
    """clip(x + y), the sum of a block's input and its branch; either may be deferred."""
    if _takes_part(y, x) and y.bounds[-1] == UNBOUNDED:
        return native.evaluate(y, x, sum_bounds=bounds)
    if not (isinstance(y, Normalized) and y.bounds == UNBOUNDED):
        x, y = jnp.asarray(x), jnp.asarray(y)
        if formulation() != "native" or not (x.shape == y.shape and x.dtype == y.dtype == jnp.float32):
            return reference.clip(x + y, bounds)
    return native.add(x, y, bounds)


def max_pool(x, window, *, strides, padding=NO_PADDING):
    """Maximum over `window` x `window` pixels, `strides` apart; `padding` is never the maximum.

    The gradient goes to the first maximum, as in PyTorch and lax. x may be deferred, and is then computed together
    with its maximum; what reads x after that computes it again.
    """
    padding = tuple(map(tuple, padding))
    if parts := native.stem_parts(x):
        return native.pooled_stem(parts, window, strides, padding)
    return _formulations().max_pool(jnp.asarray(x), window, strides, padding)


def avg_pool(x, window, *, strides, padding=NO_PADDING):
    """Mean of `window` x `window` pixels, `strides` apart, the zeros of the padding counted."""
    return _formulations().avg_pool(jnp.asarray(x), window, strides, tuple(map(tuple, padding)))


def concatenate(parts):
    """Channels of arrays `(N, H, W, C)` one behind another; they may be deferred."""
    joined = all(isinstance(part, Biased) and part.plan.kind != "depthwise" for part in parts)
    if joined and len({(part.shape[:3], part.bounds) for part in parts}) == 1:
        return native.concatenate(parts)
    return jnp.concatenate(list(map(jnp.asarray, parts)), -1)


def concatenate_shuffle(x, y):
    """`channel_shuffle`, in two groups, of x's channels and then y's; either may be deferred."""
    if _takes_part(y, x):
        return native.evaluate(y, x, interleaved=True)
    if formulation() == "native" and x.shape == y.shape and x.dtype == y.dtype == jnp.float32:
        return native.interleave(x, y)
    return channel_shuffle(jnp.concatenate((jnp.asarray(x), jnp.asarray(y)), -1), 2)


def halves(x):
    """The first and the second half of x's channels; they may be `Channels`. ValueError for an odd number."""
    _require_divided(x.shape[-1], 2)
    x, half = jnp.asarray(x), x.shape[-1] // 2
    if formulation() == "native":
        return Channels(x, 0, half), Channels(x, half, half)
    return x[..., :half], x[..., half:]


def channel_shuffle(x, groups):
    """Interleave the channels of `groups` groups (ShuffleNet, 1707.01083, figure 1).

    Raises ValueError where the groups do not divide the channels.
    """
    _require_divided(x.shape[-1], groups)
    return _formulations().channel_shuffle(x, groups) if groups > 1 else x


def _takes_part(y, x):
    """Whether y is `Filtered` and can be computed together with x."""
    if not isinstance(y, Filtered) or y.computed or y.depthwise or y.plans[-1].shuffle > 1:
        return False
    return x.shape == y.shape and x.dtype == y.dtype


def _is_native(convolution, *vectors, shuffle=1):
    _require_fitting(convolution.x, convolution.kernel, convolution.feature_group_count)
    if formulation() != "native" or any(v.dtype != jnp.float32 for v in vectors):
        return False
    return native.plan_of(convolution, shuffle=shuffle) is not None


def _require_divided(channels, groups):
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups must divide the {channels} channels")


def _formulations():
    return FORMULATIONS[formulation()]


def _checked(name, source):
    if name not in FORMULATIONS:
        raise UserError(f"{source} must be one of {', '.join(FORMULATIONS)}, not {name!r}")
    return name


def _fitting(x, kernel, groups):
    """Both as JAX arrays, or ValueError."""
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    _require_fitting(x, kernel, groups)
    return x, kernel


def _require_fitting(x, kernel, groups):
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(f"a convolution takes (N, H, W, C) and (h, w, I, O), not {x.shape} and {kernel.shape}")
    if x.dtype != kernel.dtype:
        raise ValueError(f"a convolution takes one dtype, not x {x.dtype} and kernel {kernel.dtype}")
    if groups < 1 or x.shape[3] != kernel.shape[2] * groups or kernel.shape[3] % groups:
        raise ValueError(
            f"a kernel {kernel.shape} with feature_group_count={groups} does not fit an input with "
            f"{x.shape[3]} channels: it needs {kernel.shape[2]} of them for each group, and groups that divide "
            f"its {kernel.shape[3]} outputs"
        )


__all__ = [
    "Biased",
    "Channels",
    "Convolution",
    "Filtered",
    "NO_PADDING",
    "Normalized",
    "UNBOUNDED",
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
