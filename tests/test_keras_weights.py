"""Keras's files, written here as Keras writes them, against PyTorch nets with Keras's padding."""

import copy
import io
import logging
import re
import zipfile
from collections import Counter

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import jaxnets
from jaxnets import ops, torch_weights
from jaxnets.errors import UserError
from tests.parity_cases import calibrated, images_of, to_torch
from tests.slow import mark_slow, slow_after
from tests.torch_twins import pytorch_cifar

V2_BLOCK = ["depthwise", "depthwise_BN", "project", "project_BN"]
V2_NAMES = ["Conv1", "bn_Conv1", *(f"expanded_conv_{part}" for part in V2_BLOCK)]
V2_NAMES += [f"block_{i}_{part}" for i in range(1, 17) for part in ["expand", "expand_BN", *V2_BLOCK]]
V2_NAMES += ["Conv_1", "Conv_1_bn", "predictions"]
# Those in the files that Keras itself loads.
V2_PUBLISHED = ["Conv1", "bn_Conv1"]
V2_PUBLISHED += [
    name
    for i in range(17)
    for part in ("expand", "depthwise", "project")[i == 0 :]
    for name in (f"mobl{i}_conv_{i}_{part}", f"bn{i}_conv_{i}_bn_{part}")
]
V2_PUBLISHED += ["Conv_1", "Conv_1_bn", "Logits"]
V1_NAMES = ["conv1", "conv1_bn"]
V1_NAMES += [f"conv_{part}_{i}{bn}" for i in range(1, 14) for part in ("dw", "pw") for bn in ("", "_bn")]
V1_NAMES += ["conv_preds"]
FIELDS = {"width": 0.25, "num_classes": 10, "bn_epsilon": 1e-3}


def pad_same(module, inputs):
    """TensorFlow's padding of a 3x3 convolution with stride 2."""
    height, width = ((1, 1) if side % 2 else (0, 1) for side in inputs[0].shape[2:])
    return nn.functional.pad(inputs[0], (*width, *height))


def pad_after(module, inputs):
    return nn.functional.pad(inputs[0], (0, 1, 0, 1))


def make_v2():
    net = torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.padding = (0, 0)
            module.register_forward_pre_hook(pad_same)
    return net


def make_v1():
    net = pytorch_cifar.MobileNet(0.25)
    net.conv1.stride = (2, 2)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.padding = (0, 0)
            module.register_forward_pre_hook(pad_same if module is net.conv1 else pad_after)
    return net


NETS = {
    "mobilenet_v1": (make_v1, V1_NAMES, FIELDS | {"padding": "keras"}),
    "mobilenet_v2": (make_v2, V2_NAMES, FIELDS | {"padding": "same"}),
}


@pytest.fixture(scope="module", params=NETS)
def published(request):
    """The name, fields and PyTorch twin of a net, and its layers as Keras has them, in order."""
    make, names, fields = NETS[request.param]
    net = calibrated(make(), 64, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    modules = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    return request.param, fields, net, dict(zip(names, map(keras_variables, modules), strict=True))


def keras_variables(module):
    """The class and the variables, in Keras's order and shapes."""
    values = {name: value.numpy() for name, value in module.state_dict().items()}
    if isinstance(module, nn.BatchNorm2d):
        names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        return "batch_normalization", {ours: values[theirs] for ours, theirs in names.items()}
    bias = {"bias": values["bias"]} if "bias" in values else {}
    if isinstance(module, nn.Linear):
        return "dense", {"kernel": values["weight"].T} | bias
    if module.groups > 1:
        return "depthwise_conv2d", {"depthwise_kernel": values["weight"].transpose(2, 3, 0, 1)} | bias
    return "conv2d", {"kernel": values["weight"].transpose(2, 3, 1, 0)} | bias


def test_arrays_outside_of_layers_find_no_place(tmp_path):
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file["kernel"] = np.zeros((1, 1, 3, 4), np.float32)
        file["vars/0"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match="net.h5 does not fit MobileNetV2: its entries"):
        torch_weights.load("mobilenet_v2", tmp_path / "net.h5")


def write_h5(path, layers, root=""):
    """As `model.save_weights` did before Keras 3: by the layers' names; as `model.save` with a `root`."""
    with h5py.File(path, "w") as file:
        for name, (_, variables) in sorted(layers.items()):
            for variable, value in variables.items():
                file[f"{root}{name}/{name}/{variable}:0"] = value


def write_keras(path, layers, extra=()):
    """As `model.save` does since: by classes, numbered in order."""
    content, numbers = io.BytesIO(), Counter()
    with h5py.File(content, "w") as file:
        for name, variables in layers.values():
            group = f"layers/{name}_{numbers[name]}" if numbers[name] else f"layers/{name}"
            numbers[name] += 1
            for i, value in enumerate(variables.values()):
                file[f"{group}/vars/{i}"] = value
        file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
        file["optimizer/vars/0"] = np.int64(7)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.weights.h5", content.getvalue())


def conv_classifier(layers):
    """Keras's MobileNet classifies by a 1x1 convolution."""
    *body, name = layers
    kind, variables = layers[name]
    if name == "conv_preds":
        kind, variables = "conv2d", variables | {"kernel": variables["kernel"][None, None]}
    return {name: layers[name] for name in body} | {name: (kind, variables)}


@pytest.mark.parametrize(("suffix", "write"), slow_after(1, [(".KERAS", write_keras), (".h5", write_h5)]))
def test_logits_are_those_of_the_net_with_keras_padding(published, tmp_path, caplog, suffix, write):
    name, fields, net, layers = published
    write(tmp_path / f"net{suffix}", conv_classifier(layers))
    activation = {"activation": "relu" if name == "mobilenet_v1" else "relu6"}
    with caplog.at_level(logging.WARNING):
        published = torch_weights.load_published(name, tmp_path / f"net{suffix}", **fields, **activation)
    variables, layout = published.variables, published.layout
    assert layout.normalization == ((0.5,) * 3, (0.5,) * 3)  # Keras's nets see images from -1 to 1
    assert ("activation='relu6'" in caplog.text) == (name == "mobilenet_v1")
    assert "stride" not in caplog.text
    # In float64, where only BatchNorm's vectors round: in float32 the sums of either side take 1e-5 of the largest.
    net = copy.deepcopy(net).double()
    with jax.enable_x64(True), ops.using("reference"):
        apply = jax.jit(jaxnets.create_model(name, **fields, **activation, dtype=jnp.float64).apply)
        for side in (75,) if name == "mobilenet_v1" else (64, 75):
            images = images_of(side, 2).astype(np.float64)
            with torch.no_grad():
                expected = net(to_torch(images)).numpy()
            assert np.abs(apply(variables, images) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_pytorchs_padding_is_warned_of(published, tmp_path, caplog):
    name, fields, _, layers = published
    write_h5(tmp_path / "net.h5", conv_classifier(layers))
    torch_weights.load(name, tmp_path / "net.h5", width=0.25, num_classes=10)
    assert re.search(r"net of Keras has .*bn_epsilon=0.001, padding='(same|keras)', this one", caplog.text)


def test_another_stride_is_warned_of(published, tmp_path, caplog):
    name, fields, _, layers = published
    write_h5(tmp_path / "net.h5", conv_classifier(layers))
    torch_weights.load(name, tmp_path / "net.h5", **fields, stem_stride=1)
    assert re.search(r"the published net of Keras has .*stem_stride=2, this one .*stem_stride=1: ", caplog.text)


@pytest.mark.parametrize("published", ["mobilenet_v2"], indirect=True)
@pytest.mark.parametrize(
    ("names", "layout", "top"),
    [
        (V2_PUBLISHED, "Keras (published)", True),
        mark_slow((V2_PUBLISHED, "Keras (published)", False)),
        ([*V2_NAMES[:-1], "Logits"], "Keras (Logits)", True),
    ],
)
def test_older_names_mean_the_same_layers(published, tmp_path, caplog, names, layout, top):
    name, fields, _, layers = published
    older = dict(zip(names, layers.values(), strict=True))
    if not top:
        fields = fields | {"num_classes": 0}
        layers, older = (dict(list(named.items())[:-1]) for named in (layers, older))
    write_h5(tmp_path / "today.h5", layers)
    write_h5(tmp_path / "older.h5", older, "" if top else "model_weights/")
    with caplog.at_level(logging.WARNING):
        expected = torch_weights.load(name, tmp_path / "today.h5", **fields)
        found = torch_weights.load_published(name, tmp_path / "older.h5", **fields)
        assert not caplog.text
        torch_weights.load(name, tmp_path / "older.h5", **fields, stem_stride=1)
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected)
    assert found.layout.normalization == ((0.5,) * 3, (0.5,) * 3)
    assert f"the published net of {layout} has stem_stride=2, this one stem_stride=1" in caplog.text


def test_another_layer_or_one_less_is_refused(published, tmp_path):
    name, fields, _, layers = published
    layers = conv_classifier(layers)
    write_h5(tmp_path / "more.h5", layers | {"dense": ("dense", {"kernel": np.zeros((4, 4), np.float32)})})
    with pytest.raises(UserError, match=r"dense \(weight \(4, 4\)\) is left over"):
        torch_weights.load(name, tmp_path / "more.h5", **fields)
    *_, last = layers
    write_h5(tmp_path / "less.h5", {key: value for key, value in layers.items() if key != last})
    with pytest.raises(UserError, match=f"{last}.weight is missing, for the net's classifier"):
        torch_weights.load(name, tmp_path / "less.h5", **fields)


def test_data_outside_the_file_is_not_read(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(4096))
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file.create_dataset("Conv1/Conv1/kernel:0", (3, 3, 3, 8), "f4", external=[(tmp_path / "secret", 0, 864)])
    with pytest.raises(UserError, match="lies outside the file"):
        torch_weights.load("mobilenet_v2", tmp_path / "net.h5")


def test_a_data_set_that_inflates_is_not_read(tmp_path):
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file.create_dataset("Conv1/Conv1/kernel:0", (1 << 20, 1 << 12), "f4", chunks=True, compression="gzip")
    with pytest.raises(UserError, match="more than 128 MiB"):
        torch_weights.load("mobilenet_v2", tmp_path / "net.h5")


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("content", [b"", b"noise" * 1000, b"\x89HDF\r\n\x1a\n" + bytes(500)])
def test_a_damaged_file_is_one_sentence(tmp_path, suffix, content):
    (tmp_path / f"net{suffix}").write_bytes(content)
    with pytest.raises(UserError, match="not a valid Keras weight file"):
        torch_weights.load("mobilenet_v2", tmp_path / f"net{suffix}")
