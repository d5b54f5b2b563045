"""The CIFAR nets of kuangliu's pytorch-cifar: its modules' names, written from the architectures."""

import torch
import torch.nn.functional as F
from torch import nn

from jaxnets.torch_nets import MobileNet, MobileNetV2, add_pairs, apply_pair, conv, shuffle

__all__ = ["MobileNet", "MobileNetV2", "ShuffleNet", "ShuffleNetV2"]


class GroupedBottleneck(nn.Module):
    def __init__(self, inputs, outputs, stride, groups):
        super().__init__()
        hidden = outputs // 4
        self.stride, self.groups = stride, 1 if inputs == 24 else groups
        add_pairs(
            self,
            conv(inputs, hidden, groups=self.groups),
            conv(hidden, hidden, 3, stride, hidden),
            conv(hidden, outputs, groups=groups),
        )

    def forward(self, x):
        y = shuffle(F.relu(apply_pair(self, 1, x)), self.groups)
        y = apply_pair(self, 3, F.relu(apply_pair(self, 2, y)))
        if self.stride == 1:
            return F.relu(y + x)
        return F.relu(torch.cat((y, F.avg_pool2d(x, 3, 2, 1)), 1))


class ShuffleNet(nn.Module):
    """ShuffleNetG2 and ShuffleNetG3."""

    def __init__(self, groups):
        super().__init__()
        add_pairs(self, conv(3, 24))
        width, first = 24, {2: 200, 3: 240}[groups]
        for stage, repeats in enumerate((4, 8, 4)):
            outputs = first * 2**stage
            blocks = [GroupedBottleneck(width, outputs - width, 2, groups)]
            blocks += [GroupedBottleneck(outputs, outputs, 1, groups) for _ in range(repeats - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            width = outputs
        self.linear = nn.Linear(width, 10)

    def forward(self, x):
        x = F.relu(apply_pair(self, 1, x))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
        return self.linear(x.mean((2, 3)))


class SplitBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        half = width // 2
        add_pairs(self, conv(half, half), conv(half, half, 3, 1, half), conv(half, half))

    def forward(self, x):
        kept, y = x.chunk(2, 1)
        y = apply_pair(self, 2, F.relu(apply_pair(self, 1, y)))
        return shuffle(torch.cat((kept, F.relu(apply_pair(self, 3, y))), 1), 2)


class DownBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        half = outputs // 2
        left = conv(inputs, inputs, 3, 2, inputs), conv(inputs, half)
        add_pairs(self, *left, conv(inputs, half), conv(half, half, 3, 2, half), conv(half, half))

    def forward(self, x):
        left = F.relu(apply_pair(self, 2, apply_pair(self, 1, x)))
        right = apply_pair(self, 4, F.relu(apply_pair(self, 3, x)))
        return shuffle(torch.cat((left, F.relu(apply_pair(self, 5, right))), 1), 2)


class ShuffleNetV2(nn.Module):
    """Its twofold net has 224 channels in the first stage, where the paper has 244."""

    widths = {
        0.5: (48, 96, 192, 1024),
        1.0: (116, 232, 464, 1024),
        1.5: (176, 352, 704, 1024),
        2.0: (224, 488, 976, 2048),
    }

    def __init__(self, size):
        super().__init__()
        *stages, last = self.widths[size]
        add_pairs(self, conv(3, 24, 3), conv(stages[-1], last))
        for number, (inputs, outputs, repeats) in enumerate(zip([24, *stages], stages, (3, 7, 3)), start=1):
            blocks = [DownBlock(inputs, outputs), *(SplitBlock(outputs) for _ in range(repeats))]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(last, 10)

    def forward(self, x):
        x = F.relu(apply_pair(self, 1, x))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
        return self.linear(F.relu(apply_pair(self, 2, x)).mean((2, 3)))
