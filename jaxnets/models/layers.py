"""The layers that the nets share, with PyTorch's padding, pooling and BatchNorm conventions."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets import ops
from jaxnets.errors import UserError
from jaxnets.models.initializers import conv_init
from jaxnets.ops.reference import upcast

ACTIVATIONS: dict[str, Callable] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "selu": nn.selu,
    "gelu": partial(nn.gelu, approximate=False),  # as PyTorch and Keras compute it
    "silu": nn.silu,
    "hard_swish": nn.hard_swish,
    "tanh": nn.tanh,
    "identity": lambda x: x,
}
PADDINGS = ("torch", "same")
# Activations that only clip: BatchNorm applies them in its own pass and recomputes them in its gradient.
CLIP_BOUNDS = {"identity": ops.UNBOUNDED, "relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round to a multiple of `divisor`, never below 90 % of `value`, as the authors' code of 1801.04381 does."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]):
    """`module.param(name, init, shape)`, but checks an existing value without tracing `init`.

    That saves a fifth of all tracing.

    Raises UserError for a value of another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = nn.meta.unbox(module.get_variable("params", name))
    if jnp.shape(value) != shape:
        place = ".".join((*module.path, name))
        raise UserError(f"the parameter {place} has the shape {jnp.shape(value)}, where the net has {shape}")
    return value


class Conv(nn.Module):
    """2-D convolution with bias and activation.

    `padding`: pixels on every side; or "torch", the `(k - 1) / 2` that PyTorch's nets use; or "same",
    TensorFlow's, which omits the first row and column of padding where a stride of 2 meets an even side; or
    "keras", that of Keras's MobileNet, which omits them for every side if the stride is 2.
    `train` has no effect; it makes `Conv` a stand-in for `ConvBN`. The result may be lazy (`jaxnets.ops`).
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | str = "torch"
    feature_group_count: int = 1
    activation: str = "identity"
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable | None = None  # default: `conv_init` of the groups

    @nn.compact
    def __call__(self, x, train: bool = False, compute: bool = True):
        """`(N, H, W, C)` or, with `compute=False`, the `ops.Convolution`, for a BatchNorm to compute both together."""
        k, groups = self.kernel_size, self.feature_group_count
        if x.shape[-1] % groups or self.features % groups:
            raise UserError(
                f"feature_group_count={groups} must divide both the {x.shape[-1]} input "
                f"and the {self.features} output channels"
            )
        kernel_init = self.kernel_init or conv_init(groups)
        kernel = parameter(self, "kernel", kernel_init, (k, k, x.shape[-1] // groups, self.features))
        convolution = ops.Convolution(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            strides=(self.strides, self.strides),
            padding=_conv_padding(x.shape[1:3], k, self.strides, self.padding),
            feature_group_count=groups,
        )
        if not compute:
            return convolution
        if not self.use_bias:
            return ACTIVATIONS[self.activation](ops.conv(**convolution._asdict()))
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        bounds, rest = _clipping(self.activation)
        return rest(ops.conv_bias(convolution, bias, bounds=bounds))


def _clipping(activation):
    """The bounds that an operator clips to for the activation, and a function for what is left to do."""
    if activation in CLIP_BOUNDS:
        return CLIP_BOUNDS[activation], lambda y: y  # y may be lazy
    return ops.UNBOUNDED, lambda y: ACTIVATIONS[activation](jnp.asarray(y))


def _conv_padding(sides, kernel_size, strides, padding):
    if padding == "same":
        pads = lax.padtype_to_pads(sides, (kernel_size,) * 2, (strides,) * 2, "SAME")
    elif padding == "keras":
        pads = [(0, kernel_size - 2) if strides == 2 else ((kernel_size - 1) // 2,) * 2] * 2
    else:
        pads = [((kernel_size - 1) // 2 if padding == "torch" else padding,) * 2] * 2
    if any(side + sum(pad) < kernel_size for side, pad in zip(sides, pads)):
        raise UserError(
            f"the images are too small: a {kernel_size}x{kernel_size} convolution meets a map of {sides[0]}x{sides[1]}"
        )
    return tuple(pads)


class BatchNorm(nn.Module):
    """BatchNorm and activation; PyTorch's running variance (n / (n - 1)), flax's momentum (1 - PyTorch's)."""

    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    activation: str = "identity"

    @nn.compact
    def __call__(self, x, train: bool, shuffle: int = 1):
        """x: an array `(N, H, W, C)`, or an `ops.Convolution`, whose output is shuffled in `shuffle` groups."""
        channels = (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones, channels)
        bias = parameter(self, "bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        bounds, rest = _clipping(self.activation)
        convolution = isinstance(x, ops.Convolution)
        if not train:
            gain = scale * lax.rsqrt(var.value + self.epsilon)
            shift = bias - mean.value * gain
            if convolution:
                return rest(ops.conv_affine(x, gain, shift, bounds=bounds, shuffle=shuffle))
            return ACTIVATIONS[self.activation]((x * gain + shift).astype(x.dtype))
        axis_name = None if self.is_initializing() else self.axis_name  # need not exist during initialisation
        batch_norm = partial(ops.conv_batch_norm, shuffle=shuffle) if convolution else ops.batch_norm
        y, batch_mean, batch_var = batch_norm(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            bounds=bounds,
            axis_name=axis_name,
        )
        if not self.is_initializing():
            n = math.prod(x.shape[:-1]) * (lax.axis_size(axis_name) if axis_name else 1)
            if n < 2:
                raise UserError(f"BatchNorm in training needs more than 1 value per channel, got x {x.shape}")
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * batch_var * (n / (n - 1))
        return rest(y)


class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm, activation, channel shuffle; x and the result may be lazy."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | str = "torch"
    feature_group_count: int = 1
    activation: str = "relu"
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = jnp.float32
    shuffle: int = 1  # groups of the channel shuffle

    @nn.compact
    def __call__(self, x, train: bool):
        x = Conv(
            self.features,
            self.kernel_size,
            self.strides,
            self.padding,
            self.feature_group_count,
            use_bias=False,
            dtype=self.dtype,
            name="conv",
        )(x, compute=False)
        batch_norm = BatchNorm(self.momentum, self.epsilon, self.axis_name, self.activation, name="bn")
        return batch_norm(x, train, self.shuffle)


def max_pool(x, window: int = 3, strides: int = 2, padding: int = 0, ceil_mode: bool = False):
    """PyTorch's `max_pool2d` on `(N, H, W, C)`, `ceil_mode` included.

    Raises ValueError if the image is too small for one window.
    """
    pads = [_pool_padding(side, window, strides, padding, ceil_mode) for side in x.shape[1:3]]
    return ops.max_pool(x, window, strides=strides, padding=pads)


def avg_pool(x, window: int = 3, strides: int = 2, padding: int = 0):
    """PyTorch's `avg_pool2d` with its default `count_include_pad=True`; raises as `max_pool` does."""
    pads = [_pool_padding(side, window, strides, padding, ceil_mode=False) for side in x.shape[1:3]]
    return ops.avg_pool(x, window, strides=strides, padding=pads)


def _pool_padding(side, window, strides, padding, ceil_mode):
    span = side + 2 * padding - window
    out = (span + strides - 1 if ceil_mode else span) // strides + 1
    # A last, partial window counts only if it starts inside the image or its left padding.
    if ceil_mode and (out - 1) * strides >= side + padding:
        out -= 1
    if out < 1:
        raise UserError(f"the images are too small: a {window}x{window} pooling meets a map with a side of {side}")
    return padding, max(padding, (out - 1) * strides + window - side - padding)


def adaptive_avg_pool(x, side: int):
    """PyTorch's `adaptive_avg_pool2d` to `(N, side, side, C)`, of x's dtype; identity on a map of that size."""
    x = jnp.asarray(x)
    if x.shape[1:3] == (side, side):
        return x
    # In at least float32: 1 / 3 is too inexact in bfloat16.
    values = upcast(x)
    rows, columns = (_bins(size, side).astype(values.dtype) for size in x.shape[1:3])
    return jnp.einsum("nhwc,ah,bw->nabc", values, rows, columns).astype(x.dtype)


def _bins(size, count):
    """The `(count, size)` matrix of means over PyTorch's adaptive bins, which overlap if count does not divide size."""
    i, bin_index = np.arange(size), np.arange(count)[:, None]
    inside = (i >= bin_index * size // count) & (i < -(-(bin_index + 1) * size // count))
    return inside / inside.sum(1, keepdims=True)


def drop_path(x, rate: float, train: bool):
    """Stochastic depth (1603.09382): zeroes the branch `x` of whole images, scales that of others by 1 / (1 - rate)."""
    if not train or not rate:
        return x
    return nn.Dropout(rate, broadcast_dims=(1, 2, 3), deterministic=False)(jnp.asarray(x))


def add(x, branch, activation: str = "identity"):
    """The sum of a block's input and its branch's output, activated."""
    bounds, rest = _clipping(activation)
    return rest(ops.add(x, branch, bounds=bounds))


def global_mean(x):
    """Mean over height and width in float32: `(N, H, W, C) -> (N, C)`."""
    return jnp.asarray(x).mean((1, 2), dtype=jnp.float32)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (1709.01507): every channel scaled by a gate computed from the global means.

    `ratio` is the reduction of the squeeze, 16 in the paper, or its inverse.
    """

    ratio: float

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        squeezed = max(1, round(channels * min(self.ratio, 1 / self.ratio)))
        gate = nn.relu(nn.Dense(squeezed, name="reduce")(global_mean(x)))
        gate = nn.sigmoid(nn.Dense(channels, name="expand")(gate))
        return x * gate[:, None, None, :].astype(x.dtype)
