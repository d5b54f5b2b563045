"""VGG: Very Deep Convolutional Networks for Large-Scale Image Recognition (arXiv 1409.1556)."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from jaxnets.models.initializers import dense_init
from jaxnets.models.layers import ACTIVATIONS, adaptive_avg_pool, make_divisible, max_pool
from jaxnets.models.net import FeatureMap, Net, last_of_each_stride, require, require_choice, require_features

# Table 1: channels and, by depth (columns D and E), number of the 3x3 convolutions before each max-pool
FEATURES = (64, 128, 256, 512, 512)
REPEATS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(Net):
    """Table 1 of the paper, columns D and E.

    `hidden_features`: the fully connected layers before the classifier, on a `pool_size` x `pool_size` map.
    `batch_norm` puts a BatchNorm between each convolution and its ReLU, instead of a bias.
    """

    dropout: float = 0.5
    depth: int = 16
    batch_norm: bool = False
    hidden_features: Sequence[int] = (4096, 4096)
    pool_size: int = 7

    def __post_init__(self):
        require_choice(self, "depth", REPEATS)
        require(self, "batch_norm", isinstance(self.batch_norm, bool), "True or False")
        require_features(self, "hidden_features")
        require_choice(self, "pool_size", range(1, 8))
        super().__post_init__()

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = self.prepare(images)
        conv = self.conv_bn if self.batch_norm else self.conv
        stride, maps = 1, []
        for stage, (features, repeats) in enumerate(zip(FEATURES, REPEATS[self.depth]), start=1):
            for i in range(repeats):
                x = conv(make_divisible(features * self.width), 3, name=f"stage{stage}_conv{i}")(x, train)
            maps.append(FeatureMap(x, stride))
            x = max_pool(x, 2, 2)
            stride *= 2
        if self.features_only:
            return last_of_each_stride([*maps, FeatureMap(x, stride)])
        return self.classify(x, train)

    def classify(self, x, train: bool):
        """The fully connected layers, in the compute dtype, and the float32 classifier."""
        x = adaptive_avg_pool(x, self.pool_size)
        # Channels first, the order of PyTorch's weights.
        x = jnp.moveaxis(x, -1, 1).reshape(len(x), math.prod(x.shape[1:]))
        for i, features in enumerate(self.hidden_features):
            if i:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            features = make_divisible(features * self.width)
            x = nn.Dense(features, dtype=self.dtype, kernel_init=dense_init, name=f"hidden{i}")(x)
            x = ACTIVATIONS[self.activation](x)
        return self.head(x.astype(jnp.float32), train)
