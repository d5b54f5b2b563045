"""Every formulation against `lax.conv_general_dilated` or the plain formula, in value and gradient."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxnets import ops
from tests.kernels import NATIVE
from tests.slow import each_once, mark_slow

FORMULATIONS = [name for name in ops.FORMULATIONS if name != "native" or ops.native_library.available()]
COMPARED = [name for name in FORMULATIONS if name != "reference"]
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


@pytest.mark.parametrize("name", [*PORTABLE, NATIVE])
def test_bfloat16_average_pooling_rounds_once(name):
    """A ninth itself would be rounded to .1113."""
    x = jnp.asarray(random(0, 2, 8, 8, 5) + 3, jnp.bfloat16)
    with ops.using(name):
        got = ops.avg_pool(x, 3, strides=2, padding=((1, 1), (1, 1)))
    with ops.using("reference"):
        exact = ops.avg_pool(x.astype(jnp.float32), 3, strides=2, padding=((1, 1), (1, 1)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), exact, rtol=2**-8 * 1.001)  # half of the last of 8 bits


@pytest.mark.parametrize("kernel_shape", [(1, 5, 2, 3), (1, 5, 1, 2)])
@pytest.mark.parametrize("padding", [(-1, 1), (1, -1), (-1, -1), (5, 0), (0, 6)])
def test_what_is_cropped_is_cropped(kernel_shape, padding):
    """Against the image cropped and padded by hand, for every set of formulations and their gradients."""
    x, kernel = random(0, 1, 2, 8, 2), random(1, *kernel_shape)
    groups, (low, high) = 2 // kernel_shape[2], padding

    def convolve(x, kernel, padding):
        return ops.conv(x, kernel, padding=((0, 0), padding), feature_group_count=groups)

    def by_hand(x, kernel):
        x = x[:, :, max(-low, 0) : 8 - max(-high, 0)]
        return convolve(jnp.pad(x, ((0, 0), (0, 0), (max(low, 0), max(high, 0)), (0, 0))), kernel, (0, 0))

    def outputs(function):
        def both(x, kernel):
            y, vjp = jax.vjp(function, x, kernel)
            return y, *vjp(jnp.asarray(random(2, *y.shape)))

        return jax.jit(both)(x, kernel)

    with ops.using("xla"):
        expected = outputs(by_hand)
    for name in ("reference", *PORTABLE):
        with ops.using(name):
            assert_close(outputs(lambda x, kernel: convolve(x, kernel, padding)), expected)


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


@pytest.mark.parametrize("name", [*PORTABLE, NATIVE])
@pytest.mark.parametrize(("shape", "kernel_shape", "pad", "groups"), NO_MAPS)
def test_no_channels_no_image_or_no_outputs(name, shape, kernel_shape, pad, groups):
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
        assert not np.any(jax.jit(jax.grad(total))(random(0, 2, 3, 3, 3)))


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
        gradients = jax.jit(jax.grad(lambda *a: normalisation(bounds)(*a).sum(), (0, 1, 2)))
        grads = gradients(x, np.zeros(1, np.float32), np.zeros(1, np.float32))
    assert not any(np.any(g) for g in grads)


@each_once({"portable": PORTABLE, "groups, channels": [(2, 4), (3, 12), (4, 4), (1, 5)]})
def test_channel_shuffle(portable, groups, channels):
    x = random(0, 2, 3, 4, channels)
    got, expected = both(portable, lambda x: ops.channel_shuffle(x, groups), x)
    assert_close(got, expected, tolerance=1e-7)
    for g, i in itertools.product(range(groups), range(channels // groups)):
        np.testing.assert_array_equal(got[0][..., i * groups + g], x[..., g * (channels // groups) + i])


IMAGE, VECTOR, BOUNDS = random(0, 2, 8, 8, 4), random(1, 4), (0.0, 6.0)
GEOMETRY = {"strides": (1, 1), "padding": SAME}
POINTWISE = {"kernel": random(2, 1, 1, 4, 4), "strides": (1, 1), "padding": ops.NO_PADDING, "feature_group_count": 1}
RIGHT = {
    "conv": {"x": IMAGE, "kernel": random(2, 3, 3, 4, 4), **GEOMETRY, "feature_group_count": 1},
    "depthwise_conv": {"x": IMAGE, "kernel": random(2, 3, 3, 1, 4), **GEOMETRY},
    "pointwise_conv": {"x": IMAGE, "kernel": random(2, 1, 1, 4, 4), "strides": (1, 1)},
    "grouped_conv": {"x": IMAGE, "kernel": random(2, 1, 1, 2, 4), **GEOMETRY, "feature_group_count": 2},
    "batch_norm": {"x": IMAGE, "scale": VECTOR, "bias": VECTOR, "bounds": BOUNDS},
    "conv_batch_norm": {"x": IMAGE, **POINTWISE, "scale": VECTOR, "bias": VECTOR, "bounds": BOUNDS, "shuffle": 2},
    "conv_affine": {"x": IMAGE, **POINTWISE, "gain": VECTOR, "bias": VECTOR, "bounds": BOUNDS, "shuffle": 2},
    "conv_bias": {"x": IMAGE, **POINTWISE, "bias": VECTOR, "bounds": BOUNDS},
    "add": {"x": IMAGE, "y": IMAGE, "bounds": BOUNDS},
    "max_pool": {"x": IMAGE, "window": 3, "strides": 2, "padding": SAME},
    "avg_pool": {"x": IMAGE, "window": 3, "strides": 2, "padding": SAME},
    "concatenate": {"parts": (IMAGE, IMAGE)},
    "concatenate_shuffle": {"x": IMAGE, "y": IMAGE},
    "halves": {"x": IMAGE},
    "channel_shuffle": {"x": IMAGE, "groups": 2},
}


def call(function, **changed):
    """Of the right arguments but for what is changed."""
    arguments = {**RIGHT[function], **changed}
    if "kernel" in arguments and "bias" in arguments:
        arguments["convolution"] = ops.Convolution(*(arguments.pop(field) for field in ops.Convolution._fields))
    return getattr(ops, function)(**arguments)


def wrong_of_one_argument():
    """For each, whatever function has it: wrong values, and what the error says of them."""
    vectors = [(random(0, *n), f" must be (4,), not {n}") for n in [(1,), (2,), (8,), (1, 4), (2, 8, 8, 4), ()]]
    vectors.append((np.ones(4, np.int32), " must be of a floating dtype, not int32"))
    counts = [(n, " must be an integer of at least 1, not ") for n in (0, -1, 2.0, (2, 2), None)]
    groups = [*counts, (3, "3 groups must divide the 4 channels")]
    bounds = [(6.0, 0.0), 6.0, (0.0, float("nan")), (0.0, 1.0, 6.0), (None, 6.0), "ab"]
    paddings = ["SAME", 1, (1, 1), ((1, 1),), ((1, 1), (1, 1.5)), ((1, 1, 1), (1, 1, 1))]
    return {
        **dict.fromkeys(("scale", "gain", "bias"), vectors),
        **dict.fromkeys(("groups", "shuffle"), groups),
        "feature_group_count": [*counts, (3, "does not fit an input with 4 channels")],
        "window": [*counts, (11, "a window of 11x11 must fit an image x (2, 8, 8, 4) with padding ((1, 1), (1, 1))")],
        "bounds": [(b, "bounds must be (low, high), low no greater than high, not ") for b in bounds],
        "padding": [(p, "padding must be ((top, bottom), (left, right)), integers") for p in paddings],
    }


def wrong_of_a_convolution(kernel):
    *sides, inputs, outputs = kernel.shape
    strides = [2, (2,), (0, 1), (1, -1), (1.0, 1.0), (1, 1, 1), "SAME"]
    return [
        *(("strides", s, "strides must be (down, across), integers of at least 1, not ") for s in strides),
        ("padding", ((-5, -4), (0, 0)), "must not crop more than there is of an image x (2, 8, 8, 4)"),
        ("kernel", random(0, 3, 4, 4), "kernel must be (h, w, I, O), not (3, 4, 4)"),
        ("kernel", random(0, 0, 3, inputs, outputs), "must have a height and a width, not be (0, 3,"),
        ("kernel", random(0, *sides, inputs + 1, outputs), "does not fit an input with 4 channels"),
        ("kernel", kernel.astype(jnp.bfloat16), "one dtype, not x float32 and kernel bfloat16"),
        ("x", random(0, 2, 8, 8, 5), "does not fit an input with 5 channels"),
        ("x", IMAGE.astype(jnp.bfloat16), "one dtype, not x bfloat16 and kernel float32"),
    ]


def wrong_of_one_function():
    integers = np.ones((2, 8, 8, 4), np.int32), "x must be of a floating dtype, not int32"
    cropped = ((0, 0), (-1, 0)), "integers of at least 0, not ((0, 0), (-1, 0))"
    others = [(random(0, *n), f"C), not {n}") for n in ((1, 8, 8, 4), (2, 4, 8, 4), (2, 8, 1, 4), (8, 4))]
    terms = [(n, random(0, *n), "must broadcast to one shape, not be ") for n in ((3,), (2, 8, 4, 4), (3, 8, 8, 4))]
    pooling = [("x", *integers), ("padding", *cropped), *(("strides", n, "an integer") for n in (0, (2, 2), 2.0))]
    return {
        "depthwise_conv": [("x", random(0, 2, 8, 8, 0), "feature_group_count must be an integer of at least 1, not 0")],
        "pointwise_conv": [("kernel", random(0, 3, 3, 4, 4), "must be 1x1, not (3, 3, 4, 4)"), ("x", *integers)],
        "grouped_conv": [("kernel", random(0, 1, 1, 2, 5), "groups that divide its 5 outputs")],
        "batch_norm": [("x", *integers), ("x", random(0, 2, 8, 8, 3), "scale must be (3,), not (4,)")],
        "add": [
            *(("x", x, f"{message}{n} and (2, 8, 8, 4)") for n, x, message in terms),
            *(("y", y, f"{message}(2, 8, 8, 4) and {n}") for n, y, message in terms),
            ("x", *integers),
        ],
        "max_pool": pooling,
        "avg_pool": pooling,
        "concatenate": [
            *(("parts", (IMAGE, other), message) for other, message in others),
            ("parts", (), "at least one array"),
            ("parts", IMAGE, "each part must be (N, H, W, C), not (8, 8, 4)"),
        ],
        "concatenate_shuffle": [
            *(("y", other, message) for other, message in others),
            ("y", IMAGE[..., :3], "2 groups must divide the 7 channels"),
        ],
        "halves": [("x", IMAGE[..., :3], "2 groups must divide the 3 channels")],
    }


def wrong_arguments(function):
    """An argument, a value that is wrong for it, and what the error says."""
    for argument, right in RIGHT[function].items():
        for value, message in wrong_of_one_argument().get(argument, ()):
            yield argument, value, message
        if argument == "kernel":
            yield from (wrong for wrong in wrong_of_a_convolution(right) if wrong[0] in RIGHT[function])
        if argument == "x" and function != "add":
            for shape in ((8, 4), (8, 8, 4), (1, 2, 8, 8, 4), ()):
                yield "x", random(0, *shape), f"x must be (N, H, W, C), not {shape}"
    yield from wrong_of_one_function().get(function, ())


@each_once({"name": FORMULATIONS, "function": RIGHT})
def test_wrong_arguments_are_refused_in_one_sentence(name, function):
    with ops.using(name):
        jax.tree.map(np.asarray, call(function))
        for argument, value, message in wrong_arguments(function):
            with pytest.raises(ValueError, match=re.escape(message)) as error:
                call(function, **{argument: value})
            assert "\n" not in str(error.value)


def lazily(kind, y):
    """y itself or, lazily where a formulation is lazy, what a layer makes of it."""
    convolution = ops.Convolution(y, jnp.eye(4)[None, None], (1, 1), ops.NO_PADDING, 1)
    bounds = (0.0, 1.0) if kind.endswith("clipped") else ops.UNBOUNDED
    if kind.startswith("normalized"):
        return ops.conv_batch_norm(convolution, jnp.ones(4), jnp.ones(4), bounds=bounds)[0]
    if kind.startswith("filtered"):
        return ops.conv_affine(convolution, jnp.ones(4), jnp.ones(4), bounds=bounds)
    return ops.conv_bias(convolution, jnp.ones(4), bounds=bounds) if kind == "biased" else y


LAZY = ["array", "biased", "filtered", "filtered, clipped", "normalized", "normalized, clipped"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 8, 8, 4), jnp.bfloat16)]
    + [(shape, np.float32) for shape in ((4,), (2, 1, 1, 4), (1, 8, 8, 4), (8, 1), (), (3, 2, 8, 8, 4))],
)
@pytest.mark.parametrize("kind", [kind if kind == "normalized" else mark_slow(kind) for kind in LAZY])
@pytest.mark.parametrize("name", COMPARED)
def test_sums_broadcast_and_promote(name, kind, shape, dtype):
    """The native kernel takes one shape and dtype: of another x it would read beyond the end."""

    def function(x, y):
        y = lazily(kind, y)
        return ops.add(x, y, bounds=BOUNDS) - 2 * ops.add(y, x, bounds=BOUNDS)

    got, expected = both(name, function, jnp.asarray(random(0, *shape), dtype), IMAGE)
    assert got[0].dtype == np.float32
    assert_close(got, expected, 1e-5 if dtype == np.float32 else 1e-2)  # the gradient of x is of x's dtype


# Only `native` is lazy.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        case if case[0] == "native" or case[1] == "array" else mark_slow(case)
        for case in itertools.product(FORMULATIONS, LAZY)
    ],
)
def test_what_is_lazy_is_refused_too(name, kind):
    with ops.using(name):
        y = lazily(kind, IMAGE)
        refused = [
            (
                lambda: ops.conv_bias(ops.Convolution(y, **POINTWISE), np.ones(2)),
                "(4,)",
            ),
            (lambda: ops.conv(y, random(0, 1, 1, 5, 4)), "does not fit"),
            (lambda: ops.add(random(0, 2, 8, 4, 4), y), "broadcast"),
            (lambda: ops.max_pool(y, 9, strides=1), "must fit"),
            (lambda: ops.concatenate([y, lazily(kind, IMAGE[:1])]), "(2, 8, 8, C)"),
            (lambda: ops.concatenate_shuffle(IMAGE[:, :4], y), "(2, 4, 8, C)"),
            (lambda: ops.channel_shuffle(y, 3), "divide"),
        ]
        for function, message in refused:
            with pytest.raises(ValueError, match=re.escape(message)):
                function()


OF_EMPTY_ARRAYS = {
    "batch_norm": lambda x: ops.batch_norm(x, jnp.ones(x.shape[3]), jnp.ones(x.shape[3]))[0],
    "max_pool": lambda x: ops.max_pool(x, 2, strides=2, padding=SAME),
    "avg_pool": lambda x: ops.avg_pool(x, 2, strides=2, padding=SAME),
    "channel_shuffle": lambda x: ops.channel_shuffle(x, 2),
    "concatenate_shuffle": lambda x: ops.concatenate_shuffle(x, x),
    "halves": lambda x: ops.concatenate(ops.halves(x)),
    "add": lambda x: ops.add(x, x, bounds=BOUNDS),
}


@each_once(
    {
        "name, function": itertools.product(COMPARED, OF_EMPTY_ARRAYS),
        "shape": [(2, 4, 4, 0), (2, 0, 4, 4), (0, 4, 4, 4)],
    }
)
def test_empty_arrays(name, function, shape):
    assert_close(*both(name, OF_EMPTY_ARRAYS[function], random(0, *shape)))


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
