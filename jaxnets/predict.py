"""Predict the most probable classes of image files, with the net of a run or with published weights.

IMAGE is a file, a folder (the images below it) or a quoted glob pattern. A file that cannot be read is reported on
standard error; the others are processed all the same, and the exit status is 1.

A run's net gets images preprocessed as in the run's evaluation. With --model and --weights, nets for 224x224 get the
central 224x224 pixels of the image resized to a shorter side of 256, normalised with ImageNet's mean and deviation, or
as in the code base whose layout the file has (Keras, megvii, timm's MobileNetV1, torchvision's GoogLeNet). CIFAR nets
get the whole image resized to 32x32, normalised as for CIFAR-10 or, if they have 100 classes, CIFAR-100. For a
.safetensors file that jaxnets.convert made from a run, the preprocessing (with image size and crop) is the run's; the
file is refused for a net with other fields than the run's (--field). Class names are those of a run's data set, which
its workdir keeps, or of --labels; otherwise classes are numbers.

--format=json prints one object per line and image, in the order of the images: {"image": path, "predictions":
[{"class": number, "name": string or null, "probability": number}, ...]}, most probable first.
"""

from jaxnets import interruption

if __name__ == "__main__":
    interruption.end_quietly()

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import lax

from jaxnets import create_model, data, datasets, image_files, runtime, torch_weights, trained_run
from jaxnets.arguments import check_deviation, count, field, triple
from jaxnets.augment import normalize
from jaxnets.errors import ArgumentParser, UserError, exit_on_user_error, printable
from jaxnets.plain_files import read_text, user_path
from jaxnets.weight_images import check_image_size, images_of
from jaxnets.workdir import class_names

MAX_LABELS = 1 << 26  # bytes: a million classes with long names


@dataclass(frozen=True)
class Classifier:
    """A net, and what leads from an image file to its input and from its output to class names."""

    model: nn.Module
    variables: dict[str, Any]
    image_size: int  # pixels a side
    crop: bool  # to the centre of the image; else all of it is squeezed to a square
    mean: Sequence[float]  # per channel, of images in [0, 1]
    std: Sequence[float]
    class_names: Sequence[str] = ()  # of the first classes, as far as they are known


class Prediction(NamedTuple):
    """The most probable classes of an image file, or why there are none."""

    path: str
    classes: np.ndarray | None  # int32 (k,), most probable first
    probabilities: np.ndarray | None  # float32 (k,)
    error: str | None = None


def classifier_of_run(workdir: Path, which: str = "best", *, ema: bool = False) -> Classifier:
    """The net of a run at a checkpoint: best, latest or a step; with `ema` its averaged weights.

    Raises UserError where there is no such run or checkpoint, or it is damaged.
    """
    run = trained_run.load_run(workdir, which, ema=ema)
    config = run.config
    if config.compilation_cache:
        runtime.enable_compilation_cache()
    names = _class_names(workdir, config, run.model.num_classes)
    return Classifier(run.model, run.variables, config.image_size, config.crop, config.mean, config.std, names)


def _class_names(workdir: Path, config: ml_collections.ConfigDict, num_classes: int) -> Sequence[str]:
    """The class names that the run was trained on, else its data set's if prepared; never prepares or downloads it.

    The data set can be gone since, and a folder can have other classes today: it must have as many as the net.
    """
    if names := class_names(workdir):
        return names
    data_dir = datasets.where_it_still_is(config.data_dir)
    try:
        names = ()
        if datasets.is_folder(config.dataset):
            names = datasets.read_folder(config.dataset).class_names
        elif datasets.find_prepared(config.dataset, data_dir):
            names = data.class_names(datasets.open_builder(config.dataset, data_dir))
        if len(names) == num_classes:
            return names
        reason = f"it has {len(names)} classes, the net {num_classes}"
        if not names:
            reason = f"it is not prepared in {datasets.data_root(data_dir)}"
    except UserError as error:
        reason = str(error)
    runtime.logger.info("no class names from %s (%s): classes are shown as numbers", config.dataset, reason)
    return ()


def classifier_of_weights(name: str, weights: str | Path, /, **fields) -> Classifier:
    """The net `create_model(name, **fields)` with the weights of a file that `torch_weights.load` takes.

    Raises UserError for a bad name or field, and weights that do not fit.
    """
    model = create_model(name, **fields)
    if not model.num_classes or model.features_only:
        raise UserError(f"{name} with num_classes=0 or features_only=True has no classes to predict")
    published = torch_weights.load_published(model, weights)
    images = images_of(name, model.num_classes, published)
    return Classifier(model, published.variables, images.image_size, images.crop, *images.normalization)


def predict(
    classifier: Classifier, paths: Sequence[str], *, batch_size: int = 32, top: int = 5
) -> Iterator[Prediction]:
    """The `top` most probable classes of every image file, in the order of `paths`, `batch_size` at a time.

    Compiled once: a smaller last batch is padded, and so is the place of a file that cannot be read.
    """
    if not paths:
        return
    size = min(batch_size, len(paths))
    images = np.zeros((size, classifier.image_size, classifier.image_size, 3), np.uint8)
    variables = jax.device_put(classifier.variables)
    most_probable = jax.jit(partial(_most_probable, classifier, min(top, classifier.model.num_classes)))
    for chunk, contents in _read_ahead(partial(_pixels, classifier), paths, size):
        for place, content in enumerate(contents):
            if not isinstance(content, UserError):
                images[place] = content
        probabilities, classes = jax.device_get(most_probable(variables, images))
        for place, (path, content) in enumerate(zip(chunk, contents)):
            if isinstance(content, UserError):
                yield Prediction(path, None, None, str(content))
            elif not np.isfinite(probabilities[place]).all():
                yield Prediction(path, None, None, "the net's output is not finite: its weights may be damaged")
            else:
                yield Prediction(path, classes[place], probabilities[place])


def _most_probable(classifier: Classifier, top: int, variables: dict[str, Any], images: jax.Array):
    inputs = normalize(images, classifier.mean, classifier.std)
    logits = classifier.model.apply(variables, inputs, train=False)
    return lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), top)


def _pixels(classifier: Classifier, path: str) -> np.ndarray | UserError:
    """The file's pixels, uint8 `(S, S, 3)`, or why it cannot be read."""
    fit = image_files.resize_and_crop if classifier.crop else image_files.squeeze
    try:
        return np.asarray(image_files.read(path, partial(fit, size=classifier.image_size)))
    except UserError as error:
        return error


def _read_ahead(read: Callable, paths: Sequence[str], size: int) -> Iterator[tuple[Sequence[str], list]]:
    """`size` paths at a time and what `read` returns for them; threads read the next ones meanwhile."""
    chunks = [paths[start : start + size] for start in range(0, len(paths), size)]
    with ThreadPoolExecutor() as pool:
        ahead = [pool.submit(read, path) for path in chunks[0]]
        for chunk, following in zip(chunks, [*chunks[1:], []]):
            pending, ahead = ahead, [pool.submit(read, path) for path in following]
            yield chunk, [future.result() for future in pending]


def _as_text(prediction: Prediction, names: Sequence[str]) -> str:
    lines = [_shown(prediction.path)]
    for label, probability in zip(prediction.classes, prediction.probabilities):
        lines.append(f"{probability:9.2%}  {printable(_name(label, names) or f'class {label}')}")
    return "\n".join(lines)


def _as_json(prediction: Prediction, names: Sequence[str]) -> str:
    found = [
        {"class": int(label), "name": _name(label, names), "probability": float(probability)}
        for label, probability in zip(prediction.classes, prediction.probabilities)
    ]
    return json.dumps({"image": prediction.path, "predictions": found})


def _name(label: int, names: Sequence[str]) -> str | None:
    return names[label] if label < len(names) else None


def _shown(path: str) -> str:
    """The path in one line, with a replacement for bytes that are not UTF-8."""
    return printable(path.encode(errors="surrogateescape").decode(errors="replace"))


def _labels(path: Path) -> tuple[str, ...]:
    try:
        text = read_text(path, MAX_LABELS)
    except FileNotFoundError as error:
        raise UserError(f"--labels={path} cannot be read: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"--labels: {error}") from None
    return tuple(line.strip() for line in text.removeprefix("\ufeff").splitlines())


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m jaxnets.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder or a quoted pattern")
    run = parser.add_argument_group("the net of a run")
    run.add_argument("--workdir", type=user_path, help="the folder of the run")
    run.add_argument("--checkpoint", help="best (default), latest, or a step")
    run.add_argument("--ema", action="store_true", help="the averaged weights of the run")
    published = parser.add_argument_group("published weights")
    published.add_argument("--model", metavar="NAME", help="a net of jaxnets.list_models()")
    published.add_argument(
        "--weights", type=user_path, metavar="FILE", help="a file that jaxnets.torch_weights.load reads"
    )
    published.add_argument(
        "--field", type=field, action="append", metavar="NAME=VALUE", help="a field of the net, e.g. width=0.5"
    )
    parser.add_argument("--image_size", type=count, help="side in pixels, instead of the net's")
    parser.add_argument("--mean", type=triple, help="R,G,B of images in [0, 1], instead of the net's")
    parser.add_argument("--std", type=triple, help="R,G,B, instead of the net's")
    parser.add_argument("--labels", type=user_path, metavar="FILE", help="the names of the classes, one per line")
    parser.add_argument("--top", type=count, default=5, help="classes for each image; default: 5")
    parser.add_argument("--batch_size", type=count, default=32, help="images at once; default: 32")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    return parser


def _load(args: argparse.Namespace) -> Classifier:
    if bool(args.workdir) == bool(args.model or args.weights) or bool(args.model) != bool(args.weights):
        raise UserError("give either --workdir=DIR, or --model=NAME and --weights=FILE")
    check_image_size(args.image_size or 1, "--image_size")
    check_deviation(args.std)
    names = _labels(args.labels) if args.labels else None
    if args.workdir:
        if args.field:
            raise UserError("--field is for --model; the run in --workdir has its own fields")
        classifier = classifier_of_run(
            args.workdir, "best" if args.checkpoint is None else args.checkpoint, ema=args.ema
        )
    else:
        if args.checkpoint is not None or args.ema:
            raise UserError("--checkpoint and --ema are for --workdir; --weights are a single file")
        runtime.enable_compilation_cache()
        classifier = classifier_of_weights(args.model, args.weights, **dict(args.field or []))
    changes = {name: getattr(args, name) for name in ("image_size", "mean", "std") if getattr(args, name)}
    if names is not None:
        if len(names) != (classes := classifier.model.num_classes):
            raise UserError(
                f"--labels={args.labels} has {len(names)} lines; it must have one for each of {classes} classes"
            )
        changes["class_names"] = names
    return replace(classifier, **changes)


def main(argv: list[str]) -> None:
    """Run the command."""
    args = _parser().parse_mixed_args(argv[1:])
    runtime.configure_logging()
    paths, failures = [], 0

    def report(path: str, reason: str) -> None:
        nonlocal failures
        failures += 1
        print(f"{_shown(path)}: {reason}", file=sys.stderr)

    for argument in args.images:
        try:
            paths += image_files.find(argument, lambda folder, why: report(folder, f"cannot be read: {why}"))
        except UserError as error:
            report(argument, str(error))
    if not paths:
        raise UserError("there are no images to classify")
    runtime.require_device()
    classifier = _load(args)
    show = _as_json if args.format == "json" else _as_text
    with runtime.short_of_memory("a smaller --batch_size needs less"):
        for prediction in predict(classifier, paths, batch_size=args.batch_size, top=args.top):
            if prediction.error:
                report(prediction.path, prediction.error)
            else:
                print(show(prediction, classifier.class_names), flush=True)
    if failures:
        raise UserError(f"{failures} of the images could not be read or classified")


if __name__ == "__main__":
    exit_on_user_error(main)(sys.argv)
