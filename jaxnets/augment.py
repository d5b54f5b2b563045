"""Augmentation of training images, new every epoch: pure functions of (key, image), on the device.

One key per image, so that an image's augmentation does not depend on how many devices share its batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def random_crop(key, image, padding: int):
    """A random crop of the original size from the image padded with `padding` black pixels all around, `(H, W, C)`."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_flip(key, image):
    """The image, or its mirror image, with equal chance."""
    columns = jnp.arange(image.shape[1])
    # By index: choosing between two images would make XLA crop them pixel by pixel on the CPU, ten times slower.
    return jnp.take(image, jnp.where(jax.random.bernoulli(key), columns[::-1], columns), axis=1)


def cut_out(key, image, size: int):
    """The image with a square of side `size` around a random pixel set to 0 (arXiv 1708.04552), clipped at the edge."""
    height, width, _ = image.shape
    row_key, column_key = jax.random.split(key)
    top = jax.random.randint(row_key, (), 0, height) - size // 2
    left = jax.random.randint(column_key, (), 0, width) - size // 2
    rows, columns = jnp.arange(height), jnp.arange(width)
    hole = ((rows >= top) & (rows < top + size))[:, None] & ((columns >= left) & (columns < left + size))
    return jnp.where(hole[:, :, None], 0, image)


def mix_up(key, image, other, alpha: float):
    """The image blended with another (arXiv 1710.09412), and its share: float32 from Beta(alpha, alpha)."""
    share = jax.random.beta(key, alpha, alpha)
    return share * image + (1 - share) * other, share


def cut_mix(key, image, other, alpha: float):
    """The image with a box of another pasted in (arXiv 1905.04899, algorithm 1), and the share of it that is left.

    The box has the image's proportions, covers 1 - Beta(alpha, alpha) of it, and is clipped at the border.
    """
    height, width, _ = image.shape
    share_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))

    def inside(key, length):
        middle, half = jax.random.randint(key, (), 0, length), side * length / 2
        positions = jnp.arange(length)
        return (positions >= jnp.round(middle - half)) & (positions < jnp.round(middle + half))

    box = inside(row_key, height)[:, None] & inside(column_key, width)
    return jnp.where(box[:, :, None], other, image), 1 - box.mean(dtype=jnp.float32)


def mix(key, image, other, *, mixup: float = 0.0, cutmix: float = 0.0):
    """`mix_up` or `cut_mix`, whichever has an alpha, each with equal chance if both have: the image and its share."""
    choice_key, key = jax.random.split(key)
    if mixup and cutmix:
        blended, boxed = mix_up(key, image, other, mixup), cut_mix(key, image, other, cutmix)
        return jax.tree.map(lambda a, b: jnp.where(jax.random.bernoulli(choice_key), a, b), blended, boxed)
    return mix_up(key, image, other, mixup) if mixup else cut_mix(key, image, other, cutmix)


def progressive_pixels(sizes: Sequence[int | float], image_size: int) -> tuple[int, ...]:
    """`sizes` as sides in pixels: whole numbers as they are, floats as fractions of `image_size`."""
    return tuple(round(size * image_size) if isinstance(size, float) else size for size in sizes)


def progressive_size(sizes: Sequence[int | float], image_size: int, epoch: int, num_epochs: int) -> int:
    """Side in pixels of the training images of an epoch (from 0): `sizes` in equal shares of the run.

    The last epoch has the last size, even in a run with fewer epochs than `sizes`.
    """
    pixels = progressive_pixels(sizes, image_size)
    return pixels[-(-(epoch + 1) * len(pixels) // num_epochs) - 1] if pixels else image_size


def normalize(images, mean, std):
    """uint8 images `(..., C)` as float32, normalised by the per-channel mean and deviation of images in [0, 1]."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def augment(
    key, image, *, mean, std, crop_padding: int = 4, flip: bool = True, cutout: int = 0, size: int | None = None
):
    """One uint8 training image `(H, W, C)` cropped, flipped, normalised, cut out, and resized: float32 `(S, S, C)`.

    `size` S is the final side, reached by antialiased bilinear interpolation; None: the image is not resized.
    """
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    if crop_padding:
        image = random_crop(crop_key, image, crop_padding)
    if flip:
        image = random_flip(flip_key, image)
    image = normalize(image, mean, std)
    # After normalisation, so that the hole is the mean colour.
    image = cut_out(cutout_key, image, cutout) if cutout else image
    return resize(image, size) if size else image


def resize(image, size: int):
    """A float image `(H, W, C)` at `size` x `size` pixels, bilinear and antialiased."""
    if image.shape[:2] == (size, size):
        return image
    return jax.image.resize(image, (size, size, image.shape[-1]), "bilinear")
