"""Weight files of Keras's MobileNet and MobileNetV2, as entries with PyTorch's suffixes and shapes."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxnets.errors import UserError, first_line
from jaxnets.plain_files import user_path
from jaxnets.weights import h5_arrays
from jaxnets.weights.weight_files import KERAS_SUFFIXES, Weights, require_file

# PyTorch's names for Keras's variables: by their names, and in `.keras` files by their numbers.
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
TIMEOUT = 30  # seconds; on an idle machine it takes half of one


def is_keras_file(source) -> bool:
    """Whether `source` is a path with one of Keras's suffixes."""
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() in KERAS_SUFFIXES


def read(source: str | os.PathLike) -> Weights:
    """The weights in a `.h5` file, old or new, or in a `.keras` file; UserError for a damaged or hostile one.

    Entries are named after Keras's layers if the file has their names, otherwise after their numbered classes.
    """
    path = user_path(source)
    require_file(path)
    if importlib.util.find_spec("h5py") is None:
        raise UserError(f"reading {path} needs h5py (pip install -e '.[keras]')")
    try:
        arrays = _arrays(path)
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except Exception as error:  # HDF5 and zip report a damaged file in many ways
        raise UserError(f"{path} is not a valid Keras weight file: {first_line(error)}") from error
    entries: dict[str, np.ndarray] = {}
    for place, array in arrays.items():
        name = _torch_name(place)
        if name in entries:
            raise UserError(f"{path} has two layers for {name}: save the weights of a single net")
        entries[name] = _torch_shaped(array)
    if not entries:
        raise UserError(f"{path} holds no weights of convolutions, BatchNorms or dense layers")
    return Weights(entries, False, str(path))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """What `h5_arrays` finds in the file, in bounded memory and time."""
    with tempfile.TemporaryDirectory(prefix="jaxnets-") as folder:
        target = Path(folder) / "arrays.npz"
        command = [sys.executable, "-P", h5_arrays.__file__, str(path.absolute()), str(target)]
        # The same modules as here; and one BLAS thread, since each would take a share of the memory.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ValueError(f"reading it took more than {TIMEOUT} seconds") from None
        if done.returncode:
            said = done.stderr.strip().splitlines()
            reason = said[-1] if said else "reading it takes too long, or crashes the HDF5 library"
            raise (UserError if done.returncode == h5_arrays.REFUSED else ValueError)(reason)
        with np.load(target) as file:
            return {str(name): file[f"array{i}"] for i, name in enumerate(file["names"])}


def _torch_name(place: str) -> str:
    """PyTorch's name for the data set at a path such as conv1/conv1/kernel:0 or layers/conv2d_1/vars/0."""
    above, layer, variable = ["", "", *place.removesuffix(":0").split("/")][-3:]  # at the root there is no layer
    if layer == "vars":
        layer = above
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
