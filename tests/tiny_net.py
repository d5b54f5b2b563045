"""A net of two convolutions: statistics, depthwise kernels, dropout, and nothing that takes long to compile."""

import flax.linen as nn

from jaxnets.models.net import Net


class TinyNet(Net):
    """A strided and a depthwise convolution with BatchNorm, and the classifier."""

    @nn.compact
    def __call__(self, images, train=False):
        x = self.conv_bn(8, 3, 2)(self.prepare(images), train)
        x = self.conv_bn(8, 3, feature_group_count=8)(x, train)
        return self.classify(x, train)
