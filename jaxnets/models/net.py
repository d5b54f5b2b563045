"""What the nets share: fields and their checks, feature maps, preparing images, classifying."""

import math
from collections.abc import Collection, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxnets.errors import UserError
from jaxnets.models.initializers import dense_init
from jaxnets.models.layers import ACTIVATIONS, Conv, ConvBN, global_mean


@flax.struct.dataclass
class FeatureMap:
    """An intermediate activation `(N, H, W, C)` and its stride: input pixels per step."""

    array: jax.Array
    stride: int = flax.struct.field(pytree_node=False)


def last_of_each_stride(maps: list[FeatureMap]) -> list[FeatureMap]:
    """The deepest map at every resolution, from fine to coarse."""
    last = [a for a, b in zip(maps, maps[1:] + [None]) if b is None or a.stride != b.stride]
    return [FeatureMap(jnp.asarray(a.array), a.stride) for a in last]


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


class Net(nn.Module):
    """What all nets have in common: fields, checks of fields and images, classifier."""

    num_classes: int = 1000  # 0: the features before the classifier
    width: float = 1.0
    dropout: float = 0.0
    activation: str = "relu"
    dtype: Any = jnp.float32  # of the computation; parameters, statistics and logits are float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    bn_axis_name: str | None = None  # of the devices to share BatchNorm statistics over
    features_only: bool = False

    def __post_init__(self):
        count = isinstance(self.num_classes, Integral) and not isinstance(self.num_classes, bool)
        require(self, "num_classes", count and self.num_classes >= 0, "a whole number, 0 or more")
        require_number(self, "width", 0, 100, above=True)
        require_number(self, "dropout", 0, 1)
        require_choice(self, "activation", ACTIVATIONS)
        require(self, "dtype", _is_float(self.dtype), "a floating type: float32, bfloat16 or float16")
        require_number(self, "bn_momentum", 0, 1)
        require_number(self, "bn_epsilon", 0, above=True)
        axis = self.bn_axis_name
        require(self, "bn_axis_name", axis is None or isinstance(axis, str), "the name of an axis, or None")
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
        """Cast `(N, H, W, 3)` float images to the compute dtype; ValueError for any other shape or type."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(f"images must have the shape (N, H, W, 3), not {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"images must be normalised floats, not {images.dtype}")
        return images.astype(self.dtype)

    def classify(self, x, train: bool):
        """Global average and `head`."""
        return self.head(global_mean(x), train)

    def head(self, x, train: bool):
        """Dropout and the float32 linear classifier of `(N, C)` features; omitted for `num_classes=0`."""
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
        """The linear decay rule of 1603.09382, section 3: block l of L drops with probability (l / L) p."""
        return [self.stochastic_depth * (i + 1) / blocks for i in range(blocks)]


def _is_float(dtype) -> bool:
    wide = [jnp.float64] if jax.config.jax_enable_x64 else []
    try:
        return dtype is not None and jnp.dtype(dtype) in [jnp.float32, jnp.bfloat16, jnp.float16, *wide]
    except (TypeError, ValueError):  # the latter for '32-bit', which NumPy reads as a structured type
        return False
