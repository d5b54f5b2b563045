"""Schedules by their formulas, optimizers against PyTorch's, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxnets import optim

STEPS, EPOCHS, PEAK = 10, 8, 0.4


def rates(name, **fields):
    schedule = optim.make_schedule(name, PEAK, steps_per_epoch=STEPS, num_epochs=EPOCHS, **fields)
    return np.array([schedule(step) for step in range(STEPS * EPOCHS)])


@pytest.mark.parametrize("name", [name for name in optim.SCHEDULES if name != "one_cycle"])
def test_warmup_rises_linearly_to_the_peak(name):
    values = rates(name, warmup_epochs=2.0)
    np.testing.assert_allclose(values[:20], PEAK * np.arange(1, 21) / 20, rtol=1e-6)
    assert values.max() == pytest.approx(PEAK)
    assert np.all(np.diff(values[20:]) <= 1e-7)


def test_cosine_follows_its_formula_and_ends_at_the_end_factor():
    values = rates("cosine", end_factor=0.1)
    t = np.arange(80) / 80
    np.testing.assert_allclose(values, PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi * t)) / 2), rtol=1e-5)


def test_linear_falls_evenly():
    np.testing.assert_allclose(rates("linear"), PEAK * (1 - np.arange(80) / 80), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_step_falls_at_fractions_of_the_whole_run(warmup):
    values = rates("step", boundaries=(0.5, 0.75), decay=0.1, warmup_epochs=warmup)
    np.testing.assert_allclose(values[[39, 40, 59, 60, 79]], PEAK * np.array([1, 0.1, 0.1, 0.01, 0.01]), rtol=1e-5)


def test_boundaries_that_meet_on_one_step_both_count():
    assert rates("step", boundaries=(0.5, 0.501))[79] == pytest.approx(PEAK * 0.01)


def test_warmup_takes_at_most_half_of_the_run():
    values = rates("cosine", warmup_epochs=1e307)
    assert values.argmax() in (39, 40) and values[39] == pytest.approx(PEAK)


def test_exponential_falls_by_the_decay_every_epoch():
    values = rates("exponential", decay=0.5)
    np.testing.assert_allclose(values[::STEPS], PEAK * 0.5 ** np.arange(EPOCHS), rtol=1e-5)


def test_one_cycle_is_pytorchs():
    torch = pytest.importorskip("torch")
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    # PyTorch reaches peak and end one step early: it counts the points, not the steps between them.
    theirs = torch.optim.lr_scheduler.OneCycleLR(sgd, PEAK, total_steps=81, pct_start=25 / 81)
    expected = []
    for _ in range(80):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        theirs.step()
    ours = rates("one_cycle", warmup_epochs=2.4)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert ours.argmax() == 24 and ours[0] == pytest.approx(PEAK / 25) and ours[-1] < PEAK / 500


@pytest.mark.parametrize("warmup", range(0, 41, 3))
def test_one_cycle_has_its_peak_after_the_warmup(warmup):
    values = rates("one_cycle", warmup_epochs=warmup / STEPS)
    assert values.argmax() == warmup and values[warmup] == pytest.approx(PEAK)


@pytest.mark.parametrize(("scaling", "expected"), [("none", 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_a_batch_four_times_the_base_scales_the_rate(scaling, expected):
    assert optim.scale_rate(0.1, 4 * optim.BASE_BATCH_SIZE, scaling) == pytest.approx(expected)
    assert optim.scale_rate(0.1, optim.BASE_BATCH_SIZE, scaling) == 0.1


def test_unknown_names_list_what_exists():
    with pytest.raises(ValueError, match="cosine, linear"):
        optim.make_schedule("cosin", 0.1, steps_per_epoch=1, num_epochs=1)
    with pytest.raises(ValueError, match="none, linear"):
        optim.scale_rate(0.1, 256, "square")
    with pytest.raises(ValueError, match="sgd, adamw"):
        optim.make_optimizer("adamwe", optax.constant_schedule(0.1))


PARAMS = {
    "conv": {"kernel": jnp.full((3, 3, 8, 4), 0.5)},
    "depthwise": {"kernel": jnp.full((3, 3, 1, 4), 0.5)},
    "bn": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "classifier": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("vectors", [True, False])
def test_kernels_decay_and_vectors_only_where_asked(depthwise, vectors):
    mask = optim.decay_mask(PARAMS, depthwise, vectors)
    assert mask == {
        "conv": {"kernel": True},
        "depthwise": {"kernel": depthwise},
        "bn": {"scale": vectors, "bias": vectors},
        "classifier": {"kernel": True, "bias": vectors},
    }


def test_decay_reaches_what_it_is_asked_to_reach():
    gradients = jax.tree.map(jnp.zeros_like, PARAMS)
    schedule = optax.constant_schedule(0.1)
    for fields, moved in (({}, 0.0), ({"decay_vectors": True}, -0.05)):
        optimizer = optim.make_optimizer("sgd", schedule, weight_decay=0.5, momentum=0.0, **fields)
        updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
        np.testing.assert_allclose(updates["bn"]["scale"], moved, atol=1e-9)
        np.testing.assert_allclose(updates["conv"]["kernel"], -0.025, rtol=1e-6)


TORCH = {
    "sgd": lambda torch, p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda torch, p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01),
    "rmsprop": lambda torch, p: torch.optim.RMSprop(p, lr=0.1, alpha=0.99, eps=1e-6, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("name", TORCH)
def test_five_updates_equal_pytorch(name):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4)).astype(np.float32)
    gradients = rng.normal(size=(5, 3, 4)).astype(np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = TORCH[name](torch, [weight])
    ours = optim.make_optimizer(
        name, optax.constant_schedule(0.1), beta2=0.99, epsilon=1e-6, weight_decay=0.01, momentum=0.9, nesterov=True
    )
    params = {"kernel": jnp.asarray(start)}
    state = ours.init(params)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        theirs.step()
        updates, state = ours.update({"kernel": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], weight.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_lion_moves_every_weight_by_the_learning_rate():
    optimizer = optim.make_optimizer("lion", optax.constant_schedule(0.1))
    gradient = {"kernel": jnp.array([3.0, -0.001])}
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(updates["kernel"], [-0.1, 0.1], rtol=1e-6)


def test_muon_makes_updates_of_convolutions_orthogonal_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), PARAMS)
    optimizer = optim.make_optimizer("muon", optax.constant_schedule(0.1), weight_decay=0.0)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(PARAMS), PARAMS)
    # The nearest orthogonal matrix: singular values all alike, at Adam's size, downhill.
    update, gradient = (np.asarray(tree["conv"]["kernel"]).reshape(72, 4) for tree in (updates, gradients))
    singular = np.linalg.svd(update, compute_uv=False) / (0.1 * 0.2 * np.sqrt(72))
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    cosine = -(update * (u @ v)).sum() / np.linalg.norm(update) / np.linalg.norm(u @ v)
    assert cosine > 0.95
    for layer, leaf in (("depthwise", "kernel"), ("classifier", "kernel"), ("bn", "scale")):
        # NAdam's first step: the sign times 0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9)
        np.testing.assert_allclose(
            updates[layer][leaf], -0.1 * (0.9 * 0.1 / 0.19 + 1) * np.sign(gradients[layer][leaf]), rtol=1e-3
        )


def test_stacks_are_taken_apart_again():
    """Whatever the names sort like, and in whatever order a dict has come back."""
    shapes = [(1, 1, 4, 6)] * 3 + [(1, 1, 6, 4), (3, 3, 1, 6)]
    leaves = [jnp.full(shape, number) for number, shape in enumerate(shapes)]
    first, second = {"kernel": leaves[0], "scale": jnp.full(6, 5)}, {"z": leaves[3], "-": leaves[4]}
    tree = {"b": first, "a.c": leaves[1:3], "a": second}
    stacked = optim.stack(tree)
    assert {name: len(stack) for name, stack in stacked["matrices"].items()} == {"1x1x4x6": 3, "1x1x6x4": 1}
    again = optim.unstack(jax.tree.map(lambda a: a, stacked), tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_of_stacks_is_optax_s_muon_of_each(nesterov):
    rng = np.random.default_rng(0)
    shapes = {"a": (1, 1, 8, 6), "b": (1, 1, 8, 6), "c": (3, 3, 8, 6), "depthwise": (3, 3, 1, 6), "bias": (6,)}

    def draw():
        return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    dimensions = contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    plain = contrib.muon(
        0.1,
        beta=0.9,
        eps=1e-8,
        nesterov=nesterov,
        adam_b1=0.9,
        adam_b2=0.999,
        muon_weight_dimension_numbers=lambda params: {name: dimensions if name in "abc" else None for name in params},
        consistent_rms=optim.MUON_RMS,
    )
    ours = optim.make_optimizer("muon", optax.constant_schedule(0.1), nesterov=nesterov)
    params = draw()
    states = [optimizer.init(params) for optimizer in (ours, plain)]
    jitted = [jax.jit(optimizer.update) for optimizer in (ours, plain)]
    for _ in range(3):
        gradients, updates = draw(), []
        for i, update in enumerate(jitted):
            found, states[i] = update(gradients, states[i], params)
            updates.append(found)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *updates)


def test_muon_decays_what_the_mask_says_once():
    optimizer = optim.make_optimizer("muon", optax.constant_schedule(0.1), weight_decay=0.5, decay_depthwise=False)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    shrunk = jax.tree.map(lambda update, value: np.asarray(update / value, np.float64).mean(), updates, PARAMS)
    assert (shrunk["conv"]["kernel"], shrunk["classifier"]["kernel"]) == pytest.approx((-0.05, -0.05))
    assert shrunk["depthwise"]["kernel"] == shrunk["bn"]["scale"] == shrunk["classifier"]["bias"] == 0


def test_clipping_bounds_the_global_norm():
    optimizer = optim.make_optimizer("sgd", optax.constant_schedule(1.0), momentum=0.0, clip_norm=1.0)
    gradients = {"a": {"kernel": jnp.array([30.0])}, "b": {"bias": jnp.array([40.0])}}
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose(optax.global_norm(updates), 1.0, rtol=1e-6)
    np.testing.assert_allclose(updates["a"]["kernel"], [-0.6], rtol=1e-6)


def test_ema_starts_fast_and_settles_at_its_decay():
    old, new = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    assert optim.update_ema(old, new, 0.999, jnp.int32(1))["w"] == pytest.approx(1 - 2 / 11)
    assert optim.update_ema(old, new, 0.999, jnp.int32(10**6))["w"] == pytest.approx(1 - 0.999, rel=1e-3)
    assert jax.tree.structure(optim.update_ema(old, new, 0.9, 1)) == jax.tree.structure(old)
