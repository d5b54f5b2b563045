"""The PyTorch nets that ours are compared with, and how both are set up for it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import nn

from jaxnets import torch_nets
from tests.torch_twins import adapted, megvii, pytorch_cifar


@dataclass(frozen=True)
class Case:
    """A PyTorch net, the name and fields of ours, and the image sides to compare them at."""

    make: Callable[[], nn.Module]
    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    layout: str = "torchvision"
    sides: tuple[int, ...] = (75,)
    train_side: int | None = None  # of the images in training, if it is compared
    batch: int = 8
    rate: float = 1e-3  # of the SGD steps: small enough for the loss to fall


def tv(name, **kwargs):
    return lambda: getattr(torchvision.models, name)(**kwargs)


def rgb(make, *args):
    return lambda: adapted.RGB(make(*args))


CASES = {
    "googlenet": Case(tv("googlenet", aux_logits=False, init_weights=False), "googlenet", sides=(97,)),
    "mobilenet_v1 kuangliu": Case(
        lambda: pytorch_cifar.MobileNet(0.5), "mobilenet_v1_cifar", {"width": 0.5}, "kuangliu", (45,), 32
    ),
    "mobilenet_v1 timm": Case(
        lambda: timm.create_model("mobilenetv1_100"), "mobilenet_v1", {"activation": "relu6"}, "timm"
    ),
    "mobilenet_v2 .35": Case(tv("mobilenet_v2", width_mult=0.35), "mobilenet_v2", {"width": 0.35}, train_side=64),
    "mobilenet_v2 1": Case(tv("mobilenet_v2"), "mobilenet_v2", sides=(64, 97)),
    "mobilenet_v2 1.4": Case(
        tv("mobilenet_v2", width_mult=1.4, num_classes=7), "mobilenet_v2", {"width": 1.4, "num_classes": 7}
    ),
    "mobilenet_v2 timm": Case(
        lambda: timm.create_model("mobilenetv2_050"), "mobilenet_v2", {"width": 0.5}, "timm", (97,)
    ),
    "mobilenet_v2 chenyaofo": Case(
        lambda: adapted.mobilenet_v2_chenyaofo(0.75),
        "mobilenet_v2_cifar",
        {"width": 0.75, "shortcut": "identity", "activation": "relu6"},
        "chenyaofo",
        (32,),
    ),
    "mobilenet_v2 kuangliu": Case(pytorch_cifar.MobileNetV2, "mobilenet_v2_cifar", {}, "kuangliu", (33,), 16),
    "mobilenet_v2_mini": Case(adapted.MobileNetV2Mini, "mobilenet_v2_mini", {}, "", (32, 45), 16, rate=2e-5),
    "resnet18": Case(tv("resnet18"), "resnet18", train_side=64),
    "resnet34 kuangliu": Case(lambda: adapted.resnet_cifar(34), "resnet34_cifar", sides=(33,)),
    "resnet50 timm": Case(lambda: timm.create_model("resnet50"), "resnet50", {}, "timm", (65,)),
    "shufflenet_v1 kuangliu g2": Case(
        lambda: pytorch_cifar.ShuffleNet(2),
        "shufflenet_v1_g2_cifar",
        {"variant": "kuangliu"},
        "kuangliu",
        (33,),
        32,
        rate=1e-4,
    ),
    "shufflenet_v1 kuangliu g3": Case(
        lambda: pytorch_cifar.ShuffleNet(3), "shufflenet_v1_g3_cifar", {"variant": "kuangliu"}, "kuangliu", (45,)
    ),
    "shufflenet_v1 megvii g3": Case(
        rgb(megvii.shufflenet_v1, 1.0, 3), "shufflenet_v1_g3", {}, "megvii", train_side=64, rate=1e-4
    ),
    "shufflenet_v1 megvii g3 .5": Case(rgb(megvii.shufflenet_v1, 0.5, 3), "shufflenet_v1_g3", {"width": 0.5}, "megvii"),
    "shufflenet_v1 megvii g8 .5": Case(
        rgb(megvii.shufflenet_v1, 0.5, 8), "shufflenet_v1_g8", {"width": 0.5, "variant": "megvii"}, "megvii"
    ),
    "shufflenet_v2 .5": Case(tv("shufflenet_v2_x0_5"), "shufflenet_v2_x0_5", train_side=64),
    "shufflenet_v2 1": Case(tv("shufflenet_v2_x1_0"), "shufflenet_v2_x1_0", sides=(64, 97)),
    "shufflenet_v2 1.5 chenyaofo": Case(
        lambda: torch_nets.shufflenet_v2_cifar("x1_5"), "shufflenet_v2_x1_5_cifar", {}, "chenyaofo", (33,)
    ),
    "shufflenet_v2 2": Case(tv("shufflenet_v2_x2_0"), "shufflenet_v2_x2_0"),
    "shufflenet_v2 kuangliu .5": Case(
        lambda: pytorch_cifar.ShuffleNetV2(0.5), "shufflenet_v2_x0_5_cifar", {}, "kuangliu", (45,)
    ),
    "shufflenet_v2 kuangliu 2": Case(
        lambda: pytorch_cifar.ShuffleNetV2(2.0),
        "shufflenet_v2_x2_0_cifar",
        {"stage_features": (224, 488, 976, 2048)},
        "kuangliu",
        (32,),
    ),
    "shufflenet_v2 megvii .5": Case(rgb(megvii.shufflenet_v2, 0.5), "shufflenet_v2_x0_5", {}, "megvii"),
    "shufflenet_v2 megvii 1": Case(
        rgb(megvii.shufflenet_v2, 1.0), "shufflenet_v2_x1_0", {"variant": "megvii"}, "megvii", train_side=64
    ),
    "shufflenet_v2 se": Case(
        adapted.shufflenet_v2_se, "shufflenet_v2_x0_5", {"se_ratio": 16, "num_classes": 10}, "", train_side=64
    ),
    "squeezenet complex bypass, se": Case(
        adapted.squeezenet_plus, "squeezenet1_1", {"bypass": "complex", "se_ratio": 16, "num_classes": 10}, ""
    ),
    "squeezenet 1.0": Case(tv("squeezenet1_0"), "squeezenet1_0", sides=(97,)),
    "squeezenet 1.1": Case(tv("squeezenet1_1"), "squeezenet1_1", sides=(64, 75), train_side=33, batch=2, rate=3e-4),
    "squeezenet 1.1 32x32": Case(lambda: torch_nets.squeezenet_cifar("1_1"), "squeezenet1_1_cifar", sides=(33,)),
    "vgg16": Case(
        lambda: adapted.vgg(16, False, 7, 32, 48),
        "vgg16",
        {"hidden_features": (32, 48), "num_classes": 10},
        sides=(49,),
    ),
    "vgg16 bn kuangliu": Case(
        lambda: adapted.vgg_kuangliu(0.125), "vgg16_bn_cifar", {"width": 0.125}, "kuangliu", (32,), 32
    ),
    "vgg19 bn chenyaofo": Case(
        lambda: adapted.vgg(19, True, 1, 512, 512),
        "vgg19_bn_cifar",
        {"hidden_features": (512, 512)},
        "chenyaofo",
        (32,),
    ),
    "vgg19 bn timm": Case(
        lambda: adapted.vgg_timm("vgg19_bn", 48), "vgg19_bn", {"hidden_features": (48, 48), "num_classes": 10}, "timm"
    ),
}


def unset(case: Case) -> nn.Module:
    """The PyTorch net of a case, its weights not there yet."""
    with torch.device("meta"):
        return case.make()


def calibrated(net: nn.Module, side: int, batch: int, shift: float = 0.0) -> nn.Module:
    """A net without dropout, with random weights, and random BatchNorm statistics not far from the truth.

    Far from it, the activations of a deep net would die out, and its logits would say little. `shift`: mean of
    what the BatchNorms put out, or, in a net without, what its layers put out.
    """
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0.0, 0.1, generator=generator)
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.0, generator=generator)
        nn.init.normal_(norm.bias, shift, 0.3, generator=generator)
        norm.reset_running_stats()
        norm.momentum = 1.0
    hooks = []
    if shift and not norms:
        layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        hooks = [layer.register_forward_hook(functools.partial(rescale, shift)) for layer in layers]
    with torch.no_grad():
        net.train()(to_torch(images_of(side, batch)))
    for hook in hooks:
        hook.remove()
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean += 0.1 * torch.randn(norm.num_features, generator=generator)
        norm.running_var *= 0.7 + torch.rand(norm.num_features, generator=generator)
    return net.eval()


def rescale(shift: float, layer: nn.Module, inputs, outputs: torch.Tensor) -> torch.Tensor:
    """Give each output channel, on this batch, the mean `shift` and a standard deviation of .5."""
    over = [d for d in range(outputs.ndim) if d != 1]
    std, mean = torch.std_mean(outputs, over)
    std *= 2
    layer.weight.div_(std.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.sub_(mean).div_(std).add_(shift)
    return layer.forward(*inputs)


def images_of(side: int, batch: int) -> np.ndarray:
    """Random images `(batch, side, side, 3)`, each of its own colour."""
    random = np.random.default_rng(side)
    noise, colour = (random.normal(size=(batch, *shape, 3)) for shape in ((side, side), (1, 1)))
    return (noise + 2 * colour).astype(np.float32)


def to_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
