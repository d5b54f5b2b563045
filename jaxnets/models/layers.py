"""The layers that the nets share, with PyTorch's padding, pooling and BatchNorm conventions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxnets import ops

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
# Activations that only clip: BatchNorm applies them in its own pass and recomputes them in its gradient.
CLIP_BOUNDS = {"identity": ops.UNBOUNDED, "relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}

dense_init = nn.initializers.normal(0.01)  # torchvision's for the classifiers of light nets


def conv_init(feature_group_count: int):
    """He normal over the fan-out of one output group, so that a depthwise kernel starts with unit gain."""
    return nn.initializers.variance_scaling(2.0 * feature_group_count, "fan_out", "normal")


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round to a multiple of `divisor`, never below 90 % of `value` (1801.04381, the authors' channel rule)."""
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
    """2-D convolution padded as PyTorch pads, `(k - 1) / 2` on every side, unless `padding` says otherwise."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        k, groups = self.kernel_size, self.feature_group_count
        if x.shape[-1] % groups or self.features % groups:
            raise ValueError(
                f"feature_group_count={groups} must divide both the {x.shape[-1]} input "
                f"and the {self.features} output channels"
            )
        kernel = self.param("kernel", conv_init(groups), (k, k, x.shape[-1] // groups, self.features))
        pad = (k - 1) // 2 if self.padding is None else self.padding
        y = ops.conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            strides=(self.strides, self.strides),
            padding=((pad, pad), (pad, pad)) if isinstance(pad, int) else pad,
            feature_group_count=groups,
        )
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


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
                raise ValueError(f"BatchNorm in training needs more than 1 value per channel, got x {x.shape}")
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * batch_var * (n / (n - 1))
        return y if bounds else act(y)


class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm, activation."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None
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

    Raises ValueError where the window is larger than the padded image.
    """
    pads = [_pool_padding(size, window, strides, padding, ceil_mode) for size in x.shape[1:3]]
    return nn.max_pool(x, (window, window), (strides, strides), pads)


def avg_pool(x, window: int = 3, strides: int = 2, padding: int = 0):
    """PyTorch's `avg_pool2d` with its default `count_include_pad=True`."""
    pads = [_pool_padding(size, window, strides, padding, ceil_mode=False) for size in x.shape[1:3]]
    return nn.avg_pool(x, (window, window), (strides, strides), pads)


def _pool_padding(size, window, strides, padding, ceil_mode):
    span = size + 2 * padding - window
    if span < 0:
        raise ValueError(f"an image side of {size} is too small here for a {window}x{window} pooling window")
    out = span // strides + 1
    # With ceil_mode a last, partial window is added if it starts inside the image or its left padding.
    if ceil_mode and span % strides and out * strides < size + padding:
        out += 1
    return padding, max(padding, (out - 1) * strides + window - size - padding)


def global_mean(x):
    """Mean over height and width in float32: `(N, H, W, C) -> (N, C)`."""
    return x.mean((1, 2), dtype=jnp.float32)


class Net(nn.Module):
    """What all nets have in common: the fields, the stem checks and the classifier."""

    num_classes: int = 1000  # 0: the features before the classifier
    width: float = 1.0
    dropout: float = 0.0
    activation: str = "relu"
    dtype: Any = jnp.float32  # of the computation; parameters, statistics and logits are float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    bn_axis_name: str | None = None  # devices to share BatchNorm statistics over
    features_only: bool = False

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

    def prepare(self, images):
        """Cast `(N, H, W, 3)` images to the compute dtype; ValueError for any other shape."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must have the shape (N, H, W, 3), not {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be normalised floats, not {images.dtype}")
        return images.astype(self.dtype)

    def classify(self, x, train: bool):
        """Global average, dropout and the float32 linear classifier (left out for `num_classes=0`)."""
        x = global_mean(x)
        if not self.num_classes:
            return x
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=dense_init, name="classifier")(x)
