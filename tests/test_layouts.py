"""The layouts of every net: names that lead there and back, and warnings where nets differ."""

import logging

import jax
import numpy as np
import pytest

import jaxnets
from jaxnets import torch_weights, weight_images
from jaxnets.errors import UserError
from jaxnets.weights.layouts import layouts_of
from tests.slow import mark_slow
from tests.test_models import shapes_of

# A small net of each family, and the code bases that have it
WRITTEN = {
    "googlenet": ({"width": 0.125}, {"torchvision"}),
    "mobilenet_v1": ({"width": 0.125}, {"kuangliu", "timm"}),
    "mobilenet_v2": ({"width": 0.125}, {"torchvision", "timm", "chenyaofo"}),
    "mobilenet_v2_cifar": ({"width": 0.125}, {"kuangliu"}),
    "mobilenet_v2_mini": ({}, set()),
    "resnet50_cifar": ({"width": 0.125}, {"torchvision", "timm", "kuangliu"}),
    "shufflenet_v1_g2_cifar": ({"width": 0.25, "variant": "kuangliu"}, {"kuangliu"}),
    "shufflenet_v1_g3": ({"width": 0.25}, {"megvii"}),
    "shufflenet_v1_g8": ({"width": 0.25, "variant": "megvii"}, {"megvii"}),
    "shufflenet_v2_x0_5": ({}, {"torchvision", "kuangliu", "chenyaofo", "megvii"}),
    "shufflenet_v2_x1_0": ({"variant": "megvii"}, {"megvii"}),
    "squeezenet1_0": ({"width": 0.125}, {"torchvision"}),
    "squeezenet1_1": ({"width": 0.125}, {"torchvision"}),
    "vgg16_bn_cifar": ({"width": 0.125, "hidden_features": (8, 8)}, {"torchvision", "chenyaofo"}),
    "vgg19_bn": ({"width": 0.125, "hidden_features": (8, 8)}, {"torchvision", "timm", "chenyaofo"}),
    "vgg19_cifar": ({"width": 0.125}, {"kuangliu"}),
}


def random_variables(model):
    """Numbers for every variable, 0 for the classifier's bias, which megvii's nets lack."""
    random = np.random.default_rng(0)
    shapes = {"batch_stats": {}} | shapes_of(model)
    variables = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    variables["params"]["classifier"]["bias"] *= 0
    return variables


# Other depths, versions and numbers of groups of nets that are there, too.
OTHERS = {"shufflenet_v1_g8", "squeezenet1_0", "vgg19_bn"}


@pytest.mark.parametrize("name", [mark_slow(name) if name in OTHERS else name for name in WRITTEN])
def test_each_layout_leads_there_and_back_bit_by_bit(name):
    fields, expected = WRITTEN[name]
    model = jaxnets.create_model(name, num_classes=7, **fields)
    variables = random_variables(model)
    written = {}
    for layout in layouts_of(model):
        try:
            written[layout] = torch_weights.export(model, variables, layout)
        except UserError:
            continue
        again = torch_weights.load(model, written[layout])
        jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert written.keys() == expected | {"jaxnets"}
    usual = torch_weights.export(model, variables)
    assert any(usual.keys() == state_dict.keys() for state_dict in written.values())
    if "torchvision" in expected:
        has_it = "kuangliu" if name == "resnet50_cifar" else "torchvision"  # whose ResNets have larger stems
        assert usual.keys() == written[has_it].keys()


@pytest.mark.parametrize(
    ("name", "fields", "layout"),
    [
        ("squeezenet1_1_cifar", {}, "torchvision"),
        ("mobilenet_v2", {"activation": "silu"}, "torchvision"),
        ("mobilenet_v1", {}, "kuangliu"),
    ],
)
def test_a_net_that_no_code_base_has_gets_the_first_ones_names(name, fields, layout):
    model = jaxnets.create_model(name, **fields)
    variables = random_variables(model)
    assert torch_weights.export(model, variables).keys() == torch_weights.export(model, variables, layout).keys()


def test_the_layout_decides_not_the_order(caplog):
    """Names win over an order that does not fit them, as in PyTorch itself."""
    model = jaxnets.create_model("shufflenet_v2_x0_5")
    variables = random_variables(model)
    state_dict = torch_weights.export(model, variables)
    shuffled = dict(sorted(state_dict.items(), reverse=True))
    jax.tree.map(np.testing.assert_array_equal, torch_weights.load(model, shuffled), variables)


def test_the_auxiliary_classifiers_of_googlenet_are_left_out():
    model = jaxnets.create_model("googlenet", width=0.125)
    variables = random_variables(model)
    state_dict = torch_weights.export(model, variables)
    auxiliary = {
        f"aux{i}.{name}": np.zeros((3, 3), np.float32) for i in (1, 2) for name in ("fc1.weight", "fc2.weight")
    }
    jax.tree.map(np.testing.assert_array_equal, torch_weights.load(model, state_dict | auxiliary), variables)
    with pytest.raises(UserError, match=r"aux3\.fc1 .* is left over"):
        torch_weights.load(model, state_dict | {"aux3.fc1.weight": auxiliary["aux1.fc1.weight"]})


def test_weights_for_another_wiring_are_refused():
    theirs = jaxnets.create_model("shufflenet_v2_x0_5")
    state_dict = torch_weights.export(theirs, random_variables(theirs))
    with pytest.raises(UserError, match="torchvision's weights: they need variant='torchvision'"):
        torch_weights.load("shufflenet_v2_x0_5", state_dict, variant="megvii")


@pytest.mark.parametrize(
    ("name", "fields", "theirs", "ours"),
    [
        ("mobilenet_v2", {"activation": "silu"}, "activation='relu6'", "activation='silu'"),
        (
            "mobilenet_v2",
            {"padding": "same", "bn_epsilon": 1e-3},
            "bn_epsilon=1e-05, padding='torch'",
            "bn_epsilon=0.001",
        ),
        ("mobilenet_v2", {"bottleneck": "nonlinear"}, "bottleneck='linear'", "bottleneck='nonlinear'"),
        ("mobilenet_v2", {"shortcut": "none"}, "shortcut='identity'", "shortcut='none'"),
        ("resnet18", {"activation": "silu"}, "activation='relu'", "activation='silu'"),
        ("squeezenet1_1", {"bypass": "simple"}, "bypass='none'", "bypass='simple'"),
        ("mobilenet_v2", {}, None, None),
    ],
)
def test_what_the_shapes_of_another_net_do_not_show_is_warned_of(caplog, name, fields, theirs, ours):
    model = jaxnets.create_model(name, num_classes=5, width=0.125, **fields)
    with caplog.at_level(logging.WARNING):
        torch_weights.load(model, torch_weights.export(model, random_variables(model), "torchvision"))
    assert (
        (f"the published net of torchvision has {theirs}, this one {ours}" in caplog.text)
        if theirs
        else not caplog.text
    )


SMALL = {"width": 0.125, "num_classes": 7}
OF_CIFAR = {"stem_stride": 1, "stage_strides": (1, 1, 2, 2, 1, 2, 1)}
OF_IMAGENET = {"stem_stride": 2, "stage_strides": (1, 2, 2, 2, 1, 2, 1)}


@pytest.mark.parametrize(
    ("name", "fields", "layout", "ours", "theirs"),
    [
        ("mobilenet_v1_cifar", {"width": 0.125}, "kuangliu", {"stem_stride": 2}, {"stem_stride": 1}),
        (
            "mobilenet_v1",
            SMALL | {"activation": "relu6"},
            "timm",
            {"stage_strides": (1, 1, 2, 2, 2)},
            {"stage_strides": (1, 2, 2, 2, 2)},
        ),
        ("mobilenet_v2", SMALL, "torchvision", {"stem_stride": 1}, {"stem_stride": 2}),
        ("mobilenet_v2", SMALL | OF_CIFAR | {"num_classes": 10}, "chenyaofo", OF_IMAGENET, OF_CIFAR),
        ("mobilenet_v2", SMALL, "timm", OF_CIFAR, OF_IMAGENET),
        mark_slow(("mobilenet_v2_cifar", {"width": 0.125}, "kuangliu", {"stem_stride": 2}, {"stem_stride": 1})),
        (
            "shufflenet_v1_g2_cifar",
            {"width": 0.25, "variant": "kuangliu"},
            "kuangliu",
            {"stem_stride": 2},
            {"stem_stride": 1},
        ),
        ("shufflenet_v1_g3", {"width": 0.25}, "megvii", {"stem_stride": 1}, {"stem_stride": 2}),
        ("shufflenet_v2_x0_5", {}, "torchvision", {"stem_stride": 1}, {"stem_stride": 2}),
        ("shufflenet_v2_x0_5_cifar", {}, "chenyaofo", {"stem_stride": 2}, {"stem_stride": 1}),
        mark_slow(("shufflenet_v2_x0_5_cifar", {}, "kuangliu", {"stem_stride": 2}, {"stem_stride": 1})),
        mark_slow(("shufflenet_v2_x0_5", {}, "megvii", {"stem_stride": 1}, {"stem_stride": 2})),
        ("squeezenet1_1", {"width": 0.125}, "torchvision", {"stem_stride": 1}, {"stem_stride": 2}),
    ],
)
def test_other_strides_than_the_published_nets_are_warned_of_where_weights_are_read(
    caplog, name, fields, layout, ours, theirs
):
    model = jaxnets.create_model(name, **fields)
    variables = random_variables(model)
    with caplog.at_level(logging.WARNING):
        state_dict = torch_weights.export(model.clone(**ours), variables, layout)
        torch_weights.load(model, state_dict)
        assert not caplog.text
        torch_weights.load(model, state_dict, **ours)
    has, instead = (", ".join(f"{field}={value}" for field, value in side.items()) for side in (theirs, ours))
    assert f"the published net of {layout} has {has}, this one {instead}: " in caplog.text


@pytest.mark.parametrize(("classes", "warned"), [(10, True), (100, True), (1000, False)])
def test_the_classes_of_the_file_tell_the_cifar_net_from_imagenets(caplog, classes, warned):
    model = jaxnets.create_model("shufflenet_v2_x0_5", num_classes=classes)
    state_dict = torch_weights.export(model, random_variables(model), "torchvision")
    with caplog.at_level(logging.WARNING):
        torch_weights.load(model, state_dict, head="drop", num_classes=10 if classes == 1000 else 1000)
    expected = [
        "the published net of chenyaofo has stem_stride=1, this one stem_stride=2: the same weights give different "
        "outputs"
    ]
    assert caplog.messages == (expected if warned else [])


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v2_x0_5_cifar"])
def test_without_classes_either_net_may_be_meant(caplog, name):
    model = jaxnets.create_model(name)
    variables = random_variables(model)
    del variables["params"]["classifier"]
    features = model.clone(num_classes=0)
    with caplog.at_level(logging.WARNING):
        torch_weights.load(features, torch_weights.export(features, variables, "torchvision"))
    assert not caplog.text


def test_weights_that_do_not_fit_are_refused_without_a_warning(caplog):
    state_dict = torch_weights.export(model := jaxnets.create_model("mobilenet_v2", **SMALL), random_variables(model))
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="does not fit MobileNetV2"):
        torch_weights.load("mobilenet_v2", state_dict, activation="silu")
    assert not caplog.text


def test_our_own_layout_is_no_published_nets(caplog):
    model = jaxnets.create_model("mobilenet_v1", **SMALL)
    state_dict = torch_weights.export(model, random_variables(model), "jaxnets")
    with caplog.at_level(logging.WARNING):
        torch_weights.load(model, state_dict, stem_stride=1, stage_strides=(1, 1, 2, 2, 2))
    assert not caplog.text


def test_published_files_go_without_a_warning_into_their_own_nets_only(shared_dir, caplog):
    pytest.importorskip("torch")
    cifar = next((shared_dir / "weights").glob("cifar10_shufflenetv2_x0_5*.pt"))
    imagenet = next((shared_dir / "weights").glob("squeezenet1_1*.pth"))
    with caplog.at_level(logging.WARNING):
        torch_weights.load("shufflenet_v2_x0_5_cifar", cifar)
        torch_weights.load("squeezenet1_1", imagenet)
        assert not caplog.text
        torch_weights.load("shufflenet_v2_x0_5", cifar, num_classes=10)
        torch_weights.load("squeezenet1_1_cifar", imagenet, num_classes=1000)
    assert caplog.messages == [
        "the published net of chenyaofo has stem_stride=1, this one stem_stride=2: the same weights give different "
        "outputs",
        "the published net of torchvision has stem_stride=2, this one stem_stride=1: the same weights give different "
        "outputs",
    ]


def test_a_googlenet_with_larger_kernels_is_none_of_torchvisions():
    model = jaxnets.create_model("googlenet", num_classes=5, large_kernel=5)
    with pytest.raises(UserError, match="need large_kernel=3"):
        torch_weights.export(model, random_variables(model), "torchvision")


def test_images_are_normalised_as_torchvisions_googlenet_transforms_them():
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.googlenet(init_weights=False, transform_input=True)  # as with its published weights
    images = torch.rand(2, 3, 8, 8)
    usual = net._transform_input(torchvision.transforms.Normalize(*weight_images.IMAGENET)(images))
    ours = layouts_of(jaxnets.create_model("googlenet"))["torchvision"].normalization
    torch.testing.assert_close(torchvision.transforms.Normalize(*ours)(images), usual, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("mobilenet_v1", "mobilenetv1_100"), ("mobilenet_v2", "mobilenetv2_100"), ("resnet50", "resnet50")],
)
def test_images_are_normalised_as_by_timm(name, theirs):
    timm = pytest.importorskip("timm")
    config = timm.get_pretrained_cfg(theirs)
    expected = layouts_of(jaxnets.create_model(name))["timm"].normalization or weight_images.IMAGENET
    assert expected == (tuple(config.mean), tuple(config.std))
