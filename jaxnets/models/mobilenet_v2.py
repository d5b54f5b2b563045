"""MobileNetV2: Inverted Residuals and Linear Bottlenecks (arXiv 1801.04381)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn

from jaxnets.models.layers import PADDINGS, ConvBN, add, drop_path, make_divisible
from jaxnets.models.net import FeatureMap, ResidualNet, last_of_each_stride, require_choice, require_strides

# Table 2: expansion t, output channels c, repetitions n, stride s of the first repetition
TABLE = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
CIFAR_STAGE_STRIDES = (1, 1, 2, 2, 1, 2, 1)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 without activation (table 1)."""

    features: int
    expansion: int
    strides: int
    shortcut: str
    conv_bn: Any = ConvBN
    drop_rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        channels = x.shape[-1]
        hidden = channels * self.expansion
        y = x
        # The common CIFAR net (projection shortcuts) expands the first block too, by 1.
        if self.expansion != 1 or self.shortcut == "projection":
            y = self.conv_bn(hidden, 1, name="expand")(y, train)
        y = self.conv_bn(hidden, 3, self.strides, feature_group_count=hidden, name="depthwise")(y, train)
        y = self.conv_bn(self.features, 1, activation="identity", name="project")(y, train)
        if self.strides != 1:
            return y
        if channels == self.features:
            return add(x, drop_path(y, self.drop_rate, train))
        if self.shortcut == "projection":
            y = drop_path(y, self.drop_rate, train)
            return add(self.conv_bn(self.features, 1, activation="identity", name="shortcut")(x, train), y)
        return y


class MobileNetV2(ResidualNet):
    """Table 2 of the paper.

    `shortcut`: "identity" as there, or "projection", the 1x1 convolution of the common CIFAR net.
    Keras's weights want `padding="same"` and `bn_epsilon=1e-3`.
    """

    dropout: float = 0.2
    activation: str = "relu6"
    stem_stride: int = 2
    stage_strides: Sequence[int] = tuple(s for _, _, _, s in TABLE)
    shortcut: str = "identity"
    padding: str = "torch"

    def __post_init__(self):
        require_choice(self, "stem_stride", (1, 2))
        require_strides(self, "stage_strides", len(TABLE))
        require_choice(self, "shortcut", ("identity", "projection"))
        require_choice(self, "padding", PADDINGS)
        super().__post_init__()

    @property
    def conv_bn(self):
        return partial(super().conv_bn, padding=self.padding)

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = self.prepare(images)
        stride = self.stem_stride
        x = self.conv_bn(make_divisible(32 * self.width), 3, stride, name="stem")(x, train)
        drop_rates = iter(self.drop_rates(sum(n for _, _, n, _ in TABLE)))
        maps = []
        for stage, ((t, c, n, _), s) in enumerate(zip(TABLE, self.stage_strides)):
            for i in range(n):
                block = InvertedResidual(
                    make_divisible(c * self.width),
                    t,
                    s if i == 0 else 1,
                    self.shortcut,
                    self.conv_bn,
                    next(drop_rates),
                    name=f"stage{stage}_block{i}",
                )
                x = block(x, train)
            stride *= s
            maps.append(FeatureMap(x, stride))
        # Section 3.4: the last layer is never narrowed.
        x = self.conv_bn(make_divisible(1280 * max(1.0, self.width)), 1, name="head")(x, train)
        if self.features_only:
            return last_of_each_stride(maps + [FeatureMap(x, stride)])
        return self.classify(x, train)
