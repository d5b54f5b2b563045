"""Weight files and state_dicts as they come: read without running any code, unwrapped, with plain names."""

import io
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxnets.errors import UserError, first_line
from jaxnets.plain_files import parse_json, user_path
from jaxnets.weights import pickle_check

Triple = tuple[float, float, float]
Normalization = tuple[Triple, Triple]  # mean and standard deviation by channel, of images in [0, 1]

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", *KERAS_SUFFIXES)
# Names under which training scripts keep the state_dict in a larger checkpoint; the first one present counts.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "ema_state_dict")
WRAPPING_MODULES = {"module", "_orig_mod"}  # DataParallel, torch.compile: anywhere in a name
COUNTERS = ("n_averaged",)  # what torch.optim.swa_utils.AveragedModel has besides the weights
SAFETENSORS_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
}
# Keys in a safetensors file's metadata
NORMALIZATION = ("jaxnets.mean", "jaxnets.std")
IMAGE_SIZE = "jaxnets.image_size"
CROP = "jaxnets.crop"
FIELDS = "jaxnets.fields"
# Limits for untrusted files; no net here has a tenth of these.
MAX_ENTRIES = 10_000
MAX_NAME = 250  # characters
MAX_HEADER = 1 << 23  # bytes, of a safetensors file
MAX_VALUE = 2000  # characters of the JSON of one of the entries of the metadata; a net's fields have some 200
MAX_OLD_FILE = 5 << 27  # bytes, in PyTorch's format from before 2020, which cannot be mapped; VGG19 has 548 MiB

logger = logging.getLogger(__name__)


class Images(NamedTuple):
    """What is known about the images that a net expects."""

    normalization: Normalization | None = None
    image_size: int | None = None  # pixels a side
    crop: bool | None = None  # to the centre of the image; else all of it is squeezed to a square


@dataclass(frozen=True)
class Weights:
    """The entries of a state_dict: name -> array or tensor, not converted yet."""

    entries: dict[str, Any]
    ordered: bool  # whether their order is the order of the modules in the net they come from
    origin: str  # for messages
    images: Images = Images()  # as far as the file says it
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the net, likewise


def read(source: str | os.PathLike | Mapping) -> Weights:
    """The state_dict in a `.pth`/`.pt` or `.safetensors` file, or in a mapping name -> array or tensor.

    Wrappers and prefixes are removed. Raises UserError for anything else, and for a damaged or hostile file.
    """
    if isinstance(source, Mapping):
        return Weights(unwrap(source, "the mapping"), True, "the mapping")
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f"weights come from a file or a mapping name -> array, not from a {type(source).__name__}")
    path = user_path(source)
    require_file(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        entries, images, fields = _read_safetensors(path)
        return Weights(unwrap(entries, str(path)), False, str(path), images, fields)  # sorted by name
    if suffix in TORCH_SUFFIXES:
        return Weights(unwrap(read_torch(path), str(path)), True, str(path))
    raise UserError(f"{path} is not a weight file: its name must end in one of {', '.join(SUFFIXES)}")


def require_file(path: Path):
    """UserError unless `path` is an existing file."""
    if not path.exists():
        raise UserError(f"there is no weight file {path}")
    if not path.is_file():
        raise UserError(f"{path} is not a file: weights come from a {', '.join(SUFFIXES)} file")


def read_torch(path: Path) -> Mapping:
    """The mapping in a PyTorch file, checked before it is loaded; UserError for any other file."""
    torch = import_torch(f"reading {path}")
    try:
        with path.open("rb") as file:
            archive = file.read(4) == b"PK\3\4"
        (_check_archive if archive else _check_old_file)(path, torch)
        # Memory-mapped, so that only what is used takes memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UserError as error:
        raise UserError(f"{path} is refused: {error}; save the net's state_dict() alone") from error
    except Exception as error:  # a damaged file makes PyTorch raise nearly anything
        raise UserError(f"{path} is not a valid PyTorch file: {first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state_dict (name -> tensor)")
    return content


def _check_archive(path: Path, torch):
    # With PyTorch's own reader: two readers of one zip file can be made to see different things in it.
    reader = torch._C.PyTorchFileReader(str(path))
    # PyTorch stores its archives uncompressed: contents larger than the file would be a decompression bomb.
    inflated = sum(map(reader.get_record_size, reader.get_all_records()))
    if inflated > path.stat().st_size:
        raise UserError(f"it claims to hold {inflated} bytes, more than the file has")
    if reader.get_record_size("data.pkl") > pickle_check.MAX_BYTES:
        raise UserError("its pickle is far too long for a state_dict")
    pickle_check.check(io.BytesIO(reader.get_record("data.pkl")))


def _check_old_file(path: Path, torch):
    if path.stat().st_size > MAX_OLD_FILE:
        raise UserError(f"it is larger than {MAX_OLD_FILE >> 20} MiB and in PyTorch's format from before 2020")
    with path.open("rb") as file:
        start = io.BytesIO(file.read(pickle_check.MAX_BYTES))
    for _ in range(5):  # magic number, version, sizes of C types, the state_dict, the names of the storages to follow
        pickle_check.check(start)


def import_torch(purpose: str):
    """The torch module; UserError saying what it is needed for if it is not installed."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA is missing
        raise UserError(
            f"{purpose} needs PyTorch (pip install -e '.[torch]'; here: {first_line(error)}); .safetensors files do not"
        ) from error
    return torch


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], Images, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise UserError(f"{path} is refused: its header claims {length} bytes, at most {MAX_HEADER} are read")
            with safetensors.safe_open(path, framework="numpy"):  # raises unless all shapes, types and places fit
                header = json.loads(file.read(length))
        mapped = np.memmap(path, np.uint8, "r")[8 + length :]  # only what is used takes memory
        images, fields = metadata_in(header.pop("__metadata__", None) or {}, str(path))
        entries = {
            name: mapped[slice(*entry["data_offsets"])].view(SAFETENSORS_TYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
        }
        return entries, images, fields
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} has an entry of type {error}, where weights are floats") from error
    except Exception as error:  # SafetensorError, OSError, and whatever else a damaged file leads to
        raise UserError(f"{path} is not a valid safetensors file: {first_line(error)}") from error


def spelled(normalization: Normalization) -> str:
    """The normalisation in words."""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in normalization)
    return f"mean {mean}; standard deviation {std}"


def metadata_of(images: Images, fields: Mapping[str, Any]) -> dict[str, str]:
    """A safetensors file's metadata besides the weights: what is known about the images, and the net's fields."""
    normalization = dict(zip(NORMALIZATION, images.normalization or ()))
    known = normalization | {IMAGE_SIZE: images.image_size, CROP: images.crop, FIELDS: fields}
    return {name: json.dumps(value) for name, value in known.items() if value is not None}


def metadata_in(metadata: Mapping[str, str], origin: str) -> tuple[Images, dict[str, Any]]:
    """What `metadata_of` was given, as far as it is there; UserError for invalid entries."""
    image_size = _value_in(metadata, IMAGE_SIZE, origin, "a whole number of at least 1", _is_size)
    crop = _value_in(metadata, CROP, origin, "true or false", lambda value: isinstance(value, bool))
    of_fields = f"an object of numbers, words and lists of them, in at most {MAX_VALUE} characters"
    fields = _value_in(metadata, FIELDS, origin, of_fields, _are_fields)
    return Images(_normalization_in(metadata, origin), image_size, crop), fields or {}


def _normalization_in(metadata: Mapping[str, str], origin: str) -> Normalization | None:
    if not metadata.keys() >= {*NORMALIZATION}:
        return None
    try:
        mean, std = (tuple(map(float, parse_json(metadata[name]))) for name in NORMALIZATION)
    except (ValueError, TypeError, OverflowError):
        mean = std = ()
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0):
        raise UserError(f"{origin}: {' and '.join(NORMALIZATION)} must be three numbers each, the latter above 0")
    return mean, std


def _value_in(metadata: Mapping[str, str], name: str, origin: str, must: str, ok: Callable[[Any], bool]) -> Any:
    """The JSON value of one entry, None if there is none; UserError unless it is `ok`."""
    if (text := metadata.get(name)) is None:
        return None
    try:
        value = parse_json(text) if len(text) <= MAX_VALUE else None
    except ValueError:
        value = None
    if not ok(value):
        raise UserError(f"{origin}: {name} must be {must}, not {text!r:.60}")
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_fields(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    items = (item for entry in value.values() for item in (entry if isinstance(entry, list) else [entry]))
    return all(item is None or isinstance(item, (int, float, str)) for item in items)


def is_array(value) -> bool:
    """Whether `value` is a NumPy or JAX array or a PyTorch tensor."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def unwrap(content: Mapping, origin: str) -> dict[str, Any]:
    """The entries of the state_dict in `content`, without wrappers and prefixes; UserError if there is none."""
    for _ in range(len(WRAPPERS)):  # a hostile file could nest them endlessly
        wrappers = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not wrappers:
            break
        if len(wrappers) > 1:
            logger.warning("%s holds %s; using %s", origin, " and ".join(wrappers), wrappers[0])
        content = content[wrappers[0]]
    content = {key: value for key, value in content.items() if key not in COUNTERS}
    odd = [key for key, value in content.items() if not isinstance(key, str) or not is_array(value)]
    if odd or not content:
        listed = ", ".join(f"{key!r:.80}" for key in odd[:3]) or "nothing at all"
        raise UserError(
            f"{origin} holds {listed} where a state_dict has only names and tensors (and none of the wrappers "
            f"{', '.join(WRAPPERS)})"
        )
    if len(content) > MAX_ENTRIES:
        raise UserError(f"{origin} has {len(content)} entries, more than any net here: at most {MAX_ENTRIES} are read")
    entries = {}
    for key, value in content.items():
        if len(key) > MAX_NAME or not key.isprintable():
            raise UserError(f"{origin} has an entry called {key!r:.80}, which is not the name of a weight")
        name = ".".join(part for part in key.split(".") if part not in WRAPPING_MODULES)
        if name in entries:
            raise UserError(f"{origin} has two entries called {name}, with and without a wrapping module")
        entries[name] = value
    return entries


def to_numpy(value) -> np.ndarray:
    """An array or tensor of floats of any precision as a float32 NumPy array.

    Raises UserError for other numbers, and for a tensor without plain ones: sparse, quantized, without memory.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float().numpy() if value.is_floating_point() else value.numpy()
        array = np.asarray(value)
        if jnp.issubdtype(array.dtype, jnp.floating):
            return array.astype(np.float32)
    except Exception as error:  # PyTorch's many kinds of tensors fail in many ways
        raise UserError(f"a tensor of type {value.dtype} has no plain numbers: {first_line(error)}") from error
    raise UserError(f"a tensor has type {array.dtype}, where weights are floating-point numbers")
