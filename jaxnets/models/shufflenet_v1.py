"""ShuffleNet: An Extremely Efficient CNN for Mobile Devices (arXiv 1707.01083)."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxnets import ops
from jaxnets.models.layers import ConvBN, add, avg_pool, drop_path, make_divisible, max_pool
from jaxnets.models.net import FeatureMap, ResidualNet, last_of_each_stride, require, require_choice

# Table 1: output channels of stage 2, by the number of groups; they double in stages 3 and 4
STAGE2_FEATURES = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
STEM_FEATURES = 24
REPEATS = (4, 8, 4)


class Variant(NamedTuple):
    """Where the code bases differ from the paper."""

    stem_kernel: int = 3
    narrow: bool = False  # at stride 2, the bottleneck is a quarter of the added channels, not of all
    first_shuffles: bool = True  # the net's first unit shuffles too
    shuffles_late: bool = False  # after the depthwise convolution, and by the inverse permutation
    activates_depthwise: bool = False
    shortcut_last: bool = False  # its channels come last in the concatenation


VARIANTS = {
    "paper": Variant(),
    "megvii": Variant(shuffles_late=True),
    "kuangliu": Variant(1, narrow=True, first_shuffles=False, activates_depthwise=True, shortcut_last=True),
}


def stem_features(width: float, groups: int) -> int:
    """The stem's channels: those of the authors' code at its widths (.5, 1, 1.5, 2), a multiple of `groups`."""
    if width >= 1:
        return STEM_FEATURES * int(width)
    return groups * math.ceil(STEM_FEATURES * width / groups)


class ShuffleUnit(nn.Module):
    """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1 (figure 2b and, with stride 2, 2c)."""

    features: int
    strides: int
    feature_group_count: int
    first: bool  # of the net: its input has too few channels to group
    variant: Variant
    activation: str
    conv_bn: Any = ConvBN
    drop_rate: float = 0.0
    shuffle: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        groups, variant = self.feature_group_count, self.variant
        added = self.features - x.shape[-1] if self.strides == 2 else self.features
        hidden = (added if variant.narrow else self.features) // 4
        shuffles = self.shuffle and (variant.first_shuffles or not self.first)
        shuffle = groups if shuffles and not variant.shuffles_late else 1
        pointwise1 = self.conv_bn(
            hidden, 1, feature_group_count=1 if self.first else groups, shuffle=shuffle, name="pointwise1"
        )
        y = pointwise1(x, train)
        activation = self.activation if variant.activates_depthwise else "identity"
        depthwise = self.conv_bn(
            hidden, 3, self.strides, feature_group_count=hidden, activation=activation, name="depthwise"
        )
        y = depthwise(y, train)
        if shuffles and variant.shuffles_late:
            y = ops.channel_shuffle(y, hidden // groups)
        activation = self.activation if self.strides == 2 else "identity"
        pointwise2 = self.conv_bn(added, 1, feature_group_count=groups, activation=activation, name="pointwise2")
        y = pointwise2(y, train)
        if self.strides == 1:
            return add(x, drop_path(y, self.drop_rate, train), self.activation)
        pooled = avg_pool(x, 3, 2, padding=1)
        return jnp.concatenate((y, pooled) if variant.shortcut_last else (pooled, y), -1)


class ShuffleNetV1(ResidualNet):
    """Table 1 of the paper; `feature_group_count` is its g.

    `stem_stride=1` is the net for 32x32 images, which also omits the max-pool. `variant`: "paper"; "megvii",
    the authors' code, which shuffles after the depthwise convolution and by the inverse permutation; "kuangliu",
    as in pytorch-cifar: a 1x1 stem, an activation after the depthwise convolution, the shortcut's channels last
    and, in the stride-2 units, a bottleneck of a quarter of the channels that they add. `shuffle=False` omits the
    channel shuffle, the ablation of table 3.
    """

    feature_group_count: int = 3
    stem_stride: int = 2
    variant: str = "paper"
    shuffle: bool = True

    def __post_init__(self):
        require_choice(self, "feature_group_count", STAGE2_FEATURES)
        require_choice(self, "stem_stride", (1, 2))
        require_choice(self, "variant", VARIANTS)
        require(self, "shuffle", isinstance(self.shuffle, bool), "True or False")
        super().__post_init__()
        if VARIANTS[self.variant].narrow:
            groups = self.feature_group_count
            added = self.stage2_features - stem_features(self.width, groups)
            divides = added % groups == added // 4 % groups == 0
            require(
                self, "variant", divides, f"paper or megvii: its first bottleneck cannot have {groups} equal groups"
            )

    @property
    def stage2_features(self) -> int:
        """Channels of stage 2; a quarter of them, the bottleneck, is a multiple of the groups."""
        groups = self.feature_group_count
        return make_divisible(STAGE2_FEATURES[groups] * self.width, 4 * groups)

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = self.prepare(images)
        groups, stride, variant = self.feature_group_count, self.stem_stride, VARIANTS[self.variant]
        x = self.conv_bn(stem_features(self.width, groups), variant.stem_kernel, stride, name="stem")(x, train)
        maps = [FeatureMap(x, stride)]
        if stride == 2:
            x = max_pool(x, 3, 2, padding=1)
            stride *= 2
            maps.append(FeatureMap(x, stride))
        features = self.stage2_features
        drop_rates = iter(self.drop_rates(sum(REPEATS)))
        for stage, repeats in enumerate(REPEATS, start=2):
            for i in range(repeats):
                unit = ShuffleUnit(
                    features,
                    strides=2 if i == 0 else 1,
                    feature_group_count=groups,
                    first=stage == 2 and i == 0,
                    variant=variant,
                    activation=self.activation,
                    conv_bn=self.conv_bn,
                    drop_rate=next(drop_rates),
                    shuffle=self.shuffle,
                    name=f"stage{stage}_block{i}",
                )
                x = unit(x, train)
            features *= 2
            stride *= 2
            maps.append(FeatureMap(x, stride))
        return last_of_each_stride(maps) if self.features_only else self.classify(x, train)
