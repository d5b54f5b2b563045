"""ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design (arXiv 1807.11164)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxnets import ops
from jaxnets.models.layers import ConvBN, SqueezeExcite, max_pool
from jaxnets.models.net import (
    FeatureMap,
    Net,
    last_of_each_stride,
    require,
    require_choice,
    require_features,
    require_number,
)

# Table 5: output channels of stage 2 (they double in stages 3 and 4) and of conv5, by width
STAGE2_FEATURES = {0.5: 48, 1.0: 116, 1.5: 176, 2.0: 244}
CONV5_FEATURES = {0.5: 1024, 1.0: 1024, 1.5: 1024, 2.0: 2048}
STEM_FEATURES = 24
REPEATS = (4, 8, 4)


def features_at(width: float) -> tuple[int, int, int, int]:
    """Output channels of stages 2 to 4 and of conv5: table 5, piecewise linear between its widths."""
    scale = max(1.0, width / 2)  # beyond 2, the widest column is scaled up
    stage2 = np.interp(width, (0, *STAGE2_FEATURES), (0, *STAGE2_FEATURES.values())) * scale
    conv5 = np.interp(width, tuple(CONV5_FEATURES), tuple(CONV5_FEATURES.values())) * scale
    stage2 = max(4, 4 * round(stage2 / 4))
    return stage2, 2 * stage2, 4 * stage2, round(conv5)


class ShuffleUnit(nn.Module):
    """Channel split, two branches, concatenation and channel shuffle (figure 3c and, with stride 2, 3d)."""

    features: int
    strides: int
    se_ratio: float
    variant: str
    conv_bn: Any = ConvBN

    @nn.compact
    def __call__(self, x, train: bool):
        left, right = self.split(x)
        half = self.features // 2
        channels = left.shape[-1]
        if self.strides == 2:
            projected = channels if self.variant == "megvii" else half
            left = self.depthwise(channels, "left_depthwise")(left, train)
            left = self.conv_bn(projected, 1, name="left_pointwise")(left, train)
        right = self.conv_bn(half, 1, name="pointwise1")(right, train)
        right = self.depthwise(half, "depthwise")(right, train)
        right = self.conv_bn(self.features - left.shape[-1], 1, name="pointwise2")(right, train)
        if self.se_ratio:
            right = SqueezeExcite(self.se_ratio, name="se")(right)
        if self.variant == "megvii":
            return jnp.concatenate((left, right), -1)
        return ops.concatenate_shuffle(left, right)

    def split(self, x):
        """The inputs of the shortcut and of the branch."""
        if self.strides == 2:
            return x, x
        if self.variant == "megvii":  # shuffles as it splits, not after the concatenation
            return x[..., 0::2], x[..., 1::2]
        return ops.halves(x)

    def depthwise(self, channels, name):
        return self.conv_bn(channels, 3, self.strides, feature_group_count=channels, activation="identity", name=name)


class ShuffleNetV2(Net):
    """Table 5 of the paper.

    `stem_stride=1` is the net for 32x32 images, which also omits the max-pool. `stage_features`: channels of
    stages 2 to 4 and of conv5, instead of the width's. `se_ratio`: reduction (16), or its inverse, of a
    squeeze-and-excitation at the end of each branch; 0 for none. `variant`: "torchvision", or "megvii",
    the authors' code, which shuffles at a unit's input and keeps the width of the stride-2 shortcut.
    """

    stem_stride: int = 2
    stage_features: Sequence[int] | None = None
    se_ratio: float = 0.0
    variant: str = "torchvision"

    def __post_init__(self):
        require_choice(self, "stem_stride", (1, 2))
        require_number(self, "se_ratio", 0)
        require_choice(self, "variant", ("torchvision", "megvii"))
        if self.stage_features is not None:
            require_features(self, "stage_features", 4, multiple_of=2)
        super().__post_init__()
        if self.variant == "megvii":  # the first unit of a stage adds channels to those of its input
            *stages, _ = self.stage_features or features_at(self.width)
            grows = all(before < after for before, after in zip((STEM_FEATURES, *stages), stages))
            allowed = (
                f"'torchvision' where a stage has no more channels than the one before (the stem: {STEM_FEATURES})"
            )
            require(self, "variant", grows, allowed)

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = self.prepare(images)
        *stage_features, conv5 = self.stage_features or features_at(self.width)
        stride = self.stem_stride
        x = self.conv_bn(STEM_FEATURES, 3, stride, name="stem")(x, train)
        maps = [FeatureMap(x, stride)]
        if stride == 2:
            x = max_pool(x, 3, 2, padding=1)
            stride *= 2
            maps.append(FeatureMap(x, stride))
        for stage, (features, repeats) in enumerate(zip(stage_features, REPEATS), start=2):
            for i in range(repeats):
                unit = ShuffleUnit(
                    features,
                    strides=2 if i == 0 else 1,
                    se_ratio=self.se_ratio,
                    variant=self.variant,
                    conv_bn=self.conv_bn,
                    name=f"stage{stage}_block{i}",
                )
                x = unit(x, train)
            stride *= 2
            maps.append(FeatureMap(x, stride))
        x = self.conv_bn(conv5, 1, name="conv5")(x, train)
        if self.features_only:
            return last_of_each_stride([*maps, FeatureMap(x, stride)])
        return self.classify(x, train)
