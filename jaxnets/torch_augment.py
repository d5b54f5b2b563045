"""Augmentation on PyTorch's device, as `augment` does it on JAX's: the same distributions, other draws."""

import functools

import ml_collections
import torch
import torch.nn.functional as F


def normalize(images: torch.Tensor, config: ml_collections.ConfigDict) -> torch.Tensor:
    """uint8 images `(N, 3, H, W)` as float32, normalised by the run's mean and standard deviation."""
    mean, std = (by_channel(tuple(value), images.device) for value in (config.mean, config.std))
    return (images.float() / 255 - mean) / std


@functools.cache
def by_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The values on a device, `(1, C, 1, 1)`; copied once, since a copy waits for all work queued on the device."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def augment(images: torch.Tensor, config: ml_collections.ConfigDict, size: int) -> torch.Tensor:
    """uint8 images `(N, 3, H, W)` cropped, mirrored, normalised, cut out and resized, `(N, 3, S, S)`.

    As in `augment.augment`; draws from PyTorch's generator for the images' device.
    """
    count, _, height, width = images.shape
    device, padding = images.device, config.augment.crop_padding
    top, left = torch.randint(2 * padding + 1, (2, count, 1), device=device)
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    if config.augment.flip:
        columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    if padding or config.augment.flip:
        which = torch.arange(count, device=device)[:, None, None]
        padded = F.pad(images, (padding,) * 4)
        images = padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    images = normalize(images, config)
    if config.augment.cutout:
        images = cut_out(images, config.augment.cutout)
    if (size, size) == (height, width):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def cut_out(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images `(N, C, H, W)` with a square of each set to 0, as in `augment.cut_out`."""

    def inside(length):
        first = torch.randint(length, (len(images), 1), device=images.device) - size // 2
        positions = torch.arange(length, device=images.device)
        return (positions >= first) & (positions < first + size)

    height, width = images.shape[2:]
    hole = inside(height)[:, :, None] & inside(width)[:, None, :]
    return images.masked_fill(hole[:, None], 0)
