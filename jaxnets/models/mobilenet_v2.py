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
    """Expand 1x1, depthwise 3x3, project 1x1 without activation (table 1); returns the output and the expansion.

    `before` is the previous block's expansion, for shortcuts between expansions.
    """

    features: int
    expansion: int
    strides: int
    shortcut: str
    conv_bn: Any = ConvBN
    drop_rate: float = 0.0
    bottleneck: str = "linear"

    @nn.compact
    def __call__(self, x, train: bool, before=None):
        channels = x.shape[-1]
        hidden = channels * self.expansion
        project = self.conv_bn if self.bottleneck == "nonlinear" else partial(self.conv_bn, activation="identity")
        y = x
        # kuangliu's CIFAR net (projection shortcuts) expands the first block too, by 1.
        if self.expansion != 1 or self.shortcut == "projection":
            y = self.conv_bn(hidden, 1, name="expand")(y, train)
        if self.shortcut == "expansions" and before is not None and before.shape == y.shape:
            y = add(before, drop_path(y, self.drop_rate, train))
        expanded = y
        y = self.conv_bn(hidden, 3, self.strides, feature_group_count=hidden, name="depthwise")(y, train)
        y = project(self.features, 1, name="project")(y, train)
        if self.strides != 1 or self.shortcut in ("expansions", "none"):
            return y, expanded
        if channels == self.features:
            y = add(x, drop_path(y, self.drop_rate, train))
        elif self.shortcut == "projection":
            y = drop_path(y, self.drop_rate, train)
            y = add(self.conv_bn(self.features, 1, activation="identity", name="shortcut")(x, train), y)
        return y, expanded


class MobileNetV2(ResidualNet):
    """Table 2 of the paper.

    `shortcut`: "identity" as there, or "projection", the 1x1 convolution of kuangliu's pytorch-cifar. The ablations of
    figure 6 are "expansions", which adds the previous block's expansion where the shapes match, "none", and
    `bottleneck="nonlinear"`, which puts an activation after the projection too.
    Keras's weights need `padding="same"` and `bn_epsilon=1e-3`.
    """

    dropout: float = 0.2
    activation: str = "relu6"
    stem_stride: int = 2
    stage_strides: Sequence[int] = tuple(s for _, _, _, s in TABLE)
    shortcut: str = "identity"
    bottleneck: str = "linear"
    padding: str = "torch"

    def __post_init__(self):
        require_choice(self, "stem_stride", (1, 2))
        require_strides(self, "stage_strides", len(TABLE))
        require_choice(self, "shortcut", ("identity", "projection", "expansions", "none"))
        require_choice(self, "bottleneck", ("linear", "nonlinear"))
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
        maps, expanded = [], None
        for stage, ((t, c, n, _), s) in enumerate(zip(TABLE, self.stage_strides)):
            for i in range(n):
                block = InvertedResidual(
                    features=make_divisible(c * self.width),
                    expansion=t,
                    strides=s if i == 0 else 1,
                    shortcut=self.shortcut,
                    conv_bn=self.conv_bn,
                    drop_rate=next(drop_rates),
                    bottleneck=self.bottleneck,
                    name=f"stage{stage}_block{i}",
                )
                x, expanded = block(x, train, expanded)
            stride *= s
            maps.append(FeatureMap(x, stride))
        # Section 4, trade-off hyper parameters: the last layer is never narrowed.
        x = self.conv_bn(make_divisible(1280 * max(1.0, self.width)), 1, name="head")(x, train)
        if self.features_only:
            return last_of_each_stride(maps + [FeatureMap(x, stride)])
        return self.classify(x, train)
