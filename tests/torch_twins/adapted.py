"""torchvision's nets changed for 32x32 images, as the CIFAR code bases do, and the small teaching net."""

import timm
import torch
import torchvision
from timm.models.vgg import ConvMlp
from torch import nn
from torchvision.models.squeezenet import Fire
from torchvision.models.vgg import VGG, cfgs, make_layers
from torchvision.ops import SqueezeExcitation

CIFAR_ROWS = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


def mobilenet_v2_chenyaofo(width):
    net = torchvision.models.mobilenet_v2(num_classes=10, width_mult=width, inverted_residual_setting=CIFAR_ROWS)
    net.features[0][0].stride = (1, 1)
    return net


class FirePlus(nn.Module):
    """torchvision's Fire module with squeeze-and-excitation, and a bypass around both."""

    def __init__(self, fire):
        super().__init__()
        inputs, outputs = fire.squeeze.in_channels, 2 * fire.expand1x1.out_channels
        self.fire = fire
        self.se = SqueezeExcitation(outputs, outputs // 16)
        self.bypass = nn.Sequential() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.se(self.fire(x)) + self.bypass(x)


def squeezenet_plus():
    net = torchvision.models.squeezenet1_1(num_classes=10)
    for i, layer in enumerate(net.features):
        if isinstance(layer, Fire):
            net.features[i] = FirePlus(layer)
    return net


def shufflenet_v2_se():
    net = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    for block in (*net.stage2, *net.stage3, *net.stage4):
        channels = block.branch2[-3].out_channels
        block.branch2.append(SqueezeExcitation(channels, round(channels / 16)))
    return net


def resnet_cifar(depth):
    net = getattr(torchvision.models, f"resnet{depth}")(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()
    return net


def vgg(depth, batch_norm, pool_size, *hidden, width=1.0):
    """torchvision's net with other widths; chenyaofo's has 512 and 512 on a map of 1x1."""
    features = [f if f == "M" else int(f * width) for f in cfgs[{16: "D", 19: "E"}[depth]]]
    net = VGG(make_layers(features, batch_norm), num_classes=10)
    net.avgpool = nn.AdaptiveAvgPool2d(pool_size)
    widths = [features[-2] * pool_size**2, *hidden]
    layers = [layer for a, b in zip(widths, hidden) for layer in (nn.Linear(a, b), nn.ReLU(), nn.Dropout())]
    net.classifier = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
    return net


def vgg_kuangliu(width):
    """VGG-16 with BatchNorm and one dense layer, not in a sequence."""
    net = vgg(16, True, 1, width=width)
    net.classifier = net.classifier[0]
    return net


def vgg_timm(name, hidden):
    """timm's, which has its dense layers as convolutions, with narrow ones."""
    net = timm.create_model(name, num_classes=10)
    net.pre_logits = ConvMlp(512, hidden, kernel_size=7)
    net.head.fc = nn.Linear(hidden, 10)
    return net


class MiniBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        hidden = 6 * outputs
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.branch(x)


class MobileNetV2Mini(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU6(),
            MiniBlock(32, 8),
            nn.MaxPool2d(2),
            MiniBlock(8, 16),
            MiniBlock(16, 16),
            nn.MaxPool2d(2),
            MiniBlock(16, 32),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )


class RGB(nn.Module):
    """A net for BGR images, given RGB ones."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(torch.flip(images, (1,)))
