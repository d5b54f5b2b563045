"""The zoo: names, fields, pinned parameter counts, feature strides, precision and gradients of every net."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets
from jaxnets import ops
from jaxnets.errors import UserError
from jaxnets.layer_list import layers_of
from jaxnets.models.initializers import init_at_once
from jaxnets.models.net import FeatureMap
from jaxnets.models.shufflenet_v1 import stem_features
from jaxnets.models.shufflenet_v2 import features_at
from tests.slow import each_once, mark_slow, slow_after

# As published (torchvision, timm, the common CIFAR code) or counted on a PyTorch twin.
PARAMETERS = {
    "googlenet": 6_624_904,
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


# A small one of every family, with the options that add layers
SMALL = {
    "googlenet": {"width": 0.125},
    "mobilenet_v1_cifar": {"width": 0.25},
    "mobilenet_v2_cifar": {"width": 0.35, "stochastic_depth": 0.1},
    "mobilenet_v2_mini": {"dropout": 0.1},
    "resnet18_cifar": {"width": 0.125},
    "shufflenet_v1_g3_cifar": {"width": 0.25},
    "shufflenet_v2_x0_5_cifar": {"se_ratio": 2},
    "squeezenet1_1_cifar": {"width": 0.25, "bypass": "complex", "se_ratio": 2, "batch_norm": True},
    "vgg16_cifar": {"width": 0.125, "hidden_features": (64, 64), "pool_size": 2},
}


def image_size(name):
    return 32 if name.endswith(("_cifar", "_mini")) else 224


def trace(model, size, batch=1):
    """The output's and the variables' shapes, without computing anything; by the operators fastest to trace."""
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    with jaxnets.ops.using("reference"):
        return jax.eval_shape(functools.partial(model.init_with_output, train=False), jax.random.key(0), images)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@functools.cache
def shapes_of(model):
    """Those of its variables, by its layers, which are traced for its weights anyway (test_layer_list: all of them)."""
    shapes = {"params": {}, "batch_stats": {}}
    for layer in layers_of(model):
        norm = layer.kind == "batch_norm"
        for name in ("scale", "bias", "mean", "var") if norm else ("kernel", "bias")[: 1 + layer.use_bias]:
            tree = shapes["batch_stats" if name in ("mean", "var") else "params"]
            for key in layer.path:
                tree = tree.setdefault(key, {})
            tree[name] = jax.ShapeDtypeStruct(layer.shape if name == "kernel" else layer.shape[-1:], jnp.float32)
    return {collection: tree for collection, tree in shapes.items() if tree}


def random_variables(model):
    """He-scaled kernels and statistics near the identity, drawn by NumPy."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        if name == "kernel":
            noise *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
        offset, scale = {"kernel": (0, 1), "scale": (1, 0.1), "var": (1, 0.01)}.get(name, (0.05, 0.1))
        return (offset + scale * noise).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(model))


def images(batch, size=32):
    return np.random.default_rng(1).normal(size=(batch, size, size, 3)).astype(np.float32)


def test_every_net_has_a_pinned_parameter_count():
    assert sorted(PARAMETERS) == jaxnets.list_models()


@pytest.mark.parametrize("name", jaxnets.list_models())
def test_has_its_parameters_and_shapes_at_its_default_size(name):
    logits, variables = trace(jaxnets.create_model(name), image_size(name), batch=2)
    assert count(variables) == PARAMETERS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.shape == (2, 1000 if image_size(name) == 224 else 10)
    assert logits.dtype == jnp.float32


def strides_of(name):
    if name == "mobilenet_v2_mini":
        return [1, 2, 4]
    if name.startswith("vgg"):
        return [1, 2, 4, 8, 16, 32]
    if name == "mobilenet_v1_cifar":
        return [1, 2, 4, 8, 16]
    if name.endswith("_cifar"):
        return [1, 2, 4, 8]
    return [2, 4, 8, 16] if name.startswith("squeezenet") else [2, 4, 8, 16, 32]


# Of other depths, groups and widths are others of their family.
ALIKE = ("resnet34", "resnet101", "resnet152", "vgg19", "vgg19_bn")
ALIKE += tuple(f"shufflenet_{net}" for net in ("v1_g1", "v1_g2", "v1_g4", "v2_x1_5", "v2_x2_0"))


def is_alike(name):
    return name.removesuffix("_cifar") in ALIKE


@pytest.mark.parametrize("name", [mark_slow(name) if is_alike(name) else name for name in jaxnets.list_models()])
def test_feature_maps_have_their_strides_and_the_compute_dtype(name):
    size = image_size(name)
    maps, variables = trace(jaxnets.create_model(name, features_only=True, dtype="bfloat16"), size)
    assert all(isinstance(m, FeatureMap) for m in maps)
    assert [m.stride for m in maps] == strides_of(name)
    for m in maps:
        height, width, channels = m.array.shape[1:]
        assert height == width
        # Exact but for SqueezeNet, whose stem does not pad.
        assert size / m.stride - (3 if name.startswith("squeezenet") else 0) <= height <= size / m.stride
        assert m.array.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", SMALL)
def test_no_classes_gives_what_the_classifier_takes(name):
    features, without = trace(jaxnets.create_model(name, num_classes=0, **SMALL[name]), 32)
    shapes = shapes_of(jaxnets.create_model(name, **SMALL[name]))
    classifier = shapes["params"]["classifier"]
    assert without == shapes | {"params": {key: tree for key, tree in shapes["params"].items() if key != "classifier"}}
    assert features.shape == (1, classifier["kernel"].shape[-2])
    assert features.dtype == jnp.float32


def test_the_means_of_the_deepest_map_are_the_features():
    model = jaxnets.create_model("resnet18_cifar", width=0.125, num_classes=0)
    variables = random_variables(model)
    both = jax.jit(lambda x: (model.apply(variables, x), model.clone(features_only=True).apply(variables, x)))
    features, maps = both(images(2))
    np.testing.assert_allclose(features, maps[-1].array.mean((1, 2)), rtol=1e-4, atol=1e-6)


# They have 8 and 11 bits; no error at all would mean that they were not used.
HALVED = [(jnp.bfloat16, 1e-5, 0.1), mark_slow((jnp.float16, 1e-6, 0.02))]
HALVED_ALWAYS = ("mobilenet_v1_cifar", "mobilenet_v2_mini", "resnet18_cifar", "squeezenet1_1_cifar", "vgg16_cifar")
HALVED_ALWAYS += ("shufflenet_v2_x0_5_cifar",)


@pytest.mark.parametrize(("dtype", "least", "most"), HALVED)
@pytest.mark.parametrize("name", [name if name in HALVED_ALWAYS else mark_slow(name) for name in SMALL])
def test_halved_precision_agrees_with_float32(name, dtype, least, most):
    if (name, dtype) == ("mobilenet_v2_cifar", jnp.float16):
        pytest.skip("its random statistics take its linear bottlenecks beyond float16's 65,504")
    model = jaxnets.create_model(name, **SMALL[name])
    variables = random_variables(model)
    x = images(2)
    with ops.using("xla"):
        exact = np.asarray(jax.jit(model.apply)(variables, x))
        rounded = jax.jit(model.clone(dtype=dtype).apply)(variables, x)
    assert rounded.dtype == exact.dtype == np.float32
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert least < error < most


@pytest.mark.parametrize("name", slow_after(1, ["vgg16_cifar", *sorted(SMALL.keys() - {"vgg16_cifar"})]))
def test_an_empty_batch_has_no_logits(name):
    model = jaxnets.create_model(name, **SMALL[name])
    assert jax.eval_shape(model.apply, random_variables(model), images(0)).shape == (0, model.num_classes)


def test_a_net_is_initialised_outside_the_axis_that_it_shares_statistics_over():
    """As flax's BatchNorm is."""
    model = jaxnets.create_model("mobilenet_v1_cifar", width=0.125, bn_axis_name="devices")
    made = jax.eval_shape(partial(model.init, train=True), {"params": jax.random.key(0)}, images(2))
    assert made.keys() == {"params", "batch_stats"}


# Their training is compared with PyTorch's.
SLOW = ("resnet18_cifar", "mobilenet_v1_cifar", "mobilenet_v2_cifar", "mobilenet_v2_mini", "vgg16_cifar", "googlenet")
SLOW += ("shufflenet_v1_g3_cifar", "shufflenet_v2_x0_5_cifar")


@pytest.mark.parametrize("name", [mark_slow(name) if name in SLOW else name for name in SMALL])
def test_gradients_reach_every_parameter(name):
    model = jaxnets.create_model(name, **SMALL[name])
    variables = random_variables(model)
    x = images(4)

    def loss(params):
        logits, updated = model.apply(
            variables | {"params": params}, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
        )
        return -jax.nn.log_softmax(logits)[:, 3].mean(), updated

    gradients, updated = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.any(np.asarray(g)) or not np.all(np.isfinite(g))
    ]
    assert dead == []
    for old, new in zip(jax.tree.leaves(variables.get("batch_stats")), jax.tree.leaves(updated), strict=True):
        assert not np.any(old == new)


@pytest.mark.parametrize(
    ("name", "fields", "parameters"),
    [
        ("mobilenet_v2", {"width": 0.35}, 1_677_128 - 990 * 1281),
        ("mobilenet_v2", {"width": 0.5}, 700_490),
        ("mobilenet_v2", {"width": 0.75}, 1_368_234),
        ("mobilenet_v2", {"width": 1.0}, 2_236_682),
        ("mobilenet_v2", {"width": 1.3}, 5_386_792 - 990 * 1665),
        ("mobilenet_v2", {"width": 1.4}, 4_333_706),
        ("shufflenet_v1_g3", {"width": 0.5, "variant": "megvii"}, 242_134),
        ("shufflenet_v1_g8", {"width": 0.5, "variant": "megvii"}, 250_138),
        ("shufflenet_v1_g3", {"width": 1.5, "variant": "megvii"}, 2_015_578),
        ("shufflenet_v1_g8", {"width": 2.0, "variant": "megvii"}, 3_479_962),
        ("shufflenet_v1_g2_cifar", {"variant": "kuangliu"}, 887_582),
        ("shufflenet_v1_g3_cifar", {"variant": "kuangliu"}, 862_768),
        ("shufflenet_v2_x1_0", {"variant": "megvii"}, 1_265_010),
        ("shufflenet_v2_x2_0_cifar", {"stage_features": (224, 488, 976, 2048)}, 5_338_026),
        # Bypasses: 1x1 convolutions with biases at fire2, 4, 6, 8.
        ("squeezenet1_0", {"bypass": "simple"}, 740_554),
        ("squeezenet1_0", {"bypass": "complex"}, 740_554 + 12_416 + 33_024 + 98_688 + 197_120),
    ],
)
def test_parameters_of_published_variants_with_10_classes(name, fields, parameters):
    _, variables = trace(jaxnets.create_model(name, num_classes=10, **fields), 64)
    assert count(variables) == parameters


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("shufflenet_v1_g4_cifar", {"variant": "kuangliu"}, "cannot have 4 equal groups"),
        ("mobilenet_v2", {"dtype": "float64"}, "float32, bfloat16 or float16"),
        ("mobilenet_v2", {"dtype": "float8_e4m3fn"}, "float32, bfloat16 or float16"),
    ],
)
def test_a_net_that_cannot_be_computed_is_refused_when_it_is_made(name, fields, message):
    with pytest.raises(jaxnets.errors.UserError, match=message):
        jaxnets.create_model(name, **fields)


def test_list_models_is_sorted_and_filters():
    assert jaxnets.list_models() == sorted(jaxnets.list_models())
    assert jaxnets.list_models("mobilenet_v2*") == ["mobilenet_v2", "mobilenet_v2_cifar", "mobilenet_v2_mini"]
    assert jaxnets.list_models("nothing") == []


def test_unknown_model_lists_what_exists_nearest_first():
    with pytest.raises(ValueError, match="no net 'mobilenetv2'; there are mobilenet_v2,") as error:
        jaxnets.create_model("mobilenetv2")
    assert all(name in str(error.value) for name in jaxnets.list_models())


def test_weights_are_asked_for_elsewhere():
    with pytest.raises(ValueError, match="has no field 'pretrained'; .*jaxnets.torch_weights.load.model, FILE. reads"):
        jaxnets.create_model("mobilenet_v2", pretrained=True)
    assert jaxnets.torch_weights.load and {"torch_weights", "trained_run", "__version__"} <= set(dir(jaxnets))


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
    ("dtype", ("float31", "int32", 7, "32-bit", "f4,q!")),
    ("bn_axis_name", (["d"], 1)),
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


BAD_VALUES_ELSEWHERE = [
    ("shufflenet_v1_g3", "feature_group_count", 5, "one of 1, 2, 3, 4, 8"),
    ("shufflenet_v1_g3", "variant", "torchvision", "'paper', 'megvii', 'kuangliu'"),
    ("shufflenet_v2_x1_0", "variant", "paper", "'torchvision', 'megvii'"),
    ("shufflenet_v2_x1_0", "stage_features", (48, 96, 191, 1024), "4 channel counts that 2 divides"),
    ("shufflenet_v2_x1_0", "se_ratio", -1, "a number at least 0"),
    ("squeezenet1_0", "version", "1.2", "'1.0', '1.1'"),
    ("squeezenet1_0", "bypass", "both", "'none', 'simple', 'complex'"),
    ("squeezenet1_0", "batch_norm", "yes", "True or False"),
    ("resnet18", "depth", 20, "18, 34, 50, 101, 152"),
    ("vgg16", "depth", 11, "16, 19"),
    ("vgg16", "hidden_features", (4096, 0), "channel counts"),
    ("googlenet", "large_kernel", 7, "3, 5"),
    ("mobilenet_v1", "stage_strides", (1, 2, 2, 2), "5 strides"),
]


@pytest.mark.parametrize(
    ("name", "field", "value", "says"),
    [
        ("vgg16", "depth", 19, "vgg16 has depth=16; the net with 19 is vgg19"),
        ("vgg16_bn_cifar", "depth", 19, "the net with 19 is vgg19_bn_cifar"),
        ("resnet18", "depth", 50, "the net with 50 is resnet50"),
        ("squeezenet1_0", "version", "1.1", "squeezenet1_0 has version='1.0'; the net with '1.1' is squeezenet1_1"),
        ("shufflenet_v1_g3_cifar", "feature_group_count", 8, "the net with 8 is shufflenet_v1_g8_cifar"),
    ],
)
def test_a_field_that_another_name_stands_for_is_refused(name, field, value, says):
    with pytest.raises(UserError, match=says):
        jaxnets.create_model(name, **{field: value})
    own = jaxnets.create_model(name)
    assert jaxnets.create_model(name, **{field: getattr(own, field)}) == own


@pytest.mark.parametrize("features", [(48, 40, 192, 1024), (48, 48, 96, 1024), (24, 48, 96, 1024)])
def test_megvii_needs_stages_that_grow(features):
    with pytest.raises(UserError, match="variant='megvii' must be 'torchvision' where a stage has no more channels"):
        jaxnets.create_model("shufflenet_v2_x1_0", variant="megvii", stage_features=features)
    jaxnets.create_model("shufflenet_v2_x1_0", stage_features=features)


def test_megvii_needs_more_channels_than_the_stem():
    with pytest.raises(ValueError, match=r"no more channels than the one before \(the stem: 24\)"):
        jaxnets.create_model("shufflenet_v2_x0_5", width=0.25, variant="megvii")


@pytest.mark.parametrize(("name", "field", "value", "allowed"), BAD_VALUES_ELSEWHERE)
def test_bad_value_of_a_nets_own_field_is_refused(name, field, value, allowed):
    with pytest.raises(ValueError, match=f"{field}=.* must be .*{allowed}"):
        jaxnets.create_model(name, **{field: value})


@pytest.mark.parametrize("name", ["mobilenet_v1", "shufflenet_v2_x1_0", "squeezenet1_0", "vgg16"])
def test_nets_without_residuals_refuse_stochastic_depth(name):
    with pytest.raises(ValueError, match=f"{name} has no field 'stochastic_depth'"):
        jaxnets.create_model(name, stochastic_depth=0.1)


@pytest.mark.parametrize(
    ("name", "size", "too_small"), [("squeezenet1_0", 21, 20), ("squeezenet1_1", 17, 16), ("vgg16", 32, 31)]
)
def test_too_small_images_are_refused(name, size, too_small):
    trace(jaxnets.create_model(name), size)
    with pytest.raises(ValueError, match="the images are too small: a .* meets a map"):
        trace(jaxnets.create_model(name), too_small)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "shufflenet_v1_g3", "shufflenet_v2_x0_5"])
def test_padded_nets_take_a_single_pixel(name):
    logits, _ = trace(jaxnets.create_model(name), 1)
    assert logits.shape == (1, 1000)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 32, 32, 1), jnp.float32, "shape .N, H, W, 3., not .2, 32, 32, 1."),
        ((32, 32, 3), jnp.float32, "shape .N, H, W, 3., not .32, 32, 3."),
        ((2, 32, 32, 3), jnp.uint8, "normalised floats, not uint8"),
    ],
)
def test_other_arrays_than_float_rgb_images_are_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        jaxnets.create_model("mobilenet_v2_mini").init(jax.random.key(0), jnp.zeros(shape, dtype))


@each_once(
    {
        "name": ["shufflenet_v1_g2", "shufflenet_v1_g3", "shufflenet_v1_g4", "shufflenet_v1_g8", "shufflenet_v2_x1_0"],
        "width": [0.25, 0.6, 1.3],
    }
)
def test_every_width_builds(name, width):
    logits, _ = trace(jaxnets.create_model(name, width=width), 32)
    assert logits.shape == (1, 1000)


def test_shufflenet_v2_channels_between_the_published_widths():
    published = {
        0.5: (48, 96, 192, 1024),
        1.0: (116, 232, 464, 1024),
        1.5: (176, 352, 704, 1024),
        2.0: (244, 488, 976, 2048),
    }
    for width, channels in published.items():
        assert features_at(width) == channels
    assert features_at(0.25)[:3] == (24, 48, 96)  # as in other code bases, like .33
    assert features_at(0.33)[:3] == (32, 64, 128)
    stage2 = [features_at(w)[0] for w in np.linspace(0.1, 4, 200)]
    assert stage2 == sorted(stage2)


def test_shufflenet_v1_stem_follows_the_authors_code():
    assert [stem_features(w, 3) for w in (0.5, 1.0, 1.5, 2.0)] == [12, 24, 24, 48]
    assert [stem_features(w, 8) for w in (0.5, 1.0, 1.5, 2.0)] == [16, 24, 24, 48]


@pytest.mark.parametrize("name", ["resnet18_cifar", "squeezenet1_1_cifar"])
def test_training_starts_with_even_chances(name):
    model = jaxnets.create_model(name, width=0.25)
    # As `state.create` draws them, which compiles sooner.
    variables = jax.jit(functools.partial(init_at_once, model, train=False))(jax.random.key(0), images(2))
    logits = jax.jit(model.apply)(variables, images(2))
    assert np.abs(jax.nn.softmax(logits) - 0.1).max() < 0.05


def test_stochastic_depth_grows_linearly_and_acts_in_training_only():
    model = jaxnets.create_model("mobilenet_v2_mini", stochastic_depth=0.8)
    assert model.drop_rates(4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    variables = random_variables(model)
    x = images(4)
    train = jax.jit(lambda key: model.apply(variables, x, train=True, rngs={"dropout": key}))
    evaluate = jax.jit(model.apply)(variables, x)
    never = jax.jit(model.clone(stochastic_depth=0.0).apply)(variables, x)
    np.testing.assert_array_equal(evaluate, never)
    assert np.abs(train(jax.random.key(0)) - train(jax.random.key(1))).max() > 1e-3


@pytest.mark.parametrize("name", ["mobilenet_v2_mini", "squeezenet1_1_cifar", "vgg16_cifar"])
def test_dropout_acts_in_training_only(name):
    model = jaxnets.create_model(name, width=0.25, dropout=0.5)
    variables = random_variables(model)
    x = images(2)
    train = jax.jit(lambda key: model.apply(variables, x, train=True, rngs={"dropout": key}))
    one, other = (np.asarray(train(jax.random.key(k))) for k in (0, 1))
    assert np.abs(one - other).max() > 1e-4
    assert np.abs(one - jax.jit(model.apply)(variables, x)).max() > 1e-4


def test_a_field_of_none_keeps_the_nets_own_value():
    own = jaxnets.create_model("mobilenet_v2_cifar")
    assert jaxnets.create_model("mobilenet_v2_cifar", stage_strides=None, num_classes=None) == own


def test_strides_from_a_list_leave_the_net_hashable():
    listed = jaxnets.create_model("mobilenet_v2", stage_strides=[1, 1, 2, 2, 1, 2, 1])
    assert hash(listed) == hash(jaxnets.create_model("mobilenet_v2", stage_strides=(1, 1, 2, 2, 1, 2, 1)))
