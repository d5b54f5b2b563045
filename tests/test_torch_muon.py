"""Muon in PyTorch against ours, which is optax's."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxnets import optim
from jaxnets.torch_muon import Muon, orthogonal

SHAPES = {  # PyTorch's
    "dense": (12, 3, 3, 3),
    "tall": (20, 6, 1, 1),
    "another of that shape": (20, 6, 1, 1),
    "wide": (4, 30, 1, 1),
    "grouped": (8, 4, 1, 1),
    "depthwise": (12, 1, 3, 3),
    "classifier": (5, 12),
    "bias": (12,),
}
RATES = (0.02, 0.02, 0.01)
EPSILON = 0.1  # large enough to be seen


def ours(array):
    """A PyTorch array as `optim` knows its kind, by name and dimensions."""
    leaf = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return {"kernel" if array.ndim > 1 else "bias": leaf}


def theirs(tree):
    (leaf,) = tree.values()
    return leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T


def gradients(step):
    random = np.random.default_rng(step)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def parameters():
    return {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in gradients(0).items()}


def make(parameters, momentum=0.9, nesterov=True):
    groups = [{"params": [p], "weight_decay": 0.3 if p.ndim > 1 else 0.0} for p in parameters.values()]
    return Muon(groups, momentum, nesterov, (0.9, 0.99), EPSILON)


def take(optimizer, parameters, steps):
    for step in steps:
        for name, gradient in gradients(1 + step).items():
            parameters[name].grad = torch.from_numpy(gradient)
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, True)])
def test_three_updates_are_ours(momentum, nesterov):
    of_torch = parameters()
    take(make(of_torch, momentum, nesterov), of_torch, range(3))
    optimizer = optim.make_optimizer(
        "muon",
        lambda step: jnp.asarray(RATES)[step],
        momentum=momentum,
        nesterov=nesterov,
        beta2=0.99,
        epsilon=EPSILON,
        weight_decay=0.3,
    )
    params = {name: ours(jnp.asarray(value)) for name, value in gradients(0).items()}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(3):
        updates, state = update({n: ours(g) for n, g in gradients(1 + step).items()}, state, params)
        params = optax.apply_updates(params, updates)
    for name, parameter in of_torch.items():
        change = parameter.detach().numpy() - gradients(0)[name]
        np.testing.assert_allclose(change, theirs(params[name]) - gradients(0)[name], rtol=1e-4, atol=1e-5)
        assert np.abs(change).max() > 0.01


def test_it_goes_on_from_its_state():
    whole = parameters()
    take(make(whole), whole, range(3))
    stopped = parameters()
    first = make(stopped)
    take(first, stopped, range(2))
    second = make(stopped)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take(second, stopped, [2])
    for name in SHAPES:
        torch.testing.assert_close(stopped[name], whole[name], rtol=0, atol=0)


def test_what_has_no_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(3))
    make({"bias": parameter}).step()
    assert parameter.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_singular_values_come_near_one(shape):
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32)) * 1e-3
    x = orthogonal(matrix, 1e-8)
    values = torch.linalg.svdvals(x)
    assert x.shape == shape and values.min() > 0.5 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(x.flatten(), (left @ right).flatten(), 0) > 0.98
