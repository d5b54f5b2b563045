"""`TinyNet` in PyTorch."""

import contextlib
from collections.abc import Iterator

from torch import nn

from jaxnets import torch_nets


class TinyTorch(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        torch_nets.add_pairs(self, torch_nets.conv(3, 8, 3, 2), torch_nets.conv(8, 8, 3, groups=8))
        self.linear = nn.Linear(8, num_classes)

    def forward(self, x):
        for number in (1, 2):
            x = torch_nets.relu(torch_nets.apply_pair(self, number, x))
        return self.linear(x.mean((2, 3)))


@contextlib.contextmanager
def named_tiny() -> Iterator[None]:
    """Have `TinyTorch` be the PyTorch side of the net `tiny`."""
    torch_nets.NETS["tiny"] = TinyTorch
    try:
        yield
    finally:
        del torch_nets.NETS["tiny"]
