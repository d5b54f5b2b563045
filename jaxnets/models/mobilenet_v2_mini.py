"""A small MobileNetV2: the net that tutorials build from inverted residual blocks for 32x32 images."""

from typing import Any

import flax.linen as nn

from jaxnets.models.initializers import dense_init
from jaxnets.models.layers import Conv, drop_path, global_mean, make_divisible, max_pool
from jaxnets.models.net import FeatureMap, ResidualNet, last_of_each_stride

# Output channels of the blocks, at full, half and quarter resolution
STAGES = ((8,), (16, 16), (32,))
STEM_FEATURES = 32
EXPANSION = 6
HIDDEN_FEATURES = 128


class InvertedResidual(nn.Module):
    """Expand 1x1 to 6 times the output, depthwise 3x3, project 1x1; a shortcut in every case, no BatchNorm."""

    features: int
    conv: Any = Conv
    drop_rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        hidden = EXPANSION * self.features
        y = self.conv(hidden, 1, name="expand")(x)
        y = self.conv(hidden, 3, feature_group_count=hidden, name="depthwise")(y)
        y = self.conv(self.features, 1, activation="identity", name="project")(y)
        y = drop_path(y, self.drop_rate, train)
        if x.shape[-1] != self.features:
            x = self.conv(self.features, 1, activation="identity", name="shortcut")(x)
        return x + y


class MobileNetV2Mini(ResidualNet):
    """Stem, four blocks with two max-pools between them, global average, one hidden layer, classifier."""

    num_classes: int = 10
    activation: str = "relu6"

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = self.prepare(images)
        x = self.conv(make_divisible(STEM_FEATURES * self.width), 3, name="stem")(x)
        drop_rates = iter(self.drop_rates(sum(map(len, STAGES))))
        stride, maps = 1, []
        for stage, blocks in enumerate(STAGES):
            if stage:
                x = max_pool(x, 2, 2)
                stride *= 2
            for i, c in enumerate(blocks):
                features = make_divisible(c * self.width)
                name = f"stage{stage}_block{i}"
                x = InvertedResidual(features, self.conv, next(drop_rates), name=name)(x, train)
            maps.append(FeatureMap(x, stride))
        return last_of_each_stride(maps) if self.features_only else self.classify(x, train)

    def classify(self, x, train: bool):
        """Global average, one hidden layer with ReLU, and the classifier."""
        hidden = nn.Dense(make_divisible(HIDDEN_FEATURES * self.width), kernel_init=dense_init, name="hidden")
        return self.head(nn.relu(hidden(global_mean(x))), train)
