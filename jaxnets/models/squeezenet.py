"""SqueezeNet: AlexNet-level accuracy with 50x fewer parameters (arXiv 1602.07360)."""

from typing import Any, NamedTuple

import flax.linen as nn

from jaxnets import ops
from jaxnets.models.initializers import dense_init
from jaxnets.models.layers import Conv, SqueezeExcite, global_mean, make_divisible, max_pool
from jaxnets.models.net import FeatureMap, Net, last_of_each_stride, require, require_choice, require_number

# Table 1, fire2 to fire9: squeeze 1x1, and each of expand 1x1 and expand 3x3
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


class Version(NamedTuple):
    """Where 1.0 (table 1) and 1.1 (the authors' cheaper revision) differ."""

    stem_features: int
    stem_kernel: int
    pool_before: tuple[int, ...]  # numbers of the Fire modules


VERSIONS = {"1.0": Version(96, 7, (2, 5, 9)), "1.1": Version(64, 3, (2, 4, 6))}


class Fire(nn.Module):
    """Squeeze 1x1, expand 1x1 and 3x3 side by side (figure 1), with a bypass around it all (figure 2)."""

    squeeze: int
    expand: int
    bypass: str
    se_ratio: float
    conv: Any = Conv

    @nn.compact
    def __call__(self, x, train: bool):
        squeezed = self.conv(self.squeeze, 1, name="squeeze")(x, train)
        expanded = (
            self.conv(self.expand, 1, name="expand1x1")(squeezed, train),
            self.conv(self.expand, 3, name="expand3x3")(squeezed, train),
        )
        y = ops.concatenate(expanded)
        if self.se_ratio:
            y = SqueezeExcite(self.se_ratio, name="se")(y)
        if self.bypass != "none" and x.shape == y.shape:
            return y + x
        if self.bypass == "complex":
            return y + self.conv(y.shape[-1], 1, activation="identity", name="bypass")(x, train)
        return y


class SqueezeNet(Net):
    """Table 1 of the paper, and its revision 1.1.

    `bypass`: "none", "simple" (identity where the channels match) or "complex" (also a 1x1 convolution
    elsewhere). `se_ratio`: reduction (16), or its inverse, of a squeeze-and-excitation in each Fire module;
    0 for none. `batch_norm` puts a BatchNorm between each convolution and its ReLU, instead of a bias.
    """

    dropout: float = 0.5
    version: str = "1.0"
    bypass: str = "none"
    se_ratio: float = 0.0
    batch_norm: bool = False
    stem_stride: int = 2

    def __post_init__(self):
        require_choice(self, "version", VERSIONS)
        require_choice(self, "bypass", ("none", "simple", "complex"))
        require_number(self, "se_ratio", 0)
        require(self, "batch_norm", isinstance(self.batch_norm, bool), "True or False")
        require_choice(self, "stem_stride", (1, 2))
        super().__post_init__()

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = self.prepare(images)
        version = VERSIONS[self.version]
        conv = self.conv_bn if self.batch_norm else self.conv
        stride = self.stem_stride
        # The published nets do not pad here; a 32x32 image at full resolution has no border to spare.
        padding = 0 if stride == 2 else "torch"
        stem = make_divisible(version.stem_features * self.width)
        x = conv(stem, version.stem_kernel, stride, padding, name="stem")(x, train)
        maps = [FeatureMap(x, stride)]
        for number, (squeeze, expand) in enumerate(FIRES, start=2):
            if number in version.pool_before:
                x = max_pool(x, 3, 2, ceil_mode=True)
                stride *= 2
            squeeze, expand = make_divisible(squeeze * self.width), make_divisible(expand * self.width)
            x = Fire(squeeze, expand, self.bypass, self.se_ratio, conv, name=f"fire{number}")(x, train)
            maps.append(FeatureMap(x, stride))
        if self.features_only:
            return last_of_each_stride(maps)
        if not self.num_classes:
            return global_mean(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        # Each class has its own map, rectified before the average.
        classifier = self.conv(self.num_classes, 1, kernel_init=dense_init, name="classifier")
        return global_mean(classifier(x))
