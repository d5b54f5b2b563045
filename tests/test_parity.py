"""Every family against a live PyTorch net: the logits, and the way back into PyTorch."""

import copy
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import nn

import jaxnets
from jaxnets import torch_weights
from tests.parity_cases import CASES, Case, calibrated, images_of, to_torch, unset
from tests.slow import mark_slow
from tests.torch_twins import adapted


@dataclass(frozen=True)
class Pair:
    """The two nets of a case, and what PyTorch's weights are in ours."""

    case: Case
    theirs: nn.Module
    ours: Any
    variables: dict[str, Any]


# Other widths and depths of nets that are compared.
SLOW = {
    *("mobilenet_v2 1", "mobilenet_v2 1.4", "resnet34 kuangliu", "shufflenet_v1 megvii g3 .5", "shufflenet_v2 1"),
    *("shufflenet_v2 2", "shufflenet_v2 kuangliu 2", "vgg19 bn chenyaofo", "mobilenet_v2 timm", "vgg19 bn timm"),
    *("squeezenet 1.0", "shufflenet_v1 kuangliu g3", "shufflenet_v1 megvii g8 .5"),
    # The same nets as in test_torch_nets.
    *("squeezenet 1.1 32x32", "shufflenet_v2 1.5 chenyaofo"),
}


@pytest.fixture(scope="module", params=[mark_slow(name) if name in SLOW else name for name in CASES])
def pair(request) -> Pair:
    case = CASES[request.param]
    theirs = calibrated(unset(case).to_empty(device="cpu"), min(case.sides), case.batch)
    ours = jaxnets.create_model(case.name, dropout=0.0, **case.fields)
    return Pair(case, theirs, ours, torch_weights.load(ours, theirs.state_dict()))


def torch_logits(net: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net.eval()(to_torch(images)).numpy()


def test_evaluation_logits_are_pytorchs(pair):
    """Those of PyTorch in float64: in float32, its own of VGG-19 are 9e-6 of the largest away from them."""
    apply = jax.jit(lambda variables, images: pair.ours.apply(variables, images, train=False))
    exact = copy.deepcopy(pair.theirs).double()
    for side in pair.case.sides:
        images = images_of(side, batch=2)
        expected = torch_logits(exact, images.astype(np.float64))
        largest = np.abs(expected).max()
        assert np.abs(expected[0] - expected[1]).max() > 0.01 * largest  # the images make a difference
        logits = np.asarray(apply(pair.variables, images))
        assert np.abs(logits - expected).max() <= 1e-5 * largest, side


def test_export_is_what_pytorch_loads(pair):
    if not pair.case.layout:
        pytest.skip("no code base publishes this net")
    state_dict = torch_weights.export(pair.ours, pair.variables, pair.case.layout)
    state_dict = {name: torch.from_numpy(value) for name, value in state_dict.items()}
    twin = unset(pair.case)
    inner = twin.net if isinstance(twin, adapted.RGB) else twin
    inner.load_state_dict(state_dict, strict=True, assign=True)
    # In float64: PyTorch's own float32 logits differ by 1e-5 of the largest where the weights lie otherwise in memory.
    images = images_of(min(pair.case.sides), batch=2).astype(np.float64)
    expected = torch_logits(copy.deepcopy(pair.theirs).double(), images)
    assert np.abs(torch_logits(copy.deepcopy(twin).double(), images) - expected).max() <= 1e-6 * np.abs(expected).max()
    again = torch_weights.load(pair.ours, twin.state_dict())
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again, pair.variables))
