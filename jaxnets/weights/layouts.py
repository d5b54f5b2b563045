"""The code bases that publish weights, net by net: how each names its layers, and how its net differs from ours."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn

from jaxnets.errors import UserError
from jaxnets.layer_list import Layer
from jaxnets.models.googlenet import GoogLeNet
from jaxnets.models.mobilenet_v1 import MobileNetV1
from jaxnets.models.mobilenet_v2 import CIFAR_STAGE_STRIDES, MobileNetV2
from jaxnets.models.resnet import ResNet
from jaxnets.models.shufflenet_v1 import ShuffleNetV1
from jaxnets.models.shufflenet_v2 import ShuffleNetV2
from jaxnets.models.squeezenet import SqueezeNet
from jaxnets.models.vgg import VGG
from jaxnets.weights import layout_names as named
from jaxnets.weights import megvii_weights
from jaxnets.weights.layout_names import Layers, Names
from jaxnets.weights.weight_files import Normalization

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How a code base names a net's layers, and how else its net differs from ours."""

    # From the layers, in the order of their calls, to the names of the modules in the same order; None if the code base
    # has no such net.
    names: Callable[[Layers], Names]
    classifier_bias: bool = True
    bias_before_batch_norm: bool = False
    convolutions: dict[str, int] = field(default_factory=dict)  # our dense layers that are k x k convolutions there: k
    writable: bool = True
    training_only: tuple[str, ...] = ()  # parts of the net, by first name, with no effect on its logits
    advised: dict[str, Any] = field(default_factory=dict)  # fields to try if the shapes do not fit
    required: dict[str, Any] = field(default_factory=dict)  # fields without which the weights mean another net
    usual: dict[str, Any] = field(default_factory=dict)  # fields of the published net, which may be changed
    strides: dict[str, Any] = field(default_factory=dict)  # of the published net: see `warn_unless_published`
    classes: tuple[int, ...] = ()  # of the published nets, if another code base has the same names
    normalization: Normalization | None = None  # of the images of its published nets; None: their data set's usual
    # Which channels of the file's layers are ours: see `megvii_weights.ChannelOrder`.
    channel_orders: Callable[[nn.Module, Layers], dict] = lambda model, layers: {}

    def expected(self, layers: Layers) -> Layers:
        """The layers as this code base has them."""
        return [self._expected(layer, layer is layers[-1]) for layer in layers]

    def _expected(self, layer: Layer, last: bool) -> Layer:
        use_bias = layer.use_bias or layer.normalised and self.bias_before_batch_norm
        layer = replace(layer, use_bias=use_bias and (self.classifier_bias or not last))
        if (k := self.convolutions.get(layer.name)) is None:
            return layer
        inputs, outputs = layer.shape
        return replace(layer, kind="conv", shape=(k, k, inputs // (k * k), outputs))

    def fits(self, model: nn.Module) -> bool:
        """Whether the net can be written in this layout whatever its weights, trained or not."""
        return self.classifier_bias and not differing(model, self.required)

    def require_fields(self, model: nn.Module, code_base: str):
        """UserError if the net lacks a required field."""
        for name, value in self.required.items():
            if getattr(model, name) != value:
                raise UserError(
                    f"these are {code_base}'s weights: they need {name}={value!r}, but the "
                    f"{type(model).__name__} has {name}={getattr(model, name)!r}"
                )


FROM_MINUS_1_TO_1 = (0.5,) * 3, (0.5,) * 3
FROM_0_TO_255 = (0.0,) * 3, (1 / 255,) * 3
# Fields of the published nets that change the logits, but no shape.
RELU = {"activation": "relu", "bn_epsilon": 1e-5}
RELU6 = {"activation": "relu6", "bn_epsilon": 1e-5}
MOBILENET_V1 = {"padding": "torch"}
MOBILENET_V2 = {"padding": "torch", "bottleneck": "linear"}
SHUFFLENET_V1 = RELU | {"shuffle": True}
IDENTITY = {"shortcut": "identity"}
KERAS_V1 = {"activation": "relu6", "bn_epsilon": 1e-3, "padding": "keras"}
KERAS_V2 = {"activation": "relu6", "bn_epsilon": 1e-3, "padding": "same", "bottleneck": "linear"} | IDENTITY
KERAS = {"writable": False, "normalization": FROM_MINUS_1_TO_1}
# Their strides, which change no shape either.
IMAGENET, CIFAR = {"stem_stride": 2}, {"stem_stride": 1}
STAGES_V1 = {"stage_strides": MobileNetV1.stage_strides}
IMAGENET_V1, CIFAR_V1 = IMAGENET | STAGES_V1, CIFAR | STAGES_V1
IMAGENET_V2 = IMAGENET | {"stage_strides": MobileNetV2.stage_strides}
CIFAR_V2 = CIFAR | {"stage_strides": CIFAR_STAGE_STRIDES}
CIFAR_CLASSES = (10, 100)
TORCHVISION_MOBILENET_V2 = Layout(
    named.mobilenet_v2_torchvision, usual=RELU6 | MOBILENET_V2 | IDENTITY, strides=IMAGENET_V2
)
TORCHVISION_SHUFFLENET_V2 = Layout(
    named.shufflenet_v2_torchvision, required={"variant": "torchvision"}, usual=RELU, strides=IMAGENET
)
TORCHVISION_VGG = Layout(named.vgg_torchvision, bias_before_batch_norm=True, usual=RELU)
OWN = "jaxnets"  # the layout of our own names, which exists for every net
# Each net's layouts start with the one that `export` takes by default if no code base has that exact net.
LAYOUTS: dict[type[nn.Module], dict[str, Layout]] = {
    GoogLeNet: {
        # Its published net's `transform_input` turns ImageNet's normalisation into this one.
        "torchvision": Layout(
            named.googlenet_torchvision,
            training_only=("aux1", "aux2"),
            required={"large_kernel": 3},
            usual={"activation": "relu", "bn_epsilon": 1e-3},
            normalization=FROM_MINUS_1_TO_1,
        )
    },
    MobileNetV1: {
        "kuangliu": Layout(named.mobilenet_v1_kuangliu, usual=RELU | MOBILENET_V1, strides=CIFAR_V1),
        "timm": Layout(
            named.mobilenet_v1_timm,
            usual=RELU6 | MOBILENET_V1,
            strides=IMAGENET_V1,
            normalization=FROM_MINUS_1_TO_1,
        ),
        "Keras": Layout(
            named.mobilenet_v1_keras, convolutions={"classifier": 1}, usual=KERAS_V1, strides=IMAGENET_V1, **KERAS
        ),
        "Keras (by class)": Layout(
            named.keras_classes_mobilenet_v1,
            convolutions={"classifier": 1},
            usual=KERAS_V1,
            strides=IMAGENET_V1,
            **KERAS,
        ),
    },
    MobileNetV2: {
        "torchvision": TORCHVISION_MOBILENET_V2,
        "timm": Layout(named.mobilenet_v2_timm, usual=RELU6 | MOBILENET_V2 | IDENTITY, strides=IMAGENET_V2),
        "kuangliu": Layout(
            named.mobilenet_v2_kuangliu, usual=RELU | MOBILENET_V2 | {"shortcut": "projection"}, strides=CIFAR_V2
        ),
        "chenyaofo": replace(TORCHVISION_MOBILENET_V2, strides=CIFAR_V2, classes=CIFAR_CLASSES),
        "Keras": Layout(named.mobilenet_v2_keras, usual=KERAS_V2, strides=IMAGENET_V2, **KERAS),
        "Keras (Logits)": Layout(named.mobilenet_v2_keras_logits, usual=KERAS_V2, strides=IMAGENET_V2, **KERAS),
        "Keras (published)": Layout(named.mobilenet_v2_keras_published, usual=KERAS_V2, strides=IMAGENET_V2, **KERAS),
        "Keras (by class)": Layout(named.keras_classes, usual=KERAS_V2, strides=IMAGENET_V2, **KERAS),
    },
    ResNet: {
        "torchvision": Layout(named.resnet_torchvision, usual=RELU, strides=IMAGENET),
        "timm": Layout(named.resnet_torchvision, usual=RELU, strides=IMAGENET),
        "kuangliu": Layout(named.resnet_kuangliu, usual=RELU, strides=CIFAR),
    },
    SqueezeNet: {
        "torchvision": Layout(
            named.squeezenet_torchvision, usual={"activation": "relu", "bypass": "none"}, strides=IMAGENET
        )
    },
    ShuffleNetV1: {
        "kuangliu": Layout(
            named.shufflenet_v1_kuangliu, required={"variant": "kuangliu"}, usual=SHUFFLENET_V1, strides=CIFAR
        ),
        "megvii": Layout(
            named.shufflenet_v1_megvii,
            classifier_bias=False,
            usual=SHUFFLENET_V1,
            strides=IMAGENET,
            normalization=FROM_0_TO_255,
            channel_orders=megvii_weights.shufflenet_v1_orders,
        ),
    },
    ShuffleNetV2: {
        "torchvision": TORCHVISION_SHUFFLENET_V2,
        "kuangliu": Layout(
            named.shufflenet_v2_kuangliu, required={"variant": "torchvision"}, usual=RELU, strides=CIFAR
        ),
        "chenyaofo": replace(TORCHVISION_SHUFFLENET_V2, strides=CIFAR, classes=CIFAR_CLASSES),
        "megvii": Layout(
            named.shufflenet_v2_megvii,
            classifier_bias=False,
            usual=RELU,
            strides=IMAGENET,
            normalization=FROM_0_TO_255,
            channel_orders=megvii_weights.shufflenet_v2_orders,
            advised={"variant": "megvii"},
        ),
    },
    VGG: {
        "torchvision": TORCHVISION_VGG,
        "timm": Layout(
            named.vgg_timm, bias_before_batch_norm=True, convolutions={"hidden0": 7, "hidden1": 1}, usual=RELU
        ),
        "kuangliu": Layout(named.vgg_kuangliu, bias_before_batch_norm=True, usual=RELU),
        "chenyaofo": TORCHVISION_VGG,
    },
}


def layouts_of(model: nn.Module) -> dict[str, Layout]:
    """The layouts known for a net, by name."""
    return LAYOUTS.get(type(model), {}) | {OWN: Layout(named.own_names)}


def differing(model: nn.Module, fields: dict[str, Any]) -> dict[str, Any]:
    """Those of the fields that have other values in the net."""
    return {name: value for name, value in fields.items() if getattr(model, name) != value}


def warn_of_differing(model: nn.Module, code_base: str, fields: dict[str, Any]):
    """Warn if the net has other values in these fields, which are those of the code base's published net."""
    if theirs := differing(model, fields):
        published = ", ".join(f"{name}={value!r}" for name, value in theirs.items())
        ours = ", ".join(f"{name}={getattr(model, name)!r}" for name in theirs)
        logger.warning(
            "the published net of %s has %s, this one %s: the same weights give different outputs",
            code_base,
            published,
            ours,
        )


def warn_unless_published(model: nn.Module, layout: Layout, classes: int | None):
    """Warn if weights of this layout were read for a net that is not the published one.

    `classes` is how many the weights have, None without a classifier. Strides count too, unlike when weights are
    written, where the layout may be the only one that has the net.
    """
    alike = [(name, other) for name, other in layouts_of(model).items() if other.names is layout.names]
    unsure = classes is None and len(alike) > 1  # only the classes would tell whose strides these are
    code_base, published = max(alike, key=lambda pair: classes in pair[1].classes)  # the first where none has them
    warn_of_differing(model, code_base, published.usual | ({} if unsure else published.strides))
