"""Training images made different every epoch: pure functions of (key, image), on the device.

One key per image, so that an image's fate does not depend on how many devices share its batch.
"""

import jax
import jax.numpy as jnp
from jax import lax


def random_crop(key, image, padding: int):
    """A crop of the original size from the image with `padding` black pixels around, `(H, W, C)`."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_flip(key, image):
    """The image, or its mirror image, with equal chance."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def cut_out(key, image, size: int):
    """A square of `size` pixels a side around a random pixel set to 0 (arXiv 1708.04552); clipped at the border."""
    height, width, _ = image.shape
    row_key, column_key = jax.random.split(key)
    top = jax.random.randint(row_key, (), 0, height) - size // 2
    left = jax.random.randint(column_key, (), 0, width) - size // 2
    rows, columns = jnp.arange(height), jnp.arange(width)
    hole = ((rows >= top) & (rows < top + size))[:, None] & ((columns >= left) & (columns < left + size))
    return jnp.where(hole[:, :, None], 0, image)


def normalize(images, mean, std):
    """uint8 images `(..., C)` as float32 with the given per-channel mean and deviation, both of [0, 1] images."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def augment(key, image, *, mean, std, crop_padding: int = 4, flip: bool = True, cutout: int = 0):
    """One uint8 training image `(H, W, C)` cropped, flipped, normalised and cut out: float32, same shape."""
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    if crop_padding:
        image = random_crop(crop_key, image, crop_padding)
    if flip:
        image = random_flip(flip_key, image)
    image = normalize(image, mean, std)
    # After normalisation, so that the hole is the mean colour.
    return cut_out(cutout_key, image, cutout) if cutout else image
