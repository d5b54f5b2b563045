"""Every augmentation by what it may and may not do to an image."""

import functools

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
    torch = pytest.importorskip("torch")
    v2 = pytest.importorskip("torchvision.transforms.v2")

    theirs = v2.functional.normalize(torch.tensor(IMAGE.transpose(2, 0, 1)).float() / 255, mean, std)
    np.testing.assert_allclose(
        augment.normalize(IMAGE, mean, std), theirs.numpy().transpose(1, 2, 0), rtol=1e-5, atol=1e-5
    )


def test_an_image_with_everything_off_is_only_normalised():
    fields = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    plain = augment.augment(KEYS[0], IMAGE, **fields, crop_padding=0, flip=False)
    np.testing.assert_array_equal(plain, augment.normalize(IMAGE, **fields))
    assert plain.dtype == jnp.float32


def test_another_key_augments_otherwise():
    call = jax.jit(lambda key: augment.augment(key, IMAGE, mean=(0.5,) * 3, std=(0.5,) * 3, cutout=3))
    assert not np.array_equal(call(KEYS[1]), call(KEYS[2]))


def test_resize_is_pils_antialiased_bilinear_filter():
    from PIL import Image

    resized = augment.resize(IMAGE.astype(np.float32), 5)
    theirs = np.asarray(Image.fromarray(IMAGE).resize((5, 5), Image.Resampling.BILINEAR), np.float32)
    assert np.abs(resized - theirs).max() <= 1.01  # PIL rounds between its two passes
    np.testing.assert_array_equal(augment.resize(IMAGE, SIDE), IMAGE)


def test_augment_resizes_what_it_augmented():
    fields = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "cutout": 4}
    full = augment.augment(KEYS[0], IMAGE, **fields)
    np.testing.assert_array_equal(augment.augment(KEYS[0], IMAGE, **fields, size=5), augment.resize(full, 5))


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (1, [32]),
        (2, [16, 32]),
        (4, [16, 16, 24, 32]),
        (6, [16, 16, 16, 24, 32, 32]),
        (8, [16] * 4 + [24] * 2 + [32] * 2),
    ],
)
def test_progressive_sizes_grow_in_equal_shares_to_the_last_ones(epochs, expected):
    assert [augment.progressive_size((16, 16, 24, 32), 99, epoch, epochs) for epoch in range(epochs)] == expected


def test_parts_are_of_the_size_that_is_evaluated():
    assert augment.progressive_pixels((0.5, 0.75, 1.0), 32) == (16, 24, 32)
    assert augment.progressive_pixels((0.1, 0.5, 1.0), 15) == (2, 8, 15)
    assert augment.progressive_size((0.5, 1.0), 64, 0, 2) == 32


@given(st.lists(st.integers(8, 64), min_size=1, max_size=5, unique=True), st.integers(1, 200))
def test_shares_of_progressive_sizes_differ_by_an_epoch_at_most_and_end_with_the_last(sizes, epochs):
    made = [augment.progressive_size(sizes, 99, epoch, epochs) for epoch in range(epochs)]
    counts = [made.count(size) for size in sizes]
    assert max(counts) - min(counts) <= 1 and made[-1] == sizes[-1]
    assert made == [size for size, count in zip(sizes, counts) for _ in range(count)]  # in their order
    assert augment.progressive_size((), 99, 0, epochs) == 99


ONES, ZEROS = jnp.ones((SIDE, SIDE, 3)), jnp.zeros((SIDE, SIDE, 3))


@functools.cache
def jitted(function, alpha):
    """Of one pair of images, with every key."""
    return jax.jit(jax.vmap(functools.partial(function, alpha=alpha), in_axes=(0, None, None)))


def mixed(function, alpha, image=ONES, other=ZEROS):
    images, shares = jitted(function, alpha)(KEYS, image, other)
    return np.asarray(images), np.asarray(shares)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_blends_by_a_share_of_the_beta_distribution(alpha):
    images, shares = mixed(augment.mix_up, alpha)
    np.testing.assert_allclose(images, np.broadcast_to(shares[:, None, None, None], images.shape), rtol=1e-6)
    assert shares.min() >= 0 and shares.max() <= 1
    assert shares.mean() == pytest.approx(0.5, abs=0.08)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)  # of Beta(alpha, alpha)
    first = mixed(augment.mix_up, alpha, jnp.asarray(IMAGE, jnp.float32), 7 * ONES)[0][0]
    np.testing.assert_allclose(first, shares[0] * IMAGE + (1 - shares[0]) * 7, rtol=1e-4)


def test_cutmix_pastes_one_box_and_says_what_is_left():
    images, shares = mixed(augment.cut_mix, 1.0)
    assert set(np.unique(images)) == {0.0, 1.0} and (images == images[..., :1]).all()
    pasted = images[..., 0] == 0
    heights, widths = pasted.any(2).sum(1), pasted.any(1).sum(1)
    np.testing.assert_array_equal(pasted.sum((1, 2)), heights * widths)
    np.testing.assert_allclose(shares, 1 - pasted.mean((1, 2)), atol=1e-6)
    assert pasted.any(0).all() and shares.min() < 0.5 and (shares > 0.9).any()
    # As wide as high, unless the border cuts it: alpha 1 draws all areas alike.
    inner = (heights < SIDE) & (widths < SIDE) & ~pasted[:, [0, -1]].any((1, 2)) & ~pasted[:, :, [0, -1]].any((1, 2))
    assert inner.any() and np.abs(heights - widths)[inner].max() <= 1


def test_mix_chooses_evenly_where_both_are_on():
    def call(key):
        return augment.mix(key, ONES, ZEROS, mixup=1.0, cutmix=1.0)[0]

    images = np.asarray(jax.jit(jax.vmap(call))(KEYS))
    boxed = np.isin(images, (0.0, 1.0)).all((1, 2, 3))
    assert 150 < boxed.sum() < 250
    only = np.asarray(jax.jit(jax.vmap(lambda key: augment.mix(key, ONES, ZEROS, mixup=1.0)[0]))(KEYS[:50]))
    assert not np.isin(only, (0.0, 1.0)).all((1, 2, 3)).any()
