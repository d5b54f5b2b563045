"""What is computed together with a convolution, and around it: against the reference in float64, by formulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets import ops
from jaxnets.ops import ChannelSlice, Convolution, LazyBatchNorm, LazyBiasedConv, LazyConv
from tests.kernels import NATIVE, needs_kernels
from tests.slow import each_once, mark_slow

INF = float("inf")
FORMULATIONS = ["xla", NATIVE]
TRAINING = [*FORMULATIONS, "gpu"]  # which in evaluation computes what xla does
RELU, RELU6 = (0.0, INF), (0.0, 6.0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(name, function, arrays, dy):
    """The value alone, the value beside its gradients, and these."""

    @jax.jit
    def both(arrays, dy):
        y, pull = jax.vjp(lambda *arrays: jnp.asarray(function(*arrays)), *arrays)
        return jnp.asarray(function(*arrays)), y, *pull(dy.astype(y.dtype))

    with ops.using(name):
        return both(arrays, dy)


def compare_values(name, function, *arrays, tolerance=1e-5):
    """Values alone, within `tolerance` of the largest."""
    with ops.using(name):
        got = jax.jit(lambda *arrays: jnp.asarray(function(*arrays)))(*map(jnp.asarray, arrays))
    with jax.enable_x64(True), ops.using("reference"):
        wide = [jnp.asarray(a, jnp.float64) for a in arrays]
        expected = jax.jit(lambda *arrays: jnp.asarray(function(*arrays)))(*wide)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max(initial=0)))


def compare(name, function, *arrays, tolerance=1e-5):
    """Values, alone and beside their gradients, and these, within `tolerance` of the largest of each array."""
    with ops.using("reference"):
        shape = jax.eval_shape(lambda *arrays: jnp.asarray(function(*arrays)), *arrays).shape
    dy = normal(99, *shape)
    got = run(name, function, [jnp.asarray(a) for a in arrays], dy)
    with jax.enable_x64(True):
        expected = run("reference", function, [jnp.asarray(a, jnp.float64) for a in arrays], dy)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        np.testing.assert_allclose(g, e, rtol=0, atol=tolerance * max(1, np.abs(e).max(initial=0)))


def conv_bn(x, kernel, scale, bias, stride=1, groups=1, bounds=ops.UNBOUNDED):
    pad = (kernel.shape[0] - 1) // 2
    convolution = Convolution(x, kernel, (stride, stride), ((pad, pad),) * 2, groups)
    return ops.conv_batch_norm(convolution, scale, bias, bounds=bounds)[0]


def bottleneck(stride, bounds):
    """Expand, depthwise, project, and the input added where it fits: each BatchNorm is read by the next convolution."""

    def function(x, expand, depthwise, project, scale, bias, out_scale, out_bias):
        y = conv_bn(x, expand, scale, bias, bounds=bounds)
        y = conv_bn(y, depthwise, scale, bias, stride, y.shape[-1], bounds)
        y = conv_bn(y, project, out_scale, out_bias)
        return ops.add(x, y) if stride == 1 else y

    return function


def bottleneck_arrays(batch, height, width, channels, hidden, size=3):
    kernels = normal(1, 1, 1, channels, hidden), normal(2, size, size, 1, hidden), normal(3, 1, 1, hidden, channels)
    vectors = normal(4, hidden) + 2, normal(5, hidden) + 1, normal(6, channels) + 2, normal(7, channels)
    return normal(0, batch, height, width, channels), *kernels, *vectors


@each_once({"name": TRAINING, "stride": [1, 2], "bounds": [ops.UNBOUNDED, RELU6]})
def test_bottleneck(name, stride, bounds):
    compare(name, bottleneck(stride, bounds), *bottleneck_arrays(3, 7, 6, 5, 19), tolerance=2e-5)


@pytest.mark.parametrize("name", [mark_slow("xla"), NATIVE, mark_slow("gpu")])
def test_bottleneck_of_many_rows_and_full_vectors(name):
    compare(name, bottleneck(1, ops.UNBOUNDED), *bottleneck_arrays(6, 16, 16, 16, 64, 5), tolerance=2e-5)


@needs_kernels
@settings(max_examples=4, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(1, 20), st.integers(2, 50)),
    st.sampled_from([1, 2]),
    st.sampled_from([3, 5]),
)
def test_bottleneck_of_any_shape(shape, stride, size):
    arrays = bottleneck_arrays(shape[0] + 1, *shape[1:], size)
    compare("native", bottleneck(stride, ops.UNBOUNDED), *arrays, tolerance=1e-4)


@each_once(
    {"name": TRAINING, "groups, channels, features": [(3, 12, 60), (2, 32, 32), (2, 80, 112), (4, 20, 8), (1, 70, 130)]}
)
def test_grouped_1x1_that_reads_a_batch_norm(name, groups, channels, features):
    def function(x, first, scale, bias, kernel, out_scale, out_bias):
        y = conv_bn(x, first, scale, bias, bounds=RELU)
        y = ops.channel_shuffle(y, 2)
        return conv_bn(y, kernel, out_scale, out_bias, groups=groups)

    arrays = (
        *(normal(0, 2, 5, 4, 7), normal(1, 1, 1, 7, channels), normal(2, channels) + 2, normal(3, channels)),
        *(normal(4, 1, 1, channels // groups, features), normal(5, features) + 2, normal(6, features)),
    )
    compare(name, function, *arrays)


SHUFFLES = [(3, 3, 12, 60), (1, 4, 5, 64), (2, 8, 32, 16), (8, 8, 64, 384), (3, 20, 6, 60)]


@each_once({"name": FORMULATIONS, "groups, shuffle, channels, features": SHUFFLES})
def test_1x1_whose_channels_are_shuffled(name, groups, shuffle, channels, features):
    """Read by a depthwise convolution and as an array; the statistics are not shuffled."""

    def function(x, kernel, scale, bias, depthwise):
        convolution = Convolution(x, kernel, (1, 1), ops.NO_PADDING, groups)
        y, mean, var = ops.conv_batch_norm(convolution, scale, bias, bounds=RELU, shuffle=shuffle)
        filtered = conv_bn(y, depthwise, jnp.ones(features), jnp.zeros(features), groups=features)
        return filtered + jnp.asarray(y) + mean * jnp.arange(features) - var

    arrays = (
        *(normal(0, 2, 7, 6, channels), normal(1, 1, 1, channels // groups, features)),
        *(normal(2, features) + 2, normal(3, features), normal(4, 3, 3, 1, features)),
    )
    compare(name, function, *arrays)


WIDE = (2, 4, 34, 1320)  # many panels of columns


@each_once(
    {
        "name": FORMULATIONS,
        "groups, shuffle, channels, features": [*SHUFFLES, WIDE],
        "image": [(3, 7, 6), (1, 4, 4)],
    }
)
def test_1x1_whose_channels_are_shuffled_in_evaluation(name, groups, shuffle, channels, features, image):
    """Also of few rows, and of what a depthwise convolution has not computed yet."""

    def function(x, kernel, gain, bias, depthwise):
        pad, as_it_is = ((1, 1), (1, 1)), (jnp.ones(channels), jnp.zeros(channels))
        filtered = ops.conv_affine(Convolution(x, depthwise, (1, 1), pad, channels), *as_it_is)
        convolutions = (Convolution(y, kernel, (1, 1), ops.NO_PADDING, groups) for y in (x, filtered))
        x, y = (ops.conv_affine(each, gain, bias, bounds=RELU, shuffle=shuffle) for each in convolutions)
        return jnp.asarray(x) - 2 * jnp.asarray(y)

    arrays = (
        *(normal(0, *image, channels), normal(1, 1, 1, channels // groups, features)),
        *(normal(5, features), normal(6, features) + 2, normal(7, 3, 3, 1, channels)),
    )
    (compare if image[0] > 1 else compare_values)(name, function, *arrays)


@needs_kernels
def test_a_shuffle_is_part_of_the_1x1_kernel():
    def function(x, kernel):
        convolution = Convolution(x, kernel, (1, 1), ops.NO_PADDING, 2)
        return jnp.asarray(ops.conv_batch_norm(convolution, jnp.ones(8), jnp.zeros(8), shuffle=2)[0]).sum()

    with ops.using("native"):
        program = str(jax.make_jaxpr(jax.grad(function, (0, 1)))(jnp.ones((2, 3, 3, 4)), jnp.ones((1, 1, 2, 8))))
    assert "jaxnets_pointwise_gradients" in program and "jaxnets_shuffle" not in program


def test_a_shuffle_must_divide_the_channels():
    convolution = Convolution(jnp.ones((1, 2, 2, 4)), jnp.ones((1, 1, 4, 6)), (1, 1), ops.NO_PADDING, 1)
    for function in (ops.conv_batch_norm, ops.conv_affine):
        with pytest.raises(ValueError, match="4 groups must divide the 6 channels"):
            function(convolution, jnp.ones(6), jnp.zeros(6), shuffle=4)


@each_once({"name": TRAINING, "size, stride, padding": [(3, 1, 1), (3, 2, 1), (7, 2, 3), (3, 1, 0), (1, 2, 0)]})
def test_dense_convolution_with_bias_or_batch_norm(name, size, stride, padding):
    geometry = (stride, stride), ((padding, padding + 1), (padding, padding)), 1

    def function(x, kernel, bias, second, scale, shift):
        y = ops.conv_bias(Convolution(x, kernel, *geometry), bias, bounds=RELU)
        return conv_bn(y, second, scale, shift, bounds=RELU6)

    arrays = (normal(0, 2, 9, 8, 3), normal(1, size, size, 3, 18), normal(2, 18))
    compare(name, function, *arrays, normal(3, 3, 3, 18, 9), normal(4, 9) + 2, normal(5, 9))


@needs_kernels
@each_once(
    {
        "size, stride, width, padding": [(3, 1, 16, 1), (3, 2, 32, 1), (7, 2, 48, 3), (2, 2, 16, 0)],
        "channels": [1, 3],
    }
)
def test_a_stem_whose_rows_are_tiles(size, stride, width, padding, channels):
    """Windows of whole rows overlap in the caches; 300 rows and more are several chunks."""

    def function(x, kernel, scale, bias):
        convolution = Convolution(x, kernel, (stride, stride), ((padding, padding), (padding, padding)), 1)
        return ops.conv_batch_norm(convolution, scale, bias, bounds=RELU6)[0]

    arrays = normal(0, 3, 29, width, channels), normal(1, size, size, channels, 24), normal(2, 24) + 2, normal(3, 24)
    compare("native", function, *arrays)


@each_once({"name": FORMULATIONS, "left, right, groups": [(1, 3, 1), (3, 1, 1), (1, 1, 2)]})
def test_concatenation_of_convolutions_with_bias(name, left, right, groups):
    def function(x, y, *arrays):
        parts = []
        for image, kernel, bias in zip((x, y), arrays[::2], arrays[1::2]):
            pad = (kernel.shape[0] - 1) // 2
            convolution = Convolution(image, kernel, (1, 1), ((pad, pad),) * 2, image.shape[-1] // kernel.shape[2])
            parts.append(ops.conv_bias(convolution, bias, bounds=RELU))
        return (
            ops.concatenate(parts)
            + ops.concatenate([parts[1], parts[0] * 0, x])[..., : arrays[1].size + arrays[3].size]
        )

    kernels = normal(2, left, left, 8 // groups, 20), normal(3, right, right, 4, 50)
    compare(
        name,
        function,
        normal(0, 3, 5, 6, 8),
        normal(1, 3, 5, 6, 4),
        kernels[0],
        normal(4, 20),
        kernels[1],
        normal(5, 50),
    )


def side_by_side(geometry):
    """Two convolutions with a bias, the second of 1x1, in one array."""

    def function(x, kernel, bias, pointwise):
        first = ops.conv_bias(Convolution(x, kernel, *geometry, 1), bias, bounds=RELU)
        image = jnp.ones((*first.shape[:3], pointwise.shape[2])) * x.mean()
        second = ops.conv_bias(Convolution(image, pointwise, (1, 1), ops.NO_PADDING, 1), bias[:3], bounds=RELU)
        return ops.concatenate([second, first])

    return function


@needs_kernels
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_dense_convolution_of_any_geometry(data):
    """What windows of other rows, and of the next task, add to the gradient of an image."""
    draw = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    stride, kernel = draw(1, 3), (draw(1, 5), draw(1, 5))
    padding = (draw(-2, 4), draw(-2, 4)), (draw(-2, 4), draw(-2, 4))
    height, width = (draw(max(1, extent - sum(pads)), 24) for extent, pads in zip(kernel, padding))
    arrays = normal(0, draw(1, 4), height, width, draw(1, 20)), normal(2, draw(3, 40))
    kernels = normal(1, *kernel, arrays[0].shape[3], arrays[1].size), normal(3, 1, 1, 2, 3)
    function = side_by_side(((stride, stride), padding))
    compare("native", function, arrays[0], kernels[0], arrays[1], kernels[1], tolerance=2e-5)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 61, 40), (40, 8, 8), (3, 1, 700), (300, 2, 3)])
def test_gradient_of_images_that_tasks_share(shape):
    arrays = normal(0, *shape, 5), normal(1, 5, 3, 5, 20), normal(2, 20), normal(3, 1, 1, 2, 3)
    compare("native", side_by_side(((1, 1), ((2, 2), (1, 1)))), *arrays, tolerance=2e-5)


def of_stem(kind):
    """A net's stem, without more."""

    def loss(x, kernel, bias):
        if kind == "normalised":
            return jnp.sum(jnp.asarray(conv_bn(x, kernel, bias, bias, stride=2)))
        y = ops.conv_bias(Convolution(x, kernel, (2, 2), ((1, 1), (1, 1)), 1), bias, bounds=RELU)
        return jnp.sum(ops.max_pool(y, 2, strides=1) if kind == "pooled" else jnp.asarray(y))

    return loss


@needs_kernels
@pytest.mark.parametrize("kind", ["biased", "pooled", "normalised"])
def test_the_gradient_of_a_net_s_images_is_computed_only_where_it_is_asked_for(kind):
    arrays = jnp.asarray(normal(0, 2, 7, 5, 3)), jnp.asarray(normal(1, 3, 3, 3, 24)), jnp.ones(24)

    def calls(argnums):
        with ops.using("native"):
            program = jax.jit(jax.grad(of_stem(kind), argnums)).lower(*arrays).compile().as_text()
        return program.count('custom_call_target="jaxnets_dense_gradients"')

    assert (calls((0, 1, 2)), calls((1, 2)), calls(0)) == (2, 1, 1)


@needs_kernels
@pytest.mark.parametrize("kind", ["biased", "pooled", "normalised"])
@pytest.mark.parametrize("channels", [3, 8])
def test_a_function_jitted_once_has_every_gradient_that_is_asked_for(kind, channels):
    """Of its first argument alone, of its second alone, and of both, in turns."""
    x, kernel, bias = normal(0, 2, 7, 5, channels), normal(1, 3, 3, channels, 24), np.ones(24, np.float32)
    with ops.using("native"):
        loss = jax.jit(of_stem(kind))
        _, of_both = jax.vjp(lambda x, kernel: loss(x, kernel, bias), x, kernel)
        _, of_kernel = jax.vjp(lambda kernel: loss(x, kernel, bias), kernel)
        _, of_image = jax.vjp(lambda x: loss(x, kernel, bias), x)
        found = of_both(1.0), of_image(1.0) + of_kernel(1.0)
    assert all(np.abs(gradient).max() > 0 for gradient in found[0])
    jax.tree.map(np.testing.assert_array_equal, *found)


@needs_kernels
def test_convolutions_with_bias_are_computed_into_one_array():
    def function(x, kernel, bias):
        parts = [ops.conv_bias(Convolution(x, kernel, (1, 1), ops.NO_PADDING, 1), b) for b in (bias, 2 * bias)]
        assert all(isinstance(part, LazyBiasedConv) for part in parts)
        return ops.concatenate(parts)

    arrays = jnp.asarray(normal(0, 2, 3, 3, 5)), jnp.asarray(normal(1, 1, 1, 5, 7)), jnp.ones(7)
    with ops.using("native"):
        program = str(jax.make_jaxpr(function)(*arrays))
    assert program.count("jaxnets_pointwise") == 2 and "concatenate" not in program


@needs_kernels
def test_what_is_lazy_is_like_an_array():
    x, y = (jnp.asarray(normal(seed, 2, 3, 3, 4)) for seed in (0, 1))
    halves = ChannelSlice(x, 2, 2)
    np.testing.assert_array_equal(halves, x[..., 2:])
    for got, expected in (
        (1 - halves, 1 - x[..., 2:]),
        (y[..., :2] * halves / 2, y[..., :2] * x[..., 2:] / 2),
        (-halves + halves, jnp.zeros((2, 3, 3, 2))),
        (halves.mean((1, 2)), x[..., 2:].mean((1, 2))),
        (halves.reshape(-1), x[..., 2:].reshape(-1)),
        (halves.ravel() // 0.5 + halves.std() % 0.3, x[..., 2:].ravel() // 0.5 + x[..., 2:].std() % 0.3),
        (halves.T.at[0].set(1.0), x[..., 2:].T.at[0].set(1.0)),
        (halves[0, 1], x[0, 1, :, 2:]),
        (jax.tree.map(lambda a: a, halves), x[..., 2:]),
        (halves > 0, x[..., 2:] > 0),
        (np.asarray(y)[..., :2] - halves, y[..., :2] - x[..., 2:]),
        (jax.grad(lambda x: jax.nn.relu(ChannelSlice(x, 2, 2)).sum())(x)[..., 2:], jnp.where(x[..., 2:] > 0, 1.0, 0.0)),
    ):
        np.testing.assert_array_equal(got, expected)
    parts = ChannelSlice(x, 1, 2)
    assert jax.jit(lambda: parts.sum())() == parts.sum()  # what was traced is not kept

    @jax.jit
    def read_twice(x):
        parts = ChannelSlice(x, 1, 2)
        return jax.lax.map(lambda scale: (scale * parts).sum(), jnp.ones(2)).sum() + parts.sum()

    np.testing.assert_allclose(read_twice(x), 3 * parts.sum(), rtol=1e-6)
    with pytest.raises(ValueError, match="2 groups must divide the 3 channels"):
        ops.halves(x[..., :3])
    assert len(halves) == 2 and (halves.ndim, halves.size) == (4, 36)
    first, second = halves
    np.testing.assert_array_equal(jnp.stack([first, second]), x[..., 2:])
    assert halves.block_until_ready() is not None and halves.tolist() == x[..., 2:].tolist()
    assert halves.sharding == x.sharding and not hasattr(halves, "no_such_name")
    (copied := np.array(halves))[0] = 1  # a copy, as of an array
    assert copied.flags.writeable and not np.asarray(halves).flags.writeable


@pytest.mark.parametrize("name", FORMULATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_unit_whose_branch_is_interleaved_or_added_in_evaluation(name, stride):
    """Halves of the channels read in place; the branch delivered between those of the shortcut, or summed."""

    def function(x, kernel, gain, bias, depthwise, project):
        pad = ((1, 1), (1, 1))
        left, right = ops.halves(x)
        y = ops.conv_affine(Convolution(right, kernel, (1, 1), ops.NO_PADDING, 1), gain, bias, bounds=RELU)
        y = ops.conv_affine(Convolution(y, depthwise, (stride, stride), pad, y.shape[-1]), gain, bias)
        y = ops.conv_affine(Convolution(y, project, (1, 1), ops.NO_PADDING, 1), gain[:5], bias[:5])
        left = jnp.asarray(left)[:, ::stride, ::stride] if stride == 2 else left
        return ops.concatenate_shuffle(left, y) + ops.concatenate_shuffle(y, ops.add(left, y, bounds=RELU))

    kernels = normal(1, 1, 1, 5, 70), normal(4, 3, 3, 1, 70), normal(5, 1, 1, 70, 5)
    compare(
        name, function, normal(0, 2, 7, 6, 10), kernels[0], normal(2, 70), normal(3, 70), *kernels[1:], tolerance=2e-5
    )


@each_once({"name": FORMULATIONS, "images": [2, 0], "groups, shuffle": [(2, 1), (1, 2), (2, 2), (1, 1)]})
def test_groups_and_shuffles_before_a_sum_and_an_interleaving(name, images, groups, shuffle):
    def function(x, kernel, gain, bias):
        def y():
            convolution = Convolution(x, kernel, (1, 1), ops.NO_PADDING, groups)
            return ops.conv_affine(convolution, gain, bias, shuffle=shuffle)

        return ops.concatenate_shuffle(x, y()) * ops.concatenate([ops.add(x, y(), bounds=RELU), x])

    compare(name, function, normal(0, images, 5, 4, 6), normal(1, 1, 1, 6 // groups, 6), normal(2, 6), normal(3, 6) + 1)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_what_is_lazy_leaves_transformations_as_an_array(name):
    x, kernel, vector = normal(0, 3, 2, 5, 4, 6), normal(1, 1, 1, 6, 7), normal(2, 7)

    def affine(x):
        return ops.conv_affine(Convolution(x, jnp.asarray(kernel), (1, 1), ops.NO_PADDING, 1), jnp.ones(7), vector)

    def biased(x):
        return ops.conv_bias(Convolution(x, jnp.asarray(kernel), (1, 1), ops.NO_PADDING, 1), jnp.asarray(vector))

    def normalized(x):
        convolution = Convolution(x, jnp.asarray(kernel), (1, 1), ops.NO_PADDING, 1)
        return ops.conv_batch_norm(convolution, jnp.ones(7), jnp.asarray(vector))[0]

    for function in (affine, biased, normalized):
        with ops.using("reference"):
            expected = np.stack([function(jnp.asarray(image)) for image in x])
        with ops.using(name):
            for got in (jax.vmap(function)(x), jax.lax.map(function, x), jax.vmap(jax.checkpoint(function))(x)):
                assert isinstance(got, jax.Array)
                np.testing.assert_allclose(got, expected, atol=1e-5)


@each_once({"name": FORMULATIONS, "size, image": [(1, (3, 7, 6)), (3, (2, 5, 5)), (1, (1, 4, 4))]})
def test_sum_with_a_convolution_in_evaluation(name, size, image):
    def function(x, kernel, gain, bias):
        pad = (kernel.shape[0] - 1) // 2
        convolution = Convolution(x, kernel, (1, 1), ((pad, pad),) * 2, 1)
        return ops.add(x, ops.conv_affine(convolution, gain, bias), bounds=RELU6)

    compare(
        name, function, normal(0, *image, 200), normal(1, size, size, 200, 200) / 20, normal(2, 200), normal(3, 200) + 2
    )


@each_once({"name": FORMULATIONS, "kernel": [(1, 1, 10, 21), (3, 3, 1, 10), (3, 3, 10, 5), (1, 1, 5, 8)]})
def test_affine_known_beforehand(name, kernel):
    groups = 10 // kernel[2]

    def function(x, kernel, gain, bias):
        pad = (kernel.shape[0] - 1) // 2
        return ops.conv_affine(Convolution(x, kernel, (1, 1), ((pad, pad),) * 2, groups), gain, bias, bounds=RELU6)

    compare(name, function, normal(0, 2, 6, 5, 10), normal(1, *kernel), normal(2, kernel[3]) + 1, normal(3, kernel[3]))


def separable(stride, groups=1, bounds=RELU6, out_bounds=ops.UNBOUNDED):
    """In evaluation: depthwise, and the 1x1 convolution that reads it."""

    def function(x, kernel, gain, bias, project, out_gain, out_bias):
        pad = (kernel.shape[0] - 1) // 2
        filtered = ops.conv_affine(
            Convolution(x, kernel, (stride, stride), ((pad, pad),) * 2, x.shape[-1]), gain, bias, bounds=bounds
        )
        convolution = Convolution(filtered, project, (1, 1), ops.NO_PADDING, groups)
        return ops.conv_affine(convolution, out_gain, out_bias, bounds=out_bounds)

    return function


def separable_arrays(batch, height, width, channels, features, size=3, groups=1):
    kernels = normal(1, size, size, 1, channels), normal(4, 1, 1, channels // groups, features) / channels**0.5
    vectors = normal(2, channels) + 1, normal(3, channels), normal(5, features), normal(6, features)
    return normal(0, batch, height, width, channels), kernels[0], *vectors[:2], kernels[1], *vectors[2:]


@each_once(
    {
        "name": FORMULATIONS,
        "stride": [1, 2],
        "size, groups, channels, features": [
            (3, 1, 7, 5),
            (3, 2, 270, 112),
            (5, 1, 24, 50),
            (3, 3, 60, 27),
            (5, 2, 8, 4),
        ],
    }
)
def test_depthwise_and_1x1_in_evaluation(name, stride, size, groups, channels, features):
    arrays = separable_arrays(3, 10, 13, channels, features, size, groups)
    compare(name, separable(stride, groups), *arrays)
    compare_values(name, separable(stride, groups, ops.UNBOUNDED, RELU), *arrays)


@needs_kernels
@settings(max_examples=8, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), *[st.integers(1, 12)] * 2, *[st.integers(1, 40)] * 2),
    stride=st.sampled_from([1, 2]),
    size=st.sampled_from([3, 5]),
)
def test_depthwise_and_1x1_of_any_shape(shape, stride, size):
    compare_values("native", separable(stride), *separable_arrays(*shape, size))


@needs_kernels
@settings(max_examples=6, deadline=None)
@given(
    image=st.tuples(*[st.integers(1, 17)] * 2),
    groups=st.sampled_from([1, 2, 3]),
    channels=st.integers(1, 60),
    features=st.integers(50, 90),
    size=st.sampled_from([1, 3]),
    join=st.sampled_from([None, ops.add, ops.concatenate_shuffle]),
)
def test_products_of_few_rows(image, groups, channels, features, size, join):
    """Of one image, whose kernels are packed by the thread that wants them."""
    groups, features = (groups, groups * features) if size == 1 else (1, 3 * features)

    def function(x, kernel, gain, bias, other):
        y = ops.conv_affine(Convolution(x, kernel, (1, 1), ((size // 2,) * 2,) * 2, groups), gain, bias)
        return join(other, y) if join else y

    arrays = normal(0, *image, groups * channels)[None], normal(1, size, size, channels, features) / channels**0.5
    compare_values(
        "native", function, *arrays, normal(2, features), normal(3, features), normal(4, 1, *image, features)
    )


@needs_kernels
@pytest.mark.parametrize("height", [5, 16, 17])
def test_depthwise_and_many_columns(height):
    """Of a few positions, which are computed before the products, and of more than that."""
    compare_values("native", separable(1), *separable_arrays(1, height, 16, 33, 240))


@needs_kernels
def test_depthwise_is_left_to_the_1x1_that_reads_it():
    """One kernel; and without such a reader, the array."""
    x, kernel, gain, bias, *rest = map(jnp.asarray, separable_arrays(2, 4, 4, 6, 6))
    with ops.using("native"):
        program = str(jax.make_jaxpr(lambda *arrays: jnp.asarray(separable(1)(*arrays)))(x, kernel, gain, bias, *rest))
        filtered = ops.conv_affine(Convolution(x, kernel, (1, 1), ((1, 1), (1, 1)), 6), gain, bias)
        array = jnp.asarray(filtered)
        shuffled = ops.channel_shuffle(filtered, 2), ops.concatenate_shuffle(filtered, x)
    assert "jaxnets_separable" in program and "jaxnets_depthwise" not in program
    assert isinstance(filtered, LazyConv)
    assert (filtered.shape, filtered.dtype, filtered.size) == (array.shape, array.dtype, array.size)
    assert jnp.asarray(filtered) is array
    np.testing.assert_array_equal(filtered + x, array + x)
    np.testing.assert_array_equal(shuffled[0], ops.channel_shuffle(array, 2))
    np.testing.assert_array_equal(shuffled[1], ops.concatenate_shuffle(array, x))
    np.testing.assert_array_equal(jax.tree.map(lambda a: a, filtered), array)


@needs_kernels
@each_once({"bad": [np.nan, INF], "place": [(0, 0, 0, 0), (1, 4, 5, 17)]})
def test_what_is_not_finite_passes_depthwise_and_1x1_as_in_the_reference(bad, place):
    x, *rest = separable_arrays(2, 6, 6, 20, 18)
    x[place] = bad
    results = []
    for name in ("native", "reference"):
        with ops.using(name):
            results.append(jax.jit(lambda *arrays: jnp.asarray(separable(1, bounds=ops.UNBOUNDED)(*arrays)))(x, *rest))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)


@each_once({"name": FORMULATIONS, "bounds": [ops.UNBOUNDED, RELU]})
def test_sum_with_a_batch_norm(name, bounds):
    def function(x, kernel, scale, bias):
        return ops.add(x, conv_bn(x, kernel, scale, bias), bounds=bounds) * x

    compare(name, function, normal(0, 2, 5, 4, 11), normal(1, 1, 1, 11, 11), normal(2, 11) + 2, normal(3, 11))


@each_once({"name": FORMULATIONS, "bounds": [ops.UNBOUNDED, RELU]})
def test_sum_of_arrays(name, bounds):
    def function(x, y):
        return ops.add(x, y * y, bounds=bounds) * x

    compare(name, function, normal(0, 2, 5, 4, 11), normal(1, 2, 5, 4, 11))


@each_once({"name": FORMULATIONS, "rows": [1, 7, 49, 64], "groups": [1, 2]})
def test_a_single_image_through_a_large_kernel(name, rows, groups):
    """Few positions and many channels are shared out by columns."""

    def function(x, kernel, gain, bias):
        convolution = Convolution(x, kernel, (1, 1), ((0, 0), (0, 0)), groups)
        return ops.conv_affine(convolution, gain, bias, bounds=RELU6)

    arrays = normal(0, 1, 1, rows, 64), normal(1, 1, 1, 64 // groups, 432) / 8, normal(2, 432), normal(3, 432)
    (compare if rows == 49 else compare_values)(name, function, *arrays)


@each_once({"name": FORMULATIONS, "both": [False, True]})
def test_concatenation_and_shuffle(name, both):
    def function(x, kernel, scale, bias):
        y = conv_bn(x, kernel, scale, bias, bounds=RELU)
        return ops.concatenate_shuffle(conv_bn(x, kernel, bias, scale) if both else x, y)

    compare(name, function, normal(0, 2, 5, 4, 19), normal(1, 1, 1, 19, 19), normal(2, 19) + 2, normal(3, 19))


@each_once(
    {
        "name": FORMULATIONS,
        "pool": ["max_pool", "avg_pool"],
        "window, strides, padding": [
            *((3, 2, ((0, 0), (0, 0))), (3, 2, ((1, 1), (1, 1))), (2, 2, ((0, 1), (0, 0)))),
            *((3, 1, ((1, 1), (1, 1))), (2, 3, ((0, 0), (0, 0)))),
        ],
    }
)
def test_pooling(name, pool, window, strides, padding):
    def function(x):
        return getattr(ops, pool)(x, window, strides=strides, padding=padding)

    compare(name, function, normal(0, 2, 9, 8, 70))


def stem(stride, pads, window, pool_stride, pool_pads):
    """A convolution with a bias, and one with an affine as a BatchNorm has in evaluation, each pooled."""

    def function(x, kernel, gain, bias):
        convolution = Convolution(x, kernel, (stride, stride), pads, 1)
        maps = ops.conv_bias(convolution, bias, bounds=RELU), ops.conv_affine(convolution, gain, bias, bounds=RELU6)
        pooled = [ops.max_pool(y, window, strides=pool_stride, padding=pool_pads) for y in maps]
        return jnp.concatenate(pooled, -1)

    return function


def stem_arrays(batch, height, width, channels, features, size):
    return (
        *(normal(0, batch, height, width, channels), normal(1, size, size, channels, features)),
        *(normal(2, features) + 1, normal(3, features)),
    )


ONE = ((1, 1), (1, 1))


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "stride", "pads", "window", "pool_stride", "pool_pads"),
    [
        ((1, 47, 49, 3, 24, 3), 2, ops.NO_PADDING, 3, 2, ((0, 0), (0, 1))),  # SqueezeNet 1.1
        ((2, 33, 36, 3, 24, 3), 2, ONE, 3, 2, ONE),  # ShuffleNet
        ((9, 40, 32, 3, 64, 7), 2, ((3, 3), (3, 3)), 3, 2, ONE),  # ResNet
        ((1, 17, 16, 1, 5, 3), 1, ONE, 2, 2, ((0, 1), (0, 0))),
        ((1, 18, 20, 3, 6, 3), 1, ((-1, 2), (-2, 0)), 2, 2, ops.NO_PADDING),  # cropped
        ((2, 18, 21, 12, 17, 3), 1, ONE, 3, 1, ONE),  # windows gathered one by one, for their many channels
        ((1, 31, 32, 3, 9, 1), 2, ((0, 1), (0, 0)), 2, 2, ops.NO_PADDING),  # or since they leave pixels out
        ((1, 6, 20, 8, 2, 25), 1, ((12, 12), (12, 12)), 2, 2, ops.NO_PADDING),  # or are long
        ((2, 9, 21, 8, 20, 5), 1, ((2, 2), (2, 2)), 3, 2, ONE),
        ((1, 16, 16, 3, 7, 3), 1, ONE, 2, 3, ops.NO_PADDING),  # rows that no window meets
        ((1, 16, 18, 3, 7, 3), 1, ONE, 20, 1, ((3, 3), (2, 2))),  # windows larger than the map
        ((0, 16, 16, 3, 7, 3), 1, ONE, 2, 2, ops.NO_PADDING),
    ],
)
def test_a_stem_and_its_pooling(shape, stride, pads, window, pool_stride, pool_pads):
    function, arrays = stem(stride, pads, window, pool_stride, pool_pads), stem_arrays(*shape)
    compare("native", function, *arrays)
    with ops.using("native"):
        program = str(jax.make_jaxpr(lambda *arrays: function(*arrays))(*map(jnp.asarray, arrays)))
    assert program.count("jaxnets_stem") == 2 and "jaxnets_dense" not in program


@needs_kernels
def test_a_stem_under_transformations():
    function = stem(2, ONE, 3, 2, ONE)
    x, *rest = map(jnp.asarray, stem_arrays(4, 33, 36, 3, 24, 3))
    mesh = jax.sharding.Mesh(jax.devices()[:4], "i")
    batch, same = jax.sharding.PartitionSpec("i"), jax.sharding.PartitionSpec()
    pairs = x.reshape(2, 2, *x.shape[1:])
    transformed = (
        lambda *rest: jax.vmap(lambda x: function(x, *rest))(pairs),
        lambda *rest: jax.lax.map(jax.checkpoint(lambda x: function(x, *rest)), pairs),
        lambda *rest: jax.shard_map(function, mesh=mesh, in_specs=(batch, same, same, same), out_specs=batch)(x, *rest),
    )
    with ops.using("native"):
        expected = jax.jit(function)(x, *rest)
        weights = jnp.asarray(normal(9, *expected.shape))

        def gradients_of(function):
            def loss(*rest):
                return (function(*rest).reshape(expected.shape) * weights).sum()

            return jax.jit(jax.grad(loss, (0, 1, 2)))(*rest)

        gradients = gradients_of(lambda *rest: function(x, *rest))
        for found in transformed:
            np.testing.assert_array_equal(jax.jit(found)(*rest).reshape(expected.shape), expected)
            for got, gradient in zip(gradients_of(found), gradients, strict=True):
                np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())


@needs_kernels
def test_a_bias_where_64_bits_are_on():
    x, kernel, _, bias = stem_arrays(1, 20, 20, 3, 5, 3)
    with jax.enable_x64(True), ops.using("native"):
        convolution = Convolution(jnp.asarray(x), jnp.asarray(kernel), (1, 1), ONE, 1)
        y = ops.conv_bias(convolution, jnp.asarray(bias))
        pooled = ops.max_pool(y, 2, strides=2)
        assert pooled.dtype == jnp.float32
        np.testing.assert_array_equal(pooled, ops.max_pool(jnp.asarray(y), 2, strides=2))


@needs_kernels
def test_a_large_kernel_and_a_map_that_was_computed_before_are_not_pooled_as_a_stem():
    def of_computed(x, kernel, bias):
        y = ops.conv_bias(Convolution(x, kernel, (1, 1), ((1, 1), (1, 1)), 1), bias)
        return jnp.asarray(y).sum() + ops.max_pool(y, 2, strides=2).sum()

    with ops.using("native"):
        large = map(jnp.asarray, stem_arrays(1, 16, 16, 64, 64, 3))
        function = stem(1, ONE, 2, 2, ops.NO_PADDING)
        assert "jaxnets_stem" not in str(jax.make_jaxpr(function)(*large))
        x, kernel, _, bias = map(jnp.asarray, stem_arrays(1, 16, 16, 3, 8, 3))
        assert "jaxnets_stem" not in str(jax.make_jaxpr(of_computed)(x, kernel, bias))


@needs_kernels
@each_once({"bad": [np.nan, INF, -INF], "place": [(0, 0, 0, 0), (1, 16, 20, 2), (1, 32, 35, 1)]})
def test_what_is_not_finite_passes_a_stem_as_in_the_reference(bad, place):
    x, *rest = map(np.array, stem_arrays(2, 33, 36, 3, 24, 3))
    x[place] = bad
    results = []
    for name in ("reference", "native"):
        function = stem(2, ONE, 3, 2, ONE)
        with ops.using(name):
            results.append(function(jnp.asarray(x), *map(jnp.asarray, rest)))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", *FORMULATIONS])
def test_the_first_maximum_has_the_gradient(name):
    with ops.using(name):
        gradient = jax.jit(jax.grad(lambda x: ops.max_pool(x, 2, strides=2).sum()))(jnp.zeros((1, 4, 4, 1)))
    np.testing.assert_array_equal(gradient[0, :, :, 0], np.kron(np.ones((2, 2)), [[1, 0], [0, 0]]))


@pytest.mark.parametrize("name", FORMULATIONS)
def test_the_first_of_what_is_not_a_number_has_the_gradient(name):
    x = np.arange(9, dtype=np.float32).reshape(1, 3, 3, 1)
    x[0, 0, 1], x[0, 2, 0] = np.nan, np.nan
    with ops.using(name):
        gradient = jax.jit(jax.grad(lambda x: ops.max_pool(x, 3, strides=1).sum()))(jnp.asarray(x))
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("name", ["reference", *FORMULATIONS])
def test_infinity_and_nan_pass_a_maximum(name):
    x = np.full((1, 4, 6, 3), -INF, np.float32)
    x[0, 0, 0], x[0, 2, 2], x[0, 3, 5] = INF, np.nan, 1
    with ops.using(name):
        y = ops.max_pool(x, 2, strides=2)[0, :, :, 0]
    np.testing.assert_array_equal(y, [[INF, -INF, -INF], [-INF, np.nan, 1]])


@needs_kernels
@each_once({"bad": [np.nan, INF], "kernel": [(1, 1, 20, 18), (3, 3, 20, 18), (1, 1, 10, 18)]})
def test_what_is_not_finite_spreads_as_in_the_reference(bad, kernel):
    x, weights = normal(0, 2, 6, 5, 20), normal(1, *kernel)
    x[1, 2, 3, 4] = bad
    pad, groups = (kernel[0] - 1) // 2, 20 // kernel[2]

    def function(x, weights):
        return ops.conv(x, weights, padding=((pad, pad),) * 2, feature_group_count=groups)

    dy = normal(2, 2, 6, 5, 18)
    for g, e in zip(run("native", function, (x, weights), dy), run("reference", function, (x, weights), dy)):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (1e4, 1e-1), (-1e6, 1.0)])
def test_moments_of_products_with_a_large_mean_and_a_small_variance(mean, std):
    """A 1x1 convolution by the identity, so that its outputs are known to the last bit."""
    x = (mean + std * np.random.default_rng(0).normal(size=(8, 12, 12, 20))).astype(np.float32)
    convolution = Convolution(jnp.asarray(x), jnp.eye(20)[None, None], (1, 1), ops.NO_PADDING, 1)
    with ops.using("native"):
        y, _, var = ops.conv_batch_norm(convolution, jnp.ones(20), jnp.zeros(20))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(var, wide.var((0, 1, 2)), rtol=1e-6)
    expected = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(jnp.asarray(y), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", TRAINING)
def test_an_empty_batch(name):
    x = jnp.zeros((0, 5, 5, 8))
    with ops.using(name):
        y = conv_bn(
            conv_bn(x, normal(0, 1, 1, 8, 6), jnp.ones(6), jnp.zeros(6)),
            normal(1, 3, 3, 1, 6),
            jnp.ones(6),
            jnp.zeros(6),
            2,
            6,
        )
        z = ops.conv_bias(Convolution(x, jnp.asarray(normal(2, 3, 3, 8, 7)), (1, 1), ops.NO_PADDING, 1), jnp.ones(7))
        gradient = jax.grad(lambda k: jnp.asarray(conv_bn(x, k, jnp.ones(6), jnp.zeros(6))).sum())(
            normal(0, 1, 1, 8, 6)
        )
    assert jnp.asarray(y).shape == (0, 3, 3, 6)
    assert z.shape == (0, 3, 3, 7)
    assert not np.asarray(gradient).any()


@needs_kernels
def test_normalized_acts_as_its_array():
    x = jnp.asarray(normal(0, 2, 4, 4, 6))
    with ops.using("native"):
        y = conv_bn(x, jnp.asarray(normal(1, 1, 1, 6, 6)), jnp.ones(6), jnp.zeros(6), bounds=RELU)
    assert isinstance(y, LazyBatchNorm)
    array = jnp.asarray(y)
    assert (y.shape, y.dtype, y.ndim, y.size) == (array.shape, array.dtype, array.ndim, array.size)
    np.testing.assert_array_equal(jnp.concatenate((y, x), -1), jnp.concatenate((array, x), -1))
    np.testing.assert_array_equal(y + x, array + x)
    np.testing.assert_array_equal(x + y, array + x)
    np.testing.assert_array_equal(y[:, 1:], array[:, 1:])
    np.testing.assert_array_equal(jax.tree.map(lambda a: a, y), array)
    assert y.astype(jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", FORMULATIONS)
def test_shares_of_a_batch_with_common_statistics_are_the_batch(name):
    """pmap with axis_name: values, and gradients summed over the devices, as for the whole batch on one."""
    x, *rest = bottleneck_arrays(8, 6, 6, 5, 12)

    def loss(x, kernel, depthwise, scale, bias, axis_name):
        y, _, _ = ops.conv_batch_norm(
            Convolution(x, kernel, (1, 1), ops.NO_PADDING, 1), scale, bias, bounds=RELU6, axis_name=axis_name
        )
        convolution = Convolution(y, depthwise, (1, 1), ((1, 1), (1, 1)), 12)
        z, mean, var = ops.conv_batch_norm(convolution, scale, bias, axis_name=axis_name)
        return jnp.sum(jnp.asarray(z) ** 3), (mean, var)

    arrays = x, rest[0], rest[1], rest[3], rest[4]
    whole = jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True)
    with ops.using("reference"):
        (value, moments), gradients = jax.jit(lambda *a: whole(*a, None))(*arrays)
    with ops.using(name):
        step = jax.pmap(lambda *a: whole(*a, "devices"), axis_name="devices", in_axes=(0, None, None, None, None))
        (values, of_devices), shares = step(x.reshape(4, 2, *x.shape[1:]), *arrays[1:])
    np.testing.assert_allclose(values.sum(), value, rtol=1e-4)
    for got, expected in zip(of_devices, moments):
        np.testing.assert_allclose(got, np.stack([expected] * 4), rtol=1e-4, atol=1e-6)
    got = (shares[0].reshape(x.shape), *(share.sum(0) for share in shares[1:]))
    for g, e in zip(got, gradients):
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-4 * np.abs(e).max())
