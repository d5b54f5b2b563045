"""What is trained in PyTorch against ours: the first weights and the number of classes."""

import jax
import numpy as np
import pytest

import jaxnets
from jaxnets import torch_nets, torch_step, torch_weights
from jaxnets.errors import UserError
from tests.slow import slow_after
from tests.test_models import random_variables
from tests.tiny_net import TinyNet
from tests.tiny_torch import TinyTorch, named_tiny


@pytest.fixture(autouse=True)
def tiny():
    with named_tiny():
        yield


@pytest.mark.parametrize("name", slow_after(4, torch_nets.NETS))
def test_the_nets_begin_with_our_weights(name):
    model = jaxnets.create_model(name)
    variables = random_variables(model)
    net = torch_step.make_net(name, model, variables)
    back = torch_weights.load(model, net.state_dict())
    jax.tree.map(np.testing.assert_array_equal, {"batch_stats": {}} | variables, back)


@pytest.mark.parametrize("name", ["tiny", *torch_nets.NETS])
def test_a_net_has_as_many_classes_as_ours(name):
    assert list(torch_nets.NETS[name](num_classes=7).state_dict().values())[-1].shape == (7,)


def test_a_net_of_another_shape_is_refused(monkeypatch):
    monkeypatch.setitem(torch_nets.NETS, "tiny", lambda num_classes: TinyTorch(10))
    model = TinyNet(num_classes=7)
    variables = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32), train=False)
    with pytest.raises(UserError, match=r"linear.weight of tiny is \(10, 8\) in PyTorch and \(7, 8\) here"):
        torch_step.make_net("tiny", model, variables)
