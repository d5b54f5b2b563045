"""Every formulation against `lax.conv_general_dilated` or the plain formula, in value and gradient."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxnets import ops
from tests.slow import each_once

FORMULATIONS = [name for name in ops.FORMULATIONS if name != "native" or ops.native_library.available()]
PORTABLE = ("xla", "gpu")  # what they compute on a CPU is what they mean everywhere
SAME = ((1, 1), (1, 1))


def lax_conv(x, kernel, strides, padding, groups):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def random(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _value_and_gradients(function, arrays, dy, name):
    with ops.using(name):
        y, pull = jax.vjp(function, *arrays)
    return y, *pull(dy.astype(y.dtype))


def both(name, function, *arrays):
    """Value and gradients of `function` as the formulations `name` compute them, and as `reference` does in float64."""
    shape = jax.eval_shape(function, *arrays).shape
    dy = random(9, *shape)
    got = _value_and_gradients(function, arrays, dy, name)
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in arrays]
        expected = _value_and_gradients(function, wide, np.float64(dy), "reference")
    return got, expected


def assert_close(got, expected, tolerance=1e-5):
    """`tolerance` is relative to the largest value."""
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(np.float64(a), b, rtol=0, atol=tolerance * max(1, np.abs(b).max(initial=0)))


def convolution(strides, padding, groups):
    return lambda x, kernel: ops.conv(x, kernel, strides=strides, padding=padding, feature_group_count=groups)


@each_once({"portable": PORTABLE, "kernel_size, size": [(3, (7, 8)), (5, (8, 7)), (3, (2, 1))], "stride": [1, 2]})
def test_depthwise_convolution(portable, stride, kernel_size, size):
    pad = kernel_size // 2
    function = convolution((stride, stride), ((pad, pad), (pad, pad)), 3)
    # 11 images: one full group of the kernel gradient and a rest
    assert_close(*both(portable, function, random(0, 11, *size, 3), random(1, kernel_size, kernel_size, 1, 3)))


@each_once({"portable": PORTABLE, "kernel_size": [3, 5], "stride": [1, 2]})
def test_bfloat16_depthwise_convolution_rounds_once(portable, kernel_size, stride):
    pad = kernel_size // 2
    function = convolution((stride, stride), ((pad, pad), (pad, pad)), 4)
    x = jnp.asarray(random(0, 9, 9, 8, 4), jnp.bfloat16)
    kernel = jnp.asarray(random(1, kernel_size, kernel_size, 1, 4), jnp.bfloat16)
    got, expected = both(portable, function, x, kernel)
    assert all(a.dtype == jnp.bfloat16 for a in got)
    for a, b in zip(got, expected):
        # dy is rounded to bfloat16 too, which the kernel gradient, a sum of hundreds, averages out
        np.testing.assert_allclose(np.float64(a), b, rtol=2**-8, atol=2**-8 * np.abs(b).max() * 0.5)


@pytest.mark.parametrize("name", [*PORTABLE, "native"])
def test_bfloat16_average_pooling_rounds_once(name):
    """A ninth itself would be rounded to .1113."""
    if name == "native" and not ops.native_library.available():
        pytest.skip("no C++")
    x = jnp.asarray(random(0, 2, 8, 8, 5) + 3, jnp.bfloat16)
    with ops.using(name):
        got = ops.avg_pool(x, 3, strides=2, padding=((1, 1), (1, 1)))
    with ops.using("reference"):
        exact = ops.avg_pool(x.astype(jnp.float32), 3, strides=2, padding=((1, 1), (1, 1)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), exact, rtol=2**-8 * 1.001)  # half of the last of 8 bits


@settings(max_examples=10, deadline=None)
@given(
    portable=st.sampled_from(PORTABLE),
    batch=st.sampled_from([0, 1, 8, 17]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.tuples(st.integers(-1, 3), st.integers(-1, 3))] * 2),
    multiplier=st.sampled_from([1, 1, 2]),
)
def test_depthwise_convolution_of_any_geometry(portable, batch, size, kernel_size, strides, padding, multiplier):
    padding = tuple(p if n + sum(p) > 0 else (0, 0) for n, p in zip(size, padding))
    function = convolution(strides, padding, 2)
    assert_close(*both(portable, function, random(0, batch, *size, 2), random(1, *kernel_size, 1, 2 * multiplier)))


@each_once(
    {
        "portable": PORTABLE,
        "kernel_shape, stride, groups": [
            ((1, 1, 6, 4), 1, 1),
            ((1, 1, 6, 4), 2, 1),
            ((3, 3, 3, 8), 2, 1),  # patches
            ((3, 3, 6, 4), 2, 1),  # lax
            ((1, 1, 4, 6), 2, 3),
            ((3, 3, 2, 6), 1, 3),
            ((1, 1, 2, 20), 1, 10),  # many groups
            ((3, 3, 2, 20), 2, 10),
        ],
    }
)
def test_other_convolutions(portable, kernel_shape, stride, groups):
    pad = kernel_shape[0] // 2
    function = convolution((stride, stride), ((pad, pad), (pad, pad)), groups)
    x, kernel = random(0, 3, 7, 8, kernel_shape[2] * groups), random(1, *kernel_shape)
    assert_close(*both(portable, function, x, kernel))
    got, _ = both(portable, function, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    expected = lax_conv(x, kernel, (stride, stride), ((pad, pad), (pad, pad)), groups)
    np.testing.assert_allclose(np.float32(got[0]), expected, atol=0.02 * np.abs(expected).max())


@each_once(
    {
        "name": FORMULATIONS,
        "function, kernel_shape, groups": [
            (ops.depthwise_conv, (3, 2, 1, 8), 4),
            (ops.pointwise_conv, (1, 1, 4, 3), 1),
            (functools.partial(ops.grouped_conv, feature_group_count=2), (3, 2, 2, 6), 2),
        ],
    }
)
def test_each_public_convolution_is_lax_convolution(name, function, kernel_shape, groups):
    x, kernel = random(0, 2, 5, 6, 4), random(1, *kernel_shape)
    options = {"strides": (2, 1)}
    padding = ((0, 0), (0, 0))
    if kernel_shape[:2] != (1, 1):
        options["padding"] = padding = ((1, 0), (0, 2))
    with ops.using(name):
        got = function(x, kernel, **options)
    np.testing.assert_allclose(got, lax_conv(x, kernel, (2, 1), padding, groups), atol=1e-5)


@each_once(
    {
        "portable": PORTABLE,
        "kernel_shape, groups": [((3, 3, 1, 4), 4), ((1, 1, 4, 4), 1), ((3, 3, 3, 4), 1), ((1, 1, 2, 4), 2)],
        "special": [np.nan, np.inf],
    }
)
def test_nan_and_infinity_reach_what_they_reach_in_lax(portable, kernel_shape, groups, special):
    x = random(0, 2, 6, 5, kernel_shape[2] * groups)
    x[1, 2, 3, 1] = special
    kernel, pad = random(1, *kernel_shape), kernel_shape[0] // 2
    with ops.using(portable):
        got = convolution((1, 1), ((pad, pad), (pad, pad)), groups)(x, kernel)
    np.testing.assert_allclose(got, lax_conv(x, kernel, (1, 1), ((pad, pad), (pad, pad)), groups), atol=1e-5)


@each_once(
    {
        "portable": PORTABLE,
        "kernel_shape, groups": [((3, 3, 1, 4), 4), ((1, 1, 4, 5), 1), ((3, 3, 3, 4), 1), ((1, 1, 2, 4), 2)],
    }
)
def test_empty_batches(portable, kernel_shape, groups):
    got, expected = both(
        portable,
        convolution((2, 2), SAME if kernel_shape[0] == 3 else ops.NO_PADDING, groups),
        random(0, 0, 6, 5, kernel_shape[2] * groups),
        random(1, *kernel_shape),
    )
    assert_close(got, expected)


NO_MAPS = [
    ((1, 2, 2, 3), (5, 5, 3, 4), 0, 1),  # a kernel larger than the image
    ((1, 4, 4, 0), (1, 1, 0, 8), 0, 1),
    ((1, 4, 4, 8), (1, 1, 8, 0), 0, 1),
    ((1, 8, 8, 0), (3, 3, 0, 4), 1, 1),
    ((1, 4, 0, 8), (3, 3, 1, 8), 2, 8),
]


@pytest.mark.parametrize("name", [*PORTABLE, "native"])
@pytest.mark.parametrize(("shape", "kernel_shape", "pad", "groups"), NO_MAPS)
def test_no_channels_no_image_or_no_outputs(name, shape, kernel_shape, pad, groups):
    if name == "native" and not ops.native_library.available():
        pytest.skip("no C++")
    function = convolution((1, 1), ((pad, pad), (pad, pad)), groups)
    got, expected = both(name, function, random(0, *shape), random(1, *kernel_shape))
    assert_close(got, expected)


def normalisation(bounds):
    return lambda x, scale, bias: ops.batch_norm(x, scale, bias, bounds=bounds)[0]


@each_once({"portable": PORTABLE, "bounds": [ops.UNBOUNDED, (0.0, float("inf")), (0.0, 6.0), (-0.5, 0.5)]})
def test_batch_norm(portable, bounds):
    x = 3 * random(0, 4, 5, 6, 7) + random(1, 7)
    assert_close(*both(portable, normalisation(bounds), x, 2 * random(2, 7), random(3, 7)))
    with ops.using(portable):
        _, mean, var = ops.batch_norm(x, random(2, 7), random(3, 7), bounds=bounds)
    np.testing.assert_allclose(mean, np.float64(x).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(var, np.float64(x).var((0, 1, 2)), rtol=1e-5)


@each_once({"portable": PORTABLE, "mean, std": [(1e4, 1.0), (-1e6, 1.0), (3e3, 1e-2)]})
def test_batch_norm_of_a_large_mean_and_small_variance(portable, mean, std):
    x = (mean + std * random(0, 8, 9, 9, 3)).astype(np.float32)
    x[0, 0, 0] = 0.0  # and an outlier, as the corner of an image with a frame has
    assert_close(*both(portable, normalisation((0.0, 6.0)), x, 1 + random(1, 3), random(2, 3)), tolerance=1e-5)


@settings(max_examples=8, deadline=None)
@given(
    portable=st.sampled_from(PORTABLE),
    shape=st.sampled_from([(1, 1, 2, 3), (2, 1, 1, 3), (9, 4, 3, 2)]),
    log_scale=st.floats(-4, 4),
    offset=st.floats(-1e3, 1e3),
)
def test_batch_norm_of_any_scale(portable, shape, log_scale, offset):
    x = (10**log_scale * random(0, *shape) + offset).astype(np.float32)
    function, vectors = normalisation((0.0, 6.0)), (random(1, shape[-1]), random(2, shape[-1]))
    assert_close(*both(portable, function, x, *vectors), tolerance=1e-4)


@pytest.mark.parametrize("portable", PORTABLE)
def test_bfloat16_batch_norm_has_float32_statistics(portable):
    x = jnp.asarray(random(0, 64, 8, 8, 4) + 3, jnp.bfloat16)
    with ops.using(portable):
        y, mean, var = ops.batch_norm(x, np.ones(4, np.float32), np.zeros(4, np.float32))
    wide = np.float64(x)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(var, wide.var((0, 1, 2)), rtol=1e-5)
    expected = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(np.float64(y), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_batch_statistics_pass_no_gradient(name):
    def total(x):
        _, mean, var = ops.batch_norm(x, np.ones(3, np.float32), np.zeros(3, np.float32))
        return mean.sum() + var.sum()

    with ops.using(name):
        assert not np.any(jax.grad(total)(random(0, 2, 3, 3, 3)))


@each_once({"portable": PORTABLE, "special": [np.nan, np.inf]})
def test_batch_norm_spoils_only_the_channel_with_nan_or_infinity(portable, special):
    x = random(0, 2, 3, 4, 3)
    x[1, 2, 0, 1] = special
    with ops.using(portable):
        y, mean, var = ops.batch_norm(x, np.ones(3, np.float32), np.zeros(3, np.float32), bounds=(0.0, 6.0))
    assert np.isnan(y[..., 1]).all() and not np.isfinite(mean[1]) and np.isnan(var[1])
    assert np.isfinite(y[..., ::2]).all()


@pytest.mark.parametrize("bounds", [(0.0, float("inf")), (0.0, 6.0)])
@pytest.mark.parametrize("name", FORMULATIONS)
def test_no_gradient_at_the_bounds(name, bounds):
    # A channel with scale 0 is at the bound everywhere; as torch's relu, it passes nothing on.
    x = random(0, 2, 3, 3, 1)
    with ops.using(name):
        grads = jax.grad(lambda *a: normalisation(bounds)(*a).sum(), (0, 1, 2))(
            x, np.zeros(1, np.float32), np.zeros(1, np.float32)
        )
    assert not any(np.any(g) for g in grads)


@each_once({"portable": PORTABLE, "groups, channels": [(2, 4), (3, 12), (4, 4), (1, 5)]})
def test_channel_shuffle(portable, groups, channels):
    x = random(0, 2, 3, 4, channels)
    got, expected = both(portable, lambda x: ops.channel_shuffle(x, groups), x)
    assert_close(got, expected, tolerance=1e-7)
    for g, i in itertools.product(range(groups), range(channels // groups)):
        np.testing.assert_array_equal(got[0][..., i * groups + g], x[..., g * (channels // groups) + i])


def test_bad_arguments_are_refused():
    x = random(0, 1, 4, 4, 6)
    with pytest.raises(ValueError, match="does not fit an input with 6 channels"):
        ops.conv(x, random(1, 3, 3, 5, 8))
    with pytest.raises(ValueError, match="does not fit"):
        ops.conv(x, random(1, 1, 1, 2, 8), feature_group_count=3)
    with pytest.raises(ValueError, match="one dtype"):
        ops.depthwise_conv(x, random(1, 3, 3, 1, 6).astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="1x1"):
        ops.pointwise_conv(x, random(1, 3, 3, 6, 8))
    with pytest.raises(ValueError, match=r"\(N, H, W, C\)"):
        ops.conv(x[0], random(1, 1, 1, 6, 8))
    with pytest.raises(ValueError, match="4 groups must divide the 6 channels"):
        ops.channel_shuffle(x, 4)


def test_choice_of_formulation(monkeypatch):
    monkeypatch.delenv("JAXNETS_OPS", raising=False)
    with monkeypatch.context() as without_a_compiler:
        without_a_compiler.setattr(ops.native_library, "available", lambda: False)
        assert ops.formulation() == ("xla" if jax.default_backend() == "cpu" else "gpu")
    with monkeypatch.context() as with_one:
        with_one.setattr(ops.native_library, "available", lambda: True)
        assert ops.formulation() == ("native" if jax.default_backend() == "cpu" else "gpu")
    monkeypatch.setenv("JAXNETS_OPS", "reference")
    assert ops.formulation() == "reference"
    with ops.using("xla"):
        assert ops.formulation() == "xla"
        with ops.using("reference"):
            assert ops.formulation() == "reference"
        assert ops.formulation() == "xla"
    assert ops.formulation() == "reference"
    with (
        pytest.raises(ValueError, match="ops.using must be one of reference, xla, native, gpu, not 'fast'"),
        ops.using("fast"),
    ):
        pass
    monkeypatch.setenv("JAXNETS_OPS", "fast")
    with pytest.raises(ValueError, match="JAXNETS_OPS must be one of reference, xla, native, gpu, not 'fast'"):
        ops.conv(random(0, 1, 4, 4, 2), random(1, 1, 1, 2, 2))


def test_the_choice_changes_what_is_compiled():
    def text():  # a new function each time: jit remembers what it traced
        function = lambda x, k: ops.depthwise_conv(x, k, padding=SAME)  # noqa: E731
        return jax.jit(function).lower(random(0, 1, 4, 4, 2), random(1, 3, 3, 1, 2)).as_text()

    with ops.using("reference"):
        assert "stablehlo.convolution" in text()
    with ops.using("xla"):
        assert "stablehlo.convolution" not in text()
