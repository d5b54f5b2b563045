"""The names of layers: one for each, and torchvision's as its nets have them."""

import pytest

import jaxnets
from jaxnets.layer_list import layers_of
from jaxnets.weights.layouts import layouts_of
from tests.slow import mark_slow
from tests.test_models import is_alike


def is_slow(name):
    """A form for small images has the layers of that for large ones, but for its strides."""
    return is_alike(name) or name.removesuffix("_cifar") in set(jaxnets.list_models()) - {name}


@pytest.mark.parametrize("name", [mark_slow(name) if is_slow(name) else name for name in jaxnets.list_models()])
def test_every_net_can_be_written_and_no_two_layers_share_a_name(name):
    model = jaxnets.create_model(name)
    layers = layers_of(model)
    found = [names for layout in layouts_of(model).values() if (names := layout.names(layers))]
    assert found
    for names in found:
        assert len(set(names)) == len(names) == len(layers)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("googlenet", "googlenet"),
        ("mobilenet_v2", "mobilenet_v2"),
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("shufflenet_v2_x1_5", "shufflenet_v2_x1_5"),
        ("squeezenet1_0", "squeezenet1_0"),
        ("squeezenet1_1", "squeezenet1_1"),
        ("vgg16", "vgg16"),
        ("vgg19_bn", "vgg19_bn"),
    ],
)
def test_layers_are_named_as_torchvisions_nets_name_them(ours, theirs):
    torch = pytest.importorskip("torch")
    from jaxnets.torch_nets import torchvision

    fields = {"aux_logits": False, "init_weights": False} if theirs == "googlenet" else {}
    with torch.device("meta"):
        net = getattr(torchvision.models, theirs)(**fields)
    model = jaxnets.create_model(ours)
    names = layouts_of(model)["torchvision"].names(layers_of(model))
    assert names is not None
    assert set(names) == {name.rpartition(".")[0] for name in net.state_dict()}
