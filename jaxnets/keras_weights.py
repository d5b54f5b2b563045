"""Weight files of Keras's MobileNet and MobileNetV2, as entries with PyTorch's suffixes and shapes."""

import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets.errors import UserError
from jaxnets.weight_files import KERAS_SUFFIXES, Weights, first_line, require_file

LIMIT = 1 << 29  # bytes of weights; the largest of these nets has 30 MB
# Keras's variables by name, and in `.keras` files by number, with PyTorch's names.
BY_NAME = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
BY_NUMBER = {
    "batch_normalization": ("weight", "bias", "running_mean", "running_var"),
    "conv2d": ("weight", "bias"),
    "depthwise_conv2d": ("weight", "bias"),
    "dense": ("weight", "bias"),
}
NO_WEIGHTS = re.compile("^optimizer|seed_generator")  # state of the training and of dropout


def is_keras_file(source) -> bool:
    """Whether `source` is a path with a suffix of Keras's."""
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix in KERAS_SUFFIXES


def read(source: str | os.PathLike) -> Weights:
    """The weights in a `.h5` file, old or new, or in a `.keras` file; UserError for a damaged or hostile one.

    Entries are named by Keras's layers where the file has their names, otherwise by their numbered classes.
    """
    path = Path(source)
    require_file(path)
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"reading {path} needs h5py (pip install h5py)") from error
    try:
        content = _member(path) if path.suffix == ".keras" else path
        with h5py.File(content, "r") as file:
            arrays = _arrays(file, h5py)
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except Exception as error:  # HDF5 and zip report a damaged file in many ways
        raise UserError(f"{path} is not a whole Keras weight file: {first_line(error)}") from error
    entries: dict[str, np.ndarray] = {}
    for place, array in arrays.items():
        name = _torch_name(place)
        if name in entries:
            raise UserError(f"{path} has two layers for {name}: save the weights of the one net alone")
        entries[name] = _torch_shaped(array)
    if not entries:
        raise UserError(f"{path} holds no weights of convolutions, BatchNorms or dense layers")
    return Weights(entries, False, str(path))


def _member(path: Path) -> io.BytesIO:
    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as file:
        content = file.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise UserError(f"its weights take more than {LIMIT >> 20} MiB")
    return io.BytesIO(content)


def _arrays(file, h5py) -> dict[str, np.ndarray]:
    """All data sets by path, none from outside the file, and no more than `LIMIT` bytes."""
    found: dict[str, Any] = {}

    def add(name, item):
        if isinstance(item, h5py.Dataset) and not NO_WEIGHTS.search(name):
            if item.external or item.is_virtual:
                raise UserError(f"{name} lies outside the file")
            found[name] = item

    file.visititems(add)  # does not follow links to other files
    if sum(item.nbytes for item in found.values()) > LIMIT:
        raise UserError(f"its weights take more than {LIMIT >> 20} MiB")
    return {name: item[()] for name, item in found.items()}


def _torch_name(place: str) -> str:
    """PyTorch's name for the data set at a path such as conv1/conv1/kernel:0 or layers/conv2d_1/vars/0."""
    *_, layer, variable = place.removesuffix(":0").split("/")
    if layer == "vars":
        layer = place.split("/")[-3]
        suffixes = BY_NUMBER.get(re.sub(r"_\d+$", "", layer), ())
        suffix = dict(zip("0123", suffixes)).get(variable, variable)
    else:
        suffix = BY_NAME.get(variable, variable)
    return f"{layer}.{suffix}"


def _torch_shaped(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        depthwise = array.shape[-1] == 1 and array.shape[0] > 1  # height, width, channels, 1
        return array.transpose((2, 3, 0, 1) if depthwise else (3, 2, 0, 1))
    return array.T
