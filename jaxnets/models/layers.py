"""The layers that the nets share, with PyTorch's padding, pooling and BatchNorm conventions."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxnets import ops
from jaxnets.errors import UserError

ACTIVATIONS: dict[str, Callable] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "selu": nn.selu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "hard_swish": nn.hard_swish,
    "tanh": nn.tanh,
    "identity": lambda x: x,
}
PADDINGS = ("torch", "same")
# Activations that only clip: BatchNorm applies them in its own pass and recomputes them in its gradient.
CLIP_BOUNDS = {"identity": ops.UNBOUNDED, "relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}

dense_init = nn.initializers.normal(0.01)  # torchvision's for the classifiers of light nets


def conv_init(feature_group_count: int):
    """He normal over the fan-out of one output group, so that a depthwise kernel starts with unit gain."""
    return nn.initializers.variance_scaling(2.0 * feature_group_count, "fan_out", "normal")


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round to a multiple of `divisor`, never below 90 % of `value` (1801.04381's channel rule)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


@flax.struct.dataclass
class FeatureMap:
    """An intermediate activation `(N, H, W, C)` and its stride: input pixels a step."""

    array: jax.Array
    stride: int = flax.struct.field(pytree_node=False)


def last_of_each_stride(maps: list[FeatureMap]) -> list[FeatureMap]:
    """The deepest map at every resolution, from fine to coarse."""
    return [a for a, b in zip(maps, maps[1:] + [None]) if b is None or a.stride != b.stride]


class Conv(nn.Module):
    """2-D convolution with bias and activation.

    `padding`: pixels on every side, or "torch", the `(k - 1) / 2` that PyTorch's nets use, or "same",
    TensorFlow's, which leaves out the first row and column where a stride of 2 meets an even side.
    `train` has no effect: it makes `Conv` a stand-in for `ConvBN`.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | str = "torch"
    feature_group_count: int = 1
    activation: str = "identity"
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        k, groups = self.kernel_size, self.feature_group_count
        if x.shape[-1] % groups or self.features % groups:
            raise UserError(
                f"feature_group_count={groups} must divide both the {x.shape[-1]} input "
                f"and the {self.features} output channels"
            )
        kernel = self.param("kernel", conv_init(groups), (k, k, x.shape[-1] // groups, self.features))
        y = ops.conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            strides=(self.strides, self.strides),
            padding=_conv_padding(x.shape[1:3], k, self.strides, self.padding),
            feature_group_count=groups,
        )
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return ACTIVATIONS[self.activation](y)


def _conv_padding(sides, kernel_size, strides, padding):
    if padding == "same":
        pads = lax.padtype_to_pads(sides, (kernel_size,) * 2, (strides,) * 2, "SAME")
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
    def __call__(self, x, train: bool):
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        act = ACTIVATIONS[self.activation]
        if not train:
            gain = scale * lax.rsqrt(var.value + self.epsilon)
            return act((x * gain + (bias - mean.value * gain)).astype(x.dtype))
        bounds = CLIP_BOUNDS.get(self.activation)
        y, batch_mean, batch_var = ops.batch_norm(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            bounds=bounds or ops.UNBOUNDED,
            axis_name=self.axis_name,
        )
        if not self.is_initializing():
            n = x.size // x.shape[-1] * (lax.axis_size(self.axis_name) if self.axis_name else 1)
            if n < 2:
                raise UserError(f"BatchNorm in training needs more than 1 value per channel, got x {x.shape}")
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * batch_var * (n / (n - 1))
        return y if bounds else act(y)


class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm, activation."""

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
        )(x)
        return BatchNorm(self.momentum, self.epsilon, self.axis_name, self.activation, name="bn")(x, train)


def max_pool(x, window: int = 3, strides: int = 2, padding: int = 0, ceil_mode: bool = False):
    """PyTorch's `max_pool2d` on `(N, H, W, C)`, `ceil_mode` included.

    Raises ValueError where the image is too small for one window.
    """
    pads = [_pool_padding(side, window, strides, padding, ceil_mode) for side in x.shape[1:3]]
    return nn.max_pool(x, (window, window), (strides, strides), pads)


def avg_pool(x, window: int = 3, strides: int = 2, padding: int = 0):
    """PyTorch's `avg_pool2d` with its default `count_include_pad=True`; raises as `max_pool`."""
    pads = [_pool_padding(side, window, strides, padding, ceil_mode=False) for side in x.shape[1:3]]
    return nn.avg_pool(x, (window, window), (strides, strides), pads)


def _pool_padding(side, window, strides, padding, ceil_mode):
    span = side + 2 * padding - window
    out = (span + strides - 1 if ceil_mode else span) // strides + 1
    # A last, partial window counts only if it starts inside the image or its left padding.
    if ceil_mode and (out - 1) * strides >= side + padding:
        out -= 1
    if out < 1:
        raise UserError(f"the images are too small: a {window}x{window} pooling meets a map with a side of {side}")
    return padding, max(padding, (out - 1) * strides + window - side - padding)


def drop_path(x, rate: float, train: bool):
    """Stochastic depth (1603.09382): the residual branch `x` of whole images becomes 0, the rest grows."""
    return nn.Dropout(rate, broadcast_dims=(1, 2, 3), deterministic=not train)(x)


def global_mean(x):
    """Mean over height and width in float32: `(N, H, W, C) -> (N, C)`."""
    return x.mean((1, 2), dtype=jnp.float32)


def require(net: nn.Module, field: str, ok: bool, allowed: str):
    """Raise `UserError` naming the net, its field and what is allowed there, unless `ok`."""
    if not ok:
        raise UserError(f"{type(net).__name__}: {field}={getattr(net, field)!r} must be {allowed}")


def require_choice(net: nn.Module, field: str, choices: Collection):
    """`require` one of `choices`."""
    value = getattr(net, field)
    listed = ", ".join(map(repr, choices))
    require(net, field, isinstance(value, (str, Integral)) and value in choices, f"one of {listed}")


def require_number(net: nn.Module, field: str, low: float, high: float = math.inf, *, above: bool = False):
    """`require` `low <= value < high`, or `low < value < high` with `above`."""
    value = getattr(net, field)
    number = isinstance(value, Real) and not isinstance(value, bool)
    ok = number and (low < value if above else low <= value) and value < high
    bound = f"above {low}" if above else f"at least {low}"
    require(net, field, ok, f"a number {bound}" + (f" and below {high}" if high < math.inf else ""))


def require_strides(net: nn.Module, field: str, count: int):
    """`require` a sequence of `count` strides, each 1 or 2; the field becomes a tuple."""
    value = getattr(net, field)
    ok = isinstance(value, Sequence) and len(value) == count and all(s in (1, 2) for s in value)
    require(net, field, ok, f"{count} strides, each 1 or 2")
    setattr(net, field, tuple(map(int, value)))  # hashable, whatever the configuration file had


def require_features(net: nn.Module, field: str, count: int | None = None, multiple_of: int = 1):
    """`require` a sequence of channel counts (`count` of them, if given); the field becomes a tuple."""
    value = getattr(net, field)
    ok = isinstance(value, Sequence) and count in (None, len(value))
    ok = ok and all(isinstance(v, Integral) and v > 0 and v % multiple_of == 0 for v in value)
    what = "channel counts" if multiple_of == 1 else f"channel counts that {multiple_of} divides"
    require(net, field, ok, what if count is None else f"{count} {what}")
    setattr(net, field, tuple(map(int, value)))


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (1709.01507): every channel scaled by a gate on the global means.

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


class Net(nn.Module):
    """What all nets have in common: the fields and their checks, the stem checks and the classifier."""

    num_classes: int = 1000  # 0: the features before the classifier
    width: float = 1.0
    dropout: float = 0.0
    activation: str = "relu"
    dtype: Any = jnp.float32  # of the computation; parameters, statistics and logits are float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    bn_axis_name: str | None = None  # devices to share BatchNorm statistics over
    features_only: bool = False

    def __post_init__(self):
        count = isinstance(self.num_classes, Integral) and not isinstance(self.num_classes, bool)
        require(self, "num_classes", count and self.num_classes >= 0, "a whole number, 0 or more")
        require_number(self, "width", 0, above=True)
        require_number(self, "dropout", 0, 1)
        require_choice(self, "activation", ACTIVATIONS)
        require(self, "dtype", _is_float(self.dtype), "a floating type: float32, bfloat16 or float16")
        require_number(self, "bn_momentum", 0, 1)
        require_number(self, "bn_epsilon", 0, above=True)
        require(self, "features_only", isinstance(self.features_only, bool), "True or False")
        super().__post_init__()

    @property
    def conv_bn(self):
        """`ConvBN` with this net's activation, dtype and BatchNorm settings."""
        return partial(
            ConvBN,
            activation=self.activation,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            axis_name=self.bn_axis_name,
            dtype=self.dtype,
        )

    @property
    def conv(self):
        """`Conv` with this net's activation and dtype."""
        return partial(Conv, activation=self.activation, dtype=self.dtype)

    def prepare(self, images):
        """Cast `(N, H, W, 3)` images to the compute dtype; ValueError for any other shape."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(f"images must have the shape (N, H, W, 3), not {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"images must be normalised floats, not {images.dtype}")
        return images.astype(self.dtype)

    def classify(self, x, train: bool):
        """Global average, dropout and the float32 linear classifier (left out for `num_classes=0`)."""
        x = global_mean(x)
        if not self.num_classes:
            return x
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=dense_init, name="classifier")(x)


class ResidualNet(Net):
    """A `Net` with residual blocks, which stochastic depth can drop."""

    stochastic_depth: float = 0.0  # probability of dropping the last residual branch; linear in depth

    def __post_init__(self):
        require_number(self, "stochastic_depth", 0, 1)
        super().__post_init__()

    def drop_rates(self, blocks: int) -> list[float]:
        """The linear decay rule of 1603.09382, section 3: block l of L drops with probability l / L p."""
        return [self.stochastic_depth * (i + 1) / blocks for i in range(blocks)]


def _is_float(dtype) -> bool:
    try:
        return dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False
