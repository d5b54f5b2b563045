"""PyTorch weights in and out: a state_dict to a net's variables and back, strictly.

The names of a known layout (`layouts`) decide which entry goes where; otherwise the order of the modules does, which
must be the order in which the net calls its layers. Every entry must find its place.
"""

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import create_model
from jaxnets.errors import UserError
from jaxnets.layer_list import Layer, layers_of
from jaxnets.weights import keras_weights, weight_files
from jaxnets.weights.layouts import OWN, Layout, differing, layouts_of, warn_of_differing, warn_unless_published
from jaxnets.weights.megvii_weights import ChannelOrder
from jaxnets.weights.module_match import ANY, STATISTICS, TRACKED, Match, Module, explain_mismatch, find_match, group

Tree = dict[str, Any]
Arrays = dict[str, np.ndarray]  # of one layer: kernel, bias, or scale, bias, mean, var

BATCH_NORM = dict(zip(("scale", "bias", "mean", "var"), STATISTICS))
BATCH_STATS = ("mean", "var")
# Fields in which a net may differ from a file's: those of training and precision, and those of the classifier, whose
# shape decides.
MAY_DIFFER = {"parent", "name", "dropout", "stochastic_depth", "bn_momentum", "bn_axis_name", "dtype"}
MAY_DIFFER |= {"num_classes", "features_only"}

logger = logging.getLogger(__name__)


class Published(NamedTuple):
    """The weights of a file, and what it says about the images that the net expects."""

    variables: dict[str, Tree]
    images: weight_files.Images = weight_files.Images()
    layout: Layout | None = None
    num_classes: int | None = None  # of the file's classifier, if it has one
    head_is_new: bool = False  # initialised, since the file's has another shape


def load(model: nn.Module | str, source, *, head: str = "strict", **overrides) -> dict[str, Tree]:
    """The variables `{'params', 'batch_stats'}`, float32, of a net from published or PyTorch weights.

    `model` is a net, or a name for `create_model`; `overrides` are its fields. `source` is a `.pth`/`.pt` file
    (read by PyTorch with `weights_only=True`), a `.safetensors` file, a `.h5`/`.keras` file of Keras's MobileNet
    or MobileNetV2, or a mapping name -> tensor or array. Layouts: torchvision, timm, kuangliu's pytorch-cifar,
    chenyaofo's pytorch-cifar-models, megvii's ShuffleNet-Series (images stay RGB), and any PyTorch net of the
    same architecture whose modules are in forward order. A convolution's bias before a BatchNorm is folded into
    the latter's running mean. `head="drop"`: if the number of classes differs, the file's classifier is left out
    and ours is initialised.

    Raises UserError (a ValueError) that names both sides if an entry is missing, left over, or of a wrong shape, or if
    the file says that its net has other fields; with `head="drop"`, for fine-tuning, the latter is only a warning.
    """
    return load_published(model, source, head=head, **overrides).variables


def load_published(model: nn.Module | str, source, *, head: str = "strict", **overrides) -> Published:
    """As `load`, with what is known about the images that the net was trained on; `source` may also be `Weights`."""
    if head not in ("strict", "drop"):
        raise UserError(f"head={head!r} must be 'strict' or 'drop'")
    model = create_model(model, **overrides) if isinstance(model, str) else _changed(model, overrides)
    weights = source
    if not isinstance(source, weight_files.Weights):
        weights = (keras_weights if keras_weights.is_keras_file(source) else weight_files).read(source)
    *body, classifier = _complete_layers(model)
    wanted = [*body, classifier] if _has_classifier(model) else layers_of(model)
    found = _match(model, weights, wanted, [*body, classifier], head)
    arrays = _arrays_of(model, found, weights.origin)
    variables: dict[str, Tree] = {"params": {}, "batch_stats": {}}
    fitting = np.shape(arrays.get(classifier.path, {}).get("kernel")) == classifier.shape
    for layer in wanted:
        new = layer is classifier and not fitting
        _insert(variables, layer, _initial(layer) if new else arrays.get(layer.path, {}))
    variables = {collection: jax.tree.map(jnp.asarray, tree) for collection, tree in variables.items()}
    head_is_new = classifier in wanted and not fitting
    return Published(variables, weights.images, found.layout, _classes_of(found, classifier), head_is_new)


def _match(
    model: nn.Module, weights: weight_files.Weights, wanted: Sequence[Layer], complete: Sequence[Layer], head: str
) -> Match:
    """The modules of a file for the `wanted` layers of a net, or for others of the `complete` one if `head` allows it.

    UserError if they are another net's, by their names and shapes or by what the file says.
    """
    *body, classifier = complete
    candidates = [wanted]
    if head == "drop":  # and what a features-only net lacks: VGG's hidden layers
        candidates = [[*body, replace(classifier, shape=(*classifier.shape[:-1], ANY))], body]
        candidates += [wanted] if len(wanted) < len(body) else []
    modules = group(weights)
    found = next(filter(None, (find_match(model, layers, weights, modules) for layers in candidates)), None)
    differences, remedy = _compare_fields(model, weights.fields)
    if found is None:
        reason = explain_mismatch(model, candidates[0], weights, modules)
        raise UserError(f"{reason}; {differences}" if differences else reason)
    if differences and head == "strict":
        raise UserError(
            f"{weights.origin} fits, but {differences}: give this one the same, on the command line with {remedy}"
        )
    if differences:
        logger.warning("%s fits, but %s: the outputs will differ", weights.origin, differences)
    if found.layout and not weights.fields:  # which would say whether it is the published net
        warn_unless_published(model, found.layout, _classes_of(found, classifier))
    return found


def _classes_of(found: Match, classifier: Layer) -> int | None:
    """How many classes the file's classifier has; None if there is no classifier."""
    return np.shape(found.modules[-1]["weight"])[0] if found.layers[-1].path == classifier.path else None


def export(model: nn.Module, variables: dict[str, Tree], layout: str | None = None) -> dict[str, np.ndarray]:
    """The state_dict of a net as the code base `layout` names and shapes it.

    `layout`: torchvision, timm, kuangliu, chenyaofo or megvii, if it has the net, or "jaxnets", our own names, for
    every net. By default, that of a code base with this exact net, preferring torchvision's names; otherwise the first
    whose names and shapes fit. Returns float32 NumPy arrays, which `torch.from_numpy` turns into what `load_state_dict`
    takes, and an int64 0 for each BatchNorm's `num_batches_tracked`; `load` gives back the same bits.

    Raises UserError for a layout without this net, and for variables of another net.
    """
    layers = layers_of(model)
    chosen, names = _choose_layout(model, layers, layout)
    orders = chosen.channel_orders(model, layers)
    state_dict = {}
    for layer, expected, name in zip(layers, chosen.expected(layers), names):
        module = _to_torch(layer, expected, _extract(variables, layer))
        module = _reordered(module, orders.get(layer.path), inverse=True)
        state_dict |= {f"{name}.{suffix}": np.array(value, order="C") for suffix, value in module.items()}
    _require_no_more(variables, layers)
    return state_dict


def fields_of(model: nn.Module) -> dict[str, Any]:
    """The fields of a net that decide its logits, except the number of classes, as JSON gives them back."""
    names = (field.name for field in dataclass_fields(model) if field.name not in MAY_DIFFER)
    values = ((name, getattr(model, name)) for name in names)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values}


def as_arguments(fields: Mapping[str, Any]) -> str:
    """The arguments that give a net these fields in a command, quoted for the shell."""
    words = (value if isinstance(value, str) and value.isidentifier() else repr(value) for value in fields.values())
    return " ".join(shlex.quote(f"--field={name}={word}") for name, word in zip(fields, words))


def _compare_fields(model: nn.Module, theirs: Mapping[str, Any]) -> tuple[str, str]:
    """How a net differs from the file's, by the file's own words; and the arguments that make it the same."""
    ours = fields_of(model)
    differing = {name: value for name, value in theirs.items() if name not in ours or ours[name] != value}
    if not differing:
        return "", ""
    has = ", ".join(f"{name}={value!r}" for name, value in differing.items())
    have = ", ".join(f"{name}={ours[name]!r}" if name in ours else f"no {name}" for name in differing)
    return f"its net has {has}, this one {have}", as_arguments(differing)


def _changed(model: nn.Module, fields: dict[str, Any]) -> nn.Module:
    try:
        return model.clone(**fields)
    except TypeError as error:
        raise UserError(f"{type(model).__name__}: {error}") from error


def _has_classifier(model: nn.Module) -> bool:
    return bool(model.num_classes) and not model.features_only


def _complete_layers(model: nn.Module) -> tuple[Layer, ...]:
    """The layers of the net with its classifier, or with one of a single class if it has none."""
    return layers_of(model if _has_classifier(model) else model.clone(num_classes=1, features_only=False))


def _choose_layout(model: nn.Module, layers: Sequence[Layer], name: str | None) -> tuple[Layout, list[str]]:
    known = layouts_of(model)
    names = {key: names for key, layout in known.items() if (names := layout.names(layers)) and layout.writable}
    if name is None:
        fitting = [key for key in names if known[key].fits(model)]
        alike = [key for key in fitting if known[key].names is known[fitting[0]].names]
        # The first one's names, if a code base has this exact net under them, else those of any that has it.
        others = (key for key in (*alike, *fitting) if key != OWN)
        exact = (key for key in others if not differing(model, known[key].usual | known[key].strides))
        name = next(exact, fitting[0])
    if name not in names:
        raise UserError(f"layout={name!r} has no such {type(model).__name__}: use one of {', '.join(names)}")
    known[name].require_fields(model, name)
    warn_of_differing(model, name, known[name].usual)
    return known[name], names[name]


def _arrays_of(model: nn.Module, found: Match, origin: str) -> dict[tuple[str, ...], Arrays]:
    """Every layer's arrays, in our shapes and channel order."""
    orders = found.layout.channel_orders(model, found.layers) if found.layout else {}
    arrays: dict[tuple[str, ...], Arrays] = {}
    before: Module = {}
    for layer, module in zip(found.layers, found.modules):
        converted = {}
        for suffix, value in module.items():
            if suffix == TRACKED:
                continue
            try:
                converted[suffix] = weight_files.to_numpy(value)
            except UserError as error:
                raise UserError(f"{origin}: {suffix} for the net's {layer.name}: {error}") from error
            if not np.isfinite(converted[suffix]).all():
                logger.warning("%s: %s for the net's %s is not finite everywhere", origin, suffix, layer.name)
        module = _reordered(converted, orders.get(layer.path))
        if layer.kind == "batch_norm" and "bias" in before:
            module["running_mean"] = module["running_mean"] - before["bias"]
        arrays[layer.path] = _from_torch(layer, module)
        before = module if layer.normalised and not layer.use_bias else {}
    return arrays


def _from_torch(layer: Layer, module: dict[str, np.ndarray]) -> Arrays:
    if layer.kind == "batch_norm":
        return {ours: module[theirs] for ours, theirs in BATCH_NORM.items()}
    weight = module["weight"]
    kernel = weight.transpose(2, 3, 1, 0) if layer.kind == "conv" else weight.reshape(len(weight), -1).T
    bias = {"bias": module.get("bias", np.zeros(len(weight), np.float32))} if layer.use_bias else {}
    return {"kernel": kernel} | bias


def _to_torch(layer: Layer, expected: Layer, arrays: Arrays) -> dict[str, np.ndarray]:
    """The entries of a layer's module in a layout that has the layer as `expected`."""
    if layer.kind == "batch_norm":
        return {theirs: arrays[ours] for ours, theirs in BATCH_NORM.items()} | {TRACKED: np.array(0, np.int64)}
    kernel = arrays["kernel"]
    weight = kernel.transpose(3, 2, 0, 1) if layer.kind == "conv" else kernel.T
    *inside, inputs, outputs = expected.shape
    module = {"weight": weight.reshape(outputs, inputs, *inside)}
    bias = arrays.get("bias", np.zeros(outputs, np.float32))
    if expected.use_bias:
        return module | {"bias": bias}
    if np.any(bias):
        raise UserError(f"this layout has no bias for {layer.name}, but the net's is not 0")
    return module


def _reordered(module: dict[str, np.ndarray], order: ChannelOrder | None, inverse: bool = False) -> Module:
    """The entries of a module with the file's channels in our order, or the `inverse`."""
    if order is None:
        return module
    result = {}
    for suffix, value in module.items():
        index = _index(order, value)
        result[suffix] = np.empty_like(value) if inverse else value[index]
        if inverse:
            result[suffix][index] = value
    return result


def _index(order: ChannelOrder, value: np.ndarray) -> tuple:
    if value.ndim == 0:  # the counter
        return ()
    outputs = np.arange(len(value)) if order.outputs is None else order.outputs
    if value.ndim == 1 or order.inputs is None:
        return (outputs,)
    return outputs[:, None], order.inputs


def _initial(layer: Layer) -> Arrays:
    """The arrays of an untrained layer, always the same."""
    kernel = layer.kernel_init(jax.random.key(0), layer.shape, jnp.float32)
    return {"kernel": kernel} | ({"bias": np.zeros(layer.shape[-1], np.float32)} if layer.use_bias else {})


def _collection(layer: Layer, name: str) -> str:
    return "batch_stats" if layer.kind == "batch_norm" and name in BATCH_STATS else "params"


def _insert(variables: dict[str, Tree], layer: Layer, arrays: Arrays):
    for name, array in arrays.items():
        tree = variables[_collection(layer, name)]
        for key in layer.path:
            tree = tree.setdefault(key, {})
        tree[name] = array


def _extract(variables: dict[str, Tree], layer: Layer) -> Arrays:
    """A layer's arrays, float32; UserError if one is missing or has another shape."""
    names = BATCH_NORM if layer.kind == "batch_norm" else ("kernel", "bias") if layer.use_bias else ("kernel",)
    arrays = {}
    for name in names:
        collection = _collection(layer, name)
        tree = variables.get(collection, {})
        for key in (*layer.path, name):
            tree = tree.get(key, {}) if isinstance(tree, Mapping) else {}
        shape = layer.shape if name == "kernel" else layer.shape[-1:]
        if np.shape(tree) != shape:
            has = f"has the shape {np.shape(tree)}" if hasattr(tree, "shape") else "is missing"
            raise UserError(f"{collection}.{layer.name}.{name} {has}, where the net has {shape}")
        arrays[name] = np.asarray(tree, np.float32)
    return arrays


def _require_no_more(variables: dict[str, Tree], layers: Sequence[Layer]):
    """UserError if there are variables that belong to none of the layers."""
    known = {(_collection(layer, name), *layer.path, name) for layer in layers for name in (*BATCH_NORM, "kernel")}
    for path, _ in jax.tree_util.tree_leaves_with_path(dict(variables)):
        place = tuple(key.key for key in path)
        if place not in known:
            raise UserError(f"{'.'.join(place)} is left over: the net has no such variable")
