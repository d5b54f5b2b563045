"""The zoo: names, fields, pinned parameter counts, feature strides, precision and gradients of every net."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxnets

# As published (torchvision, timm, the common CIFAR code) or counted on a PyTorch twin.
PARAMETERS = {
    "mobilenet_v1": 4_231_976,
    "mobilenet_v1_cifar": 3_217_226,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v2_cifar": 2_296_922,
    "mobilenet_v2_mini": 28_698,
    "resnet18": 11_689_512,
    "resnet18_cifar": 11_173_962,
    "resnet34": 21_797_672,
    "resnet34_cifar": 21_282_122,
    "resnet50": 25_557_032,
    "resnet50_cifar": 23_520_842,
    "resnet101": 44_549_160,
    "resnet101_cifar": 42_512_970,
    "resnet152": 60_192_808,
    "resnet152_cifar": 58_156_618,
    "shufflenet_v1_g1": 1_531_936,
    "shufflenet_v1_g1_cifar": 960_706,
    "shufflenet_v1_g2": 1_733_848,
    "shufflenet_v1_g2_cifar": 940_858,
    "shufflenet_v1_g3": 1_865_728,
    "shufflenet_v1_g3_cifar": 914_338,
    "shufflenet_v1_g4": 1_968_344,
    "shufflenet_v1_g4_cifar": 890_234,
    "shufflenet_v1_g8": 2_434_768,
    "shufflenet_v1_g8_cifar": 913_138,
    "shufflenet_v2_x0_5": 1_366_792,
    "shufflenet_v2_x0_5_cifar": 352_042,
    "shufflenet_v2_x1_0": 2_278_604,
    "shufflenet_v2_x1_0_cifar": 1_263_854,
    "shufflenet_v2_x1_5": 3_503_624,
    "shufflenet_v2_x1_5_cifar": 2_488_874,
    "shufflenet_v2_x2_0": 7_393_996,
    "shufflenet_v2_x2_0_cifar": 5_365_486,
    "squeezenet1_0": 1_248_424,
    "squeezenet1_0_cifar": 740_554,
    "squeezenet1_1": 1_235_496,
    "squeezenet1_1_cifar": 727_626,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992 - 4_224,  # no biases in front of a BatchNorm
    "vgg16_bn_cifar": 14_728_266 - 4_224,
    "vgg16_cifar": 14_719_818,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248 - 5_504,
    "vgg19_bn_cifar": 20_040_522 - 5_504,
    "vgg19_cifar": 20_029_514,
}


def image_size(name):
    return 32 if name.endswith(("_cifar", "_mini")) else 224


def shapes(model, size, batch=1):
    """The variables' and the logits' shapes, without computing anything."""
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    return variables, jax.eval_shape(functools.partial(model.apply, train=False), variables, images)


def count(model, size):
    variables, _ = shapes(model, size)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_every_net_has_a_pinned_parameter_count():
    assert sorted(PARAMETERS) == jaxnets.list_models()


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_builds_and_runs_at_its_default_size(name):
    model = jaxnets.create_model(name)
    variables, logits = shapes(model, image_size(name), batch=2)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == PARAMETERS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.shape == (2, 1000 if image_size(name) == 224 else 10)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "fields", "parameters"),
    [
        ("mobilenet_v2", {"width": 0.5}, 700_490),
        ("mobilenet_v2", {"width": 0.75}, 1_368_234),
        ("mobilenet_v2", {"width": 1.0}, 2_236_682),
        ("mobilenet_v2", {"width": 1.4}, 4_333_706),
        ("shufflenet_v1_g3", {"width": 0.5, "variant": "megvii"}, 242_134),
        ("shufflenet_v1_g8", {"width": 0.5, "variant": "megvii"}, 250_138),
        ("shufflenet_v1_g3", {"width": 1.5, "variant": "megvii"}, 2_015_578),
        ("shufflenet_v1_g8", {"width": 2.0, "variant": "megvii"}, 3_479_962),
        ("shufflenet_v1_g2_cifar", {"variant": "kuangliu"}, 887_582),
        ("shufflenet_v1_g3_cifar", {"variant": "kuangliu"}, 862_768),
        ("shufflenet_v2_x1_0", {"variant": "megvii"}, 1_265_010),
    ],
)
def test_parameters_of_published_variants_with_10_classes(name, fields, parameters):
    assert count(jaxnets.create_model(name, num_classes=10, **fields), image_size(name)) == parameters


def test_list_models_is_sorted_and_filters():
    assert jaxnets.list_models() == sorted(jaxnets.list_models())
    assert jaxnets.list_models("mobilenet_v2*") == ["mobilenet_v2", "mobilenet_v2_cifar"]
    assert jaxnets.list_models("nothing") == []


def test_unknown_model_lists_what_exists_nearest_first():
    with pytest.raises(ValueError, match="no net 'mobilenetv2'; there are mobilenet_v2,") as error:
        jaxnets.create_model("mobilenetv2")
    assert all(name in str(error.value) for name in jaxnets.list_models())


def test_unknown_field_lists_what_exists():
    with pytest.raises(ValueError, match="mobilenet_v2 has no field 'widht'; it has width,") as error:
        jaxnets.create_model("mobilenet_v2", widht=0.5)
    assert "stage_strides" in str(error.value)
    assert "parent" not in str(error.value)


BAD_VALUES = [
    ("num_classes", (-1, 2.5, True, "10")),
    ("width", (0, -1, float("inf"), float("nan"), "1", True)),
    ("dropout", (-0.1, 1.0, 1, "0")),
    ("activation", ("rellu", 3, ["relu"])),
    ("dtype", ("float31", "int32", 7)),
    ("bn_momentum", (-0.1, 1.5)),
    ("bn_epsilon", (0, -1e-5)),
    ("features_only", ("yes", 1)),
    ("stem_stride", (0, 3, "2", 1.5)),
    ("stage_strides", ((1, 2), (1, 2, 2, 2, 1, 2, 3), 2, "1222121")),
    ("shortcut", ("conv", 1)),
    ("padding", ("valid", 1)),
    ("stochastic_depth", (-0.1, 1.0)),
]


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD_VALUES for v in values])
def test_bad_field_value_is_refused(field, value):
    with pytest.raises(ValueError, match=f"MobileNetV2: {field}=.* must be"):
        jaxnets.create_model("mobilenet_v2", **{field: value})


def test_a_field_of_none_keeps_the_nets_own_value():
    own = jaxnets.create_model("mobilenet_v2_cifar")
    assert jaxnets.create_model("mobilenet_v2_cifar", stage_strides=None, num_classes=None) == own


def test_strides_from_a_list_leave_the_net_hashable():
    listed = jaxnets.create_model("mobilenet_v2", stage_strides=[1, 1, 2, 2, 1, 2, 1])
    assert hash(listed) == hash(jaxnets.create_model("mobilenet_v2", stage_strides=(1, 1, 2, 2, 1, 2, 1)))
