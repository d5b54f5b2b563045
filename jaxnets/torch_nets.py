"""The light nets in PyTorch: torchvision's own and, in its style, those that it lacks.

`jaxnets.benchmark` races against them, and the tests compare with them; every net computes what ours of that name does.
Importing this module gives torchvision's ShuffleNetV2 our `shuffle`.
Needs PyTorch and torchvision, `pip install -e '.[torch]'`, but not JAX.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}  # memory formats of images


def set_fast() -> None:
    """Have cuDNN try its kernels for every shape, and multiply float32 as TF32, as XLA does by default."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True


def synchronize() -> None:
    """Wait for all work queued on the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def import_torchvision():
    """Import torchvision, even if its CUDA build is installed with a CPU build of PyTorch.

    In that case the operators are missing from the binary, and importing them fails until their schemas exist.
    """
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # the schemas live as long as this object
        import torchvision
    return torchvision


torchvision = import_torchvision()


def conv(inputs, outputs, kernel=1, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def add_pairs(module, *convs):
    """Give a module conv1, bn1, conv2, bn2, ..."""
    for number, layer in enumerate(convs, start=1):
        setattr(module, f"conv{number}", layer)
        setattr(module, f"bn{number}", nn.BatchNorm2d(layer.out_channels))


def apply_pair(module, number, x):
    return getattr(module, f"bn{number}")(getattr(module, f"conv{number}")(x))


def relu(x):
    return F.relu(x, inplace=True)


@torch.fx.wrap  # kept as a call by symbolic tracing, which does not know the memory format
def shuffle(x, groups):
    """Channels shuffled in groups, in the memory format of x: otherwise all that follows would leave it too."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


# Replaces torchvision's, which returns NCHW whatever it gets.
torchvision.models.shufflenetv2.channel_shuffle = lambda x, groups: shuffle(x, groups)


class SeparableBlock(nn.Module):
    """Depthwise 3x3, pointwise 1x1."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        add_pairs(self, conv(inputs, inputs, 3, stride, inputs), conv(inputs, outputs))

    def forward(self, x):
        return relu(apply_pair(self, 2, relu(apply_pair(self, 1, x))))


class MobileNet(nn.Module):
    """MobileNetV1 (1704.04861, table 1), with the module names of kuangliu's pytorch-cifar."""

    rows = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, width=1.0, stem_stride=1, num_classes=10):
        super().__init__()
        widths = [int(width * features) for features in (32, *(features for features, _ in self.rows))]
        add_pairs(self, conv(3, widths[0], 3, stem_stride))
        self.layers = nn.Sequential(
            *(SeparableBlock(a, b, stride) for a, b, (_, stride) in zip(widths, widths[1:], self.rows))
        )
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        return self.linear(self.layers(relu(apply_pair(self, 1, x))).mean((2, 3)))


class ExpandedBlock(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; a 1x1 shortcut where the width changes."""

    def __init__(self, inputs, outputs, expansion, stride):
        super().__init__()
        hidden = inputs * expansion
        add_pairs(self, conv(inputs, hidden), conv(hidden, hidden, 3, stride, hidden), conv(hidden, outputs))
        self.stride = stride
        self.shortcut = nn.Sequential()
        if stride == 1 and inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = relu(apply_pair(self, 2, relu(apply_pair(self, 1, x))))
        y = apply_pair(self, 3, y)
        return y + self.shortcut(x) if self.stride == 1 else y


class MobileNetV2(nn.Module):
    """kuangliu's MobileNetV2 for 32x32 images; torchvision has the paper's."""

    rows = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes=10):
        super().__init__()
        width, blocks = 32, []
        for expansion, outputs, repeats, stride in self.rows:
            for i in range(repeats):
                blocks.append(ExpandedBlock(width, outputs, expansion, stride if i == 0 else 1))
                width = outputs
        add_pairs(self, conv(3, 32, 3), conv(width, 1280))
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(1280, num_classes)

    def forward(self, x):
        x = self.layers(relu(apply_pair(self, 1, x)))
        return self.linear(relu(apply_pair(self, 2, x)).mean((2, 3)))


class GroupedUnit(nn.Module):
    """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1 (1707.01083, figure 2b and, with stride 2, 2c)."""

    def __init__(self, inputs, outputs, stride, groups, first):
        super().__init__()
        hidden, added = outputs // 4, outputs - inputs if stride == 2 else outputs
        self.groups, self.stride = groups, stride
        add_pairs(
            self,
            conv(inputs, hidden, groups=1 if first else groups),
            conv(hidden, hidden, 3, stride, hidden),
            conv(hidden, added, groups=groups),
        )

    def forward(self, x):
        y = shuffle(relu(apply_pair(self, 1, x)), self.groups)
        y = apply_pair(self, 3, apply_pair(self, 2, y))
        if self.stride == 1:
            return relu(x + y)
        return torch.cat((F.avg_pool2d(x, 3, 2, 1), relu(y)), 1)


class ShuffleNetV1(nn.Module):
    """Table 1 of 1707.01083, g = 3; with `stem_stride=1` for 32x32 images, without the max-pool."""

    def __init__(self, stem_stride=2, num_classes=1000):
        super().__init__()
        add_pairs(self, conv(3, 24, 3, stem_stride))
        self.pool = nn.MaxPool2d(3, 2, 1) if stem_stride == 2 else nn.Identity()
        width, units = 24, []
        for outputs, repeats in ((240, 4), (480, 8), (960, 4)):
            for i in range(repeats):
                units.append(GroupedUnit(width, outputs, 2 if i == 0 else 1, 3, first=not units))
                width = outputs
        self.units = nn.Sequential(*units)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.units(self.pool(relu(apply_pair(self, 1, x))))
        return self.linear(x.mean((2, 3)))


def shufflenet_v2_cifar(size, num_classes=10):
    """torchvision's with stride 1 in the stem and no max-pool, as in chenyaofo's pytorch-cifar-models."""
    net = getattr(torchvision.models, f"shufflenet_v2_{size}")(num_classes=num_classes)
    net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()
    return net


def squeezenet_cifar(version, num_classes=10):
    """torchvision's with stride 1 and padding in the stem."""
    net = getattr(torchvision.models, f"squeezenet{version}")(num_classes=num_classes)
    stem = net.features[0]
    stem.stride = (1, 1)
    stem.padding = tuple(k // 2 for k in stem.kernel_size)
    return net


SHUFFLENET_V2 = ("x0_5", "x1_0", "x1_5", "x2_0")
NETS = {
    "mobilenet_v1": partial(MobileNet, stem_stride=2, num_classes=1000),
    "mobilenet_v1_cifar": MobileNet,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "mobilenet_v2_cifar": MobileNetV2,
    **{f"squeezenet{version}": getattr(torchvision.models, f"squeezenet{version}") for version in ("1_0", "1_1")},
    **{f"squeezenet{version}_cifar": partial(squeezenet_cifar, version) for version in ("1_0", "1_1")},
    "shufflenet_v1_g3": ShuffleNetV1,
    "shufflenet_v1_g3_cifar": partial(ShuffleNetV1, stem_stride=1, num_classes=10),
    **{f"shufflenet_v2_{size}": getattr(torchvision.models, f"shufflenet_v2_{size}") for size in SHUFFLENET_V2},
    **{f"shufflenet_v2_{size}_cifar": partial(shufflenet_v2_cifar, size) for size in SHUFFLENET_V2},
}
