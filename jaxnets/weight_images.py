"""What images a net with the weights of a file expects: as the file says, else as its code base, else as usual."""

import logging

from jaxnets import settings, torch_weights
from jaxnets.errors import UserError
from jaxnets.models import default_image_size
from jaxnets.weights.layout_names import own_names
from jaxnets.weights.weight_files import Images, Normalization, spelled

# Per channel, of images in [0, 1]: mean and standard deviation with which published weights were trained
IMAGENET: Normalization = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10: Normalization = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100: Normalization = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)

logger = logging.getLogger(__name__)


def images_of(name: str, num_classes: int, published: torch_weights.Published) -> Images:
    """What the images are for the net `name` with weights of a file and `num_classes` classes.

    UserError if they are larger than nets take.
    """
    side = default_image_size(name)
    said = published.images
    check_image_size(said.image_size or side, "the image_size that the weights want")
    crop = side != 32 if said.crop is None else said.crop
    normalization = normalization_of(name, num_classes, published)
    if normalization not in (said.normalization, IMAGENET, CIFAR10, CIFAR100):
        logger.info("images are normalised as in the code base of these weights: %s", spelled(normalization))
    return Images(normalization, said.image_size or side, crop)


def normalization_of(name: str, num_classes: int, published: torch_weights.Published) -> Normalization:
    """Mean and deviation by channel, of images in [0, 1], for the net `name` with weights of a file."""
    if published.images.normalization:
        return published.images.normalization
    if default_image_size(name) == 32:
        return CIFAR100 if num_classes == 100 else CIFAR10
    return published.layout and published.layout.normalization or IMAGENET


def known_normalization(name: str, num_classes: int, published: torch_weights.Published) -> Normalization | None:
    """`normalization_of` if the file or its code base says it; None for our own names or an unknown code base."""
    named = published.layout and published.layout.names is not own_names
    return normalization_of(name, num_classes, published) if published.images.normalization or named else None


def check_image_size(size: int, what: str) -> None:
    """UserError for images that are too large."""
    if size > (most := settings.LIMITS["image_size"]):
        raise UserError(f"{what} must be at most {most} pixels, not {str(size):.20}")
