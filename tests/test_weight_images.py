"""What images the weights of a file want: as the file says, as its code base has them, as is usual."""

import logging

import pytest

from jaxnets import torch_weights, weight_images
from jaxnets.errors import UserError
from jaxnets.models.mobilenet_v1 import MobileNetV1
from jaxnets.weights.layouts import LAYOUTS
from jaxnets.weights.weight_files import Images

MINE = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
TIMM, KUANGLIU = (LAYOUTS[MobileNetV1][name] for name in ("timm", "kuangliu"))


@pytest.mark.parametrize(
    ("name", "classes", "said", "layout", "expected"),
    [
        ("mobilenet_v1", 1000, None, None, weight_images.IMAGENET),
        ("mobilenet_v1", 1000, None, KUANGLIU, weight_images.IMAGENET),
        ("mobilenet_v1", 1000, None, TIMM, TIMM.normalization),
        ("mobilenet_v1", 1000, MINE, TIMM, MINE),
        ("mobilenet_v1_cifar", 10, None, KUANGLIU, weight_images.CIFAR10),
        ("mobilenet_v1_cifar", 100, None, KUANGLIU, weight_images.CIFAR100),
        ("mobilenet_v1_cifar", 10, None, TIMM, weight_images.CIFAR10),
    ],
)
def test_whoever_says_it_counts(name, classes, said, layout, expected, caplog):
    caplog.set_level(logging.INFO)
    published = torch_weights.Published({}, Images(said), layout)
    assert weight_images.normalization_of(name, classes, published) == expected
    images = weight_images.images_of(name, classes, published)
    cifar = name.endswith("cifar")
    assert images == Images(expected, 32 if cifar else 224, not cifar)
    assert ("as in the code base" in caplog.text) == (expected == TIMM.normalization)


def test_a_file_may_say_how_large_they_are_but_not_anything():
    published = torch_weights.Published({}, Images(None, 96, False))
    assert weight_images.images_of("mobilenet_v1", 1000, published) == Images(weight_images.IMAGENET, 96, False)
    with pytest.raises(UserError, match="the image_size that the weights want must be at most 4096 pixels, not 100000"):
        weight_images.images_of("mobilenet_v1", 1000, torch_weights.Published({}, Images(None, 100_000)))
