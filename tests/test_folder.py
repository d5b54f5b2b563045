"""Folders of images: which files belong to which class and split, in which order, and every wrong folder."""

import logging
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxnets import data, image_files
from jaxnets.datasets import folder
from jaxnets.errors import UserError


def place(directory, *names):
    for number, name in enumerate(names):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (number, 100, 0)).save(path)


@pytest.fixture
def flat(tmp_path):
    """Two classes, one with a folder below it, among files that are none of its images."""
    place(tmp_path, *(f"cat/{i}.png" for i in range(10)), *(f"dog/more/{i}.JPG" for i in range(10)))
    place(tmp_path, ".cache/a.png", "cat/.hidden.png", "loose.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


@pytest.fixture
def split(tmp_path):
    """train and val, which lacks a class."""
    place(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/emu/c.png", "val/dog/d.png", "val/emu/e.png")
    return tmp_path


def names(files):
    return [(os.path.basename(path), label) for path, label in files]


def test_a_folder_of_classes_is_one_split_with_the_classes_mixed(flat):
    found = folder.read_folder(f"folder:{flat}")
    assert found.class_names == ("cat", "dog") and list(found.splits) == ["train"]
    files = found.splits["train"]
    assert sorted(files) == sorted(
        [(str(flat / "cat" / f"{i}.png"), 0) for i in range(10)]
        + [(str(flat / "dog" / "more" / f"{i}.JPG"), 1) for i in range(10)]
    )
    assert 0 < sum(files.labels[:10]) < 10


def test_the_order_is_of_the_names_alone_and_stays_when_files_are_added(flat, tmp_path_factory):
    before = names(folder.read_folder(f"folder:{flat}").splits["train"])
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    flat.rename(moved)
    assert names(folder.read_folder(f"folder:{moved}").splits["train"]) == before
    place(moved, "cat/later.png")
    after = names(folder.read_folder(f"folder:{moved}").splits["train"])
    assert [file for file in after if file != ("later.png", 0)] == before


def test_slices_share_the_files_among_them(flat):
    found = folder.read_folder(f"folder:{flat}")
    parts = [found.select(split) for split in ("train[:80%]", "train[80%:]")]
    assert [len(part) for part in parts] == [16, 4]
    assert list(found.select("train[:80%]+train[80%:]")) == [*parts[0], *parts[1]] == list(found.splits["train"])
    assert list(found.select("train[-3:]")) == list(found.splits["train"])[-3:]


def test_folders_in_train_make_splits_of_what_stands_beside_it(split):
    found = folder.read_folder(f"folder:{split}")
    assert found.class_names == ("cat", "dog", "emu") and list(found.splits) == ["train", "val"]
    assert sorted(names(found.splits["val"])) == [("d.png", 1), ("e.png", 2)]


def test_a_class_may_be_called_train(tmp_path):
    place(tmp_path, "car/a.png", "train/b.png")
    assert folder.read_folder(f"folder:{tmp_path}").class_names == ("car", "train")


@pytest.mark.parametrize("name", ["Train", "training"])
def test_splits_of_which_none_is_called_train_are_no_classes(tmp_path, name):
    place(tmp_path, f"{name}/cat/a.png", f"{name}/dog/b.png", "Test/cat/c.png", "Test/dog/d.png")
    with pytest.raises(UserError, match="has a folder 'Test' of folders, like a split, but none called 'train'"):
        folder.read_folder(f"folder:{tmp_path}")


def test_a_class_may_have_folders_and_be_called_test(tmp_path):
    place(tmp_path, "car/2024/a.png", "test/b.png", "val/2025/c.png")
    assert folder.read_folder(f"folder:{tmp_path}").class_names == ("car", "test", "val")


def test_a_class_of_another_split_alone_is_refused(split):
    place(split, "val/yak/f.png", "unlabelled/unknown/g.png")
    with pytest.raises(UserError, match="val has a class 'yak' that train does not have"):
        data.open_split(f"folder:{split}", "train+val", image_size=8)
    assert len(data.open_split(f"folder:{split}", "train", image_size=8)) == 3  # the others are not asked for


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("folder:", "names no folder"),
        ("folder:{}/missing", "no such folder"),
        ("folder:{}/file", "no such folder"),
        ("folder:{}/empty", "a folder of image files for each class"),
        ("folder:{}/bare", "a folder of image files for each class"),
    ],
)
def test_what_is_no_folder_of_classes_is_refused(tmp_path, dataset, message):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        data.open_split(dataset.format(tmp_path), "train", image_size=8)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_validation_images_are_found_by_any_of_their_names(split, name):
    (split / "val").rename(split / name)
    for asked in ("val", "valid", "validation"):
        opened = data.open_split(f"folder:{split}", f"{asked}[:50%]", image_size=8)
        assert len(opened) == 1 and f"/{name}/" in opened.source.paths[0]
    assert len(data.open_split(f"folder:{split}", "all", image_size=8)) == 5


def test_of_two_validation_folders_each_has_its_own_name(split):
    place(split, "valid/cat/x.png")
    sizes = [len(data.open_split(f"folder:{split}", name, image_size=8)) for name in ("val", "valid")]
    assert sizes == [2, 1]
    with pytest.raises(UserError, match="split 'validation' .* does not exist"):
        data.open_split(f"folder:{split}", "validation", image_size=8)


def test_a_folder_is_looked_through_once_for_all_its_splits(split, monkeypatch):
    looked = []
    monkeypatch.setattr(data, "read_folder", lambda dataset: looked.append(dataset) or folder.read_folder(dataset))
    both = data.open_splits(f"folder:{split}", ("train", "val"), image_size=8)
    assert [len(part) for part in both] == [3, 2] and len(looked) == 1


@pytest.mark.parametrize("wanted", ["missing", "train[:0]", "train[50:]", "train[", "", "all[:90%]"])
def test_a_split_that_is_not_there_lists_those_that_are(split, wanted):
    with pytest.raises(UserError, match=r"train \(3 examples\), val \(2 examples\)") as error:
        data.open_split(f"folder:{split}", wanted, image_size=8)
    assert repr(wanted) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [("train", "val", 0), ("train", "train[50%:]", 1), ("train[:2]", "train[2:]", 0), ("train+val", "val", 2)],
)
def test_examples_that_two_splits_share_are_counted(split, one, other, shared):
    splits = [data.open_split(f"folder:{split}", name, image_size=8) for name in (one, other)]
    assert data.count_shared(*splits) == data.count_shared(*splits[::-1]) == shared


def test_decoded_images_have_the_colours_of_their_class(tmp_path):
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (9 + i, 20), colour).save(tmp_path / name / f"{i}.png")
    opened = data.open_split(f"folder:{tmp_path}", "train", image_size=8, crop=True)
    assert (len(opened), opened.class_names) == (10, ("blue", "red"))
    batch = data.decode(pickle.loads(pickle.dumps(opened)), progress=False)
    np.testing.assert_array_equal(
        batch["image"][..., 0], np.broadcast_to(batch["label"][:, None, None] * 255, (10, 8, 8))
    )
    assert sorted(batch["label"]) == [0] * 5 + [1] * 5


def test_photographs_are_turned_as_their_exif_data_say_and_transparent_ones_show_white(tmp_path):
    (tmp_path / "all").mkdir()
    halves = Image.new("RGB", (16, 16), (200, 0, 0))
    halves.paste((0, 0, 200), (8, 0, 16, 16))
    exif = halves.getexif()
    exif[0x0112] = 8  # the right of what is stored is the top
    halves.save(tmp_path / "all" / "turned.png", exif=exif)
    turned = data.decode(data.open_split(f"folder:{tmp_path}", "train", image_size=16), progress=False)["image"][0]
    assert (turned[:8] == (0, 0, 200)).all() and (turned[8:] == (200, 0, 0)).all()
    (tmp_path / "all" / "turned.png").unlink()
    Image.new("RGBA", (16, 16), (200, 0, 0, 0)).save(tmp_path / "all" / "glass.png")
    glass = data.decode(data.open_split(f"folder:{tmp_path}", "train", image_size=16), progress=False)["image"][0]
    assert (glass == 255).all()


def test_a_damaged_file_is_named_and_no_folder_is_to_be_deleted(flat):
    (flat / "dog" / "broken.jpg").write_bytes(b"\xff\xd8 not a whole image")
    with pytest.raises(UserError, match=r"broken\.jpg cannot be read .*; replace it, or remove it if no run") as error:
        data.decode(data.open_split(f"folder:{flat}", "train", image_size=8), progress=False)
    assert "delete" not in str(error.value)


def test_a_disk_that_fails_is_not_the_files_fault(flat, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(5, "Input/output error")

    split = data.open_split(f"folder:{flat}", "train", image_size=8)
    monkeypatch.setattr(image_files, "open_image", fails)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)$"):
        data.decode(split, progress=False)


def test_a_folders_name_holds_anywhere(flat, monkeypatch):
    monkeypatch.chdir(flat.parent)
    assert folder.absolute(f"folder:{flat.name}") == f"folder:{flat}"
    assert folder.absolute("cifar10") == "cifar10"


def test_a_class_without_images_is_said(flat, caplog):
    place(flat, "emu/.hidden.png")
    found = folder.read_folder(f"folder:{flat}")
    assert found.class_names == ("cat", "dog", "emu") and "no image files" not in caplog.text
    found.select("train")
    assert f"train of {flat} holds no image files of class emu" in caplog.text
    for name in ("ant", "bee", "cow"):
        place(flat, f"{name}/.hidden.png")
    folder.read_folder(f"folder:{flat}").select("train[:1]")
    assert "train[:1] of" in caplog.text and "class ant, bee, c" in caplog.text and "and 2 more" in caplog.text


def test_what_a_folder_holds_and_nothing_uses_is_said(split, caplog):
    caplog.set_level(logging.INFO, logger="jaxnets")
    place(split, "extra/cat/f.png", "val/loose.png", "val/more.jpg", "val/._hidden.jpg")
    (split / "val" / "notes.txt").touch()
    data.open_splits(f"folder:{split}", ("train[:2]", "train[2:]"), image_size=8)
    assert f"2 image files of {split / 'val'} are left out: they are not in a class's folder" in caplog.text
    unnamed = f"{split} holds splits that config.train_split and config.eval_split do not name: "
    assert unnamed + "extra (1 images), val (2 images)" in caplog.text
    caplog.clear()
    data.open_splits(f"folder:{split}", ("train", "validation"), image_size=8)
    assert unnamed + "extra (1 images)\n" in caplog.text
    caplog.clear()
    data.open_split(f"folder:{split}", "val", image_size=8)  # as an evaluation does
    assert unnamed not in caplog.text


def test_a_single_class_is_warned_of(tmp_path, caplog):
    place(tmp_path, "photos/cat/a.png", "photos/dog/b.png")
    folder.read_folder(f"folder:{tmp_path}")
    assert f"{tmp_path} holds a single class, photos: there is nothing to learn" in caplog.text


def test_files_that_are_no_images_are_counted(flat, caplog):
    caplog.set_level(logging.INFO, logger="jaxnets")
    for name in ("cat/a.HEIC", "dog/b.heic", "dog/more/notes", "dog/.DS_Store"):
        (flat / name).write_text("not an image")
    folder.read_folder(f"folder:{flat}")
    assert f"4 files in {flat} are left out because their names do not end like an image's: .heic 2" in caplog.text
    assert ".txt 1" in caplog.text and "none 1" in caplog.text


def test_a_folder_that_cannot_be_read_is_no_empty_one(flat, monkeypatch):
    """Its files would be missing in silence."""
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("more"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="dog/more cannot be read: Permission denied"):
        folder.read_folder(f"folder:{flat}")
