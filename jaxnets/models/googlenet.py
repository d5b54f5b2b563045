"""GoogLeNet: Going Deeper with Convolutions (arXiv 1409.4842), with BatchNorm and without auxiliary classifiers."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxnets.models.layers import ConvBN, make_divisible, max_pool
from jaxnets.models.net import FeatureMap, Net, last_of_each_stride, require_choice

# Table 1, by stage: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj
TABLE = {
    3: ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    4: (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    5: ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
}


class Inception(nn.Module):
    """Four branches side by side (figure 2b)."""

    features: tuple[int, int, int, int, int, int]
    large_kernel: int
    conv_bn: Any = ConvBN

    @nn.compact
    def __call__(self, x, train: bool):
        single, reduce_small, small, reduce_large, large, pooled = self.features
        y1 = self.conv_bn(single, 1, name="conv1x1")(x, train)
        y2 = self.conv_bn(reduce_small, 1, name="reduce3x3")(x, train)
        y2 = self.conv_bn(small, 3, name="conv3x3")(y2, train)
        y3 = self.conv_bn(reduce_large, 1, name="reduce_large")(x, train)
        y3 = self.conv_bn(large, self.large_kernel, name="conv_large")(y3, train)
        y4 = self.conv_bn(pooled, 1, name="pool_project")(max_pool(x, 3, 1, padding=1), train)
        return jnp.concatenate((y1, y2, y3, y4), -1)


class GoogLeNet(Net):
    """Table 1 of the paper as torchvision has it: `large_kernel` is 3 there and 5 in the paper."""

    dropout: float = 0.2
    bn_epsilon: float = 1e-3
    large_kernel: int = 3

    def __post_init__(self):
        require_choice(self, "large_kernel", (3, 5))
        super().__post_init__()

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = self.prepare(images)
        x = self.conv_bn(make_divisible(64 * self.width), 7, 2, name="stem1")(x, train)
        maps = [FeatureMap(x, 2)]
        x = max_pool(x, 3, 2, ceil_mode=True)
        x = self.conv_bn(make_divisible(64 * self.width), 1, name="stem2")(x, train)
        x = self.conv_bn(make_divisible(192 * self.width), 3, name="stem3")(x, train)
        maps.append(FeatureMap(x, 4))
        for stage, rows in TABLE.items():
            x = max_pool(x, 2 if stage == 5 else 3, 2, ceil_mode=True)
            for i, row in enumerate(rows):
                features = tuple(make_divisible(c * self.width) for c in row)
                x = Inception(features, self.large_kernel, self.conv_bn, name=f"stage{stage}_block{i}")(x, train)
            maps.append(FeatureMap(x, 2**stage))
        return last_of_each_stride(maps) if self.features_only else self.classify(x, train)
