"""What a net predicted for every evaluated example: `predictions.npz`, with the images it was most wrong about."""

import contextlib
import os
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from PIL import Image

from jaxnets import data, step
from jaxnets.datasets import ImageFiles
from jaxnets.errors import UserError, as_utf8
from jaxnets.plain_files import open_at_once, replacing

FILE = "predictions.npz"
MAX_BYTES = 1 << 28
NUM_MISTAKES = 24
THUMBNAIL = 128  # pixels per side, at most


@dataclass(frozen=True)
class Evaluated:
    """The predictions of one evaluation of N examples; enough to draw it without the data set."""

    step: np.ndarray  # () int64, of the weights
    class_names: np.ndarray  # (C,) str
    label: np.ndarray  # (N,) int32
    predicted: np.ndarray  # (N,) int32
    probability: np.ndarray  # (N,) float32, of the predicted class
    label_probability: np.ndarray  # (N,) float32
    mistakes: np.ndarray  # (M,) int64, indices of examples, the least probable label first
    images: np.ndarray  # (M, S, S, 3) uint8, of the mistakes
    origins: np.ndarray = field(default_factory=lambda: np.zeros(0, np.str_))  # (M,) str: file or record


def worst_mistakes(predictions: step.Predictions) -> np.ndarray:
    """The misclassified examples with the least probable labels, int64 `(NUM_MISTAKES,)` or fewer."""
    wrong = np.flatnonzero(predictions.predicted != predictions.label)
    return wrong[np.argsort(predictions.label_probability[wrong], kind="stable")[:NUM_MISTAKES]]


def save(workdir: Path, at: int, predictions: step.Predictions, split: data.Split) -> None:
    """Write the predictions for `split` by the weights of step `at`, all of them or none."""
    mistakes = worst_mistakes(predictions)
    images = _thumbnails(split, mistakes)
    names = np.asarray(split.class_names, dtype=np.str_)
    content = Evaluated(
        np.int64(at),
        names,
        predictions.label,
        predictions.predicted,
        predictions.probability,
        predictions.label_probability,
        mistakes,
        images,
        np.array([_origin(split, index) for index in mistakes], np.str_),
    )
    with replacing(workdir / FILE) as scratch, scratch.open("wb") as file:
        np.savez_compressed(file, **vars(content))


def _origin(split: data.Split, index: int) -> str:
    """Where to find an example: its file in the folder, or its record."""
    if isinstance(split.source, ImageFiles):
        return as_utf8(os.path.relpath(split.source.paths[index], split.directory))
    return f"{split.split}, record {index}"


def _thumbnails(split: data.Split, indices: np.ndarray) -> np.ndarray:
    """The images of some examples, uint8 `(M, S, S, 3)`, S at most THUMBNAIL; black if no longer readable."""
    side = min(split.image_size, THUMBNAIL)
    images = np.zeros((len(indices), side, side, 3), np.uint8)
    for place, index in enumerate(indices):
        with contextlib.suppress(UserError):
            (image,) = data.read_batch(split, np.array([index]))["image"]
            images[place] = Image.fromarray(image).resize((side, side))
    return images


def load(workdir: Path) -> Evaluated | None:
    """The last predictions of a run, None if none were saved; UserError for a file that is something else."""
    path = workdir / FILE
    try:
        _require_modest(path)
        with np.load(path) as file:
            content = Evaluated(**{each.name: file[each.name] for each in fields(Evaluated) if each.name in file.files})
            _check(content)
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile and NumPy report a damaged file in many ways
        raise UserError(f"{path} cannot be read as a run's predictions: {str(error)[:300]}") from None
    return content


def _require_modest(path: Path) -> None:
    """ValueError for a pipe, or for an archive that would inflate to more than any run writes."""
    with open(path, "rb", opener=open_at_once) as file, zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
            raise ValueError(f"it inflates to more than {MAX_BYTES >> 20} MiB")


def _check(content: Evaluated) -> None:
    """ValueError if the arrays do not belong together."""
    shapes = {getattr(content, name).shape for name in ("label", "predicted", "probability", "label_probability")}
    if len(shapes) > 1 or content.label.ndim != 1 or content.class_names.ndim != 1 or content.step.shape:
        raise ValueError(f"its arrays have shapes {sorted(shapes)}")
    if any(getattr(content, name).dtype.kind != "f" for name in ("probability", "label_probability")):
        raise ValueError("its probabilities are not floats")
    for name in ("class_names", "origins"):
        if getattr(content, name).dtype.kind != "U":
            raise ValueError(f"its {name} are {getattr(content, name).dtype}")
    if content.origins.shape not in ((0,), content.mistakes.shape):
        raise ValueError(f"it has {content.origins.shape} origins")
    limits = {
        "label": len(content.class_names),
        "mistakes": len(content.label),
        "predicted": data.MAX_CLASSES,
        "step": 1 << 62,
    }
    for name, limit in limits.items():
        values = getattr(content, name)
        if values.dtype.kind != "i" or values.size and not (values.min() >= 0 and values.max() < limit):
            raise ValueError(f"{name} is out of range")
    shape = content.images.shape
    if content.images.dtype != np.uint8 or len(shape) != 4 or shape[0] != len(content.mistakes) or shape[3] != 3:
        raise ValueError(f"its images are {content.images.dtype} {shape}")
