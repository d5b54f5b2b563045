"""PyTorch's side of the benchmark: the same nets, in every form that is tried."""

import jax
import numpy as np
import pytest
import torch

import jaxnets
from jaxnets import benchmark, benchmark_torch, torch_weights
from jaxnets.torch_nets import NETS, shuffle, torchvision
from tests.parity_cases import calibrated, images_of, to_torch
from tests.slow import mark_slow, slow_after
from tests.test_models import PARAMETERS


def side_of(name):
    return 32 if name.endswith("_cifar") else 64


RACED = [name for name in benchmark.MODELS if name.endswith("_cifar")]


@pytest.fixture(scope="module", params=[name if name in RACED else mark_slow(name) for name in NETS])
def net(request):
    """The name, and PyTorch's net with weights under which logits say something."""
    torch.manual_seed(0)
    return request.param, calibrated(NETS[request.param](), side_of(request.param), batch=8)


def logits_of(net, batch):
    with torch.no_grad():
        return net(batch).float().numpy()


def test_parameters_are_the_pinned_ones(net):
    name, theirs = net
    assert sum(parameter.numel() for parameter in theirs.parameters()) == PARAMETERS[name]


def test_our_net_with_its_weights_says_the_same(net):
    name, theirs = net
    images = images_of(side_of(name), batch=2)
    expected = logits_of(theirs, to_torch(images))
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()  # the images make a difference
    ours = jaxnets.create_model(name)
    variables = torch_weights.load(ours, theirs.state_dict())
    logits = jax.jit(lambda variables, images: ours.apply(variables, images, train=False))(variables, images)
    assert np.abs(np.asarray(logits) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("memory_format", slow_after(1, [torch.channels_last, torch.contiguous_format]))
def test_fused_and_frozen_nets_say_the_same(net, memory_format):
    name, theirs = net
    batch = to_torch(images_of(side_of(name), batch=2)).to(memory_format=memory_format)
    theirs = theirs.to(memory_format=memory_format)
    expected = logits_of(theirs, batch)
    # Frozen nets take seconds: two that have every kind of layer, and in the slow cases all.
    freezes = memory_format == torch.contiguous_format or name in ("shufflenet_v1_g3_cifar", "squeezenet1_1_cifar")
    for change in (benchmark_torch._fused, benchmark_torch._frozen) if freezes else (benchmark_torch._fused,):
        changed = change(theirs, batch)
        for _ in range(3):  # TorchScript specialises as it runs
            logits = logits_of(changed, batch)
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_nets_in_bfloat16_under_autocast_say_nearly_the_same(net):
    """As evaluated on a GPU."""
    name, theirs = net
    batch = to_torch(images_of(side_of(name), batch=2))
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(theirs, batch)
        for change in (benchmark_torch._narrow, benchmark_torch._fused_narrow):
            changed = change(theirs, batch)
            assert {parameter.dtype for parameter in changed.parameters()} == {torch.bfloat16}
            assert np.abs(logits_of(changed, batch) - expected).max() <= 0.2 * np.abs(expected).max()
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}


def test_fusing_leaves_no_batch_norm(net):
    name, theirs = net
    fused = benchmark_torch._fused(theirs, None)
    assert any(isinstance(module, torch.nn.Conv2d) for module in fused.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shuffle", [shuffle, torchvision.models.shufflenetv2.channel_shuffle])
def test_channels_are_shuffled_where_they_lie(shuffle, memory_format):
    x = torch.randn(2, 12, 4, 5).to(memory_format=memory_format)
    shuffled = shuffle(x, 3)
    assert torch.equal(shuffled, torch.channel_shuffle(x, 3))
    assert shuffled.is_contiguous(memory_format=memory_format)
