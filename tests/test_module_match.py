"""How entries find their layers: by position where names say nothing, and what is said where they do not."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxnets
from jaxnets import torch_weights
from jaxnets.errors import UserError
from jaxnets.layer_list import layers_of
from jaxnets.weights.module_match import explain_mismatch, find_match, group
from jaxnets.weights.weight_files import Weights

# Two nets with few layers: biases and no BatchNorm; BatchNorm, and by choice biases before it.
MODELS = {
    "mobilenet_v2_mini": jaxnets.create_model("mobilenet_v2_mini"),
    "vgg16_bn_cifar": jaxnets.create_model("vgg16_bn_cifar", width=0.125),
}


def state_dict_of(model, biased=False):
    """Entries in forward order, each with its own numbers."""
    entries, start = {}, 0
    for i, layer in enumerate(layers_of(model)):
        if layer.kind == "batch_norm":
            shapes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), layer.shape)
            shapes["num_batches_tracked"] = ()
        else:
            *inside, inputs, outputs = layer.shape
            shapes = {"weight": (outputs, inputs, *inside)}
            if layer.use_bias or biased:
                shapes["bias"] = (outputs,)
        for suffix, shape in shapes.items():
            size = int(np.prod(shape))
            entries[f"layer{i}.{suffix}"] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
            start += size
    return entries


def weights_of(entries, ordered=True):
    return Weights(entries, ordered, "the file")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_names_that_say_nothing_are_matched_by_position(name, biased):
    model = MODELS[name]
    entries = state_dict_of(model, biased)
    expected = list(group(weights_of(entries)).values())
    bare = {str(i): value for i, value in enumerate(entries.values())}
    weights = weights_of(bare)
    match = find_match(model, layers_of(model), weights, group(weights))
    for found, module in zip(match.modules, expected, strict=True):
        assert found.keys() == module.keys()
        assert all(np.array_equal(found[suffix], module[suffix]) for suffix in module)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_to_bare_entries_is_refused(data):
    model = MODELS[data.draw(st.sampled_from(list(MODELS)))]
    entries = list(state_dict_of(model).values())
    place = data.draw(st.integers(0, len(entries) - 1).filter(lambda i: entries[i].ndim))
    match data.draw(st.sampled_from(["drop", "add", "reshape"])):
        case "drop":
            entries.pop(place)
        case "add":
            entries.insert(place, np.zeros((3, 5)))
        case "reshape":
            entries[place] = entries[place][..., None]
    with pytest.raises(UserError):
        torch_weights.load(model, {str(i): value for i, value in enumerate(entries)})


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("abc.", min_size=1, max_size=4), min_size=3, max_size=3))
def test_leading_names_that_all_share_do_not_matter(parts):
    model = MODELS["mobilenet_v2_mini"]
    named = dict(zip((layer.name for layer in layers_of(model)), group(weights_of(state_dict_of(model))).values()))
    entries = {f"{n}.{suffix}": value for n, module in named.items() for suffix, value in module.items()}
    prefix = "".join(f"{part.strip('.') or 'x'}." for part in parts)
    prefixed = weights_of({prefix + name: value for name, value in entries.items()}, ordered=False)
    match = find_match(model, layers_of(model), prefixed, group(prefixed))
    assert all(m["weight"] is named[layer.name]["weight"] for layer, m in zip(match.layers, match.modules))
    assert match.layout


def test_a_counter_that_only_some_batch_norms_have_is_missing():
    entries = state_dict_of(MODELS["vgg16_bn_cifar"])
    del entries["layer3.num_batches_tracked"]
    with pytest.raises(UserError, match=r"layer3\.num_batches_tracked is missing"):
        torch_weights.load(MODELS["vgg16_bn_cifar"], entries)


def test_older_files_have_no_counters():
    model = MODELS["vgg16_bn_cifar"]
    entries = {name: value for name, value in state_dict_of(model).items() if "tracked" not in name}
    assert torch_weights.load(model, entries)["params"].keys() == {layer.path[0] for layer in layers_of(model)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: e.pop("layer3.running_var"),
            r"layer3\.running_var is missing, for the net's stage1_conv1\.bn",
        ),
        (
            lambda e: e.update({"layer0.alpha": np.zeros(2)}),
            r"layer0\.alpha is left over: the net's stage1_conv0\.conv has no place for it",
        ),
        (
            lambda e: e.update({"layer0.weight": np.zeros((8, 4, 3, 3))}),
            r"layer0\.weight has the shape \(8, 4, 3, 3\) where the net's stage1_conv0\.conv takes \(8, 3, 3, 3\)",
        ),
        (lambda e: e.update({"other.weight": np.zeros(3)}), r"it has 28 modules where the net has 27 layers"),
        (
            lambda e: e.update({"layer26.weight": np.zeros((4, 64)), "layer26.bias": np.zeros(4)}),
            r"takes \(10, 64\); .*takes \(10,\); set num_classes to the file's, or in Python pass head='drop'",
        ),
    ],
)
def test_both_sides_are_named(change, message):
    model = MODELS["vgg16_bn_cifar"]
    entries = state_dict_of(model)
    change(entries)
    weights = weights_of(entries)
    text = explain_mismatch(model, layers_of(model), weights, group(weights))
    assert re.match("the file does not fit VGG: ", text) and re.search(message, text)
    with pytest.raises(UserError, match=message):
        torch_weights.load(model, entries)


def test_unknown_names_without_an_order_are_refused():
    model = MODELS["vgg16_bn_cifar"]
    weights = weights_of(state_dict_of(model), ordered=False)
    assert find_match(model, layers_of(model), weights, group(weights)) is None
    text = explain_mismatch(model, layers_of(model), weights, group(weights))
    assert "this kind of file does not keep their order" in text


def test_what_stands_beside_a_wrapped_net_is_named():
    """Lightning keeps a loss's weights with the net's."""
    model = MODELS["vgg16_bn_cifar"]
    state_dict = torch_weights.export(model, torch_weights.load(model, state_dict_of(model)), "kuangliu")
    entries = {f"model.{name}": value for name, value in state_dict.items()} | {"criterion.weight": np.zeros(3)}
    with pytest.raises(UserError, match=r"VGG: criterion \(weight \(3,\)\) is left over: the net has no such layer$"):
        torch_weights.load(model, entries)
