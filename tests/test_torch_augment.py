"""PyTorch's images against ours: the same where nothing is drawn, else drawn as often."""

import collections

import jax
import numpy as np
import pytest
import torch

from jaxnets import augment, torch_augment
from tests.tiny_net import small_digits


@pytest.fixture
def config():
    """One that leaves images as they are."""
    config = small_digits()
    config.augment.crop_padding = 0
    return config


def test_without_draws_images_are_what_ours_are(config):
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    for size in (16, 8):
        found = torch_augment.augment(torch.from_numpy(images).permute(0, 3, 1, 2), config, size)
        expected = jax.vmap(
            lambda image, size=size: augment.augment(
                jax.random.key(0), image, mean=config.mean, std=config.std, crop_padding=0, flip=False, size=size
            )
        )(images)
        np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_images_are_cropped_and_mirrored_each_in_its_own_way(config):
    """Every image is one of all crops of itself or of its mirror image; and all of those come, equally often."""
    config.augment.flip, config.augment.crop_padding = True, 1
    image = np.random.default_rng(0).integers(1, 256, (3, 4, 4), np.uint8)
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    crops = [padded[:, top : top + 4, left : left + 4] for top in range(3) for left in range(3)]
    possible = torch.from_numpy(np.stack([crop[:, :, ::step] for crop in crops for step in (1, -1)]))
    torch.manual_seed(0)
    found = torch_augment.augment(torch.from_numpy(image).expand(1800, -1, -1, -1), config, 4)
    same = (found[:, None] == torch_augment.normalize(possible, config)).flatten(2).all(2)
    assert same.sum(1).eq(1).all()
    counts = same.sum(0)
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, 10 the deviation


def test_every_image_has_a_hole_of_the_mean_colour(config):
    config.augment.cutout = 4
    images = torch.full((32, 3, 16, 16), 255, dtype=torch.uint8)
    white = torch_augment.normalize(images, config)
    found = torch_augment.augment(images, config, 16)
    assert ((found == white) | (found == 0)).all()
    holes = (found == 0).sum((1, 2, 3)) // 3
    assert holes.min() >= 4 and holes.max() == 16  # a quarter of it where it hangs over a corner


def test_holes_are_the_same_as_ours_and_equally_often():
    torch.manual_seed(0)
    holes = torch_augment.cut_out(torch.ones(2000, 3, 5, 4), 3)
    assert (holes[:, 0] == holes[:, 1]).all() and (holes[:, 0] == holes[:, 2]).all()
    keys = jax.random.split(jax.random.key(0), 2000)
    ours = jax.vmap(augment.cut_out, in_axes=(0, None, None))(keys, np.ones((5, 4, 3), np.float32), 3)
    found, expected = (
        collections.Counter(hole.tobytes() for hole in np.asarray(h)) for h in (holes[:, 0], ours[..., 0])
    )
    assert found.keys() == expected.keys() and len(found) == 20  # one for each pixel in the middle
    assert min(found.values()) > 50 and max(found.values()) < 150  # 100 expected, 10 the deviation
