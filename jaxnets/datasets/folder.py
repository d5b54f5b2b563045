"""A folder of image files as a data set: `class/image`, or `split/class/image`; nothing is copied or prepared."""

import collections
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import tensorflow_datasets as tfds

from jaxnets import image_files
from jaxnets.errors import UserError
from jaxnets.plain_files import user_path

PREFIX = "folder:"
VALIDATION = ("val", "valid", "validation")  # one split, by its usual names
SPLIT_NAMES = ("train", "training", "test", "testing", *VALIDATION, "eval", "evaluation")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFiles(Sequence):
    """The image files of a split and their classes: index -> (path, label); picklable."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.paths[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[str, int]]:
        return [self[index] for index in indices]


@dataclass(frozen=True)
class ImageFolder:
    """A folder that was scanned: its splits and its classes."""

    directory: Path
    class_names: tuple[str, ...]
    splits: dict[str, ImageFiles]
    strangers: dict[str, str]  # by split, a class that `train` does not have

    def describe(self) -> str:
        """The splits with their sizes, as error messages list them."""
        return ", ".join(f"{name} ({len(files)} examples)" for name, files in self.splits.items())

    def say_unused(self, splits: Sequence[str]) -> None:
        """Log the splits that none of these, in TFDS's syntax, names."""
        named = {name for split in splits for name in re.findall(r"(?:^|\+)\s*([\w-]+)", split)}
        if named & set(VALIDATION):
            named |= set(VALIDATION)
        unused = {name: files for name, files in self.splits.items() if name not in named and len(files)}
        if unused and "all" not in named:
            listed = ", ".join(f"{name} ({len(files)} images)" for name, files in unused.items())
            logger.info(
                "%s holds splits that config.train_split and config.eval_split do not name: %s", self.directory, listed
            )

    def select(self, split: str) -> ImageFiles:
        """The files of a split in TFDS's syntax; ValueError if TFDS knows no such name or slice.

        `validation` may be called `val` or `valid`. UserError if a split has a class that `train` does not have; a
        warning if it has no image of some class.
        """
        named = {name: name for name in self.splits}
        there = [name for name in VALIDATION if name in named]
        if len(there) == 1:  # only the names asked for, since TFDS's `all` is every name
            named |= {name: there[0] for name in re.findall(r"\w+", split) if name in VALIDATION}
        sizes = {name: tfds.core.SplitInfo(name, [len(self.splits[of])], 0) for name, of in named.items()}
        paths, labels = [], []
        for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(sizes):
            name = named[part.splitname]
            if stranger := self.strangers.get(name):
                raise UserError(f"{self.directory / name} has a class {stranger!r} that train does not have")
            files = self.splits[name]
            paths += files.paths[part.from_ : part.to]
            labels += files.labels[part.from_ : part.to]
        if labels and (empty := sorted(set(range(len(self.class_names))) - set(labels))):
            first = ", ".join(self.class_names[label] for label in empty[:3])
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            logger.warning("%s of %s holds no image files of class %s%s", split, self.directory, first, more)
        return ImageFiles(tuple(paths), tuple(labels))


def is_folder(dataset: str) -> bool:
    """Whether a data set's name is `folder:PATH`."""
    return dataset.startswith(PREFIX)


def folder_path(dataset: str) -> Path:
    """The PATH of `folder:PATH`; UserError where it is empty."""
    if not (path := dataset.removeprefix(PREFIX)):
        raise UserError("config.dataset='folder:' names no folder; write folder:PATH")
    return user_path(path)


def is_in_a_class(path: Path, dataset: str) -> bool:
    """Whether what lies at `path` belongs to a class of `folder:PATH`, or would if it were there."""
    if not folder_path(dataset).is_dir():
        return False
    classes, path = _splits(folder_path(dataset))["train"].resolve(), path.resolve()
    return classes in path.parents and not path.relative_to(classes).parts[0].startswith(".")


def absolute(dataset: str) -> str:
    """The same data set by a name that is valid in any working directory."""
    return f"{PREFIX}{folder_path(dataset).resolve()}" if is_folder(dataset) else dataset


def read_folder(dataset: str) -> ImageFolder:
    """Scan `folder:PATH`.

    PATH holds a folder for each class; or a folder `train`, and others next to it such as `val`, with one for each
    class. Classes are numbered in the order of their names; labels come from the class folders' names, whatever is
    below them. The files of a split are in an order that depends only on their names and mixes the classes, so that
    slices such as `train[:90%]` have about the same share of each. Hidden files and folders, links to folders within
    a class's folder, and files without an image's suffix are left out.

    Raises UserError if there is no such folder, no class or no image in it, or if there are folders that look like
    splits, but no `train`.
    """
    directory = folder_path(dataset)
    if not directory.is_dir():
        raise UserError(f"config.dataset={dataset!r}: there is no such folder")
    layout = _splits(directory)
    class_names = tuple(sorted(_folders(layout["train"])))
    others: collections.Counter[str] = collections.Counter()
    splits = {split: _files(place, class_names, others) for split, place in layout.items()}
    image_files.say_left_out(str(directory), others)
    for place in layout.values():
        if loose := image_files.count_images_in(place):
            logger.warning("%d image files of %s are left out: they are not in a class's folder", loose, place)
    if len(class_names) == 1:
        logger.warning("%s holds a single class, %s: there is nothing to learn", layout["train"], class_names[0])
    strangers = {split: sorted(_folders(place).keys() - set(class_names)) for split, place in layout.items()}
    if not len(splits["train"]):
        raise UserError(
            f"config.dataset={dataset!r}: {layout['train']} must hold a folder of image files for each class"
        )
    return ImageFolder(directory, class_names, splits, {split: names[0] for split, names in strangers.items() if names})


def _folders(directory: Path) -> dict[str, Path]:
    """The folders in a folder by name, hidden ones left out."""
    try:
        with os.scandir(directory) as entries:
            return {e.name: Path(e.path) for e in entries if e.is_dir() and not e.name.startswith(".")}
    except OSError as error:
        _refuse(str(directory), error.strerror)


def _splits(directory: Path) -> dict[str, Path]:
    """The folder of each split, `train` first; a folder without splits is all `train`."""
    folders = _folders(directory)
    # A class may be called train: then its folder holds images rather than classes.
    if "train" in folders and _folders(folders["train"]):
        return {"train": folders.pop("train"), **dict(sorted(folders.items()))}
    for name in sorted(name for name in folders if name.lower() in SPLIT_NAMES):
        inside = _folders(folders[name]).keys()
        others = [folder for other, folder in folders.items() if other != name]
        if inside and (not others or any(inside & _folders(other).keys() for other in others)):
            raise UserError(
                f"{directory} has a folder {name!r} of folders, like a split, but none called 'train' that holds a "
                "folder of image files for each class"
            )
    return {"train": directory}


def _refuse(folder: str, why: str) -> NoReturn:
    raise UserError(f"{folder} cannot be read: {why}")


def _files(directory: Path, class_names: Sequence[str], others: collections.Counter[str]) -> ImageFiles:
    """The image files of a split; counts other files in `others`, by suffix."""
    found = []
    for label, name in enumerate(class_names):
        if not (directory / name).is_dir():
            continue
        for path in image_files.images_below(str(directory / name), others, _refuse):
            key = os.fsencode(os.path.relpath(path, directory))
            found.append((hashlib.sha256(key).digest(), path, label))
    found.sort()
    return ImageFiles(tuple(path for _, path, _ in found), tuple(label for _, _, label in found))
