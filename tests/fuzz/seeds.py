"""Whole small files of every kind that is read from outside, to be damaged."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from jaxnets import checkpoint
from jaxnets.image_files import FORMATS
from tests.hostile_files import GOOD_CONFIG, dataset, folder, npz, write_tar

SUFFIXES = {"JPEG2000": "jp2", "JPEG": "jpg", "TIFF": "tif"}


def write(target: str, place: Path) -> list[Path]:
    """Write the seeds of one target into a folder."""
    place.mkdir(parents=True, exist_ok=True)
    WRITERS[target](place)
    return sorted(place.iterdir())


def state_dict() -> dict[str, np.ndarray]:
    return {"features.0.weight": np.ones((4, 3, 2, 2), np.float32), "features.0.bias": np.ones(4, np.float32)}


def _torch(place: Path) -> None:
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in state_dict().items()}
    parts = {
        "state_dict": tensors,
        "epoch": 3,
        "history": [0.5, None, True],
        "weight": torch.nn.Parameter(torch.ones(2)),
    }
    half = {"x": torch.ones(3, dtype=torch.bfloat16), "y": torch.ones(2, 3).T}
    for i, content in enumerate((tensors, parts, half, torch.nn.Linear(2, 2).state_dict())):
        torch.save(content, place / f"{i}.pth")
        torch.save(content, place / f"{i}.pt", _use_new_zipfile_serialization=False)


def _safetensors(place: Path) -> None:
    safetensors.numpy.save_file(state_dict(), place / "a.safetensors", {"format": "pt"})
    other = {"x": np.ones(3, np.float16), "y": np.ones((), np.float64)}
    safetensors.numpy.save_file(other, place / "b.safetensors")


def _keras(place: Path) -> None:
    kernel = np.ones((3, 3, 3, 8), np.float32)
    with h5py.File(place / "a.h5", "w") as file:
        file["conv1/conv1/kernel:0"] = kernel
        file["bn/bn/gamma:0"] = np.ones(8, np.float32)
        file.attrs["layer_names"] = [b"conv1", b"bn"]
    with h5py.File(place / "b.h5", "w", libver="latest") as file:
        file.create_dataset("conv1/conv1/kernel:0", data=kernel, chunks=(3, 3, 3, 4), compression="gzip")
    with zipfile.ZipFile(place / "c.keras", "w") as archive:
        archive.writestr("model.weights.h5", (place / "a.h5").read_bytes())


def _image(place: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.init()
    for name in FORMATS:
        for mode in ("RGB", "RGBA", "L", "P"):
            if name in Image.SAVE:
                try:
                    image = Image.fromarray(pixels).convert(mode)
                    image.save(place / f"{mode}.{SUFFIXES.get(name, name.lower())}", exif=exif)
                except OSError:  # the format has no such mode
                    (place / f"{mode}.{SUFFIXES.get(name, name.lower())}").unlink(missing_ok=True)
    Image.fromarray(pixels[..., :3]).save(place / "progressive.jpg", progressive=True)
    Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7)).save(place / "deep.png")
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        Image.fromarray(pixels[..., :3]).save(place / f"{compression}.tif", compression=compression)


def _archive(place: Path) -> None:
    write_tar(place / "a.tar.gz", ("data/a.bin", bytes(range(250)) * 12), ("data/names.txt", b"cat\ndog\n"))
    write_tar(
        place / "b.tar.gz",
        ("data/a.bin", bytes(3000)),
        ("data/names.txt", b"cat"),
        pax_headers={"comment": "long" * 50},
    )


def _config(place: Path) -> None:
    (place / "config.json").write_text(json.dumps(GOOD_CONFIG))
    (place / "indented.json").write_text(json.dumps(GOOD_CONFIG, indent=2))


def _run(place: Path) -> None:
    """As `trained_run.load_run` takes it; the net is as small as there is one."""
    import jax
    import jax.numpy as jnp

    import jaxnets

    run = place / "run"
    run.mkdir()
    model = jaxnets.create_model(**GOOD_CONFIG["model"])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), dict(shapes))
    checkpoint.save_variables(run, {"batch_stats": {}} | variables)
    (run / "config.json").write_text(json.dumps(GOOD_CONFIG))


def _records(place: Path) -> None:
    record = {"step": 5, "epoch": 1, "loss": 2.0, "accuracy": 0.1}
    span = {"first": 0, "last": 5, "seconds": {"train": 1.0}}
    lines = "".join(json.dumps(record | {"step": step}) + "\n" for step in (5, 10, 15))
    folder(place / "run", metrics__jsonl=lines, timing__jsonl=json.dumps(span) + "\n")


def _predictions(place: Path) -> None:
    numbers = {name: np.ones(4, np.float32) for name in ("probability", "label_probability")}
    labels = {name: np.zeros(4, np.int32) for name in ("label", "predicted")}
    images = np.zeros((1, 8, 8, 3), np.uint8)
    content = npz(step=5, class_names=["cat"], mistakes=np.zeros(1, np.int64), images=images, **numbers, **labels)
    folder(place / "run", predictions__npz=content)


def _dataset(place: Path) -> None:
    dataset(place / "data")
    content = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(content, "PNG")
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(content.getvalue())
    example.features.feature["label"].int64_list.value.append(3)
    for split in ("train", "test"):
        path = place / "data" / "strange" / "1.0.0" / f"strange-{split}.array_record-00000-of-00001"
        path.unlink()
        writer = ArrayRecordWriter(str(path), "group_size:1")
        writer.write(example.SerializeToString())
        writer.close()


WRITERS = {
    "torch": _torch,
    "safetensors": _safetensors,
    "keras": _keras,
    "image": _image,
    "archive": _archive,
    "config": _config,
    "run": _run,
    "records": _records,
    "predictions": _predictions,
    "dataset": _dataset,
}
KINDS = {"torch": "weights", "safetensors": "weights", "keras": "weights"}  # of reader, where not called the same


def copy(source: Path, target: Path) -> None:
    """Put a file or a folder where nothing, or an earlier copy, is."""
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
