"""Convert weights between PyTorch files, safetensors files and workdirs for evaluate and predict.

IN is a file (.pth, .pt, .bin, .ckpt, .tar, .safetensors, or Keras's .h5, .hdf5, .keras) with --model, or the workdir
of a run. OUT is a .pth, .pt or .safetensors file, or a new folder: a workdir whose only checkpoint holds the weights.
A .safetensors file also keeps the net's fields, and the size and normalisation of a run's images; for a .pth or .pt
file they are logged instead. Nothing that exists is overwritten.
"""

from jaxnets import interruption

if __name__ == "__main__":
    interruption.end_quietly()

import argparse
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import safetensors.numpy

from jaxnets import checkpoint, create_model, runtime, settings, torch_weights, trained_run
from jaxnets.arguments import check_deviation, field, triple
from jaxnets.datasets import BUILDERS, VALIDATION, absolute, is_folder, read_folder
from jaxnets.errors import ArgumentParser, UserError, as_utf8, exit_on_user_error, writing
from jaxnets.models import default_image_size
from jaxnets.plain_files import replacing, user_path
from jaxnets.weight_images import images_of
from jaxnets.weights.weight_files import SUFFIXES, Images, import_torch, metadata_of, spelled
from jaxnets.workdir import CONFIG

TORCH = (".pth", ".pt")
SAFETENSORS = ".safetensors"
OTHERS = (".safetensor", ".pkl", ".onnx", ".npy", ".npz", ".msgpack", ".pb", ".tflite")  # a typo, or wishful thinking
NOT_WRITTEN = {*SUFFIXES, *OTHERS} - {*TORCH, SAFETENSORS}


def read(
    source: Path, name: str | None, fields: dict[str, Any], which: str | None, ema: bool = False
) -> tuple[str, nn.Module, torch_weights.Published]:
    """The name, net and weights of a file, as `name` with `fields`, or of a run's checkpoint `which` (None: best)."""
    if not source.is_dir():
        if name is None:
            raise UserError(f"--model is missing: which net are the weights in {source}?")
        if which is not None or ema:
            raise UserError(f"--checkpoint and --ema are for the workdir of a run, which {source} is not")
        model = create_model(name, **fields)
        published = torch_weights.load_published(model, source)
        # What goes without saying in one code base has to be said to another.
        normalization = images_of(name, model.num_classes, published).normalization
        return name, model, published._replace(images=published.images._replace(normalization=normalization))
    if name is not None or fields:
        raise UserError(f"--model and --field are for a file; the run in {source} has its own net")
    run = trained_run.load_run(source, "best" if which is None else which, ema=ema)
    return run.config.model.name, run.model, torch_weights.Published(run.variables, run.images)


def write(path: Path, name: str, model: nn.Module, published: torch_weights.Published, layout: str | None) -> None:
    """Write a `.pth`, `.pt` or `.safetensors` file of the net `name` with the names of `layout`, as in `export`.

    A PyTorch file has no place for the net's fields or what is known about its images, so these are logged.
    """
    state_dict = torch_weights.export(model, published.variables, layout)
    with writing(path, ""):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == SAFETENSORS:
        content = safetensors.numpy.save(state_dict, metadata_of(published.images, torch_weights.fields_of(model)))
    else:
        torch = import_torch(f"writing {path}")
        buffer = io.BytesIO()
        torch.save({key: torch.from_numpy(np.array(value)) for key, value in state_dict.items()}, buffer)
        content = buffer.getvalue()
        runtime.logger.info("%s", _untold(name, model, published.images))
    # Written by Python, which reports failures as OSErrors; the libraries raise errors of their own.
    with writing(path, ""), replacing(path, f".{os.getpid()}") as scratch:
        scratch.write_bytes(content)
        require_new(path)  # reading weights may have taken long


def _untold(name: str, model: nn.Module, images: Images) -> str:
    """What a PyTorch file does not say about the images, and about the net where its name does not say it either."""
    usual = images_of(name, model.num_classes, torch_weights.Published({}))  # for a file that says nothing itself
    told = f"this net's images are normalised with {spelled(images.normalization)}"
    for what in ("image_size", "crop"):
        if getattr(images, what) not in (None, getattr(usual, what)):
            told += f"; their {what} is {getattr(images, what)}"
    nets = model, create_model(name)
    ours, its_names = ({"num_classes": net.num_classes} | torch_weights.fields_of(net) for net in nets)
    if fields := {key: value for key, value in ours.items() if value != its_names[key]}:
        told += f"; the net is {name} with {torch_weights.as_arguments(fields)}"
    return told


def write_workdir(
    folder: Path, name: str, fields: dict[str, Any], published: torch_weights.Published, dataset: str | None = None
) -> None:
    """Make a workdir from weights of `create_model(name, **fields)`, to be evaluated on `dataset`."""
    model = create_model(name, **fields)
    require_classes(name, model)
    cifar = default_image_size(name) == 32
    images = images_of(name, model.num_classes, published)
    mean, std = images.normalization
    usual = ("cifar100" if model.num_classes == 100 else "cifar10") if cifar else "imagenet2012"
    config = ml_collections.ConfigDict(
        {
            "dataset": absolute(dataset) if dataset else usual,
            "data_dir": None,
            "eval_split": _eval_split(dataset, "test" if cifar else "validation"),
            "image_size": images.image_size,
            "crop": images.crop,
            "mean": mean,
            "std": std,
            "model": {"name": name, "dtype": "auto", "num_classes": model.num_classes, **fields},
            "resident": "auto",
            "resident_limit": 4 << 30,
            "num_workers": None,
            "steps_per_call": 10,
            "eval_batch_size": 256,
            "compilation_cache": True,
        }
    )
    settings.check_evaluation(config)
    with writing(folder, ""):
        folder.mkdir(parents=True)
        try:
            checkpoint.save_variables(folder, published.variables)
            # Last, since it is what makes the folder a workdir.
            settings.write(config, folder / CONFIG)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # so that the same command can be run again
            raise


def require_new(path: Path) -> None:
    """UserError if the path exists already."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists; choose another name, nothing is overwritten")


def require_classes(name: str, model: nn.Module) -> None:
    """UserError for a net without classes: a workdir is for evaluation, so it cannot hold one."""
    if not model.num_classes or model.features_only:
        raise UserError(f"{name} with num_classes=0 or features_only=True has no classes: OUT can only be a file")


def _eval_split(dataset: str | None, usual: str) -> str:
    """The split to evaluate: a folder's with a usual name for that, else `train`; a TFDS data set's usual one."""
    if dataset and dataset.partition(":")[0] in BUILDERS:
        return "test"
    if not (dataset and is_folder(dataset)):
        return usual
    try:
        splits = read_folder(dataset).splits
    except UserError:  # the folder may be on another machine
        return usual
    return next((name for name in (usual, *VALIDATION, "test") if name in splits), "train")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m jaxnets.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", type=user_path, help="a file with weights, or the workdir of a run")
    parser.add_argument(
        "target", metavar="OUT", type=user_path, help="a .pth, .pt or .safetensors file, or a new folder"
    )
    parser.add_argument("--model", metavar="NAME", help="the net in a file, of jaxnets.list_models()")
    parser.add_argument(
        "--field", type=field, action="append", metavar="NAME=VALUE", help="a field of the net, e.g. width=0.5"
    )
    parser.add_argument("--checkpoint", help="of a workdir: best (default), latest, or a step")
    parser.add_argument("--ema", action="store_true", help="of a workdir: the averaged weights")
    parser.add_argument("--mean", type=triple, help="R,G,B of images in [0, 1], instead of the code base's")
    parser.add_argument("--std", type=triple, help="R,G,B, instead of the code base's")
    parser.add_argument("--layout", help="whose names the file uses: torchvision, timm, kuangliu, ...")
    parser.add_argument(
        "--dataset", help="data set on which a new workdir is evaluated; default: cifar10, cifar100 or imagenet2012"
    )
    return parser


def main(argv: list[str]) -> None:
    """Run the command."""
    args = _parser().parse_args(argv[1:])
    runtime.configure_logging()
    fields = dict(args.field or [])
    suffix = args.target.suffix.lower()
    to_file = suffix in (*TORCH, SAFETENSORS)
    if not args.source.exists():
        raise UserError(f"there is no {args.source}")
    require_new(args.target)
    if suffix in NOT_WRITTEN or args.target.name == "-":
        raise UserError(f"{args.target} must end in .pth, .pt or .safetensors, or be the name of a new folder")
    if not to_file and args.source.is_dir():
        raise UserError(f"{args.source} is already a workdir; OUT must be a .pth, .pt or .safetensors file")
    if (args.mean or args.std) and args.source.is_dir():
        raise UserError(f"--mean and --std are for a file; the run in {args.source} has its own")
    check_deviation(args.std)
    if args.dataset and to_file or args.layout and not to_file:
        name = "--dataset is for a new folder" if to_file else "--layout is for a file"
        raise UserError(f"{name}, which {args.target} is not")
    if suffix in TORCH:
        import_torch(f"writing {args.target}")
    if args.model and not to_file:
        require_classes(args.model, create_model(args.model, **fields))
    name, model, published = read(args.source, args.model, fields, args.checkpoint, args.ema)
    mean, std = published.images.normalization
    images = published.images._replace(normalization=(args.mean or mean, args.std or std))
    published = published._replace(images=images)
    if to_file:
        write(args.target, name, model, published, args.layout)
    else:
        write_workdir(args.target, name, fields, published, args.dataset)
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(published.variables["params"]))
    what = type(model).__name__ if to_file else f"a workdir of {type(model).__name__}"
    print(f"{as_utf8(str(args.target))}: {what}, {count:,} parameters")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and a GPU may be busy
    exit_on_user_error(main)(sys.argv)
