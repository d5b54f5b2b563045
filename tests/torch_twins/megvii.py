"""The ShuffleNets of megvii's ShuffleNet-Series: its modules' names, written from the architectures.

They take BGR images.
"""

import torch
from torch import nn


def pair(inputs, outputs, kernel=1, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class Net(nn.Module):
    """Stem, max-pool, blocks, in the second version a last convolution, and a classifier without bias."""

    def __init__(self, widths, make_block, last, num_classes):
        super().__init__()
        stem, *stages = widths
        self.first_conv = nn.Sequential(*pair(3, stem, 3, 2), nn.ReLU())
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks = []
        for inputs, outputs, repeats in zip(widths, stages, (4, 8, 4)):
            blocks += [make_block(inputs, outputs, 2, first=not blocks)]
            blocks += [make_block(outputs, outputs, 1, first=False) for _ in range(repeats - 1)]
        self.features = nn.Sequential(*blocks)
        self.conv_last = nn.Sequential(*pair(stages[-1], last), nn.ReLU()) if last else nn.Identity()
        self.classifier = nn.Sequential(nn.Linear(last or stages[-1], num_classes, bias=False))

    def forward(self, x):
        x = self.conv_last(self.features(self.maxpool(self.first_conv(x))))
        return self.classifier(x.mean((2, 3)))


class GroupedBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, groups, first):
        super().__init__()
        hidden, added = outputs // 4, outputs - inputs if stride == 2 else outputs
        self.groups, self.stride = groups, stride
        self.branch_main_1 = nn.Sequential(
            *pair(inputs, hidden, groups=1 if first else groups), nn.ReLU(), *pair(hidden, hidden, 3, stride, hidden)
        )
        self.branch_main_2 = nn.Sequential(*pair(hidden, added, groups=groups))
        self.branch_proj = nn.AvgPool2d(3, 2, 1)

    def forward(self, x):
        y = self.branch_main_1(x)
        # The channels by their number modulo the groups: not the paper's permutation but its inverse.
        y = torch.cat([y[:, group :: self.groups] for group in range(self.groups)], 1)
        y = self.branch_main_2(y)
        if self.stride == 1:
            return torch.relu(x + y)
        return torch.cat((self.branch_proj(x), torch.relu(y)), 1)


def shufflenet_v1(size, groups, num_classes=1000):
    stage = {3: {0.5: 120, 1.0: 240, 1.5: 360, 2.0: 480}, 8: {0.5: 192, 1.0: 384, 1.5: 576, 2.0: 768}}[groups][size]
    stem = {3: {0.5: 12}, 8: {0.5: 16}}[groups].get(size, 48 if size == 2.0 else 24)

    def block(inputs, outputs, stride, first):
        return GroupedBlock(inputs, outputs, stride, groups, first)

    return Net((stem, stage, 2 * stage, 4 * stage), block, None, num_classes)


class SplitBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        hidden, taken = outputs // 2, inputs if stride == 2 else inputs // 2
        self.branch_main = nn.Sequential(
            *pair(taken, hidden),
            nn.ReLU(),
            *pair(hidden, hidden, 3, stride, hidden),
            *pair(hidden, outputs - taken),
            nn.ReLU(),
        )
        if stride == 2:
            self.branch_proj = nn.Sequential(*pair(inputs, inputs, 3, 2, inputs), *pair(inputs, inputs), nn.ReLU())
        self.stride = stride

    def forward(self, x):
        if self.stride == 2:
            return torch.cat((self.branch_proj(x), self.branch_main(x)), 1)
        return torch.cat((x[:, 0::2], self.branch_main(x[:, 1::2])), 1)


def shufflenet_v2(size, num_classes=1000):
    stage = {0.5: 48, 1.0: 116, 1.5: 176, 2.0: 244}[size]

    def block(inputs, outputs, stride, first):
        return SplitBlock(inputs, outputs, stride)

    return Net((24, stage, 2 * stage, 4 * stage), block, 2048 if size == 2.0 else 1024, num_classes)
