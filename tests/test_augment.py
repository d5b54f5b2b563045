"""Every augmentation by what it may and may not do to an image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import augment

SIDE = 8
IMAGE = np.random.default_rng(0).integers(1, 256, (SIDE, SIDE, 3), dtype=np.uint8)
KEYS = jax.random.split(jax.random.key(0), 400)


def test_crops_are_all_windows_of_the_padded_image():
    crops = np.asarray(jax.jit(jax.vmap(lambda key: augment.random_crop(key, IMAGE, 2)))(KEYS))
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[i : i + SIDE, j : j + SIDE].tobytes() for i in range(5) for j in range(5)}
    seen = {crop.tobytes() for crop in crops}
    assert seen == windows  # 400 draws of 25: each is missed with a chance of 1e-7


def test_flips_are_the_image_or_its_mirror_image_about_equally_often():
    flips = np.asarray(jax.jit(jax.vmap(lambda key: augment.random_flip(key, IMAGE)))(KEYS))
    mirrored = [(flip == IMAGE[:, ::-1]).all() for flip in flips]
    assert all(m or (flip == IMAGE).all() for m, flip in zip(mirrored, flips))
    assert 150 < sum(mirrored) < 250


@pytest.mark.parametrize("size", [1, 3, 4, SIDE])
def test_cutout_clears_one_square_clipped_at_the_border(size):
    image = jnp.ones((SIDE, SIDE, 3))
    images = np.asarray(jax.jit(jax.vmap(lambda key: augment.cut_out(key, image, size)))(KEYS))
    holes = images == 0
    assert (holes == holes[..., :1]).all()
    holes = holes[..., 0]
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    np.testing.assert_array_equal(holes.sum((1, 2)), heights * widths)
    assert heights.max() == size and heights.min() >= min(1, size // 2)
    assert (heights == widths).any() and holes.any(0).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3), st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3))
def test_normalize_is_torchvisions_to_tensor_and_normalize(mean, std):
    import torch
    from torchvision.transforms import v2

    theirs = v2.functional.normalize(torch.tensor(IMAGE.transpose(2, 0, 1)).float() / 255, mean, std)
    np.testing.assert_allclose(
        augment.normalize(IMAGE, mean, std), theirs.numpy().transpose(1, 2, 0), rtol=1e-5, atol=1e-5
    )


def test_an_image_with_everything_off_is_only_normalised():
    fields = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    plain = augment.augment(KEYS[0], IMAGE, **fields, crop_padding=0, flip=False)
    np.testing.assert_array_equal(plain, augment.normalize(IMAGE, **fields))
    assert plain.dtype == jnp.float32


def test_augment_depends_on_the_key_alone():
    call = jax.jit(lambda key: augment.augment(key, IMAGE, mean=(0.5,) * 3, std=(0.5,) * 3, cutout=3))
    np.testing.assert_array_equal(call(KEYS[1]), call(KEYS[1]))
    assert not np.array_equal(call(KEYS[1]), call(KEYS[2]))
