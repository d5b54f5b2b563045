import hashlib
import http.server
import io
import itertools
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from tensorflow_datasets.core.features import image_feature
from tensorflow_datasets.image_classification import cifar as tfds_cifar

from jaxnets.datasets import (
    BUILDERS,
    Cifar10,
    Cifar100,
    Digits,
    archive,
    data_root,
    find_prepared,
    locate,
    open_builder,
)
from jaxnets.errors import UserError

CIFARS = {"cifar10": Cifar10, "cifar100": Cifar100}
FILES = {
    "cifar10": {
        "train": {f"data_batch_{number}.bin": 7 for number in range(1, 6)},
        "test": {"test_batch.bin": 12},
    },
    "cifar100": {"train": {"train.bin": 110}, "test": {"test.bin": 12}},
}


def fake_members(name: str) -> dict[str, bytes]:
    """The files of a small CIFAR archive: random pixels, every class among the labels."""
    rng = np.random.default_rng(0)
    members = {}
    for files in FILES[name].values():
        for file, images in files.items():
            labels = [np.arange(images) % classes for _, _, classes in CIFARS[name].LABELS]
            pixels = rng.integers(0, 256, (images, 3072))
            members[file] = np.column_stack([*labels, pixels]).astype(np.uint8).tobytes()
    for _, file, classes in CIFARS[name].LABELS:
        members[file] = "\n".join(f"{file[:4]}_{index}" for index in range(classes)).encode() + b"\n\n"
    return {f"{CIFARS[name].FOLDER}/{file}": content for file, content in members.items()}


def tar_gz(members) -> bytes:
    """A tar.gz of (name, content) pairs; a `TarInfo` in place of a name is taken as it is."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def publish(monkeypatch):
    """`publish(name, content)` declares `content` the official archive of a CIFAR, at a refusing address."""

    def declare(name: str, content: bytes, url: str = "http://127.0.0.1:9/cifar-10-binary.tar.gz"):
        published = archive.Archive(url, len(content), hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(CIFARS[name], "ARCHIVE", published)
        monkeypatch.setattr(CIFARS[name], "FILES", FILES[name])
        return published

    return declare


def place(root: Path, content: bytes, path: str = "downloads/manual/cifar-10-binary.tar.gz") -> Path:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return target


def examples(builder, split: str) -> list[dict]:
    return list(builder.as_data_source(split))


def assert_nothing_prepared(root: Path, name: str = "cifar10"):
    assert [path.name for path in (root / name).glob("*")] == []


@pytest.mark.parametrize("name", CIFARS)
def test_archive_is_the_one_tfds_pins(name):
    theirs = tfds.builder_cls(name).url_infos
    ours = CIFARS[name].ARCHIVE
    assert theirs[ours.url].checksum == ours.sha256
    assert theirs[ours.url].size == ours.size
    images = {split: sum(files.values()) for split, files in CIFARS[name].FILES.items()}
    assert images == {"train": 50_000, "test": 10_000}


def prepare_with_tfds(name: str, folder: Path, root: Path, monkeypatch):
    """What TFDS's own builder makes of an extracted archive; file and PNG access stand in for TensorFlow's."""
    gfile = SimpleNamespace(GFile=open)
    monkeypatch.setattr(tfds_cifar, "tf", SimpleNamespace(io=SimpleNamespace(gfile=gfile)))

    def encode(self, pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    monkeypatch.setattr(image_feature._ImageEncoder, "_encode_image", encode)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(folder))
    builder = tfds.builder(name, data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return builder


@pytest.mark.parametrize("name", CIFARS)
def test_cifar_is_what_tfds_prepares(name, publish, tmp_path, monkeypatch):
    members = fake_members(name)
    content = tar_gz(members.items())
    publish(name, content)
    place(tmp_path / "ours", content)
    ours = open_builder(name, tmp_path / "ours")

    for file, data in members.items():
        place(tmp_path / "extracted", data, file)
    theirs = prepare_with_tfds(name, tmp_path / "extracted", tmp_path / "theirs", monkeypatch)

    assert ours.info.full_name == theirs.info.full_name
    assert ours.info.features.to_json() == theirs.info.features.to_json()
    assert ours.info.supervised_keys == theirs.info.supervised_keys
    for label, _, _ in CIFARS[name].LABELS:
        assert ours.info.features[label].names == theirs.info.features[label].names
    for split, files in FILES[name].items():
        mine, reference = examples(ours, split), examples(theirs, split)
        assert len(mine) == sum(files.values())
        for left, right in itertools.zip_longest(mine, reference):
            np.testing.assert_equal(left, right)
    # And plain TFDS reads what we prepared as its own.
    again = tfds.builder(name, data_dir=tmp_path / "ours")
    np.testing.assert_equal(examples(again, "test")[0], examples(theirs, "test")[0])


def test_cifar_pixels_and_ids(publish, tmp_path):
    members = fake_members("cifar10")
    content = tar_gz(members.items())
    publish("cifar10", content)
    place(tmp_path, content, "cifar-10-binary.tar.gz")  # directly in data_dir
    builder = open_builder("cifar10", tmp_path)
    by_id = {example["id"].decode(): example for example in examples(builder, "train")}
    assert sorted(by_id) == [f"train_{index:05d}" for index in range(35)]
    record = np.frombuffer(members["cifar-10-batches-bin/data_batch_2.bin"], np.uint8)[3073 : 2 * 3073]
    example = by_id["train_00008"]  # the second of the second file
    assert example["label"] == record[0]
    np.testing.assert_array_equal(example["image"][5, 9], record[1:].reshape(3, 32, 32)[:, 5, 9])


def test_prepared_data_is_reused(publish, tmp_path):
    content = tar_gz(fake_members("cifar10").items())
    publish("cifar10", content)
    path = place(tmp_path, content)
    open_builder("cifar10", tmp_path)
    path.unlink()
    assert open_builder("cifar10:3.0.2", tmp_path).info.splits["test"].num_examples == 12


def edited(**replaced):
    """Members of the CIFAR-10 archive with some contents replaced, left out (None), or added."""
    members = {name.rpartition("/")[2]: (name, content) for name, content in fake_members("cifar10").items()}
    for file, content in replaced.items():
        file = file.replace("__", ".")
        name = members.get(file, (f"cifar-10-batches-bin/{file}",))[0]
        members[file] = (name, content)
    return [(name, content) for name, content in members.values() if content is not None]


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


DATA = b"\0" * 7 * 3073
BAD_ARCHIVES = {
    "member missing": (lambda: tar_gz(edited(data_batch_3__bin=None)), "data_batch_3.bin missing"),
    "member short": (lambda: tar_gz(edited(data_batch_3__bin=DATA[:-1])), "data_batch_3.bin"),
    "member long": (lambda: tar_gz(edited(data_batch_3__bin=DATA + b"\0")), "data_batch_3.bin"),
    "member twice": (lambda: tar_gz([*edited(), ("cifar-10-batches-bin/data_batch_3.bin", DATA)]), "batch_3.bin"),
    "too few names": (lambda: tar_gz(edited(batches__meta__txt=b"cat\ndog\n")), "2 classes"),
    "endless names": (lambda: tar_gz(edited(batches__meta__txt=b"cat\n" * 50_000)), "batches.meta.txt"),
    "link": (
        lambda: tar_gz(
            [*edited(test_batch__bin=None), (link("cifar-10-batches-bin/test_batch.bin", "/etc/passwd"), b"")]
        ),
        "test_batch.bin",
    ),
    "traversal": (
        lambda: tar_gz(
            (f"../../cifar-10-batches-bin/{name.rpartition('/')[2]}", content) for name, content in edited()
        ),
        "missing",
    ),
    "gzip cut": (lambda: tar_gz(edited())[:-20_000], "damaged"),
    "no gzip": (lambda: b"<html>404</html>" * 100, "damaged"),
    "empty": (lambda: b"", "damaged"),
}


@pytest.mark.parametrize("fault", BAD_ARCHIVES)
def test_bad_archive_prepares_nothing(fault, publish, tmp_path):
    """Archives that even have the right checksum: what is read is checked as well."""
    make, message = BAD_ARCHIVES[fault]
    content = make()
    publish("cifar10", content)
    root = tmp_path / "a" / "b" / "data"
    path = place(root, content)
    with pytest.raises(UserError, match=message) as error:
        open_builder("cifar10", root)
    assert str(path) in str(error.value)
    assert_nothing_prepared(root)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files == [path]


def test_extra_members_are_not_written(publish, tmp_path):
    extra = [("../../../evil", b"x"), ("/evil", b"x"), (link("cifar-10-batches-bin/l", ".."), b"")]
    content = tar_gz(extra + edited())
    publish("cifar10", content)
    root = tmp_path / "a" / "data"
    place(root, content)
    assert open_builder("cifar10", root).info.splits["train"].num_examples == 35
    assert not list(tmp_path.rglob("*evil*")) and not Path("/evil").exists()


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_archive_with_wrong_checksum(damage, publish, tmp_path):
    content = tar_gz(fake_members("cifar10").items())
    published = publish("cifar10", content)
    # A gzip of the same size that would unpack to the right members: only the checksum gives it away.
    bad = content[:-100] if damage == "truncated" else content[:4] + b"\1\2\3\4" + content[8:]
    path = place(tmp_path, bad)
    with pytest.raises(UserError, match="bytes instead of" if damage == "truncated" else "SHA-256") as error:
        open_builder("cifar10", tmp_path)
    assert str(path) in str(error.value) and published.url in str(error.value)
    assert_nothing_prepared(tmp_path)


def test_failure_while_writing_leaves_nothing(publish, tmp_path, monkeypatch):
    content = tar_gz(fake_members("cifar10").items())
    publish("cifar10", content)
    place(tmp_path, content)
    whole = Cifar10._generate_examples

    def failing(self, split, content):
        yield from itertools.islice(whole(self, split, content), 5)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Cifar10, "_generate_examples", failing)
    with pytest.raises(UserError, match="No space left"):
        open_builder("cifar10", tmp_path)
    assert_nothing_prepared(tmp_path)
    monkeypatch.setattr(Cifar10, "_generate_examples", whole)
    assert open_builder("cifar10", tmp_path).info.splits["train"].num_examples == 35


def test_no_network_names_the_ways_out(publish, tmp_path):
    published = publish("cifar10", b"never there")
    with pytest.raises(UserError) as error:
        open_builder("cifar10", tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert "data_dir" in message and "configs/digits.py" in message and published.url in message
    assert str(tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz") in message
    assert_nothing_prepared(tmp_path)


def test_silent_server_is_given_up(publish, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts by the backlog and never answers
        publish("cifar10", b"never there", f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-binary.tar.gz")
        with pytest.raises(UserError, match="timed out|no answer"):
            open_builder("cifar10", tmp_path)


def test_silent_name_look_up_is_given_up(publish, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "CONNECT_SECONDS", 0.2)
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: released.wait())
    publish("cifar10", b"never there", "http://example.invalid/cifar-10-binary.tar.gz")
    with pytest.raises(UserError, match="no answer within"):
        open_builder("cifar10", tmp_path)
    released.set()


@pytest.fixture
def serve():
    """`serve(body, length)`: the address of a server that sends `body` under a `Content-Length`."""
    servers = []

    def start(body: bytes, length: int | None = None, status: int = 200) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_download_prepares(publish, serve, tmp_path):
    content = tar_gz(fake_members("cifar10").items())
    publish("cifar10", content, serve(content))
    assert open_builder("cifar10", tmp_path).info.splits["train"].num_examples == 35
    assert [path.name for path in (tmp_path / "downloads").iterdir() if path.is_file()] == ["cifar-10-binary.tar.gz"]


BAD_DOWNLOADS = {
    "breaks off": (lambda content: {"body": content[:5000], "length": len(content)}, "could not be downloaded"),
    "short": (lambda content: {"body": content[:5000]}, "5,000 of"),
    "long": (lambda content: {"body": content + b"\0" * 10}, "not the published archive"),
    "other": (lambda content: {"body": b"\0" * len(content)}, "SHA-256"),
    "not found": (lambda content: {"body": b"gone", "status": 404}, "404"),
}


@pytest.mark.parametrize("fault", BAD_DOWNLOADS)
def test_bad_download_leaves_nothing(fault, publish, serve, tmp_path):
    content = tar_gz(fake_members("cifar10").items())
    answer, message = BAD_DOWNLOADS[fault]
    publish("cifar10", content, serve(**answer(content)))
    with pytest.raises(UserError, match=message):
        open_builder("cifar10", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert_nothing_prepared(tmp_path)


def test_digits_are_scikit_learns(tmp_path, capfd):
    builder = open_builder("digits", tmp_path)
    assert Path(builder.data_path) == tmp_path / "digits" / "1.0.0"
    assert builder.info.features["image"].shape == (8, 8, 1)
    digits = load_digits()
    indices = {}
    for split in ("train", "test"):
        found = examples(builder, split)
        indices[split] = {int(example["id"].decode().removeprefix("digits_")) for example in found}
        assert len(indices[split]) == len(found)
        for example in found:
            index = int(example["id"].decode().removeprefix("digits_"))
            assert example["label"] == digits.target[index]
            assert abs(example["image"][..., 0] / 255 - digits.images[index] / 16).max() <= 0.5 / 255
    assert (len(indices["train"]), len(indices["test"])) == (1437, 360)
    assert indices["train"].isdisjoint(indices["test"])
    share = np.bincount(digits.target[sorted(indices["test"])]) / np.bincount(digits.target)
    assert abs(share - 0.2).max() < 0.01
    assert capfd.readouterr().out == ""  # standard output belongs to the result


def test_digits_split_is_fixed(digits_dir):
    builder = open_builder("digits", digits_dir)
    ids = sorted(int(example["id"].decode().removeprefix("digits_")) for example in examples(builder, "test"))
    target = load_digits().target
    by_class = [index for digit in range(10) for index in range(1797) if target[index] == digit]
    assert ids == sorted(by_class[0::5])
    assert (ids[:5], sum(ids)) == ([0, 2, 4, 17, 21], 322701)


def test_digits_fall_back_to_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    builder = open_builder("digits", tmp_path / "file")
    assert (tmp_path / "cache") in Path(builder.data_path).parents
    written = (Path(builder.data_path) / "dataset_info.json").stat().st_mtime_ns
    open_builder("digits", tmp_path / "file")
    assert (Path(builder.data_path) / "dataset_info.json").stat().st_mtime_ns == written


def test_digits_work_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    builder = open_builder("digits", tmp_path / "file")
    assert builder.info.splits["test"].num_examples == 360
    shutil.rmtree(Path(builder.data_path).parents[1])


def test_two_processes_may_prepare_at_once(tmp_path, monkeypatch):
    whole = Digits._split_generators

    def overtaken(self, dl_manager):
        monkeypatch.setattr(Digits, "_split_generators", whole)
        Digits(data_dir=tmp_path).download_and_prepare()  # another process, and it is done first
        return whole(self, dl_manager)

    monkeypatch.setattr(Digits, "_split_generators", overtaken)
    assert open_builder("digits", tmp_path).info.splits["test"].num_examples == 360
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize("name", CIFARS)
def test_unwritable_data_dir(name, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match="not a writable directory"):
        open_builder(name, tmp_path / "file")


@pytest.mark.parametrize(
    "name", ["cifar", "", "..", "digits/..", "../digits", "/digits", "digits:9.9.9", "cifar10:1.0.0", "a b"]
)
def test_unknown_data_set_lists_what_exists(name, digits_dir):
    with pytest.raises(UserError, match="unknown dataset") as error:
        open_builder(name, digits_dir)
    for known in (*BUILDERS, str(digits_dir), "prepared digits"):
        assert known in str(error.value)


def test_newest_version_of_a_foreign_data_set_opens(tmp_path):
    source = Path(open_builder("digits", tmp_path).data_path)
    for version in ("1.9.0", "1.10.0", "incomplete.ABC_2.0.0"):
        target = tmp_path / "other" / "small" / version
        shutil.copytree(source, target)
        for path in target.glob("digits-*"):
            path.rename(target / path.name.replace("digits-", "other-"))
        info = json.loads((target / "dataset_info.json").read_text())
        info |= {"name": "other", "configName": "small", "version": version.rpartition("_")[2]}
        (target / "dataset_info.json").write_text(json.dumps(info))
    builder = open_builder("other/small", tmp_path)
    assert builder.info.full_name == "other/small/1.10.0"
    assert len(examples(builder, "test")) == 360
    assert open_builder("other/small:1.9.0", tmp_path).info.full_name == "other/small/1.9.0"
    with pytest.raises(UserError, match="other/small"):  # the configuration is missing
        open_builder("other", tmp_path)


@pytest.fixture
def prepared(digits_dir, tmp_path) -> Path:
    """Prepared digits in `tmp_path`, to be damaged."""
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    return Path(open_builder("digits", tmp_path).data_path)


def test_format_without_random_access(prepared, tmp_path):
    info = json.loads((prepared / "dataset_info.json").read_text())
    (prepared / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError) as error:
        open_builder("digits", tmp_path)
    assert "tfrecord" in str(error.value)
    assert f"tfds convert_format --dataset_version_dir={prepared} --out_file_format=array_record" in str(error.value)


def test_converted_format_opens(prepared, tmp_path):
    """What `tfds convert_format` leaves: the old format first, array_record beside it."""
    info = json.loads((prepared / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (prepared / "dataset_info.json").write_text(json.dumps(info))
    assert len(examples(open_builder("digits", tmp_path), "test")) == 360


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_description(file, damage, prepared, tmp_path):
    text = (prepared / file).read_text()
    if damage == "missing":
        (prepared / file).unlink()
    else:
        (prepared / file).write_text(text[: len(text) // 2] if damage == "truncated" else "")
    with pytest.raises(UserError, match="delete it") as error:
        open_builder("digits", tmp_path)
    assert str(prepared) in str(error.value) and "\n" not in str(error.value)


def test_a_data_set_of_a_class_that_tfds_has_not_is_refused_and_not_called_damaged(prepared, tmp_path):
    features = json.loads((prepared / "features.json").read_text())
    (prepared / "features.json").write_text(json.dumps(features | {"pythonClassName": "mine.Features"}))
    with pytest.raises(UserError, match="is refused: its features.json names mine.Features, which is no") as error:
        open_builder("digits", tmp_path)
    assert "delete" not in str(error.value) and str(prepared) in str(error.value)


def test_a_feature_may_be_called_like_a_class():
    scalar = "tensorflow_datasets.core.features.Scalar"
    nested = json.dumps({"x": {"type": "nested.X", "content": json.dumps([{"type": "deeper.X"}])}})
    features = {"type": {"pythonClassName": scalar}, "python_class_name": "other.X", "json": nested, "text": "[1"}
    assert list(locate._class_names(features)) == [scalar, "other.X", "nested.X", "deeper.X"]


def test_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "environment"))
    assert data_root(tmp_path / "given") == tmp_path / "given"
    assert data_root() == tmp_path / "environment"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert data_root(None) == Path.home() / "tensorflow_datasets"
    assert data_root("~/x") == Path.home() / "x"


def test_preparing_needs_no_tensorflow(tmp_path):
    script = (
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "hide = lambda name, *rest: None if name.split('.')[0] == 'tensorflow' else find(name, *rest)\n"
        "PathFinder.find_spec = hide\n"
        "from jaxnets.datasets import open_builder\n"
        f"print(len(open_builder('digits', {str(tmp_path)!r}).as_data_source('test')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "360\n"), done.stderr


def test_real_cifar10_opens(shared_dir):
    """A directory that another program prepared with plain TFDS."""
    builder = open_builder("cifar10", shared_dir / "tensorflow_datasets")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 50_000,
        "test": 10_000,
    }
    assert builder.info.features["label"].names[3] == "cat"
    assert locate._prepared(shared_dir / "tensorflow_datasets") == ["cifar10"]


def test_only_what_is_prepared_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find_prepared("digits", tmp_path / "data") is None and not list(tmp_path.iterdir())
    open_builder("digits", tmp_path / "data")
    for name in ("digits", "digits:1.0.0"):
        assert find_prepared(name, tmp_path / "data") == tmp_path / "data" / "digits" / "1.0.0"
    for name in ("digits:2.0.0", "cifar10", "no name", ""):
        assert find_prepared(name, tmp_path / "data") is None
