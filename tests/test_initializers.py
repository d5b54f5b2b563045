"""Initial kernels: flax's distributions, whether each is drawn by itself or all at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets
from jaxnets.models.initializers import Undrawn, conv_init, dense_init, init_at_once, normal

KEY = jax.random.key(3)


@pytest.mark.parametrize(("shape", "groups"), [((3, 3, 1, 64), 64), ((1, 1, 8, 48), 3), ((7, 7, 3, 16), 1)])
def test_convolutions_start_as_flax_would_scale_them(shape, groups):
    expected = nn.initializers.variance_scaling(2.0 * groups, "fan_out", "normal")(KEY, shape)
    np.testing.assert_allclose(conv_init(groups)(KEY, shape), expected, rtol=1e-6)
    np.testing.assert_allclose(dense_init(KEY, (5, 4)), nn.initializers.normal(0.01)(KEY, (5, 4)), rtol=1e-6)
    assert conv_init(groups)(KEY, shape, jnp.bfloat16).dtype == jnp.bfloat16


class Mixed(nn.Module):
    """Two kernels of ours, of equal shapes, and two that others draw."""

    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            x = nn.Dense(32, kernel_init=normal(lambda shape: 0.5), name=name)(x)
        x = nn.Dense(32, name="foreign")(x)
        return x + self.param("noise", nn.initializers.normal(1.0), (32,))


def kernels(variables):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
        if path[-1].key == "kernel"
    }


def test_kernels_of_one_draw_are_spread_as_those_drawn_by_themselves():
    model, images = jaxnets.create_model("mobilenet_v2_mini"), jnp.zeros((1, 32, 32, 3))
    alone = jax.jit(lambda key: model.init(key, images, train=False))(KEY)
    together = jax.jit(lambda key: init_at_once(model, key, images, train=False))(KEY)
    assert jax.tree.map(jnp.shape, together) == jax.tree.map(jnp.shape, alone)
    assert {leaf.dtype for leaf in jax.tree.leaves(together)} == {jnp.dtype("float32")}
    others = [path for path in kernels(alone) if kernels(alone)[path].size > 500]
    assert len(others) > 5
    for path in others:
        one, other = kernels(alone)[path], kernels(together)[path]
        assert other.std() == pytest.approx(one.std(), rel=0.15) and abs(other.mean()) < 0.15 * other.std()
        assert not np.array_equal(one, other)
    for path, leaf in jax.tree_util.tree_leaves_with_path(together):
        if path[-1].key != "kernel":
            assert np.unique(leaf).tolist() in ([0], [1])


def test_no_kernel_has_the_numbers_of_another_and_foreign_ones_are_drawn_too():
    made = init_at_once(Mixed(), KEY, jnp.zeros((1, 32)))["params"]
    values = np.stack([made[name]["kernel"].ravel() for name in ("first", "second", "foreign")])
    assert np.abs(np.corrcoef(values) - np.eye(3)).max() < 0.1
    assert np.asarray(made["first"]["kernel"]).std() == pytest.approx(0.5, rel=0.1)
    assert made["noise"].std() > 0.5


def test_they_are_a_function_of_the_key():
    def make(key):
        return init_at_once(Mixed(), key, jnp.zeros((1, 32)))

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), make(KEY), jax.jit(make)(KEY))
    for one, other in zip(kernels(make(KEY)).values(), kernels(make(jax.random.key(4))).values()):
        assert not np.any(one == other)


def test_a_net_without_kernels_of_ours_is_initialised():
    made = init_at_once(nn.Dense(2), KEY, jnp.zeros((1, 3)))["params"]
    assert made["kernel"].shape == (3, 2) and np.all(np.asarray(made["kernel"]) != 0)


def test_after_an_error_kernels_are_drawn_again():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self):
            assert isinstance(dense_init(KEY, (2, 2)), Undrawn)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        init_at_once(Broken(), KEY)
    assert isinstance(dense_init(KEY, (2, 2)), jax.Array)
