"""Every net by name: one dict, name -> class or partial."""

from functools import partial

from jaxnets.models.mobilenet_v1 import MobileNetV1
from jaxnets.models.mobilenet_v2 import CIFAR_STAGE_STRIDES, MobileNetV2
from jaxnets.models.shufflenet_v1 import ShuffleNetV1
from jaxnets.models.shufflenet_v2 import ShuffleNetV2
from jaxnets.models.squeezenet import SqueezeNet

MODELS = {
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v1_cifar": partial(MobileNetV1, num_classes=10, stem_stride=1),
    "mobilenet_v2": MobileNetV2,
    # The common CIFAR net: no early subsampling, ReLU, 1x1 shortcuts where the width changes.
    "mobilenet_v2_cifar": partial(
        MobileNetV2,
        num_classes=10,
        stem_stride=1,
        stage_strides=CIFAR_STAGE_STRIDES,
        shortcut="projection",
        activation="relu",
        dropout=0.0,
    ),
    "shufflenet_v1_g1": partial(ShuffleNetV1, feature_group_count=1),
    "shufflenet_v1_g1_cifar": partial(ShuffleNetV1, feature_group_count=1, num_classes=10, stem_stride=1),
    "shufflenet_v1_g2": partial(ShuffleNetV1, feature_group_count=2),
    "shufflenet_v1_g2_cifar": partial(ShuffleNetV1, feature_group_count=2, num_classes=10, stem_stride=1),
    "shufflenet_v1_g3": partial(ShuffleNetV1, feature_group_count=3),
    "shufflenet_v1_g3_cifar": partial(ShuffleNetV1, feature_group_count=3, num_classes=10, stem_stride=1),
    "shufflenet_v1_g4": partial(ShuffleNetV1, feature_group_count=4),
    "shufflenet_v1_g4_cifar": partial(ShuffleNetV1, feature_group_count=4, num_classes=10, stem_stride=1),
    "shufflenet_v1_g8": partial(ShuffleNetV1, feature_group_count=8),
    "shufflenet_v1_g8_cifar": partial(ShuffleNetV1, feature_group_count=8, num_classes=10, stem_stride=1),
    "shufflenet_v2_x0_5": partial(ShuffleNetV2, width=0.5),
    "shufflenet_v2_x0_5_cifar": partial(ShuffleNetV2, width=0.5, num_classes=10, stem_stride=1),
    "shufflenet_v2_x1_0": partial(ShuffleNetV2, width=1.0),
    "shufflenet_v2_x1_0_cifar": partial(ShuffleNetV2, width=1.0, num_classes=10, stem_stride=1),
    "shufflenet_v2_x1_5": partial(ShuffleNetV2, width=1.5),
    "shufflenet_v2_x1_5_cifar": partial(ShuffleNetV2, width=1.5, num_classes=10, stem_stride=1),
    "shufflenet_v2_x2_0": partial(ShuffleNetV2, width=2.0),
    "shufflenet_v2_x2_0_cifar": partial(ShuffleNetV2, width=2.0, num_classes=10, stem_stride=1),
    "squeezenet1_0": partial(SqueezeNet, version="1.0"),
    "squeezenet1_0_cifar": partial(SqueezeNet, version="1.0", num_classes=10, stem_stride=1),
    "squeezenet1_1": partial(SqueezeNet, version="1.1"),
    "squeezenet1_1_cifar": partial(SqueezeNet, version="1.1", num_classes=10, stem_stride=1),
}
