"""ResNet: Deep Residual Learning for Image Recognition (arXiv 1512.03385)."""

from typing import Any

import flax.linen as nn

from jaxnets.models.layers import ConvBN, add, drop_path, make_divisible, max_pool
from jaxnets.models.net import FeatureMap, ResidualNet, last_of_each_stride, require_choice

# Table 1: repetitions of the blocks with 64, 128, 256 and 512 channels, by depth
REPEATS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
FIRST_WITH_BOTTLENECK = 50
BOTTLENECK_EXPANSION = 4


class ResidualBlock(nn.Module):
    """Two 3x3 or, with `bottleneck`, 1x1, 3x3, 1x1 (figure 5); a projection shortcut where the shape changes.

    The bottleneck's stride is in its 3x3 (v1.5), as in torchvision; the paper has it in the first 1x1.
    """

    features: int
    strides: int
    bottleneck: bool
    activation: str
    conv_bn: Any = ConvBN
    drop_rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        features = self.features
        if self.bottleneck:
            features *= BOTTLENECK_EXPANSION
            y = self.conv_bn(self.features, 1, name="conv1")(x, train)
            y = self.conv_bn(self.features, 3, self.strides, name="conv2")(y, train)
            y = self.conv_bn(features, 1, activation="identity", name="conv3")(y, train)
        else:
            y = self.conv_bn(features, 3, self.strides, name="conv1")(x, train)
            y = self.conv_bn(features, 3, activation="identity", name="conv2")(y, train)
        y = drop_path(y, self.drop_rate, train)
        if self.strides != 1 or x.shape[-1] != features:
            x = self.conv_bn(features, 1, self.strides, activation="identity", name="shortcut")(x, train)
        return add(x, y, self.activation)


class ResNet(ResidualNet):
    """Table 1 of the paper; `stem_stride=1` is the net for 32x32 images: a 3x3 stem and no max-pool."""

    depth: int = 50
    stem_stride: int = 2

    def __post_init__(self):
        require_choice(self, "depth", REPEATS)
        require_choice(self, "stem_stride", (1, 2))
        super().__post_init__()

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = self.prepare(images)
        stride = self.stem_stride
        features = make_divisible(64 * self.width)
        x = self.conv_bn(features, 7 if stride == 2 else 3, stride, name="stem")(x, train)
        maps = [FeatureMap(x, stride)]
        if stride == 2:
            x = max_pool(x, 3, 2, padding=1)
            stride *= 2
        drop_rates = iter(self.drop_rates(sum(REPEATS[self.depth])))
        for stage, repeats in enumerate(REPEATS[self.depth], start=1):
            for i in range(repeats):
                block = ResidualBlock(
                    features,
                    strides=2 if stage > 1 and i == 0 else 1,
                    bottleneck=self.depth >= FIRST_WITH_BOTTLENECK,
                    activation=self.activation,
                    conv_bn=self.conv_bn,
                    drop_rate=next(drop_rates),
                    name=f"stage{stage}_block{i}",
                )
                x = block(x, train)
            stride *= 2 if stage > 1 else 1
            features *= 2
            maps.append(FeatureMap(x, stride))
        return last_of_each_stride(maps) if self.features_only else self.classify(x, train)
