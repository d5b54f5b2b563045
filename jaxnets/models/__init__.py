"""Every net by name: one dict, name -> class or partial."""

from functools import partial

from jaxnets.models.googlenet import GoogLeNet
from jaxnets.models.mobilenet_v1 import MobileNetV1
from jaxnets.models.mobilenet_v2 import CIFAR_STAGE_STRIDES, MobileNetV2
from jaxnets.models.mobilenet_v2_mini import MobileNetV2Mini
from jaxnets.models.resnet import ResNet
from jaxnets.models.shufflenet_v1 import ShuffleNetV1
from jaxnets.models.shufflenet_v2 import ShuffleNetV2
from jaxnets.models.squeezenet import SqueezeNet
from jaxnets.models.vgg import VGG

vgg_cifar = partial(VGG, num_classes=10, hidden_features=(), pool_size=1, dropout=0.0)

MODELS = {
    "googlenet": GoogLeNet,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v1_cifar": partial(MobileNetV1, num_classes=10, stem_stride=1),
    "mobilenet_v2": MobileNetV2,
    # As in kuangliu's pytorch-cifar: no early subsampling, ReLU, 1x1 shortcuts where the width changes.
    "mobilenet_v2_cifar": partial(
        MobileNetV2,
        num_classes=10,
        stem_stride=1,
        stage_strides=CIFAR_STAGE_STRIDES,
        shortcut="projection",
        activation="relu",
        dropout=0.0,
    ),
    "mobilenet_v2_mini": MobileNetV2Mini,
    "resnet18": partial(ResNet, depth=18),
    "resnet18_cifar": partial(ResNet, depth=18, num_classes=10, stem_stride=1),
    "resnet34": partial(ResNet, depth=34),
    "resnet34_cifar": partial(ResNet, depth=34, num_classes=10, stem_stride=1),
    "resnet50": partial(ResNet, depth=50),
    "resnet50_cifar": partial(ResNet, depth=50, num_classes=10, stem_stride=1),
    "resnet101": partial(ResNet, depth=101),
    "resnet101_cifar": partial(ResNet, depth=101, num_classes=10, stem_stride=1),
    "resnet152": partial(ResNet, depth=152),
    "resnet152_cifar": partial(ResNet, depth=152, num_classes=10, stem_stride=1),
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
    "vgg16": partial(VGG, depth=16),
    "vgg16_bn": partial(VGG, depth=16, batch_norm=True),
    "vgg16_bn_cifar": partial(vgg_cifar, depth=16, batch_norm=True),
    "vgg16_cifar": partial(vgg_cifar, depth=16),
    "vgg19": partial(VGG, depth=19),
    "vgg19_bn": partial(VGG, depth=19, batch_norm=True),
    "vgg19_bn_cifar": partial(vgg_cifar, depth=19, batch_norm=True),
    "vgg19_cifar": partial(vgg_cifar, depth=19),
}

# Fields whose value is part of a net's name.
NAMED = {"depth", "version", "feature_group_count"}


def default_image_size(name: str) -> int:
    """Side in pixels of the images that the net `name` is made for: 32 for the `_cifar` and `_mini` nets, else 224."""
    return 32 if name.endswith(("_cifar", "_mini")) else 224
