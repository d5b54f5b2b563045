"""MobileNets: Efficient CNNs for Mobile Vision Applications (arXiv 1704.04861)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn

from jaxnets.models.layers import PADDINGS, ConvBN, make_divisible
from jaxnets.models.net import FeatureMap, Net, last_of_each_stride, require_choice, require_strides

# Table 1 after the stem: output channels c, repetitions n, stride s of the first depthwise convolution.
# The table's stride of 2 in the last layer is a misprint: the map stays at 7x7.
TABLE = (
    (64, 1, 1),
    (128, 2, 2),
    (256, 2, 2),
    (512, 6, 2),
    (1024, 2, 2),
)


class DepthwiseSeparable(nn.Module):
    """Depthwise 3x3, pointwise 1x1 (figure 3)."""

    features: int
    strides: int
    conv_bn: Any = ConvBN

    @nn.compact
    def __call__(self, x, train: bool):
        channels = x.shape[-1]
        x = self.conv_bn(channels, 3, self.strides, feature_group_count=channels, name="depthwise")(x, train)
        return self.conv_bn(self.features, 1, name="pointwise")(x, train)


class MobileNetV1(Net):
    """Table 1 of the paper; `width` is its width multiplier, the image size its resolution multiplier.

    Weights from TensorFlow, Keras and timm need `activation="relu6"`.
    Keras's also need `padding="keras"` and `bn_epsilon=1e-3`.
    """

    stem_stride: int = 2
    stage_strides: Sequence[int] = tuple(s for _, _, s in TABLE)
    padding: str = "torch"

    def __post_init__(self):
        require_choice(self, "stem_stride", (1, 2))
        require_strides(self, "stage_strides", len(TABLE))
        require_choice(self, "padding", (*PADDINGS, "keras"))
        super().__post_init__()

    @property
    def conv_bn(self):
        return partial(super().conv_bn, padding=self.padding)

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = self.prepare(images)
        stride = self.stem_stride
        padding = "same" if self.padding == "keras" else self.padding  # "keras" is for the depthwise layers
        x = self.conv_bn(make_divisible(32 * self.width), 3, stride, padding=padding, name="stem")(x, train)
        maps = []
        for stage, ((c, n, _), s) in enumerate(zip(TABLE, self.stage_strides)):
            for i in range(n):
                features = make_divisible(c * self.width)
                name = f"stage{stage}_block{i}"
                x = DepthwiseSeparable(features, s if i == 0 else 1, self.conv_bn, name=name)(x, train)
            stride *= s
            maps.append(FeatureMap(x, stride))
        return last_of_each_stride(maps) if self.features_only else self.classify(x, train)
