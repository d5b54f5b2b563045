"""Published weights: ours and PyTorch's nets say the same of real images, and it makes sense."""

import csv
import functools

import jax
import numpy as np
import pytest
import torch
import torchvision

import jaxnets
from jaxnets import data, image_files, torch_nets, torch_weights
from tests.parity_cases import to_torch

IMAGENET = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
CIFAR = np.array([0.4914, 0.4822, 0.4465], np.float32), np.array([0.2023, 0.1994, 0.2010], np.float32)


def normalised(pixels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float32) / 255 - mean) / std


def logits_of_both(name: str, net: torch.nn.Module, weights, images: np.ndarray, batch: int, batches: int):
    """Ours of all images, and PyTorch's of the first batches."""
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    ours = functools.partial(jax.jit(jaxnets.create_model(name).apply), torch_weights.load(name, weights))
    parts = np.split(images, len(images) // batch)
    with torch.no_grad():
        theirs = torch.cat([net.eval()(to_torch(part)) for part in parts[:batches]]).numpy()
    return np.concatenate([ours(part) for part in parts]), theirs


@pytest.mark.slow
def test_squeezenet_on_photographs(shared_dir):
    weights = shared_dir / "weights" / "squeezenet1_1_torchvision_fp16src.pth"
    rows = list(csv.DictReader((shared_dir / "photos" / "labels.csv").open()))
    files = [shared_dir / "photos" / row["file"] for row in rows]
    pixels = np.stack([image_files.resize_and_crop(image_files.read(str(file)), 224) for file in files])
    images = normalised(pixels, *IMAGENET)
    ours, theirs = logits_of_both("squeezenet1_1", torchvision.models.squeezenet1_1(), weights, images, 10, 2)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    labels = np.array([int(row["imagenet_index"]) for row in rows])
    # Of ImageNet's validation set the net knows 58 %, and 81 % among its five best.
    assert (ours.argmax(-1) == labels).mean() >= 0.5
    assert (np.argsort(ours)[:, -5:] == labels[:, None]).any(-1).mean() >= 0.8


def test_shufflenet_on_cifar10(shared_dir):
    weights = next((shared_dir / "weights").glob("cifar10_shufflenetv2_x0_5*.pt"))
    split = data.open_split("cifar10", "test[:500]", shared_dir / "tensorflow_datasets", image_size=32)
    batch = data.decode(split, progress=False)
    images = normalised(batch["image"], *CIFAR)
    net = torch_nets.shufflenet_v2_cifar("x0_5")
    ours, theirs = logits_of_both("shufflenet_v2_x0_5_cifar", net, weights, images, 250, 2)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))
    # How many it is of more images, tests/test_convert.py has.
    assert (ours.argmax(-1) == batch["label"]).mean() >= 0.8
