"""Files made to harm: name -> kind of reader, what its refusal says, and how the file is made. All are small."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

KINDS: dict[str, tuple[str, str, callable]] = {}  # name of the file -> kind of reader, pattern, writer


def case(name: str, kind: str, pattern: str):
    """Add a file; its writer is the function that follows."""

    def add(write):
        KINDS[name] = (kind, pattern, write)
        return write

    return add


# Weights: PyTorch


def write_archive(path: Path, pickled: bytes, storages: dict[str, bytes], compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)
        for name, content in storages.items():
            archive.writestr(f"archive/data/{name}", content)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tensor(numel: int, *size: int) -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(numel) + b"tQ"
    shape = b"(" + b"".join(map(integer, size)) + b"t"
    strides = b"(" + integer(1) * len(size) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(0) + shape + strides + b"\x89}tR"


def state_dict(key: bytes, value: bytes) -> bytes:
    return b"\x80\x02}" + key + value + b"s."


class RunsCode:
    """Unpickled, it leaves a file where its tests look for one."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def marker(path: Path) -> Path:
    """What exists once the code in the file at `path` has run."""
    return path.with_name(path.name + ".has-run")


PICKLES = {
    "a function as a value": (lambda path: pickle.dumps({"x": RunsCode(marker(path))}, 2), "holds posix.mkdir"),
    "eval": (lambda path: state_dict(text("x"), b"cbuiltins\neval\n" + text("1") + b"\x85R"), "holds builtins.eval"),
    "protocol 5": (lambda path: pickle.dumps({"x": RunsCode(marker(path))}, 5), "uses (FRAME|SHORT_BINUNICODE)"),
    "two gigabytes of bytes": (
        lambda path: state_dict(text("x"), b"cbuiltins\nbytearray\n" + integer(2**31 - 1) + b"\x85R"),
        "holds builtins.bytearray",
    ),
    "a tensor of two gigabytes": (
        lambda path: state_dict(text("x"), b"ctorch\nFloatTensor\n" + integer(2**29) + b"\x85R"), "holds torch.Float"
    ),
    "a key nested a million deep": (lambda path: state_dict(b")" + b"\x85" * 1_000_000, b"K\0"), "too long"),
    "a key nested deep": (lambda path: state_dict(b")" + b"\x85" * 400_000, b"K\0"), "tuple instead of a scalar"),
    "a key that takes for ever to hash": (
        lambda path: b"\x80\x02])q\0"
        + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
        + b"0}h\x3cK\0s.",
        "uses POP|tuple|shared",
    ),
    "one list copied": (
        lambda path: b"\x80\x02](" + b"K\0" * 1000 + b"eq\0" + b"ccollections\nCounter\nh\0\x85R" * 1000 + b".",
        "its pickle has a tuple instead of a tuple of a dict",
    ),
    "one dict copied": (
        lambda path: state_dict(text("x"), 2 * b"ccollections\nOrderedDict\n)R}q\0bh\0b"),
        "shared instead of a dict",
    ),
    "a stack that is empty": (lambda path: b"\x80\x02R.", "not a valid PyTorch file"),
    "no end": (lambda path: b"\x80\x02}", "not a valid PyTorch file"),
    "more numbers than the storage has": (lambda path: state_dict(text("x"), tensor(1 << 28, 1 << 28)), "not a valid"),
    "a shape beyond the storage": (lambda path: state_dict(text("x"), tensor(4, 1 << 30)), "not a valid PyTorch file"),
    "a negative shape": (lambda path: state_dict(text("x"), tensor(4, -4)), "not a valid PyTorch file"),
    "a name of many parts": (lambda path: state_dict(text("a." * 500_000 + "w"), tensor(4, 4)), "not the name of a"),
    "a name of two lines": (lambda path: state_dict(text("a\nerror: b"), tensor(4, 4)), "not the name of a weight"),
    "numbers for tensors": (lambda path: state_dict(text("x"), integer(4)), "only names and tensors"),
}  # fmt: skip

for _name, (_make, _pattern) in PICKLES.items():

    def _archive(path, make=_make):
        write_archive(path, make(path), {"0": bytes(16)})

    def _old(path, make=_make):
        with path.open("wb") as file:
            for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
                pickle.dump(value, file, 2)
            file.write(make(path))
            pickle.dump(["0"], file, 2)
            file.write(struct.pack("<q", 4) + bytes(16))

    case(f"{_name}.pth", "weights", _pattern)(_archive)
    case(f"{_name}, old.pt", "weights", f"{_pattern}|not a valid PyTorch file")(_old)


@case("a bare pickle.bin", "weights", "holds posix.mkdir")
def _(path):
    path.write_bytes(pickle.dumps(RunsCode(marker(path)), 2))


@case("deflated.pth", "weights", "claims to hold")
def _(path):
    write_archive(path, b"\x80\x02}.", {"0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)


@case("old and large.pth", "weights", "larger than 640 MiB")
def _(path):
    import torch

    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    os.truncate(path, 1 << 40)


# Weights: safetensors


def write_safetensors(path: Path, header, content: bytes = bytes(16), length: int | None = None) -> None:
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written) if length is None else length) + written + content)


def entry(shape, offsets, dtype="F32"):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "a header of exabytes": ({}, {"length": 1 << 62}, "header claims"),
    "a header beyond the file": ({}, {"length": 1 << 20}, "not a valid safetensors file"),
    "a shape larger than its bytes": (entry([1 << 20], [0, 16]), {}, "not a valid safetensors file"),
    "bytes beyond the file": (entry([1 << 20], [0, 4 << 20]), {}, "not a valid safetensors file"),
    "bytes backwards": (entry([4], [16, 0]), {}, "not a valid safetensors file"),
    "a hole": (entry([2], [8, 16]), {}, "not a valid safetensors file"),
    "a shape that overflows": (entry([1 << 62, 1 << 62], [0, 16]), {}, "not a valid safetensors file"),
    "a negative shape": (entry([-4], [0, 16]), {}, "not a valid safetensors file"),
    "a type that does not exist": (entry([4], [0, 16], "F31"), {}, "not a valid safetensors file"),
    "truth values": (entry([16], [0, 16], "BOOL"), {}, "where weights are floats"),
    "no object": ([1, 2], {}, "not a valid safetensors file"),
    "no JSON": (b"\xff" * 8, {}, "not a valid safetensors file"),
    "a header nested deep": (b"[" * 1_000_000, {}, "not a valid safetensors file"),
    "nothing": ({}, {"content": b""}, "nothing at all"),
}
for _name, (_header, _options, _pattern) in HEADERS.items():

    @case(f"{_name}.safetensors", "weights", _pattern)
    def _(path, header=_header, options=_options):
        write_safetensors(path, header, **options)


@case("gigabytes of zeros.safetensors", "fitting", "does not fit SqueezeNet")
def _(path):
    write_safetensors(path, entry([1 << 33], [0, 1 << 35]), b"")
    os.truncate(path, path.stat().st_size + (1 << 35))


# Weights: HDF5


@case("outside.h5", "weights", "lies outside the file")
def _(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("a/kernel:0", (4,), "f4", external=[("/etc/hostname", 0, 16)])


@case("inflating.h5", "weights", "more than 128 MiB")
def _(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("a/kernel:0", (1 << 20, 1 << 12), "f4", chunks=True, compression="gzip")


@case("texts.h5", "weights", "where weights are floats")
def _(path):
    with h5py.File(path, "w") as file:
        file["a/kernel:0"] = ["text"]


@case("around in a circle.h5", "weights", "holds no weights")
def _(path):
    with h5py.File(path, "w") as file:
        file["a"] = h5py.SoftLink("/a")
        file.create_group("b")["c"] = file["/"]


@case("shape beyond the file.h5", "weights", "not a valid Keras weight file")
def _(path):
    with h5py.File(path, "w") as file:
        file["a/kernel:0"] = np.full(1000, 7.0, np.float32)
    content = path.read_bytes()
    place = content.index(struct.pack("<QQ", 1000, 1000))  # the extent, and the most that it may be
    path.write_bytes(content[:place] + struct.pack("<QQ", 1 << 24, 1 << 24) + content[place + 16 :])


@case("inflating.keras", "weights", "more than 128 MiB")
def _(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("model.weights.h5", bytes((1 << 27) + 1))


# Images


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, pixels: bytes | None = None) -> bytes:
    """A grey PNG, black unless `pixels` are given."""
    if pixels is None:
        pixels = zeros((width + 1) * height)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """As many bytes of 0, as zlib compresses them."""
    adler = (size % 65521) << 16 | 1
    return b"\x78\xda" + deflated_zeros(size) + struct.pack(">I", adler)


def deflated_zeros(size: int) -> bytes:
    """Without header and sum: one MiB, compressed once, again and again."""

    def compress(count, flush):
        deflate = zlib.compressobj(9, wbits=-15)
        return deflate.compress(bytes(count)) + deflate.flush(flush)

    blocks, rest = divmod(size, 1 << 20)
    return compress(1 << 20, zlib.Z_FULL_FLUSH) * blocks + compress(rest, zlib.Z_FINISH)


@case("30000x30000.png", "image", "30000x30000|exceeds limit")
def _(path):
    path.write_bytes(png(30_000, 30_000))


@case("9000x9000.png", "image", "9000x9000 pixels are too many")
def _(path):
    path.write_bytes(png(9000, 9000))


@case("65000x65000.jpg", "image", "exceeds limit")
def _(path):
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "JPEG")
    content = bytearray(content.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 65_000, 65_000)
    path.write_bytes(content)


@case("scans.jpg", "image", "scans of 4096x4096 pixels are too many")
def _(path):
    content = io.BytesIO()
    Image.new("RGB", (4096, 4096)).save(content, "JPEG", progressive=True)
    content = content.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    path.write_bytes(content[:-2] + last * 2000 + content[-2:])


@case("text.png", "image", "too large")
def _(path):
    path.write_bytes(png(8, 8, chunk(b"zTXt", b"k\0\0" + zeros(1 << 28))))


@case("more pixels than it says.png", "image", "")
def _(path):
    path.write_bytes(png(8, 8, pixels=zeros(1 << 28)))


@case("terabytes.webp", "image", "too much for an image")
def _(path):
    path.write_bytes(b"RIFF" + struct.pack("<I", 0xFFFFFFF0) + b"WEBPVP8 ")
    os.truncate(path, 1 << 40)


def tags() -> bytes:
    """A TIFF whose 3,000 tags all hold the same two megabytes."""
    count, size = 3000, 2_000_000
    data = 8 + 2 + 12 * count + 4
    known = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: data, 277: 1, 278: 16, 279: 256}
    entries = [
        struct.pack("<HHII", tag, 4, 1, known[tag]) if tag in known else struct.pack("<HHII", tag, 1, size, data)
        for tag in range(count)
    ]
    return b"II*\0" + struct.pack("<IH", 8, count) + b"".join(entries) + bytes(4 + size)


@case("tags.tif", "image", "")
def _(path):
    path.write_bytes(tags())


@case("tags.png", "image", "")
def _(path):
    path.write_bytes(png(8, 8, chunk(b"eXIf", tags())))


@case("program.eps", "image", "not an image")
def _(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")


@case("pipe.png", "image", "not a regular file")
def _(path):
    os.mkfifo(path)


@case("zero.png", "image", "not a regular file")
def _(path):
    path.symlink_to("/dev/zero")


# Archives


def write_tar(path: Path, *members: tuple[str, bytes], **fields) -> None:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))


@case("traversal.tar.gz", "archive", "data/a.bin, data/names.txt missing")
def _(path):
    write_tar(path, ("../../data/a.bin", bytes(3000)), ("/data/a.bin", bytes(3000)))


@case("link.tar.gz", "archive", "data/a.bin that is not the published one")
def _(path):
    write_tar(path, ("data/a.bin", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd")


@case("inflating.tar.gz", "archive", "inflates to more")
def _(path):
    write_tar(path, ("data/b.bin", bytes(1 << 27)))


@case("header of gigabytes.tar.gz", "archive", "inflates to more")
def _(path):
    info = tarfile.TarInfo("data/a.bin")
    info.type, info.size = tarfile.XHDTYPE, 1 << 31
    first = zlib.compressobj(9, wbits=31)
    header = b"\x1f\x8b\x08" + bytes(7)  # of a second gzip member
    path.write_bytes(
        first.compress(info.tobuf(tarfile.USTAR_FORMAT)) + first.flush() + header + deflated_zeros(1 << 28) + bytes(8)
    )


# Configurations

GOOD_CONFIG = {
    "dataset": "digits",
    "data_dir": None,
    "eval_split": "test",
    "image_size": 8,
    "crop": False,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "model": {"name": "squeezenet1_1_cifar", "dtype": "float32", "num_classes": 10, "width": 0.1},
    "resident": "auto",
    "resident_limit": 1 << 30,
    "num_workers": 0,
    "steps_per_call": 1,
    "eval_batch_size": 8,
    "compilation_cache": False,
}


def changed(**fields) -> str:
    model = {name.removeprefix("model_"): value for name, value in fields.items() if name.startswith("model_")}
    fields = {name: value for name, value in fields.items() if not name.startswith("model_")}
    return json.dumps(GOOD_CONFIG | fields | {"model": GOOD_CONFIG["model"] | model})


CONFIGS = {
    "deep": ("[" * 200_000, "nests too deeply"),
    "long": (" " * (2 << 20), "longer than"),
    "no text": ("\udcff\udcfe", "cannot be read|not a run's configuration"),
    "a list": ("[]", "no field model"),
    "a method's name": (changed(model_items=1), "not a run's configuration"),
    "images of a gigapixel": (changed(image_size=32_000), "image_size must be a whole number"),
    "a million processes": (changed(num_workers=10**6), "num_workers must be"),
    "batches without end": (changed(eval_batch_size=10**12), "eval_batch_size must be"),
    "not a number": (changed(mean=[0.5, float("nan"), 0.5]), "mean must be three numbers"),
    "numbers of texts": (changed(std="abc"), "std must be three numbers"),
    "a digit too many": (changed(resident_limit=10**400), "resident_limit must be greater than 0"),
    "a net that does not exist": (changed(model_name="__class__"), "there is no net '__class__'"),
    "a function by name": (changed(model_activation="__class__"), "activation='__class__' must be one of"),
    "a field of flax": (changed(model_parent="x"), "has no field 'parent'"),
    "a width beyond all": (changed(model_width=1e300), "width=1e.300 must be"),
    "classes in words": (changed(model_num_classes="10"), "num_classes='10' must be a whole number"),
    "a type of objects": (changed(model_dtype="object"), "model.dtype must be one of"),
}
for _name, (_text, _pattern) in CONFIGS.items():

    @case(f"{_name}.json", "config", _pattern)
    def _(path, content=_text):
        path.write_bytes(content.encode(errors="surrogateescape"))


@case("pipe.json", "config", "not a regular file")
def _(path):
    os.mkfifo(path)


# What a run has recorded


def folder(path: Path, **files) -> None:
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())


RECORDS = {
    "no records": ("[1, 2]\n" * 3, "not records of a run"),
    "records without a step": ('{"loss": 1}\n', "not records of a run"),
    "a record nested deep": ("[" * 200_000 + "\n", ""),
}
for _name, (_text, _pattern) in RECORDS.items():

    @case(_name, "records", _pattern)
    def _(path, content=_text):
        folder(path, metrics__jsonl=content, timing__jsonl=content)


def npz(**arrays) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def lying_npz() -> bytes:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("step.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(64))
    return content.getvalue()


def inflating_npz() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("step.npy", bytes((1 << 28) + 1))
    return content.getvalue()


@case("objects in npz", "predictions", "cannot be read as a run's predictions: Object arrays")
def _(path):
    folder(path, predictions__npz=npz(step=np.array([RunsCode(marker(path))])))


@case("a shape in npz", "predictions", "cannot be read as a run's predictions")
def _(path):
    folder(path, predictions__npz=lying_npz())


@case("inflating npz", "predictions", "inflates to more than 256 MiB")
def _(path):
    folder(path, predictions__npz=inflating_npz())


@case("pickle for npz", "predictions", "cannot be read as a run's predictions")
def _(path):
    folder(path, predictions__npz=pickle.dumps(RunsCode(marker(path))))


# Data sets that TFDS is said to have prepared

FEATURES = {
    "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
    "featuresDict": {
        "features": {
            "image": {
                "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
                "image": {"shape": {"dimensions": ["8", "8", "3"]}, "dtype": "uint8", "encodingFormat": "png"},
            },
            "label": {
                "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
                "classLabel": {"numClasses": "10"},
            },
        }
    },
}
INFO = {
    "name": "strange",
    "version": "1.0.0",
    "fileFormat": "array_record",
    "splits": [{"name": name, "numBytes": "10", "shardLengths": ["1"]} for name in ("train", "test")],
}


def dataset(path: Path, features=FEATURES) -> None:
    directory = path / "strange" / "1.0.0"
    directory.mkdir(parents=True)
    (directory / "dataset_info.json").write_text(json.dumps(INFO))
    (directory / "features.json").write_text(features if isinstance(features, str) else json.dumps(features))
    for split in ("train", "test"):
        (directory / f"strange-{split}.array_record-00000-of-00001").write_bytes(bytes(100))


def replaced(old: str, new: str) -> str:
    return json.dumps(FEATURES).replace(old, new)


DATASETS = {
    "a class of their own": (replaced("tensorflow_datasets.core.features.image_feature", "harm"), "not a class of TF"),
    "another class in the old spelling": (
        replaced('"pythonClassName"', '"type"').replace("tensorflow_", "harm."), "not a class"
    ),
    "a trillion classes": (replaced('"numClasses": "10"', '"numClasses": "1000000000000"'), "at most 1048576"),
    "features nested deep": ("[" * 200_000, "nests too deeply"),
    "long features": (" " * (2 << 20), "longer than"),
    "shards that are none": (json.dumps(FEATURES), "truncated or damaged"),
}  # fmt: skip
for _name, (_features, _pattern) in DATASETS.items():

    @case(_name, "dataset", _pattern)
    def _(path, features=_features):
        dataset(path, features)
